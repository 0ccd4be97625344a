"""A completion in a terminal: which step wrote what, in colour."""

import time
from collections.abc import Iterator

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mdmrl.policies import Policy
from mdmrl.sampling import SamplerOutput
from mdmrl.study.widgets import MASK_SHOWN

SHADES = colormaps["viridis"]
DARKEST = 0.35  # of the shades, on a black terminal
PLAYED = 6.0  # seconds, about, that a text takes to appear
UNSURE = 0.5  # below this probability a token is dim


def show(
    output: SamplerOutput, policy: Policy, watch: bool = False, console: Console | None = None
) -> None:
    """Print the first completion of a sampler: the text alone where it goes to no terminal, else
    each token in the colour of its step; `watch` plays the steps first."""
    console = console or Console()
    if not console.is_terminal:
        console.file.write(output.completions[0] + "\n")
        return
    shown = list(frames(output, policy))
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for frame in shown if watch else shown[-1:]:
            live.update(frame, refresh=True)
            time.sleep(min(PLAYED / len(shown), 0.3) if watch else 0)
    legend = [(f"{shade:.0%} ", _shade(shade)) for shade in (0.0, 0.25, 0.5, 0.75, 1.0)]
    cost = f"of {output.nfe} forward passes, {output.token_forwards:,} positions computed; "
    console.print(Text.assemble("after ", *legend, cost, (f"below p = {UNSURE}", "dim")))


def frames(output: SamplerOutput, policy: Policy) -> Iterator[Text]:
    """The first completion after each step, from none on. A token that was revised appears when it
    was written last; a text without a trajectory grows by a token a step."""
    written = output.completion_mask[0] & ~policy.is_end(output.completion_ids[0])
    when = torch.arange(1, len(written) + 1)
    for number, step in enumerate(output.trajectory or (), start=1):
        when[step.positions[step.rows == 0].cpu()] = number
    when = when[written.cpu()].tolist()
    sure = output.logprobs[0][written].exp().tolist()
    pieces = policy.pieces(output.completion_ids[0][written].tolist())
    last = max(when, default=0) if output.trajectory is None else len(output.trajectory)
    unwritten = "" if output.trajectory is None else MASK_SHOWN
    for step in range(last + 1):
        shown = (
            (piece, f"{'dim ' * (p < UNSURE)}{_shade(n / last)}") if n <= step else unwritten
            for piece, n, p in zip(pieces, when, sure, strict=True)
        )
        yield Text.assemble(*shown)


def _shade(share: float) -> str:
    """The colour of what was written after this share of the steps."""
    return to_hex(SHADES(DARKEST + (1 - DARKEST) * share))
