"""The rows of a value-guided batch (`mdmrl.sampling.guided`), each at its own block and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies import MaskedDiffusionPolicy, Prompt
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.denoise import evenly
from mdmrl.sampling.generate import blank_canvas
from mdmrl.sampling.guide import GuideConfig, Thresholds, points_of_blocks, steps_of_blocks
from mdmrl.sampling.states import States, mean_embedding

Value = Callable[[States], Tensor]  # the higher the better, (R,)


class Judgement(NamedTuple):
    """V of one row before a step of a block, and what followed: `"on"`, `"again"`, `"back"` or,
    where the budget did not allow that, `"best"`: the best attempt at this point goes on."""

    block: int
    step: int
    value: float
    move: str


class Attempts:
    """The rows: what is written, where each stands, what it has spent, its best attempts.

    canvas, open_, logprobs: (B, P+L). values: (B, blocks, points). block, step: (B,); a row whose
    block is `blocks` is done. points: step of every point, (blocks, points). targets: how many
    positions of a block are revealed after a step, (blocks, S). cost: positions that a row computes
    in a step of a block, to_go: in all steps from a block's first on, (B, blocks). allowed: that a
    row may compute, (B,).
    """

    def __init__(
        self,
        policy: MaskedDiffusionPolicy,
        prompts: Sequence[Prompt],
        config: SamplerConfig,
        guide: GuideConfig,
        thresholds: Thresholds | None,
    ):
        self.policy, self.config, self.guide = policy, config, guide
        encoded = policy.encode(prompts, config.max_new_tokens)
        self.width, self.length = encoded.input_ids.shape[1], config.max_new_tokens
        self.canvas, self.attention, self.open_ = blank_canvas(policy, encoded, self.length)
        rows, device = len(self.canvas), self.canvas.device
        self.block_length = config.block_length or self.length
        self.blocks = self.length // self.block_length
        quotas = [evenly(self.block_length, s) for s in steps_of_blocks(config)]
        steps = torch.tensor([len(quota) for quota in quotas], device=device)
        longest = max(map(len, quotas))
        full = [quota + [0] * (longest - len(quota)) for quota in quotas]
        self.steps, self.targets = steps, torch.tensor(full, device=device).cumsum(1)
        self.points = torch.tensor(points_of_blocks(config, guide), device=device)
        shape = (rows, *self.points.shape)
        self.values = torch.full(shape, torch.nan, dtype=torch.double, device=device)
        self.logprobs = torch.zeros(self.canvas.shape, device=device)
        self.block, self.step, self.failures, self.spent = torch.zeros(
            4, rows, dtype=torch.long, device=device
        )
        seen = torch.full((self.blocks,), self.length, device=device)
        if policy.kind == "bd":
            seen = self.block_length * torch.arange(1, self.blocks + 1, device=device)
        self.cost = encoded.attention_mask.sum(1, keepdim=True) + seen
        self.to_go = (self.cost * steps).flip(1).cumsum(1).flip(1)
        self.allowed = self.to_go[:, 0] * (guide.budget if thresholds else 1)
        nothing = torch.full(self.points.shape, -torch.inf, dtype=torch.double)
        bands = (thresholds.low, thresholds.high) if thresholds else (nothing, nothing)
        self.bands = torch.stack([band.double() for band in bands])  # (2, blocks, points)
        self.best: dict[tuple[int, int, int], tuple[float, list[Tensor]]] = {}
        self.judgements: list[list[Judgement]] = [[] for _ in range(rows)]

    def columns(self, block: Tensor) -> Tensor:
        """Columns of the canvas in which blocks (R,) lie, (R, K)."""
        inside = torch.arange(self.block_length, device=block.device)
        return self.width + block[:, None] * self.block_length + inside

    def look(
        self,
        value: Value,
        at: Tensor,
        rows: Tensor,
        hidden: Tensor,
        context: Tensor,
        masked: Tensor,
    ) -> list[float]:
        """V of the rows number `at` (J,) among `rows` (R,)."""
        judged = rows[at]
        ids, revealed = self.canvas[judged, self.width :], ~self.open_[judged, self.width :]
        states = States(
            rows=judged,
            blocks=self.block[judged],
            steps=self.step[judged],
            hidden=hidden[at],
            context=context[at],
            written=mean_embedding(self.policy, ids, revealed[:, None])[:, 0],
            masked=masked[at],
            completion_ids=ids,
            logprobs=self.logprobs[judged, self.width :],
            revealed=revealed,
        )
        values = value(states)
        require(
            values.shape == judged.shape and not values.isnan().any(),
            f"V returned {values.tolist()}: expected {len(judged)} numbers, one a state",
        )
        return values.tolist()

    def write(self, rows: Tensor, columns: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        self.canvas[rows, columns] = tokens
        self.logprobs[rows, columns] = logprobs
        self.open_[rows, columns] = False

    def judge(self, row: int, point: int, v: float) -> None:
        """Let a row, which has made its step, go on, or send it back."""
        block = int(self.block[row])
        self.values[row, block, point] = v
        low, high = self.bands[:, block, point].tolist()
        move = "on"
        if high > -torch.inf:
            written = [x[row] for x in (self.canvas, self.open_, self.logprobs, self.values)]
            key = row, block, point
            if key not in self.best or v > self.best[key][0]:
                self.best[key] = v, [x.clone() for x in written]
            if v < high:
                move = self.move(row, v < low)
                start = self.behind(block) if move == "back" else block
                if self.spent[row] + self.to_go[row, start] <= self.allowed[row]:
                    self.restart(row, start)
                else:
                    move = "best"
                    for x, best in zip(written, self.best[key][1], strict=True):
                        x.copy_(best)
        self.judgements[row].append(Judgement(block, int(self.points[block, point]), v, move))

    def move(self, row: int, low: bool) -> str:
        """Where a state that failed is to go; `low` if V is below the lower threshold."""
        self.failures[row] += not low
        tired = self.guide.form == "two_gates" and self.failures[row] >= self.guide.patience
        return "back" if low or tired else "again"

    def behind(self, block: int) -> int:
        """Where a row goes back to from a block."""
        return 0 if self.guide.description_length else max(0, block - 1)

    def restart(self, row: int, block: int) -> None:
        if block < self.block[row]:
            self.failures[row] = 0
        first = self.width + block * self.block_length
        self.canvas[row, first:] = self.policy.mask_token_id
        self.open_[row, first:] = True
        self.logprobs[row, first:] = 0
        self.values[row, block:] = torch.nan
        self.block[row], self.step[row] = block, 0

    def finish_blocks(self, rows: Tensor, ends: Tensor) -> None:
        """Move those of `rows` (R,) that have made a block's last step to the next one."""
        rows = rows[self.step[rows] == self.steps[self.block[rows]]]
        written = self.canvas[rows[:, None], self.columns(self.block[rows])]
        self.block[rows] += 1
        self.step[rows] = self.failures[rows] = 0
        if self.config.stop_at_end:
            for row in rows[torch.isin(written, ends).any(1)].tolist():
                behind = self.width + int(self.block[row]) * self.block_length
                self.canvas[row, behind:] = self.policy.pad_token_id
                self.block[row] = self.blocks
