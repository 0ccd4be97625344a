"""Log-likelihoods beside sums made by hand: over tokens, over all orders in which they can come."""

import itertools

import pytest
import torch

from mdmrl.evaluation.likelihood import elbo_sets, log_likelihoods
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.zoo.toy import toy_policy

BLOCK = 2
END, MASK = 3, 4  # letters are 0, 1, 2
PAIRS = [([0, 1], [2, 0, 1]), ([1, 2, 0, 0, 2], [1]), ([2], [0, END, 1, 1, 2])]
each_family = pytest.mark.parametrize("family", ["ar", "mdm", "bd"])


def toy(family):
    return toy_policy("abc", family, 2, BLOCK)


def in_order(policy, context, continuation, order):
    """The sum of log p(token | context and the tokens before it in `order`), one pass a token."""
    width, length = len(context), len(continuation)
    if policy.block_length:
        length += -length % policy.block_length
    canvas = torch.tensor([context + [MASK] * length])
    pattern, total = policy.pattern(width, length), 0.0
    for i in order:
        logits = policy.logits(canvas, pattern=pattern)[0, width + i]
        logits[MASK] = -torch.inf
        total += logits.log_softmax(0)[continuation[i]].item()
        canvas[0, width + i] = continuation[i]
    return total


@torch.no_grad()
def mean_over_orders(policy, context, continuation):
    """Of all orders, or of all that take one block after the other. It is the ELBO (Hoogeboom et
    al. 2022, section 2; Ou et al. 2025, theorem 2)."""
    n = len(continuation)
    block = policy.block_length or n
    parts = [range(start, min(start + block, n)) for start in range(0, n, block)]
    orders = itertools.product(*(itertools.permutations(part) for part in parts))
    sums = [in_order(policy, context, continuation, sum(order, ())) for order in orders]
    return sum(sums) / len(sums)


def test_an_autoregressive_likelihood_is_the_sum_of_its_log_softmax():
    policy = toy("ar")
    for (context, continuation), (value, _) in zip(
        PAIRS, log_likelihoods(policy, PAIRS), strict=True
    ):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logps = policy.model(ids).logits[0].log_softmax(-1)
        places = range(len(context), ids.shape[1])
        by_hand = sum(logps[i - 1, ids[0, i]].item() for i in places)
        assert value == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("family", ["mdm", "bd"])
def test_a_denoisers_likelihood_is_the_mean_over_all_orders(family):
    policy = toy(family)
    found = log_likelihoods(policy, PAIRS, n_mc=31)
    for pair, (value, _) in zip(PAIRS, found, strict=True):
        assert value == pytest.approx(mean_over_orders(policy, *pair), abs=1e-4)


@pytest.mark.parametrize(("family", "n_mc"), [("mdm", 3), ("bd", 1)])
def test_fewer_sets_estimate_it_without_bias(family, n_mc):
    policy, pair = toy(family), PAIRS[0]
    found = [log_likelihoods(policy, [pair], n_mc, seed)[0][0] for seed in range(400)]
    found = torch.tensor(found, dtype=torch.float64)
    error = found.std() / len(found) ** 0.5
    assert error > 0.001
    assert abs(found.mean() - mean_over_orders(policy, *pair)) < 4 * error


@pytest.mark.parametrize(("n", "n_mc"), [(1, 1), (3, 7), (5, 4), (40, 128)])
def test_every_token_counts_once_on_average(n, n_mc):
    """What a policy gives that finds each token as probable whatever it sees: n times that."""
    masked, weights = elbo_sets(n, n_mc, generator_for(0, "test"))
    assert masked.any(1).all() and len(masked) <= n_mc
    assert weights[masked].sum().item() == pytest.approx(n)


@each_family
def test_the_batch_and_the_order_decide_nothing(family):
    policy = toy(family)
    alone = [log_likelihoods(policy, [pair], n_mc=4)[0] for pair in PAIRS]
    for size in (1, 5, 16):
        together = log_likelihoods(policy, PAIRS[::-1], n_mc=4, batch_size=size)[::-1]
        for (one, greedy), (other, also) in zip(alone, together, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
            assert greedy == also


@each_family
def test_greedy_is_what_greedy_decoding_gives(family):
    policy, n = toy(family), 4
    config = SamplerConfig(max_new_tokens=n)
    if policy.denoises:
        config = config.replace(steps=n, end_last=False, stop_at_end=False)
    prompts = ["".join(letters) for letters in itertools.product("abc", repeat=3)]
    output = generate(policy, prompts, config)
    contexts = policy.tokenize(prompts)
    # Where an autoregressive text has ended, the rest is padding that nobody decoded.
    texts = [ids[:n] for ids in (output.token_lists() if family == "ar" else output.completion_ids)]
    texts = [list(map(int, ids)) for ids in texts]
    pairs = list(zip(contexts, texts, strict=True))
    assert all(greedy for _, greedy in log_likelihoods(policy, pairs))
    others = [(c, [*t[:-1], (t[-1] + 1) % 3]) for c, t in pairs]
    assert not any(greedy for _, greedy in log_likelihoods(policy, others))
