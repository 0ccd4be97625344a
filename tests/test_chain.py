"""The toy of notebook 01, against sums over all its texts."""

import pytest
import torch

from mdmrl.runs import generator_for
from mdmrl.study.chain import Chain, Network

TOY = Chain.drawn(letters=3, length=4, seed=0)


def test_its_law_is_that_of_a_chain():
    assert TOY.law.sum().item() == pytest.approx(1)
    assert TOY.entropy == pytest.approx(-(TOY.law * TOY.law.log()).sum().item())
    drawn = TOY.sample(30_000, generator_for(0, "test"))
    share = (drawn == TOY.texts[7]).all(1).double().mean().item()
    assert share == pytest.approx(TOY.law[7].item(), abs=0.01)


@pytest.mark.parametrize("name", TOY.denoisers)
def test_one_letter_a_block_is_the_autoregressive_cross_entropy(name):
    """At every T, and of any model; a model that knows the law reaches the entropy."""
    xt, expected = torch.full_like(TOY.texts, TOY.mask), 0.0
    for i in range(4):
        log_mu = TOY.denoisers[name](xt)[:, i].gather(-1, TOY.texts[:, [i]]).squeeze(-1)
        expected -= (TOY.law @ log_mu).item()
        xt[:, i] = TOY.texts[:, i]
    table = TOY.block_bounds(TOY.denoisers[name], [1, 3]).set_index("blocks")
    assert table.loc[4].tolist() == pytest.approx([expected] * 3)
    assert (expected == pytest.approx(TOY.entropy)) == (name == "true conditionals")


def test_the_bound_of_t_steps_is_one_and_its_limit_is_what_training_estimates():
    table = TOY.bounds(TOY.denoisers["arbitrary table"], [1, 2, 8])
    assert (table["log p"] + 1e-12 >= table.ELBO).all() and table["-L_T alone"][0] == 0
    assert table.ELBO.tolist() == pytest.approx(
        (table["-L_T alone"] - table.reconstruction).tolist()
    )
    said = TOY.limits(TOY.denoisers["arbitrary table"], seed=0, batches=20)
    estimate, error = map(float, said.pop("training estimate").split(" ± "))
    assert {*said.values()} == {f"{-table.limit[0]:.10f}"}
    assert estimate == pytest.approx(-table.limit[0], abs=4 * error)


def test_the_table_of_a_network_is_the_network():
    network = Network(letters=3, length=4)
    torch.testing.assert_close(network.tabulated()(TOY.texts), network(TOY.texts).double())
