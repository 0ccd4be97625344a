"""Fig. 3-3's pipeline against the hierarchy, scripts of V, a forward hook and the scorer."""

from collections import Counter

import pytest
import torch
from test_hierarchy import UNITS
from test_sampling import PROMPTS, double

from mdmrl.config import InputError
from mdmrl.rl.config import PPOConfig
from mdmrl.rl.episodes import score_episodes
from mdmrl.rl.ppo import train_ppo
from mdmrl.rl.rollout import Rollout
from mdmrl.rl.values import fit_to_base
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig
from mdmrl.sampling.guidance import GuideConfig, Thresholds
from mdmrl.sampling.hierarchy import Unit, generate_hierarchy
from mdmrl.sampling.pipeline import Pipeline
from mdmrl.sampling.states import Recorder

ASKED = PROMPTS[:2]
SAMPLER = SamplerConfig(
    max_new_tokens=8, steps=4, temperature=1.0, remasking="state_confidence", stop_at_end=False
)


def pipeline(**changes):
    return Pipeline(**{"units": UNITS, "description_tokens": 4, "length": 64, "gap": 3} | changes)


def between(low, high, units=4):
    """The same thresholds at the first check of every unit."""
    bands = torch.full((2, units, 4), -torch.inf, dtype=torch.double)
    bands[0, :, 1], bands[1, :, 1] = low, high
    return Thresholds(*bands)


class Scripted:
    """V at the first check by how often it has been asked there of a unit: `values`, then 1."""

    def __init__(self, *values):
        self.values, self.asked = values, Counter()

    def __call__(self, states):
        found = torch.ones(len(states.rows))
        for i, (row, step) in enumerate(zip(states.rows.tolist(), states.steps, strict=True)):
            if step == 1:
                past = self.asked[row]
                self.asked[row] += 1
                found[i] = self.values[past] if past < len(self.values) else 1.0
        return found


def test_without_v_it_is_the_hierarchy(mdm):
    double(mdm)
    greedy = SAMPLER.replace(temperature=0.0)
    found = pipeline()(mdm, ASKED, greedy)
    own = {"length": 64, "gap": 3}
    plain = generate_hierarchy(
        mdm, ASKED, UNITS, greedy.replace(max_new_tokens=4, steps=2), greedy, **own
    )
    assert found.completions == plain.completions
    assert (found.descriptions, found.units) == (plain.descriptions, plain.units)
    assert (found.nfe, found.token_forwards) == (plain.nfe, plain.token_forwards)
    assert found.exact


def test_the_middle_band_writes_the_unit_again(mdm):
    found = pipeline(value=Scripted(0.5), thresholds=between(0.3, 0.7))(mdm, ASKED, SAMPLER)
    assert (found.written == 1).all()
    for looks in found.judgements.values():
        at = [(look.step, look.move) for look in looks]
        assert at == [(0, "on"), (1, "again"), (0, "on"), (1, "on"), (2, "on"), (3, "on")]
    assert found.nfe == 4 * 2 + 2 + 4


def test_the_lower_band_goes_back_to_the_description(mdm):
    """Low V twice: of three descriptions the third is kept, whatever V says of it."""
    pushed = []
    mdm.model.get_input_embeddings().register_forward_hook(
        lambda module, given, _: pushed.append(tuple(given[0].shape))
    )
    found = pipeline(value=Scripted(0.1, 0.1), thresholds=between(0.3, 0.7))(mdm, ASKED, SAMPLER)
    assert (found.written == 3).all()
    for looks in found.judgements.values():
        moves = [look.move for look in looks]
        assert moves == ["on", "back"] * 2 + ["on"] * 4
    assert found.nfe == len(pushed) == 4 * 2 + 2 * (2 + 2) + 4
    assert found.token_forwards == sum(rows * width for rows, width in pushed)
    always = pipeline(value=Scripted(*[0.1] * 9), thresholds=between(0.3, 0.7), descriptions=2)
    found = always(mdm, ASKED, SAMPLER)
    assert (found.written == 2).all()
    last = {looks[-1].move for looks in found.judgements.values()}
    assert last == {"on"} and {len(text) > 0 for text in found.completions} == {True}


def test_only_what_is_sent_back_is_described_again(mdm):
    """The third row of the first batch is the first prompt's second unit."""

    def third(states):
        return torch.where((states.rows == 2) & (states.steps == 1), 0.1, 1.0)

    found = pipeline(value=third, thresholds=between(0.3, 0.7))(mdm, ASKED, SAMPLER)
    assert found.written.tolist() == [[1, 2, 1, 1], [1, 1, 1, 1]]


def test_an_episode_is_scored_as_it_was_drawn(mdm):
    """Prompts and beginnings of different lengths, and what V saw of the unit that was taken."""
    double(mdm)
    seen = Recorder(lambda states: states.features)
    drawing = pipeline(value=seen, guide=GuideConfig(form="faithful", budget=2.0))
    found = drawing(mdm, ASKED, SAMPLER, generator_for(3, "x"), record=True)
    ones = torch.ones(len(ASKED))
    rollout = Rollout.of(found, ones, ones.bool(), SAMPLER, ones)
    scores = score_episodes(mdm, rollout, 64, reference=False)
    assert scores.max_logprob_mismatch < 1e-6  # kept in float32
    assert ((rollout.revealed_at >= 0).sum(1) == 8).all()
    batch = [(row, j) for j in range(4) for row in range(len(ASKED))]
    for row, j in enumerate(found.taken):
        looks = seen.looks[batch.index((row, j))]
        torch.testing.assert_close(scores.features[row], looks)
        ids = found.completion_ids[row, :8]
        text = found.descriptions[row][j] + mdm.tokenizer.decode(ids)
        assert text.startswith(found.units[row][j][: len(found.descriptions[row][j]) + 1])


def test_every_whole_has_an_episode(mdm):
    """Also where every description ends its unit."""
    units = tuple(Unit(name, name, "", ("",)) for name in "ab")
    found = pipeline(units=units)(mdm, ASKED, SAMPLER, record=True)
    assert found.completions == ["ab", "ab"]
    assert found.taken == [1, 1]
    assert sum(len(step.rows) for step in found.trajectory) == 2 * 8


def test_thresholds_are_of_every_unit(mdm):
    noise = torch.Generator().manual_seed(0)
    drawing = pipeline(value=lambda states: torch.rand(len(states.rows), generator=noise))
    prompts = [f"{i} and {i + 1}?" for i in range(24)]
    found = drawing.calibrated(mdm, prompts, SAMPLER)
    low, high = found.thresholds.low[:, 1], found.thresholds.high[:, 1]
    assert ((low > 0) & (low < 0.5) & (low <= high)).all() and len({*low.tolist()}) == 4
    back = [looks for looks in found(mdm, ASKED, SAMPLER).judgements.values()]
    assert {look.move for looks in back for look in looks} & {"again", "back"}
    with pytest.raises(InputError, match="calibrated on"):
        found(mdm, prompts[:1], SAMPLER)
    with pytest.raises(InputError, match="expected a V"):
        pipeline().calibrated(mdm, prompts, SAMPLER)
    with pytest.raises(InputError, match="descriptions=0"):
        pipeline(descriptions=0)(mdm, ASKED, SAMPLER)
    with pytest.raises(InputError, match="checks=None"):
        pipeline(guide=GuideConfig(form="faithful", checks=None))(mdm, ASKED, SAMPLER)
    with pytest.raises(InputError, match="faithful"):
        pipeline(guide=GuideConfig(budget=2.0))(mdm, ASKED, SAMPLER)


def test_ppo_through_the_pipeline(mdm, tmp_path):
    """The ratio before any update is 1 and V learns from the pipeline's own states."""
    config = PPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        sampler={"steps": 4},
        value_batches=2,
        learning_rate=1e-3,
    )
    rows = [{"prompt": prompt} for prompt in ASKED]
    rewards = [lambda prompts, completions, **_: [float(len(text)) for text in completions]]
    values, _ = fit_to_base(mdm, rewards, rows, config, draw=pipeline())
    drawing = pipeline(value=values.judge)
    drawing = drawing.calibrated(mdm, ["Why?", "When?", "Who?"], config.sampler_for(mdm))
    before = mdm.weights_fingerprint()
    folder = train_ppo(mdm, rewards, rows, config, draw=drawing)
    logged = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert [row["max_logprob_mismatch"] < 1e-4 for row in logged] == [True, True]
    assert mdm.weights_fingerprint() != before
    with pytest.raises(InputError, match="half_text"):
        train_ppo(mdm, rewards, rows, config.replace(half_text=True), draw=drawing)
