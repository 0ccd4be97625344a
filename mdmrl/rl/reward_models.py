"""Reward models fitted on rankings: a linear head on frozen features of a policy.

With s_k the score of completion o_k of a prompt,

    Bradley-Terry    P(o_1 before o_2)              = sigmoid(s_1 - s_2)
    Plackett-Luce    P(o_1 before o_2 ... before o_K) = prod_k exp(s_k) / sum_{j >= k} exp(s_j)

and the loss is -log P (Bradley & Terry 1952; Plackett 1975; Ouyang et al. 2022). Of two
completions the second is the first. Rankings say nothing of a constant that all completions of a
prompt have in common.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mdmrl.config import require
from mdmrl.identity import described, digest
from mdmrl.policies import Policy, Prompt, load_policy
from mdmrl.rewards import completion_text
from mdmrl.rl.values import Head

TEXTS_AT_ONCE = 64  # in one forward pass
NOWHERE = -1e9  # a score that takes no part; of -inf the gradient would be no number


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log P of pairs, (N,), from scores (N,) of what was chosen and what was rejected."""
    return -F.logsigmoid(chosen - rejected)


def plackett_luce_loss(scores: Tensor, ranked: Tensor | None = None) -> Tensor:
    """-log P of rankings, (N,), from scores (N, K), the best first; `ranked` (N, K) bool is False
    behind the end of a ranking of fewer than K."""
    ranked = torch.ones_like(scores, dtype=torch.bool) if ranked is None else ranked
    left = scores.masked_fill(~ranked, NOWHERE).flip(1).logcumsumexp(1).flip(1)
    return torch.where(ranked, left - scores, 0.0).sum(1)


class RewardHead(Head):
    """A linear function of `size` features, in standard deviations from their mean."""

    def __init__(self, size: int):
        super().__init__()
        self.config = {"size": size}
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, features: Tensor) -> Tensor:
        """Scores (...) of `features` (..., F)."""
        return (features - self.mean) / self.std @ self.weight

    def fit(self, features: Tensor, rankings: Sequence[Sequence[int]], penalty: float) -> float:
        """Minimise the Plackett-Luce loss plus half the `penalty` times the squared weights: a
        convex problem, so that there is no learning rate to choose.

        Args:
            features: (M, F); rankings: rows of it, the best first. The mean score of all M is 0.
        Returns:
            the share of pairs that the scores put in the order of the rankings.
        """
        x = features.detach().cpu().double()
        mean, std = x.mean(0), x.std(0)
        std = std.where(std > 1e-6, 1.0)  # where nothing varies
        z, weight = (x - mean) / std, torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
        rows = pad_sequence([torch.tensor(r) for r in rankings], True, -1)
        ranked = rows >= 0
        solver = torch.optim.LBFGS(
            [weight], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            total = plackett_luce_loss((z @ weight)[rows], ranked).mean()
            total = total + penalty / 2 * weight.square().sum()
            total.backward()
            return total

        solver.step(loss)
        found = {"mean": mean, "std": std, "weight": weight.detach()}
        self.load_state_dict({name: value.float() for name, value in found.items()})
        scores = (z @ weight.detach())[rows]
        better = scores[:, :, None] > scores[:, None]
        pairs = (ranked[:, :, None] & ranked[:, None]).triu(1)
        return better[pairs].double().mean().item()


class RewardModel:
    """Scores completions by the hidden states of a policy; a reward of TRL's signature.

    Args:
        policy: whose features it takes. It is frozen: a policy that is trained must be another.
        head: by default one that knows nothing; name: what the reward is logged as.
    """

    def __init__(self, policy: Policy, head: RewardHead | None = None, name: str = "reward_model"):
        policy.model.requires_grad_(False)
        self.policy, self.__name__ = policy, name
        self.head = head or RewardHead(3 * policy.model.config.hidden_size).to(policy.device)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence, **columns) -> list[float]:
        """The score of every completion, a string or a list of messages."""
        with torch.no_grad():
            return self.head(self.features(prompts, completions)).tolist()

    def fit(self, rows: Sequence[dict], penalty: float = 1e-2) -> float:
        """Fit the head to rows with `prompt` and `ranking`, completions from the best to the worst,
        or `chosen` and `rejected`; returns the share of pairs it then ranks as they do.

        Raises:
            InputError: no rows, or one without a ranking of two or more.
        """
        require(len(rows) > 0, "no rankings given: expected at least one")
        rankings, prompts, texts = [], [], []
        for number, row in enumerate(rows, start=1):
            pair = [row[name] for name in ("chosen", "rejected") if name in row]
            ranking = row.get("ranking", pair)
            require(
                "prompt" in row and len(ranking) > 1,
                f"row {number} has the fields {', '.join(row)}: expected prompt, and ranking (two "
                "completions or more, the best first) or chosen and rejected",
            )
            rankings.append(range(len(texts), len(texts) + len(ranking)))
            texts += ranking
            prompts += [row["prompt"]] * len(ranking)
        return self.head.fit(self.features(prompts, texts), rankings, penalty)

    @torch.no_grad()
    def features(self, prompts: Sequence[Prompt], completions: Sequence) -> Tensor:
        """Mean hidden states of prompt and completion, and the last one, (N, 3H)."""
        texts, policy = [completion_text(c) for c in completions], self.policy
        found = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            now = slice(start, start + TEXTS_AT_ONCE)
            asked, end = policy.encode(prompts[now]), policy.tokenizer.eos_token_id
            written = policy.tokenizer(texts[now], add_special_tokens=False).input_ids
            answers = [torch.tensor([*ids, end], device=policy.device) for ids in written]
            real = pad_sequence([torch.ones_like(ids) for ids in answers], True).bool()
            ids = torch.cat([asked.input_ids, pad_sequence(answers, True, padding_value=end)], 1)
            width = asked.input_ids.shape[1]
            pattern = policy.pattern(width, real.shape[1])
            attention = torch.cat([asked.attention_mask.bool(), real], 1)
            hidden = policy.forward(ids, attention, pattern).float()
            parts = (asked.attention_mask, hidden[:, :width]), (real, hidden[:, width:])
            means = [(m[..., None] * h).sum(1) / m.sum(1, keepdim=True) for m, h in parts]
            place = torch.arange(len(ids), device=ids.device), width + real.sum(1) - 1
            found.append(torch.cat([*means, hidden[place]], -1))
        return torch.cat(found)

    def fingerprint(self) -> str:
        """Changes with the policy and with the head."""
        return digest(described([self.policy.fingerprint(), self.head.state_dict()]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head, and the policy in `policy/`."""
        self.head.save_pretrained(folder)
        self.policy.save_pretrained(Path(folder) / "policy")

    @classmethod
    def from_pretrained(cls, folder: str | Path, name: str = "reward_model", **loading):
        """What `save_pretrained` wrote; `loading` is for `load_policy`."""
        policy = load_policy(Path(folder) / "policy", **loading)
        return cls(policy, RewardHead.from_pretrained(folder).to(policy.device), name)
