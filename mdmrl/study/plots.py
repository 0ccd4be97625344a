"""Figures: a data frame in, a matplotlib figure out."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from pandas import DataFrame, Series

from mdmrl.evaluation.stats import t_interval
from mdmrl.study.colours import LINES, colour, line_styles, palette, tinted

TEXT_WIDTH = 6.3  # inches, a page of A4 with the thesis's margins
# What columns of a log are called on an axis, with their units.
WORDS = {
    "step": "update",
    "spent/positions": "million positions computed",
    "spent/seconds": "minutes",
    "reward": "mean reward of a batch",
    "rewards/accuracy/mean": "similarity to the reference",
    "format_rate": "share with all four tags",
    "loss": "loss",
    "kl": "KL, nats a token",
    "kl/sum": "KL, nats a completion",
    "kl/max": "largest KL of a token, nats",
    "grad_norm": "gradient norm",
    "grad_norm/surrogate": "norm of the surrogate's gradient",
    "grad_norm/kl": "norm of the KL term's gradient",
    "token_forwards": "positions, an update",
    "eval/reward": "held-out reward, greedy",
    "eval/sampled/reward": "held-out reward, sampled",
    "eval/accuracy": "right answers, greedy",
    "eval/sampled/accuracy": "right answers, sampled",
    "eval/code/R_a": "syntax tree found again",
}
UNITS = {"spent/positions": 1e6, "spent/seconds": 60}


def use_style() -> None:
    """Fonts and lines of every figure; call it once in a notebook."""
    own = {"axes.titlesize": "medium", "figure.titlesize": 8, "legend.frameon": False}
    own |= {"axes.spines.top": False, "axes.spines.right": False}
    sns.set_theme(context="paper", style="ticks", font_scale=0.9, rc=own)


def curves(
    axes: Axes,
    runs: DataFrame,
    column: str,
    arms: Iterable[str],
    smooth: int = 1,
    log: bool = False,
    against: str = "step",
    each: bool = True,
) -> None:
    """One line an arm, in its colour and style: the mean over seeds, with two seeds or more the
    95 % t-interval of the mean as a band, and `each` seed thin behind it. `smooth` is the width of
    the running mean in updates (1 shows the raw trace); `against`, what the other axis has, of
    which the mean over seeds is taken at each update.

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
                band = np.array([interval(row.dropna()) for _, row in table.iterrows()]).T
        at = table.index
        if against != "step":
            at = own.groupby("step")[against].mean()[table.index] / UNITS.get(against, 1)
        if each:
            axes.plot(at, table, color=shade, linewidth=0.4, alpha=0.4)
        axes.plot(at, middle, styles[arm], color=shade, linewidth=1.5, label=arm)
        if band is not None:
            axes.fill_between(at, *band, color=shade, alpha=0.15, linewidth=0)
    if log and axes.has_data():
        axes.set_yscale("log")
    axes.set(xlabel=WORDS[against], ylabel=WORDS.get(column, column))


def of_runs(runs: DataFrame, drawn: Sequence[str], said: str, **form) -> tuple[Figure, np.ndarray]:
    """`panels`, one for each column of the log that is `drawn` over the updates: smoothed, but for
    what is looked at (`eval/`)."""
    figure, axes = panels(len(drawn), **form)
    for axis, column in zip(axes, drawn, strict=True):
        smooth = 1 if column.startswith("eval/") else smoothed(runs)
        curves(axis, runs, column, runs.arm.unique(), smooth)
    title(figure, said, runs, smoothed(runs))
    return figure, axes


def of_seeds(axes: Axes, runs: DataFrame, column: str, shade: str) -> None:
    """A line a seed over the positions computed, in one colour; arms differ by their dashes."""
    for arm, line in zip(runs.arm.unique(), LINES, strict=False):
        own = runs[runs.arm == arm].dropna(subset=[column])
        for place, (_, run) in enumerate(own.groupby("seed")):
            at, label = run["spent/positions"] / UNITS["spent/positions"], "_" * bool(place) + arm
            axes.plot(at, run[column], line, color=shade, linewidth=0.9, label=label)
    axes.set(xlabel=WORDS["spent/positions"], ylabel=WORDS[column])


def interval(values: Series) -> tuple[float, float]:
    """The 95 % t-interval of the mean, for seaborn's `errorbar`; none of a single value."""
    _, low, high = t_interval(values) if len(values) > 1 else (math.nan,) * 3
    return low, high


def trend(axes: Axes, table: DataFrame, x: str, y: str, shade: str, label: str, **line) -> None:
    """The mean of `y` at every `x` over the rows of a table, and its 95 % t-interval as a band."""
    groups = table.groupby(x)[y]
    mean, ends = groups.mean(), np.array([interval(values) for _, values in groups])
    axes.plot(mean.index, mean, color=shade, label=label, **line)
    axes.fill_between(mean.index, *ends.T, color=shade, alpha=0.15, linewidth=0)


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
    counts = runs.groupby("arm", sort=False).seed.nunique()
    seeds, fewer = counts.max(), counts[counts < counts.max()]
    bands = ["thick: their median", "band: their range"]
    bands = bands if log else ["band: 95 % t-interval of the mean"]
    shown = [f"{seeds} seeds", *bands] if seeds > 1 else ["1 seed, so no interval"]
    shown += [f"{arm}: {n} seed{'s' * (n > 1)}" for arm, n in fewer.items()]
    if smooth > 1:
        shown.append(f"running mean of {smooth} updates")
    figure.suptitle(textwrap.fill(f"{text}. {'; '.join(shown)}", 100))


def shared_legend(
    figure: Figure, *axes: Axes, columns: int = 3, names: dict[str, str] | None = None
) -> None:
    """One legend below all panels, a line for every label of `axes`; `names`, of those that it has,
    are what they are called."""
    of = {}
    for axis in axes:
        of |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if axis.get_legend():
            axis.get_legend().remove()
    said = names or {label: label for label in of}
    shown = {said[label]: of[label] for label in of if label in said}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns)


def smoothed(runs: DataFrame) -> int:
    """The running mean's width for curves of training batches: a twelfth of a run."""
    return max(1, int(runs.step.max()) // 12) if len(runs) else 1


def ramp(count: int) -> list:
    """Shades for what is ordered, such as temperatures, and is no arm."""
    return sns.color_palette("flare", count)


def same_heights(axes: Iterable[Axes]) -> None:
    """One y axis for panels side by side, named and numbered on the first alone."""
    first, *others = axes
    ends = np.array([axis.get_ylim() for axis in (first, *others)])
    for axis in (first, *others):
        axis.set_ylim(ends[:, 0].min(), ends[:, 1].max())
    for axis in others:
        axis.tick_params(labelleft=False)
        axis.set_ylabel("")


def point(axes: Axes, place: float, found: Sequence[float], shade: str, filled=True) -> None:
    """An estimate with the ends of its interval, (estimate, low, high), in line `place`."""
    estimate, *ends = found
    axes.plot(ends, [place, place], color=shade, linewidth=1.2)
    inside = shade if filled else "white"
    axes.plot(estimate, place, "o", color=shade, markerfacecolor=inside, markersize=4.5)


def dots(
    axes: Axes,
    values: Series,
    arms: Iterable[str],
    filled: bool = True,
    shift: float = 0.0,
    bound: float | None = None,
    each: bool = True,
) -> None:
    """An arm a line, from top to bottom, in its colour: the mean over seeds with its 95 %
    t-interval, `each` seed small. `values` have the index (arm, seed); an arm that they lack leaves
    its line empty. `bound` draws what decides: a dotted line at that value."""
    for place, (arm, shade) in enumerate(palette(arms).items()):
        own = values[values.index.get_level_values(0) == arm].dropna()
        if each:
            axes.plot(own, [place + shift] * len(own), ".", color=shade, markersize=2.5, alpha=0.5)
        if len(own):
            point(axes, place + shift, (own.mean(), *interval(own)), shade, filled)
    if bound is not None:
        axes.axvline(bound, color="0.4", linestyle=":", linewidth=1)
    rows(axes, arms)


def rows(axes: Axes, names: Iterable[str], **text) -> None:
    """Names from top to bottom, one a line."""
    names = list(names)
    axes.set_yticks(range(len(names)), names, **text)
    axes.set_ylim(len(names) - 0.5, -0.5)


def decimals(axis: Axis) -> None:
    """Plain numbers at 1, 2, 5, 10 and so on, of a log axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def cells(axes: Axes, table: DataFrame, said: DataFrame, ends: tuple[float, float], cmap: str):
    """A table as coloured cells that say `said`, `ends` being the values of the colour map's."""
    image = axes.imshow(table.to_numpy(float), cmap=cmap, vmin=ends[0], vmax=ends[1], aspect="auto")
    shades = image.cmap(image.norm(table.to_numpy(float)))[..., :3] @ (0.3, 0.6, 0.1)
    for (row, column), light in np.ndenumerate(shades):
        place = {"ha": "center", "va": "center", "fontsize": 7}
        ink = "0.1" if light > 0.5 else "white"
        axes.text(column, row, said.iloc[row, column], color=ink, **place)
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(len(table)), table.index)
    axes.tick_params(length=0)
    sns.despine(ax=axes, left=True, bottom=True)
    return image


def doubling(axes: Axes, ticks: Iterable[float], label: str = "denoising steps") -> None:
    """An x axis on which numbers double, with these ticks."""
    ticks = sorted({*ticks})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def label_ends(axes: Axes, names: dict[str, str] | None = None, size: float = 7) -> None:
    """The labels of the lines written at their ends, in their colours and apart from each other, in
    place of a legend. `names` are shorter ones, by label; a line that it lacks has none."""
    axes.get_ylim()  # settles the limits that heights are measured by
    ends = []
    for line in axes.get_lines():
        label, (x, y) = line.get_label(), line.get_data()
        known = np.isfinite(np.asarray(x, float)) & np.isfinite(np.asarray(y, float))
        if known.any() and not label.startswith("_") and (names is None or label in names):
            at = axes.transData.transform((0, np.asarray(y, float)[known][-1]))
            height = float(axes.transAxes.inverted().transform(at)[1])
            ends.append([height, names[label] if names else label, line.get_color()])
    ends.sort()
    panel = 72 * axes.get_figure().get_figheight() / axes.get_gridspec().nrows
    gap = 1.2 * size / (0.65 * panel)  # what titles and ticks leave of it
    for below, above in pairwise(ends):
        above[0] = max(above[0], below[0] + gap)
    limit = 1 + gap / 2
    for end in reversed(ends):  # what stands too high goes down, and pushes those below
        end[0] = limit = min(end[0], limit)
        limit -= gap
    for height, label, shade in ends:
        at = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        said = tinted(shade, 0.25)  # pale lines are legible, pale letters are not
        axes.annotate(label, (1, height), (4, 0), color=said, fontsize=size, **at)


def moved(axes: Axes, values: Series, arms: Iterable[str]) -> None:
    """An arm a line, from top to bottom: from its value before training, hollow, to that after, the
    means over seeds; each seed small. `values` have the index (end, arm, seed)."""
    rows(axes, arms, fontsize=6)
    for place, arm in enumerate(arms):
        ends = values.xs(arm, level="arm").unstack("seed").loc[["before", "after"]]
        axes.plot(ends, [place, place], ".", color=colour(arm), markersize=2, alpha=0.5)
        before, after = ends.mean(axis=1)
        axes.plot([before, after], [place, place], color=colour(arm), linewidth=1)
        for value, filled in ((before, "white"), (after, colour(arm))):
            axes.plot(value, place, "o", color=colour(arm), markerfacecolor=filled, markersize=4)
