"""The losses against exact enumeration, and the pre-training that minimises one of them."""

import itertools
import math

import pytest
import torch
from conftest import loss_of
from scipy import stats
from scipy.special import beta

from mdmrl.diffusion import (
    SCHEDULES,
    Geometric,
    Polynomial,
    discrete_terms,
    limit_loss,
    linear_elbo_loss,
    log_snr_loss,
    mask_tokens,
    posterior,
    sample_times,
    transition_matrix,
)
from mdmrl.diffusion_exact import chain_log_likelihood, conditionals, exact_masked_nll
from mdmrl.runs import Run, generator_for
from mdmrl.tasks import medcot
from mdmrl.zoo.pretrain import POOL, PretrainConfig, batches, pretrain

# -- schedules, matrices, posterior ----------------------------------------------------------------

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@each_schedule
def test_schedules_fall_from_one_to_zero(name):
    ends = SCHEDULES[name].alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert (SCHEDULES[name].alpha(TIMES).diff() < 0).all()


@each_schedule
def test_the_slope_is_the_derivative(name):
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(SCHEDULES[name].alpha(t).sum(), t)
    torch.testing.assert_close(SCHEDULES[name].slope(TIMES), slope)


@each_schedule
def test_alpha_is_the_logistic_function_of_the_log_snr(name):
    log_snr = SCHEDULES[name].log_snr(TIMES)
    torch.testing.assert_close(SCHEDULES[name].alpha(TIMES), 1 / (1 + torch.exp(-log_snr)))


def test_weights_in_closed_form():
    """Shi et al. 2024 list them for these schedules."""
    for power in (1, 1.5, 3):
        torch.testing.assert_close(Polynomial(power).weight(TIMES), power / TIMES)
    tangent = math.pi / 2 * torch.tan(math.pi / 2 * (1 - TIMES))
    torch.testing.assert_close(SCHEDULES["cosine"].weight(TIMES), tangent)


@pytest.mark.parametrize("make", [lambda: Polynomial(0.5), lambda: Geometric(2, 1)])
def test_schedules_that_fall_too_steeply_or_not_at_all_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# Three letters and [MASK] = 3; all texts of three letters, all canvases.
M, N = 3, 3
TEXTS = torch.cartesian_prod(*[torch.arange(M)] * N)
CANVASES = torch.cartesian_prod(*[torch.arange(M + 1)] * N)


def alphas(name, steps):
    return SCHEDULES[name].alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()


def one_step(beta_i):
    """[Q]_jk = (1 - beta) delta_jk + beta delta_km, entry by entry."""
    return torch.tensor(
        [[(1 - beta_i) * (j == k) + beta_i * (k == M) for k in range(M + 1)] for j in range(M + 1)],
        dtype=torch.float64,
    )


def products(name, steps):
    """One-step matrices of i = 1..steps and their running products, from the betas alone."""
    alpha = alphas(name, steps)
    single = [one_step(1 - alpha[i + 1] / alpha[i]) for i in range(steps)]
    return single, list(itertools.accumulate(single, torch.matmul))


@each_schedule
def test_transition_matrices_are_products_of_single_steps(name):
    single, whole = products(name, 5)
    alpha = alphas(name, 5)
    for i in range(5):
        assert torch.allclose(transition_matrix(alpha[i], alpha[i + 1], M), single[i])
        assert torch.allclose(transition_matrix(1.0, alpha[i + 1], M), whole[i])
    assert torch.allclose(transition_matrix(alpha[1], alpha[3], M), single[1] @ single[2])
    assert torch.allclose(transition_matrix(0.8, 0.3, M).sum(1), torch.ones(M + 1).double())


def bayes(name, steps, i):
    """q(x_s | x_t, x_0) of step i from the matrices, [x_0, x_t, x_s]; nan where x_t cannot be."""
    single, whole = products(name, steps)
    before = torch.eye(M + 1, dtype=torch.float64) if i == 1 else whole[i - 2]
    joint = before[:M, None, :] * single[i - 1].T[None]
    return joint / whole[i - 1][:M, :, None]


@each_schedule
@pytest.mark.parametrize("i", [1, 2, 4])
def test_the_posterior_is_bayes_rule(name, i):
    expected = bayes(name, 4, i)
    alpha_t, alpha_s = alphas(name, 4)[i], alphas(name, 4)[i - 1]
    one_hot = torch.eye(M, M + 1, dtype=torch.float64)
    for x0 in range(M):
        for xt in (x0, M):
            if not (i == 4 and xt == x0):  # at t = 1 nothing is unmasked
                found = posterior(torch.tensor(xt), one_hot[x0], alpha_s, alpha_t, M)
                torch.testing.assert_close(found, expected[x0, xt])
    mu = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    mixed = (mu[:M, None] * expected[:, M]).sum(0)
    torch.testing.assert_close(posterior(torch.tensor(M), mu, alpha_s, alpha_t, M), mixed)


# -- losses ----------------------------------------------------------------------------------------


def arbitrary():
    """A denoiser whose answers on different canvases have nothing to do with each other."""
    logits = torch.randn((M + 1,) * N + (N, M), generator=generator_for(0, "table")).double()
    table = torch.nn.functional.pad((2 * logits).log_softmax(-1), (0, 1), value=-torch.inf)
    return lambda xt: table[tuple(xt.T)]


JOINT = torch.rand((M,) * N, generator=generator_for(1, "joint")).double() ** 2 + 0.01
JOINT /= JOINT.sum()
DATA = JOINT.flatten()  # in the order of TEXTS
ENTROPY = -(DATA * DATA.log()).sum().item()
DENOISERS = {"arbitrary": arbitrary(), "conditionals": conditionals(JOINT)}
each_denoiser = pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)


def reverse_matrix(denoiser, name, steps, i):
    """p_theta(x_s | x_t) over all canvases, [x_t, x_s], by Bayes' rule at each position."""
    mu, q = denoiser(CANVASES).exp()[..., :M], bayes(name, steps, i)
    matrix = torch.ones(len(CANVASES), len(CANVASES), dtype=torch.float64)
    for position in range(N):
        states = CANVASES[:, position]
        revealed = (mu[:, position] @ q[:, M])[:, states]
        carried = (states[:, None] == states).double()
        matrix *= torch.where((states == M)[:, None], revealed, carried)
    return matrix


def text_index(canvases):
    return (canvases * (M + 1) ** torch.arange(N - 1, -1, -1)).sum(-1)


@each_denoiser
@pytest.mark.parametrize("name", ["linear", "geometric"])
def test_terms_are_kl_divergences_over_all_canvases(denoiser, name):
    """E_q KL(q(x_s | x_t, x_0) || p_theta(x_s | x_t)) as a sum over 64 x 64 pairs of canvases."""
    steps = 3
    terms = discrete_terms(exact_masked_nll(denoiser, TEXTS, M), SCHEDULES[name], steps)
    _, whole = products(name, steps)
    for i in range(1, steps + 1):
        p, q = reverse_matrix(denoiser, name, steps, i), bayes(name, steps, i).nan_to_num()
        for row in (0, 5, 25):
            marginal = torch.ones(len(CANVASES), dtype=torch.float64)
            reverse = torch.ones(len(CANVASES), len(CANVASES), dtype=torch.float64)
            for position, x0 in enumerate(TEXTS[row]):
                states = CANVASES[:, position]
                marginal *= whole[i - 1][x0, states]
                reverse *= q[x0][states][:, states]
            divergence = torch.special.xlogy(reverse, reverse / p).nan_to_num().sum(1)
            assert terms[row, i - 1].item() == pytest.approx((marginal @ divergence).item())
            if i == 1:
                reconstruction = -marginal @ p[:, text_index(TEXTS[row])].log().nan_to_num(neginf=0)
                assert terms[row, 0].item() == pytest.approx(reconstruction.item())


@each_denoiser
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_chains_likelihood_is_a_product_of_matrices(denoiser, name, steps):
    state = torch.zeros(len(CANVASES), dtype=torch.float64)
    state[-1] = 1  # all [MASK]
    for i in range(steps, 0, -1):
        state = state @ reverse_matrix(denoiser, name, steps, i)
    found = chain_log_likelihood(denoiser, TEXTS, M, SCHEDULES[name], steps)
    torch.testing.assert_close(found.exp(), state[text_index(TEXTS)])
    assert found.exp().sum().item() == pytest.approx(1)


@each_denoiser
@each_schedule
def test_the_elbo_needs_its_reconstruction_term(denoiser, name):
    masked_nll = exact_masked_nll(denoiser, TEXTS, M)
    violated = {}
    for steps in (1, 2, 3, 4, 8, 16):
        terms = discrete_terms(masked_nll, SCHEDULES[name], steps)
        likelihood = chain_log_likelihood(denoiser, TEXTS, M, SCHEDULES[name], steps)
        assert (-terms.sum(-1) <= likelihood + 1e-9).all()
        violated[steps] = (-terms[:, 1:].sum(-1) > likelihood + 1e-9).float().mean().item()
    assert violated[1] == 1  # L_1 is an empty sum
    assert violated[2] > 0.5


def test_the_elbo_of_a_consistent_model_grows_with_the_steps_to_its_limit():
    masked_nll = exact_masked_nll(DENOISERS["conditionals"], TEXTS, M)
    limit = (DATA @ limit_loss(masked_nll, Polynomial())).item()
    assert limit == pytest.approx(ENTROPY)
    gaps = [
        (DATA @ discrete_terms(masked_nll, Polynomial(), 2**k).sum(-1)).item() - limit
        for k in range(8)
    ]
    assert all(gap > finer > 0 for gap, finer in itertools.pairwise(gaps))
    assert gaps[-2] / gaps[-1] == pytest.approx(2, rel=0.01)  # the gap is of order 1/T


def test_the_elbo_of_an_arbitrary_model_may_fall_with_the_steps():
    """A model that is the less sure the more it sees; the inequality with log p is unharmed."""

    def denoiser(xt):
        seen = (xt != M).sum(-1).double()
        sharp = torch.stack([3 - 1.5 * seen, torch.zeros_like(seen), torch.zeros_like(seen)], -1)
        mu = torch.nn.functional.pad(sharp.log_softmax(-1), (0, 1), value=-torch.inf)
        return mu[:, None].expand(-1, N, -1)

    text = torch.zeros(1, N, dtype=torch.long)
    masked_nll = exact_masked_nll(denoiser, text, M)
    losses = [discrete_terms(masked_nll, Polynomial(), 2**k).sum().item() for k in range(6)]
    limit = limit_loss(masked_nll, Polynomial()).item()
    assert all(loss < finer < limit for loss, finer in itertools.pairwise(losses))


@each_denoiser
def test_the_limit_is_the_mean_over_orders_whatever_the_schedule(denoiser):
    mean = torch.zeros(len(TEXTS), dtype=torch.float64)
    for order in itertools.permutations(range(N)):
        canvas = torch.full_like(TEXTS, M)
        for position in order:
            logp = denoiser(canvas)[torch.arange(len(TEXTS)), position, TEXTS[:, position]]
            mean -= logp / math.factorial(N)
            canvas[:, position] = TEXTS[:, position]
    masked_nll = exact_masked_nll(denoiser, TEXTS, M)
    for schedule in (*SCHEDULES.values(), Polynomial(1.5), Geometric(1e-3, 9)):
        torch.testing.assert_close(limit_loss(masked_nll, schedule), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_snr_loss(masked_nll), mean, rtol=1e-9, atol=0)


@each_denoiser
def test_with_blocks_of_one_token_every_loss_is_the_autoregressive_cross_entropy(denoiser):
    canvas, nll = torch.full_like(TEXTS, M), torch.zeros(len(TEXTS), dtype=torch.float64)
    for position in range(N):
        nll -= denoiser(canvas)[torch.arange(len(TEXTS)), position, TEXTS[:, position]]
        canvas[:, position] = TEXTS[:, position]
    masked_nll = exact_masked_nll(denoiser, TEXTS, M, block_length=1)
    for schedule in SCHEDULES.values():
        torch.testing.assert_close(limit_loss(masked_nll, schedule), nll)
        for steps in (1, 4):
            torch.testing.assert_close(discrete_terms(masked_nll, schedule, steps).sum(-1), nll)
            chain = chain_log_likelihood(denoiser, TEXTS, M, schedule, steps, block_length=1)
            torch.testing.assert_close(chain, -nll)
    torch.testing.assert_close(log_snr_loss(masked_nll), nll)


# Texts of six letters whose law is a Markov chain.
LONG = 6


def markov():
    generator = generator_for(2, "markov")
    moves = torch.randn(M, M, generator=generator).double().mul(1.5).softmax(-1)
    texts = torch.cartesian_prod(*[torch.arange(M)] * LONG)
    return texts, moves[texts[:, :-1], texts[:, 1:]].prod(-1) / M, moves


@pytest.mark.parametrize("block_length", [1, 2, 3, 6])
def test_the_block_loss_of_a_consistent_model_is_the_entropy(block_length):
    texts, law, moves = markov()
    entropy, state = math.log(M), torch.full((M,), 1 / M, dtype=torch.float64)
    for _ in range(LONG - 1):
        entropy -= (state @ (moves * moves.log()).sum(1)).item()
        state = state @ moves
    denoiser = conditionals(law.reshape((M,) * LONG))
    masked_nll = exact_masked_nll(denoiser, texts, M, block_length)
    assert (law @ limit_loss(masked_nll, Polynomial())).item() == pytest.approx(entropy)
    terms = discrete_terms(masked_nll, Polynomial(), 2)
    chain = chain_log_likelihood(denoiser, texts, M, Polynomial(), 2, block_length)
    assert (-terms.sum(-1) <= chain + 1e-9).all()
    assert chain.exp().sum().item() == pytest.approx(1)


def test_conditionals_by_counting():
    law = dict(zip(map(tuple, TEXTS.tolist()), DATA.tolist(), strict=True))
    found = DENOISERS["conditionals"](CANVASES).exp()
    for canvas, rows in zip(CANVASES.tolist(), found, strict=True):
        for i in range(N):
            fits = [
                sum(
                    p
                    for text, p in law.items()
                    if text[i] == k and all(canvas[j] in (M, text[j]) for j in range(N) if j != i)
                )
                for k in range(M)
            ]
            assert rows[i].tolist() == pytest.approx([p / sum(fits) for p in fits] + [0])


def test_blocks_must_fill_the_text():
    with pytest.raises(ValueError, match="expected a divisor of the length 3"):
        exact_masked_nll(DENOISERS["arbitrary"], TEXTS, M, block_length=2)


# -- Monte-Carlo estimates -------------------------------------------------------------------------

DRAWS = 40_000
TEXT = TEXTS[5]


def within_three_standard_errors(samples, exact):
    error = samples.std().item() / math.sqrt(len(samples))
    assert error < 0.02 * exact  # the check has teeth
    return abs(samples.mean().item() - exact) < 3 * error


def masked_nll_samples(hidden, generator, block=slice(0, N)):
    """The summed masked cross-entropy of one x_t for each probability of being masked."""
    x0 = TEXT.expand(len(hidden), -1)
    maskable = torch.zeros_like(x0, dtype=torch.bool)
    maskable[:, block] = True
    xt, masked = mask_tokens(x0, hidden, maskable, M, generator)
    xt[:, block.stop :] = M
    nll = -DENOISERS["arbitrary"](xt).gather(-1, x0[..., None]).squeeze(-1)
    return torch.where(masked, nll, 0).sum(-1)


@each_schedule
def test_sampled_steps_estimate_the_discrete_loss(name):
    generator, steps = generator_for(0, "steps"), 4
    alpha = torch.tensor(alphas(name, steps))
    i = torch.randint(1, steps + 1, (DRAWS,), generator=generator)
    weight = steps * (alpha[i - 1] - alpha[i]) / (1 - alpha[i])
    samples = weight * masked_nll_samples(1 - alpha[i], generator)
    masked_nll = exact_masked_nll(DENOISERS["arbitrary"], TEXT[None], M)
    exact = discrete_terms(masked_nll, SCHEDULES[name], steps).sum()
    assert within_three_standard_errors(samples, exact.item())


@each_schedule
def test_sampled_times_estimate_the_limit(name):
    generator = generator_for(0, "limit")
    t = 1 - torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    alpha = SCHEDULES[name].alpha(t)
    samples = SCHEDULES[name].weight(t) * masked_nll_samples(1 - alpha, generator)
    masked_nll = exact_masked_nll(DENOISERS["arbitrary"], TEXT[None], M)
    assert within_three_standard_errors(samples, limit_loss(masked_nll, Polynomial()).item())


@pytest.mark.parametrize("block_length", [1, 3])
def test_the_training_estimator_with_one_block_maskable_estimates_the_block_loss(block_length):
    generator, samples = generator_for(0, "blocks"), 0
    for start in range(0, N, block_length):
        t, weight = sample_times(DRAWS, generator)
        block = slice(start, start + block_length)
        samples = samples + weight * masked_nll_samples(t, generator, block)
    masked_nll = exact_masked_nll(DENOISERS["arbitrary"], TEXT[None], M, block_length)
    assert within_three_standard_errors(samples, limit_loss(masked_nll, Polynomial()).item())


# -- the training loss against its exact value -----------------------------------------------------

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


def test_a_loss_that_is_no_number_stops_pretraining(tokenizer, tmp_path, monkeypatch):
    lost = torch.tensor(torch.nan, requires_grad=True)
    monkeypatch.setattr("mdmrl.zoo.pretrain.resolve", lambda loss: lambda *_: (lost, 1))
    with pytest.raises(FloatingPointError, match="loss=nan at step 0: training diverged"):
        pretrain(PretrainConfig(**TINY), tokenizer, medcot.stream, tmp_path)
    assert lost.grad is None


def test_pretraining_cut_before_its_first_checkpoint_logs_no_step_twice(tokenizer, tmp_path):
    config = PretrainConfig(**TINY | {"save_steps": 100})
    with pytest.raises(InterruptedError):
        pretrain(config, tokenizer, cut_stream(2 * POOL), tmp_path)
    pretrain(config, tokenizer, medcot.stream, tmp_path)
    steps = [row["step"] for row in Run(tmp_path, config.to_dict()).logged()]
    assert steps == sorted(set(steps))
