"""Runs that notebooks share, and the figures made of them."""

import itertools
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from safetensors.torch import load_file

from mdmrl.runs import read_rows
from mdmrl.study import plots, training
from mdmrl.study.colours import UNNAMED
from mdmrl.study.outputs import project_root


@pytest.fixture
def arm(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MDMRL_ROOT", str(tmp_path))
    return training.Arm(
        name="AR",
        policy="tiny-ar",
        settings={
            "logp_estimator": "exact",
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 8,
        },
        eval_prompts=2,
        final_steps=[8],
    )


def test_a_finished_run_is_read_not_trained(arm, monkeypatch):
    first = training.train_arm(arm, 0, "quick")
    assert first.step.tolist() == [0, 1]
    assert first["final8/failure_rate"].notna().tolist() == [False, True]

    folder = project_root() / "runs" / "quick" / "grpo" / first.run[0]
    sample = read_rows(folder / "samples.jsonl")[-1]
    shutil.rmtree(folder)  # what follows must not need it
    shown = training.last_sample(first, "AR", "quick")
    assert shown.startswith(f"{sample['prompt']}\n{sample['completions'][0]}\nreward ")

    def refuse(*arguments, **named):
        raise AssertionError("trained again")

    config, _, version = training.ALGORITHMS["grpo"]
    monkeypatch.setitem(training.ALGORITHMS, "grpo", (config, refuse, version))
    pd.testing.assert_frame_equal(training.train_arm(arm, 0, "quick"), first)
    pd.testing.assert_frame_equal(
        training.train_arm(arm.replace(name="other"), 0, "quick").drop(columns="arm"),
        first.drop(columns="arm"),
    )
    for changed, seed in ((training.variant(arm, "AR", beta=0.5), 0), (arm, 1)):
        with pytest.raises(AssertionError, match="trained again"):
            training.train_arm(changed, seed, "quick")


def test_curves_show_every_seed_their_mean_and_interval():
    runs = pd.DataFrame(
        {"arm": "AR", "seed": seed, "step": step, "reward": seed + step}
        for seed in (0, 2)
        for step in range(3)
    )
    _, axes = plt.subplots()
    plots.curves(axes, runs, "reward", ["AR"])
    *seeds, mean = axes.get_lines()
    assert [list(line.get_ydata()) for line in seeds] == [[0, 1, 2], [2, 3, 4]]
    assert list(mean.get_ydata()) == [1, 2, 3]
    (band,) = axes.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    half = 12.7062  # t quantile of one degree of freedom times the standard error of 1
    assert (low, high) == pytest.approx((1 - half, 3 + half), rel=1e-4)


def test_a_colour_says_what_an_arm_is():
    """Whatever its place, steps or weight of the KL term; variants differ by their line."""
    assert plots.colour("AR") == plots.colour("tiny-ar, flat") == plots.colour("AR, k2, β = 0.05")
    one_step = plots.colour("MDM one_step, 16 steps")
    assert one_step == plots.colour("one_step") == plots.colour("MDM one_step, k3, β = 1")
    assert plots.colour("bd blocks") == plots.colour("bd PPO") == plots.colour("block diffusion")
    assert plots.colour("MDM") == plots.colour("whole completion") != one_step
    assert plots.colour("my own") == UNNAMED
    names = ["AR", "MDM one_step, 4 steps", "MDM one_step, 64 steps", "MDM one_step, 4 steps, SFT"]
    assert list(plots.line_styles(names).values()) == ["-", "-", "-", "--"]

    runs = pd.DataFrame([{"arm": n, "seed": 0, "step": s, "x": s} for n in names for s in (0, 1)])
    _, axes = plt.subplots()
    plots.curves(axes, runs, "x", names)
    lines = [line for line in axes.get_lines() if line.get_label() in names]
    assert [line.get_color() for line in lines] == list(plots.palette(names).values())
    assert [line.get_linestyle() for line in lines] == ["-", "-", "-", "--"]


def test_a_shade_says_how_many_denoising_steps():
    """Fewer are lighter, more are darker, in whatever order; alone, an arm has the hue itself."""
    names = [f"MDM one_step, {steps} steps" for steps in (64, 4, 16)]
    shades = plots.palette([*names, "AR", "MDM one_step, 4 steps, SFT"])
    light = {name: sum(to_rgb(shade)) for name, shade in shades.items()}
    assert light[names[1]] > light[names[2]] > light[names[0]]
    assert shades["MDM one_step, 4 steps, SFT"] == shades[names[1]]
    assert shades["AR"] == plots.colour("AR")
    assert plots.palette(names[:1])[names[0]] == plots.colour("one_step")
    blue = [sum(to_rgb(shade)) for shade in plots.palette(["ar, 2 steps", "ar, 1 step"]).values()]
    assert blue[0] < sum(to_rgb(plots.colour("ar"))) < blue[1]  # a dark hue goes both ways


# Machado et al. 2009, full severity, on linear RGB.
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "deuteranopia": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def seen_colour(colour: str, blindness: str) -> np.ndarray:
    """CIELAB of a colour as someone with that blindness sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1)
    xyz = TO_XYZ @ seen / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize(
    "shown",
    [
        ("AR", "MDM", "bd"),
        ("AR", "MDM ar_style, 16 steps", "MDM one_step, 16 steps", "recommended, 64 steps"),
        ("whole", "exact", "PPO", "bd blocks"),
        ("elbo", "complementary", "overlapping", "quadrature", "coupled", "upper_bound"),
        (
            *("AR", "whole completion", "blocks", "blocks, prefix cache", "blocks, dual cache"),
            *("blocks, threshold", "block diffusion"),
        ),
        ("flat", "unit after unit", "units at once"),
        ("V", "mean log-probability"),
        (
            *("two gates", "mean log-probability", "permuted", "the thesis's bands"),
            *("prompt alone", "majority vote"),
        ),
        (
            *("base", "many steps", "few steps, equal updates", "few steps, equal cost"),
            "few steps, equal cost, depth capped",
        ),
        ("SFT", "RFT", "Online RFT", "DPO", "PPO", "GRPO"),
    ],
    ids=lambda shown: shown[1],
)
def test_colours_of_one_figure_differ_for_everyone(shown, blindness):
    seen = [seen_colour(plots.colour(name), blindness) for name in shown]
    apart = {
        (shown[i], shown[j]): np.linalg.norm(seen[i] - seen[j])
        for i, j in itertools.combinations(range(len(shown)), 2)
    }
    assert min(apart.values()) > 20, min(apart, key=apart.get)


def test_log_curves_show_the_median_and_range_and_leave_gaps_at_zero():
    values = {0: [0, 1, 10], 1: [0, 2, 10], 2: [0, 400, 10]}
    runs = pd.DataFrame(
        {"arm": "AR", "seed": seed, "step": step, "kl": kl}
        for seed, curve in values.items()
        for step, kl in enumerate(curve)
    )
    _, axes = plt.subplots()
    plots.curves(axes, runs, "kl", ["AR"], log=True)
    assert axes.get_yscale() == "log"
    median = list(axes.get_lines()[-1].get_ydata())
    assert median == pytest.approx([float("nan"), 2, 10], nan_ok=True)
    (band,) = axes.collections
    assert tuple(band.get_paths()[0].get_extents().intervaly) == (1, 400)


def test_dots_show_the_mean_over_seeds_its_interval_and_what_decides():
    values = pd.Series({("AR", 0): 1.0, ("AR", 1): 3.0, ("MDM", 0): 2.0})
    _, axes = plt.subplots()
    plots.dots(axes, values, ["AR", "MDM", "BD"], bound=0.5)
    means = {
        line.get_ydata()[0]: line.get_xdata()[0]
        for line in axes.get_lines()
        if line.get_marker() == "o"
    }
    assert means == {0: 2.0, 1: 2.0}
    half = 12.7062  # t quantile of one degree of freedom times the standard error of 1
    spans = [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "None"]
    assert spans[0] == pytest.approx([2 - half, 2 + half], rel=1e-4)
    assert spans[-1] == [0.5, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AR", "MDM", "BD"]


def test_labels_at_the_ends_of_lines_stand_apart_in_their_order():
    figure, axes = plt.subplots(figsize=(3, 2))
    for name, end in {"low": 0.0, "high": 1.0, "mid": 0.999, "same": 0.999}.items():
        axes.plot([0, 1], [0, end], label=name)
    plots.label_ends(axes)
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert sorted(heights, key=heights.get) == ["low", "mid", "same", "high"]
    ordered = sorted(heights.values())
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.05
    plt.close(figure)


def test_per_seed_curves_leave_out_updates_without_the_column():
    runs = pd.DataFrame(
        {"arm": "AR", "seed": [1, 0, 0], "step": [0, 1, 0], "eval/reward": [3.0, None, 2.0]}
    )
    assert [c.tolist() for c in training.per_seed(runs, "AR", "eval/reward")] == [[2.0], [3.0]]


def test_every_algorithm_trains_an_arm_of_its_own(arm):
    ppo = arm.replace(
        name="PPO",
        policy="tiny-mdm",
        algorithm="ppo",
        settings={
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 8,
            "sampler": {"steps": 2},
            "value_batches": 2,
            "learning_rate": 1e-3,
        },
        final_steps=[],
        path_kl={"steps": 4, "block_length": 4},
    )
    frame = training.train_arm(ppo, 0, "quick")
    assert frame.run[0].startswith("tiny-mdm-ppo-s0-")
    assert frame["values/loss"].notna().any()
    before, after = frame["eval/path_kl"]
    assert before == 0 < after
    with pytest.raises(ValueError, match="unknown algorithm 'pp': did you mean 'ppo'"):
        arm.replace(algorithm="pp")
    with pytest.raises(ValueError, match="unknown PPOConfig key 'logp_estimator'"):
        training.train_arm(ppo.replace(settings={"logp_estimator": "elbo"}), 0, "quick")


def test_a_cold_start_comes_before_rl(arm):
    """The policy that RL starts from is the fine-tuned one, which is its reference too."""
    plain = training.train_arm(arm, 0, "quick")
    sft = {"max_steps": 2, "per_device_train_batch_size": 2}
    cold = training.train_arm(arm.replace(sft=sft), 0, "quick")
    assert cold.run[0] != plain.run[0]
    folder = project_root() / "runs" / "quick" / "grpo" / f"{cold.run[0]}-sft"
    learnt = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in learnt] == [0, 1, 2]
    assert cold["kl/sum"][0] == 0
    assert cold["eval/entropy"][0] != plain["eval/entropy"][0]


def test_lora_stays_lora_after_a_cold_start(arm):
    """The cold start's adapter is merged; RL trains one of its own, and nothing else."""
    sft = {"max_steps": 1, "per_device_train_batch_size": 2}
    settings = arm.settings | {"save_steps": 1}
    cold = training.train_arm(arm.replace(lora={"r": 2}, sft=sft, settings=settings), 0, "quick")
    folder = project_root() / "runs" / "quick" / "grpo" / cold.run[0] / "checkpoints"
    latest = max(folder.iterdir())
    assert (latest / "pretrained" / "adapter_config.json").exists()
    assert all("lora" in name for name in load_file(latest / "policy.safetensors"))


def test_an_arm_may_have_rewards_of_its_own(arm):
    """Trained, evaluated and named by them."""
    plain = training.train_arm(arm, 0, "quick")
    capped = training.train_arm(arm.replace(rewards={"faithful": False}), 0, "quick")
    assert capped.run[0] != plain.run[0]
    for frame, own, other in ((plain, "depth", "capped_depth"), (capped, "capped_depth", "depth")):
        for before in ("", "eval/", "final8/"):
            assert f"{before}rewards/{own}/mean" in frame
            assert f"{before}rewards/{other}/mean" not in frame


@pytest.mark.slow
def test_the_hierarchy_of_ppo_is_the_pipeline(arm):
    """Its episodes are units, which V may send back."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2}
    settings |= {"max_completion_length": 8, "sampler": {"steps": 4}, "value_batches": 2}
    own = {"policy": "tiny-mdm", "algorithm": "ppo", "settings": settings}
    own |= {"hierarchy": {"description_tokens": 4}}
    own |= {"final_steps": [], "eval_prompts": 2}
    guide = {"form": "faithful", "budget": 2.0}
    plain, guided = (
        training.train_arm(arm.replace(**own, guide=given), 0, "quick") for given in ({}, guide)
    )
    assert plain.run[0] != guided.run[0]
    assert guided.token_forwards.max() > plain.token_forwards.max()
    assert (plain.dropna(subset=["loss"])["max_logprob_mismatch"] < 1e-4).all()
    with pytest.raises(ValueError, match="no guide without the hierarchy's units"):
        arm.replace(algorithm="ppo", settings={}, guide=guide)
