"""V(s_t) of the block-level decision process (`mdmrl.rl.episodes`): the head, its loss, its first
fit, and the advantages it gives."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdmrl.policies.base import Policy
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import Old, score
from mdmrl.rl.grpo import finish_gradient
from mdmrl.rl.rollout import collect, draw_rows
from mdmrl.runs import derived_seed, generator_for


class ValueHead(nn.Module):
    """A multilayer perceptron on the features of a state (`Look.features`), 0 everywhere at first.

    Args:
        hidden_size: of the policy, H; width: of the hidden layer.
        seed: of the initial weights; the global random state is left as it was.
    """

    def __init__(self, hidden_size: int, width: int = 64, seed: int = 0):
        super().__init__()
        self.config = {"hidden_size": hidden_size, "width": width}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(2 * hidden_size + 2, width), nn.GELU(), nn.Linear(width, 1)
            )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, features: Tensor) -> Tensor:
        """Values (...) of states with `features` (..., 2H+2)."""
        return self.layers(features).squeeze(-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ValueHead:
        """The head that `save_pretrained` wrote."""
        values = cls(**json.loads((Path(folder) / "config.json").read_text()))
        values.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return values


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), (B, T).

    Args:
        rewards, values: r_t and V(s_t), (B, T); V(end) = 0.
    """
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, following = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        advantages[:, t] = following = delta[:, t] + gamma * lam * following
    return advantages


def normalised(advantages: Tensor, counted: Tensor, accelerator) -> tuple[Tensor, float]:
    """Advantages (B, T) minus their mean and divided by their standard deviation + 1e-4, both over
    the states that count (B,) on all processes; and that divisor."""
    kept = advantages[counted]
    mean = average(kept, accelerator)
    divisor = math.sqrt(average((kept - mean).square(), accelerator)) + 1e-4
    return (advantages - mean) / divisor, divisor


def average(x: Tensor, accelerator) -> float:
    """Mean of `x` over all processes, 0 where none has any."""
    sums = torch.stack([x.double().sum(), x.new_tensor(x.numel(), dtype=torch.double)])
    total, count = accelerator.reduce(sums, "sum").tolist()
    return total / max(1.0, count)


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, counted: Tensor, cliprange: float
) -> Tensor:
    """Clipped squared error (Schulman et al. 2017 in OpenAI's implementation), half its mean over
    the states of episodes that count.

    Args:
        values, old: V as it is and before the update; returns: its targets, all (B, T).
        counted: (B,) bool.
    """
    clipped = old + (values - old).clamp(-cliprange, cliprange)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return error[counted].sum() / 2 / max(1, error[counted].numel())


def fit(
    values: ValueHead, base: Sequence[Old], charge: float, config: PPOConfig, accelerator
) -> float:
    """Fit V to the returns of rollouts of the starting policy, from their mean on and for as long
    as it helps on the last quarter of them, which is held out.

    Args:
        charge: see `Old.rewards`.
    Returns:
        V's explained variance on the states held out.
    """
    features = torch.cat([old.features for old in base])
    rewards = torch.cat([old.rewards(charge) for old in base])
    outcome = gae(rewards, torch.zeros_like(rewards), config.gamma, 1.0)
    counted = torch.cat([old.rollout.counted for old in base])
    held_out = torch.arange(len(counted), device=counted.device) >= 3 * len(counted) // 4
    seen, unseen = counted & ~held_out, counted & held_out

    @torch.no_grad()
    def error() -> float:
        return average((values(features[unseen]) - outcome[unseen]).square(), accelerator)

    parameters = dict(values.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.value_learning_rate)
    with torch.no_grad():
        values.layers[-1].bias.fill_(average(outcome[seen], accelerator))
    least, best = error(), copy.deepcopy(values.state_dict())
    for _ in range(config.value_epochs):
        found = values(features)
        value_loss(found, found, outcome, seen, math.inf).backward()
        finish_gradient(parameters, accelerator, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (now := error()) < least:
            least, best = now, copy.deepcopy(values.state_dict())
    values.load_state_dict(best)
    with torch.no_grad():
        return explained_variance(values(features[unseen]), outcome[unseen])


def fit_to_base(
    policy: Policy, rewards: Sequence[Callable], rows: Sequence[dict], config: PPOConfig
) -> tuple[ValueHead, float]:
    """V of the policy as it is, for `mdmrl.sampling.guided` without any reinforcement learning.

    Fitted as `train_ppo` fits its own before the first update: to `value_batches` batches of one
    completion a prompt.

    Args:
        config: of its settings, those of sampler, seed and V count.
    Returns:
        V, and its explained variance on the states held out.
    """
    from accelerate import Accelerator

    sampler, seed = config.sampler(policy), derived_seed(config.seed, "values")
    values = ValueHead(policy.model.config.hidden_size, seed=seed).to(policy.device)
    if not policy.uses_lora:
        policy.sync_reference()
    base = []
    for i in range(config.value_batches):
        batch = draw_rows(rows, config.per_device_train_batch_size, i, 0, 1, seed)
        generator = generator_for(config.seed, "values", i, 0, policy.device)
        rollout, *_ = collect(policy, batch, rewards, 1, sampler, generator, record=True)
        length = sampler.block_length or config.max_completion_length
        base.append(score(policy, rollout, length, config.states_per_forward))
    return values, fit(values, base, 0.0, config, Accelerator(cpu=policy.device.type == "cpu"))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(G - V) / Var(G): 1 for the best V, 0 for a constant; nan where the returns G do not
    vary."""

    def variance(x: Tensor) -> Tensor:
        return (x - x.mean()).square().mean()

    spread = variance(returns)
    return (1 - variance(returns - values) / spread).item() if spread > 1e-9 else math.nan
