"""Samplers against the plain loop: the same weights, prompts and process.

The plain loop is how LLaDA, d1 and dllm sample: every step pushes the full canvas through network
and head, takes a softmax at every position and a top-k in every row; an autoregressive policy
computes the whole text again for each token. Ties go to the leftmost position, as in
`mdmrl.sampling`, so that exact samplers give identical tokens at temperature 0.
"""

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from mdmrl.config import require, unknown
from mdmrl.policies import Policy, load_policy
from mdmrl.policies.families import FAMILIES
from mdmrl.policies.load import DTYPES
from mdmrl.progress import Progress
from mdmrl.provenance import environment, pick_device
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.denoise import Canvas
from mdmrl.sampling.schedule import evenly
from mdmrl.zoo.pretrain import fresh_model
from mdmrl.zoo.recipes import shipped_tokenizer

# Published shapes (see `SHAPE`) with random weights: they say how fast, nothing of how good.
SHAPES = {
    "large-vocabulary": (256, 4, 1024, 4, 4, 126_464),
    "smollm2": (576, 30, 1536, 9, 3, 49_152),
    "qwen2.5-7b": (3584, 28, 18_944, 28, 4, 152_064),
    "llada-8b": (4096, 32, 12_288, 32, 32, 126_464),
}


def bench_samplers(
    policy: str,
    lengths: Sequence[int] = (128,),
    steps: Sequence[int] = (),
    batches: Sequence[int] = (1, 16),
    block_length: int | None = None,
    prompt_length: int = 128,
    repeats: int = 3,
    samplers: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "float32",
) -> dict:
    """Time every sampler of a policy's family; run it on an idle machine.

    Args:
        policy: a name that `load_policy` takes, or `random-KIND:SHAPE`, KIND one of ar, mdm and bd,
            SHAPE one of `SHAPES`.
        steps: of denoising, by default 64. block_length: of samplers with blocks, and of random
            block diffusion, by default 32.
        prompt_length: tokens of the longest prompt of a batch; the others are shorter.
        samplers: only these, beside their plain loop, by their names in the table; none means all.
    Returns:
        `rows`, one a sampler with medians over `repeats` after one run to warm up: seconds,
        samples and tokens a second, forward passes, positions pushed through the network, peak
        memory above what was held before; `speedup` over the plain loop with the same blocks, and
        the `agreement` with it, the share of equal tokens. And the machine.
    """
    for name, counts in {"repeats": [repeats], "lengths": lengths, "batch": batches}.items():
        require(min(counts) >= 1, f"{name}={min(counts)}: expected at least 1")
    blocks = 32 if block_length is None else block_length
    require(blocks >= 1, f"block_length={blocks}: expected at least 1")
    loaded = bench_policy(policy, blocks, device, dtype)
    require(loaded.denoises or not steps, f"steps={steps}: {policy} has no denoising steps")
    require(
        block_length in (None, loaded.block_length)
        or (loaded.denoises and loaded.block_length is None),
        f"block_length={block_length}: {policy} has no such blocks; leave it out",
    )
    work = [  # all of it before the first is timed, so that bad input costs nothing
        (
            {"batch": batch, "length": length, "steps": count},
            _prompts(loaded, batch, prompt_length),
            _chosen(_samplers(loaded, length, count, blocks), samplers),
        )
        for length in lengths
        for batch in batches
        for count in (steps or [64] if loaded.denoises else [length])
    ]
    rows, groups = [], [(size, prompts, own) for size, prompts, group in work for own in group]
    with Progress(policy, 0, len(groups), unit="comparison") as progress:
        for done, (size, prompts, group) in enumerate(groups, start=1):
            rows += _compared(loaded, prompts, group, size, repeats)
            progress.update(done, {})
    asked = {"policy": policy, "prompt_length": prompt_length, "repeats": repeats}
    return {**asked, "rows": rows, **environment(loaded.device)}


def print_bench(numbers: dict) -> None:
    """The rows on the terminal."""
    title = f"{numbers['policy']} on {numbers['machine']}, {numbers['threads']} threads"
    names = (name.replace("_", " ") for name in numbers["rows"][0])
    table = Table(*names, title=title, title_justify="left")
    for row in numbers["rows"]:
        table.add_row(*(f"{c:,.3g}" if isinstance(c, float) else f"{c}" for c in row.values()))
    Console(width=150).print(table)


def bench_policy(
    name: str, block_length: int, device: str = "auto", dtype: str = "float32"
) -> Policy:
    """A policy by name, or one with random weights; see `bench_samplers`."""
    kind, colon, shape = name.partition(":")
    if not colon:
        return load_policy(name, device=device, dtype=dtype)
    kind = kind.removeprefix("random-")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    require(
        kind in FAMILIES and shape in SHAPES,
        f"policy={name!r}: expected random-KIND:SHAPE with KIND of {', '.join(FAMILIES)} and SHAPE "
        f"of {', '.join(SHAPES)}",
    )
    tokenizer, settings = shipped_tokenizer(), (4096, block_length, 0, pick_device(device))
    model = fresh_model(kind, tokenizer, SHAPES[shape], *settings)
    model.model.to(DTYPES[dtype])
    return FAMILIES[kind](model, tokenizer)


def _prompts(policy: Policy, batch: int, longest: int) -> list[str]:
    """Prompts of unequal lengths, the first of `longest` tokens with the chat template."""
    room = longest - policy.encode(["1"]).input_ids.shape[1] + 1
    require(room >= 1, f"prompt_length={longest}: expected more than the chat template's tokens")
    return ["1" * (room - room // 2 * row // batch) for row in range(batch)]


def _samplers(
    policy: Policy, length: int, steps: int, block_length: int
) -> list[tuple[Callable, SamplerConfig, dict[str, SamplerConfig]]]:
    """Plain loops, their settings, and what is to be compared with each."""
    if not policy.denoises:
        base = SamplerConfig(max_new_tokens=length)
        return [(plain_autoregressive, base, {"key-value cache": base})]
    # As the peers do: end tokens are neither postponed nor waited for.
    base = SamplerConfig(max_new_tokens=length, steps=steps, end_last=False, stop_at_end=False)
    if policy.block_length is not None:
        return [(plain_denoising, base, {"block cache": base})]
    whole = [(plain_denoising, base, {"exact": base})]
    blocks = base.replace(block_length=block_length)
    compared = {
        f"exact, blocks of {block_length}": blocks,
        "prefix cache": blocks.replace(cache="prefix"),
        "dual cache": blocks.replace(cache="dual"),
        "threshold 0.9": blocks.replace(steps=None, threshold=0.9),
        "threshold 0.9, dual cache": blocks.replace(steps=None, threshold=0.9, cache="dual"),
    }
    return [*whole, (plain_denoising, blocks, compared)]


def _chosen(groups: list[tuple], names: Sequence[str]) -> list[tuple]:
    """The groups of `_samplers` with only those of `names`, all of them for none."""
    known = [name for *_, compared in groups for name in compared]
    for name in names:
        if name not in known:
            raise unknown("sampler", name, known)
    chosen = []
    for *plain, compared in groups:
        if kept := {name: compared[name] for name in compared if name in (names or known)}:
            chosen.append((*plain, kept))
    return chosen


def _compared(policy, prompts, group, size: dict, repeats: int) -> list[dict]:
    """Rows of one plain loop and of what is compared with it, taken in turns."""
    plain, config, others = group
    blocks = f", blocks of {config.block_length}" if config.block_length else ""
    calls = {f"plain loop{blocks}": partial(plain, policy, prompts, config)}
    calls |= {name: partial(_ours, policy, prompts, other) for name, other in others.items()}
    turns = [  # the first is to warm up
        {name: _measured(call, policy.device) for name, call in calls.items()}
        for _ in range(1 + repeats)
    ][1:]
    rows, first = [], None
    for name in calls:
        seconds, peak, _ = zip(*(turn[name] for turn in turns), strict=True)
        seconds, (tokens, nfe, token_forwards) = statistics.median(seconds), turns[0][name][2]
        first = first or (seconds, tokens)
        made = {"samples": len(prompts), "tokens": tokens.numel()}
        pace = {f"{what}_per_second": count / seconds for what, count in made.items()}
        costs = {"nfe": nfe, "token_forwards": token_forwards, "peak_mb": statistics.median(peak)}
        agreement = (tokens == first[1]).float().mean().item()
        against = {"speedup": first[0] / seconds, "agreement": agreement}
        rows.append({"sampler": name, **size, "seconds": seconds, **pace, **costs, **against})
    return rows


def _ours(policy, prompts, config):
    output = generate(policy, prompts, config)
    return output.completion_ids, output.nfe, output.token_forwards


@torch.no_grad()
def plain_denoising(policy, prompts: list[str], config: SamplerConfig):
    """LLaDA's loop at temperature 0: completions (B, L), forward passes, positions computed."""
    length = config.max_new_tokens
    size = config.block_length or policy.block_length or length
    encoded = policy.encode(prompts, length)
    canvas, attention, _, width = Canvas.behind(encoded, length, policy.mask_token_id)
    pattern = policy.pattern(width, length)
    nfe = token_forwards = 0
    starts = range(width, width + length, size)
    for start, steps in zip(starts, evenly(config.denoising_steps, len(starts)), strict=True):
        # Blocks to come are no part of a block-causal canvas.
        seen = slice(width + length if pattern is None else start + size)
        for quota in evenly(size, steps):
            ids, blocks = canvas[:, seen], None if pattern is None else pattern[seen]
            logits = policy.logits(ids, attention[:, seen], blocks)
            logits[..., policy.mask_token_id] = -torch.inf
            confidence, tokens = logits.log_softmax(-1).max(-1)
            confidence[ids != policy.mask_token_id] = -torch.inf
            confidence[:, start + size :] = -torch.inf
            for row in range(len(canvas)):
                chosen = confidence[row].sort(descending=True, stable=True).indices[:quota]
                canvas[row, chosen] = tokens[row, chosen]
            nfe, token_forwards = nfe + 1, token_forwards + ids.numel()
    return canvas[:, width:], nfe, token_forwards


@torch.no_grad()
def plain_autoregressive(policy, prompts: list[str], config: SamplerConfig):
    """Greedy without a cache: completions (B, L), forward passes, positions computed."""
    given = policy.encode(prompts, config.max_new_tokens)
    ids, attention, width = given.input_ids, given.attention_mask, given.input_ids.shape[1]
    ended = torch.zeros(len(ids), dtype=torch.bool, device=policy.device)
    nfe = token_forwards = 0
    while nfe < config.max_new_tokens and not ended.all():
        hidden = policy.hidden_states(ids, attention)[:, -1]
        nfe, token_forwards = nfe + 1, token_forwards + ids.numel()
        tokens = policy.head(hidden).argmax(-1).masked_fill(ended, policy.pad_token_id)
        ended |= policy.is_end(tokens)
        ids = torch.cat([ids, tokens[:, None]], 1)
        attention = torch.cat([attention, attention.new_ones(len(ids), 1)], 1)
    missing = config.max_new_tokens - (ids.shape[1] - width)
    return F.pad(ids[:, width:], (0, missing), value=policy.pad_token_id), nfe, token_forwards


def _measured(call: Callable, device: torch.device) -> tuple:
    """Of one call on `device`: seconds, peak memory above what was held before in MB, result."""
    card = device.type == "cuda"
    if card:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    else:
        # Linux: give freed memory back, then reset the process's high-water mark.
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        held = _resident("VmRSS")
    start = time.perf_counter()
    result = call()
    if card:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if card else _resident("VmHWM")
    return seconds, (peak - held) / 1e6, result


def _resident(field: str) -> float:
    """A field of /proc/self/status in bytes; nan where there is none."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text() if status.exists() else "")
    return 1024.0 * int(found[1]) if found else float("nan")
