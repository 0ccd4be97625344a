"""Figures: a data frame in, a matplotlib figure out; one colour per arm everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdmrl.evaluation.stats import t_interval

TEXT_WIDTH = 6.3  # inches, a page of A4 with the thesis's margins
COLOURS = sns.color_palette("colorblind").as_hex()


def use_style() -> None:
    """Fonts and lines of every figure; call it once in a notebook."""
    sns.set_theme(context="paper", style="ticks", font_scale=0.9, rc={"axes.titlesize": "medium"})


def palette(arms: Sequence[str]) -> dict[str, str]:
    """The colour of each arm, by its place in `arms`."""
    return {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}


def curves(
    axes: Axes,
    runs: pd.DataFrame,
    column: str,
    colours: dict[str, str],
    smooth: int = 1,
    dashed: Sequence[str] = (),
) -> None:
    """One line an arm: the mean over seeds, each seed thin behind it, and with two seeds or more
    the 95 % t-interval of the mean as a band. `smooth` is the width of the running mean in updates
    (1 shows the raw trace)."""
    for arm, colour in colours.items():
        table = runs[runs.arm == arm].pivot(index="step", columns="seed", values=column)
        table = table.dropna(how="all").rolling(smooth, min_periods=1).mean()
        if table.empty:
            continue
        style = "--" if arm in dashed else "-"
        axes.plot(table.index, table, color=colour, linewidth=0.4, alpha=0.4)
        axes.plot(table.index, table.mean(axis=1), style, color=colour, linewidth=1.5, label=arm)
        if table.shape[1] > 1:
            band = np.array([t_interval(row.dropna())[1:] for _, row in table.iterrows()])
            axes.fill_between(table.index, *band.T, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("update")
    sns.despine(ax=axes)


def panels(count: int, height: float = 2.4, columns: int = 2) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels at the text's width; returns it and its axes, flat."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(TEXT_WIDTH, height * rows), layout="constrained", squeeze=False
    )
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, axes.flatten()[:count]


def caption(runs: pd.DataFrame, smooth: int = 1) -> str:
    """What the lines and bands of `curves` are, for a figure's title."""
    seeds = runs.seed.nunique()
    band = "band: 95 % t-interval of the mean" if seeds > 1 else "one seed, so no interval"
    running = f"; running mean of {smooth} updates" if smooth > 1 else ""
    return f"{seeds} seed{'s' if seeds > 1 else ''}, thin lines; {band}{running}"


def shared_legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """One legend below all panels, with the lines of `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def bars(axes: Axes, table: pd.DataFrame, colours: Sequence[str] = COLOURS) -> None:
    """Grouped bars of the means over seeds (rows: groups, columns: `(measure, seed)`), with the
    95 % t-interval where there are two seeds or more; a measure that a group lacks has no bar."""
    measures = table.columns.unique(level=0)
    width = 0.8 / len(measures)
    for i, measure in enumerate(measures):
        at = np.arange(len(table)) + (i - (len(measures) - 1) / 2) * width
        values = table[measure]
        error = None
        if values.shape[1] > 1:
            seeds = [row.dropna() for _, row in values.iterrows()]
            low = [t_interval(row).low if len(row) else np.nan for row in seeds]
            error = np.maximum(values.mean(axis=1) - low, 0)
        axes.bar(at, values.mean(axis=1), width * 0.9, yerr=error, color=colours[i], label=measure)
    axes.set_xticks(range(len(table)), table.index)
    sns.despine(ax=axes)
