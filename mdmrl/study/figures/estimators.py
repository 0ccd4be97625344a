"""The estimator lab: notebook 05."""

from itertools import product

import pandas as pd
from matplotlib.figure import Figure

from mdmrl.study import candidates, plots
from mdmrl.study.colours import colour, palette
from mdmrl.study.figures.registry import figure

MARKS = {"one_step": "X", "ar_order": "P", "trajectory": "*"}  # those that take no samples
LOWEST = 0.1  # of the error that is drawn


def sampled(table) -> list[str]:
    """The estimators that take samples, in the table's order."""
    return [n for n in table.estimator.unique() if n not in (*MARKS, "random_mask")]


def against_passes(axes, table, column: str, marks: bool, lowest: float = -1.0) -> None:
    """A line an estimator over its forward passes; with `marks`, one for each without samples."""
    own = table.set_index("estimator")
    for name, shade in palette(sampled(table)).items():
        line = own.loc[[name]]
        axes.plot(line.passes, line[column], marker=".", color=shade, label=name)
    for name, mark in MARKS.items() if marks else ():
        style = {"color": colour(name), "label": name, "linestyle": "", "clip_on": False}
        style["markersize"] = 10 if mark == "*" else 6
        height = max(own.loc[name, column], lowest)
        axes.plot(own.loc[name, "passes"], height, mark, zorder=3, **style)
    plots.doubling(axes, table.passes[table.passes.map(lambda n: n & (n - 1) == 0)], "")


def both_models(facts, table, columns: tuple[str, str], height: float, lowest: float = -1.0):
    """Rows of panels: what is measured against each estimator's own target, and against the
    sampler's log p; a column a model."""
    shown = {"toy": "toy: arbitrary conditionals"}
    shown["real"] = f"{facts['policy']}: {facts['real_length']} tokens"
    drawn, axes = plots.panels(4, height=height)
    for axis, (column, model) in zip(axes, product(columns, shown), strict=True):
        own = column == columns[0]
        against_passes(axis, table[table.model == model], column, not own, lowest)
        axis.set(title=shown[model] if own else "", xlabel="" if own else "forward passes")
    plots.shared_legend(drawn, axes[2], columns=5)
    return drawn, axes


@figure(
    "05_estimator_lab",
    "estimator_targets",
    says="Scored as if autoregressive, the probabilities of all texts of a toy add up to "
    "{erratum_ar_style_likelihood}, and no score but its own is the sampler's log p.",
)
def estimator_targets(facts, gaps) -> Figure:
    gap = gaps.set_index("object").drop(columns="mass")
    drawn, (axis,) = plots.panels(1, height=3.6, columns=1)
    gap.index = [f"{name}  ({mass:.2f})" for name, mass in zip(gap.index, gaps.mass, strict=True)]
    plots.cells(axis, gap, gap.map("{:.2f}".format), (-8, 8), "vlag")
    axis.axhline(gap.shape[1] - 0.5, color="white", linewidth=3)
    axis.set(xlabel="the sampler that writes the texts", ylabel="scored by  (mass)")
    axis.set_xticks(range(gap.shape[1]), gap.columns, rotation=25, ha="right")
    said = "log p of the sampler minus score: mean over its texts of {length} tokens, in nats"
    drawn.suptitle(said.format(**facts))
    return drawn


@figure(
    "05_estimator_lab",
    "estimator_error",
    says="From the sampler's log p on the trained model `one_step` is {one_step} nats a text off, "
    "`ar_order` {ar_order}, the ELBO with its most passes {elbo}; `trajectory` is exact.",
    known=lambda table: {
        name: f"{part['from sampler'].iloc[-1]:.2g}"
        for name, part in table[table.model == "real"].groupby("estimator")
    },
)
def estimator_error(facts, table) -> Figure:
    drawn, axes = both_models(facts, table, ("error", "from sampler"), 2.3, LOWEST)
    for axis in axes:
        axis.set_yscale("log")
        plots.decimals(axis.yaxis)
    for axis in axes[2:]:
        axis.set_ylim(bottom=LOWEST)
    axes[0].set_ylabel("from its own target")
    axes[2].set_ylabel("from the sampler's log p")
    draws = f"{facts['draws']} and {facts['real_draws']} draws; on the axis: exact"
    drawn.suptitle(f"Root mean square error, nats a text ({draws})")
    return drawn


@figure(
    "05_estimator_lab",
    "estimator_gradients",
    says="The cosine of the gradient with that of the sampler's log p, on the trained model: "
    "{one_step} for `one_step`, {elbo} for the ELBO with its most passes, {trajectory} for "
    "`trajectory`.",
    known=lambda table: {
        name: f"{part['sampler'].iloc[-1]:.2f}"
        for name, part in table[table.model == "real"].groupby("estimator")
    },
)
def estimator_gradients(facts, table) -> Figure:
    drawn, axes = both_models(facts, table, ("own", "sampler"), 2.1)
    lowest = table[["own", "sampler"]].min().min() - 0.1
    for axis in axes:
        axis.set_ylim(lowest, 1.05)
    axes[0].set_ylabel("to its own target")
    axes[2].set_ylabel("to the sampler's log p")
    draws = f"{facts['gradient_draws']} and {facts['real_gradient_draws']} draws"
    drawn.suptitle(f"Cosine of gradients, mean of {draws}")
    return drawn


@figure(
    "05_estimator_lab",
    "estimator_candidates",
    says="Along the first updates one step adds {trajectory} to the probability of a right answer "
    "with `trajectory`, with `one_step` {one_step}.",
    known=lambda table: {
        name: f"{table[table.arm.str.contains(name)]['effect, along'].mean():.2g}"
        for name in ("trajectory", "one_step")
    },
)
def estimator_candidates(facts, table) -> Figure:
    table = table.set_index(["arm", "seed"])
    arms = table.index.unique("arm")
    drawn, axes = plots.panels(5, height=1.2 + 0.2 * arms.size, columns=5)
    for axis, name in zip(axes, candidates.NAMES, strict=True):
        parts = [table[f"{name}, {when}"] for when in candidates.WHEN]
        plots.moved(axis, pd.concat(parts, keys=["before", "after"], names=["end"]), arms)
        axis.set_xlabel(name, fontsize=7)
        axis.locator_params(axis="x", nbins=2)
        axis.tick_params(axis="x", labelsize=6)
        axis.tick_params(labelleft=axis is axes[0])
    seeds = f"checkpoints: {table.index.unique('seed').size}"
    drawn.suptitle(f"Before (hollow) and along the first updates; {seeds}")
    return drawn
