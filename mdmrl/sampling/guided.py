"""Value-guided denoising: text that a value function judges poor is drawn again before it is done.

A completion is revealed block by block as in `mdmrl.sampling.denoise`. Before a block's first step,
after S/4 and S/2 of its S steps and before its last step, V looks at the state; with thresholds
low <= high of that block and that point,

    V >= high           go on
    low <= V < high     the block again, from [MASK]
    V < low             back: the description again, or the block before where there is none

A description is what the first `description_length` positions hold: text on which all that follows
is conditioned (phase 1 of the hierarchy, in one canvas with phase 2). Two ways to set thresholds:

    "faithful"    the thesis's three bands (3.3.3) on one V, at S/4 and S/2 of every block
    "two_gates"   before any denoising behind the description: V < tau_y goes back; at S/4 and S/2
                  of every block behind it: V < tau_x is the block again, and the `patience`-th
                  failure of a block goes back

Every forward pass makes one step for every row, each at its own block and step, so that no pass has
an idle row. V sees the state in the pass that makes the step, so judging is free; a state that
fails has cost its step, which is made all the same and kept with it.

What is rejected counts. A row may be sent back only if the rest of the text, from there on, still
fits its `budget`; else it takes up the attempt with the highest V at this very point, and goes on.

What the thesis leaves open or says otherwise:
 * It accepts above the threshold in one place and below it in another; high V is good.
 * Thresholds are quantiles of V over base rollouts (`calibrate`) of prompts that are not judged.
 * "Back" without a description, and without a block before, is the block again.
 * No caches, no `cfg_scale`, no revision, one quota a step: rows at different blocks share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from mdmrl.config import require
from mdmrl.policies import Policy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling import guidance
from mdmrl.sampling.choose import reveal
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.denoise import Canvas
from mdmrl.sampling.generate import generate
from mdmrl.sampling.guidance import GuideConfig, Thresholds
from mdmrl.sampling.output import APPROXIMATE, SamplerOutput, Step
from mdmrl.sampling.schedule import revealed_after
from mdmrl.sampling.states import States, Value, hidden_at_blocks, mean_embedding


class Judgement(NamedTuple):
    """V of one row before a step of a block, and what followed: `"on"`, `"again"`, `"back"` or,
    where the budget did not allow that, `"best"`: the best attempt at this point goes on."""

    block: int
    step: int
    value: float
    move: str


@dataclass(kw_only=True)
class GuidedOutput(SamplerOutput):
    """Completions, and how they came about.

    Attributes:
        values: V along the path that was kept, (B, blocks, 2 + checks): before the first step of a
            block, at the checks, and before its last step; nan behind the end of a text.
        judgements: every look that V took at a row, in order.
        spent: positions that each completion pushed through the network, its own ones without
            padding, (B,); `token_forwards` counts the padding of the batch too.
    """

    values: Tensor
    judgements: list[list[Judgement]]
    spent: Tensor

    @property
    def final_values(self) -> Tensor:
        """V before the last step of each text, (B,): behind it V is 0 by definition."""
        last = (~self.values[:, :, -1].isnan()).sum(1) - 1
        return self.values[torch.arange(len(last)), last, -1]


def calibrate(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    guide: GuideConfig,
    value: Value,
    generator: Generator | None = None,
) -> Thresholds:
    """Thresholds from one base rollout of each of `prompts`, which are then not to be judged."""
    found = generate_guided(policy, prompts, config, guide, value, generator=generator)
    length = config.max_new_tokens // found.values.shape[1]
    return Thresholds.of(found.values, guide, length, prompts)


@torch.no_grad()
def generate_guided(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    guide: GuideConfig,
    value: Value,
    thresholds: Thresholds | None = None,
    generator: Generator | None = None,
    record: bool = False,
) -> GuidedOutput:
    """Complete `prompts`, guided by `value`; without `thresholds` a base rollout, with V looked at.
    `record` keeps the trajectory of what was kept, for estimators that follow it.

    Raises:
        InputError: a sampler whose rows cannot be at different blocks, thresholds of another shape
            or calibrated on one of `prompts`, or a V of another shape or that is no number.

    >>> V = ValueHead.from_pretrained("runs/ppo/checkpoints/step-000060/values")
    >>> value, sampler = lambda states: V(states.features), SamplerConfig(temperature=1, ...)
    >>> guide = GuideConfig(budget=3)
    >>> thresholds = calibrate(policy, calibration_prompts, sampler, guide, value)
    >>> generate_guided(policy, prompts, sampler, guide, value, thresholds).completions
    """
    config = guidance.checked(policy, prompts, config, guide, thresholds)
    said = f"record=True with order_temperature={config.order_temperature}"
    require(not (record and config.order_temperature), f"{said}: expected 0; no order is kept")
    generator = generator or generator_for(0, "guided", device=policy.device)
    encoded, length = policy.encode(prompts, config.max_new_tokens), config.max_new_tokens
    canvas = Canvas.behind(encoded, length, policy.mask_token_id)
    bands = thresholds and thresholds.bands[:, None]
    batch = Attempts(policy, canvas, config, guide, bands)
    costs = advance(batch, value, generator)
    drawn = batch.attention[:, : batch.width], batch.logprobs[:, batch.width :]
    saved = {"value guidance": APPROXIMATE} if thresholds else {}
    if record:
        kept = batch.ids, batch.logprobs, batch.revealed_at
        costs["trajectory"] = steps_of(*(x[:, batch.width :] for x in kept))
    found = {"values": batch.values, "judgements": batch.judgements, "optimisations": saved}
    return GuidedOutput.of(policy, batch.ids, *drawn, **found, **costs, spent=batch.spent)


def advance(batch: Attempts, value: Value, generator: Generator) -> dict[str, int]:
    """Make all steps of all rows; returns `nfe` and `token_forwards`."""
    policy, config, nfe, token_forwards = batch.policy, batch.config, 0, 0
    while len(rows := (batch.block < batch.blocks).nonzero()[:, 0]):
        block, step = batch.block[rows], batch.step[rows]
        columns = batch.columns(block)  # (R, K)
        todo = batch.open_[rows[:, None], columns]  # (R, K), N of them True
        hidden, context, cost = hidden_at_blocks(
            policy, batch.ids[rows], batch.attention[rows], batch.width, columns
        )
        nfe, token_forwards = nfe + 1, token_forwards + cost
        at, point = (batch.points[block] == step[:, None]).nonzero(as_tuple=True)
        states = batch.states(rows[at], hidden[at], context[at], todo[at])
        values = judged(value, states) if len(at) else []

        logits = policy.head(hidden[todo])  # (N, V)
        row, column = rows.repeat_interleave(todo.sum(1)), columns[todo]
        quota = batch.targets[block, step] - (~todo).sum(1)
        chosen, *drawn = reveal(policy, logits, column, todo, quota, config, generator)
        batch.write(row[chosen], column[chosen], *drawn)
        batch.spent[rows] += batch.cost[rows, block]
        batch.step[rows] += 1
        for judgement in zip(rows[at].tolist(), point.tolist(), values, strict=True):
            batch.judge(*judgement)
        batch.finish_blocks(rows)
    return {"nfe": nfe, "token_forwards": token_forwards}


def steps_of(ids: Tensor, logprobs: Tensor, revealed_at: Tensor) -> list[Step]:
    """The path on which completions `ids` (B, L) were revealed, each position in a step of its own
    number or (-1) never, as `mdmrl.sampling.denoise` records one."""
    found = []
    for step in range(int(revealed_at.max()) + 1):
        at = (revealed_at == step).nonzero(as_tuple=True)
        found.append(Step(*at, ids[at], logprobs[at], at[0].new_zeros(2, 0)))
    return found


@dataclass
class Guided:
    """What draws the completions of a run (`draw=` of `train_grpo`), guided as the thresholds say;
    greedy ones are not guided."""

    value: Value
    guide: GuideConfig
    thresholds: Thresholds

    def __call__(
        self, policy: Policy, prompts, config: SamplerConfig, generator=None, record: bool = False
    ) -> SamplerOutput:
        if config.temperature == 0:
            return generate(policy, prompts, config, generator, record)
        guided = self.guide, self.value, self.thresholds
        return generate_guided(policy, prompts, config, *guided, generator, record)


def judged(value: Value, states: States) -> list[float]:
    values = value(states)
    require(
        values.shape == states.rows.shape and not values.isnan().any(),
        f"V returned {values.tolist()}: expected {len(states.rows)} numbers, one a state",
    )
    return values.tolist()


class Attempts:
    """The rows: what is written, where each stands, what it has spent, its best attempts.

    ids, attention, open_, width: see `Canvas`. logprobs: (B, P+L). revealed_at: the step of all
    blocks' steps that revealed a position, (B, P+L), -1 for none. values: (B, blocks, points).
    block, step: (B,); a row whose block is `blocks` is done. points: step of every point, (blocks,
    points). targets: how many positions of a block are revealed after a step, (blocks, S). cost:
    positions that a row computes in a step of a block, to_go: in all steps from a block's first on,
    (B, blocks). allowed: that a row may compute, (B,). bands: low and high thresholds of every row,
    (2, B, blocks, points). With `leave` a row that is sent back is done with; left: which were.
    """

    def __init__(self, policy, canvas: Canvas, config, guide, bands=None, leave=False):
        self.policy, self.config, self.guide, self.leave = policy, config, guide, leave
        self.ids, self.attention, self.open_, self.width = canvas
        self.asked = self.open_.clone()
        rows, device, length = len(self.ids), self.ids.device, config.max_new_tokens
        self.block_length = config.block_length or length
        self.blocks = length // self.block_length
        self.steps = torch.tensor(guidance.steps_of_blocks(config), device=device)
        size, sizes = torch.tensor([self.block_length], device=device), config.step_sizes
        done = [revealed_after(sizes, size, steps)[:, 0] for steps in self.steps.tolist()]
        self.targets = pad_sequence(done, True, self.block_length)
        self.points = torch.tensor(guidance.points_of_blocks(config, guide), device=device)
        shape = (rows, *self.points.shape)
        self.values = torch.full(shape, torch.nan, dtype=torch.double)  # on the processor
        self.logprobs = torch.zeros(self.ids.shape, device=device)
        self.revealed_at = torch.full_like(self.ids, -1)
        standing = torch.zeros(4, rows, dtype=torch.long, device=device)
        self.block, self.step, self.failures, self.spent = standing
        self.cost = self.attention.sum(1, keepdim=True).repeat(1, self.blocks)
        if policy.block_length is not None:
            unseen = torch.arange(self.blocks - 1, -1, -1, device=device)
            self.cost -= self.block_length * unseen
        self.to_go = (self.cost * self.steps).flip(1).cumsum(1).flip(1)
        self.allowed = self.to_go[:, 0] * (1 if bands is None else guide.budget)
        self.bands = torch.full((2, *shape), -torch.inf, dtype=torch.double)
        if bands is not None:
            self.bands = bands.expand_as(self.bands)
        self.best: dict[tuple[int, int, int], tuple[float, list[Tensor]]] = {}
        self.judgements: list[list[Judgement]] = [[] for _ in range(rows)]
        self.left: set[int] = set()

    def columns(self, block: Tensor) -> Tensor:
        """Columns of the canvas in which blocks (R,) lie, (R, K)."""
        inside = torch.arange(self.block_length, device=block.device)
        return self.width + block[:, None] * self.block_length + inside

    def states(self, rows: Tensor, hidden: Tensor, context: Tensor, masked: Tensor) -> States:
        """What V may look at of `rows` (R,), whose network and blocks are as in `States`."""
        ids = self.ids[rows, self.width :]
        revealed = (self.asked & ~self.open_)[rows, self.width :]
        written = mean_embedding(self.policy, ids, revealed[:, None])[:, 0]
        logprobs, at = self.logprobs[rows, self.width :], (self.block[rows], self.step[rows])
        return States(rows, *at, hidden, context, written, masked, ids, logprobs, revealed)

    def write(self, rows: Tensor, columns: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        self.ids[rows, columns] = tokens
        self.logprobs[rows, columns] = logprobs
        before = self.steps.cumsum(0) - self.steps
        self.revealed_at[rows, columns] = before[self.block[rows]] + self.step[rows]
        self.open_[rows, columns] = False

    def judge(self, row: int, point: int, v: float) -> None:
        """Let a row, which has made its step, go on, or send it back."""
        block = int(self.block[row])
        self.values[row, block, point] = v
        low, high = self.bands[:, row, block, point].tolist()
        move = "on"
        if high > -torch.inf:
            held = self.ids, self.open_, self.logprobs, self.revealed_at, self.values
            written = [x[row] for x in held]
            key = row, block, point
            if key not in self.best or v > self.best[key][0]:
                self.best[key] = v, [x.clone() for x in written]
            if v < high:
                move, start = self.failed(row, block, v < low)
                if move == "back" and self.leave:
                    self.block[row] = self.blocks
                    self.left.add(row)
                elif self.spent[row] + self.to_go[row, start] <= self.allowed[row]:
                    self.restart(row, start)
                else:
                    move = "best"
                    for x, best in zip(written, self.best[key][1], strict=True):
                        x.copy_(best)
        self.judgements[row].append(Judgement(block, int(self.points[block, point]), v, move))

    def failed(self, row: int, block: int, low: bool) -> tuple[str, int]:
        """Where a state that failed is to go, and which block that is; `low` if V is below the
        lower threshold."""
        self.failures[row] += not low
        tired = self.guide.form == "two_gates" and self.failures[row] >= self.guide.patience
        if not (low or tired):
            return "again", block
        return "back", 0 if self.guide.description_length else max(0, block - 1)

    def restart(self, row: int, block: int) -> None:
        if block < self.block[row]:
            self.failures[row] = 0
        first = self.width + block * self.block_length
        self.open_[row, first:] = self.asked[row, first:]
        self.ids[row, self.open_[row]] = self.policy.mask_token_id
        self.logprobs[row, first:] = 0
        self.revealed_at[row, first:] = -1
        self.values[row, block:] = torch.nan
        self.block[row], self.step[row] = block, 0

    def row(self, row: int) -> tuple[Tensor, ...]:
        """The ids before the canvas's first mask, without padding, and of what is behind: ids,
        which of them the network sees, log-probabilities and steps."""
        prompt = self.ids[row, : self.width][self.attention[row, : self.width]]
        behind = self.ids, self.attention, self.logprobs, self.revealed_at
        return prompt, *(x[row, self.width :] for x in behind)

    def finish_blocks(self, rows: Tensor) -> None:
        """Move those of `rows` (R,) that have made a block's last step to the next one."""
        rows = rows[self.block[rows] < self.blocks]
        rows = rows[self.step[rows] == self.steps[self.block[rows]]]
        written = self.ids[rows[:, None], self.columns(self.block[rows])]
        self.block[rows] += 1
        self.step[rows] = self.failures[rows] = 0
        if self.config.stop_at_end:
            for row in rows[self.policy.is_end(written).any(1)].tolist():
                behind = self.width + int(self.block[row]) * self.block_length
                self.ids[row, behind:] = self.policy.pad_token_id
                self.block[row] = self.blocks
