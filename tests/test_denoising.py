"""Every way to denoise against one plain loop, and what caches, blocks and gaps must keep.

The loop is the textbook's: one row at a time without padding, the full canvas through the network
and the head at each step, a softmax everywhere, Python's sort.
"""

import itertools
import math

import pytest
import torch
from test_sampling import PROMPTS, double, ender, mask_lover, replay, revealed_once

from mdmrl.config import InputError
from mdmrl.sampling import SamplerConfig, generate, infill, windows
from mdmrl.sampling.choose import keep_most_probable
from mdmrl.sampling.denoise import evenly
from mdmrl.sampling.windows import Window


def settings(**changes):
    return SamplerConfig(**{"max_new_tokens": 12, "steps": 6} | changes)


def run(policy, prompts, **changes):
    return generate(policy, prompts, settings(**changes), record=True)


def softmax_of(policy, ids, prompt, config):
    """Probabilities (W, V) on a full canvas, guidance and the family's attention included."""
    if policy.kind == "bd":
        block = torch.tensor([0] * prompt + [1 + i // 4 for i in range(len(ids) - prompt)])
        sees = (block[:, None] >= block)[None, None]
        where = {"attention_mask": sees, "position_ids": torch.arange(len(ids))[None]}
    else:
        where = {}

    def logits(canvas):
        hidden = policy.model.model(input_ids=canvas[None], **where).last_hidden_state[0]
        return policy.model.lm_head(hidden.float())

    found = logits(ids)
    if config.cfg_scale:
        blank = ids.clone()
        blank[:prompt] = policy.mask_token_id
        found = logits(blank) + (1 + config.cfg_scale) * (found - logits(blank))
    if config.suppress_mask:
        found[:, policy.mask_token_id] = -torch.inf
    return found.softmax(-1)


def plain(policy, ids, config, todo=None):
    """Token ids after plain denoising at temperature 0, and the number of forward passes."""
    mask, ends = policy.mask_token_id, policy.end_token_ids
    prompt = len(ids)
    canvas = torch.tensor(ids + [mask] * config.max_new_tokens)
    size = config.block_length or config.max_new_tokens
    passes, stopped = 0, False
    steps = evenly(config.denoising_steps, config.max_new_tokens // size)
    for block, block_steps in enumerate(steps):
        if stopped:
            break
        columns = range(prompt + block * size, prompt + (block + 1) * size)
        todo, sure = set(columns), {}
        targets = list(itertools.accumulate(evenly(size, block_steps)))
        for target in itertools.count() if config.parallel else targets:
            if not todo:
                break
            passes += 1
            if config.revise:
                for i in sorted(sure, key=lambda i: (sure[i], i))[: config.revise]:
                    del sure[i]
                    canvas[i] = mask
                    todo.add(i)
            seen = columns[-1] + 1 if policy.kind == "bd" else len(canvas)
            p = softmax_of(policy, canvas[:seen], prompt, config)
            best, token = p.max(-1)
            top = p.topk(2).values
            entropies = -(p * p.clamp(min=1e-30).log()).sum(-1)
            score = {
                "low_confidence": best,
                "state_confidence": best,
                "margin": top[:, 0] - top[:, 1],
                "entropy": -entropies,
                "sequential": -torch.arange(seen),
            }[config.remasking]
            ending = [i for i in todo if config.end_last and token[i].item() in ends]
            first = todo - set(ending) or todo
            ranked = sorted(todo, key=lambda i: (i not in first, -score[i].item(), i))
            if config.threshold is not None:
                chosen = ranked[:1] + [
                    i for i in ranked[1:] if i in first and best[i] >= config.threshold
                ]
            elif config.entropy_bound is not None:
                ranked = [i for i in ranked if i in first]
                chosen = []
                for i in ranked:
                    spent = [entropies[j].item() for j in [*chosen, i]]
                    if sum(spent) - max(spent) > config.entropy_bound:
                        break
                    chosen.append(i)
            else:
                chosen = ranked[: target - (size - len(todo))]
            for i in chosen:
                canvas[i] = token[i]
                sure[i] = best[i].item()
            todo -= set(chosen)
        stopped = any(canvas[i].item() in ends for i in columns)
    return canvas[prompt:], passes


VARIANTS = [
    {"steps": 1},
    {"steps": 5},
    {"steps": 12},
    {"steps": 5, "suppress_mask": False},
    {"steps": 5, "end_last": False},
    {"remasking": "state_confidence"},
    {"remasking": "margin"},
    {"remasking": "entropy"},
    {"remasking": "sequential"},
    {"block_length": 4},
    {"block_length": 4, "steps": 4},
    {"block_length": 6, "end_last": False, "remasking": "margin"},
    {"block_length": 12},
    {"revise": 1},
    {"revise": 2, "block_length": 6},
    {"threshold": 0.3, "steps": None},
    {"threshold": 1.0, "steps": None},
    {"threshold": 0.2, "steps": None, "remasking": "state_confidence", "block_length": 6},
    {"entropy_bound": 2.0, "steps": None, "remasking": "entropy"},
    {"entropy_bound": 0.0, "steps": None},
    {"entropy_bound": 3.0, "steps": None, "block_length": 6},
    {"cfg_scale": 0.7},
    {"cfg_scale": 0.7, "block_length": 4},
]


def fits(family, changes):
    """A block diffusion policy has blocks of 4, and 12 positions need 3 steps."""
    steps = changes.get("steps") or 12
    return family == "mdm" or (changes.get("block_length", 4) == 4 and steps >= 3)


CASES = [(family, c) for family in ("mdm", "bd") for c in VARIANTS if fits(family, c)]


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
@pytest.mark.parametrize("endings", [False, True])
def test_denoising_equals_the_plain_loop(family, changes, endings, request):
    policy = double(request.getfixturevalue(family))
    if changes.get("suppress_mask") is False:
        mask_lover(policy)
    if endings:
        ender(policy, 4)
    found = run(policy, PROMPTS, **changes)
    if family == "bd":
        changes = changes | {"block_length": 4}
    config = settings(**changes)
    most = 0
    for row, prompt in enumerate(PROMPTS):
        ids = policy.tokenizer(f"<|user|>{prompt}<|assistant|>").input_ids
        expected, passes = plain(policy, ids, config)
        written = found.completion_mask[row]
        assert torch.equal(found.completion_ids[row][written], expected[written])
        most = max(most, passes)
    assert endings or found.nfe >= most  # the plain loop writes a block to its end
    assert found.exact == (not config.parallel)


# -- blocks, ends, dropped rows --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mdm", "bd"])
@pytest.mark.parametrize("block_length", [4, None])
def test_rows_end_with_their_text(family, block_length, request):
    policy = ender(request.getfixturevalue(family), 4)
    options = {"max_new_tokens": 24, "steps": 24, "block_length": block_length, "temperature": 1.0}
    found = run(policy, PROMPTS * 4, **options)
    written = found.completion_mask.sum(1)
    assert written.min() < 20  # some rows end blocks early
    assert found.optimisations["rows end with their text"] == "exact"
    assert found.optimisations["finished rows dropped"] == "exact"
    for row, count in enumerate(written.tolist()):
        steps = [set(s.positions[s.rows == row].tolist()) for s in found.trajectory]
        steps = [step for step in steps if step]
        revealed = set.union(*steps)
        assert revealed >= set(range(count))
        assert min(steps[-1]) < count  # until this step the text was not final
        blank = sorted(set(range(24)) - revealed)
        assert (found.completion_ids[row, blank] == policy.pad_token_id).all()
    whole = run(policy, PROMPTS * 4, **options, stop_at_end=False)
    assert revealed_once(whole)
    assert whole.token_forwards > found.token_forwards


def test_blocks_are_revealed_from_left_to_right(mdm):
    found = run(mdm, PROMPTS, block_length=4, steps=7, temperature=1.0, stop_at_end=False)
    blocks = [set((step.positions // 4).tolist()) for step in found.trajectory]
    assert blocks == [{0}] * 3 + [{1}] * 2 + [{2}] * 2  # seven steps over three blocks
    assert found.nfe == 7


def test_parallel_decoding_drops_rows_that_are_done(mdm):
    found = run(mdm, PROMPTS, threshold=0.1, steps=None)
    rows = [len(step.rows.unique()) for step in found.trajectory]
    assert rows[0] == 4
    assert rows[-1] < 4
    assert rows == sorted(rows, reverse=True)
    assert found.token_forwards == sum(rows) * found.sequences.shape[1]
    assert revealed_once(found)


def test_the_highest_threshold_reveals_one_token_a_step(mdm):
    found = run(mdm, PROMPTS, threshold=1.0, steps=None)
    assert [step.rows.tolist() for step in found.trajectory] == [[0, 1, 2, 3]] * 12


def test_a_generous_entropy_bound_reveals_everything_at_once(mdm):
    assert run(mdm, PROMPTS, entropy_bound=1e3, steps=None, end_last=False).nfe == 1


# -- revising --------------------------------------------------------------------------------------


def test_revised_tokens_are_the_least_probable_and_are_revealed_again(mdm):
    found = run(mdm, PROMPTS, revise=2, steps=6, temperature=1.0)
    shown = torch.zeros(4, 12, dtype=torch.bool)
    sure = torch.full((4, 12), math.inf)
    for index, (step, target) in enumerate(zip(found.trajectory, range(2, 13, 2), strict=True)):
        rows, positions = step.remasked
        assert rows.tolist() == ([] if index == 0 else [0, 0, 1, 1, 2, 2, 3, 3])
        if index:
            least = sure.topk(2, largest=False).values.sum(1)
            again = torch.zeros(4).index_add(0, rows, sure[rows, positions])
            torch.testing.assert_close(again, least)
        shown[rows, positions], sure[rows, positions] = False, math.inf
        shown[step.rows, step.positions] = True
        sure[step.rows, step.positions] = step.logprobs
        assert (shown.sum(1) == target).all()
    assert shown.all()
    torch.testing.assert_close(found.logprobs, sure)


# -- trajectories ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "changes",
    [{}, {"remasking": "random"}, {"block_length": 4}, {"revise": 2}, {"top_k": 5, "top_p": 0.8}],
    ids=str,
)
def test_a_trajectory_can_be_replayed(mdm, temperature, changes):
    """At every step the recorded probabilities are the model's on the canvas of that step."""
    ender(mdm, 3)
    if not temperature:  # nothing is filtered
        changes = {k: v for k, v in changes.items() if k not in ("top_k", "top_p")}
    found = run(mdm, PROMPTS, temperature=temperature, **changes)
    width = found.prompt_mask.shape[1]
    attention = torch.cat([found.prompt_mask, torch.ones(4, 12, dtype=torch.bool)], 1)
    completion = None
    for completion, step in replay(found, mdm.mask_token_id):
        canvas = torch.cat([found.sequences[:, :width], completion], 1)
        assert (completion[step.rows, step.positions] == mdm.mask_token_id).all()
        logits = mdm.logits(canvas, attention)[:, width:][step.rows, step.positions]
        logits[:, mdm.mask_token_id] = -torch.inf
        if temperature:
            logits = keep_most_probable(
                logits / temperature, changes.get("top_k"), changes.get("top_p", 1.0)
            )
        expected = logits.log_softmax(-1).gather(1, step.tokens[:, None])[:, 0]
        torch.testing.assert_close(step.logprobs, expected, atol=1e-4, rtol=1e-4)
    completion[step.rows, step.positions] = step.tokens
    behind = completion == mdm.mask_token_id  # an early end
    assert torch.equal(completion[~behind], found.completion_ids[~behind])
    assert (found.completion_ids[behind] == mdm.pad_token_id).all()
    assert not (behind & found.completion_mask).any()


# -- caches ----------------------------------------------------------------------------------------


def forwards(policy, prompt, length, steps, block_length, **changes):
    config = SamplerConfig(
        max_new_tokens=length, steps=steps, block_length=block_length, stop_at_end=False, **changes
    )
    found = generate(policy, ["1" * (prompt - 2)], config)  # a token a digit, and two of the chat
    assert found.prompt_mask.shape[1] == prompt
    return found.nfe, found.token_forwards


@pytest.mark.parametrize(
    ("steps", "cache", "expected"),
    [
        (128, None, 49_152),
        (128, "prefix", 20_352),
        (128, "dual", 6_912),
        (256, "prefix", 38_784),
        (256, "dual", 11_008),
    ],
)
def test_caches_cost_what_arithmetic_says(mdm, steps, cache, expected):
    """Prompt 128, 256 new tokens, blocks of 32."""
    assert forwards(mdm, 128, 256, steps, 32, cache=cache) == (steps, expected)


def test_the_exact_block_cache_computes_every_block_once_more_when_it_is_clean(bd):
    """Prompt with the first block, then each finished block with the next; else the block alone."""
    blocks, steps = 16, 64
    expected = 20 + 4 + (blocks - 1) * (4 + 4) + (steps - blocks) * 4
    assert forwards(bd, 20, 64, steps, None) == (steps, expected)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", ["mdm", "shifted"])
def test_a_cache_refreshed_at_every_step_is_no_cache(mdm, cache, family):
    mdm.logit_shift = family == "shifted"
    double(mdm)
    options = {"block_length": 4, "steps": 12, "stop_at_end": False}
    fresh = run(mdm, PROMPTS, cache=cache, cache_refresh=1, **options)
    without = run(mdm, PROMPTS, **options)
    assert torch.equal(fresh.sequences, without.sequences)
    assert fresh.token_forwards == without.token_forwards
    assert without.exact
    assert not fresh.exact
    assert fresh.optimisations[f"{cache} cache"] == "approximate"


@torch.no_grad()
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_window_is_the_network_with_stale_keys_elsewhere(mdm, cache):
    """Columns outside the window keep the keys and values of the canvas of the last refresh.

    With one layer keys and values come from the embeddings alone, so the same is had without a
    cache: by attending to the stale tokens' embeddings.
    """
    mdm.model.model.layers = mdm.model.model.layers[:1]
    double(mdm)
    given = mdm.encode(PROMPTS[:1])
    before = torch.cat([given.input_ids, torch.full((1, 12), mdm.mask_token_id)], 1)
    width, w = given.input_ids.shape[1], before.shape[1]
    window = Window(mdm, torch.ones(1, w, dtype=torch.bool), width, cache)
    a, b = width + 4, width + 8
    rows = torch.arange(1)
    window.hidden(before, rows, a, b, fresh=True)
    after = before.clone()
    after[0, [width, a + 1, b + 2]] = torch.tensor([77, 88, 99])  # before, inside, behind
    found = window.hidden(after, rows, a, b, fresh=False)
    seen = before.clone()
    stop = b if cache == "dual" else w
    seen[:, a:stop] = after[:, a:stop]
    torch.testing.assert_close(found, mdm.hidden_states(seen)[:, a:b])
    assert (found - mdm.hidden_states(after)[:, a:b]).abs().max() > 1e-3


OPTIONS = [
    {},
    {"block_length": 4},
    {"block_length": 4, "cache": "prefix"},
    {"block_length": 4, "cache": "dual"},
    {"block_length": 4, "cache": "dual", "cache_refresh": 2},
    {"threshold": 0.3, "steps": None, "block_length": 6, "cache": "dual"},
    {"threshold": 0.3, "steps": None, "block_length": 6, "cache": "prefix"},
    {"cfg_scale": 0.5, "block_length": 4, "cache": "dual"},
    {"cfg_scale": 0.5, "block_length": 4, "cache": "prefix"},
    {"revise": 1, "remasking": "margin"},
    {"revise": 1, "block_length": 4, "cache": "prefix"},
    {"remasking": "entropy"},
    {"remasking": "sequential"},
    {"remasking": "state_confidence"},
    {"entropy_bound": 2.0, "steps": None},
    {"entropy_bound": 2.0, "steps": None, "block_length": 6, "cache": "dual"},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["mdm", "shifted", "bd"])
def test_a_padded_batch_gives_every_row_what_it_gives_alone(family, changes, request):
    policy = double(request.getfixturevalue("bd" if family == "bd" else "mdm"))
    policy.logit_shift = family == "shifted"
    if family == "bd":
        changes = {k: v for k, v in changes.items() if k not in ("block_length", "cache")}
        changes.pop("cache_refresh", None)
    ender(policy, 3)
    together = run(policy, PROMPTS, **changes)
    assert not together.prompt_mask.all()
    for row, prompt in enumerate(PROMPTS):
        alone = run(policy, [prompt], **changes)
        assert torch.equal(together.completion_ids[row], alone.completion_ids[0])
        torch.testing.assert_close(together.logprobs[row], alone.logprobs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 40, 64])
def test_rows_in_parts_are_rows_at_once(mdm, monkeypatch, at_once):
    """On a processor a step takes the rows in parts that fit its cache."""
    whole = run(double(mdm), PROMPTS, temperature=1.0)
    monkeypatch.setattr(windows, "POSITIONS_AT_ONCE", at_once)
    parts = run(mdm, PROMPTS, temperature=1.0)
    assert torch.equal(parts.sequences, whole.sequences)
    torch.testing.assert_close(parts.logprobs, whole.logprobs)
    assert (parts.nfe, parts.token_forwards) == (whole.nfe, whole.token_forwards)


# -- gaps ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_gaps_are_filled_as_the_plain_loop_would(mdm, steps):
    double(mdm)
    mask = mdm.tokenizer.mask_token
    texts = [f"{mask}The patient has {mask}{mask} and fever{mask}", f"x{mask}{mask}{mask}"]
    found = infill(mdm, texts, SamplerConfig(steps=steps, end_last=False), record=True)
    config = settings(end_last=False)
    for row, text in enumerate(texts):
        ids = torch.tensor(mdm.tokenizer(text).input_ids)
        todo = set((ids == mdm.mask_token_id).nonzero()[:, 0].tolist())
        for quota in evenly(len(todo), steps or 2):
            p, token = softmax_of(mdm, ids, 0, config).max(-1)
            for i in sorted(todo, key=lambda i: (-p[i].item(), i))[:quota]:
                ids[i] = token[i]
                todo.discard(i)
        assert found.completion_ids[row][found.completion_mask[row]].tolist() == ids.tolist()
        assert found.completions[row] == mdm.tokenizer.decode(ids, skip_special_tokens=True)
    given = found.completion_ids.clone()
    for step in found.trajectory:
        given[step.rows, step.positions] = mdm.mask_token_id
    first, _ = next(replay(found, mdm.mask_token_id))
    assert torch.equal(first, given)


@pytest.mark.parametrize("padding", ["pad", "end"])
def test_an_end_token_in_a_text_with_gaps_ends_nothing(mdm, padding):
    """A closed turn before the gap; and, as many tokenizers have it, padding by the end token."""
    end, mask = mdm.tokenizer.eos_token, mdm.tokenizer.mask_token
    if padding == "end":
        mdm.tokenizer.pad_token = end
    texts = [f"one turn{end}and {mask}{mask}{mask} more{mask}", f"x{mask}{mask}"]
    together = infill(mdm, texts, SamplerConfig(steps=3))
    for row, text in enumerate(texts):
        alone = infill(mdm, [text], SamplerConfig(steps=3 if row == 0 else 2))
        real = together.completion_mask[row]
        kept = [i for i in mdm.tokenizer(text).input_ids if i != mdm.mask_token_id]
        written = together.completion_ids[row][real].tolist()
        assert len(written) == len(kept) + text.count(mask)
        assert not (together.completion_ids[row][real] == mdm.mask_token_id).any()
        assert together.logprobs[row][real].count_nonzero() == text.count(mask)
        if row == 0:
            assert written == alone.completion_ids[0].tolist()


def test_what_cannot_be_filled_is_refused(mdm, ar, bd):
    mask = mdm.tokenizer.mask_token
    with pytest.raises(ValueError, match=r"text 1 has no <\|mask\|> to fill in: 'none'"):
        infill(mdm, [f"a{mask}", "none"])
    for policy in (ar, bd):
        with pytest.raises(ValueError, match="cannot fill in: it does not see what follows"):
            infill(policy, [f"a{mask}"])
    with pytest.raises(ValueError, match="no texts given"):
        infill(mdm, [])
    with pytest.raises(ValueError, match="is one string: expected a list"):
        infill(mdm, f"a{mask}")
    with pytest.raises(ValueError, match="cache=dual"):
        infill(mdm, [f"a{mask}"], settings(cache="dual"))
    with pytest.raises(ValueError, match="block_length=4"):
        infill(mdm, [f"a{mask}"], settings(block_length=4))
    with pytest.raises(ValueError, match="steps=6: expected 1 to max_new_tokens=1"):
        infill(mdm, [f"a{mask}"], SamplerConfig(steps=6))
    with pytest.raises(ValueError, match="max_new_tokens=12: a text of 2 mask tokens gets as many"):
        infill(mdm, [f"a{mask}", f"{mask}{mask}"], SamplerConfig(max_new_tokens=12))
    mdm.logit_shift = True
    with pytest.raises(ValueError, match="starts with a mask token"):
        infill(mdm, [f"a long text {mask}", f"{mask}a"])
    assert infill(mdm, [f"a{mask}", f"a long{mask} text"]).completions


# -- options that a family cannot have -------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 4},
        {"remasking": "random"},
        {"remasking": "state_confidence", "end_last": False, "order_temperature": 1.0},
        {"end_last": False},
        {"stop_at_end": False},
        {"suppress_mask": False},
        {"block_length": 4},
        {"threshold": 0.5},
        {"entropy_bound": 0.5},
        {"revise": 1},
        {"cfg_scale": 1.0},
        {"cache": "dual"},
    ],
    ids=str,
)
def test_left_to_right_sampling_refuses_what_it_would_ignore(ar, changes):
    config = SamplerConfig(max_new_tokens=12, **changes)
    with pytest.raises(InputError, match=f"{next(iter(changes))}=.*one token after the other"):
        generate(ar, PROMPTS, config)


def test_left_to_right_sampling_has_no_trajectory(ar):
    with pytest.raises(InputError, match="record=True: an autoregressive policy has no"):
        generate(ar, PROMPTS, SamplerConfig(max_new_tokens=12), record=True)


def test_block_diffusion_keeps_its_own_blocks_and_cache(bd):
    with pytest.raises(
        ValueError, match="block_length=6: this policy was trained with blocks of 4"
    ):
        run(bd, PROMPTS, block_length=6)
    with pytest.raises(ValueError, match="keeps an exact cache of its own"):
        run(bd, PROMPTS, cache="dual")
    with pytest.raises(ValueError, match="give pattern="):
        bd.logits(torch.tensor([[5, 6, 7]]))
