"""Value-guided inference: notebooks 09 and 17."""

from matplotlib.figure import Figure

from mdmrl.study import plots
from mdmrl.study.colours import GREY, colour, palette
from mdmrl.study.figures.registry import figure
from mdmrl.study.prose import REWARD_CEILING

ABOVE = 0.6  # the area that row 14 asks for


@figure(
    "09_value_guided",
    "value_calibration",
    "value_areas",
    says="Half-way V tells which of a prompt's texts will earn more with an area of "
    "{value_judges}, which will be exact with {value_judges_answers} (0.5 is chance).",
)
def value_calibration(facts, fifths, known) -> Figure:
    drawn, (left, right) = plots.panels(2)
    for _, part in fifths.groupby("seed"):
        left.plot(part.V, part.reward, color=colour("V"), marker="o", markersize=3, linewidth=0.8)
    left.axline((fifths.V.mean(),) * 2, slope=1, color="0.6", linewidth=0.6)
    left.set(xlabel="V at half the steps, by fifths", ylabel="mean reward at the end")
    for judge, part in known.groupby("judge", sort=False):
        plots.trend(right, part, "look", "area", colour(judge), judge)
    for level, style in ((0.5, "-"), (ABOVE, ":")):
        right.axhline(level, color="0.5", linewidth=0.8, linestyle=style)
    right.set(xlabel="look (four a block)", ylabel="AUROC within prompts")
    right.set_xticks(range(0, int(known.look.max()) + 1, 4))
    plots.label_ends(right)
    prompts = f"{facts['prompts']} prompts, {known.seed.nunique()} seeds"
    drawn.suptitle(f"{prompts}; band: 95 % t-interval; dotted: what a judge needs")
    return drawn


@figure(
    "09_value_guided",
    "value_best_of",
    "value_guided",
    says="Rejecting early by V earns {value_guides} of reward more than the best of as many "
    "finished texts as it costs.",
)
def value_guided(facts, curves, compared) -> Figure:
    shown = compared[compared.arm != "plain"]
    shades = palette(shown.arm.unique())
    drawn, (left, right) = plots.panels(2, height=2.8)
    for by, line in {"V": "-", "true reward": "--"}.items():
        plots.trend(left, curves[curves.by == by], "n", "reward", "0.4", by, linestyle=line)
    plots.label_ends(left)
    for arm, row in shown.groupby("arm", sort=False)[["texts", "reward"]].mean().iterrows():
        left.plot(row.texts, row.reward, "o", color=shades[arm], markersize=4.5)
    left.set(
        xlabel="cost, in plain completions", ylabel="mean reward", title="best of n, and guided"
    )
    gains = shown.groupby(["arm", "prompt"], sort=False).gain.mean()
    plots.dots(right, gains, shades, bound=0.0, each=False)
    right.set(xlabel="reward above best of n by V", title="at equal cost")
    seeds = f"95 % over {curves.seed.nunique()} seeds (left)"
    drawn.suptitle(f"{seeds}, over {facts['prompts']} prompts (right)")
    return drawn


@figure(
    "17_few_steps",
    "few_steps",
    says="At many steps, RL at few has gained {few_steps_pay_few_steps_equal_updates_accuracy} of "
    "exact answers after as many updates; at equal cost it has changed them by "
    "{few_steps_pay_few_steps_equal_cost_accuracy}, with depth capped by "
    "{few_steps_pay_few_steps_equal_cost_depth_capped_accuracy}.",
)
def few_steps(facts, ends) -> Figure:
    drawn, axes = plots.panels(2, height=2.4)
    counts, models = sorted(ends.steps.unique()), ends.model.unique()
    said = {"accuracy": "exact answers, held out", "reward": "reward, held out"}
    for axis, (column, word) in zip(axes, said.items(), strict=True):
        for place, count in enumerate(counts):
            values = ends[ends.steps == count].set_index(["model", "seed"])[column]
            plots.dots(axis, values, models, filled=bool(place), shift=0.26 * place - 0.13)
        axis.set_xlabel(word)
    tuned = ends[(ends.model == "base") & (ends.steps == counts[-1])].accuracy.mean()
    axes[0].axvline(tuned, color=GREY, linestyle=":", linewidth=1)
    axes[1].axvline(REWARD_CEILING, color="0.3", linestyle=":", linewidth=1)
    axes[1].tick_params(labelleft=False)
    text = "Hollow: {} denoising steps at inference, filled: {}. Dotted: the base at {}; the"
    said = f"Temperature 1, {ends.seed.nunique()} seeds, 95 % intervals"
    text = f"{text.format(*counts, counts[-1])}\nceiling by the thesis's count. {said}"
    drawn.suptitle(text)
    return drawn


@figure(
    "09_value_guided",
    "value_countdown_areas",
    "value_countdown_best",
    "value_countdown",
    "value_countdown_rl",
    says="Where the answer is the reward V tells right from wrong half-way with an area of "
    "{row_14_countdown}; guidance is ahead of GRPO by {value_or_rl} of right answers.",
    rows=(14,),
)
def value_countdown(facts, areas, best, compared, runs) -> Figure:
    drawn, axes = plots.panels(3, columns=3)
    for judge, part in areas.groupby("judge", sort=False):
        plots.trend(axes[0], part, "steps", "area", colour(judge), judge, marker=".")
    for level, style in ((0.5, "-"), (ABOVE, ":")):
        axes[0].axhline(level, color="0.5", linewidth=0.8, linestyle=style)
    axes[0].set(xlabel="denoising steps S", ylabel="AUROC of the answer at S/2")
    axes[0].legend(fontsize=6)
    axes[1].plot(best.n, best.accuracy, color="0.4", label="best of n by V")
    for row in compared.itertuples():
        shade = colour("trajectory" if row.arm == "GRPO" else row.arm)
        mark = {"marker": "*" if row.arm == "GRPO" else ".", "markersize": 9, "linestyle": ""}
        axes[1].plot(row.texts, row.accuracy, color=shade, label=row.arm, **mark)
    axes[1].set(xlabel="cost, in plain completions", ylabel="right answers")
    axes[1].legend(fontsize=5)
    plots.of_seeds(axes[2], runs, "eval/sampled/accuracy", colour("trajectory"))
    axes[2].legend(fontsize=6)
    drawn.suptitle("What V knows; guidance or RL; V inside RL's rollouts")
    return drawn
