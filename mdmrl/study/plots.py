"""Figures: a data frame in, a matplotlib figure out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from mdmrl.evaluation.stats import t_interval
from mdmrl.study.colours import LINES, line_styles, palette
from mdmrl.study.colours import colour as colour

TEXT_WIDTH = 6.3  # inches, a page of A4 with the thesis's margins
COLOURS = sns.color_palette("colorblind").as_hex()  # of what `palette` does not name


def use_style() -> None:
    """Fonts and lines of every figure; call it once in a notebook."""
    sns.set_theme(context="paper", style="ticks", font_scale=0.9, rc={"axes.titlesize": "medium"})


def curves(
    axes: Axes,
    runs: DataFrame,
    column: str,
    arms: Iterable[str],
    smooth: int = 1,
    log: bool = False,
    against: str = "step",
) -> None:
    """One line an arm, in its colour and style: the mean over seeds, each seed thin behind it, and
    with two seeds or more the 95 % t-interval of the mean as a band. `smooth` is the width of the
    running mean in updates (1 shows the raw trace); `against`, what the other axis has, of which
    the mean over seeds is taken at each update.

    With `log`, for positive quantities that span powers of ten, where a mean is its largest value
    and a t-interval reaches below 0: a log axis, the median over seeds, their range as the band. A
    value of 0 is a gap."""
    styles = line_styles(arms)
    for arm, shade in palette(styles).items():
        own = runs[runs.arm == arm]
        table = own.pivot(index="step", columns="seed", values=column)
        table = table.dropna(how="all").rolling(smooth, min_periods=1).mean()
        if table.empty:
            continue
        if log:
            table = table.where(table > 0)
            if not table.notna().any(axis=None):
                continue
            middle, band = table.median(axis=1), [table.min(axis=1), table.max(axis=1)]
        else:
            middle, band = table.mean(axis=1), None
            if table.shape[1] > 1:
                band = np.array([t_interval(row.dropna())[1:] for _, row in table.iterrows()]).T
        at = own.groupby("step")[against].mean()[table.index] if against != "step" else table.index
        axes.plot(at, table, color=shade, linewidth=0.4, alpha=0.4)
        axes.plot(at, middle, styles[arm], color=shade, linewidth=1.5, label=arm)
        if band is not None:
            axes.fill_between(at, *band, color=shade, alpha=0.15, linewidth=0)
    if log and axes.has_data():
        axes.set_yscale("log")
    axes.set_xlabel("update" if against == "step" else against.removeprefix("spent/"))
    sns.despine(ax=axes)


def interval(values: Series) -> tuple[float, float]:
    """The 95 % t-interval of the mean, for seaborn's `errorbar`; none of a single value."""
    _, low, high = t_interval(values) if len(values) > 1 else (math.nan,) * 3
    return low, high


def panels(count: int, height: float = 2.4, columns: int = 2) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels at the text's width; returns it and its axes, flat."""
    rows = -(-count // columns)
    form = {"figsize": (TEXT_WIDTH, height * rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **form)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, axes.flatten()[:count]


def title(figure: Figure, text: str, runs: DataFrame, smooth: int = 1, log: bool = False) -> None:
    """`text` above all panels, and what the lines and bands of `curves` are."""
    seeds = runs.seed.nunique()
    bands = ["thick: their median", "band: their range"]
    bands = bands if log else ["band: 95 % t-interval of the mean"]
    shown = [f"{seeds} seeds, thin lines", *bands] if seeds > 1 else ["1 seed, so no interval"]
    if smooth > 1:
        shown.append(f"running mean of {smooth} updates")
    figure.suptitle(textwrap.fill(f"{text}. {'; '.join(shown)}", 100), fontsize=8)


def shared_legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """One legend below all panels, with the lines of `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def bars(axes: Axes, table: DataFrame, colours: Sequence[str] = COLOURS) -> None:
    """Grouped bars, from top to bottom, of the means over seeds (rows: groups, columns:
    `(measure, seed)`), with the 95 % t-interval where there are two seeds or more; a measure that
    a group lacks has no bar."""
    measures = table.columns.unique(level=0)
    height = 0.8 / len(measures)
    for i, measure in enumerate(measures):
        at = np.arange(len(table)) + (i - (len(measures) - 1) / 2) * height
        values, error = table[measure], None
        means = values.mean(axis=1)
        if values.shape[1] > 1:
            seeds = [row.dropna() for _, row in values.iterrows()]
            low = [t_interval(row).low if len(row) else np.nan for row in seeds]
            error = np.maximum(means - low, 0)
        axes.barh(at, means, height * 0.9, xerr=error, color=colours[i], label=measure)
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    sns.despine(ax=axes)


def moved(axes: Axes, values: Series, arms: Iterable[str]) -> None:
    """An arm a line, from top to bottom: from its value before training, hollow, to that after, the
    means over seeds; each seed small. `values` have the index (end, arm, seed)."""
    for place, arm in enumerate(arms):
        ends = values.xs(arm, level="arm").unstack("seed").loc[["before", "after"]]
        axes.plot(ends, [place, place], ".", color=colour(arm), markersize=2, alpha=0.5)
        before, after = ends.mean(axis=1)
        axes.plot([before, after], [place, place], color=colour(arm), linewidth=1)
        for value, filled in ((before, "white"), (after, colour(arm))):
            axes.plot(value, place, "o", color=colour(arm), markerfacecolor=filled, markersize=4)
    axes.set_yticks(range(len(arms)), arms, fontsize=6)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    sns.despine(ax=axes)


def against_steps(table: DataFrame, reference: Series, equally_fast: float | None) -> Figure:
    """Speed and accuracy of a masked diffusion model against its denoising steps, the
    autoregressive model as the line (Fig. 4-4).

    Args:
        table: a row a number of steps: `setting`, `instances_per_second`, `accuracy`, `low`,
            `high`; reference: the same of the autoregressive model.
        equally_fast: the number of steps at which both are, or None.
    """
    figure, (fast, right) = panels(2)
    ar, mdm = palette(["AR", "MDM"]).values()
    line = {"marker": "o", "color": mdm}
    fast.plot(table.setting, table.instances_per_second, label="MDM", **line)
    fast.axhline(reference.instances_per_second, color=ar, linestyle="--", label="AR")
    if equally_fast:
        fast.axvline(equally_fast, color="grey", linestyle=":", label="equally fast")
    fast.set(yscale="log", ylabel="instances per second", title="speed")
    error = np.stack([table.accuracy - table.low, table.high - table.accuracy])
    right.errorbar(table.setting, table.accuracy, error, elinewidth=1, **line)
    right.axhline(reference.accuracy, color=ar, linestyle="--")
    right.axhspan(reference.low, reference.high, color=ar, alpha=0.2, linewidth=0)
    right.set(ylabel="right answers", ylim=(-0.02, 1.02), title="accuracy, greedy")
    for axis in (fast, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(table.setting, [f"{steps:g}" for steps in table.setting])
        axis.set_xlabel("denoising steps")
        sns.despine(ax=axis)
    shared_legend(figure, fast)
    return figure


def moved_trade_off(
    table: DataFrame, speeds: Series, references: dict[str, tuple[float, float]]
) -> Figure:
    """What completions are worth against denoising steps, and against instances per second, before
    and after RL; the mean over seeds, and its 95 % t-interval where there are two or more.

    Args:
        table: columns `curve`, `seed`, `steps`, and last what is drawn; speeds: instances per
            second by steps; references: autoregressive models by name, their instances per second
            and that.
    """
    figure, (against, fast) = panels(2, height=2.8)
    measure = table.columns[-1]
    says = {"accuracy": "right answers", "reward": "reward"}[measure]
    curves = table["curve"].unique()
    styles, shades = line_styles(curves[1:]), palette(curves[1:])
    for name in curves:
        drawn = table[table["curve"] == name].groupby("steps")[measure]
        mean, ends = drawn.mean(), np.array([interval(values) for _, values in drawn])
        look = {"color": shades.get(name, colour("MDM")), "linestyle": styles.get(name, "-")}
        against.plot(mean.index, mean, marker="o", markersize=3, label=name, **look)
        against.fill_between(mean.index, *ends.T, color=look["color"], alpha=0.15, linewidth=0)
        fast.plot(speeds.reindex(mean.index), mean, marker="o", markersize=3, **look)
    for (name, (speed, level)), line in zip(references.items(), LINES, strict=False):
        against.axhline(level, color=colour("AR"), linestyle=line, linewidth=1, label=name)
        fast.plot(speed, level, "*", color=colour("AR"), alpha=1 if line == "-" else 0.5)
    against.set_xscale("log", base=2)
    ticks = sorted(table.steps.unique())
    against.set_xticks(ticks, [f"{steps:g}" for steps in ticks])
    against.set(xlabel="denoising steps", ylabel=f"{says}, greedy")
    fast.set(xscale="log", xlabel="instances per second")
    for axis in (against, fast):
        axis.set_ylim(bottom=0)
        sns.despine(ax=axis)
    shared_legend(figure, against)
    return figure
