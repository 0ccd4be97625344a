"""What V knows of half-denoised text, and what sampling makes of it, for notebooks 08 and 09.

V is fitted to base rollouts of training prompts (`fit_to_base`) and asked about held-out ones. Each
function gives one piece (`mdmrl.study.pieces`) of one seed, that of its `PPOConfig`, which is to
hold nothing but settings of sampler and V.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.identity import described, digest
from mdmrl.policies import Policy, load_policy
from mdmrl.rewards import reward_values, total_reward
from mdmrl.rewards.text import extract_answer
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.values import ValueData, ValueHead, base_states, explained_variance, fit, fit_to_base
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, SamplerOutput, generate
from mdmrl.sampling.denoise import denoise
from mdmrl.sampling.guidance import GuideConfig, Thresholds
from mdmrl.sampling.guided import GuidedOutput, generate_guided
from mdmrl.sampling.selection import Permuted, PromptOnly, mean_logprob
from mdmrl.sampling.states import Recorder, Value
from mdmrl.study.pieces import cached_table
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task
from mdmrl.training.loop import accelerator_for

VERSION = "judging-2"  # part of a piece's identity: raise it when results change
# What of a `PPOConfig` decides what V is fitted to and asked about.
DECISIVE = ["max_completion_length", "sampler", "per_device_train_batch_size", "num_generations"]
DECISIVE += ["value_batches", "gamma", "seed"]


def what_v_explains(
    name: str, config: PPOConfig, batches: Sequence[int], prompts: int, profile: str
) -> pd.DataFrame:
    """The share of the variance of held-out rewards that V explains before every denoising step:
    columns `seed`, `completions` that V was fitted to, `step`, `explained`.

    Args:
        name: of the policy, as for `load_policy`; batches: numbers of batches to fit V to, each
            the first of the same base rollouts; prompts: held-out ones, completed once each.
    """

    def compute(policy: Policy, task: Task, draw: Callable) -> pd.DataFrame:
        rows = task.rows("validation", prompts)
        shown = Recorder(lambda states: states.features)
        output = draw(rows, "held-out", GuideConfig(checks=None), shown)
        features, reward = shown.looks, _rewards(task, output, rows)  # (B, T, F), (B,)
        every, found = config.replace(value_batches=max(batches)), []
        base = list(base_states(policy, task.rewards, task.rows("rl"), every))
        for count in batches:
            values = ValueHead(policy.model.config.hidden_size).to(policy.device)
            fit(values, ValueData.joined(base[:count]), accelerator_for(policy))
            said = values(features).detach().cpu().T
            explained = [explained_variance(column, reward) for column in said]
            known = {"completions": count * config.per_device_train_batch_size}
            known |= {"step": range(len(said)), "explained": explained}
            found.append(pd.DataFrame(known))
        return pd.concat(found)

    settings = {"batches": list(batches), "prompts": prompts}
    return _piece("explained", name, config, settings, profile, compute)


def what_is_decided(
    name: str, config: PPOConfig, prompts: int, continuations: int, profile: str
) -> pd.DataFrame:
    """The share of the variance of held-out rewards that the first half of a text decides, the text
    being one of those that `what_v_explains` asks about.

    Every text's second half is written anew `continuations` times; the rest of the variance is that
    between those endings, of which no V can know. Their mean reward is a V that needs no fit, only
    the reward itself (the Monte-Carlo value of VinePPO, Kazemnejad et al. 2024).

    Returns:
        a row for the first, the first two, ... of the endings: columns `seed`, `endings`,
        `explained`, the share of the variance that their mean explains, and `decided`, from all.
    """

    def compute(policy: Policy, task: Task, _) -> pd.DataFrame:
        rows, sampler = task.rows("validation", prompts), config.sampler_for(policy)
        behind = _half(sampler) * sampler.block_length
        drawn = generator_for(config.seed, "held-out", device=policy.device)
        generator = generator_for(config.seed, "endings", device=policy.device)
        output = generate(policy, [row["prompt"] for row in rows], sampler, drawn)
        width = output.prompt_mask.shape[1]
        written = torch.ones_like(output.completion_ids, dtype=torch.bool)
        attention = torch.cat([output.prompt_mask, written], 1)
        open_ = torch.zeros_like(attention)
        open_[:, width + behind :] = True
        half = output.sequences.masked_fill(open_, policy.mask_token_id)
        state = (half, attention, open_, width)
        again = (denoise(policy, *state, sampler, generator) for _ in range(continuations))
        endings = torch.stack([_rewards(task, ending, rows) for ending in again])
        decided = 1 - endings.var(0).mean() / endings.var(correction=0)
        reward, counts = _rewards(task, output, rows), range(1, continuations + 1)
        explained = [explained_variance(endings[:n].mean(0), reward) for n in counts]
        return pd.DataFrame({"endings": counts, "explained": explained, "decided": decided.item()})

    settings = {"prompts": prompts, "continuations": continuations}
    return _piece("endings", name, config, settings, profile, compute)


def guided_completions(
    name: str,
    config: PPOConfig,
    prompts: int,
    calibration_prompts: int,
    n: int,
    times: int,
    profile: str,
    task: str = "medcot",
) -> pd.DataFrame:
    """Completions of test prompts, plain and guided by V and by what it is compared with.

    Args:
        prompts: to be completed, of the test split; calibration_prompts: of the validation split,
            that thresholds come from.
        n: guided completions a prompt; times: what each may cost, in plain ones, of which there are
            `n * times` a prompt.
    Returns:
        a row a completion, those of one prompt adjacent. `seed`; `arm`; `prompt`; `reward` and
        `accuracy`; `answer`, empty where there is none; `spent`, see `GuidedOutput`; of plain ones
        also what V and the mean log-probability said at every look, `V/00` and so on, `logp/00`
        and so on; `V`, before the last step; `stopped`: whether the two gates would have stopped
        it at the first check of the block behind half of the text, or of the only block at half.

    Raises:
        ValueError: an odd number of blocks above 1, which leaves none behind half of the text.
    """

    def compute(policy: Policy, task: Task, draw: Callable) -> pd.DataFrame:
        sampler = config.sampler_for(policy)
        whole = (sampler.block_length or sampler.max_new_tokens) == sampler.max_new_tokens
        half = (0, 2) if whole else (_half(sampler), 1)
        value = fit_to_base(policy, task.rewards, task.rows("rl"), config)[0].judge

        def looked(rows: Sequence[dict], purpose: str) -> tuple[GuidedOutput, Tensor]:
            """Base rollouts with V looked at, and the mean log-probability at the same looks."""
            judge = Recorder(mean_logprob, value)
            output = draw(rows, purpose, GuideConfig(), judge)
            return output, judge.looks.cpu().double().view_as(output.values)

        block = sampler.block_length or sampler.max_new_tokens
        rows, others = task.rows("test", prompts), task.rows("validation", calibration_prompts)
        first, first_logp = looked(others, "calibrate")
        calibrated_on = [row["prompt"] for row in others]

        def thresholds(said: Tensor, form: str = "two_gates") -> Thresholds:
            return Thresholds.of(said, GuideConfig(form=form), block, calibrated_on)

        gates, bands = thresholds(first.values), thresholds(first.values, "faithful")
        several, each = ([row for row in rows for _ in range(k)] for k in (n * times, n))
        base, base_logp = looked(several, "base")
        said = {"V": base.final_values}
        for judge, looks in (("V", base.values), ("logp", base_logp)):
            said |= {f"{judge}/{at:02d}": x for at, x in enumerate(looks.flatten(1).T)}
        said["stopped"] = base.values[:, *half] < gates.high[half]
        tables = [_table("plain", task, base, rows, said)]

        def run(arm: str, judge: Value, given: Thresholds, form: str = "two_gates") -> GuidedOutput:
            guide = GuideConfig(budget=times, form=form)
            output = draw(each, "guided", guide, judge, given)
            tables.append(_table(arm, task, output, rows, {}))
            return output

        output = run("two gates", value, gates)
        run("permuted", Permuted(output, n, generator_for(config.seed, "permute")), gates)
        run("the thesis's bands", value, bands, "faithful")
        run("mean log-probability", mean_logprob, thresholds(first_logp))
        prompt_alone = PromptOnly(base.values[:, 0, 0].view(prompts, -1)[:, :n].flatten())
        run("prompt alone", prompt_alone, thresholds(first.values[:, :1, :1].expand_as(first_logp)))
        return pd.concat(tables)

    settings = {"prompts": prompts, "calibration_prompts": calibration_prompts}
    settings |= {"n": n, "times": times}
    return _piece("guided", name, config, settings, profile, compute, task)


def judged_halfway(
    name: str, config: PPOConfig, prompts: int, n: int, profile: str, task: str = "countdown"
) -> pd.DataFrame:
    """What V and the mean log-probability say after half of the steps of `n` completions of each of
    so many test prompts: columns `V`, `logp`, and as of plain `guided_completions`."""

    def compute(policy: Policy, task: Task, draw: Callable) -> pd.DataFrame:
        value = fit_to_base(policy, task.rewards, task.rows("rl"), config)[0].judge
        judge, rows = Recorder(mean_logprob, value), task.rows("test", prompts)
        output = draw(
            [row for row in rows for _ in range(n)], "base", GuideConfig(checks=None), judge
        )
        half = config.sampler_for(policy).denoising_steps // 2
        said = {"V": output.values.flatten(1)[:, half], "logp": judge.looks[:, half]}
        return _table("plain", task, output, rows, said)

    settings = {"prompts": prompts, "n": n}
    return _piece("halfway", name, config, settings, profile, compute, task)


def _piece(
    kind: str,
    name: str,
    config: PPOConfig,
    settings: dict,
    profile: str,
    compute: Callable,
    task_name: str = "medcot",
) -> pd.DataFrame:
    """What `compute(policy, task, draw)` makes, or what is kept of it, with a column `seed`;
    `draw(rows, purpose, guide, judge, thresholds)` completes rows."""
    policy, task = load_policy(name), load_task(task_name)
    settled, sampler = config.settings_for(policy), config.sampler_for(policy)

    def draw(rows, purpose, guide, judge, thresholds=None) -> GuidedOutput:
        generator = generator_for(config.seed, purpose, device=policy.device)
        prompts = [row["prompt"] for row in rows]
        return generate_guided(policy, prompts, sampler, guide, judge, thresholds, generator)

    identity = {
        "piece": kind,
        "settings": {name: settled[name] for name in DECISIVE},
        "policy": policy.fingerprint(),
        "rows": digest(described([task.rows(name) for name in ("rl", "validation", "test")])),
        "version": VERSION,
        **settings,
    }
    since = {"settings": {"sampler": SamplerConfig().to_dict()}}
    slug = f"{Path(name).name}-{kind}-s{config.seed}"
    table = cached_table(
        profile, slug, identity, lambda _: (compute(policy, task, draw), {}), since
    )
    table.insert(0, "seed", config.seed)
    return table


def _half(sampler: SamplerConfig) -> int:
    """The block behind half of the text."""
    blocks = sampler.max_new_tokens // (sampler.block_length or sampler.max_new_tokens)
    wanted = "an even number of blocks, so that half of the text is a state of the sampler"
    said = f"block_length={sampler.block_length} of {sampler.max_new_tokens} positions"
    require(blocks % 2 == 0, f"{said}: expected {wanted}")
    return blocks // 2


def _table(
    arm: str, task: Task, output: GuidedOutput, rows: Sequence[dict], said: dict[str, Tensor]
) -> pd.DataFrame:
    prompt = torch.arange(len(rows)).repeat_interleave(len(output.completions) // len(rows))
    whose = [rows[i] for i in prompt]
    right = map(task.metric, output.completions, whose)
    known = {"prompt": prompt, "reward": _rewards(task, output, whose)}
    known |= {"accuracy": torch.tensor([float(x) for x in right]), "spent": output.spent}
    known |= said
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in known.items()})
    table.insert(0, "arm", arm)
    extract = task.extract or extract_answer
    return table.assign(answer=[extract(text) or "" for text in output.completions])


def _rewards(task: Task, output: SamplerOutput, rows: Sequence[dict]) -> Tensor:
    """The whole reward of every completion, (B,) on the processor."""
    prompts, tokens = [row["prompt"] for row in rows], output.token_lists()
    values = reward_values(task.rewards, prompts, output.completions, tokens, rows)
    return total_reward(values)
