"""Training runs that notebooks share: an arm of a figure, trained once a seed and kept.

A run is a piece (`mdmrl.study.pieces`) whose table is its log, and whose JSON has one group of
completions of its last update. Settings at their defaults are left out of its name, so that an
option that is added leaves old runs as they are; who changes a default raises the version. A run
takes the card where there is one, which draws other random numbers than a processor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from mdmrl.config import Config, require, unknown
from mdmrl.evaluation.accuracy import evaluate
from mdmrl.identity import described, digest, known
from mdmrl.policies import Policy, add_lora, load_policy
from mdmrl.rewards.text import TAGS
from mdmrl.rl import grpo, ppo
from mdmrl.rl.config import GRPOConfig, PPOConfig
from mdmrl.rl.divergence import path_kl
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.sampling.hierarchy import Hierarchical
from mdmrl.study.candidates import Candidates, measured
from mdmrl.study.live import watched
from mdmrl.study.looks import Looks, look, noted, sampled
from mdmrl.study.outputs import runs_folder
from mdmrl.study.pieces import cached_table, facts, kept_table
from mdmrl.study.rejecting import guided_draw, pipeline_draw
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task
from mdmrl.tasks.medcot import SYSTEM_PROMPT
from mdmrl.training.config import SFTConfig
from mdmrl.training.sft import train_sft

# Of each algorithm: its settings, how it trains, its version.
ALGORITHMS = {
    "grpo": (GRPOConfig.thesis, grpo.train_grpo, grpo.ALGORITHM),
    "ppo": (PPOConfig, ppo.train_ppo, ppo.ALGORITHM),
}


@dataclass
class Arm(Config):
    """One line of a figure.

    Attributes:
        name: how figures and tables call it; policy, dtype: what `load_policy` takes.
        lora: settings of `add_lora`; empty for full fine-tuning.
        algorithm: `grpo` or `ppo`; settings: of `GRPOConfig.thesis` or `PPOConfig`.
        instruct: put the format's instruction before each prompt, for a model that was not
            pre-trained on the task.
        eval_prompts: how many held-out prompts are completed greedily.
        final_steps: after training, also complete them at temperature 1, [MASK] not suppressed,
            with each of these numbers of denoising steps (columns `final<steps>/...`).
        path_kl: of a policy that denoises, steps and block length of the `state_confidence` sampler
            whose `path_kl` from the starting policy is measured on the held-out prompts (column
            `eval/path_kl`), and which completes them greedily too (`eval/path/reward` and so on),
            whatever sampler the arm was trained with.
        sft: settings of `SFTConfig` of a cold start before RL, on those texts of the RL questions
            that have all four tags.
        hierarchy: settings of `Hierarchical`, which then draws all completions; of PPO those of
            `Pipeline`, whose thresholds a `guide` calibrates.
        rewards: reward options of `load_task`; empty for the thesis's rewards.
        guide: settings of `GuideConfig`: V, fitted to the starting policy, judges what is drawn in
            training (`mdmrl.study.rejecting`); the first row's `token_forwards` count
            that fit too.
        task: what is learnt.
        looks: settings of `mdmrl.study.looks.Looks`: what is looked at before and after training,
            item by item (columns `look/...`, the items in the piece's JSON). Its first
            `eval_prompts` items are then completed meanwhile, greedily and sampled.
        after: the arm, as `to_dict` has it, whose trained weights this one begins with.
        candidates: settings of `mdmrl.study.candidates.Candidates`, measured on the held-out items
            (columns `eval/cosine` and so on); instead of `looks`.
    """

    name: str
    policy: str
    dtype: str = "float32"
    lora: dict = field(default_factory=dict)
    algorithm: str = "grpo"
    settings: dict = field(default_factory=dict)
    instruct: bool = False
    eval_prompts: int = 48
    final_steps: list[int] = field(default_factory=list)
    path_kl: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    hierarchy: dict = field(default_factory=dict)
    rewards: dict = field(default_factory=dict)
    guide: dict = field(default_factory=dict)
    task: str = "medcot"
    looks: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    candidates: dict = field(default_factory=dict)

    def config(self, seed: int) -> GRPOConfig | PPOConfig:
        """The run's settings. What the figures draw is logged: the KL, and the gradient norms of
        the loss's two parts."""
        made, _, _ = ALGORITHMS[self.algorithm]
        given = {"log_gradients": True, **self.settings, "seed": seed}
        return made(**given, log_kl=given.get("beta") == 0)

    def beside_settings(self) -> dict:
        """What decides the results beside the run's settings, policy and algorithm."""
        aside = ("name", "policy", "settings", "algorithm", "after")  # its weights count
        return {k: v for k, v in self.to_dict().items() if k not in aside}

    def validate(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise unknown("algorithm", self.algorithm, ALGORITHMS)
        both = f"hierarchy={self.hierarchy}, guide={self.guide} with algorithm={self.algorithm!r}"
        fit = not (self.hierarchy and self.guide) if self.algorithm == "grpo" else self.hierarchy
        said = "expected one of them with 'grpo', and no guide without the hierarchy's units else"
        require(not self.guide or fit, f"{both}: {said}")


def train_arms(arms: Sequence[Arm], seeds: Sequence[int], profile: str) -> pd.DataFrame:
    """Train every arm with every seed; rows of `metrics.jsonl` with columns `arm` and `seed`."""
    runs = [train_arm(arm, seed, profile) for seed in seeds for arm in arms]
    return pd.concat(runs, ignore_index=True)


def train_arm(arm: Arm, seed: int, profile: str, train: bool = True) -> pd.DataFrame | None:
    """Train one arm with one seed, or read what an earlier run of the same identity left; without
    `train`, None where there is no such run."""
    policy = load_policy(arm.policy, dtype=arm.dtype)
    if arm.lora:
        add_lora(policy, **arm.lora, seed=seed)
    start, earlier = policy.fingerprint(), None
    if arm.after:
        before = train_arm(Arm.from_dict(arm.after), seed, profile, train)
        if before is None:
            return None
        earlier = before.run[0]
        start = facts(profile, earlier)["trained"]
    config = arm.config(seed)
    *_, version = ALGORITHMS[arm.algorithm]
    identity = {
        "arm": arm.beside_settings(),
        "settings": known(config.settings_for(policy)),
        "policy": start,
        "rows": rows_of(arm.task, "rl"),
        "algorithm": version,
    }
    if arm.looks:
        identity["looked_at"] = rows_of(arm.task, Looks.from_dict(arm.looks).split)
    plain = Arm(name="", policy="", algorithm=arm.algorithm)
    since = {"arm": plain.beside_settings()}
    since["settings"] = known(plain.config(seed).settings_for(policy))
    kind = config.logp_estimator if arm.algorithm == "grpo" else arm.algorithm
    kind = getattr(kind, "__name__", kind)  # of an estimator of one's own
    slug = "-".join([Path(arm.policy).name, kind, f"s{seed}"])

    def compute(name: str) -> tuple[pd.DataFrame, dict]:
        folders = runs_folder(profile) / arm.algorithm
        begun = policy if earlier is None else trained_policy(profile, earlier)
        frame, found = _train(begun, arm, config.replace(output_dir=str(folders / name)))
        return frame, read_rows(folders / name / "samples.jsonl")[-1] | found

    if train:
        frame = cached_table(profile, slug, identity, compute, since)
    else:
        frame = kept_table(profile, slug, identity, since)
    if frame is not None:
        frame.insert(0, "seed", seed)
        frame.insert(0, "arm", arm.name)
    return frame


def trained_policy(profile: str, run: str) -> Policy:
    """The policy with which the run of that name ended, of an arm with `looks`."""
    folders = runs_folder(profile)
    found = sorted(folders.glob(f"*/{run}/checkpoints/step-*/pretrained"))
    mend = "delete that run's piece, so that it is trained again, and then this one"
    said = f"runs/{profile}, {run}"
    require(len(found) > 0, f"{said}: the weights of this run are not on this machine: {mend}")
    policy = load_policy(found[-1])
    same = policy.fingerprint()["weights"] == facts(profile, run)["trained"]["weights"]
    require(same, f"{said}: other weights than those that its piece was made with: {mend}")
    return policy


@cache
def rows_of(task: str, split: str) -> str:
    """The fingerprint of the rows that every arm of a task learns from, or is looked at on."""
    return digest(described(load_task(task).rows(split)))


def _train(policy: Policy, arm: Arm, config: GRPOConfig | PPOConfig) -> tuple[pd.DataFrame, dict]:
    """The log of a run, and what else its piece is to hold."""
    sections = {"medcot": "medcot-sections"}  # the rows and rewards of medcot, and units
    task = load_task(sections.get(arm.task, arm.task), **arm.rewards)
    system = SYSTEM_PROMPT if arm.instruct else None
    drawn = {}
    looks = Looks.from_dict(arm.looks)
    looked_at = task.rows(looks.split, looks.items, system) if arm.looks else []
    held_out = looked_at[: arm.eval_prompts]
    if arm.eval_prompts and not arm.looks:
        held_out = task.rows("validation", arm.eval_prompts, system)
    _, train, _ = ALGORITHMS[arm.algorithm]
    rows, probe = task.rows("rl", system=system), _probe(arm, task, config, held_out)
    if arm.sft:
        shown = [row for row in rows if all(tag in row["completion"] for tag in TAGS)]
        own = {"output_dir": f"{config.output_dir}-sft", "seed": config.seed}
        train_sft(policy, shown, SFTConfig.from_dict(arm.sft | own))
        if arm.lora:  # that of the cold start is merged
            add_lora(policy, **arm.lora, seed=config.seed)
    drawn["watch"], start = task.watch, policy.positions_computed
    if arm.hierarchy and arm.algorithm == "ppo":
        drawn["draw"] = pipeline_draw(policy, task, config, arm.guide, **arm.hierarchy)
    elif arm.hierarchy:
        drawn["draw"] = Hierarchical(tuple(task.units), **arm.hierarchy)
    elif arm.guide:
        drawn["draw"] = guided_draw(policy, task, config, GuideConfig(**arm.guide))
    already = policy.positions_computed - start
    before = look(policy, task, looked_at, looks, config) if arm.looks else {}
    given = policy, task.rewards, rows, config, held_out, task.metric, probe
    with watched(config.output_dir):
        folder = train(*given, **drawn)
    frame, found = pd.DataFrame(read_rows(folder / "metrics.jsonl")), {}
    frame.loc[0, "token_forwards"] += already
    if arm.looks:
        found["looks"] = noted(frame, before, look(policy, task, looked_at, looks, config))
        found["trained"] = policy.fingerprint()
    for steps in arm.final_steps:
        own = {"steps": steps, "suppress_mask": False} if policy.denoises else {}
        sampler = SamplerConfig(max_new_tokens=config.max_completion_length, temperature=1.0, **own)
        judged = (task.rewards, task.metric, f"final{steps}/")
        final = evaluate(policy, held_out, sampler, *judged, seed=config.seed, **drawn)
        for column, value in final.items():
            frame.loc[frame.index[-1], column] = value
    return frame, found


def _probe(
    arm: Arm, task: Task, config: GRPOConfig | PPOConfig, held_out: Sequence[dict]
) -> Callable | None:
    if arm.looks:
        looks = Looks.from_dict(arm.looks)
        return partial(sampled, task=task, rows=held_out, looks=looks, config=config)
    if arm.candidates:
        asked = Candidates.from_dict(arm.candidates)
        return partial(measured, task=task, held_out=held_out, config=config, asked=asked)
    if not arm.path_kl:
        return None
    start = load_policy(arm.policy, dtype=arm.dtype)
    prompts = [row["prompt"] for row in held_out]
    length = config.max_completion_length
    sampler = PPOConfig(max_completion_length=length, sampler=arm.path_kl).sampler_for(start)

    def probe(policy: Policy) -> dict[str, float]:
        generator = generator_for(config.seed, "path_kl", device=policy.device)
        moved = path_kl(policy, start, prompts, sampler, generator).mean().item()
        greedy = sampler.replace(temperature=0.0)
        judged = (task.rewards, task.metric)
        found = evaluate(policy, held_out, greedy, *judged, "path/", watch=task.watch)
        return {"path_kl": moved, **found}

    return probe


def variant(arm: Arm, name: str, lora: dict | None = None, **changes) -> Arm:
    """`arm` under another name with other settings (of its sampler, those that are given), or with
    LoRA. Appendix C looks at the completions of the main arms alone, so a variant is spared that.
    """
    sampler = {**arm.settings.get("sampler", {}), **changes.get("sampler", {})}
    settings = {**arm.settings, **changes, "sampler": sampler}
    return arm.replace(name=name, lora=lora or arm.lora, settings=settings, final_steps=[])


def per_seed(runs: pd.DataFrame, arm: str, column: str) -> list[np.ndarray]:
    """The curve of `column` of one arm, one array a seed; updates that lack it are left out."""
    chosen = runs[runs.arm == arm].sort_values("step")
    return [rows[column].dropna().to_numpy() for _, rows in chosen.groupby("seed")]


def log_ratios(
    runs: pd.DataFrame, arm: str, other: str, column: str, quantity: Callable
) -> list[float]:
    """log(quantity of `arm` / quantity of `other`) of the curves of `column`, one a seed."""
    pairs = zip(per_seed(runs, arm, column), per_seed(runs, other, column), strict=True)
    return [float(np.log(quantity(one) / quantity(two))) for one, two in pairs]


def final_looks(runs: pd.DataFrame, arms: dict[str, Arm], measures: Sequence[str]) -> pd.DataFrame:
    """What completions looked like after training: columns completed (arm and number of steps),
    seed, measure, value. A measure that a family does not have is left out."""
    rows = [
        {
            "completed": name if len(arm.final_steps) == 1 else f"{name}\ncompleted in {steps}",
            "measure": measure,
            "seed": seed,
            "value": curve[-1],
        }
        for name, arm in arms.items()
        for steps in arm.final_steps
        for measure in measures
        if (column := f"final{steps}/{measure}") in runs
        for seed, curve in enumerate(per_seed(runs, name, column))
        if len(curve)
    ]
    return pd.DataFrame(rows)


def last_sample(runs: pd.DataFrame, arm: str, profile: str) -> str:
    run = runs[runs.arm == arm].run.iloc[0]
    sample = facts(profile, run)
    return f"{sample['prompt']}\n{sample['completions'][0]}\nreward {sample['rewards'][0]:.2f}"
