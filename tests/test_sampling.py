"""Samplers against plain loops, transformers' own `generate`, and the laws they must keep."""

import math

import pytest
import torch
from scipy import stats
from transformers import TopKLogitsWarper, TopPLogitsWarper

from mdmrl.config import InputError
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.choose import (
    by_race,
    by_sums,
    choose,
    draw_tokens,
    keep_most_probable,
    likeliest,
)
from mdmrl.sampling.schedule import evenly, revealed_after

PROMPTS = [
    "Which test is decisive?",
    "A patient has fever, rash and joint pain. What is the most likely diagnosis?",
    "x",
    "Someone comes in with weight loss and a tremor. Where does the problem lie?",
]


def settings(**changes):
    return SamplerConfig(**{"max_new_tokens": 12, "steps": 5} | changes)


def fitting(policy, **changes):
    """`settings` without what would be ignored."""
    return settings(**({} if policy.denoises else {"steps": None}) | changes)


def double(policy):
    """Body in float64, so that the shape of a batch flips no near-tie; the head stays float32."""
    policy.model.double()
    policy.model.lm_head.float()
    return policy


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_prompt_is_untouched(policy, temperature):
    given = policy.encode(PROMPTS)
    found = generate(policy, PROMPTS, fitting(policy, temperature=temperature))
    width = given.input_ids.shape[1]
    assert torch.equal(found.sequences[:, :width], given.input_ids)
    assert torch.equal(found.prompt_mask, given.attention_mask)
    assert torch.equal(found.sequences[:, width:], found.completion_ids)
    assert found.completion_ids.shape == (4, 12)
    assert len(found.completions) == 4


@pytest.mark.parametrize(("length", "steps"), [(12, 12), (12, 5), (12, 1), (7, 3), (1, 1)])
def test_quotas_are_even_and_spend_the_remainder_first(length, steps):
    quota = evenly(length, steps)
    assert sum(quota) == length
    assert len(quota) == steps
    assert quota == sorted(quota, reverse=True)
    assert quota[0] - quota[-1] <= 1


SIZES = {
    "doubling": ({"step_sizes": "ascending"}, [1, 2, 4, 5]),
    "doubling in few steps": ({"step_sizes": "ascending", "steps": 3}, [1, 2, 9]),
    "one step": ({"step_sizes": "ascending", "steps": 1}, [12]),
    "doubling in blocks": ({"step_sizes": "ascending", "block_length": 6}, [1, 2, 3] * 2),
    "doubling, uneven blocks": (
        {"step_sizes": "ascending", "block_length": 6, "steps": 5},
        [1, 2, 3, 1, 5],
    ),
    "a list": ({"step_sizes": [2, 7, 3]}, [2, 7, 3]),
    "a list of blocks": ({"step_sizes": (3, 1), "block_length": 4, "steps": 6}, [3, 1] * 3),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_reveal_as_many_positions_as_their_sizes_say(mdm, case, temperature):
    asked, expected = SIZES[case]
    config = settings(**{"steps": None, "temperature": temperature, "stop_at_end": False} | asked)
    assert config.denoising_steps == len(expected)
    found = generate(mdm, PROMPTS, config, record=True)
    counts = [torch.bincount(step.rows, minlength=4).tolist() for step in found.trajectory]
    assert counts == [[size] * 4 for size in expected]
    assert found.nfe == len(expected)
    assert revealed_once(found)


REFUSED_SIZES = {
    "unknown": ({"step_sizes": "descending"}, "did you mean 'ascending'"),
    "another sum": ({"step_sizes": [5, 5], "steps": None}, r"\[5, 5\]: .* add up to .* 12"),
    "another block": ({"step_sizes": [6, 6], "steps": None, "block_length": 6}, "block of 6"),
    "none": ({"step_sizes": [0, 12], "steps": None}, "at least 1"),
    "empty": ({"step_sizes": [], "steps": None}, "add up to"),
    "no number": ({"step_sizes": ["many"], "steps": None}, "step_sizes='many'"),
    "other steps": ({"step_sizes": [6, 6], "steps": 3}, "make 2 steps"),
    "more steps than doublings": ({"step_sizes": "ascending", "steps": 5}, "at most 4 steps"),
    "the text decides": (
        {"step_sizes": "ascending", "steps": None, "threshold": 0.9},
        "leave step_sizes out",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SIZES)
def test_sizes_of_steps_that_do_not_fit_are_refused(case):
    asked, said = REFUSED_SIZES[case]
    with pytest.raises(InputError, match=said):
        settings(**asked)


def test_where_fewer_positions_are_asked_the_last_steps_go_without():
    asked = torch.tensor([12, 5, 3, 0])
    expected = {
        "equal": [[4, 2, 1, 0], [8, 4, 2, 0], [12, 5, 3, 0]],
        "ascending": [[1, 1, 1, 0], [3, 3, 3, 0], [12, 5, 3, 0]],
        (2, 6, 4): [[2, 2, 2, 0], [8, 5, 3, 0], [12, 5, 3, 0]],
    }
    for sizes, after in expected.items():
        assert revealed_after(sizes, asked, 3).tolist() == after


@pytest.mark.parametrize("steps", [1, 5, 12, None])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_step_reveals_its_quota_and_each_position_once(mdm, steps, remasking, temperature):
    config = settings(steps=steps, remasking=remasking, temperature=temperature)
    found = generate(mdm, PROMPTS, config, record=True)
    steps = steps or 6
    counts = [torch.bincount(step.rows, minlength=4).tolist() for step in found.trajectory]
    assert counts == [[quota] * 4 for quota in evenly(12, steps)]
    assert revealed_once(found)
    for step in found.trajectory:
        at = step.rows, step.positions
        assert torch.equal(found.completion_ids[at], step.tokens)
        assert torch.equal(found.logprobs[at], step.logprobs)
    assert (found.logprobs <= 0).all()
    assert found.nfe == steps
    assert found.token_forwards == steps * found.sequences.numel()


def revealed_once(output):
    """Whether the trajectory reveals every position of the completion exactly once."""
    times = torch.zeros(output.completion_ids.shape, dtype=torch.long)
    for step in output.trajectory:
        times.index_put_((step.rows, step.positions), torch.ones(()).long(), accumulate=True)
    return bool((times == 1).all())


def replay(output, mask_token_id):
    """The recorded trajectory again: the completion each step saw, (B, L), and the step."""
    completion = output.completion_ids.masked_fill(output.asked, mask_token_id)
    for step in output.trajectory:
        completion[tuple(step.remasked)] = mask_token_id
        yield completion.clone(), step
        completion[step.rows, step.positions] = step.tokens


def mask_lover(mdm):
    """About half of the positions, whatever the canvas, prefer [MASK] to any other token."""
    with torch.no_grad():
        mdm.model.lm_head.weight[mdm.mask_token_id] *= 100
    return mdm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_masks_are_left_only_where_they_may_be_drawn(mdm, temperature, remasking):
    mask_lover(mdm)
    config = settings(temperature=temperature, remasking=remasking)
    suppressed = generate(mdm, PROMPTS, config)
    assert not (suppressed.completion_ids == mdm.mask_token_id).any()
    config = config.replace(suppress_mask=False)
    free = generate(mdm, PROMPTS, config, record=True)
    left = free.completion_ids == mdm.mask_token_id
    assert left.any()
    assert not left.all()
    assert "<|mask|>" not in "".join(free.completions)
    # A [MASK] that was drawn is committed like any token: every position is still revealed once.
    assert revealed_once(free)


@pytest.mark.parametrize("suppress_mask", [True, False])
def test_a_batch_gives_what_each_prompt_gives_alone(policy, suppress_mask):
    double(policy)
    changes = {"steps": 12, "suppress_mask": suppress_mask} if policy.denoises else {}
    config = fitting(policy, **changes)
    together = generate(policy, PROMPTS, config)
    assert not together.prompt_mask.all()
    for row, prompt in enumerate(PROMPTS):
        alone = generate(policy, [prompt], config)
        assert torch.equal(together.completion_ids[row], alone.completion_ids[0])
        assert together.completions[row] == alone.completions[0]
        torch.testing.assert_close(together.logprobs[row], alone.logprobs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_the_generator_decides_and_nothing_global_moves(policy, remasking, rng_untouched):
    changes = {"remasking": remasking} if policy.denoises else {}
    config = fitting(policy, temperature=1.0, **changes)

    def text(seed):
        return generate(policy, PROMPTS, config, generator_for(seed, "test")).completions

    assert text(0) == text(0)
    assert text(0) != text(1)
    assert (
        generate(policy, PROMPTS, config).completions
        == generate(policy, PROMPTS, config).completions
    )


# -- against transformers --------------------------------------------------------------------------


def ender(ar, strength):
    """Make the end token likelier, so that rows end at different places."""
    with torch.no_grad():
        ar.model.lm_head.weight[ar.tokenizer.eos_token_id] *= strength
    return ar


def test_greedy_left_to_right_equals_transformers(ar):
    ender(ar, 4)
    found = generate(ar, PROMPTS, fitting(ar, max_new_tokens=40))
    given = ar.encode(PROMPTS)
    expected = ar.model.generate(
        input_ids=given.input_ids,
        attention_mask=given.attention_mask.long(),
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=ar.pad_token_id,
        eos_token_id=ar.tokenizer.eos_token_id,
    )
    ended = found.completion_mask.sum(1)
    assert ended.min() < ended.max()  # rows end at different places
    assert torch.equal(found.sequences[:, : expected.shape[1]], expected)
    assert (found.sequences[:, expected.shape[1] :] == ar.pad_token_id).all()
    assert found.nfe == ended.max()
    width = given.input_ids.shape[1]
    assert found.token_forwards == 4 * (width + found.nfe - 1)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_left_to_right_probabilities_are_those_of_a_whole_forward(ar, temperature):
    ender(ar, 2)
    found = generate(ar, PROMPTS, fitting(ar, temperature=temperature))
    rows = zip(found.sequences, found.prompt_mask, found.completion_mask, strict=True)
    for row, (ids, seen, written) in enumerate(rows):
        keep = torch.cat([seen, written])
        logits = ar.model(input_ids=ids[keep][None]).logits[0, :-1]
        logp = (logits / (temperature or 1)).log_softmax(-1)
        expected = logp.gather(1, ids[keep][1:, None])[-int(written.sum()) :, 0]
        torch.testing.assert_close(found.logprobs[row][written], expected, atol=1e-4, rtol=1e-4)
        assert (found.logprobs[row][~written] == 0).all()
        assert (found.completion_ids[row][~written] == ar.pad_token_id).all()


def test_texts_stop_at_the_end_token(policy):
    ender(policy, {"ar": 10, "mdm": 5}[policy.kind])
    config = fitting(policy, temperature=1.0, max_new_tokens=24)
    found = generate(policy, PROMPTS, config.replace(steps=24 if policy.denoises else None))
    end = policy.tokenizer.eos_token_id
    lengths = found.completion_mask.sum(1)
    assert lengths.max() > 1
    assert lengths.min() < 24
    for row, ids in enumerate(found.token_lists()):
        before = found.completion_ids[row].tolist()
        expected = before[: before.index(end) + 1] if end in before else before
        assert ids == expected
        text = policy.tokenizer.decode(expected, skip_special_tokens=True)
        assert found.completions[row] == text


# -- randomness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, 0.5])
    n = 20_000
    config = settings(temperature=temperature)
    tokens, logprobs = draw_tokens(logits.repeat(n, 1), config, generator_for(0, "draw"))
    weights = [2.718281828459045 ** (x / temperature) for x in logits.tolist()]
    expected = torch.tensor(weights, dtype=torch.float64)
    expected = expected / expected.sum()
    counts = torch.bincount(tokens, minlength=6)
    assert counts[4] == 0
    seen = [0, 1, 2, 3, 5]
    assert stats.chisquare(counts[seen], (expected * n)[seen]).pvalue > 1e-3
    torch.testing.assert_close(logprobs, expected.log()[tokens].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("draw_in_proportion", [by_sums, by_race])
@pytest.mark.parametrize("size", [2, 63, 64, 65, 1000])
def test_draws_in_proportion_follow_their_weights_whatever_the_size(size, draw_in_proportion):
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(size, generator=generator) ** 4
    weights[torch.rand(size, generator=generator) < 0.3] = 0
    weights[-1] = 1
    n = 50_000
    index, total = draw_in_proportion(weights.expand(n, -1), generator_for(0, "draw"))
    counts = torch.bincount(index, minlength=size)
    assert len(counts) == size
    assert (counts[weights == 0] == 0).all()
    torch.testing.assert_close(total.double(), weights.double().sum().expand(n), rtol=1e-6, atol=0)
    seen = weights > 0
    expected = (weights / weights.sum() * n)[seen].double()
    assert stats.chisquare(counts[seen], expected / expected.sum() * n).pvalue > 1e-3


@pytest.mark.parametrize(
    "draw_in_proportion", [by_sums, pytest.param(by_race, marks=pytest.mark.slow)]
)
def test_draws_reach_the_tail_of_a_large_vocabulary(draw_in_proportion):
    """A float32 cumulative sum over the whole row would stand still after the first token."""
    weights = torch.full((1, 2**18), 0.99 * 2.0**-24)
    weights[:, 0] = 1
    generator = generator_for(0, "draw")
    drawn = [draw_in_proportion(weights.expand(100, -1), generator)[0] for _ in range(20)]
    beyond = int((torch.cat(drawn) > 0).sum())
    share = 1 - 1 / weights.double().sum().item()
    assert share > 0.015
    assert stats.binomtest(beyond, 2000, share).pvalue > 1e-3


def test_a_draw_at_temperature_zero_is_the_best_token():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw_tokens(logits.clone(), settings(), generator_for(0, "draw"))
    assert tokens.tolist() == [max(range(9), key=row.__getitem__) for row in logits.tolist()]
    torch.testing.assert_close(logprobs, logits.softmax(-1).max(-1).values.log())


@pytest.mark.parametrize(
    "changes",
    [{}, {"threshold": 0.4, "steps": None}, {"entropy_bound": 1.1, "steps": None}],
    ids=str,
)
def test_positions_are_chosen_by_turn_then_score_then_place(changes):
    """Against Python's sort, with scores that are equal, infinite, or differ in the last digit."""
    config, generator = settings(**changes), torch.Generator().manual_seed(0)
    least = torch.finfo(torch.float32).eps
    for _ in range(50):
        open_ = torch.rand(5, 9, generator=generator) < 0.7
        open_[:, 4] = True
        n = int(open_.sum())
        grid = torch.tensor([-torch.inf, -2.0, -0.9, -0.9 + least, -1e-7, 0.0])
        scores = grid[torch.randint(6, (n,), generator=generator)]
        postponed = torch.rand(n, generator=generator) < 0.4
        entropies = torch.tensor([1e-9, 0.3, 1.0])[torch.randint(3, (n,), generator=generator)]
        quota = torch.randint(1, 4, (5,), generator=generator)
        found = torch.zeros_like(open_)
        found[open_] = choose(scores, postponed, entropies, open_, quota, config)
        rows, columns = (x.tolist() for x in open_.nonzero(as_tuple=True))
        for row in range(5):
            mine = [i for i in range(n) if rows[i] == row]
            first = [i for i in mine if not postponed[i]] or mine
            ranked = sorted(mine, key=lambda i: (i not in first, -scores[i].item(), columns[i]))
            if config.threshold is not None:
                sure = [i for i in first if scores[i].exp() >= config.threshold]
                expected = {ranked[0], *sure}
            elif config.entropy_bound is not None:
                spent = [[entropies[j].item() for j in ranked[: k + 1]] for k in range(len(first))]
                fits = [math.fsum(e) - max(e) <= config.entropy_bound for e in spent]
                expected = set(ranked[: sum(fits)])
            else:
                expected = set(ranked[: quota[row]])
            assert {columns[i] for i in expected} == set(found[row].nonzero()[:, 0].tolist())


def test_an_entropy_bound_counts_what_is_small():
    """The sum without the largest, though beside that it vanishes in float32."""
    config = settings(entropy_bound=0.0, steps=None)
    scores, entropies = torch.tensor([0.0, -1.0]), torch.tensor([1e-9, 1.0])
    one = torch.ones(1, 2, dtype=torch.bool)
    found = choose(scores, scores > 1, entropies, one, torch.ones(1), config)
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_likeliest_token_is_known_whatever_was_drawn(temperature):
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    draw_tokens(logits, settings(temperature=temperature), generator_for(0, "draw"))
    found = likeliest(logits, torch.tensor([1, 4]))
    assert found.equal((best == 1) | (best == 4))
    assert 0 < found.sum() < 200


def test_random_remasking_reveals_every_position_equally_often(mdm):
    config = SamplerConfig(max_new_tokens=6, steps=6, remasking="random")
    counts = torch.zeros(6)
    for seed in range(3):
        found = generate(mdm, ["x"] * 100, config, generator_for(seed, "uniform"), record=True)
        counts += torch.bincount(found.trajectory[0].positions, minlength=6)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.6), (3, 1.0), (4, 0.5), (1, 0.1), (50, 1.0)])
def test_filters_are_those_of_transformers(top_k, top_p):
    logits = 2 * torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    expected = logits
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected)
    found = keep_most_probable(logits, top_k, top_p)
    torch.testing.assert_close(found, expected)
    assert found.isinf().any() == ((top_k or 9) < 9 or top_p < 1)


def test_filters_follow_the_temperature_and_count_in_the_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(2000, 1)
    config = settings(temperature=0.5, top_k=2)
    tokens, logprobs = draw_tokens(logits, config, generator_for(0, "draw"))
    first = 1 / (1 + 2.718281828459045**-2)
    assert tokens.max() == 1
    assert (tokens == 0).float().mean().item() == pytest.approx(first, abs=0.03)
    expected = torch.tensor([first, 1 - first]).log()[tokens]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0: expected 1 to max_new_tokens=12"),
        ({"steps": 13}, r"steps=13: expected 1 to max_new_tokens=12"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"remasking": "low_confidance"}, "did you mean 'low_confidence'"),
        ({"block_length": 5}, "block_length=5: expected a divisor of max_new_tokens=12"),
        ({"block_length": 0}, "block_length=0"),
        ({"block_length": 2}, "steps=5: expected at least 6, one for each block of 2"),
        ({"threshold": 0.0, "steps": None}, r"threshold=0.0: expected \(0, 1\]"),
        ({"threshold": 1.1, "steps": None}, r"threshold=1.1: expected \(0, 1\]"),
        ({"threshold": 0.9}, "with steps=5"),
        ({"entropy_bound": 0.1, "revise": 1, "steps": None}, "revise=1"),
        ({"entropy_bound": 0.1, "threshold": 0.9, "steps": None}, "expected only one of them"),
        ({"entropy_bound": -0.1, "steps": None}, "entropy_bound=-0.1"),
        ({"entropy_bound": "inf", "steps": None}, "entropy_bound=inf: .*at most"),
        ({"threshold": 0.9, "steps": None, "remasking": "margin"}, "a threshold is a probability"),
        ({"top_p": 0.0}, r"top_p=0.0: expected \(0, 1\]"),
        ({"top_k": 0}, "top_k=0"),
        ({"cfg_scale": -1}, "cfg_scale=-1"),
        ({"revise": -1}, "revise=-1"),
        ({"order_temperature": -1, "remasking": "state_confidence"}, "order_temperature=-1"),
        ({"order_temperature": 1.0, "end_last": False}, "remasking='state_confidence'"),
        ({"order_temperature": 1.0, "remasking": "state_confidence"}, "end_last=False"),
        ({"cache": "duel"}, "did you mean 'dual'"),
        ({"cache_refresh": 2}, "cache_refresh=2 with cache=None"),
        ({"cache": "dual", "cache_refresh": 0}, "cache_refresh=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": "nan"}, "temperature=nan"),
        ({"temperature": "inf"}, "temperature=inf"),
        ({"top_k": 5}, "top_k=5, top_p=1.0 would be ignored: at temperature=0"),
        ({"top_p": 0.9}, "top_k=None, top_p=0.9 would be ignored: at temperature=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_steps_default_to_half_the_tokens():
    assert [SamplerConfig(max_new_tokens=n).denoising_steps for n in (1, 2, 7)] == [1, 1, 4]


def test_a_prompt_that_leaves_no_room_is_refused_before_any_work(policy, monkeypatch):
    monkeypatch.setattr(policy, "hidden_states", None)  # a forward pass would fail
    with pytest.raises(ValueError, match="context of 512"):
        generate(policy, ["1" * 600], fitting(policy))
