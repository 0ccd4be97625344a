"""V(s_t) of the block-level decision process (`mdmrl.rl.episodes`): the head, its loss, its first
fit, and the advantages it gives."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdmrl.policies import MaskedDiffusionPolicy
from mdmrl.policies.published import loading
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import score_episodes
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.runs import derived_seed, generator_for
from mdmrl.sampling.generate import generate
from mdmrl.sampling.guidance import GuideConfig
from mdmrl.sampling.guided import generate_guided
from mdmrl.sampling.states import Recorder, States
from mdmrl.training.data import rows_of_step
from mdmrl.training.loop import accelerator_for, mean_count

PENALTIES = tuple(10.0**k for k in range(-3, 7))  # on squared weights; at the last V is constant
FOLDS = 4


class Head(nn.Module):
    """A function of features, saved and loaded the Hugging Face way; `config` is what its class is
    called with."""

    config: dict

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path):
        """The head that `save_pretrained` wrote; an InputError for files that are none."""
        with loading(str(folder)):
            head = cls(**json.loads((Path(folder) / "config.json").read_text()))
            head.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return head


class ValueHead(Head):
    """A linear function of the features of a state (`StateScores.features`) of a policy whose
    `hidden_size` is H; 0 everywhere at first.

    With z the features in standard deviations from their mean, V = b + w.z + index u.z, where index
    says how far down the text the active block begins: what a feature is worth changes along it.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.config = {"hidden_size": hidden_size}
        size = 3 * hidden_size + 2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.weight = nn.Parameter(torch.zeros(2 * size))
        self.bias = nn.Parameter(torch.zeros(()))

    @staticmethod
    def inputs(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """z and index * z, (..., 6H+4)."""
        z = (features - mean) / std
        return torch.cat([z, features[..., -1:] * z], -1)

    def forward(self, features: Tensor) -> Tensor:
        """Values (...) of states with `features` (..., 3H+2)."""
        return self.inputs(features, self.mean, self.std) @ self.weight + self.bias

    def judge(self, states: States) -> Tensor:
        """Of states that a guided sampler shows, (R,)."""
        return self(states.features).detach()


def shaped(rewards: Tensor, potentials: Tensor, gamma: float) -> Tensor:
    """r_t + gamma Phi(s_t+1) - Phi(s_t), all (B, T), with Phi(end) = 0: undiscounted they sum to as
    much as r_t, less Phi(s_0) (Ng, Harada and Russell 1999)."""
    return rewards + gamma * F.pad(potentials[:, 1:], (0, 1)) - potentials


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016) of r_t and V(s_t), all (B, T); V(end)
    is 0. With lam=0 they are the rewards `shaped` by V."""
    delta = shaped(rewards, values, gamma)
    advantages, following = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        advantages[:, t] = following = delta[:, t] + gamma * lam * following
    return advantages


def in_halves(rewards: Tensor, values: Tensor, halfway: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages (B, T) of episodes that get `halfway` (B,) after T // 2 of their steps, and at the
    end what is left of their reward, so that the sum is unchanged.

    Each half is an episode of its own: V(s_t) is what the first is compared with, and nothing the
    second, which already lacks `halfway`.
    """
    half, paid = rewards.shape[1] // 2, rewards.clone()
    paid[:, half - 1] += halfway
    paid[:, -1] -= halfway
    first = gae(paid[:, :half], values[:, :half], gamma, lam)
    second = gae(paid[:, half:], torch.zeros_like(values[:, half:]), gamma, lam)
    return torch.cat([first, second], 1)


def normalised(advantages: Tensor, counted: Tensor, accelerator) -> tuple[Tensor, float]:
    """Advantages (B, T) minus their mean and divided by their standard deviation + 1e-4, both over
    the states that count (B,) on all processes; and that divisor."""
    kept = advantages[counted].flatten()
    mean = averages(kept, accelerator).item()
    divisor = averages((kept - mean).square(), accelerator).sqrt().item() + 1e-4
    return (advantages - mean) / divisor, divisor


def averages(x: Tensor, accelerator) -> Tensor:
    """Means of `x` (N, ...) over its first axis on all processes, (...) in double on the processor;
    0 where there is nothing to average."""
    sums = x.cpu().double().sum(0)
    count = total(sums.new_tensor(len(x)), accelerator)
    return total(sums, accelerator) / count.clamp(min=1)


def total(x: Tensor, accelerator) -> Tensor:
    """The sum of all processes' `x`, in double, on the processor."""
    if accelerator.num_processes == 1:
        return x
    return accelerator.reduce(x.to(accelerator.device), "sum").cpu()


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, counted: Tensor, cliprange: float
) -> Tensor:
    """Clipped squared error (Schulman et al. 2017 in OpenAI's implementation), half its mean over
    the states, on all processes, of episodes that count, (B,): of V as it is and before the update
    (`old`) and its targets, all (B, T).
    """
    clipped = old + (values - old).clamp(-cliprange, cliprange)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return error[counted].sum() / 2 / mean_count(error[counted].numel())


class ValueData(NamedTuple):
    """N states and what came of them: features (N, 3H+2), returns (N,), the prompt of each."""

    features: Tensor
    returns: Tensor
    prompts: list[Hashable]

    @classmethod
    def joined(cls, parts: Sequence[ValueData]) -> ValueData:
        """Those of several batches."""
        features, returns, prompts = zip(*parts, strict=True)
        return cls(torch.cat(features), torch.cat(returns), list(chain(*prompts)))


@torch.no_grad()
def fit(values: ValueHead, base: ValueData, accelerator) -> float:
    """Fit V to states of the starting policy by ridge regression, with the penalty that does best
    in cross-validation over prompts; in closed form, so that there is neither a learning rate nor a
    stopping time to choose.

    Returns the explained variance of what V says of prompts when it has not seen them, with that
    penalty, and so a little more than of other prompts.
    """
    features, returns, prompts = base
    number: dict[Hashable, int] = {}  # of each prompt, in order of appearance
    fold = [number.setdefault(prompt, len(number)) % FOLDS for prompt in prompts]
    fold = torch.tensor(fold, device=returns.device)
    said = returns.new_zeros(len(PENALTIES), len(returns))
    for k in range(FOLDS):
        seen, asked = fold != k, fold == k
        regression = Ridge(features[seen], returns[seen], accelerator)
        for penalty, predicted in zip(PENALTIES, said, strict=True):
            values.load_state_dict(regression.solve(penalty))
            predicted[asked] = values(features[asked])
    errors = [averages((v - returns).square(), accelerator).item() for v in said]
    best = min(reversed(range(len(PENALTIES))), key=errors.__getitem__)  # of equals the largest
    values.load_state_dict(Ridge(features, returns, accelerator).solve(PENALTIES[best]))
    return explained_variance(said[best], returns)


class Ridge:
    """Ridge regression of returns (N,) on the inputs that a head makes of features (N, 3H+2), for
    any penalty: the least mean squared error plus the penalty times the squared weights. All
    processes' states count; it is done in double on the processor.
    """

    def __init__(self, features: Tensor, returns: Tensor, accelerator):
        features, returns = features.cpu(), returns.cpu()
        self.mean = averages(features, accelerator)
        std = averages((features - self.mean).square(), accelerator).sqrt()
        self.std = std.where(std > 1e-6, 1.0)  # where nothing varies
        x, y = ValueHead.inputs(features, self.mean, self.std).double(), returns.double()
        self.centre, self.level = averages(x, accelerator), averages(y, accelerator)
        x, y = x - self.centre, y - self.level
        count = total(y.new_tensor(len(y)), accelerator).clamp(min=1)
        moments, self.slopes = (total(x.T @ z, accelerator) / count for z in (x, y))
        self.scales, self.axes = torch.linalg.eigh(moments)

    def solve(self, penalty: float) -> dict[str, Tensor]:
        """The state of a head with these weights."""
        weight = self.axes @ (self.axes.T @ self.slopes / (self.scales + penalty))
        bias = self.level - weight @ self.centre
        state = {"mean": self.mean, "std": self.std, "weight": weight, "bias": bias}
        return {name: value.float() for name, value in state.items()}


def prompts_of(rollout: Rollout) -> list[tuple[int, ...]]:
    """The tokens of each row's prompt."""
    rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    return [tuple(ids[real].tolist()) for ids, real in rows]


def fit_to_base(
    policy: MaskedDiffusionPolicy, rewards: list, rows: list, config: PPOConfig, draw=None
) -> tuple[ValueHead, float]:
    """V of the policy as it is, for `mdmrl.sampling.guided` without any reinforcement learning, and
    its explained variance in cross-validation (`fit`); fitted as `train_ppo` fits its own before
    the first update, to what `draw` draws.
    """
    values = ValueHead(policy.model.config.hidden_size).to(policy.device)
    base = ValueData.joined(list(base_states(policy, rewards, rows, config, draw=draw)))
    return values, fit(values, base, accelerator_for(policy))


def base_states(
    policy: MaskedDiffusionPolicy, rewards, rows, config: PPOConfig, rank=0, processes=1, draw=None
) -> Iterator[ValueData]:
    """The `value_batches` batches that V is fitted to, each made when it is asked for, of one
    completion a prompt.

    Where a state costs a canvas to look at, the passes that write the completions show the states,
    so that these cost nothing more; packed states of block diffusion cost less than that, and those
    of a `draw` of one's own are looked at afterwards.
    """
    sampler, seed = config.sampler_for(policy), derived_seed(config.seed, "values")
    parts = config.micro_batches(config.batch, config.rollout_batch)
    micro = [*enumerate(parts, rank * len(parts))]
    for i, (index, part) in product(range(config.value_batches), micro):
        batch = rows_of_step(rows, config.batch, i, rank, processes, seed)[part]
        generator = generator_for(config.seed, "values", i, index, policy.device)
        if draw or policy.block_length is not None:
            ways = {"record": True, "draw": draw or generate}
            rollout, *_ = collect(policy, batch, rewards, 1, sampler, generator, **ways)
            features = score_episodes(policy, rollout, config.states_per_forward, False).features
        else:
            shown = Recorder(lambda states: states.features)
            showing = partial(_generate_shown, shown)
            rollout, *_ = collect(policy, batch, rewards, 1, sampler, generator, draw=showing)
            features = shown.looks
        counted, steps = rollout.counted, features.shape[1]  # (B,), T
        discount = config.gamma ** torch.arange(steps - 1, -1, -1, device=features.device)
        returns = rollout.rewards[counted, None].float() * discount  # (B, T)
        prompts = prompts_of(rollout.select(counted))
        asked = [prompt for prompt in prompts for _ in range(steps)]
        yield ValueData(features[counted].flatten(0, 1), returns.flatten(), asked)


def _generate_shown(shown: Recorder, policy, prompts, config, generator, record: bool):
    """`generate`, every state being shown."""
    every = GuideConfig(checks=None)
    return generate_guided(policy, prompts, config, every, shown, generator=generator)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(G - V) / Var(G): 1 for the best V, 0 for a constant; nan where the returns G do not
    vary."""

    rest, spread = ((x - x.mean()).square().mean() for x in (returns - values, returns))
    return (1 - rest / spread).item() if spread > 1e-9 else math.nan
