"""Block-level RL: notebook 08."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mdmrl.study import plots
from mdmrl.study.colours import colour, line_styles
from mdmrl.study.figures.registry import figure

# What is compared with whole-sequence GRPO, and the bounds of row 13.
TO_WHOLE = {
    "log_kl": ("log ratio of the exact KL at equal reward", 0.0),
    "share": ("reward at equal cost, of the headroom", -0.05),
}


@figure(
    "08_block_rl",
    "block_rl_runs",
    "block_rl",
    "block_rl_ratios",
    says="For the same reward the exact likelihood goes from its start by a log ratio of "
    "{block_rl_exact} of whole-sequence GRPO's KL, in blocks by {block_rl_blocks}, block-level PPO "
    "by {block_rl_ppo}; cured would be below 0.",
    rows=(13,),
)
def block_rl(facts, runs, table, ratios) -> Figure:
    drawn, axes = plots.panels(6, height=2.1)
    words = {"eval/path/reward": "held-out reward, greedy", "eval/path_kl": "exact KL, nats"}
    masked = runs[~runs.arm.str.startswith("bd")]
    for axis, (column, said) in zip(axes, words.items(), strict=False):
        for name, line in line_styles(masked.arm.unique()).items():
            at, mean = _mean_curve(masked[masked.arm == name], column)
            axis.plot(at, mean, line, color=colour(name), label=name)
        axis.axvline(masked.equal.iloc[0], color="0.6", linewidth=0.6)
        axis.set(xlabel=plots.WORDS["spent/positions"], ylabel=said)
        plots.label_ends(axis)
    axes[1].set_yscale("log")
    axes[1].set_ylim(bottom=0.3)
    values = table.set_index(["arm", "seed"])
    plots.dots(axes[2], values["kl/sum/std"], table.arm.unique())
    axes[2].set(xscale="log", xlabel="spread of the KL that the loss sees, nats", xlim=(1, 100))
    plots.dots(axes[3], values["eval/path/accuracy"], table.arm.unique())
    axes[3].set(xlabel="exact answers at equal cost")
    own = ratios.set_index(["arm", "seed"])
    for axis, (column, (said, bound)) in zip(axes[4:], TO_WHOLE.items(), strict=True):
        plots.dots(axis, own[column], ratios.arm.unique(), bound=bound)
        axis.set_xlabel(said)
        axis.locator_params(axis="x", nbins=5)
    text = (
        "Above: means over seeds; grey: equal cost. Middle: 95 % t-intervals. Below: less `whole`;"
    )
    said = "cured is left of 0, and right of -0.05 (dotted)"
    drawn.suptitle(f"{text}\n{said}. β = {facts['beta']:g}")
    return drawn


def _mean_curve(run: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds at what they all have spent, linear between looks."""
    seen = [part.dropna(subset=[column]) for _, part in run.groupby("seed")]
    grid = np.linspace(0, min(part["spent before"].max() for part in seen), 60)
    return grid, np.mean([np.interp(grid, p["spent before"], p[column]) for p in seen], axis=0)


def _half_way(known: pd.DataFrame) -> float:
    """What V explains at half of the steps, fitted to the most completions."""
    most = known[known.completions == known.completions.max()]
    return most.explained[most.step == (known.step.max() + 1) // 2].mean()


@figure(
    "08_block_rl",
    "block_values",
    "block_values_ceiling",
    says="Half-way V explains {explained} of the variance of the reward, where half of a text "
    "decides {decided}.",
    known=lambda known, ceilings: {
        "explained": f"{_half_way(known):.2f}",
        "decided": f"{ceilings.decided[ceilings.endings == 1].mean():.2f}",
    },
)
def block_values(facts, known, ceilings) -> Figure:
    counts = sorted(known.completions.unique())
    drawn, (axes,) = plots.panels(1, height=2.6, columns=1)
    for count, shade in zip(counts, plots.ramp(len(counts)), strict=True):
        own = known[known.completions == count]
        for _, run in own.groupby("seed"):
            axes.plot(run.step, run.explained, color=shade, linewidth=0.4, alpha=0.6)
        mean = own.groupby("step").explained.mean()
        axes.plot(mean.index, mean, color=shade, label=f"{count:g}")
    plots.label_ends(axes)
    half, one = facts["steps"] // 2, ceilings[ceilings.endings == 1]
    axes.axhline(0, color="0.7", linewidth=0.6)
    axes.axvline(half, color="0.7", linewidth=0.6, linestyle="--")
    axes.plot([half] * len(one), one.decided, "_", color="0.2", markersize=12)
    axes.plot([half] * len(one), one.explained, "x", color="0.2", markersize=5)
    at = {"textcoords": "offset points", "fontsize": 7, "va": "center"}
    axes.annotate("what half of a text decides", (half, one.decided.mean()), (9, 0), **at)
    axes.annotate("one ending, as V", (half, one.explained.mean()), (9, 0), **at)
    axes.set(xlabel="denoising steps made", ylabel="explained share of variance")
    drawn.suptitle("V, by the completions that it was fitted to; thin: a seed each")
    return drawn


@figure(
    "08_block_rl",
    "intermediate_rewards_runs",
    says="On Countdown PPO credited with each step's own part gains {reward_potential} more right "
    "answers than with the terminal reward, with a reward at half of the text {reward_half_text}.",
)
def intermediate_rewards(facts, runs) -> Figure:
    drawn, axes = plots.panels(2)
    for axis, column in zip(axes, ("eval/sampled/accuracy", "eval/accuracy"), strict=True):
        plots.of_seeds(axis, runs, column, colour("ppo"))
    plots.shared_legend(drawn, axes[0])
    drawn.suptitle("Countdown, 4 steps, block-level PPO; one line a seed")
    return drawn
