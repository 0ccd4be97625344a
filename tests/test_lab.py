"""What notebook 05 measures: laws are laws, and what has no noise is exact."""

import pytest

from mdmrl.study.lab import TARGETS, Lab
from mdmrl.zoo.toy import toy_policy


@pytest.fixture(scope="module")
def lab():
    return Lab.written(toy_policy("ab"), "ab", 3, 3, seed=0)


def test_laws_add_up_to_one_and_bounds_lie_on_their_sides(lab):
    found = lab.objects()
    mass = {name: values.exp().sum().item() for name, values in found.items()}
    laws = [*found][:8]
    assert [mass[name] for name in laws] == pytest.approx([1.0] * 8, abs=1e-5)
    assert (found["ELBO"] <= found["random, 3 steps"] + 1e-6).all()
    assert mass["Hölder, b = L"] > 1


def test_estimators_without_noise_are_exact_in_the_passes_that_they_state(lab):
    table = lab.errors([1], draws=3).set_index("estimator")
    assert {*table.index} == {*TARGETS, "trajectory"}
    noiseless = table[table.k == 0]
    assert {*noiseless.index} == {"one_step", "ar_order", "trajectory"}
    assert noiseless.error.max() < 1e-5 and noiseless["std"].max() == 0
    assert noiseless.passes.to_dict() == {"one_step": 1, "ar_order": 3, "trajectory": 3}
    assert table["from sampler"]["trajectory"] < 1e-5 < table["from sampler"]["one_step"]


def test_the_sampler_s_own_likelihood_has_its_own_gradient(lab):
    table = lab.cosines([1], draws=1).set_index("estimator")
    assert table.loc["trajectory", ["own", "sampler"]].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert table.own["ar_order"] == pytest.approx(1, abs=1e-4)
