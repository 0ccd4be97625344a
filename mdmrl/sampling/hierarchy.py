"""The hierarchy: descriptions of the units of a text first, then all units at once (thesis, 3.2.1).

    phase 1    y^j ~ p(y^j | c^j, y^{<j}, y^0)     one after the other, each for all prompts
    phase 2    x^j ~ p(x^j | c^j, y^{<=j}, y^0)    all units of all prompts in one batch
    whole      c^1 x^1 c^2 x^2 ...; its probability is the product (the thesis writes a sum)

y^0 is the prompt and c^j the class of a unit: the text that opens it, the text that closes it and
what ends it. It works with every family, and with policies that have learnt whole texts alone:
 * A description is the beginning of its unit, and x^j continues it. The policy sees the whole as
   far as it is known, c^1 y^1 c^2 y^2 ... c^j y^j, and goes on from there. Openings should say
   which unit begins: without a word of its own a unit goes on where the one before breaks off.
 * A masked diffusion policy has learnt to see texts with holes: `gap` masks stand for what every
   earlier unit still lacks, and masks fill the text up behind the unit. Others see the beginnings
   side by side; to block diffusion all that is known is prompt, and blocks begin behind it.
 * A unit is cut before the first of its stops. A description that holds one is the whole unit, and
   phase 2 leaves it out.
 * Units of phase 2 do not see each other: what one needs of another must be in the descriptions.

The critical path is one description after the other and one batch; `parallel=False` writes the
units one after the other, for comparison. Every unit pays for reading what is known so far, which
`token_forwards` counts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Generator
from torch.nn.utils.rnn import pad_sequence

from mdmrl.config import require
from mdmrl.policies import Policy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling.autoregressive import extend
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.denoise import Canvas, denoise
from mdmrl.sampling.output import SamplerOutput

Place = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """A class of units, c^j.

    opening, closing: what stands around the unit in the whole. stops: strings before the first of
    which the unit ends; without any, at the end of text.
    """

    name: str
    opening: str
    closing: str
    stops: tuple[str, ...] = ()

    def cut(self, text: str) -> tuple[str, bool]:
        """`text` up to the first stop, and whether there is one."""
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)


@dataclass
class HierarchyOutput:
    """Assembled texts and what they cost.

    Attributes:
        completions: the wholes. descriptions, units: y^j and y^j x^j of every prompt.
        nfe: forward passes on the critical path, one after the other; unit_nfe: those of every unit
            added up, whether it shared them or not. token_forwards: positions pushed through the
            network. seconds: of the two phases.
    """

    completions: list[str]
    descriptions: list[list[str]]
    units: list[list[str]]
    nfe: int
    unit_nfe: int
    token_forwards: int
    seconds: tuple[float, float]


def generate_hierarchy(
    policy: Policy,
    prompts: Sequence[Prompt],
    units: Sequence[Unit],
    description: SamplerConfig,
    unit: SamplerConfig,
    length: int = 128,
    gap: int = 8,
    parallel: bool = True,
    generator: Generator | None = None,
) -> HierarchyOutput:
    """Complete `prompts` by descriptions and units.

    Args:
        description, unit: the samplers of the two phases; `max_new_tokens` is the length of one
            description, and of the rest of one unit.
        length: of a completion as a masked diffusion policy sees it, the masks behind a unit too.
        gap: masks that stand for the rest of an earlier unit, to a masked diffusion policy. Other
            families have no use for either.

    Raises:
        InputError: no units, or an option that the family cannot have.

    >>> sections = load_task("medcot-sections")
    >>> phases = [SamplerConfig(max_new_tokens=n, steps=n // 2) for n in (8, 20)]
    >>> generate_hierarchy(policy, prompts, sections.units, *phases).completions
    """
    generator = generator or generator_for(0, "hierarchy", device=policy.device)
    draft = Draft(policy, prompts, units, length, gap)
    start = time.perf_counter()
    draft.describe(description, generator)
    middle = time.perf_counter()
    left = draft.unfinished()
    batches = [left] if parallel else [list(some) for _, some in groupby(left, itemgetter(1))]
    for places in filter(None, batches):
        for place, text in zip(places, draft.next_texts(places, unit, generator), strict=True):
            draft.finish(place, text)
    seconds = (middle - start, time.perf_counter() - middle)
    costs = draft.nfe, draft.unit_nfe, draft.token_forwards
    return HierarchyOutput(draft.completions(), draft.y, draft.whole, *costs, seconds)


class Draft:
    """Completions of some prompts while they are written; a place (row, j) is a unit of one.

    y, whole: y^j and y^j x^j of every prompt; ended: whether a description is the whole unit. nfe,
    unit_nfe, token_forwards: what they have cost, see `HierarchyOutput`.
    """

    def __init__(self, policy: Policy, prompts, units: Sequence[Unit], length: int, gap: int):
        require(len(units) > 0, "no units given: expected at least one")
        require(gap >= 0, f"gap={gap}: expected 0 masks or more")
        self.policy, self.prompts, self.units, self.length = policy, prompts, units, length
        sees_gaps = policy.denoises and policy.block_length is None
        self.rest = policy.tokenizer.mask_token * gap if sees_gaps else ""
        self.y, self.whole = ([[""] * len(units) for _ in prompts] for _ in range(2))
        self.ended = [[False] * len(units) for _ in prompts]
        self.nfe = self.unit_nfe = self.token_forwards = 0

    def describe(self, config: SamplerConfig, generator, places: Sequence[Place] = ()) -> None:
        """Write the descriptions at `places` in one batch; those of all units, one after the other,
        where none are named."""
        rows, columns = range(len(self.prompts)), range(len(self.units))
        for batch in [places] if places else [[(row, j) for row in rows] for j in columns]:
            for (row, j), text in zip(
                batch, self.next_texts(batch, config, generator), strict=True
            ):
                self.y[row][j], self.ended[row][j] = self.units[j].cut(text)
                self.whole[row][j] = self.y[row][j]

    def unfinished(self) -> list[Place]:
        """The places whose description does not end the unit, unit by unit."""
        rows, columns = range(len(self.prompts)), range(len(self.units))
        return [(row, j) for j in columns for row in rows if not self.ended[row][j]]

    def finish(self, place: Place, text: str) -> None:
        """Put the rest of a unit behind its description, if that does not end it."""
        row, j = place
        if not self.ended[row][j]:
            self.whole[row][j], _ = self.units[j].cut(self.y[row][j] + text)

    def known(self, place: Place) -> str:
        """All units up to this one, which is still open, as far as they are described."""
        (row, last), units = place, self.units
        parts = [
            units[j].opening
            + self.y[row][j]
            + (not self.ended[row][j]) * self.rest
            + units[j].closing
            for j in range(last)
        ]
        return "".join([*parts, units[last].opening, self.y[row][last]])

    def begun(self, places: Sequence[Place]) -> tuple[list[Prompt], list[str]]:
        """The prompts of places, and how their completions begin."""
        return [self.prompts[row] for row, _ in places], [self.known(place) for place in places]

    def next_texts(self, places: Sequence[Place], config: SamplerConfig, generator) -> list[str]:
        """How the units at some places go on; written in one batch."""
        asked = self.begun(places)
        output = continue_texts(self.policy, *asked, config, self.length, generator)
        self.count(places, output.nfe, output.token_forwards)
        return output.completions

    def count(self, places: Sequence[Place], nfe: int, token_forwards: int) -> None:
        self.nfe += nfe
        self.unit_nfe += nfe * len({j for _, j in places})
        self.token_forwards += token_forwards

    def completions(self) -> list[str]:
        framed = (zip(self.units, row, strict=True) for row in self.whole)
        return ["".join(c.opening + x + c.closing for c, x in row) for row in framed]


@dataclass(frozen=True)
class Hierarchical:
    """`generate` by descriptions and units, for `train_grpo` and `evaluate`.

    The wholes are the completions, openings and closings included, which the policy did not write.
    No probability belongs to a whole: its `logprobs` are nan, and it has no trajectory. RL on it
    raises the flat policy's own log p of wholes that do well, as an estimator scores them, and is
    thus no exact policy gradient of the hierarchy.

    Attributes:
        units: to be written. description_tokens, unit_tokens: of one description, and of the rest
            of one unit, at as many tokens a step as the sampler asked for.
        length, gap: see `generate_hierarchy`.
    """

    units: tuple[Unit, ...]
    description_tokens: int = 8
    unit_tokens: int = 20
    length: int = 128
    gap: int = 8

    def __call__(
        self, policy: Policy, prompts, config: SamplerConfig, generator=None, record: bool = False
    ) -> SamplerOutput:
        """Complete `prompts`; raises as `generate_hierarchy`, and for a whole that is longer than
        `config.max_new_tokens`."""
        require(not record, "record=True: the hierarchy's completions have no one trajectory")
        phases = [phase_of(config, n) for n in (self.description_tokens, self.unit_tokens)]
        options = {"length": self.length, "gap": self.gap, "generator": generator}
        found = generate_hierarchy(policy, prompts, self.units, *phases, **options)
        wholes = policy.tokenizer(found.completions, add_special_tokens=False).input_ids
        ids = [torch.tensor([*whole, policy.tokenizer.eos_token_id]) for whole in wholes]
        longest, asked = max(map(len, ids)), config.max_new_tokens
        require(
            longest <= asked,
            f"a whole of {longest} tokens with its end exceeds max_new_tokens={asked}: raise it, "
            "or lower description_tokens or unit_tokens",
        )
        encoded, pad = policy.encode(prompts), policy.pad_token_id
        padded = F.pad(pad_sequence(ids, True, pad), (0, asked - longest), value=pad)
        sequences = torch.cat([encoded.input_ids, padded.to(policy.device)], 1)
        nowhere = torch.full(padded.shape, torch.nan, device=policy.device)
        costs = {"nfe": found.nfe, "token_forwards": found.token_forwards}
        output = SamplerOutput.of(policy, sequences, encoded.attention_mask, nowhere, **costs)
        output.completions = found.completions
        return output


def phase_of(config: SamplerConfig, tokens: int) -> SamplerConfig:
    """`config` for fewer tokens, at the same number of tokens a step."""
    steps = config.steps and max(1, round(config.steps * tokens / config.max_new_tokens))
    return config.replace(max_new_tokens=tokens, steps=steps)


def continue_texts(
    policy: Policy, prompts: Sequence[Prompt], begun: Sequence[str], config, length: int, generator
) -> SamplerOutput:
    """Write the next `config.max_new_tokens` tokens of completions that are `begun`; see
    `canvas_of`."""
    if not policy.denoises:
        config.refuse_denoising_options()
        encoded = policy.encode(prompts, config.max_new_tokens, begun)
        return extend(policy, encoded, config, generator)
    config = config.in_blocks_of(policy.block_length)
    canvas = canvas_of(policy, prompts, begun, config, length)
    output = denoise(policy, *canvas, config, generator)
    output.completion_ids = output.completion_ids[:, : config.max_new_tokens]
    output.completion_mask = policy.completion_mask(output.completion_ids)
    output.completions = policy.decode(output.completion_ids, output.completion_mask)
    return output


def canvas_of(
    policy: Policy, prompts: Sequence[Prompt], begun: Sequence[str], config, length: int
) -> Canvas:
    """The canvas on which completions that are `begun` go on for `config.max_new_tokens` tokens. A
    masked diffusion policy sees masks behind these up to the `length` of a whole completion, and
    none where the text is longer already."""
    encoded = policy.encode(prompts, config.max_new_tokens, begun)
    canvas = Canvas.behind(encoded, config.max_new_tokens, policy.mask_token_id)
    if policy.block_length is not None:
        return canvas
    require(
        config.block_length is None,
        f"block_length={config.block_length}: expected None, a unit is revealed as a whole",
    )
    alone = policy.encode(prompts).attention_mask.sum(1)
    behind = length - (canvas.attention.sum(1) - alone)  # (B,)
    more = torch.arange(max(0, int(behind.max())), device=policy.device) < behind[:, None]
    masks = torch.full_like(more, policy.mask_token_id, dtype=torch.long)
    added = (masks, more, torch.zeros_like(more))
    parts = (torch.cat(pair, 1) for pair in zip(canvas[:3], added, strict=True))
    return Canvas(*parts, canvas.width)
