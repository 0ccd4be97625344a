"""Every estimator against its own target, and the oracle against brute force and the samplers."""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import nested
from scipy import stats
from test_sampling import replay

from mdmrl import load_policy, load_task
from mdmrl.diffusion import SCHEDULES, limit_loss
from mdmrl.diffusion_exact import chain_log_likelihood, exact_masked_nll
from mdmrl.rl import estimators
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import grpo_loss, train_grpo, update
from mdmrl.rl.logprobs import ESTIMATORS, draw_noise, estimator
from mdmrl.rl.oracle import RULES, Oracle, all_texts, denoiser_of, tabulate
from mdmrl.rl.rollout import Rollout, collect
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.sampling.schedule import evenly
from mdmrl.zoo.toy import toy_policy

PROMPT, LENGTH, BLOCK = "abca", 4, 2
END, MASK, STATES = 3, 4, 5  # letters are 0, 1, 2
MASKED = [name for name, found in ESTIMATORS.items() if found.denoising]
NOISY = [name for name in MASKED if ESTIMATORS[name].samples]
TEXTS = torch.tensor([[0, 2, 1, 1], [2, 2, 0, END], [1, END, 0, 2], [1, 0, END, 2]])


def toy(family="mdm", seed=2):
    return toy_policy("abc", family, seed, BLOCK)


@pytest.fixture(scope="module")
def toys():
    return {family: toy(family) for family in ("mdm", "bd")}


each_family = pytest.mark.parametrize("family", ["mdm", "bd"])


def sampler(**changes):
    return SamplerConfig(
        **{
            "max_new_tokens": LENGTH,
            "steps": LENGTH,
            "remasking": "state_confidence",
            "temperature": 1.0,
            "end_last": False,
        }
        | changes
    )


def rollout_of(policy, texts, config=None, revealed_at=None):
    """A rollout of these texts, as if they had been drawn."""
    prompt = policy.encode([PROMPT]).input_ids.expand(len(texts), -1)
    counts = policy.completion_mask(texts)
    everything = torch.ones(len(texts), dtype=torch.bool)
    return Rollout(
        prompt,
        torch.ones_like(prompt, dtype=torch.bool),
        texts,
        counts,
        torch.zeros(len(texts)),
        everything,
        config or sampler(),
        revealed_at=revealed_at,
    )


def values(policy, name, rollout, seed=0, p_mask_prompt=0.0):
    """What the estimator says of every text, in nats, (B,)."""
    score = estimator(name, policy)
    noise = draw_noise(
        rollout, p_mask_prompt, generator_for(seed, "noise"), score.samples, score.shared
    )
    found = score(policy, rollout, noise)
    return found.sum(1) if found.ndim == 2 else found


@torch.no_grad()
def draws(policy, name, text, count=1200, **options):
    """The estimator's values of one text under `count` draws of its noise, float64."""
    return values(policy, name, rollout_of(policy, text.expand(count, -1), **options)).double()


def oracle_of(policy, texts, temperature=1.0, suppress_mask=True):
    denoiser = denoiser_of(policy, PROMPT, LENGTH, temperature, suppress_mask)
    return Oracle(denoiser, texts, MASK, policy.block_length)


TARGETS = {
    "one_step": lambda oracle: oracle.law("random", 1),
    "random_mask": Oracle.elbo,
    "elbo": Oracle.elbo,
    "elbo-3": Oracle.elbo,
    "complementary": Oracle.elbo,
    "complementary-2": Oracle.elbo,
    "overlapping": Oracle.elbo,
    "coupled": Oracle.coupled,
    "quadrature": Oracle.elbo,  # three nodes are exact up to six tokens
    "quadrature-1": lambda oracle: oracle.quadrature(1),
    "ar_order": lambda oracle: oracle.law("sequential", oracle.n),
}


# -- the oracle ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(toys):
    """Of each family every text, and the oracle that knows all of them."""
    found = {}
    with torch.no_grad():
        for family, policy in toys.items():
            texts = all_texts(policy, LENGTH)
            denoiser = tabulate(denoiser_of(policy, PROMPT, LENGTH), STATES, LENGTH)
            found[family] = texts, Oracle(denoiser, texts, MASK, policy.block_length)
    return found


@each_family
@pytest.mark.parametrize("rule", RULES)
def test_laws_sum_to_one(tables, family, rule):
    texts, oracle = tables[family]
    assert len(texts) == 4**LENGTH
    for steps in range(1, oracle.n + 1):
        assert oracle.law(rule, steps).exp().sum().item() == pytest.approx(1, abs=1e-12)


@each_family
def test_bounds_are_no_laws(tables, family):
    _, oracle = tables[family]
    assert oracle.elbo().exp().sum() < 0.98
    assert oracle.upper_bound().exp().sum() > 1.02
    assert oracle.coupled().exp().sum() < 0.5


def small_table(seed=0, letters=2, length=3):
    """An arbitrary table as a denoiser; [MASK] is the last state."""
    shape = (letters + 1,) * length + (length, letters)
    table = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    table = torch.nn.functional.pad((1.5 * table).log_softmax(-1), (0, 1), value=-torch.inf)
    return lambda xt: table[xt.unbind(-1)]


def brute(denoiser, x, rule, quotas, letters=2):
    """The probability that the sampler writes x: over every draw it can make at every step."""
    length = len(x)

    def rest(canvas, quotas):
        if not quotas:
            return 1.0
        masked = [i for i in range(length) if canvas[i] == letters]
        p = denoiser(torch.tensor([canvas]))[0].exp()
        total = 0.0
        for drawn in itertools.product(range(letters), repeat=len(masked)):
            chance = math.prod(p[i, v].item() for i, v in zip(masked, drawn, strict=True))
            token = dict(zip(masked, drawn, strict=True))
            score = {
                "sequential": lambda i: -i,
                "state_confidence": lambda i, p=p: p[i].max().item(),
                "low_confidence": lambda i, p=p, token=token: p[i, token[i]].item(),
            }.get(rule)
            sets = list(itertools.combinations(masked, quotas[0]))
            if score:
                sets = [sorted(masked, key=lambda i: (-score(i), i))[: quotas[0]]]
            for chosen in sets:
                if all(token[i] == x[i] for i in chosen):
                    revealed = [x[i] if i in chosen else canvas[i] for i in range(length)]
                    total += chance / len(sets) * rest(revealed, quotas[1:])
        return total

    return rest([letters] * length, quotas)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_law_is_what_all_draws_of_the_sampler_add_up_to(rule, steps):
    denoiser = small_table()
    texts = torch.cartesian_prod(*[torch.arange(2)] * 3)
    found = Oracle(denoiser, texts, 2).law(rule, steps).exp()
    expected = [brute(denoiser, x, rule, evenly(3, steps)) for x in texts.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", ["ascending", [2, 1], [1, 2]])
def test_a_law_knows_the_sizes_of_steps(rule, sizes):
    denoiser = small_table()
    texts = torch.cartesian_prod(*[torch.arange(2)] * 3)
    found = Oracle(denoiser, texts, 2).law(rule, 2, sizes).exp()
    quotas = [1, 2] if sizes == "ascending" else sizes
    expected = [brute(denoiser, x, rule, quotas) for x in texts.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def by_orders(denoiser, x, mask=2):
    """Over all orders: sums of log-probabilities, and of each position its log-probabilities."""
    sums, each = [], [[] for _ in x]
    for order in itertools.permutations(range(len(x))):
        canvas, total = [mask] * len(x), 0.0
        for i in order:
            logp = denoiser(torch.tensor([canvas]))[0, i, x[i]].item()
            each[i].append(logp)
            total, canvas[i] = total + logp, x[i]
        sums.append(total)
    return torch.tensor(sums).double(), torch.tensor(each).double()


def test_mixture_elbo_and_bounds_over_all_orders():
    denoiser = small_table(1)
    texts = torch.cartesian_prod(*[torch.arange(2)] * 3)
    oracle = Oracle(denoiser, texts, 2)
    for row, x in enumerate(texts.tolist()):
        sums, each = by_orders(denoiser, x)
        assert oracle.law("random", 3)[row].item() == pytest.approx(sums.exp().mean().log().item())
        assert oracle.elbo()[row].item() == pytest.approx(sums.mean().item())
        for b in (1, 2.5, 3):
            expected = (b * each).exp().mean(1).log().sum().item() / b
            assert oracle.upper_bound(b)[row].item() == pytest.approx(expected)
    torch.testing.assert_close(oracle.upper_bound(), oracle.upper_bound(3))


def test_the_oracle_agrees_with_the_losses_of_diffusion():
    denoiser, texts = small_table(2, length=4), torch.cartesian_prod(*[torch.arange(2)] * 4)
    oracle = Oracle(denoiser, texts, 2)
    loss = exact_masked_nll(denoiser, texts, 2)
    torch.testing.assert_close(oracle.elbo(), -limit_loss(loss, SCHEDULES["linear"]))
    torch.testing.assert_close(oracle.quadrature(2), oracle.elbo())
    assert (oracle.quadrature(1) - oracle.elbo()).abs().max() > 0.1
    ladder = chain_log_likelihood(denoiser, texts, 2, SCHEDULES["linear"], 2000)
    torch.testing.assert_close(oracle.law("random", 4), ladder, atol=2e-2, rtol=0)
    times = torch.linspace(0.2, 0.8, 10_001, dtype=torch.float64)
    mean = torch.trapezoid(loss(1 - times) / times, times) / 0.6
    torch.testing.assert_close(oracle.coupled(), oracle.law("random", 1) / 2 - mean)


def test_blocks_are_texts_of_their_own(toys, tables):
    """log p(x) = sum_b log p(x^b | x^<b), a block with clean ones before it."""
    texts, oracle = tables["bd"]
    denoiser = denoiser_of(toys["bd"], PROMPT, LENGTH)
    for rule, steps in (("random", 2), ("low_confidence", 2), ("state_confidence", 1)):
        total = Oracle(denoiser, texts[:20, :BLOCK], MASK).law(rule, steps)
        for row in range(20):

            def second(xt, row=row):
                before = texts[row, :BLOCK].expand(len(xt), -1)
                return denoiser(torch.cat([before, xt], 1))[:, BLOCK:]

            total[row] += Oracle(second, texts[row : row + 1, BLOCK:], MASK).law(rule, steps)[0]
        torch.testing.assert_close(oracle.law(rule, steps)[:20], total)


def test_what_the_oracle_refuses():
    denoiser = small_table()
    with pytest.raises(ValueError, match="block_length=2: expected a divisor of the length 3"):
        Oracle(denoiser, torch.zeros(1, 3, dtype=torch.long), 2, 2)
    with pytest.raises(ValueError, match="13 tokens have 2\\^13 contexts"):
        Oracle(denoiser, torch.zeros(1, 13, dtype=torch.long), 2)
    oracle = Oracle(denoiser, torch.zeros(1, 3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="unknown rule 'low_confidenc': did you mean"):
        oracle.law("low_confidenc", 1)
    with pytest.raises(ValueError, match="steps=4: expected 1 to 3"):
        oracle.law("random", 4)


# -- the samplers' laws ----------------------------------------------------------------------------


def p_value(probabilities, drawn):
    """Of a chi-square test that `drawn` (M, L) follows the law of all texts; rare ones pooled."""
    number = (drawn * (STATES - 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    seen = number.bincount(minlength=len(probabilities)).double()
    expected = probabilities / probabilities.sum() * len(drawn)
    rare = expected < 5
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    return stats.chisquare(seen, expected).pvalue


RUNS = [
    ("mdm", "state_confidence", 4),
    ("mdm", "state_confidence", 2),
    ("mdm", "low_confidence", 4),
    ("mdm", "low_confidence", 3),
    ("mdm", "random", 2),
    ("mdm", "sequential", 4),
    ("bd", "state_confidence", 4),
    ("bd", "low_confidence", 4),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "rule", "steps"), RUNS)
def test_the_samplers_law_is_the_oracles(toys, tables, family, rule, steps):
    config = sampler(remasking=rule, steps=steps, stop_at_end=False)
    drawn = generate(toys[family], [PROMPT] * 4000, config, generator_for(1, "draws"))
    _, oracle = tables[family]
    own = steps // (LENGTH // oracle.n)
    for other in RULES:
        p = p_value(oracle.law(other, own).exp(), drawn.completion_ids)
        assert p > 0.01 if other == rule else p < 1e-4


@torch.no_grad()
def weights_of(policy, completion, temperature):
    """The weight of every open position of a completion, from one unpadded canvas."""
    prompt = policy.encode([PROMPT]).input_ids
    canvas = torch.cat([prompt, completion[None]], 1)
    width = prompt.shape[1]
    logits = policy.logits(canvas, pattern=policy.pattern(width, LENGTH))[0, width:].double()
    logits[:, MASK] = -math.inf
    best = logits.log_softmax(-1).amax(-1).exp()
    return [w ** (1 / temperature) for w in best.tolist()]


@torch.no_grad()
def test_positions_are_drawn_in_plackett_and_luces_order(toys):
    policy, temperature = toys["mdm"], 0.7
    config = sampler(order_temperature=temperature, steps=2, stop_at_end=False)
    output = generate(policy, [PROMPT] * 4000, config, generator_for(2, "order"), record=True)
    positions = output.trajectory[0].positions.view(-1, 2)
    seen = Counter(map(tuple, positions.tolist()))
    weights = weights_of(policy, torch.full((LENGTH,), MASK), temperature)
    total = sum(weights)
    expected = {
        (i, j): weights[i] / total * weights[j] / (total - weights[i])
        for i, j in itertools.permutations(range(LENGTH), 2)
    }
    assert sum(expected.values()) == pytest.approx(1)
    counts = [seen[pair] for pair in expected]
    assert stats.chisquare(counts, [4000 * p for p in expected.values()]).pvalue > 0.01
    uniform = [4000 / len(expected)] * len(expected)
    assert stats.chisquare(counts, uniform).pvalue < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("family", "block"), [("mdm", None), ("mdm", BLOCK), ("bd", None)])
def test_the_probability_of_an_order_is_that_of_drawing_it_step_by_step(toys, family, block):
    policy, temperature = toys[family], 0.7
    config = sampler(order_temperature=temperature, steps=2, block_length=block, stop_at_end=False)
    output = generate(policy, [PROMPT] * 6, config, generator_for(3, "order"), record=True)
    rollout = Rollout.of(output, torch.zeros(6), torch.ones(6, dtype=torch.bool), config)
    found = values(policy, "trajectory-positions", rollout)
    expected = output.logprobs.sum(1)
    size = BLOCK if family == "bd" else block or LENGTH
    for canvas, step in replay(output, MASK):
        for row in range(6):
            chosen = step.positions[step.rows == row].tolist()
            weights = weights_of(policy, canvas[row], temperature)
            start = chosen[0] // size * size
            left = [i for i in range(start, start + size) if canvas[row, i] == MASK]
            for position in chosen:
                expected[row] += math.log(weights[position] / sum(weights[i] for i in left))
                left.remove(position)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_drawn_order_is_learnt_from_with_its_probability_alone(toys, tmp_path):
    policy = toy()
    config = settings(
        output_dir=str(tmp_path / "run"),
        remasking="state_confidence",
        end_last=False,
        order_temperature=0.7,
        logp_estimator="trajectory",
    )
    rows = [{"prompt": PROMPT}]
    with pytest.raises(ValueError, match="expected 'trajectory-positions'"):
        train_grpo(policy, [even], rows, config)
    config = config.replace(
        output_dir=str(tmp_path / "other"), logp_estimator="trajectory-positions"
    )
    folder = train_grpo(policy, [even], rows, config, rows, lambda text, row: True)
    assert read_rows(folder / "metrics.jsonl")[0]["grad_norm/surrogate"] > 0


def test_a_cold_order_is_the_surest_first(toys):
    policy, plain = toys["mdm"], sampler(steps=2, stop_at_end=False, temperature=0.0)
    cold = generate(policy, [PROMPT], plain.replace(order_temperature=1e-5), record=True)
    surest = generate(policy, [PROMPT], plain, record=True)
    for one, other in zip(cold.trajectory, surest.trajectory, strict=True):
        assert sorted(one.positions.tolist()) == sorted(other.positions.tolist())


# -- estimators against their targets --------------------------------------------------------------

UNBIASED = [name for name in TARGETS if name.split("-")[0] in NOISY]
KNOWN = [name for name in TARGETS if name not in UNBIASED]


@torch.no_grad()
def exact_value(policy, name, text, **options):
    """The target for a text up to its end, which has to fill its blocks."""
    n = int(policy.completion_mask(text[None]).sum())
    return TARGETS[name](oracle_of(policy, text[None, :n], **options)).item()


def texts_for(family):
    return TEXTS if family == "mdm" else TEXTS[:3]  # the last ends within a block


@each_family
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators_hit_their_targets(toys, family, name):
    policy = toys[family]
    for text in texts_for(family):
        found = draws(policy, name, text)
        error = found.std().item() / math.sqrt(len(found))
        assert error < 0.25
        assert abs(found.mean().item() - exact_value(policy, name, text)) < 3 * error


@torch.no_grad()
def test_coupled_by_hand(toys):
    policy, text = toys["mdm"], TEXTS[0]
    logp = oracle_of(policy, text[None]).logp[0, 0]  # (2^L, L)
    rollout = rollout_of(policy, text.expand(30, -1))
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"), 1)
    found = ESTIMATORS["coupled"](policy, rollout, noise)
    for row in range(30):
        t = 0.2 + 0.6 * noise.time[row, 0, 0].item()
        m = [i for i in range(LENGTH) if noise.order[row, 0, i] < t]
        inside = sum(2**i for i in m)
        for i in range(LENGTH):
            own, share = (inside, t) if i in m else (2**LENGTH - 1 - inside, 1 - t)
            expected = (logp[-1, i] + logp[own, i] / share) / 2
            assert found[row, i].item() == pytest.approx(expected.item(), abs=1e-4)


@torch.no_grad()
@each_family
@pytest.mark.parametrize("name", KNOWN)
def test_estimators_without_noise_equal_their_targets(toys, family, name):
    policy, texts = toys[family], texts_for(family)
    found = values(policy, name, rollout_of(policy, texts))
    allowed = {"suppress_mask": name != "one_step"}
    expected = [exact_value(policy, name, text, **allowed) for text in texts]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["ar_order", "complementary", "coupled", "one_step"])
def test_scoring_applies_the_samplers_temperature_and_ban(toys, name):
    policy, text = toys["mdm"], TEXTS[1]
    changes = {"temperature": 0.6, "suppress_mask": False}
    found = draws(policy, name, text, config=sampler(**changes))
    error = found.std().item() / math.sqrt(len(found)) + 1e-4
    target = exact_value(policy, name, text, **changes)
    assert abs(found.mean().item() - target) < 3 * error
    assert abs(exact_value(policy, name, text) - target) > 10 * error


@torch.no_grad()
@each_family
@pytest.mark.parametrize(
    "name", [name for name in MASKED if name not in ("ar_style", "trajectory")]
)
def test_what_lies_behind_the_end_does_not_matter(toys, family, name):
    policy = toys[family]
    same, other = (torch.tensor([[1, 0, END, last]]) for last in (0, 2))
    first, second = (values(policy, name, rollout_of(policy, text)) for text in (same, other))
    assert first.item() == second.item() < 0


@torch.no_grad()
def test_a_block_with_the_end_inside_counts_its_own_tokens(toys):
    """In the second block of TEXTS[3] only the first position counts."""
    policy = toys["bd"]
    first = oracle_of(policy, TEXTS[3:, :BLOCK]).elbo()
    blank = torch.tensor([[1, 0, MASK, MASK]])
    rest = denoiser_of(policy, PROMPT, LENGTH)(blank)[0, 2, END]
    for name in ("elbo", "complementary", "quadrature"):
        found = draws(policy, name, TEXTS[3])
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - (first + rest)) < 3 * error


@torch.no_grad()
@each_family
def test_clean_text_is_scored_with_itself_as_input(toys, family):
    policy, text = toys[family], TEXTS[:1]
    canvas = torch.cat([policy.encode([PROMPT]).input_ids, text], 1)
    logits = policy.logits(canvas, pattern=policy.pattern(len(PROMPT), LENGTH))
    logp = logits[:, len(PROMPT) :].log_softmax(-1).gather(-1, text[..., None]).sum()
    found = values(policy, "ar_style", rollout_of(policy, text))
    assert found.item() == pytest.approx(logp.item(), abs=1e-5)


# -- bounds and variances --------------------------------------------------------------------------


@torch.no_grad()
def test_the_bounds_enclose_the_any_order_law():
    violated = 0
    for seed in range(4):
        policy = toy(seed=seed)
        denoiser = tabulate(denoiser_of(policy, PROMPT, LENGTH), STATES, LENGTH)
        oracle = Oracle(denoiser, all_texts(policy, LENGTH), MASK)
        mixture = oracle.law("random", LENGTH)
        assert (oracle.elbo() <= mixture + 1e-9).all()
        assert (mixture <= oracle.upper_bound() + 1e-9).all()
        assert (oracle.upper_bound() <= oracle.upper_bound(2 * LENGTH) + 1e-9).all()
        violated += (oracle.upper_bound(1) < mixture).double().mean().item() / 4
    assert 0.2 < violated < 0.8


@each_family
@pytest.mark.parametrize(("name", "b"), [("upper_bound-{}", None), ("upper_bound-{}-b1", 1)])
def test_the_upper_bound_is_approached_from_below(toys, family, name, b):
    policy, text = toys[family], TEXTS[0]
    with torch.no_grad():
        target = oracle_of(policy, text[None]).upper_bound(b).item()
    few, many = (draws(policy, name.format(k), text, 4000 // k) for k in (1, 25))
    error = many.std().item() / math.sqrt(len(many))
    assert few.mean() < many.mean() - 3 * error
    assert few.mean() < target - 0.02
    assert abs(many.mean().item() - target) < 0.1 * abs(few.mean().item() - target) + 3 * error


def variances(oracle):
    """Exact variances, at two passes, of `elbo-2`, `complementary`, its two halves drawn apart, and
    `overlapping`: over all sets, and all tokens that two of them may share, (4, N)."""
    n, sets = oracle.n, len(oracle.masked)
    size = oracle.size.clamp(min=1)
    mean = torch.where(oracle.masked, oracle.logp[0], 0).sum(-1) / size  # (N, 2^n)
    within = torch.tensor([1 / math.comb(n, k) for k in oracle.size.tolist()])  # of its size
    some = within * (oracle.size > 0)

    def variance(values, chance):
        centre = (values * chance).sum(-1, keepdim=True)
        torch.testing.assert_close(centre[:, 0], oracle.elbo(), atol=1e-6, rtol=1e-6)
        return ((values - centre).square() * chance).sum(-1)

    pair = (n + 1) / 2 * (mean + mean.flip(-1))  # the complement of set s is set 2^n - 1 - s
    at, token = oracle.masked.nonzero().T
    shared = n / 2 * (mean[:, at] + mean[:, sets - 1 - at + 2**token])
    return torch.stack(
        [
            variance(n * mean, some / n) / 2,
            variance(pair, within / (n + 1)),
            variance((n + 1) * mean, within / (n + 1)) / 2,
            variance(shared, within[at] / size[at] / n),
        ]
    )


@pytest.fixture(scope="module")
def trained():
    """Exact variances for short completions of the shipped model."""
    policy, config, found = load_policy("tiny-mdm"), sampler(max_new_tokens=6, steps=6), []
    for row in load_task("medcot").rows("validation", 3):
        with torch.no_grad():
            out = generate(policy, [row["prompt"]] * 4, config, generator_for(0, "x"))
            denoiser = denoiser_of(policy, row["prompt"], 6)
            found.append(variances(Oracle(denoiser, out.completion_ids, policy.mask_token_id)))
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_pairs_have_less_variance_than_their_halves_drawn_apart(seed):
    """At equal passes (apart they are ESPO's plain Monte-Carlo); and `overlapping` on average less
    than `elbo`, whose sets are never empty."""
    plain, pairs, apart, shared = variances(oracle_of(toy(seed=seed), TEXTS[:2]))
    assert (pairs < apart).all()
    assert (shared / plain).log().mean() < 0


def test_on_a_trained_model_pairs_have_less_variance_than_plain_draws(trained):
    """The same, on average over texts."""
    plain, pairs, apart, shared = trained.log().mean(1)
    assert pairs < apart - 0.1
    assert shared < plain - 0.1


@torch.no_grad()
def test_draws_have_the_variance_that_enumeration_says(toys):
    policy, text = toys["mdm"], TEXTS[0]
    expected = variances(oracle_of(policy, text[None]))[:, 0].tolist()
    for name, value in zip(("elbo-2", "complementary", None, "overlapping"), expected, strict=True):
        if name:
            found = draws(policy, name, text, 3000).var().item()
            assert found == pytest.approx(value, rel=0.15)


@torch.no_grad()
def test_shared_noise_steadies_the_difference_to_the_reference():
    """VRPO: both errors are those of the same sets."""
    policy, other = toy(), toy()
    for weight in other.model.parameters():
        weight.add_(0.02 * torch.randn(weight.shape, generator=generator_for(0, "move")))
    rollout = rollout_of(policy, TEXTS[0].expand(1000, -1))
    own = draw_noise(rollout, 0.0, generator_for(0, "noise"), 2, shared=False)
    score = estimator("elbo-2", policy)
    value = score(policy, rollout, own)
    shared, apart = (value - score(other, rollout, n) for n in (own, own.reference))
    assert shared.mean() == pytest.approx(
        apart.mean().item(), abs=4 * apart.std().item() / 1000**0.5
    )
    assert shared.var() < apart.var() / 4


# -- gradients -------------------------------------------------------------------------------------


def flat_gradient(value, policy):
    parameters = list(policy.trainable_parameters().values())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def cosine(a, b):
    return torch.cosine_similarity(a, b, 0).item()


@each_family
@pytest.mark.parametrize("name", TARGETS)
def test_the_expected_gradient_is_that_of_the_target(toys, family, name):
    policy, text = toys[family], TEXTS[:1]
    oracle = oracle_of(policy, text, suppress_mask=name != "one_step")
    exact = flat_gradient(TARGETS[name](oracle).sum(), policy)
    count = 600 if name in UNBIASED else 1
    rollout = rollout_of(policy, text.expand(count, -1))
    found = flat_gradient(values(policy, name, rollout).mean(), policy)
    assert cosine(found, exact) > 0.99
    assert (found - exact).norm() < 0.15 * exact.norm()


def test_pairs_point_nearer_to_the_gradient_than_as_many_plain_draws(toys):
    policy, text = toys["mdm"], TEXTS[:1]
    exact = flat_gradient(oracle_of(policy, text).elbo().sum(), policy)

    def mean_cosine(name):
        rollout = rollout_of(policy, text)
        seeds = range(60)
        found = (flat_gradient(values(policy, name, rollout, s).sum(), policy) for s in seeds)
        return sum(cosine(gradient, exact) for gradient in found) / 60

    plain = mean_cosine("elbo-2")
    assert mean_cosine("complementary") > plain + 0.02
    assert mean_cosine("overlapping") > plain + 0.02


# -- trajectories ----------------------------------------------------------------------------------


def every_trajectory(family, steps):
    """All ways to reveal four positions, as `revealed_at`, in blocks where the family has them."""
    n = LENGTH if family == "mdm" else BLOCK
    quotas = evenly(n, steps)
    within = sorted(
        set(itertools.permutations([s for s, q in enumerate(quotas) for _ in range(q)]))
    )
    ways = itertools.product(within, repeat=LENGTH // n)
    return [[steps * b + s for b, block in enumerate(way) for s in block] for way in ways]


TRAJECTORIES = [("mdm", 1), ("mdm", 3), ("bd", 1), ("bd", 2)]


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "steps"), TRAJECTORIES)
def test_trajectories_add_up_to_the_samplers_law(toys, tables, family, steps, rule):
    policy = toys[family]
    texts, oracle = tables[family]
    ways = torch.tensor(every_trajectory(family, steps))
    config = sampler(remasking=rule, steps=steps * LENGTH // oracle.n)
    joint, tokens = [], []
    for way in ways:
        rollout = rollout_of(policy, texts, config, way.expand(len(texts), -1))
        joint.append(values(policy, "trajectory-positions", rollout).double())
        tokens.append(values(policy, "trajectory", rollout).double())
        for found, asked in ((joint[-1], rule), (tokens[-1], None)):
            if asked in ("random", "low_confidence", None):
                expected = oracle.trajectory(rollout.revealed_at, asked)
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    total = torch.stack(joint).exp()
    if rule in ("random", "low_confidence"):
        torch.testing.assert_close(
            total.sum(0), oracle.law(rule, steps).exp(), atol=1e-6, rtol=1e-3
        )
        assert total.sum().item() == pytest.approx(1, abs=1e-4)
    else:  # the rule allows one way, which the joint probability takes for granted
        legal = (
            torch.stack([oracle.trajectory(w.expand(len(texts), -1), rule) for w in ways]) > -1e9
        )
        assert (legal.sum(0) == 1).all()
        assert (total * legal).sum().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_the_probability_of_positions_knows_temperature_and_postponed_ends(toys, tables):
    """With ends postponed, against the sampler."""
    policy, (texts, _) = toys["mdm"], tables["mdm"]
    config = sampler(remasking="low_confidence", end_last=True, temperature=3.0, steps=2)
    laws = []
    for own in (config, config.replace(end_last=False)):
        joint = [
            values(policy, "trajectory-positions", rollout_of(policy, texts, own, way)).double()
            for way in torch.tensor(every_trajectory("mdm", 2))[:, None].expand(-1, len(texts), -1)
        ]
        laws.append(torch.stack(joint).exp().sum(0))
        assert laws[-1].sum().item() == pytest.approx(1, abs=1e-4)
    going_on = config.replace(stop_at_end=False)
    drawn = generate(policy, [PROMPT] * 4000, going_on, generator_for(0, "draws")).completion_ids
    assert p_value(laws[0], drawn) > 0.01
    assert p_value(laws[1], drawn) < 1e-4


@torch.no_grad()
def test_llada_ranks_tempered_draws_by_their_untempered_probability():
    policy, way = toy(seed=1), torch.tensor([0, 1, 0, 1])  # the second step has no choice
    texts = all_texts(policy, LENGTH)
    config = sampler(remasking="low_confidence", temperature=3.0, steps=2)
    rollout = rollout_of(policy, texts, config, way.expand(len(texts), -1))
    choice = values(policy, "trajectory-positions", rollout) - values(policy, "trajectory", rollout)
    blank = torch.full((1, LENGTH), MASK)
    rank, drawn = (denoiser_of(policy, PROMPT, LENGTH, t)(blank)[0].exp() for t in (1.0, 3.0))
    for text, found in zip(texts.tolist(), choice.exp().tolist(), strict=True):
        least = min(rank[i, text[i]] for i in (0, 2))
        expected = math.prod(drawn[j, rank[j] < least].sum().item() for j in (1, 3))
        assert found == pytest.approx(expected, abs=1e-5)


SAMPLERS = [
    ("mdm", {"steps": 3}),
    ("mdm", {"steps": 4, "block_length": 2}),
    ("mdm", {"steps": 3, "remasking": "low_confidence", "temperature": 0.7}),
    ("mdm", {"steps": 2, "remasking": "random", "suppress_mask": False}),
    ("bd", {"steps": 3}),
    ("bd", {"steps": 4, "remasking": "random"}),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), SAMPLERS, ids=str)
def test_a_trajectory_is_scored_as_it_was_drawn(toys, family, changes):
    config = sampler(**changes)
    out = generate(toys[family], [PROMPT] * 40, config, generator_for(0, "x"), record=True)
    rollout = Rollout.of(out, torch.zeros(40), torch.ones(40).bool(), config)
    assert (rollout.revealed_at < 0).any()  # behind a text that ended early
    assert torch.equal(rollout.completion_mask, out.completion_mask)
    mask = rollout.whole().completion_mask
    assert (mask & ~out.completion_mask).any()  # what lies behind the end counts
    score = estimator("trajectory", toys[family])
    found = score(toys[family], rollout, draw_noise(rollout, 0.0, generator_for(0, "noise")))
    torch.testing.assert_close(found, out.logprobs * mask, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("remasking", ["state_confidence", "low_confidence", "random"])
@pytest.mark.parametrize("family", ["mdm", "bd"])
def test_trajectories_that_end_with_their_text_are_as_probable_as_they_are_frequent(
    toys, family, remasking
):
    policy, n = toys[family], 4000
    config = sampler(remasking=remasking, steps=4, end_last=remasking == "random")
    out = generate(policy, [PROMPT] * n, config, generator_for(1, "draws"), record=True)
    rollout = Rollout.of(out, torch.zeros(n), torch.ones(n).bool(), config)
    log_p = values(policy, "trajectory-positions", rollout).double()
    ways = [tuple(x) for x in torch.cat([rollout.revealed_at, out.completion_ids], 1).tolist()]
    seen, p = Counter(ways), dict(zip(ways, log_p.exp().tolist(), strict=True))
    common = [way for way in seen if p[way] * n >= 5]
    counts = [seen[way] for way in common]
    expected = [p[way] * n for way in common]
    pooled = [n - sum(counts)], [n - sum(expected)]
    assert len(common) > 20
    assert 0 < pooled[1][0] < n / 2
    assert stats.chisquare(counts + pooled[0], expected + pooled[1]).pvalue > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "rule", "steps"), [("mdm", "low_confidence", 3), ("bd", "random", 4)]
)
def test_ending_with_the_text_leaves_its_law_as_it_is(toys, family, rule, steps):
    policy = toys[family]
    config = sampler(remasking=rule, steps=steps)
    laws = [
        Counter(
            tuple(ids)
            for ids in generate(
                policy, [PROMPT] * 6000, changed, generator_for(steps, "x")
            ).token_lists()
        )
        for changed in (config, config.replace(stop_at_end=False))
    ]
    common = [text for text in laws[0] | laws[1] if laws[0][text] + laws[1][text] >= 10]
    assert len(common) > 10
    assert laws[0] != laws[1]
    table = [[law[text] for text in common] for law in laws]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@torch.no_grad()
def test_what_a_trajectory_needs(toys):
    policy = toys["mdm"]
    with pytest.raises(ValueError, match="no trajectory: collect it with record=True"):
        values(policy, "trajectory", rollout_of(policy, TEXTS))
    config = sampler(revise=1)
    out = generate(policy, [PROMPT], config, record=True)
    with pytest.raises(ValueError, match="revise=1: expected 0"):
        Rollout.of(out, torch.zeros(1), torch.ones(1).bool(), config)
    parallel = sampler(threshold=0.5, steps=None)
    rollout = rollout_of(policy, TEXTS, parallel, torch.zeros_like(TEXTS))
    with pytest.raises(ValueError, match=r"threshold=0.5.*a given number a step"):
        values(policy, "trajectory-positions", rollout)


# -- the switch ------------------------------------------------------------------------------------

NAMES = [*MASKED, "elbo-3", "complementary-2", "trajectory-positions", "upper_bound-2-b1"]
COSTS = {"1": 1, "k": 3, "2k": 6, "1 + 2k": 7, "L": LENGTH, "S": 3}


@torch.no_grad()
@each_family
@pytest.mark.parametrize("name", MASKED)
def test_an_estimator_costs_what_it_says(toys, family, name):
    policy, passes = toys[family], []
    own = LENGTH // (policy.block_length or LENGTH)
    config = sampler(steps=3 if family == "mdm" else 4)
    out = generate(policy, [PROMPT] * 6, config, generator_for(0, "x"), record=True)
    rollout = Rollout.of(out, torch.zeros(6), torch.ones(6).bool(), config)
    costs = COSTS if family == "mdm" else COSTS | {"L": BLOCK, "S": 2}
    name += "-3" if ESTIMATORS[name].samples else ""
    handle = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, given, _: passes.append(len(given[0]) / len(rollout))
    )
    values(policy, name, rollout)
    handle.remove()
    assert sum(passes) == costs[ESTIMATORS[name.split("-")[0]].cost], own
    if name == "trajectory":
        assert len(passes) == 1


@torch.no_grad()
@each_family
@pytest.mark.parametrize("at_once", [1, 7, 12])
@pytest.mark.parametrize("name", ["trajectory", "trajectory-positions"])
def test_a_trajectory_in_packed_passes(toys, monkeypatch, family, name, at_once):
    """However many of its states a pass takes, the values are the same."""
    policy = toys[family]
    config = sampler(steps=3 if family == "mdm" else 4)
    out = generate(policy, [PROMPT] * 6, config, generator_for(0, "x"), record=True)
    rollout = Rollout.of(out, torch.zeros(6), torch.ones(6).bool(), config)
    packed = values(policy, name, rollout)
    monkeypatch.setattr(estimators, "STATES_AT_ONCE", at_once)
    torch.testing.assert_close(values(policy, name, rollout), packed, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@each_family
@pytest.mark.parametrize("name", [*NAMES, "elbo-2-unshared"])
def test_parts_of_a_rollout_are_scored_as_in_the_whole(toys, family, name):
    policy = toys[family]
    config = sampler(remasking="low_confidence", steps=4)
    out = generate(policy, [PROMPT, "bc"] * 3, config, generator_for(0, "x"), record=True)
    rollout = Rollout.of(out, torch.zeros(6), torch.ones(6).bool(), config)
    score = estimator(name, policy)
    noise = draw_noise(rollout, 0.5, generator_for(0, "noise"), score.samples, score.shared)
    whole = score(policy, rollout, noise)
    assert whole.shape in ((6,), (6, LENGTH))
    assert whole.dtype == torch.float32
    parts = (slice(0, 2), slice(2, 6))
    found = [score(policy, rollout.select(part), noise.select(part)) for part in parts]
    torch.testing.assert_close(torch.cat(found), whole, atol=1e-5, rtol=1e-5)
    if not score.shared:
        other = score(policy, rollout, noise.reference)
        found = [
            score(policy, rollout.select(part), noise.select(part).reference) for part in parts
        ]
        torch.testing.assert_close(torch.cat(found), other, atol=1e-5, rtol=1e-5)
        assert not torch.equal(other, whole)


def test_names_carry_settings(toys, ar):
    policy = toys["mdm"]
    found = estimator("elbo-16-unshared", policy)
    assert (found.samples, found.shared) == (16, False)
    assert estimator("elbo", policy).samples == 1
    assert estimator("trajectory-positions", policy).records
    for name, message in {
        "elbo-0": "'elbo' has no setting '0': expected a number of samples .* or 'unshared'",
        "one_step-4": "'one_step' has no setting '4': expected none",
        "trajectory-4": "has no setting '4': expected 'positions'",
        "upper_bound-b0": "no setting 'b0': expected a power",
        "elbo-b2": "no setting 'b2'",
        "eblo-4": "unknown logp_estimator 'eblo-4': did you mean 'elbo'",
    }.items():
        with pytest.raises(ValueError, match=message):
            estimator(name, policy)
    with pytest.raises(ValueError, match=r"'complementary-2' is not for .* 'ar': expected 'exact'"):
        estimator("complementary-2", ar)


# -- GRPO ------------------------------------------------------------------------------------------


def even(prompts, completions, completion_ids, **columns):
    """The share of "a" and "c"."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def settings(**changes):
    small = {"max_steps": 2, "max_completion_length": LENGTH, "steps": 4, "learning_rate": 1e-3}
    small |= {"logp_estimator": "one_step", "log_gradients": True}
    return GRPOConfig.thesis(**nested(small | changes))


@each_family
@pytest.mark.parametrize("name", NAMES)
def test_at_the_first_inner_step_the_ratio_is_one_and_the_kl_zero(family, name):
    policy, config = toy(family), settings(remasking="state_confidence", end_last=False)
    policy.sync_reference()
    score = estimator(name, policy)
    rows = [{"prompt": PROMPT}, {"prompt": "bc"}]
    draw = generator_for(0, "rollout")
    rollout, *_ = collect(policy, rows, [even], 6, config.sampler_for(policy), draw, score.records)
    assert (rollout.revealed_at is None) == (not name.startswith("trajectory"))
    rollout = rollout.whole() if score.records else rollout
    noise = draw_noise(rollout, 0.3, generator_for(0, "noise"), score.samples, score.shared)
    parameters = policy.trainable_parameters()
    found = update(policy, rollout, score, noise, None, parameters, config)
    assert found["ratio/mean"] == found["ratio/max"] == 1
    assert found["kl"] == found["kl/sum"] == found["grad_norm/kl"] == 0
    assert found["grad_norm/surrogate"] > 0


def test_noise_of_its_own_for_the_reference_makes_a_kl_where_there_is_none():
    policy, config = toy(), settings()
    policy.sync_reference()
    score = estimator("elbo-1-unshared", policy)
    rollout, *_ = collect(
        policy,
        [{"prompt": PROMPT}],
        [even],
        6,
        config.sampler_for(policy),
        generator_for(0, "rollout"),
    )
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"), score.samples, score.shared)
    found = update(policy, rollout, score, noise, None, policy.trainable_parameters(), config)
    assert found["ratio/max"] == 1
    assert found["kl"] > 0.01


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_a_completions_value_counts_as_one_token_with_its_mean(kl_estimator):
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (-9 * torch.rand(6, generator=generator).double() for _ in range(3))
    lengths = torch.tensor([1, 2, 3, 4, 4, 2])
    mask = torch.arange(4) < lengths[:, None]
    counted = torch.tensor([True, True, False, True, True, True])
    advantages = torch.randn(6, generator=generator).double() * counted
    ids = torch.zeros(6, 4, dtype=torch.long)
    rollout = Rollout(ids, mask, ids, mask, advantages, counted, SamplerConfig())
    config = settings(kl_estimator=kl_estimator, beta=0.3, epsilon=0.2)
    surrogate, kl, seen = grpo_loss(logp, old, ref, rollout, config)
    expected, expected_kl = 0.0, 0.0
    for i in range(6):
        ratio = math.exp((logp[i] - old[i]) / lengths[i])
        a, d = advantages[i].item(), ((logp[i] - ref[i]) / lengths[i]).item()
        form = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[kl_estimator]
        if counted[i]:
            expected -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            expected_kl += 0.3 * form
        assert seen["ratio"][i].item() == pytest.approx(ratio)
    assert (surrogate.item(), kl.item()) == pytest.approx((expected, expected_kl))


LEARNING = [("mdm", "complementary-2"), ("mdm", "trajectory"), ("bd", "trajectory-positions")]


@pytest.mark.parametrize(("family", "name"), LEARNING)
def test_a_run_learns_from_it(tmp_path, family, name):
    config = settings(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        logp_estimator=name,
        remasking="state_confidence",
        end_last=False,
        num_iterations=2,
        learning_rate=1e-2,
        beta=0.01,
        kl_estimator="k2",
        per_device_train_batch_size=24,
    )
    folder = train_grpo(toy(family), [even], [{"prompt": PROMPT}], config)
    rows = read_rows(folder / "metrics.jsonl")[:-1]
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.15
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
