"""The KL instability: notebook 04."""

from itertools import product

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mdmrl.study import plots, stability
from mdmrl.study.colours import palette
from mdmrl.study.figures.registry import figure
from mdmrl.study.verdicts import interval_of

FREE = ", β = 0"
PARTS = ("grad_norm/kl", "grad_norm/surrogate")


def estimators_of(arms) -> list[str]:
    """ "MDM ar_style" and so on, of arms by their names with steps."""
    return [*dict.fromkeys(arm.split(",")[0] for arm in arms if arm.startswith("MDM"))]


@figure(
    "04_kl_instability",
    "fig_4_2_runs",
    "fig_4_2_summary",
    says="The norm of the KL term's gradient is {ar_style} times the surrogate's with `ar_style` "
    "and {one_step} with `one_step` (16 steps, medians over updates, means over seeds); in the "
    "autoregressive twin it is {ar}.",
    known=lambda runs, summary: {
        key: f"{summary.set_index('arm')['kl/surrogate'][arm]:.2f}"
        for key, arm in {
            "ar_style": "MDM ar_style, 16 steps",
            "one_step": "MDM one_step, 16 steps",
            "ar": "AR",
        }.items()
    },
    rows=(3, 5),
)
def fig_4_2_kl_instability(facts, runs, summary) -> Figure:
    runs = runs[~runs.arm.str.endswith(FREE)]
    ratio = "|∇ KL term| / |∇ surrogate|"
    runs = runs.assign(**{ratio: runs[PARTS[0]] / runs[PARTS[1]].where(runs[PARTS[1]] > 0)})
    found = estimators_of(runs.arm.unique())
    drawn, axes = plots.panels(3 * len(found), height=2.0, columns=len(found))
    grid = axes.reshape(3, len(found))
    own = {name: [arm for arm in runs.arm.unique() if arm.startswith(name)] for name in found}
    for row, column in zip(grid, ("loss", "kl/max", ratio), strict=True):
        for axis, estimator in zip(row, found, strict=True):
            plots.curves(axis, runs, column, ["AR", *own[estimator]], log=True, each=False)
            axis.set_title(estimator if column == "loss" else "")
            if column == "loss":  # at a new reference it is rounding
                axis.set_ylim(bottom=1e-5)
            elif column == ratio:
                axis.axhline(2, color="0.3", linestyle=":", linewidth=1)
                axis.set_ylim(0.03, 300)
        plots.same_heights(row)
        for axis, estimator in zip(row, found, strict=True):
            steps = {arm: arm.removeprefix(f"{estimator}, ") for arm in own[estimator]}
            plots.label_ends(axis, {"AR": "AR", **steps})
    text = f"Fig. 4-2. β = {facts['beta']:g}, k3; dotted: 2, above which the KL term dominates"
    plots.title(drawn, text, runs, log=True)
    return drawn


@figure(
    "04_kl_instability",
    "fig_4_2_runs",
    says="Without the KL term `one_step` gets back {fig_4_2_mdm_one_step_16_steps} of the gain "
    "that it lost, `ar_style` {fig_4_2_mdm_ar_style_16_steps}; the KL term is the cause where "
    "half is restored.",
    rows=(4,),
)
def fig_4_2_without_kl(facts, runs) -> Figure:
    bound = [arm for arm in runs.arm.unique() if not arm.endswith(FREE)]
    found, smooth = estimators_of(bound), plots.smoothed(runs)
    steps = [[arm for arm in bound if arm.startswith(estimator)] for estimator in found]
    width = max(map(len, steps))
    drawn, axes = plots.panels((len(found) + 1) * width, height=1.8, columns=width)
    grid = axes.reshape(len(found) + 1, width)
    for row, names in zip(grid, (["AR"], *steps), strict=True):
        for axis, name in zip(row, names, strict=False):
            plots.curves(axis, runs, "reward", [name, name + FREE], smooth)
            axis.set_title(name, fontsize=8)
            axis.set(ylabel="mean reward" if axis is row[0] else "", xlabel="")
        for axis in row[len(names) :]:
            axis.set_visible(False)
    for axis in grid[-1]:
        axis.set_xlabel("update")
    if width > 1:
        spare = drawn.add_subplot(grid[0, 1].get_gridspec()[0, 1:])
        _restored(spare, runs, [name for names in steps for name in names])
    both = {"AR": f"β = {facts['beta']:g}, k3", "AR" + FREE: "β = 0"}
    plots.shared_legend(drawn, grid[0, 0], columns=2, names=both)
    plots.title(drawn, "Reward of training batches with and without the KL term", runs, smooth)
    return drawn


def _restored(axes, runs: pd.DataFrame, arms: list[str]) -> None:
    """The share of the lost gain that β = 0 restores, by Fieller; where half is restored, the KL
    term is the cause."""
    table = stability.table(runs).set_index("arm")
    peer = table.loc[["AR"]]
    closed = peer.gain.values / peer.headroom.values
    for place, (arm, shade) in enumerate(palette(arms).items()):
        own, released = table.loc[[arm]], table.loc[[arm + FREE]]
        lost = closed * own.headroom.values - own.gain.values
        share = interval_of(released.gain.values - own.gain.values, lost)
        plots.point(axes, place, np.clip(share, -1, 3), shade)
    plots.rows(axes, [arm.removeprefix("MDM ") for arm in arms])
    axes.axvline(0.5, color="0.3", linestyle=":", linewidth=1)
    axes.yaxis.tick_right()
    axes.tick_params(labelsize=6.5)
    sns.despine(ax=axes, left=True, right=False)
    axes.set_xlabel("share of the lost gain restored (dotted: half)", fontsize=7)


def with_terms(cells: pd.DataFrame) -> pd.DataFrame:
    """What `kl_grid` has, with the estimator and the KL term of each run in words."""
    term = cells.form + ", β = " + cells["β"].map("{:g}".format)
    return cells.assign(estimator=cells.main.str.extract(r"MDM (.*),")[0], term=term)


@figure(
    "04_kl_instability",
    "kl_grid",
    says="How steady the KL is goes with the number of denoising steps by a rank correlation of "
    "{steps_steady_one_step} (`one_step`) and {steps_steady_ar_style} (`ar_style`).",
    rows=(15,),
)
def kl_grid(facts, cells) -> Figure:
    cells = with_terms(cells).assign(spread=np.log10(cells["kl/std"]))
    found = cells.estimator.unique()
    said = {"spread": ("log10 of the KL's standard deviation", "viridis")}
    said["closed"] = ("share of the headroom closed", "vlag_r")
    drawn, axes = plots.panels(2 * len(found), height=2.2)
    for row, name in zip(axes.reshape(-1, 2), found, strict=True):
        for axis, (column, (title, cmap)) in zip(row, said.items(), strict=True):
            grid = cells[cells.estimator == name].pivot_table(column, "term", "steps", sort=False)
            means = cells.groupby(["main", "term"])[column].mean()
            ends = means.min(), means.max()
            if column == "closed":  # white is 0
                ends = -means.abs().max(), means.abs().max()
            image = plots.cells(axis, grid, grid.map("{:.2f}".format), ends, cmap)
            drawn.colorbar(image, ax=axis)
            axis.set_title(f"{name}: {title}", fontsize=7.5)
            axis.set_xlabel("denoising steps")
            axis.tick_params(labelsize=7)
    drawn.suptitle(f"Means over {cells.seed.nunique()} seeds, {facts['max_steps']} updates")
    return drawn


@figure(
    "04_kl_instability",
    "kl_grid",
    says="What the samples and the scored distribution differ by, before training, goes with the "
    "gain by a rank correlation of {kl_law}; on one estimator alone by {kl_law_one_step} and "
    "{kl_law_ar_style}.",
)
def kl_law(facts, cells) -> Figure:
    cells = with_terms(cells)
    words = {"closed": "headroom closed", "kl/std": "deviation of the KL, nats"}
    drawn, axes = plots.panels(2, height=2.8)
    style = {"hue": "estimator", "palette": palette(cells.estimator.unique()), "style": "term"}
    for axis, (column, said) in zip(axes, words.items(), strict=True):
        sns.scatterplot(cells, x="law", y=column, **style, ax=axis, s=18)
        axis.set_xscale("symlog", linthresh=0.01)
        axis.autoscale_view()
        axis.set(xlabel="log mean exp(-d), first updates, β = 0", ylabel=said)
    axes[1].set_yscale("log")
    names = {name: name for name in (*cells.estimator.unique(), *cells.term.unique())}
    plots.shared_legend(drawn, *axes, columns=4, names=names)
    drawn.suptitle(f"One point a run, {cells.seed.nunique()} seeds, {facts['max_steps']} updates")
    return drawn


@figure(
    "04_kl_instability",
    "kl_cured_runs",
    says="The recommended configuration closes {kl_is_cured} times the share of the headroom that "
    "the autoregressive twin closes at the same β.",
)
def kl_cured(facts, runs) -> Figure:
    names = runs.arm.unique()
    drawn, axes = plots.panels(4, height=2.5)
    for axis, column in zip(axes, ("reward", "loss", "kl", "grad_norm"), strict=True):
        smooth = plots.smoothed(runs) if column == "reward" else 1
        plots.curves(axis, runs, column, names, smooth, log=column != "reward")
    axes[1].set_ylim(bottom=1e-6)
    axes[2].set_ylim(bottom=1e-6)
    plots.shared_legend(drawn, axes[0])
    plots.title(drawn, "The cure; log axes: median and range", runs)
    return drawn


@figure(
    "04_kl_instability",
    "kl_countdown",
    says="Where the reward is the answer the summed KL of `ar_style` spreads more than that of the "
    "autoregressive twin, by a log ratio of {row_03_countdown_ar_style}, and that of `one_step` by "
    "{row_03_countdown_one_step}.",
    rows=(3, 5),
)
def kl_countdown(facts, runs) -> Figure:
    tasks, columns = runs.task.unique(), ("loss", "kl/sum", "grad_norm/surrogate", "grad_norm/kl")
    runs = runs.assign(arm=runs.arm.str.removesuffix(", β = 1"))
    drawn, axes = plots.panels(8, height=1.5)
    for (column, task), axis in zip(product(columns, tasks), axes, strict=True):
        logs = runs[runs.task == task]
        plots.curves(axis, logs, column, logs.arm.unique(), log=True, each=False)
        said = plots.WORDS[column].replace("'s gradient", "'s\ngradient")
        axis.set_ylabel(said if task == tasks[0] else "", fontsize=7)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("update" if column == columns[-1] else "")
    for axis, task in zip(axes, tasks, strict=False):
        axis.set(title=f"{task}, {runs[runs.task == task].seed.nunique()} seeds")
        axis.set_ylim(bottom=1e-6)
    plots.shared_legend(drawn, *axes)
    drawn.suptitle("Loss, KL and gradient norms; lines: medians over seeds, bands: their range")
    return drawn
