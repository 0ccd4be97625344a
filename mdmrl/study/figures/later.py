"""Hierarchy, rewards, code, Dafny, pass@k and one objective: notebooks 10 to 15."""

from matplotlib.figure import Figure

from mdmrl.study import plots, unified
from mdmrl.study.colours import colour, palette
from mdmrl.study.figures.registry import figure

WAYS = ("flat", "unit after unit", "units at once")


@figure(
    "10_hierarchy",
    "hierarchy",
    says="Units at once take {row_19_tiny_mdm} of flat's forward passes on the critical path in "
    "the masked diffusion model, {row_19_tiny_ar} in the autoregressive one; half decides.",
    rows=(19,),
)
def hierarchy(facts, table) -> Figure:
    drawn, axes = plots.panels(4, height=2.1)
    words = {"NFE": "forward passes on the critical path", "seconds": "seconds a batch"}
    words |= {"accuracy": "similarity to the reference, 0 to 2", "exact answer": "exact answers"}
    policies = table.policy.unique()
    places = {key: i for i, key in enumerate((p, w) for p in policies for w in WAYS)}
    for axis, (column, said) in zip(axes, words.items(), strict=True):
        for (policy, way), place in places.items():
            values = table[(table.policy == policy) & (table.way == way)][column]
            found = values.mean(), *plots.interval(values)
            plots.point(axis, place, found, colour(way))
            if column == "NFE" and way == "flat":  # row 19: half of it
                end = [place - 0.4, place + len(WAYS) - 0.6]
                axis.plot([values.mean() / 2] * 2, end, ":", color="0.3", linewidth=1)
        plots.rows(axis, [f"{policy}, {way}" for policy, way in places])
        axis.tick_params(labelleft=axis in (axes[0], axes[2]))
        axis.set_xlabel(said)
        axis.set_xlim(left=0)
    prompts = f"{facts['prompts']} prompts in a batch, {table.machine.iloc[0]}"
    seeds = f"{table.seed.nunique()} seeds, 95 % intervals"
    drawn.suptitle(f"{prompts}; {seeds}; dotted: half of flat")
    return drawn


@figure(
    "10_hierarchy",
    "hierarchy_rl",
    says="RL on the hierarchy takes similarity from {before} to {after} on held-out prompts in the "
    "masked diffusion model.",
    known=lambda runs: {
        end: f"{own.groupby('seed')['eval/rewards/accuracy/mean'].agg(pick).mean():.2f}"
        for own in [runs[runs.arm.str.contains("mdm, hierarchy")].sort_values("step")]
        for end, pick in {"before": "first", "after": "last"}.items()
    },
)
def hierarchy_rl(facts, runs) -> Figure:
    drawn, axes = plots.panels(4)
    for axis, column in zip(
        axes, ("rewards/accuracy/mean", "kl", "eval/accuracy", "token_forwards"), strict=True
    ):
        smooth = plots.smoothed(runs) if column.startswith("rewards") else 1
        plots.curves(axis, runs, column, runs.arm.unique(), smooth)
    plots.shared_legend(drawn, axes[0])
    plots.title(drawn, "RL on flat text and on the hierarchy", runs, plots.smoothed(runs))
    return drawn


@figure(
    "10_hierarchy",
    "hierarchy_ppo",
    says="With V the pipeline's reward is {pipeline_reward_no_v} above that without, and "
    "{pipeline_reward_v_at_random} above that of a V that knows nothing.",
)
def hierarchy_pipeline(facts, runs) -> Figure:
    runs = runs.assign(arm=runs.arm.str.replace("PPO, V", "PPO, with V"))
    columns = ("reward", "kl", "eval/reward", "token_forwards")
    drawn, axes = plots.of_runs(runs, columns, "Block-level PPO through the pipeline")
    plots.shared_legend(drawn, axes[0])
    return drawn


@figure(
    "11_reward_ablation",
    "reward_ablation",
    says="RL on the whole reward adds {ablation_medcot_all} of the exact answers; without accuracy "
    "{ablation_medcot_no_accuracy}; without depth {ablation_medcot_no_depth}.",
    rows=(18,),
)
def reward_ablation(facts, table) -> Figure:
    drawn, axes = plots.panels(2, height=2.2)
    said = {"medcot": "MedCoT: exact answers", "code": "code: held-out tests pass"}
    for axis, (task, title) in zip(axes, said.items(), strict=True):
        part = table[table.arm.str.startswith(task)].set_index(["arm", "seed"]).gain
        names, family = part.index.unique("arm"), facts["families"][task]
        in_colour = f"{family}, {{}}".format
        plots.dots(axis, part.rename(in_colour, level="arm"), names.map(in_colour), bound=0.0)
        axis.set_yticks(axis.get_yticks(), [name.partition(": ")[2] for name in names])
        axis.set(title=f"{title} ({family})", xlabel="gain on held-out items, greedy")
        axis.locator_params(axis="x", nbins=5)
    drawn.suptitle(f"{table.seed.nunique()} seeds, 95 % t-intervals; dotted: 0")
    return drawn


@figure(
    "12_code_completion",
    "code_completion",
    says="GRPO on tests adds {code_gain_ar_greedy} (AR), {code_gain_mdm_greedy} (MDM) and "
    "{code_gain_bd_greedy} (block diffusion) of held-out items whose held-out tests pass.",
    rows=(1,),
)
def code_completion(facts, runs) -> Figure:
    columns = ("reward", "eval/accuracy", "eval/sampled/accuracy", "eval/code/R_a")
    said = "Code: combinations that no training item has"
    drawn, axes = plots.of_runs(runs, columns, said)
    for axis, decoded in zip(axes[1:3], ("greedy", "sampled"), strict=True):
        axis.set_ylabel(f"held-out tests pass, {decoded}")
    for axis in axes:
        plots.label_ends(axis)
    return drawn


@figure(
    "12_code_completion",
    "code_infilling",
    says="Of spans filled in from both sides {infilling_mdm_both_sides} pass their held-out tests, "
    "from left to right {infilling_ar} (AR) and {infilling_mdm} (MDM).",
)
def code_infilling(facts, table) -> Figure:
    drawn, (axis,) = plots.panels(1, height=1.8, columns=1)
    for place, row in enumerate(table.itertuples()):
        filled = "both sides" in row.policy
        plots.point(axis, place, (row.passes, row.low, row.high), colour(row.policy), filled)
    plots.rows(axis, table.policy)
    axis.set(xlabel=f"held-out tests pass, of {facts['items']} spans (95 % Wilson intervals)")
    axis.set_xlim(-0.02, 1)
    return drawn


@figure(
    "13_dafny",
    "dafny_rl",
    says="RL on the verifier's word adds {dafny_gain} of the held-out specifications.",
    rows=(21,),
)
def dafny_rl(facts, runs) -> Figure:
    drawn, axes = plots.of_runs(runs, ("reward", "eval/accuracy"), "GRPO on the verifier's word")
    axes[1].set_ylabel("held-out specifications verified")
    return drawn


def _before_and_after(line: str) -> dict[str, str]:
    return {"base": colour("base"), "tuned": colour(line)}


@figure(
    "14_pass_at_k",
    "pass_at_k",
    says="RL changes how many different right solutions 128 completions hold by {narrowing_ar} "
    "(AR) and {narrowing_mdm_4_steps} (MDM, 4 steps).",
    rows=(20,),
)
def fig_5_2_pass_at_k(facts, table) -> Figure:
    table, lines = table[table.temperature == 1.0], table.line.unique()
    drawn, axes = plots.panels(2 * len(lines), columns=len(lines))
    grid = axes.reshape(2, len(lines))
    words = {"pass@k": "pass@k", "distinct": "different right solutions"}
    for row, (column, said) in zip(grid, words.items(), strict=True):
        for axis, line in zip(row, lines, strict=True):
            own = table[table.line == line]
            for model, shade in _before_and_after(line).items():
                part = own[own.model == model]
                plots.trend(axis, part, "k", column, shade, model, marker=".")
            plots.doubling(axis, own.k.unique()[::2], "k, completions")
            axis.set_ylabel(said if axis is row[0] else "")
    for axis, line in zip(grid[0], lines, strict=True):
        axis.set(title=line, ylim=(0, 1.02))
        axis.legend(loc="lower right")
    prompts = table.groupby(["line", "checkpoint"]).item.nunique().max()
    said = f"{prompts} prompts a checkpoint, of {table.checkpoint.nunique()}; temperature 1"
    drawn.suptitle(f"Fig. 5-2. {said}; bands: 95 % over prompts")
    return drawn


@figure(
    "14_pass_at_k",
    "pass_at_k",
    "pass_at_k_crossings",
    says="On the first checkpoint the curves of {line} cross at k = {crossing} [{low}, {high}] at "
    "temperature 1.",
    known=lambda table, crossings: (
        lambda row: (
            {"line": row.line} | {key: f"{row[key]:.3g}" for key in ("crossing", "low", "high")}
        )
    )(crossings[crossings.temperature == 1.0].iloc[0]),
    rows=(20,),
)
def pass_at_k_temperature(facts, table, crossings) -> Figure:
    lines, ks = table.line.unique(), sorted(table.k.unique())
    first = table.checkpoint.iloc[0]  # the only one that is asked at all temperatures
    table, crossings = (x[x.checkpoint == first] for x in (table, crossings))
    drawn, axes = plots.panels(2 * len(lines), columns=len(lines))
    means = table.groupby(["line", "model", "temperature", "k"])["pass@k"].mean().unstack()
    longs = crossings.melt(["line", "temperature"], [f"log odds at {k}" for k in ks], "k", "more")
    longs["k"] = longs.k.str.split().str[-1].astype(int)
    for line, above, below in zip(lines, *axes.reshape(2, len(lines)), strict=True):
        for model, shade in _before_and_after(line).items():
            ends = means.loc[line, model]
            above.plot(ends[ks[0]], ends[ks[-1]], marker="o", color=shade, label=model)
            for temperature, point in ends.iterrows():
                above.annotate(f"{temperature:g}", (point[ks[0]], point[ks[-1]]), fontsize=6)
        above.set(title=line, xlabel="pass@1", ylabel=f"pass@{ks[-1]}")
        own = longs[longs.line == line]
        hues = plots.ramp(own.temperature.nunique())
        for (temperature, part), shade in zip(own.groupby("temperature"), hues, strict=True):
            mean = part.groupby("k").more.mean()
            below.plot(mean, marker=".", color=shade, label=f"{temperature:g}")
        below.axhline(0, color="0.3", linestyle=":", linewidth=1)
        plots.doubling(below, ks[::2], "k, completions")
        plots.label_ends(below)
        below.set_ylabel("log odds, tuned - base")
    axes[0].legend()
    said = "numbers are temperatures; below, the curves cross at 0 (dotted)"
    drawn.suptitle(f"Checkpoint {first}; {said}")
    return drawn


@figure(
    "15_unified_objective",
    "unified_runs",
    "unified_objective",
    says="Greedy accuracy on Countdown gains {unified_mdm_sft} by SFT, {unified_mdm_dpo} by DPO "
    "and {unified_mdm_grpo} by GRPO in the masked diffusion model.",
)
def unified_objective(facts, runs, ends) -> Figure:
    families = runs.family.unique()
    drawn, axes = plots.panels(2 * len(families))
    spent = 0.8 * ends.positions.min(), 1.25 * ends.positions.max()
    for (curve, cost), family in zip(axes.reshape(-1, 2), families, strict=True):
        own = runs[runs.family == family]
        plots.curves(curve, own, "eval/accuracy", own.arm.unique())
        curve.set_title(f"{family}, by updates")
        for arm, part in ends[ends.family == family].groupby("arm", sort=False):
            cost.scatter(part.positions, part.after, color=colour(arm), s=18)
        cost.set(title=f"{family}, after training", xlabel=plots.WORDS["spent/positions"])
        cost.set(xscale="log", xlim=spent, ylabel=plots.WORDS["eval/accuracy"])
        plots.decimals(cost.xaxis)
    plots.shared_legend(drawn, axes[0])
    text = f"Fig. 5-1. {facts['updates']} updates of {facts['completions']} completions"
    plots.title(drawn, text, runs)
    return drawn


@figure(
    "15_unified_objective",
    "reward_model",
    says="RL on a reward model changes the rule's mean reward by {proxy_mdm} (MDM) and {proxy_ar} "
    "(AR), from its first update to its last.",
)
def reward_model(facts, runs) -> Figure:
    drawn, axes = plots.panels(2)
    columns = {f"rewards/{unified.PROXY}/mean": "the reward model"}
    columns[f"rewards/{unified.RULE}/mean"] = "the rule"
    for axis, (column, judge) in zip(axes, columns.items(), strict=True):
        for family, shade in palette(runs.arm.unique()).items():
            own = runs[runs.arm == family]
            axis.scatter(own["kl/sum"], own[column], color=shade, s=8, label=family)
        axis.set(ylabel=f"mean of {judge}", xlabel="KL from the start, nats a completion")
    plots.shared_legend(drawn, axes[0])
    drawn.suptitle(f"RL on a reward model, a point an update, {runs.seed.nunique()} seeds")
    return drawn
