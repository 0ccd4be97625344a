"""Value-guided sampling against the plain sampler, enumeration and arithmetic."""

import copy
import itertools
from functools import lru_cache, partial

import pytest
import torch
from scipy import stats
from test_sampling import PROMPTS, double, ender

from mdmrl.rl.episodes import score_episodes, score_states
from mdmrl.rl.oracle import denoiser_of, tabulate
from mdmrl.rl.rollout import Rollout
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.guidance import GuideConfig, Thresholds
from mdmrl.sampling.guided import Guided, calibrate, generate_guided
from mdmrl.sampling.selection import (
    Permuted,
    PromptOnly,
    best_of_curve,
    majority,
    mean_logprob,
)
from mdmrl.zoo.toy import toy_policy

OTHERS = ["Why?", "Which test would confirm the diagnosis?"]
PLENTY = 10**9


def settings(**changes):
    """Three blocks of 4 steps, one position each: V looks before steps 0, 1, 2 and 3."""
    small = {"max_new_tokens": 12, "steps": 12, "block_length": 4, "temperature": 1.0}
    return SamplerConfig(**small | {"remasking": "state_confidence"} | changes)


def bands(high, low=None, blocks=3):
    """Thresholds from {(block, point): value}."""
    found = [torch.full((blocks, 4), -torch.inf, dtype=torch.double) for _ in range(2)]
    for table, values in zip(found, (low or {}, high), strict=True):
        for at, value in values.items():
            table[at] = value
    return Thresholds(*found)


def constant(states):
    return torch.full(states.rows.shape, 0.3)


class Recorder:
    """V that draws a number for each look, and remembers what it saw: row, block, step, V, text."""

    def __init__(
        self, draw=lambda states, generator: torch.rand(len(states.rows), generator=generator)
    ):
        self.generator, self.draw, self.seen = generator_for(0, "V"), draw, []

    def __call__(self, states):
        values = self.draw(states, self.generator)
        looks = (states.rows, states.blocks, states.steps, values)
        where = zip(*(x.tolist() for x in looks), strict=True)
        texts = states.completion_ids.masked_fill(~states.revealed, -1)
        self.seen += zip(where, texts.tolist(), strict=True)
        return values


@pytest.fixture(params=["mdm", "shifted", "bd"])
def denoiser(request, shared_policies):
    base = shared_policies["bd" if request.param == "bd" else "mdm"]
    policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
    policy.logit_shift = request.param == "shifted"
    return double(ender(policy, 4))


def moves(output, row):
    return [(j.block, j.step, j.move) for j in output.judgements[row]]


# -- the plain sampler -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["faithful", "two_gates"])
@pytest.mark.parametrize(
    "changes", [{}, {"remasking": "random"}, {"remasking": "low_confidence"}], ids=str
)
def test_a_constant_v_gives_the_plain_sampler(denoiser, changes, form):
    config = settings(**changes, stop_at_end=False)
    guide = GuideConfig(budget=PLENTY, form=form)
    rollouts = generate_guided(denoiser, OTHERS, config, guide, constant).values
    thresholds = Thresholds.of(rollouts, guide, 4, OTHERS)
    found = generate_guided(
        denoiser, PROMPTS, config, guide, constant, thresholds, generator_for(0, "x")
    )
    plain = generate(denoiser, PROMPTS, config, generator_for(0, "x"))
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.completion_mask, plain.completion_mask)
    assert found.completions == plain.completions
    torch.testing.assert_close(found.logprobs, plain.logprobs)
    assert found.nfe == plain.nfe
    if denoiser.kind == "mdm":
        assert found.token_forwards == plain.token_forwards
    assert (found.final_values == found.values[:, 0, 0]).all()


def test_texts_end_as_the_plain_samplers_do(denoiser):
    config, guide = settings(temperature=0.0), GuideConfig(budget=PLENTY)
    found = generate_guided(denoiser, PROMPTS, config, guide, constant)
    plain = generate(denoiser, PROMPTS, config)
    assert found.completions == plain.completions
    assert found.values.isnan().any()  # behind the end of a text
    assert (found.final_values == found.values[:, 0, 0]).all()


def test_v_sees_what_the_value_head_was_fitted_on(denoiser):
    config = settings(stop_at_end=False, end_last=False)
    output = generate(denoiser, PROMPTS, config, generator_for(0, "x"), record=True)
    rollout = Rollout.of(output, torch.zeros(4), torch.ones(4, dtype=torch.bool), config)
    expected = score_states(denoiser, rollout, slice(0, 12)).features(12)  # (4, 12, F)
    seen = {}

    def value(states):
        for row, block, step, features in zip(
            states.rows.tolist(),
            states.blocks.tolist(),
            states.steps.tolist(),
            states.features,
            strict=True,
        ):
            seen[row, 4 * block + step] = features
        return states.features.sum(1)

    found = generate_guided(
        denoiser, PROMPTS, config, GuideConfig(), value, generator=generator_for(0, "x")
    )
    assert len(seen) == 4 * 12
    for (row, step), features in seen.items():
        torch.testing.assert_close(features, expected[row, step])
    torch.testing.assert_close(found.values.flatten(1).float(), expected.sum(-1))


# -- laws on a toy that can be enumerated ----------------------------------------------------------

LENGTH, MASK = 4, 3  # a, b, end, [MASK]


@pytest.fixture(scope="module")
def toy():
    return toy_policy("ab", seed=4)


def truth(policy, prompt):
    """V of every state of one block in 4 steps, and the law of its texts among the paths that pass
    `passes(state, step)`, by recursion over states."""
    table = tabulate(denoiser_of(policy, prompt, LENGTH), 4, LENGTH)

    @lru_cache
    def moves(state):
        log_mu = table(torch.tensor([state]))[0]
        best = [log_mu[i].max().item() if state[i] == MASK else -1e9 for i in range(LENGTH)]
        i = best.index(max(best))
        p = log_mu[i].exp().tolist()
        return [(p[v], (*state[:i], v, *state[i + 1 :])) for v in range(MASK)]

    @lru_cache
    def value(state):
        """The expected number of letters a."""
        if MASK not in state:
            return float(state.count(0))
        return sum(p * value(after) for p, after in moves(state))

    def law(passes, state=(MASK,) * LENGTH, step=0, weight=1.0):
        if not passes(state, step):
            return {}
        if step == LENGTH:
            return {state: weight}
        found = [law(passes, after, step + 1, weight * p) for p, after in moves(state)]
        return dict(itertools.chain.from_iterable(part.items() for part in found))

    return value, law


def p_value(law, drawn):
    """Of a chi-square test that texts follow an unnormalised law; rare ones pooled."""
    assert all(text in law for text in drawn)
    total = sum(law.values())
    expected = {text: weight / total * len(drawn) for text, weight in law.items()}
    common = [text for text in law if expected[text] >= 5]
    counts = [drawn.count(text) for text in common]
    ideal = [expected[text] for text in common]
    counts.append(len(drawn) - sum(counts))
    ideal.append(len(drawn) - sum(ideal))
    return stats.chisquare(counts, ideal).pvalue


def toy_settings(blocks=1, **changes):
    length = blocks * LENGTH
    return settings(
        max_new_tokens=length, steps=length, stop_at_end=False, end_last=False, **changes
    )


def texts(output, start=0):
    return [tuple(ids) for ids in output.completion_ids[:, start : start + LENGTH].tolist()]


def two_checks(seed):
    """A toy, its V, its law, what is asked of V after one step and after two, and how many paths
    pass, such that both checks reject; None where the toy has none."""
    toy = toy_policy("ab", seed=seed)
    value, law = truth(toy, "a")
    mean, lifts = value((MASK,) * LENGTH), (-0.1, -0.05, 0.0, 0.05, 0.1)
    for one, two in itertools.product(lifts, repeat=2):
        asked = {1: mean + one, 2: mean + two}

        def passes(state, step, last, asked=asked):
            return step > last or value(state) >= asked.get(step, -1)

        first, both = (sum(law(partial(passes, last=last)).values()) for last in (1, 2))
        if 0.2 < both < first - 0.05 < 0.9:
            return toy, value, law, asked, both
    return None


def test_a_v_that_knows_the_truth_conditions_the_sampler_on_it():
    # A toy's weights are others on another processor.
    toy, value, law, asked, passed = next(filter(None, map(two_checks, range(20))))
    everything = law(lambda state, step: True)
    assert sum(everything.values()) == pytest.approx(1, abs=1e-5)

    def exact(states):
        return torch.tensor([value(tuple(ids)) for ids in states.completion_ids.tolist()])

    found = generate_guided(
        toy,
        ["a"] * 500,
        toy_settings(),
        GuideConfig(budget=PLENTY, checks=[0.25, 0.5]),
        exact,
        bands({(0, step): least for step, least in asked.items()}, blocks=1),
        generator_for(0, "x"),
    )
    expected = law(lambda state, step: value(state) >= asked.get(step, -1))
    assert p_value(expected, texts(found)) > 1e-3
    rejected = sum(j.move != "on" for row in found.judgements for j in row)
    assert stats.binomtest(500, rejected + 500, passed).pvalue > 1e-3


def test_only_the_block_that_failed_is_drawn_again(toy):
    """Two blocks; the second must begin well. The law of the first stays."""

    def second(states):
        wrong = (states.completion_ids[:, LENGTH:] == 2).any(1)
        return torch.where((states.blocks == 1) & wrong, -1.0, 1.0)

    def draw(checked):
        return generate_guided(
            toy,
            ["a"] * 300,
            toy_settings(2),
            GuideConfig(budget=PLENTY, patience=1000),
            second,
            bands({(1, 2): 0.0} if checked else {}, blocks=2),
            generator_for(int(checked), "x"),
        )

    plain, found = draw(False), draw(True)
    columns = sorted(set(texts(plain)) | set(texts(found)))
    counts = [[texts(x).count(text) for text in columns] for x in (plain, found)]
    common = [i for i in range(len(columns)) if counts[0][i] + counts[1][i] >= 10]
    table = [[row[i] for i in common] for row in counts]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert any(j.move == "again" for row in found.judgements for j in row)


def test_the_gate_draws_descriptions_until_one_is_good(toy):
    """Description and text, a block each: V before the text judges the description alone."""

    def good(states):
        return (states.completion_ids[:, 0] == 0).float() * (states.blocks == 1)

    found = generate_guided(
        toy,
        ["b"] * 300,
        toy_settings(2),
        GuideConfig(budget=PLENTY, description_length=LENGTH),
        good,
        bands({(1, 0): 0.5}, {(1, 0): 0.5}, blocks=2),
        generator_for(0, "x"),
    )
    plain = generate(toy, ["b"] * 300, toy_settings(2), generator_for(1, "x"))
    drawn, base = texts(found), [text for text in texts(plain) if text[0] == 0]
    assert all(text[0] == 0 for text in drawn)
    assert {j.move for row in found.judgements for j in row} == {"on", "back"}
    shared = sorted(set(drawn) | set(base))
    table = [[x.count(text) for text in shared] for x in (drawn, base)]
    table = [
        [row[i] for i in range(len(shared)) if table[0][i] + table[1][i] >= 10] for row in table
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-3


# -- moves -----------------------------------------------------------------------------------------


def scripted(script):
    """V that says what the script says, look by look, for the only row; 1 behind its end."""
    left = list(script)
    return lambda states: torch.tensor([left.pop(0) if left else 1.0 for _ in states.rows])


def run(policy, script, thresholds, **guide):
    guide = GuideConfig(**{"budget": PLENTY} | guide)
    config = settings(stop_at_end=False)
    return generate_guided(policy, PROMPTS[:1], config, guide, scripted(script), thresholds)


def test_the_three_bands(mdm):
    every = list(itertools.product(range(3), (1, 2)))
    thresholds = bands(dict.fromkeys(every, 0.75), dict.fromkeys(every, 0.25))
    fine = [0, 1, 0.75, 0]  # looks before steps 0 and 3 ask for nothing
    script = [0, 0.5, 0, 0.75, 0.74, 0, 0.1, *fine, 0, 1, 0.24, *fine, 0, 0.25]
    found = run(mdm, script, thresholds, form="faithful")
    assert [j for j in moves(found, 0) if j[2] != "on"] == [
        (0, 1, "again"),
        (0, 2, "again"),
        (0, 1, "back"),  # to the block itself: there is none before
        (1, 2, "back"),
        (1, 1, "again"),
    ]
    blocks = [block for block, step, _ in moves(found, 0) if step == 0]
    assert blocks == [0, 0, 0, 0, 1, 0, 1, 1, 2]
    assert found.nfe == 2 + 3 + 2 + 4 + 3 + 4 + 2 + 4 + 4


def test_a_block_that_fails_too_often_takes_the_description_along(mdm):
    thresholds = bands({(2, 1): 0.5, (2, 2): 0.5})
    begun, bad, fine = [1, 1, 1, 1], [1, 0], [1, 1, 0]
    script = begun * 2 + bad + fine + begun * 2 + bad
    found = run(mdm, script, thresholds, patience=2, description_length=4)
    assert [j for j in moves(found, 0) if j[2] != "on"] == [
        (2, 1, "again"),
        (2, 2, "back"),
        (2, 1, "again"),
    ]
    blocks = [block for block, step, _ in moves(found, 0) if step == 0]
    assert blocks == [0, 1, 2, 2, 0, 1, 2, 2]


def test_two_gates_ask_the_description_and_then_the_states():
    values = torch.rand(9, 3, 4, generator=generator_for(0, "x")).double()
    values[:4, 2] = torch.nan  # texts that have ended
    guide = GuideConfig(low=0.25, high=0.5, description_length=4)
    found = Thresholds.of(values, guide, 4)

    def at(block, point, share):
        seen = sorted(v for v in values[:, block, point].tolist() if v == v)
        return seen[int(share * (len(seen) - 1))]

    for block, point in itertools.product(range(3), range(4)):
        gate = (block, point) == (1, 0)
        asked = block >= 1 and point in (1, 2)
        high = at(1, 0, 0.25) if gate else at(block, point, 0.5) if asked else -torch.inf
        assert found.high[block, point] == high
        assert found.low[block, point] == (high if gate else -torch.inf)
    faithful = Thresholds.of(values, guide.replace(form="faithful"), 4)
    for block, point in itertools.product(range(3), range(4)):
        asked = point in (1, 2)
        assert faithful.high[block, point] == (at(block, point, 0.5) if asked else -torch.inf)
        assert faithful.low[block, point] == (at(block, point, 0.25) if asked else -torch.inf)


# -- the budget ------------------------------------------------------------------------------------


def test_what_is_spent_is_what_the_embedding_saw(denoiser):
    pushed = []
    denoiser.model.get_input_embeddings().register_forward_hook(
        lambda module, given, _: pushed.append(given[0].numel())
    )
    text = 4 + 8 + 12 if denoiser.kind == "bd" else 3 * 12  # that the three blocks see
    plain = 12 * denoiser.encode(PROMPTS).attention_mask.sum(1) + 4 * text
    guide = GuideConfig(budget=2, form="faithful")
    every = dict.fromkeys(itertools.product(range(3), (1, 2)), 0.6)
    value = Recorder()
    found = generate_guided(
        denoiser, PROMPTS, settings(), guide, value, bands(every, dict.fromkeys(every, 0.3))
    )
    assert found.token_forwards == sum(pushed)
    assert found.nfe == len(pushed)
    assert (found.spent <= 2 * plain).all()
    assert {j.move for row in found.judgements for j in row} == {"on", "again", "back", "best"}
    # A step of a row computes its prompt and completion, block-causal no more than its own block.
    prompts = denoiser.encode(PROMPTS).attention_mask.sum(1).tolist()
    for row, looks in enumerate(found.judgements):
        columns = [4 * (j.block + 1) if denoiser.kind == "bd" else 12 for j in looks]
        assert found.spent[row] == sum(prompts[row] + width for width in columns)
    # Every pass serves every row that is not done.
    assert found.nfe == max(map(len, found.judgements))


@pytest.mark.parametrize("affordable", [0, 1, 3])
def test_a_spent_budget_takes_up_the_best_attempt(mdm, affordable):
    """Every attempt fails after one step, that is, at the cost of two."""
    width = mdm.encode(PROMPTS[:1]).input_ids.shape[1] + 12
    value = Recorder()
    found = generate_guided(
        mdm,
        PROMPTS[:1],
        settings(stop_at_end=False),
        GuideConfig(budget=(12 + 2 * affordable + 1) / 12, patience=10),
        value,
        bands({(1, 1): 2.0}),
    )
    assert found.spent.tolist() == [(12 + 2 * affordable) * width]
    failed = [m for m in moves(found, 0) if m[2] != "on"]
    assert failed == [(1, 1, "again")] * affordable + [(1, 1, "best")]
    attempts = [(v, text) for (_, block, step, v), text in value.seen if (block, step) == (1, 1)]
    best, kept = max(attempts)
    assert found.values[0, 1, 1].item() == pytest.approx(best)
    written = found.completion_ids[0].tolist()
    assert all(token in (-1, end) for token, end in zip(kept, written, strict=True))


def test_a_budget_of_one_plain_completion_leaves_it_plain(mdm):
    found = generate_guided(
        mdm,
        PROMPTS,
        settings(stop_at_end=False),
        GuideConfig(budget=1),
        Recorder(),
        bands(dict.fromkeys(itertools.product(range(3), (1, 2)), 2.0)),
        generator_for(0, "x"),
    )
    assert {j.move for row in found.judgements for j in row} == {"on", "best"}
    assert found.spent.tolist() == (12 * (mdm.encode(PROMPTS).attention_mask.sum(1) + 12)).tolist()
    plain = generate(mdm, PROMPTS, settings(stop_at_end=False), generator_for(0, "x"))
    assert torch.equal(found.completion_ids, plain.completion_ids)


# -- what it is compared with ----------------------------------------------------------------------


def test_a_permuted_v_keeps_the_schedule(mdm):
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    config = settings(stop_at_end=False)
    guide = GuideConfig(budget=5 / 3)
    thresholds = bands(dict.fromkeys(itertools.product(range(3), (1, 2)), 0.5))
    found = generate_guided(mdm, prompts, config, guide, Recorder(), thresholds)
    permuted = Permuted(found, 4, generator_for(0, "permute"))
    again = generate_guided(
        mdm, prompts, config, guide, permuted, thresholds, generator_for(1, "x")
    )
    source = permuted.source.tolist()
    assert sorted(source) == list(range(8))
    for row, other in enumerate(source):
        assert other != row
        assert other // 4 == row // 4
        assert again.judgements[row] == found.judgements[other]
        assert again.spent[row] == found.spent[other]
    assert not torch.equal(again.completion_ids, found.completion_ids[permuted.source])
    with pytest.raises(ValueError, match="a Permuted of its own for every run"):
        generate_guided(mdm, prompts, config, guide, permuted, thresholds)


def test_stand_ins_for_v(mdm):
    base = generate_guided(mdm, PROMPTS, settings(), GuideConfig(), Recorder())
    prompt = base.values[:, 0, 0]
    found = generate_guided(mdm, PROMPTS, settings(), GuideConfig(), PromptOnly(prompt))
    for row, looks in enumerate(found.judgements):
        assert {j.value for j in looks} == {prompt[row].item()}
    config = settings(stop_at_end=False)
    found = generate_guided(mdm, PROMPTS, config, GuideConfig(), mean_logprob)
    assert (found.values[:, 0, 0] == 0).all()
    revealed = 11 / 12 * found.values[:, 2, 3]  # all but the last token
    assert (found.logprobs.sum(1) / 12 < revealed + 1e-6).all()
    torch.testing.assert_close(
        found.values[:, 1, 0], found.logprobs[:, :4].mean(1).double(), atol=1e-6, rtol=1e-6
    )


def test_the_commonest():
    assert majority(["x", "y", "y", None, None, "z", None, None, None], 3) == [1, 5, 6]
    assert majority(["y", "x", "x", "y"], 4) == [0]
    with pytest.raises(ValueError, match="n=4: expected a divisor of the 6 rows"):
        majority([None] * 6, 4)


def test_what_to_expect_of_the_best_of_n():
    generator = torch.Generator().manual_seed(0)
    scores, rewards = torch.randn(2, 3, 5, generator=generator)
    found = best_of_curve(scores, rewards)
    for n in range(1, 6):
        subsets = torch.tensor(list(itertools.combinations(range(5), n)))  # (S, n)
        best = scores[:, subsets].argmax(-1)  # (3, S)
        drawn = rewards[:, subsets].gather(-1, best[..., None])
        torch.testing.assert_close(found[:, n - 1], drawn.mean((1, 2)).double())
    equal = best_of_curve(torch.ones(1, 2), torch.tensor([[3.0, 5.0]]))
    assert equal.tolist() == [[4.0, 5.0]]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "three_gates"}, "unknown form 'three_gates'"),
        ({"checks": [0.5, 1.0]}, r"checks=\[0.5, 1.0\]: expected shares"),
        ({"checks": []}, r"checks=\[\]: expected shares"),
        ({"budget": 0.99}, "budget=0.99: expected at least 1"),
        ({"patience": 0}, "patience=0: expected at least 1"),
        ({"description_length": -4}, "description_length=-4: expected at least 0"),
        ({"low": -0.1}, "low=-0.1.*expected quantiles"),
        ({"form": "faithful", "low": 0.6}, "low=0.6, high=0.5: expected low <= high"),
        ({"form": "faithful", "patience": 5}, "patience=5 would be ignored with form='faithful'"),
        ({"low": 0.3}, "low=0.3 would be ignored.*description_length=0"),
    ],
)
def test_a_guide_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GuideConfig(**changes)


@pytest.mark.parametrize(
    ("sampler", "guide", "message"),
    [
        ({"cache": "dual"}, {}, "cache=dual: rows at different blocks"),
        ({"cfg_scale": 1.0}, {}, "cfg_scale=1.0: rows at different blocks"),
        ({"revise": 1}, {}, "revise=1: rows at different blocks"),
        ({"steps": None, "threshold": 0.9}, {}, "threshold=0.9: rows at different blocks"),
        ({"temperature": 0.0}, {}, "temperature=0.0: a block drawn again would be the same"),
        ({"steps": 6}, {}, r"checks=\[0.25, 0.5\] of a block of 2 steps come after \[0, 1\]"),
        ({}, {"description_length": 6}, "description_length=6: expected a multiple"),
        ({}, {"description_length": 12}, "description_length=12: expected a multiple"),
        ({}, {"budget": None}, "budget=None: expected what"),
        ({}, {"checks": [0.25]}, r"thresholds of shape \(3, 4\): expected \(3, 3\)"),
    ],
)
def test_what_cannot_be_guided_is_refused(mdm, sampler, guide, message):
    guide = GuideConfig(**{"budget": PLENTY} | guide)
    with pytest.raises(ValueError, match=message):
        generate_guided(mdm, PROMPTS, settings(**sampler), guide, constant, bands({}))


def test_other_input_that_is_refused(ar, mdm):
    guide = GuideConfig(budget=PLENTY)
    with pytest.raises(ValueError, match="kind 'ar' has no denoising steps"):
        generate_guided(ar, PROMPTS, settings(), guide, constant)
    thresholds = calibrate(mdm, OTHERS, settings(stop_at_end=False), guide, constant)
    with pytest.raises(ValueError, match=r"1 of the prompts.*first \['Why\?'\]"):
        generate_guided(mdm, [*PROMPTS, OTHERS[0]], settings(), guide, constant, thresholds)
    with pytest.raises(ValueError, match="expected low <= high"):
        generate_guided(mdm, PROMPTS, settings(), guide, constant, bands({}, {(0, 1): 1.0}))
    with pytest.raises(ValueError, match=r"V returned \[nan.*expected 4 numbers"):
        generate_guided(mdm, PROMPTS, settings(), guide, lambda states: constant(states) / 0 * 0)
    with pytest.raises(ValueError, match="no base rollout reached block 1"):
        values = torch.full((2, 2, 4), torch.nan)
        values[:, 0] = 0.0
        Thresholds.of(values, guide, 4)
    with pytest.raises(ValueError, match="n=1: expected at least 2"):
        base = generate_guided(mdm, PROMPTS, settings(), guide, constant)
        Permuted(base, 1, generator_for(0, "x"))


# -- in training -----------------------------------------------------------------------------------


def test_the_recorded_path_is_that_of_the_attempts_that_were_kept(denoiser):
    """Scored again state by state it has the probabilities that its tokens were drawn with."""
    guide, length = GuideConfig(budget=PLENTY), {"end_last": False, "stop_at_end": False}
    sampler, value, prompts = settings(**length), Recorder(), PROMPTS[:2] * 3
    asked = denoiser, prompts, sampler, guide, value, bands({(0, 1): 0.6, (1, 2): 0.7, (2, 1): 0.6})
    output = generate_guided(*asked, generator_for(0, "x"), record=True)
    assert {judgement.move for row in output.judgements for judgement in row} > {"again", "back"}
    rollout = Rollout.of(output, torch.zeros(6), torch.ones(6, dtype=torch.bool), sampler)
    assert (rollout.revealed_at.sort(1).values == torch.arange(12)).all()
    rollout.rewards = torch.zeros(6)
    assert score_episodes(denoiser, rollout, 24, reference=False).max_logprob_mismatch < 1e-4
    drawn = Guided(value=Recorder(), guide=guide, thresholds=asked[-1])
    again = drawn(denoiser, prompts, sampler, generator_for(0, "x"), record=True)
    assert torch.equal(again.sequences, output.sequences)
    greedy = sampler.replace(temperature=0.0)
    plain = generate(denoiser, prompts, greedy)
    assert torch.equal(drawn(denoiser, prompts, greedy).sequences, plain.sequences)
    with pytest.raises(ValueError, match="expected 0; no order is kept"):
        drawn(denoiser, prompts, sampler.replace(order_temperature=0.5), record=True)
