"""What value-guided sampling is measured against at an equal budget.

    plain           `generate_guided` without thresholds
    best of n       the highest `output.final_values` of n plain completions a prompt, as many as
                    the budget pays for: `best_of_curve` has what to expect of every n
    ceiling         the same by the true reward
    majority vote   `majority(answers, n)`
    no information  `Permuted`: the schedule of a guided run, with V of another completion
    prompt alone    `PromptOnly`: V before the first step
    confidence      `mean_logprob`

The last three take V's place in `generate_guided`; the last two need thresholds of their own, from
`calibrate`. Rows of one prompt are adjacent, n of them.
"""

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from math import comb

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.sampling.guided import GuidedOutput
from mdmrl.sampling.states import States


def best_of_curve(scores: Tensor, rewards: Tensor) -> Tensor:
    """The mean reward of the completion that scores highest of n, for n = 1 to N, (P, N).

    The mean is over all subsets of a prompt's N completions, whose scores and rewards are (P, N):
    the one with the i-th lowest score is the best of C(i-1, n-1) subsets of n. Of equal scores the
    last is the highest.
    """
    count = scores.shape[1]
    ranked = rewards.gather(1, scores.argsort(dim=1, stable=True)).cpu().double()
    shares = [[comb(i, n - 1) / comb(count, n) for n in range(1, count + 1)] for i in range(count)]
    return ranked @ ranked.new_tensor(shares)


def majority(answers: Sequence[Hashable | None], n: int) -> list[int]:
    """The first row that gives the commonest of each prompt's `n` answers; None is no answer.

    Of equally common ones, the answer given first; without any answer, the first row.
    """
    rows = []
    for group in _groups(len(answers), n):
        counts = Counter(answers[row] for row in group if answers[row] is not None)
        winner = counts.most_common(1)[0][0] if counts else answers[group[0]]
        rows.append(next(row for row in group if answers[row] == winner))
    return rows


def mean_logprob(states: States) -> Tensor:
    """The mean log-probability of what is revealed, 0 where nothing is, (R,)."""
    return states.logprobs.sum(1) / states.revealed.sum(1).clamp(min=1)


class PromptOnly:
    """V before the first step, at every point: the `values` of each completion's prompt, (B,),
    which are `GuidedOutput.values[:, 0, 0]` of a base rollout."""

    def __init__(self, values: Tensor):
        self.values = values

    def __call__(self, states: States) -> Tensor:
        return self.values[states.rows.to(self.values.device)]


class Permuted:
    """What V said in a guided run about another completion of the same prompt, look by look.

    Every row thus follows the schedule of another one, with all its rejections and its cost, and V
    knows nothing of what it judges. For one run, with the same settings and prompts. A text that
    outlives the one whose schedule it follows goes on.

    Args:
        output: the guided run; n: its completions a prompt, at least 2, which swap places in one
            cycle.
    """

    def __init__(self, output: GuidedOutput, n: int, generator: torch.Generator):
        require(n > 1, f"n={n}: expected at least 2 completions a prompt to swap")
        groups = _groups(len(output.judgements), n)
        self.source = torch.empty(len(output.judgements), dtype=torch.long)
        for start, *_ in groups:
            order = start + torch.randperm(n, generator=generator, device=generator.device).cpu()
            self.source[order] = order.roll(1)
        self.left = [deque(output.judgements[row]) for row in self.source]
        self.last = [output.judgements[row][-1].block for row in self.source]

    def __call__(self, states: States) -> Tensor:
        looks = zip(states.rows, states.blocks, states.steps, strict=True)
        return torch.tensor([self._said(*map(int, look)) for look in looks])

    def _said(self, row: int, block: int, step: int) -> float:
        if not self.left[row] and block > self.last[row]:
            return torch.inf
        due = self.left[row].popleft() if self.left[row] else None
        require(
            due is not None and (due.block, due.step) == (block, step),
            f"row {row} is at step {step} of block {block} where the permuted run was at "
            f"{due and (due.block, due.step)}: expected the same settings and prompts, and a "
            "Permuted of its own for every run",
        )
        return due.value


def _groups(rows: int, n: int) -> list[range]:
    require(n >= 1 and rows % n == 0, f"n={n}: expected a divisor of the {rows} rows")
    return [range(start, start + n) for start in range(0, rows, n)]
