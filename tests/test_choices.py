"""What can be chosen in a notebook, against what it should then show."""

import json
import math
import re

import pandas as pd
import pytest
import torch
from test_sampling import PROMPTS

from mdmrl.config import InputError
from mdmrl.diffusion_exact import conditionals
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.study import choices
from mdmrl.study.chain import Chain
from mdmrl.study.choices import arm_picker, bound_sliders, compare_runs, sampler_bench
from mdmrl.study.widgets import Choices


def plain(shown):
    return re.sub(r"<[^>]*>", "", shown)


def test_controls_and_the_static_twin(monkeypatch):
    def show(power, word, some):
        if word == "no":
            raise InputError("power=1 < 2")
        return f"{word}{2**power}{''.join(some)}"

    made = Choices(show, {"power": 2}, power=[1, 2, 3], word=["yes", "no"], some=("a", "b"))
    assert made._repr_mimebundle_() == {"text/html": "yes4a"}
    monkeypatch.setenv("JPY_SESSION_NAME", "mine.ipynb")
    assert "application/vnd.jupyter.widget-view+json" in made._repr_mimebundle_()
    slider, menu, several, view = made.widget().children
    assert [type(c).__name__ for c in (slider, menu)] == ["SelectionSlider", "Dropdown"]
    slider.value, several.value = 3, ("a", "b")
    assert view.value == "yes8ab"
    menu.value = "no"
    assert view.value == "<i>power=1 &lt; 2</i>"


def test_the_bench_gives_the_samplers_text_and_its_cost(mdm, ar):
    bench = sampler_bench(mdm, PROMPTS[0], 12)
    assert bench.options["block_length"] == ["whole", 1, 2, 3, 4, 6]
    own = {"steps": 8, "temperature": 0.7}
    shown = bench.shown(**own, block_length=6, rule="random")
    config = SamplerConfig(max_new_tokens=12, block_length=6, remasking="random", **own)
    output = generate(mdm, PROMPTS[:1], config, record=True)
    text = plain(re.search(r"<div.*?>(.*)</div>", shown, re.S)[1])
    assert len(text) and text.startswith(output.completions[0][:3])
    assert f"{output.nfe} forward passes, {output.token_forwards:,} positions" in shown
    assert "expected at least 12, one for each block" in bench.shown(
        steps=8, temperature=0.0, block_length=1, rule="random"
    )
    with pytest.raises(InputError, match="kind 'ar'"):
        sampler_bench(ar, PROMPTS[0], 12)


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """A run folder and a committed run, which has the samples of its last update alone."""
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    folder, pieces = tmp_path / "runs" / "mine", tmp_path / "figures" / "data" / "runs"
    pieces.mkdir(parents=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"beta": 1, "seed": 0}')
    rows = [{"step": n, "prompt": "<p>", "completions": [f"t{n}"], "rewards": [n]} for n in (0, 10)]
    rows = [row | {"reward": row["step"]} for row in rows]
    for name in ("metrics", "samples"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (pieces / "theirs-s0-0123456789.csv").write_text("step,reward\n0,1\n4,2\n")
    known = {"step": 4, "prompt": "q", "completions": ["last"], "rewards": [None]}
    known["identity"] = {"settings": {"beta": 2, "seed": 0}}
    (pieces / "theirs-s0-0123456789.json").write_text(json.dumps(known))


def test_runs_are_compared_wherever_they_lie(two_runs, monkeypatch):
    drawn = []
    monkeypatch.setattr(choices, "picture", lambda figure: drawn.append(figure) or "")
    runs = ("mine", "theirs-s0-0123456789")
    made = compare_runs()
    assert made.options["runs"] == made.begin["runs"] == runs
    made._repr_html_()
    assert drawn.pop().axes[0].get_lines()[0].get_xydata().tolist() == [[0, 0], [10, 10]]
    early = made.shown(runs=runs, column="reward", percent=20)
    assert "t0" in early and "t10" not in early and "last" in early and "&lt;p&gt;" in early
    assert "t10" in made.shown(runs=runs, column="reward", percent=60)
    assert "<th>beta</th>" in early and "<th>seed</th>" not in early
    _, theirs = drawn[0].axes[0].get_lines()
    assert theirs.get_xydata().tolist() == [[0, 1], [4, 2]]
    assert made.shown(runs=(), column="reward", percent=0) == ""
    assert compare_runs("their", begin=["mine"]).begin["runs"] == runs[1:]
    assert compare_runs("none")._repr_html_() == "no runs yet"


def test_an_arm_stands_beside_ar_at_its_beta(monkeypatch):
    drawn = []
    monkeypatch.setattr(choices, "picture", lambda figure: drawn.append(figure) or "")
    names = ["AR", "MDM x, 4 steps", "AR, β = 0", "MDM x, 4 steps, β = 0"]
    rows = [
        {"arm": n, "seed": 0, "step": s, "reward": i} for i, n in enumerate(names) for s in (0, 1)
    ]
    grid = {"main": names[1], "form": ["k3", "k3"], "β": 1.0, "closed": [0.2, 0.4]}
    grid |= {"collapsed": False, "loss/std": 1.0, "kl/std": 1.0, "kl/max": 1.0}
    made = arm_picker(pd.DataFrame(rows), pd.DataFrame(grid))
    assert (made.options["arm"], made.options["β"]) == (names[1:2], ["1", "0"])
    shown = made.shown(arm=names[1], β="0", column="reward")
    thick = [line for line in drawn[0].axes[0].get_lines() if line.get_linewidth() > 1]
    assert {line.get_label(): line.get_ydata()[0] for line in thick} == {names[1]: 3, "AR": 2}
    assert "<td>0.3</td>" in shown


def test_the_bounds_of_a_known_law(monkeypatch):
    """One letter a block is the chain rule, at every T: the entropy."""
    monkeypatch.setattr(choices, "picture", lambda figure: "")
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    joint /= joint.sum()
    texts = torch.cartesian_prod(*[torch.arange(2)] * 3)
    toy = Chain(texts, joint.flatten(), 2, 0.0, {"true": conditionals(joint)})
    made = bound_sliders(toy, [1, 2, 4])
    assert made.options["blocks"] == [1, 3] and made.begin["T"] == 2
    entropy = -(joint * joint.log()).sum().item()
    shown = made.shown(model="true", schedule="cosine", T=1, blocks=3)
    numbers = [float(x) for x in re.findall(r"\d\.\d{4}", shown)]
    assert numbers == pytest.approx([entropy] * 3, abs=1e-4)
    marginals = [joint.sum([i for i in range(3) if i != axis]) for axis in range(3)]
    apart = sum(-(p * p.log()).sum().item() for p in marginals)  # all revealed at once
    bound, exact, limit = map(
        float,
        re.findall(r"\d\.\d{4}", made.shown(model="true", schedule="linear", T=1, blocks=1)),
    )
    assert (bound, exact) == pytest.approx((apart, apart), abs=1e-4)
    assert limit == pytest.approx(entropy, abs=1e-4) and math.isfinite(limit)
