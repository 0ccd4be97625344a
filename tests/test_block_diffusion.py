"""The block-causal policy and its loss, against one block at a time without padding or packing."""

from itertools import pairwise

import pytest
import torch
from conftest import loss_of
from test_diffusion import TINY
from test_policies import PROMPTS, ids_of

from mdmrl.diffusion import mask_tokens, sample_times
from mdmrl.policies import load_policy
from mdmrl.runs import generator_for
from mdmrl.tasks import medcot
from mdmrl.zoo.pretrain import PretrainConfig, batches, make_policy, pretrain


@torch.no_grad()
def test_positions_see_the_prompt_earlier_blocks_and_their_own(bd):
    ids = ids_of(bd, 15)
    pattern = bd.pattern(3, 12)
    assert pattern.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    before = bd.logits(ids, pattern=pattern)
    for changed, block in enumerate(pattern.tolist()):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 1000 + 5
        moved = (bd.logits(other, pattern=pattern) != before).any(-1)
        assert moved[:, pattern >= block].all()
        assert not moved[:, pattern < block].any()


@torch.no_grad()
def test_left_padding_changes_no_logits(bd):
    batch = bd.encode(PROMPTS)
    assert not batch.attention_mask.all()
    completion = ids_of(bd, 8, len(PROMPTS))
    canvas = torch.cat([batch.input_ids, completion], 1)
    attention = torch.cat([batch.attention_mask, torch.ones_like(completion, dtype=torch.bool)], 1)
    padded = bd.logits(canvas, attention, bd.pattern(batch.input_ids.shape[1], 8))
    for row, (ids, seen) in enumerate(zip(canvas, attention, strict=True)):
        pattern = bd.pattern(int(seen.sum()) - 8, 8)
        alone = bd.logits(ids[seen][None], pattern=pattern)[0]
        close = 5e-6 * alone.abs().max().item()
        torch.testing.assert_close(padded[row, seen], alone, atol=close, rtol=1e-5)


def test_a_saved_policy_keeps_its_blocks(bd, tmp_path):
    bd.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    ids, pattern = ids_of(bd), bd.pattern(4, 8)
    assert (loaded.kind, loaded.block_length) == ("bd", 4)
    assert torch.equal(loaded.logits(ids, pattern=pattern), bd.logits(ids, pattern=pattern))


@torch.no_grad()
@pytest.mark.parametrize("learn_prompt", [False, True])
def test_the_block_loss_is_that_of_one_block_after_the_other(bd, learn_prompt):
    """The same noise, but each block in a forward pass of its own: clean blocks, then its noisy
    self, nothing behind, no padding."""
    bd.model.config.block_length = 16
    config = PretrainConfig(family="bd", **TINY)
    batch = next(batches(bd, medcot.stream, config))
    found = loss_of(bd, batch, learn_prompt, generator_for(0, "x")).item()

    width = int((~batch.completion[0]).sum())
    edges = [0, *range(width, width + 129, 16)][0 if learn_prompt else 1 :]
    learnt = slice(edges[0], None)
    maskable = (batch.prompt | batch.completion)[:, learnt]
    draw = generator_for(0, "x")
    t, weight = sample_times(2 * (len(edges) - 1), draw)
    t, weight = t.view(2, -1), weight.view(2, -1)
    lengths = torch.tensor(edges).diff()
    spread = t.repeat_interleave(lengths, 1)
    xt, masked = mask_tokens(batch.input_ids[:, learnt], spread, maskable, bd.mask_token_id, draw)
    total = 0.0
    for row in range(2):
        seen = batch.attention_mask[row]
        for block, (start, stop) in enumerate(pairwise(edges)):
            ids = batch.input_ids[row, :stop].clone()
            ids[start:] = xt[row, start - edges[0] : stop - edges[0]]
            pad = int((~seen).sum())
            pattern = bd.pattern(width - pad, 128)[: stop - pad]
            logp = bd.logits(ids[pad:][None], pattern=pattern)[0].log_softmax(-1)
            for column in range(max(start, pad), stop):
                if masked[row, column - edges[0]]:
                    token = batch.input_ids[row, column]
                    total -= weight[row, block].item() * logp[column - pad, token].item()
    assert found == pytest.approx(total / int(maskable.sum()), rel=1e-4)


def test_pretraining_gives_a_block_diffusion_policy(tokenizer, tmp_path):
    policy = pretrain(
        PretrainConfig(family="bd", block_length=32, **TINY), tokenizer, medcot.stream, tmp_path
    )
    assert (policy.kind, policy.block_length) == ("bd", 32)


def test_pretraining_begins_with_the_weights_of_another_policy(tokenizer, tmp_path):
    shape = TINY | {"seed": 7}
    twin = make_policy(PretrainConfig(family="mdm", **shape), tokenizer)
    twin.save_pretrained(tmp_path)
    policy = make_policy(PretrainConfig(family="bd", start=str(tmp_path), **TINY), tokenizer)
    assert policy.kind == "bd"
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, twin.model.state_dict()[name])


def test_blocks_must_fill_the_canvas():
    with pytest.raises(ValueError, match="block_length=24: expected a divisor of canvas=128"):
        PretrainConfig(family="bd", block_length=24)
