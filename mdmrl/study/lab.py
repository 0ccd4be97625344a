"""What notebook 05 measures: estimators of log p beside the exact value of what they estimate, on
texts so short that it can be had."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from mdmrl.policies import Policy
from mdmrl.rl.logprobs import ESTIMATORS, draw_noise, estimator
from mdmrl.rl.oracle import Oracle, all_texts, denoiser_of, tabulate
from mdmrl.rl.rollout import Rollout
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate

# What an estimator estimates; `trajectory` the log p of the sampler that wrote the text.
TARGETS: dict[str, Callable[[Oracle], Tensor]] = {
    **dict.fromkeys(("random_mask", "elbo", "complementary", "overlapping"), Oracle.elbo),
    "quadrature": Oracle.elbo,
    "coupled": Oracle.coupled,
    "upper_bound": Oracle.upper_bound,
    "one_step": lambda oracle: oracle.law("random", 1),
    "ar_order": lambda oracle: oracle.law("sequential", oracle.n),
}
SAMPLED = [name for name in TARGETS if ESTIMATORS[name].samples]


@dataclass(frozen=True)
class Lab:
    """Texts that a policy's `state_confidence` sampler wrote, a token a step, end tokens being
    tokens like others; all values are in nats a text."""

    policy: Policy
    prompt: str
    rollout: Rollout
    seed: int

    @classmethod
    def written(cls, policy: Policy, prompt: str, tokens: int, count: int, seed: int) -> Lab:
        """`count` texts of so many tokens, with random advantages."""
        free = {"end_last": False, "stop_at_end": False, "temperature": 1.0}
        config = SamplerConfig(
            max_new_tokens=tokens, steps=tokens, remasking="state_confidence", **free
        )
        draw = generator_for(seed, "texts")
        output = generate(policy, [prompt] * count, config, draw, record=True)
        advantages = torch.randn(count, generator=generator_for(seed, "advantages"))
        kept = torch.ones(count, dtype=torch.bool)
        return cls(policy, prompt, Rollout.of(output, advantages, kept, config).whole(), seed)

    def values(self, name: str, index: int = 0, rollout: Rollout | None = None) -> Tensor:
        """The estimator's values of the texts, (B,), by the noise of that index."""
        score, rollout = estimator(name, self.policy), rollout or self.rollout
        noise = draw_noise(rollout, 0.0, generator_for(self.seed, name, index), score.samples)
        found = score(self.policy, rollout, noise)
        return found.sum(1) if found.ndim == 2 else found

    @torch.no_grad()
    def objects(self) -> dict[str, Tensor]:
        """Of every text over the policy's vocabulary, which must be a toy's: the laws of samplers
        and what else is called log p, (N,) each."""
        length = self.rollout.completion_ids.shape[1]
        texts, states = all_texts(self.policy, length), len(self.policy.tokenizer)
        denoiser = tabulate(denoiser_of(self.policy, self.prompt, length), states, length)
        oracle = Oracle(denoiser, texts, self.policy.mask_token_id)
        rules = ("random", "state_confidence", "low_confidence")
        found = {
            f"{rule.replace('_', ' ')}, {steps} steps": oracle.law(rule, steps)
            for rule in rules
            for steps in (length, 2)
        }
        everything = self.rollout.select(torch.zeros(len(texts), dtype=torch.long))
        mask = torch.ones_like(texts, dtype=torch.bool)
        every_text = replace(
            everything, completion_ids=texts, completion_mask=mask, revealed_at=None
        )
        return found | {
            "left to right": oracle.law("sequential", length),
            "one step": oracle.law("random", 1),
            "ELBO": oracle.elbo(),
            "Hölder, b = L": oracle.upper_bound(),
            "Hölder, b = 1": oracle.upper_bound(1),
            "coupled": oracle.coupled(),
            "ar_style": self.values("ar_style", rollout=every_text).double(),
        }

    def exact(self) -> dict[str, Tensor]:
        """The target of each estimator, (B,), with a gradient."""
        ids, policy = self.rollout.completion_ids, self.policy
        denoisers = (
            denoiser_of(policy, self.prompt, ids.shape[1], suppress_mask=banned)
            for banned in (True, False)
        )
        oracle, allowing = (Oracle(one, ids, policy.mask_token_id) for one in denoisers)
        # one_step leaves [MASK] in the softmax, as in the runs of the study.
        of = {name: f(allowing if name == "one_step" else oracle) for name, f in TARGETS.items()}
        return of | {"trajectory": oracle.trajectory(self.rollout.revealed_at)}

    @torch.no_grad()
    def errors(self, samples: Sequence[int], draws: int) -> pd.DataFrame:
        """How far each estimator is from its target and from the sampler's log p, a row for each
        number of samples `k` (0: it takes none), over `draws` of the noise, and the forward passes
        that it took."""
        truth, rows, passes = self.exact(), [], []
        embedding = self.policy.model.get_input_embeddings()
        counter = embedding.register_forward_hook(lambda _, ids, __: passes.append(len(ids[0])))
        for name, target in truth.items():
            sampled = ESTIMATORS[name].samples > 0
            repeats = draws if sampled else 1
            every = torch.arange(len(self.rollout)).repeat_interleave(repeats)
            many = self.rollout.select(every)
            for k in (samples if sampled else [0]) if name != "random_mask" else [1]:
                passes.clear()
                value = self.values(f"{name}-{k}" if k else name, rollout=many).double()
                value = value.view(-1, repeats)
                off, away = value - target[:, None], value - truth["trajectory"][:, None]
                spread = value.std(1).square().mean().sqrt().item() if sampled else 0.0
                row = {"estimator": name, "k": k, "passes": sum(passes) // len(many)}
                row |= {"exact": target.mean().item(), "bias": off.mean().item(), "std": spread}
                row["standard error"] = spread / math.sqrt(off.numel())
                row["error"] = off.square().mean().sqrt().item()
                rows.append(row | {"from sampler": away.square().mean().sqrt().item()})
        counter.remove()
        return pd.DataFrame(rows)

    def cosines(self, samples: Sequence[int], draws: int) -> pd.DataFrame:
        """The mean cosine of an estimator's gradient of sum_i A_i log p(x_i), with respect to all
        weights, with that of its `own` target and that of the `sampler`'s log p."""
        weights, rows = [*self.policy.trainable_parameters().values()], []

        def gradient(value: Tensor) -> Tensor:
            total = (self.rollout.advantages * value).sum()
            found = torch.autograd.grad(total, weights, retain_graph=True)
            return torch.cat([g.flatten() for g in found])

        truth = {name: gradient(value) for name, value in self.exact().items()}
        shown = [name for name in SAMPLED if name != "random_mask"]
        for name in [*shown, "one_step", "ar_order", "trajectory"]:
            for k in samples if name in shown else [0]:
                for draw in range(draws if k else 1):
                    found = gradient(self.values(f"{name}-{k}" if k else name, draw))
                    row = {"estimator": name, "k": k}
                    for column, other in (("own", name), ("sampler", "trajectory")):
                        row[column] = torch.cosine_similarity(found, truth[other], 0).item()
                    rows.append(row)
        return pd.DataFrame(rows).groupby(["estimator", "k"], sort=False).mean().reset_index()
