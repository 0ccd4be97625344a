"""The thesis's Fig. 3-3 in one piece: descriptions, all units at once, and V, who sends work back.

    phase 1    y^j, one after the other                              (`mdmrl.sampling.hierarchy`)
    phase 2    x^j, all units of all prompts in one batch; after S/4 and S/2 of a unit's S steps
                   V >= high          go on                          (`mdmrl.sampling.guided`)
                   low <= V < high    phase 2 again: x^j from [MASK], with the same y^j
                   V < low            phase 1 again: a new y^j, and then x^j

Units that are sent back to phase 1 get their new descriptions in one batch and are then written in
one batch, until none is sent back. A unit gets at most `descriptions` of them; with the last one,
low V is the unit again. Thresholds are of each unit, quantiles of V over base rollouts
(`Pipeline.calibrated`). A new description leaves those of later units as they are.

Reinforcement learning (`train_ppo(..., draw=Pipeline(...))`): of every whole one unit, drawn at
random, is the episode that the policy learns from, with the reward of the whole. Its prompt is all
that was known when it was written; its S steps are scored exactly. Where V rejects, what is kept is
no sample of the policy, which the ratio does not know (notebook 09 measures what that does).

Policies that denoise only: V looks at half-denoised text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mdmrl.config import require
from mdmrl.policies import Policy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling import guidance
from mdmrl.sampling.config import SamplerConfig, require_at_least
from mdmrl.sampling.guidance import GuideConfig, Thresholds
from mdmrl.sampling.guided import Attempts, Judgement, advance, steps_of
from mdmrl.sampling.hierarchy import Draft, Place, Unit, canvas_of, phase_of
from mdmrl.sampling.output import APPROXIMATE, SamplerOutput
from mdmrl.sampling.states import Value


@dataclass(kw_only=True)
class PipelineOutput(SamplerOutput):
    """Wholes, and how they came about.

    Attributes:
        completions: the wholes; `completion_ids`, `logprobs` and so on are those of one unit of
            each, drawn at random, behind all that was known when it was written; `taken`, which.
        descriptions, units: y^j and y^j x^j of every prompt.
        values: V of the attempt at every unit that was kept, (B, units, 2 + checks): before its
            first step, at the checks, and before its last step; nan where phase 2 was not needed.
        judgements: every look that V took at a unit, (row, j), in order.
        written: descriptions that every unit got, (B, units).
        whole_ids: token ids of the wholes.
    """

    taken: list[int]
    descriptions: list[list[str]]
    units: list[list[str]]
    values: Tensor
    judgements: dict[Place, list[Judgement]]
    written: Tensor
    whole_ids: list[list[int]]

    def token_lists(self) -> list[list[int]]:
        return self.whole_ids


@dataclass(frozen=True)
class Pipeline:
    """Completes prompts by units that V guides, for `train_ppo`, `train_grpo` and `evaluate`. The
    sampler that it is called with writes a unit; greedy ones are not guided.

    Attributes:
        units: to be written. description_tokens: of one description, at as many tokens a step.
        value, guide, thresholds: V, its checks (`form="faithful"`, whose `budget` is that of one
            unit with one description), and from `calibrated`; without thresholds V sends nothing
            back, and without V the pipeline is the hierarchy.
        descriptions: that a unit may get. length, gap: see `generate_hierarchy`.
    """

    units: tuple[Unit, ...]
    description_tokens: int = 8
    value: Value | None = None
    guide: GuideConfig = field(default_factory=lambda: GuideConfig(form="faithful", budget=2.0))
    thresholds: Thresholds | None = None
    descriptions: int = 3
    length: int = 128
    gap: int = 8

    def calibrated(
        self, policy: Policy, prompts: Sequence[Prompt], config: SamplerConfig, generator=None
    ) -> Pipeline:
        """The same with thresholds from a base rollout of each of `prompts`, which are then not to
        be judged."""
        require(self.value is not None, "value=None: expected a V, whose quantiles they are")
        found = replace(self, thresholds=None)(policy, prompts, config, generator)
        return replace(self, thresholds=Thresholds.of(found.values, self.guide, 1, prompts))

    @torch.no_grad()
    def __call__(
        self, policy: Policy, prompts, config: SamplerConfig, generator=None, record: bool = False
    ) -> PipelineOutput:
        """Complete `prompts`.

        Raises:
            InputError: an autoregressive policy, no description allowed, no checks, two gates in
                place of three bands, thresholds of other units or calibrated on one of `prompts`,
                or what `generate_guided` refuses.
        """
        guide, bands = self.guide, self.thresholds if config.temperature else None
        config = guidance.checked(policy, prompts, config, guide, None)
        require_at_least(self, descriptions=1, description_tokens=1)
        require(guide.checks is not None, "checks=None: expected shares of a unit's steps")
        said = f"form={guide.form!r}, description_length={guide.description_length}"
        fit = guide.form == "faithful" and not guide.description_length
        require(fit, f"{said}: expected 'faithful' and 0, a description is a phase of its own")
        if bands:
            guidance.check_thresholds(prompts, config, guide, bands, len(self.units))
        generator = generator or generator_for(0, "pipeline", device=policy.device)
        draft = Draft(policy, prompts, self.units, self.length, self.gap)
        phase = phase_of(config, self.description_tokens)
        draft.describe(phase, generator)

        shape = len(prompts), len(self.units), 2 + len(guide.checks)
        values = torch.full(shape, torch.nan, dtype=torch.double)
        value = self.value or (lambda states: torch.zeros(len(states.rows)))
        written = torch.ones(shape[:2], dtype=torch.long)
        judgements: dict[Place, list[Judgement]] = defaultdict(list)
        kept: dict[Place, tuple[Tensor, ...]] = {}
        places = draft.unfinished()
        done = {*range(len(prompts))} - {row for row, _ in places}
        places += [(row, len(self.units) - 1) for row in sorted(done)]  # each has an episode
        for left in reversed(range(self.descriptions)):
            canvas = canvas_of(policy, *draft.begun(places), config, self.length)
            own = bands and bands.bands[:, [j for _, j in places], None]
            batch = Attempts(policy, canvas, config, guide, own, leave=left > 0)
            draft.count(places, **advance(batch, value, generator))
            end = batch.width + config.max_new_tokens
            written_ids = batch.ids[:, batch.width : end]
            texts = policy.decode(written_ids, policy.completion_mask(written_ids))
            for i, place in enumerate(places):
                judgements[place] += batch.judgements[i]
                values[place], kept[place] = batch.values[i, 0], batch.row(i)
                draft.finish(place, texts[i])
            if not (places := [place for i, place in enumerate(places) if i in batch.left]):
                break
            draft.describe(phase, generator, places)
            written[tuple(zip(*places, strict=True))] += 1

        optimisations = {"value guidance": APPROXIMATE} if bands else {}
        costs = {"nfe": draft.nfe, "token_forwards": draft.token_forwards}
        own = {"descriptions": draft.y, "units": draft.whole, "values": values, "written": written}
        own |= {"judgements": dict(judgements), "optimisations": optimisations, **costs}
        return _output(policy, draft.completions(), kept, generator, record, own)


def _output(policy: Policy, wholes, kept, generator, record: bool, own: dict) -> PipelineOutput:
    """`wholes` with an episode each: one of the units that were `kept`, by place."""
    taken = []
    for row in range(len(wholes)):
        units = sorted(j for i, j in kept if i == row)
        drawn = torch.randint(len(units), (), generator=generator, device=generator.device)
        taken.append(units[int(drawn)])
    episodes = [kept[row, j] for row, j in enumerate(taken)]
    prompts, *parts = zip(*episodes, strict=True)
    encoded = policy.pad([ids.tolist() for ids in prompts])
    fillings = policy.pad_token_id, False, 0.0, -1
    ids, seen, logprobs, revealed_at = (
        pad_sequence(part, True, filling) for part, filling in zip(parts, fillings, strict=True)
    )
    path = {"trajectory": steps_of(ids, logprobs, revealed_at)} if record else {}
    sequences = torch.cat([encoded.input_ids, ids], 1)
    own |= {"taken": taken, "seen": seen, **path}
    own["whole_ids"] = [
        [*whole, policy.tokenizer.eos_token_id]
        for whole in policy.tokenizer(wholes, add_special_tokens=False).input_ids
    ]
    output = PipelineOutput.of(policy, sequences, encoded.attention_mask, logprobs, **own)
    output.completions = wholes
    return output
