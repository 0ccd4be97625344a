"""What a reader of a notebook can try without code: a bench for samplers, runs side by side, the
arms of the KL study, and the bounds of masked diffusion. Each is a `mdmrl.study.widgets.Choices`,
whose static twin shows what is chosen first."""

import html
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pandas import DataFrame, json_normalize

from mdmrl.config import require
from mdmrl.diffusion import SCHEDULES, discrete_terms, limit_loss
from mdmrl.diffusion_exact import chain_log_likelihood
from mdmrl.policies import Policy, Prompt
from mdmrl.runs import read_rows
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.rules import RULES
from mdmrl.study import colours, plots
from mdmrl.study.chain import Chain
from mdmrl.study.live import completions
from mdmrl.study.outputs import project_root
from mdmrl.study.pieces import pieces_folder, read_table
from mdmrl.study.player import Player
from mdmrl.study.widgets import Choices, picture

OF_RUNS = (colours.AR, colours.MDM, colours.BD, colours.INDIGO, colours.WINE, colours.SKY)
SIZE = {"figsize": (plots.TEXT_WIDTH, 2.4), "layout": "constrained"}
COLUMNS = ("reward", "eval/reward", "eval/accuracy", "kl", "kl/max", "loss", "grad_norm/surrogate")
COLUMNS += ("grad_norm/kl", "entropy", "repetition", "completions/mean_length", "step_time")
WHOLE = "whole"


def sampler_bench(policy: Policy, prompt: Prompt, max_new_tokens: int = 128, **begin) -> Choices:
    """Complete `prompt` with the sampler that is chosen: the text, shaded as `Player` has it, and
    what it cost. The random numbers are the same every time.

    Raises:
        InputError: an autoregressive policy.

    >>> sampler_bench(policy, "A patient has ...", steps=16)
    """
    require(policy.denoises, f"a policy of kind {policy.kind!r} has no steps to choose")
    sizes = [n for n in range(1, max_new_tokens) if max_new_tokens % n == 0]
    counts = [2**n for n in range(max_new_tokens.bit_length()) if 2**n < max_new_tokens]

    def show(steps: int, block_length: str | int, temperature: float, rule: str) -> str:
        blocks = {} if block_length == WHOLE else {"block_length": block_length}
        chosen = {"steps": steps, "temperature": temperature, "remasking": rule, **blocks}
        config, clock = SamplerConfig(max_new_tokens=max_new_tokens, **chosen), time.perf_counter()
        output = generate(policy, [prompt], config, record=True)
        cost = f"{output.nfe} forward passes, {output.token_forwards:,} positions computed, "
        cost += f"{time.perf_counter() - clock:.2f} s"
        shown = Player({cost: output}, policy, block_length=config.block_length)
        return shown.frame(shown.steps)

    options = {"steps": [*counts, max_new_tokens], "temperature": [0.0, 0.3, 0.7, 1.0]}
    options["block_length"] = [WHOLE, *(sizes if policy.block_length is None else [])]
    return Choices(show, begin, **options, rule=list(RULES))


def compare_runs(containing: str = "", begin: Sequence[str] = ()) -> Choices:
    """Runs of `runs/` and `figures/data/runs` whose names hold that text: a column over the
    updates, the settings in which they differ, and completions at a share of the run. A committed
    run has kept those of its last update alone.

    Args:
        begin: names of runs that are chosen first.
    """
    logs = [*pieces_folder("full").glob("*-s[0-9]*-*.csv")]
    logs += (project_root() / "runs").glob("**/metrics.jsonl")  # behind: they have every sample
    found = {(p.stem if p.suffix == ".csv" else p.parent.name): p for p in sorted(logs)}
    names = tuple(name for name in sorted(found) if containing in name)
    if not names:
        return Choices(lambda runs: "no runs yet", runs=("",))

    def show(runs: Sequence[str], column: str, percent: int) -> str:
        figure = Figure(**SIZE)
        axes, settings, texts = figure.subplots(), {}, []
        for number, name in enumerate(runs):
            frame, samples, settings[name] = _read_run(found[name])
            drawn = frame.reindex(columns=["step", column]).dropna()
            colour = OF_RUNS[number % len(OF_RUNS)]
            axes.plot(drawn.step, drawn[column], color=colour, linewidth=1, label=name)
            at = percent / 100 * frame.step.max()
            for sample in sorted(samples, key=lambda sample: abs(sample["step"] - at))[:1]:
                head = f"<b style='color:{colour}'>{html.escape(name)}</b>, update {sample['step']}"
                texts += [head, completions(sample)]
        axes.set(xlabel="update", ylabel=column)
        table = json_normalize([*settings.values()]).set_axis([*settings]).T.astype(str)
        differ = table[table.nunique(axis=1) > 1].to_html(border=0) if len(runs) > 1 else ""
        if runs:
            figure.legend(loc="outside lower center", fontsize=7, frameon=False)
        return f"{picture(figure)}{differ}{''.join(texts)}"

    begin = {"runs": tuple(name for name in begin if name in names) or names[:2], "percent": 100}
    return Choices(show, begin, runs=names, column=list(COLUMNS), percent=list(range(0, 101, 10)))


def _read_run(path: Path) -> tuple[DataFrame, list[dict], dict]:  # log, samples, settings
    if path.suffix == ".csv":
        known = json.loads(path.with_suffix(".json").read_text())
        samples, settings = [known] if "completions" in known else [], known["identity"]["settings"]
        return read_table(path), samples, settings
    settings = json.loads(path.with_name("config.json").read_text())
    samples = read_rows(path.with_name("samples.jsonl"))
    return DataFrame(read_rows(path) or [{"step": 0}]), samples, settings


def arm_picker(logs: DataFrame, grid: DataFrame) -> Choices:
    """An arm of the KL study beside AR, with the thesis's KL term and without, and what every form
    and weight of that term came to.

    Args:
        logs: as notebook 04 keeps them in `fig_4_2_runs`; grid: in `kl_grid`.
    """
    name, _, given = logs.arm.str.partition(", β = ").to_numpy().T
    logs = logs.assign(arm=name, β=[β or "1" for β in given])
    measures = ["closed", "collapsed", "loss/std", "kl/std", "kl/max"]

    def show(arm: str, β: str, column: str) -> str:
        figure = Figure(**SIZE)
        axes = figure.subplots()
        plots.curves(
            axes, logs[logs["β"] == β], column, dict.fromkeys([arm, "AR"]), log=column != "reward"
        )
        axes.set(title=f"{arm} and AR, β = {β}, k3", ylabel=column)
        axes.legend(frameon=False, fontsize=7)
        table = grid[grid.main == arm].groupby(["form", "β"])[measures].mean()
        return picture(figure) + (table.round(3).to_html(border=0) if len(table) else "")

    arms = [arm for arm in dict.fromkeys(logs.arm) if arm != "AR"]
    weights = [*dict.fromkeys(logs["β"])]
    return Choices(show, arm=arms, β=weights, column=["kl/max", *(c for c in COLUMNS if c in logs)])


def bound_sliders(toy: Chain, T: Sequence[int]) -> Choices:
    """The bound of T steps on a toy; schedule, T and the number of blocks can be chosen."""
    length, masked_nll = toy.texts.shape[1], cache(toy.masked_nll)

    def show(model: str, schedule: str, T: int, blocks: int) -> str:
        size, chosen, figure = length // blocks, SCHEDULES[schedule], Figure(**SIZE)
        nll, (left, right) = masked_nll(toy.denoisers[model], size), figure.subplots(1, 2)
        bounds = {n: discrete_terms(nll, chosen, n).sum().item() for n in options["T"]}
        asked = toy.denoisers[model], toy.texts, toy.mask, chosen, T, size
        exact = -(toy.law @ chain_log_likelihood(*asked))
        limit, times = limit_loss(nll, chosen).item(), torch.linspace(0, 1, 200)
        left.plot(times, chosen.alpha(times), color="0.6", linewidth=1)
        steps = torch.linspace(0, 1, T + 1)
        left.plot(steps, chosen.alpha(steps), ".", color=colours.MDM)
        left.set(xlabel="t", ylabel="probability of being unmasked", title=f"{schedule}, {T} steps")
        right.plot(bounds.keys(), bounds.values(), ".-", color="0.6", linewidth=1)
        right.plot([T], [bounds[T]], "o", color=colours.MDM)
        right.axhline(limit, color="0.4", linestyle=":")
        right.set_xscale("log", base=2)
        right.set(xlabel="steps T (dotted: the limit)", ylabel="bound, nats a text", title=model)
        said = f"In blocks of {size}: the bound is {bounds[T]:.4f} nats a text, minus log p "
        return f"{picture(figure)}<br>{said}{exact.item():.4f}, the bound's limit {limit:.4f}"

    parts = [n for n in range(1, length + 1) if length % n == 0]
    options = {"model": list(toy.denoisers), "schedule": list(SCHEDULES)}
    options |= {"T": list(T), "blocks": parts}
    return Choices(show, {"T": options["T"][len(T) // 2]}, **options)
