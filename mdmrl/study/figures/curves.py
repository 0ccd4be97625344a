"""The main experiment on Countdown, and training on MedCoT: notebooks 03 and 16."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pandas import DataFrame

from mdmrl.study import candidates, plots
from mdmrl.study.colours import colour, palette, tinted
from mdmrl.study.figures.registry import figure

MAIN = ("AR", "MDM ar_style, 4 steps", "MDM one_step, 4 steps", "MDM complementary, 4 steps")
MAIN += ("MDM trajectory, 4 steps",)
WEAK = ", β = 0.05"
FORM = ("failure_rate", "leftover_mask_rate", "repetition")


def pair(runs: DataFrame, variant: str, columns: dict[str, bool], words: tuple[str, str]) -> Figure:
    """A column of panels for each arm that has a `variant` too, whose name ends so; a row for each
    of the log's `columns`, on a log axis where it has True. `words` call the two lines."""
    names = [name.removesuffix(variant) for name in runs.arm.unique() if name.endswith(variant)]
    drawn, axes = plots.panels(len(names) * len(columns), height=1.9, columns=len(names))
    smooth = plots.smoothed(runs)
    grid = axes.reshape(len(columns), len(names))
    for row, (column, log) in zip(grid, columns.items(), strict=True):
        for axis, name in zip(row, names, strict=True):
            looked = column.startswith("eval/")
            arms = [name, name + variant]
            plots.curves(axis, runs, column, arms, 1 if looked else smooth, log=log)
        plots.same_heights(row)
    for axis, name in zip(grid[0], names, strict=True):
        axis.set_title(name, color=tinted(colour(name), 0.25))
    both = dict(zip((names[0], names[0] + variant), words, strict=True))
    plots.shared_legend(drawn, grid[0, 0], columns=2, names=both)
    plots.title(drawn, "MedCoT, β = 1, k3", runs, smooth)
    return drawn


@figure(
    "03_reward_curves",
    "main_experiment",
    "main_experiment_updates",
    says="Held-out accuracy on Countdown, greedy, gains {countdown_gain_trajectory} with the "
    "sampler's own likelihood, {countdown_gain_one_step} with `one_step`, "
    "{countdown_gain_ar_style} scored as if autoregressive, and {countdown_gain_ar} in the "
    "autoregressive twin.",
    rows=(1, 2, 16),
)
def main_experiment(facts, looks, updates) -> Figure:
    drawn, axes = plots.panels(9, height=2.0, columns=3)
    for row, column in enumerate(("eval/accuracy", "eval/sampled/accuracy")):
        for axis, against in zip(
            axes[3 * row : 3 * row + 3], ("step", "spent/positions", "spent/seconds"), strict=True
        ):
            plots.curves(axis, looks, column, MAIN, against=against)
    weak = [name + WEAK for name in MAIN]
    below = {"kl/sum": MAIN, "grad_norm/surrogate": MAIN, "grad_norm/kl": weak}
    for axis, (column, names) in zip(axes[6:], below.items(), strict=True):
        plots.curves(axis, updates, column, names, log=True)
    axes[8].set_title(WEAK.removeprefix(", "))
    for axis in axes:
        axis.yaxis.label.set_fontsize(7)
    plots.shared_legend(drawn, axes[0])
    text = "Countdown, held out; RL in 4 denoising steps. Below: median and range, smoothed"
    plots.title(drawn, text, looks[looks.arm.isin(MAIN)])
    return drawn


@figure(
    "03_reward_curves",
    "main_experiment",
    says="From 4 steps on to 2 and to 1, each from the weights before, greedy accuracy gains "
    "{countdown_gain_trajectory_4_2} and {countdown_gain_trajectory_4_2_1} more.",
)
def countdown_descent(facts, looks) -> Figure:
    stages = {
        "rollouts in 4 steps": "{}, 4 steps",
        "in 2, after 4": "{}, 2 steps, after 4",
        "in 1, after 2": "{}, 1 step, after 2",
    }
    drawn, axes = plots.panels(3, columns=3)
    ends = {}
    for axis, (said, form) in zip(axes, stages.items(), strict=True):
        arms = {form.format(f"MDM {name}"): name for name in ("trajectory", "one_step")}
        plots.curves(axis, looks, "eval/accuracy", arms)
        if "in 2" in said:
            straight = "MDM trajectory, 2 steps"
            own = looks[looks.arm == straight].assign(arm="MDM trajectory, at once")
            plots.curves(axis, own, "eval/accuracy", own.arm.unique())
            ends = {"MDM trajectory, at once": "trajectory, 2 steps at once"}
            for line in axis.get_lines():
                if line.get_label() in ends:
                    line.set_linestyle(":")
        axis.set_title(said)
        axis.set_ylim(-0.02, 0.62)
        names = {**arms, **ends}
        handles = {
            names[line.get_label()]: line for line in axis.get_lines() if line.get_label() in names
        }
        if handles:
            axis.legend(handles.values(), handles, fontsize=6.5)
    shown = looks[looks.arm.str.contains("MDM (?:trajectory|one_step), ")]
    plots.title(drawn, "Countdown, held out: RL in ever fewer denoising steps", shown)
    return drawn


@figure(
    "03_reward_curves",
    "countdown_mechanism",
    says="Tokens drawn in one step agree more after RL than before: of `trajectory` the mean "
    "probability with which they were drawn goes from {before} to {after}.",
    known=lambda ends: {
        end: f"{ends[(ends.end == end) & (ends.arm == MAIN[-1])]['look/alone'].mean():.2f}"
        for end in ("before", "after")
    },
)
def countdown_mechanism(facts, ends) -> Figure:
    said = {"look/right": "P(a right expression)", "look/entropy": "entropy of which, nats"}
    said |= {"look/alone": "P(token) as drawn", "look/together": "P(token), others seen"}
    arms = ends.arm.unique()
    drawn, axes = plots.panels(4, height=1.2 + 0.16 * len(arms), columns=4)
    values = ends.set_index(["end", "arm", "seed"])
    for axis, (column, title) in zip(axes, said.items(), strict=True):
        plots.moved(axis, values[column].astype(float), arms)
        axis.set_xlabel(title, fontsize=7)
        axis.tick_params(labelleft=axis is axes[0])
    seeds = f"checkpoints: {ends.seed.nunique()}"
    drawn.suptitle(f"Before (hollow) and after RL, each arm at its own steps; {seeds}")
    return drawn


@figure(
    "03_reward_curves",
    "gain_predictors",
    says="How far an estimator sharpens the marginals of an empty canvas before training goes with "
    "its gain by a rank correlation of {predictor_sharpening_before}, the cosine of its gradient "
    "with the sampler's own by {predictor_cosine_before}, what one step adds to right answers by "
    "{predictor_effect_before}.",
)
def gain_predictors(facts, found) -> Figure:
    drawn, axes = plots.panels(10, height=1.7, columns=5)
    style = {"hue": "arm", "palette": palette(found.arm.unique()), "s": 18}
    for axis, (when, name) in zip(axes, candidates.COLUMNS, strict=True):
        column = f"{name}, {when}"
        sns.scatterplot(found, x=column, y="gain", ax=axis, legend=axis is axes[0], **style)
        rho = candidates.correlation(found.set_index(["arm", "seed"]), column, "gain")
        estimate, ends = str(rho).split(" ", 1)
        axis.set_title(f"{when}: ρ = {estimate}\n{ends}", fontsize=7)
        axis.set(xlabel=name, ylabel="gain of accuracy" if name == "cosine" else "")
    plots.shared_legend(drawn, axes[0])
    return drawn


@figure(
    "03_reward_curves",
    "medcot_held_out",
    says="On held-out prompts with depth bounded: {row_01_medcot_greedy} of reward, greedy, is "
    "what RL gains the autoregressive model with the thesis's KL term.",
    rows=(1, 2),
)
def medcot_held_out(facts, looks) -> Figure:
    free = looks.arm.str.endswith("β = 0")
    groups = {"β = 1, k3": looks[~free], "β = 0": looks[free]}
    columns = ("eval/reward", "eval/sampled/reward", "eval/accuracy", "eval/sampled/accuracy")
    drawn, axes = plots.panels(8, height=1.8)
    for row, column in zip(axes.reshape(4, 2), columns, strict=True):
        for axis, (title, part) in zip(row, groups.items(), strict=True):
            plots.curves(axis, part, column, part.arm.unique())
            axis.set_title(title if column == columns[0] else "")
        plots.same_heights(row)
        for axis, part in zip(row, groups.values(), strict=True):
            plots.label_ends(axis, {name: name.split(", ")[0] for name in part.arm.unique()}, 6)
    plots.title(drawn, "MedCoT, held-out prompts, depth bounded", looks)
    return drawn


@figure(
    "03_reward_curves",
    "fig_4_1_runs",
    says="In training batches the autoregressive model's reward rises by {fig_4_1_ar}; scored as "
    "if autoregressive, the masked diffusion model closes {fig_4_1_mdm_ar_style_16_steps} of its "
    "headroom, with `one_step` {fig_4_1_mdm_one_step_16_steps}.",
)
def fig_4_1_reward_curves(facts, runs) -> Figure:
    columns = ("reward", "eval/reward", "eval/accuracy", "format_rate")
    said = "Fig. 4-1. MedCoT, β = 1, k3; darker: more steps"
    drawn, axes = plots.of_runs(runs, columns, said, height=2.6)
    plots.shared_legend(drawn, axes[0])
    return drawn


@figure(
    "16_starting_point",
    "lora_runs",
    says="LoRA or every weight: the last tenth of training earns the autoregressive model {lora} "
    "with adapters and {full} without.",
    known=lambda runs: {
        name: f"{runs[(runs.arm == arm) & (runs.step > 0.9 * runs.step.max())].reward.mean():.2f}"
        for name, arm in {"lora": "AR, LoRA", "full": "AR"}.items()
    },
)
def lora_beside_full(facts, runs) -> Figure:
    words = "every weight is trained", "LoRA"
    return pair(runs, ", LoRA", {"reward": False, "kl": True}, words)


@figure(
    "16_starting_point",
    "cold_start",
    says="After a cold start by SFT the gain of RL differs by {cold_start_ar} (AR), "
    "{cold_start_mdm_ar_style_16_steps} (`ar_style`) and {cold_start_mdm_one_step_16_steps} "
    "(`one_step`).",
    rows=(17,),
)
def cold_start(facts, runs) -> Figure:
    words = "RL from the start as it is", "after fine-tuning (SFT)"
    return pair(runs, ", SFT", {"reward": False, "eval/accuracy": False}, words)


@figure(
    "03_reward_curves",
    "fig_4_3_runs",
    says="Twice the length changes the spread of the summed KL by a log ratio of {fig_4_3}.",
    rows=(6,),
)
def fig_4_3_ar_lengths(facts, runs) -> Figure:
    said = "Fig. 4-3. The autoregressive model at two lengths"
    drawn, axes = plots.of_runs(runs, ("reward", "loss", "kl/sum"), said, columns=3)
    long, short = f"{facts['max_completion_length']} tokens", f"{facts['short_length']} tokens"
    names = {"AR": long, f"AR, {short}": short}
    plots.shared_legend(drawn, axes[0], names=names)
    return drawn


@figure(
    "03_reward_curves",
    "app_c_completions",
    says="Completed in 16 steps instead of 128 the texts of the model trained with `ar_style` fail "
    "{row_12_medcot_ar_style} more often, of that with `one_step` {row_12_medcot_one_step}.",
    rows=(12,),
)
def app_c_completions(facts, looks) -> Figure:
    ways = looks.completed.str.extract(r"(?P<arm>[^\n]*)(?:\ncompleted in (?P<count>\d+))?")
    looks = looks.assign(arm=ways.arm, count=ways["count"].astype(float))
    arms = looks.arm[looks["count"].notna()].unique()
    says = {"failure_rate": "fails", "leftover_mask_rate": "[MASK] left", "repetition": "repeats"}
    drawn, axes = plots.panels(3, height=1.1 + 0.3 * len(arms), columns=3)
    for axis, column in zip(axes, FORM, strict=True):
        own = looks[looks.measure == column].set_index(["arm", "seed"])
        for place, count in enumerate(sorted(own["count"].dropna().unique())):
            values, shift = own.value[own["count"] == count], 0.24 * place - 0.12
            plots.dots(axis, values, arms, filled=bool(place), shift=shift)
            if column == "failure_rate" and place:  # row 12: 0.2 above this
                for line, arm in enumerate(arms):
                    bound = values.xs(arm).mean() + 0.2
                    axis.plot([bound] * 2, [line - 0.4, line + 0.4], ":", color="0.3", linewidth=1)
        single = own.value.get("AR", pd.Series(dtype=float))
        if len(single):
            low, high = plots.interval(single)
            axis.axvspan(low, high, color=colour("AR"), alpha=0.15, linewidth=0)
            axis.axvline(single.mean(), color=colour("AR"), linewidth=1)
        axis.tick_params(labelleft=axis is axes[0])
        axis.set(xlabel="share of texts", title=says[column])
        axis.set_xlim(-0.01, max(0.05, axis.get_xlim()[1]))
    few, many = sorted(looks["count"].dropna().unique())
    text = f"Hollow: in {few:g} denoising steps, filled: in {many:g}; blue: AR; temperature 1"
    drawn.suptitle(f"{text}.\nDotted: 0.2 above filled, which decides. 95 % over seeds")
    return drawn


@figure(
    "16_starting_point",
    "real_model",
    says="Shown as it is: the first tenth of the updates of a real model earn {first}, the last "
    "{last}.",
    known=lambda runs: {
        "first": f"{runs.reward[runs.step < 0.1 * runs.step.max()].mean():.2f}",
        "last": f"{runs.reward[runs.step > 0.9 * runs.step.max()].mean():.2f}",
    },
)
def real_model(facts, runs) -> Figure:
    drawn, axes = plots.of_runs(runs, ("reward", "format_rate"), " ".join(runs.arm.unique()))
    axes[1].set_ylim(-0.02, 1.02)
    return drawn
