"""Speed against denoising steps, and what RL moves of it: notebook 07."""

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from mdmrl.study import plots
from mdmrl.study.colours import LINES, colour, line_styles, palette
from mdmrl.study.figures.registry import figure
from mdmrl.study.speed import WHOLE
from mdmrl.study.verdicts.inference import faster_at_few_steps

AR, MDM = colour("AR"), colour("MDM")
THESIS = 16  # steps below which the thesis finds diffusion faster


def against_steps(facts, table: DataFrame, ratios: DataFrame, thesis: int | None = None) -> Figure:
    """Speed and accuracy of the masked diffusion model against its denoising steps, the
    autoregressive one as the line, as in Fig. 4-4; `ratios` are the logarithms of their speeds, a
    row a batch and a column a number of steps."""
    reference = table[table.sampler == "left to right"].iloc[0]
    table = table[table.sampler == WHOLE]
    ratios = ratios.drop(columns="batch")
    equal = faster_at_few_steps([float(n) for n in ratios], ratios.to_numpy()).estimate
    drawn, (fast, right) = plots.panels(2)
    fast.plot(table.setting, table.instances_per_second, marker="o", color=MDM)
    fast.axhline(reference.instances_per_second, color=AR)
    fast.set(yscale="log", ylabel="instances per second")
    plots.decimals(fast.yaxis)
    said = {equal: "equally fast", thesis: "the thesis's"}
    for place, (steps, word) in enumerate(said.items()):
        if steps:
            fast.axvline(steps, color="0.4", linestyle=":", linewidth=1)
            at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            text = f"{word}: {steps:.3g}"
            fast.annotate(text, (steps, 0.97 - 0.1 * place), (3, -4), fontsize=7, **at)
    error = np.stack([table.accuracy - table.low, table.high - table.accuracy])
    line = {"marker": "o", "color": MDM, "elinewidth": 1, "label": "MDM"}
    right.errorbar(table.setting, table.accuracy, error, **line)
    right.axhline(reference.accuracy, color=AR)
    right.axhspan(reference.low, reference.high, color=AR, alpha=0.2, linewidth=0)
    right.set(ylabel="right answers, greedy", ylim=(-0.02, 1.02))
    for axis, level in ((fast, "instances_per_second"), (right, "accuracy")):
        plots.doubling(axis, table.setting)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axis.annotate("AR", (1, reference[level]), (4, 0), color=AR, fontsize=8, **at)
        last = table[level].iloc[-1]
        axis.annotate("MDM", (1, last), (4, 0), color=MDM, fontsize=8, **at)
    prompts = f"{reference.prompts:.0f} items, {reference.setting:g} new tokens"
    said = f"{prompts}, batches of {facts['batch_size']}; {facts['machine']}"
    drawn.suptitle(f"{said}.\nBars and band: 95 % Wilson intervals")
    return drawn


@figure(
    "07_speed_vs_steps",
    "speed_frontier",
    "fig_4_4_log_speed_ratio",
    says="The two are equally fast at {row_10_medcot} denoising steps; at 128 the autoregressive "
    "model has {row_11_medcot} more of the prompts right.",
    rows=(10, 11),
)
def fig_4_4_speed_vs_steps(facts, table, ratios) -> Figure:
    return against_steps(facts, table, ratios, THESIS)


@figure(
    "07_speed_vs_steps",
    "speed_countdown",
    "speed_countdown_log_ratio",
    says="On Countdown the two are equally fast at {row_10_countdown} steps; with all steps the "
    "autoregressive model has {row_11_countdown} more of the items right.",
    rows=(10, 11),
)
def speed_countdown(facts, table, ratios) -> Figure:
    return against_steps(facts, table, ratios)


@figure(
    "07_speed_vs_steps",
    "speed_frontier",
    says="The autoregressive model completes {ar} instances a second with {right} right; of the "
    "diffusion samplers the fastest with at least half right makes {best} ({name}).",
    known=lambda table: {
        "ar": f"{table.instances_per_second.iloc[0]:.3g}",
        "right": f"{table.accuracy.iloc[0]:.0%}",
        **(lambda best: {"best": f"{best.instances_per_second:.3g}", "name": best.sampler})(
            table[1:][table.accuracy[1:] >= 0.5].nlargest(1, "instances_per_second").iloc[0]
        ),
    },
)
def speed_frontier(facts, table) -> Figure:
    drawn, axes = plots.panels(2, height=3.0)
    reference = table[table.sampler == "left to right"].iloc[0]
    others = table[table.sampler != "left to right"]
    styles = line_styles(others.sampler.unique())
    groups = others.groupby(others.sampler.str.contains("threshold"), sort=False)
    titles = {False: "a number of steps a block or text", True: "a threshold decides"}
    for axis, (by_threshold, group) in zip(axes, groups, strict=True):
        for name, part in group.groupby("sampler", sort=False):
            part = part.sort_values("setting")
            error = np.stack([part.accuracy - part.low, part.high - part.accuracy])
            drawn_as = {"color": colour(name), "linestyle": styles[name], "label": name}
            drawn_as |= {"marker": "o", "markersize": 3, "linewidth": 1, "elinewidth": 0.5}
            axis.errorbar(part.instances_per_second, part.accuracy, error, **drawn_as)
        at = reference.instances_per_second, reference.accuracy
        axis.plot(*at, "*", color=AR, markersize=9)
        axis.annotate("AR", at, (6, -3), textcoords="offset points", color=AR, fontsize=8)
        axis.set(xscale="log", xlabel="instances per second", title=titles[by_threshold])
        axis.set_ylim(-0.03, 1.05)
        plots.decimals(axis.xaxis)
        axis.legend(fontsize=6.5, loc="lower left")
    axes[0].set_ylabel("exact answers, greedy")
    axes[1].sharex(axes[0])
    said = f"{reference.prompts:.0f} questions, {facts['machine']}"
    drawn.suptitle(f"{said}; up and to the right is better")
    return drawn


@figure(
    "07_speed_vs_steps",
    "cost_of_a_right_completion",
    says="At its best number of steps a right completion costs the masked diffusion model "
    "exp({sampling_seconds}) times the seconds and exp({sampling_token_forwards}) times the "
    "positions of the autoregressive one.",
)
def cost_of_a_right_completion(facts, costs) -> Figure:
    drawn, axes = plots.panels(2)
    single, table = costs[costs.sampler == "AR"].iloc[0], costs[costs.sampler == WHOLE]
    said = {"seconds": "seconds", "token_forwards": "positions"}
    for axis, (cost, word) in zip(axes, said.items(), strict=True):
        each = table[cost] / table.accuracy.where(table.accuracy > 0)
        axis.plot(table.setting, each, marker="o", color=MDM, label="MDM")
        level = single[cost] / (single.accuracy or np.nan)
        axis.plot(table.setting, [level] * len(table), color=AR, label="AR")
        axis.set(yscale="log", ylabel=f"{word} a right completion")
        plots.doubling(axis, table.setting)
        plots.label_ends(axis, size=8)
    text = f"Temperature 1, {single.prompts:.0f} completions a point, {facts['machine']}"
    drawn.suptitle(f"{text}; no point where none was right")
    return drawn


def moved(facts, table: DataFrame, speeds: DataFrame, peers: DataFrame, what: str) -> Figure:
    """What completions are worth against denoising steps, and against instances a second, before
    and after RL, the mean over seeds with its interval; `peers` are autoregressive models, by
    `name` with their `instances_per_second` and `value`."""
    drawn, (against, fast) = plots.panels(2, height=2.8)
    measure, curves = table.columns[-1], table["curve"].unique()
    rate = speeds[speeds.sampler == WHOLE].set_index("setting").instances_per_second
    styles, shades = line_styles(curves[1:]), palette(curves[1:])
    for name in curves:
        look = {"linestyle": styles.get(name, "-"), "marker": "o", "markersize": 3}
        own, shade = table[table["curve"] == name], shades.get(name, MDM)
        plots.trend(against, own, "steps", measure, shade, name, **look)
        mean = own.groupby("steps")[measure].mean()
        fast.plot(rate.reindex(mean.index), mean, color=shade, **look)
    for peer, line in zip(peers.itertuples(), LINES, strict=False):
        against.axhline(peer.value, color=AR, linestyle=line, linewidth=1, label=peer.name)
        alpha = 1 if line == "-" else 0.5
        fast.plot(peer.instances_per_second, peer.value, "*", color=AR, alpha=alpha)
    word = {"accuracy": "right answers", "reward": "reward"}[measure]
    against.set_ylabel(f"{word}, greedy")
    fast.set(xscale="log", xlabel="instances per second", ylabel=f"{word}, greedy")
    plots.decimals(fast.xaxis)
    plots.doubling(against, table.steps)
    for axis in (against, fast):
        axis.set_ylim(bottom=0)
    plots.shared_legend(drawn, against)
    text = f"{what}; speeds: {facts['machine']}"
    plots.title(drawn, text, table.rename(columns={"curve": "arm"}))
    return drawn


def gained(table: DataFrame, speeds: DataFrame, peers: DataFrame) -> dict[str, str]:
    """What the fewest steps are worth before RL and after all of it, and that number of steps."""
    measure, curves = table.columns[-1], table["curve"].unique()
    fewest: Series = table[table.steps == table.steps.min()].groupby("curve")[measure].mean()
    ends = {"before": fewest[curves[0]], "after": fewest[curves[-1]]}
    return {name: f"{x:.2f}" for name, x in ends.items()} | {"steps": f"{table.steps.min():g}"}


def trade_off(name: str, speeds: str, measure: str, task: str, said: str) -> None:
    """Registers `moved` of what is measured as the figure of that name."""

    def draw(facts, table, speeds, peers) -> Figure:
        return moved(facts, table, speeds, peers[peers.measure == measure], f"{task}, held out")

    draw.__name__ = name
    says = f"With as few as {{steps}} steps {said} from {{before}} before RL to {{after}} after."
    figure("07_speed_vs_steps", name, speeds, "trade_off_peers", says=says, known=gained)(draw)


trade_off("trade_off_moved", "speed_countdown", "countdown", "Countdown", "right answers go")
trade_off("trade_off_medcot_accuracy", "speed_frontier", "accuracy", "MedCoT", "exact answers go")
trade_off("trade_off_medcot_reward", "speed_frontier", "reward", "MedCoT", "the reward goes")
