"""The ELBO against exact enumeration, and the pre-training that minimises it."""

import itertools
import math

import pytest
import torch
from scipy import stats
from scipy.special import beta

from mdmrl.diffusion import linear_elbo_loss, mask_tokens, sample_times
from mdmrl.rl.pretrain import POOL, PretrainConfig, batches, loss_of, pretrain
from mdmrl.runs import Run, generator_for
from mdmrl.tasks import medcot

MASK = 99
X0 = torch.tensor([11, 12, 13, 14, 15])
MASKABLE = torch.tensor([False, True, True, False, True])  # three positions of five
ACTIVE = MASKABLE.nonzero().flatten().tolist()
# An arbitrary, inconsistent model: -log p of each position for each set of masked positions, whose
# bits number the row.
BITS = torch.tensor([0, 1, 2, 0, 4])
TABLE = 3 * torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
SUBSETS = [s for size in (1, 2, 3) for s in itertools.combinations(ACTIVE, size)]


def nll(subset, position):
    return TABLE[sum(BITS[i] for i in subset), position].item()


def exact_elbo():
    """Integral over t of 1/t sum_S t^|S| (1-t)^(n-|S|) sum_{i in S} nll, by Beta functions."""
    n = len(ACTIVE)
    return sum(beta(len(s), n - len(s) + 1) * sum(nll(s, i) for i in s) for s in SUBSETS)


def test_the_enumeration_is_the_mean_over_generation_orders():
    """The same number as an average over all orders of revealing (Hoogeboom et al. 2022)."""
    n, total = len(ACTIVE), 0.0
    for order in itertools.permutations(ACTIVE):
        total += sum(nll(order[k:], order[k]) for k in range(n))
    assert exact_elbo() == pytest.approx(total / math.factorial(n))


def estimate(count, generator):
    """One batch's loss in nats a sequence, by the functions under test."""
    x0, maskable = X0.expand(count, -1), MASKABLE.expand(count, -1)
    t, weight = sample_times(count, generator)
    _, masked = mask_tokens(x0, t, maskable, MASK, generator)
    losses = TABLE[(masked * BITS).sum(1)][masked]
    return linear_elbo_loss(losses, masked, weight, maskable).item() * len(ACTIVE)


@pytest.mark.parametrize("count", [1, 4, 64])
def test_the_elbo_estimate_is_unbiased(count):
    generator = generator_for(0, "elbo", count)
    found = torch.tensor([estimate(count, generator) for _ in range(5000)])
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - exact_elbo()) < 4 * error
    assert error < 0.025 * exact_elbo()  # the check has teeth


@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize(
    ("f", "integral"),
    [
        (lambda t: t, 1.0),
        (lambda t: t**2, 1 / 2),
        (lambda t: t * (1 - t) ** 2, 1 / 3),
        (lambda t: 1 - torch.exp(-3 * t), 1.6888762),  # Ein(3) = E1(3) + log 3 + gamma
    ],
)
def test_sample_times_weigh_integrals_without_bias(count, f, integral):
    generator = generator_for(0, "times", count)
    means = []
    for _ in range(2000):
        t, weight = sample_times(count, generator)
        assert t.min() > 0
        assert t.max() <= 1
        means.append((weight * f(t)).mean())
    means = torch.stack(means).double()
    assert abs(means.mean() - integral) < 4 * means.std() / math.sqrt(len(means)) + 1e-6


def test_every_stratum_is_hit_once_in_any_order():
    firsts = []
    for step in range(500):
        t, _ = sample_times(8, generator_for(0, "strata", step))
        strata = (t.sqrt() * 8).ceil().long() - 1
        assert sorted(strata.tolist()) == list(range(8))
        firsts.append(strata[0].item())
    counts = [firsts.count(i) for i in range(8)]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_tokens_are_masked_at_rate_t_and_nowhere_else():
    generator = generator_for(0, "mask")
    x0 = torch.randint(0, 50, (3, 20_000), generator=generator)
    maskable = torch.rand(x0.shape, generator=generator) < 0.7
    t = torch.tensor([0.05, 0.5, 1.0])
    xt, masked = mask_tokens(x0, t, maskable, MASK, generator)
    assert not (masked & ~maskable).any()
    assert (xt[masked] == MASK).all()
    assert torch.equal(xt[~masked], x0[~masked])
    assert torch.equal(masked[2], maskable[2])
    for row in (0, 1):
        hit, n = int(masked[row].sum()), int(maskable[row].sum())
        assert stats.binomtest(hit, n, t[row].item()).pvalue > 1e-3


# -- pre-training ----------------------------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "batch_size": 2,
    "bf16": False,
    "logging_steps": 1,
    "save_steps": 4,
    "tokens": 1500,
    "learning_rate": 1e-2,
}


def a_batch(policy):
    return next(batches(policy, medcot.stream, PretrainConfig(**TINY)))


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_the_autoregressive_loss_is_that_of_transformers(ar, learn_prompt):
    batch = a_batch(ar)
    losses, count = 0.0, 0
    for ids, attention, prompt, written in zip(
        batch.input_ids, batch.attention_mask, batch.prompt, batch.written, strict=True
    ):
        ids, prompt, written = (x[attention] for x in (ids, prompt, written))
        learnt = written | prompt if learn_prompt else written
        labels = torch.where(learnt, ids, -100)[None]
        # Padding aside, a row's first token is predicted by nothing.
        n = int(learnt[1:].sum())
        losses += ar.model(input_ids=ids[None], labels=labels).loss.item() * n
        count += n
    # Where prompts are learnt, a padded row's first token is predicted from its padding.
    tolerance = 1e-5 if not learn_prompt else 0.02
    found = loss_of(ar, batch, learn_prompt, generator_for(0, "x")).item()
    assert found == pytest.approx(losses / count, rel=tolerance)


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_the_diffusion_loss_is_weighted_cross_entropy_at_masked_positions(mdm, learn_prompt):
    batch = a_batch(mdm)
    found = loss_of(mdm, batch, learn_prompt, generator_for(0, "x")).item()
    maskable = batch.completion | batch.prompt if learn_prompt else batch.completion
    generator = generator_for(0, "x")
    t, weight = sample_times(len(maskable), generator)
    xt, masked = mask_tokens(batch.input_ids, t, maskable, mdm.mask_token_id, generator)
    logp = mdm.logits(xt, batch.attention_mask).log_softmax(-1)
    total = 0.0
    for row, column in masked.nonzero().tolist():
        token = batch.input_ids[row, column]
        total -= weight[row].item() * logp[row, column, token].item()
    assert found == pytest.approx(total / int(maskable.sum()), rel=1e-4)


def test_batches_hold_the_streams_documents_and_go_on_anywhere(mdm):
    config = PretrainConfig(**TINY)
    from_start = list(itertools.islice(batches(mdm, medcot.stream, config), POOL + 3))
    for first in (1, POOL - 1, POOL, POOL + 2):
        batch = next(batches(mdm, medcot.stream, config, first))
        assert torch.equal(batch.input_ids, from_start[first].input_ids)
    documents = itertools.islice(medcot.stream(0), POOL * config.batch_size)
    expected = sorted((d["prompt"], d["completion"]) for d in documents)
    found = []
    for batch in from_start[:POOL]:
        for ids, prompt, written in zip(batch.input_ids, batch.prompt, batch.written, strict=True):
            question, completion = mdm.tokenizer.batch_decode([ids[prompt], ids[written]])
            assert completion.endswith("<|end|>")
            found.append(
                (
                    question.removeprefix("<|user|>").removesuffix("<|assistant|>"),
                    completion.removesuffix("<|end|>"),
                )
            )
        filling = batch.completion & ~batch.written
        assert (batch.input_ids[filling] == mdm.tokenizer.eos_token_id).all()
        assert batch.document_tokens == int((batch.prompt | batch.written).sum())
    assert sorted(found) == expected


def cut_stream(after):
    """The stream, broken off after a number of documents in this process."""

    def stream(seed, start=0):
        for i, document in enumerate(medcot.stream(seed, start)):
            if start + i >= after:
                raise InterruptedError
            yield document

    return stream


@pytest.mark.parametrize("family", ["ar", "mdm"])
def test_resumed_pretraining_gives_the_same_bits(tokenizer, tmp_path, family):
    config = PretrainConfig(family=family, **TINY)
    whole = pretrain(config, tokenizer, medcot.stream, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        pretrain(config, tokenizer, cut_stream(2 * POOL), tmp_path / "cut")
    resumed = pretrain(config, tokenizer, medcot.stream, tmp_path / "cut")
    assert whole.fingerprint() == resumed.fingerprint()
    assert whole.kind == resumed.kind == family


def test_pretraining_cut_before_its_first_checkpoint_logs_no_step_twice(tokenizer, tmp_path):
    config = PretrainConfig(**TINY | {"save_steps": 100})
    with pytest.raises(InterruptedError):
        pretrain(config, tokenizer, cut_stream(2 * POOL), tmp_path)
    pretrain(config, tokenizer, medcot.stream, tmp_path)
    steps = [row["step"] for row in Run(tmp_path, config.to_dict()).rows()]
    assert steps == sorted(set(steps))
