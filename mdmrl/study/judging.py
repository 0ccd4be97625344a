"""What V knows of half-denoised text, and what sampling makes of it, for notebooks 08 and 09.

V is fitted to base rollouts of training prompts (`fit_to_base`) and asked about held-out ones. Each
function gives one piece (`mdmrl.study.pieces`) of one seed, that of its `PPOConfig`, of which the
settings of sampler and V count besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from mdmrl.policies import Policy, load_policy
from mdmrl.rewards.score import score
from mdmrl.rewards.text import extract_answer
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.values import explained_variance, fit_to_base
from mdmrl.runs import best_device, config_hash, generator_for
from mdmrl.sampling import SamplerOutput, generate
from mdmrl.sampling.attempts import Value
from mdmrl.sampling.denoise import denoise
from mdmrl.sampling.guide import GuideConfig, Thresholds
from mdmrl.sampling.guided import GuidedOutput, generate_guided
from mdmrl.sampling.selection import Beside, Permuted, PromptOnly, mean_logprob
from mdmrl.study.pieces import kept
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task

VERSION = "judging-1"  # part of a piece's hash: raise it when results change


def what_v_explains(name: str, config: PPOConfig, prompts: int, profile: str) -> pd.DataFrame:
    """The share of the variance of held-out rewards that V explains before every denoising step.

    Args:
        name: of the policy, as for `load_policy`; prompts: held-out ones, completed once each.
    Returns:
        columns `seed`, `step`, `explained`.
    """

    def compute(policy: Policy, task: Task) -> pd.DataFrame:
        value = _fitted(policy, task, config)
        rows = task.rows("validation", prompts)
        output = _draw(policy, rows, config, "held-out", GuideConfig(checks=None), value)
        said = output.values.flatten(1).cpu()
        said = said[:, ~said.isnan().all(0)]  # (B, T)
        reward = _rewards(task, output, rows)
        explained = [explained_variance(column, reward) for column in said.T]
        return pd.DataFrame({"step": range(len(explained)), "explained": explained})

    return _piece("explained", name, config, {"prompts": prompts}, profile, compute)


def what_is_decided(
    name: str, config: PPOConfig, prompts: int, continuations: int, profile: str
) -> pd.DataFrame:
    """The share of the variance of held-out rewards that the first half of a text decides.

    Every text's second half is written anew `continuations` times; the rest of the variance is that
    between those endings, of which no V can know.

    Returns:
        columns `seed`, `decided`; one row.
    """

    def compute(policy: Policy, task: Task) -> pd.DataFrame:
        rows, sampler = task.rows("validation", prompts), config.sampler(policy)
        generator = generator_for(config.seed, "decided", device=policy.device)
        output = generate(policy, [row["prompt"] for row in rows], sampler, generator)
        width, length = output.prompt_mask.shape[1], sampler.max_new_tokens
        written = torch.ones_like(output.completion_ids, dtype=torch.bool)
        attention = torch.cat([output.prompt_mask, written], 1)
        open_ = torch.zeros_like(attention)
        open_[:, width + length // 2 :] = True
        half = output.sequences.masked_fill(open_, policy.mask_token_id)
        again = (
            denoise(policy, half, attention, open_, width, sampler, generator)
            for _ in range(continuations)
        )
        endings = torch.stack([_rewards(task, ending, rows) for ending in again])
        decided = 1 - endings.var(0).mean() / endings.var(correction=0)
        return pd.DataFrame({"decided": [decided.item()]})

    counts = {"prompts": prompts, "continuations": continuations}
    return _piece("decided", name, config, counts, profile, compute)


def guided_completions(
    name: str,
    config: PPOConfig,
    prompts: int,
    calibration_prompts: int,
    n: int,
    times: int,
    profile: str,
) -> pd.DataFrame:
    """Completions of held-out prompts, plain and guided by V and by what it is compared with.

    Args:
        prompts: to be completed; calibration_prompts: others, that thresholds come from.
        n: guided completions a prompt; times: what each may cost, in plain ones, of which there are
            `n * times` a prompt.
    Returns:
        a row a completion, those of one prompt adjacent. `seed`; `arm`; `prompt`; `reward`,
        `accuracy` and `answer`; `spent`, see `GuidedOutput`; of plain ones also what V and the
        mean log-probability said at every look, `V/00` and so on, `logp/00` and so on; `V`, before
        the last step; `stopped`: whether the two gates would have, at the first check of the block
        behind half of the text.
    """

    def compute(policy: Policy, task: Task) -> pd.DataFrame:
        value = _fitted(policy, task, config)
        rows = task.rows("validation", prompts + calibration_prompts)
        rows, others = rows[:prompts], rows[prompts:]
        first, first_logp = _looked(policy, others, config, "calibrate", value)
        length = config.max_completion_length // first.values.shape[1]
        calibrated_on = [row["prompt"] for row in others]

        def thresholds(said: Tensor, form: str = "two_gates") -> Thresholds:
            return Thresholds.of(said, GuideConfig(form=form), length, calibrated_on)

        gates, bands = thresholds(first.values), thresholds(first.values, "faithful")
        several = [row for row in rows for _ in range(n * times)]
        base, base_logp = _looked(policy, several, config, "base", value)
        half = base.values.shape[1] // 2
        stopped = base.values[:, half, 1].cpu() < gates.high[half, 1]
        tables = [_table("plain", task, base, rows, **_columns(base, base_logp), stopped=stopped)]

        each = [row for row in rows for _ in range(n)]
        budget = times * int(base.spent.max())

        def run(arm: str, judge: Value, given: Thresholds, form: str = "two_gates") -> GuidedOutput:
            guide = GuideConfig(budget=budget, form=form)
            output = _draw(policy, each, config, "guided", guide, judge, given)
            tables.append(_table(arm, task, output, rows))
            return output

        output = run("two gates", value, gates)
        run("permuted", Permuted(output, n, generator_for(config.seed, "permute")), gates)
        run("the thesis's bands", value, bands, "faithful")
        run("mean log-probability", mean_logprob, thresholds(first_logp))
        prompt_alone = PromptOnly(base.values[:, 0, 0].view(prompts, -1)[:, :n].flatten())
        run("prompt alone", prompt_alone, thresholds(first.values[:, :1, :1].expand_as(first_logp)))
        return pd.concat(tables)

    counts = {
        "prompts": prompts,
        "calibration_prompts": calibration_prompts,
        "n": n,
        "times": times,
    }
    return _piece("guided", name, config, counts, profile, compute)


def _piece(
    kind: str,
    name: str,
    config: PPOConfig,
    counts: dict[str, int],
    profile: str,
    compute: Callable[[Policy, Task], pd.DataFrame],
) -> pd.DataFrame:
    policy, task = load_policy(name, device=best_device()), load_task("medcot")
    identity = {
        "piece": kind,
        "weights": policy.fingerprint(),
        "rows": config_hash({"rows": [task.rows("rl"), task.rows("validation")]}),
        "version": VERSION,
        **config.changed(),
        **counts,
    }
    slug = f"{Path(name).name}-{kind}-s{config.seed}"
    table = kept(profile, slug, identity, lambda _: (compute(policy, task), counts))
    table.insert(0, "seed", config.seed)
    return table


def _fitted(policy: Policy, task: Task, config: PPOConfig) -> Value:
    values, _ = fit_to_base(policy, task.rewards, task.rows("rl"), config)
    return lambda states: values(states.features).detach()


def _draw(
    policy: Policy,
    rows: Sequence[dict],
    config: PPOConfig,
    purpose: str,
    guide: GuideConfig,
    judge: Value,
    thresholds: Thresholds | None = None,
) -> GuidedOutput:
    generator = generator_for(config.seed, purpose, device=policy.device)
    prompts = [row["prompt"] for row in rows]
    sampler = config.sampler(policy)
    return generate_guided(policy, prompts, sampler, guide, judge, thresholds, generator)


def _looked(
    policy: Policy, rows: Sequence[dict], config: PPOConfig, purpose: str, value: Value
) -> tuple[GuidedOutput, Tensor]:
    """Base rollouts with `value` looked at, and the mean log-probability at the same looks, like
    `GuidedOutput.values`."""
    judge = Beside(value, mean_logprob)
    output = _draw(policy, rows, config, purpose, GuideConfig(), judge)
    row, found = judge.looks
    order = row.argsort(stable=True)  # of one row's looks the order in which they were made
    return output, found[order].double().view_as(output.values)


def _columns(base: GuidedOutput, logp: Tensor) -> dict[str, Tensor]:
    """What was said of plain completions, a column a look."""
    looks = {"V": base.values, "logp": logp}
    columns = {
        f"{judge}/{at:02d}": column
        for judge, said in looks.items()
        for at, column in enumerate(said.flatten(1).T)
    }
    return {"V": base.final_values, **columns}


def _table(
    arm: str, task: Task, output: GuidedOutput, rows: Sequence[dict], **columns: Tensor
) -> pd.DataFrame:
    """A row a completion; as many of each of `rows`."""
    prompt = torch.arange(len(rows)).repeat_interleave(len(output.completions) // len(rows))
    whose = [rows[i] for i in prompt]
    pairs = zip(output.completions, whose, strict=True)
    columns = {
        "prompt": prompt,
        "reward": _rewards(task, output, whose),
        "accuracy": torch.tensor([float(task.metric(text, row)) for text, row in pairs]),
        "spent": output.spent,
        **columns,
    }
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    table.insert(0, "arm", arm)
    return table.assign(answer=[extract_answer(text) for text in output.completions])


def _rewards(task: Task, output: SamplerOutput, rows: Sequence[dict]) -> Tensor:
    """The whole reward of every completion, (B,) on the processor."""
    prompts, tokens = [row["prompt"] for row in rows], output.token_lists()
    return score(task.rewards, prompts, output.completions, tokens, rows).sum(1)
