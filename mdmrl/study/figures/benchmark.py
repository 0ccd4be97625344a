"""Table 4-1, the planning gap and forgetting: notebook 06."""

from matplotlib.figure import Figure

from mdmrl.study import plots
from mdmrl.study.colours import colour
from mdmrl.study.figures.registry import figure
from mdmrl.tasks.choice import CHANCE


@figure(
    "06_benchmark_tables",
    "table_4_1",
    "table_4_1_contrasts",
    says="On Countdown RL on the mixture changes the masked diffusion model's right answers by "
    "{row_07_countdown} of the items, and the tuned one is ahead of the autoregressive model by "
    "{row_08_countdown}.",
    rows=(7, 8),
)
def table_4_1(facts, table, contrasts) -> Figure:
    tasks = contrasts.row.unique()
    drawn, axes = plots.panels(len(tasks) + 2, height=1.9)
    for axis, task in zip(axes, tasks, strict=False):
        part = table[table.row == task]
        for place, found in enumerate(part.itertuples()):
            ends = found.right, found.low, found.high
            plots.point(axis, place, ends, colour(found.column), "tuned" in found.column)
            text = f"{found.right:.1f}"
            at = {"textcoords": "offset points", "fontsize": 7}
            axis.annotate(text, (found.high, place), (4, -3), **at)
        plots.rows(axis, part.column)
        axis.set(title=task, xlim=(-3, 111), xlabel="right answers, percent")
        axis.set_ylim(len(part) - 0.5, -0.9)
        if task == "choice":
            axis.axvline(100 * CHANCE, color="grey", linestyle=":", linewidth=1)
            axis.annotate(" chance", (100 * CHANCE, -0.6), color="grey", fontsize=7)
    for axis, other in zip(axes[-2:], ("MDM", "AR"), strict=True):
        part = contrasts[(contrasts.column == "tuned MDM") & (contrasts["minus"] == other)]
        for place, found in enumerate(part.itertuples()):
            plots.point(axis, place, (found.change, found.low, found.high), colour("MDM"))
        plots.rows(axis, part.row)
        axis.axvline(0, color="0.3", linestyle=":", linewidth=1)
        axis.set(title=f"tuned MDM minus {other}", xlabel="points, paired by item")
    table = table[table.row.isin(tasks)]
    items = f"{table.n.max()} items a task"
    few = f", {table.n.min()} of them few-shot" if table.n.nunique() > 1 else ""
    said = "Filled: tuned by RL. Bars: 95 % intervals"
    drawn.suptitle(f"Table 4-1. {items}{few}. {said}")
    return drawn


@figure(
    "06_benchmark_tables",
    "planning_gap",
    "planning_leads",
    says="The masked diffusion model's lead over its autoregressive twin is larger on Countdown "
    "than on MedCoT by {row_09_equal_tokens} of the items at equal tokens of pre-training, and by "
    "{row_09_plateau} after long pre-training.",
    rows=(9,),
)
def planning_gap(facts, shares, leads) -> Figure:
    lines = shares.line.unique()
    drawn, axes = plots.panels(2 * len(lines), height=1.9)
    for (level, lead), line in zip(axes.reshape(-1, 2), lines, strict=True):
        part = shares[shares.line == line]
        for place, found in enumerate(part.itertuples()):
            ends = found.right, found.low, found.high
            plots.point(level, place, ends, colour(found.column), filled=False)
        plots.rows(level, part.row + ", " + part.column)
        level.set(xlim=(-3, 103), xlabel="right answers, percent", title=f"accuracy ({line})")
        part = leads[leads.line == line]
        for place, found in enumerate(part.itertuples()):
            plots.point(lead, place, (found.lead, found.low, found.high), colour("MDM"))
        plots.rows(lead, part["of"])
        lead.axvline(0, color="0.3", linestyle=":", linewidth=1)
        lead.set(xlabel="MDM minus AR, points", title=f"lead ({line})")
    items = " and ".join(f"{part.n.max()} items of {row}" for row, part in shares.groupby("row"))
    drawn.suptitle(f"{items}; as many steps as tokens; bars: 95 % intervals")
    return drawn


@figure(
    "06_benchmark_tables",
    "forgetting",
    says="Tuned on Countdown alone the model's right answers change by {own} points there and by "
    "{other} points on MATH.",
    known=lambda changes: {
        key: "{0.change:+.1f} [{0.low:+.1f}, {0.high:+.1f}]".format(
            changes[(changes.column == "Countdown") & (changes.row == row)].iloc[0]
        )
        for key, row in {"own": "Countdown", "other": "MATH"}.items()
    },
)
def forgetting(facts, changes) -> Figure:
    text = "{0.change:+.1f}\n[{0.low:+.1f}, {0.high:+.1f}]"
    changes = changes.assign(text=changes.apply(text.format, axis=1))
    grid, said = (
        changes.pivot(index="column", columns="row", values=value).reindex(
            changes.column.unique(), columns=changes.row.unique()
        )
        for value in ("change", "text")
    )
    drawn, (axis,) = plots.panels(1, height=0.9 + 0.5 * len(grid), columns=1)
    most = max(5.0, grid.abs().to_numpy().max())
    image = plots.cells(axis, grid, said, (-most, most), "vlag_r")
    drawn.colorbar(image, label="points")
    axis.set(xlabel="scored on", ylabel="tuned on")
    said = f"{facts['items']} items a task, 95 % intervals; updates on one task"
    drawn.suptitle(f"Right answers after RL minus before, {said}: {facts['max_steps']}")
    return drawn
