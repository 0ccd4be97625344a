"""The main experiment: RL on Countdown, where the reward is the answer; and MedCoT again by the
same rules, where it is the thesis's.

One run is one arm on one pair of checkpoints; a checkpoint is a seed. On MedCoT, which has one
pair, a seed is a seed of training. From a shell, as one process
of one thread, whose piece (`mdmrl.study.pieces`) is kept when it ends:

    python -m mdmrl.study.experiment                                  what is there, and what is not
    python -m mdmrl.study.experiment --pilot trajectory               choose its learning rate
    python -m mdmrl.study.experiment --arm trajectory --checkpoint 2
    python -m mdmrl.study.experiment --arm trajectory --checkpoint 2 --candidates
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd
import torch

from mdmrl.config import require, unknown
from mdmrl.policies.load import ZOO, load_policy
from mdmrl.runs import write_atomically
from mdmrl.study import benchmark
from mdmrl.study.candidates import Candidates
from mdmrl.study.outputs import figures_folder
from mdmrl.study.training import Arm, train_arm
from mdmrl.tasks import load_task

CHECKPOINTS = range(6)
FEW = range(3)  # checkpoints of the arms that are only measured
LEARNING_RATES = (1e-4, 3e-4)
PILOT = 100  # its seed, on the first checkpoint, with the validation items
PILOT_UPDATES = 100
RATES = "countdown_learning_rates"  # the table of their choices
WATCHED = 200  # held-out items, of those that are looked at, every `eval_steps` updates
ALL_STEPS = [1, 2, 3, 4, 6, 12]
SETTINGS = {
    "max_steps": 300,
    "per_device_train_batch_size": 64,  # 8 prompts
    "num_generations": 8,
    "max_completion_length": 12,
    "eval_steps": 20,
    "epsilon": 0.1,
    "beta": 0.0,
    "kl_estimator": "k2",
}
LOOKS = {"items": 500, "samples": 4, "steps": ALL_STEPS, "solutions": 100}
THESIS = {"beta": 1.0, "kl_estimator": "k3"}
WEAK = {"beta": 0.05}
# Of MedCoT: as in Fig. 4-1 to 4-3, with the reward of depth bounded.
MEDCOT_SEEDS = range(5, 10)
MEDCOT_SETTINGS = {
    "max_steps": 100,
    "per_device_train_batch_size": 12,  # 2 prompts
    "num_generations": 6,
    "max_completion_length": 128,
    "learning_rate": 3e-4,
    "eval_steps": 20,
    "epsilon": 0.1,
    "ref_model_sync_steps": 20,
    **THESIS,
}
MEDCOT_LOOKS = {"items": 200, "samples": 1, "steps": [1, 2, 4, 8, 16]}
FREE = {"beta": 0.0}
LENGTH = "max_completion_length"
SHORT = {LENGTH: MEDCOT_SETTINGS[LENGTH] // 2}  # beside the whole, Fig. 4-3
AS_DREAM = {"remasking": "low_confidence", "suppress_mask": False}

# By name: estimator, denoising steps (None: autoregressive), other settings, checkpoints, and after
# which arm.
ARMS: dict[str, tuple[str, int | None, dict, range, str | None]] = {
    "ar": ("exact", None, {}, CHECKPOINTS, None),
    "ar_style": ("ar_style", 4, {}, CHECKPOINTS, None),
    "one_step": ("one_step", 4, {}, CHECKPOINTS, None),
    "complementary": ("complementary", 4, {}, CHECKPOINTS, None),
    "trajectory": ("trajectory", 4, {}, CHECKPOINTS, None),
    "ar-k2": ("exact", None, WEAK, CHECKPOINTS, None),
    "one_step-k2": ("one_step", 4, WEAK, CHECKPOINTS, None),
    "trajectory-k2": ("trajectory", 4, WEAK, CHECKPOINTS, None),
    "trajectory-4-2": ("trajectory", 2, {}, CHECKPOINTS, "trajectory"),
    "trajectory-4-2-1": ("trajectory", 1, {}, CHECKPOINTS, "trajectory-4-2"),
    "trajectory-2": ("trajectory", 2, {}, CHECKPOINTS, None),
    "one_step-4-2": ("one_step", 2, {}, CHECKPOINTS, "one_step"),
    "one_step-4-2-1": ("one_step", 1, {}, CHECKPOINTS, "one_step-4-2"),
    "trajectory-low_confidence": ("trajectory", 4, {"remasking": "low_confidence"}, FEW, None),
    "trajectory-ascending": ("trajectory", 4, {"step_sizes": "ascending"}, FEW, None),
    "ar-k3": ("exact", None, THESIS, CHECKPOINTS, None),
    "ar_style-k3": ("ar_style", 4, THESIS, CHECKPOINTS, None),
    "one_step-k3": ("one_step", 4, THESIS, CHECKPOINTS, None),
    "trajectory-k3": ("trajectory", 4, THESIS, FEW, None),
    "ar_order": ("ar_order", 4, {}, FEW, None),
    "one_step-12": ("one_step", 12, {"max_steps": 150}, FEW, None),
    "trajectory-12": ("trajectory", 12, {"max_steps": 150}, FEW, None),
}
PREDICTED = ["ar_style", "one_step", "complementary", "trajectory", "ar_order"]
PREDICTED += ["trajectory-low_confidence"]  # arms whose gains `mdmrl.study.candidates` may predict
PREDICTING = {"max_steps": 60, "eval_steps": 30}  # a run of its own, whose bits are the arm's first
MEDCOT_ARMS: dict[str, tuple[str, int | None, dict, range, str | None]] = {
    "medcot-ar": ("exact", None, {}, MEDCOT_SEEDS, None),
    "medcot-ar_style": ("ar_style", 16, AS_DREAM, MEDCOT_SEEDS, None),
    "medcot-one_step": ("one_step", 16, AS_DREAM, MEDCOT_SEEDS, None),
    "medcot-trajectory": ("trajectory", 16, {}, MEDCOT_SEEDS, None),
    "medcot-ar-free": ("exact", None, FREE, MEDCOT_SEEDS, None),
    "medcot-ar_style-free": ("ar_style", 16, AS_DREAM | FREE, MEDCOT_SEEDS, None),
    "medcot-one_step-free": ("one_step", 16, AS_DREAM | FREE, MEDCOT_SEEDS, None),
    "medcot-trajectory-free": ("trajectory", 16, FREE, MEDCOT_SEEDS, None),
    "medcot-ar-short": ("exact", None, SHORT, MEDCOT_SEEDS, None),
    "medcot-descent-4": ("trajectory", 4, FREE, MEDCOT_SEEDS, None),
    "medcot-descent-4-2": ("trajectory", 2, FREE, MEDCOT_SEEDS, "medcot-descent-4"),
    "medcot-descent-4-2-1": ("trajectory", 1, FREE, MEDCOT_SEEDS, "medcot-descent-4-2"),
}
MEDCOT_AGAIN = [*MEDCOT_ARMS][:8]  # those of Fig. 4-1 and 4-2, drawn together
COUNTDOWN_ARMS = [*ARMS]
ARMS |= MEDCOT_ARMS
MAIN = ("ar", "ar_style", "one_step", "complementary", "trajectory")  # drawn in one figure
# Arguments of `runs` by scale. As a whole only what is kept is read: a run is its own process.
SCALES: dict[str, dict] = {
    "whole": {"names": COUNTDOWN_ARMS, "checkpoints": CHECKPOINTS, "train": False},
    "short": {
        "names": ["ar", "ar_style", "one_step", "trajectory"],
        "checkpoints": [0],
        "settings": {"max_steps": 60},
        "looks": {"items": 200, "samples": 2, "steps": [1, 2, 4, 12], "solutions": 40},
        "eval_prompts": 100,
    },
    "tiny": {
        "names": ["ar", "ar_style", "one_step", "trajectory"],
        "checkpoints": [0],
        "settings": {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 16},
        "looks": {"items": 8, "samples": 2, "steps": [1, 2, 4, 12], "solutions": 2},
        "eval_prompts": 8,
    },
}
SAMPLING = ("remasking", "step_sizes", "suppress_mask")
# What is drawn of a log, which no run leaves empty.
COLUMNS = ["name", "arm", "seed", "run", "step", "loss", "kl/sum", "step_time", "rollout_time"]
COLUMNS += ["grad_norm/surrogate", "grad_norm/kl", "token_forwards", "token_forwards/scoring"]
COLUMNS += ["eval/accuracy", "eval/reward", "eval/sampled/accuracy", "eval/sampled/reward"]


def pair(checkpoint: int) -> tuple[str, str]:
    """The autoregressive and the masked diffusion policy of a pre-training seed."""
    suffix = f"-s{checkpoint}" if checkpoint else ""
    return f"tiny-ar-countdown-matched{suffix}", f"tiny-mdm-countdown{suffix}"


def of(name: str) -> str:
    """What a seed of the arm is a seed of."""
    return "seed" if name in MEDCOT_ARMS else "checkpoint"


def label(name: str) -> str:
    """How figures and tables call an arm."""
    estimator, steps, own, _, before = ARMS[name]
    said = [f"MDM {estimator}", f"{steps} step{'s' * (steps > 1)}"] if steps else ["AR"]
    said += [f"after {ARMS[before][1]}"] if before else []
    if own.keys() & {"step_sizes"}:
        said.append(f"{own['step_sizes']} sizes")
    elif own.keys() & {"remasking"} and name not in MEDCOT_ARMS:
        said.append(own["remasking"])
    said += [f"β = {own['beta']:g}"] if "beta" in own else []
    said += [f"{own[LENGTH]} tokens"] if LENGTH in own else []
    return ", ".join(said)


def arm(name: str, checkpoint: int, **changes) -> Arm:
    """The arm of `ARMS` on one of the checkpoints. `changes` are settings of `Arm`, as of a smaller
    run; `settings` among them change some of GRPO's, in the arms before it too."""
    if name not in ARMS:
        raise unknown("arm", name, ARMS)
    estimator, steps, own, _, before = ARMS[name]
    made = {"name": label(name), "task": "countdown", "eval_prompts": WATCHED, "looks": LOOKS}
    settings = {"logp_estimator": estimator}
    if name in MEDCOT_ARMS:
        made |= {"policy": ("tiny-ar", "tiny-mdm")[bool(steps)], "task": "medcot"}
        made |= {"looks": MEDCOT_LOOKS, "rewards": {"faithful": False}}
        settings |= MEDCOT_SETTINGS
    else:
        made["policy"] = pair(checkpoint)[bool(steps)]
        settings |= SETTINGS | {"learning_rate": learning_rate(estimator)}
    settings |= {k: v for k, v in own.items() if k not in SAMPLING}
    if steps:
        order = {"remasking": "state_confidence", **{k: own[k] for k in SAMPLING if k in own}}
        settings["sampler"] = order | {"steps": steps}
    made |= changes
    made["settings"] = settings | changes.get("settings", {})
    return Arm(**made, after=arm(before, checkpoint, **changes).to_dict() if before else {})


def runs(
    names: Iterable[str], checkpoints: Sequence[int], profile: str, train: bool = True, **changes
) -> tuple[pd.DataFrame, list[str]]:
    """The logs of those arms on those of the checkpoints that the arm is meant for, with columns
    `name`, `arm` (its label) and `seed` (its checkpoint), and what each arm lacks, in words.

    Without `train` only what is kept is read; with it, checkpoints alone can be missing.
    """
    found, missing = [], []
    for name in names:
        lacks = []
        for checkpoint in sorted({*ARMS[name][3]} & {*checkpoints}):
            asked, run = arm(name, checkpoint, **changes), None
            shipped = asked.policy in ZOO
            if shipped:
                run = train_arm(asked, checkpoint, profile, train)
            if run is not None:
                run.insert(0, "name", name)
                found.append(run)
            else:
                lacks.append(f"{checkpoint}{'' if shipped else ' (unshipped)'}")
        missing += [f"{name} on {of(name)} {', '.join(lacks)}"] if lacks else []
    return pd.concat(
        found or [pd.DataFrame(columns=COLUMNS, dtype=float)], ignore_index=True
    ), missing


def predicting(
    names: Iterable[str], checkpoints: Sequence[int], profile: str, train: bool = True, **changes
) -> tuple[pd.DataFrame, list[str]]:
    """As `runs`, of the first updates of those arms, along which candidates for what predicts
    their gains are measured (columns `eval/cosine` and so on)."""
    own = {"looks": {}, "candidates": Candidates().to_dict(), **changes}
    own["settings"] = PREDICTING | changes.get("settings", {})
    return runs(names, checkpoints, profile, train, **own)


def by_steps(runs: pd.DataFrame, names: Sequence[str], measure: str = "accuracy") -> pd.DataFrame:
    """What greedy completions earn against denoising steps, by one sampler for all: columns
    `curve`, `seed`, `steps`, and the `measure`, "accuracy" or "reward". The curves are "before RL",
    where the first of the arms `names` begins, and the end of each, by label; an arm without a run
    has none."""
    rows = []
    for name in names:
        for seed, run in runs[runs["name"] == name].groupby("seed"):
            ends = {"before RL": run.iloc[0], label(name): run.iloc[-1]}
            for curve, row in ends.items() if name == names[0] else [*ends.items()][1:]:
                looked = row.filter(regex=rf"^look/steps\d+/{measure}$").dropna()
                steps = looked.index.str.extract(r"(\d+)")[0].astype(int)
                rows += [(curve, seed, *pair) for pair in zip(steps, looked, strict=True)]
    return pd.DataFrame(rows, columns=["curve", "seed", "steps", measure])


def ascending(
    checkpoints: Sequence[int], steps: Sequence[int], items: int, profile: str
) -> pd.DataFrame:
    """What is right before RL if each step reveals more tokens than the one before it
    (`SamplerConfig.step_sizes`): one more curve of `by_steps`, of the first test items."""
    task, rows = load_task("countdown"), []
    for checkpoint, count in product(checkpoints, steps):
        sampler = {**task.sampler, "steps": count, "step_sizes": "ascending"}
        asked = load_policy(pair(checkpoint)[1]), replace(task, sampler=sampler)
        right = benchmark.scores(*asked, task.rows("test", items), profile).score.mean()
        rows.append(("before RL, ascending sizes", checkpoint, count, right))
    return pd.DataFrame(rows, columns=["curve", "seed", "steps", "accuracy"])


def pilots(estimators: Iterable[str], profile: str, train: bool = True) -> pd.DataFrame:
    """What the validation items say after a run at each of `LEARNING_RATES`: a row an estimator and
    rate with the final accuracies, `greedy` and `sampled`; `chosen` is the rate of the largest
    mean of the two."""
    looks, rows = LOOKS | {"split": "validation", "steps": [], "solutions": 0}, []
    for estimator in estimators:
        name = next(name for name, (known, *_) in ARMS.items() if known == estimator)
        for rate in LEARNING_RATES:
            own = {"learning_rate": rate, "max_steps": PILOT_UPDATES, "eval_steps": PILOT_UPDATES}
            asked = arm(name, 0, looks=looks, settings=own)
            run = train_arm(asked, PILOT, profile, train)
            if run is not None:
                last = run.iloc[-1]
                ends = last["look/greedy/accuracy"], last["look/sampled/accuracy"]
                rows.append((estimator, rate, *ends, last.run))
    table = pd.DataFrame(rows, columns=["estimator", "learning_rate", "greedy", "sampled", "run"])
    best = (table.greedy + table.sampled).groupby(table.estimator).transform("max")
    return table.assign(chosen=table.greedy + table.sampled == best)


def learning_rate(estimator: str) -> float:
    """What the pilots of the `full` profile chose; the largest where there was none."""
    return piloted(estimator) or max(LEARNING_RATES)


def piloted(estimator: str) -> float | None:
    """The learning rate that the pilots chose, if there were any."""
    path = figures_folder("full") / "data" / f"{RATES}.csv"
    if not path.exists():
        return None
    table = pd.read_csv(path).query("chosen and estimator == @estimator")
    return float(table.learning_rate.iloc[0]) if len(table) else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mdmrl.study.experiment", description=__doc__)
    parser.add_argument("--profile", default="full")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--checkpoint", "--seed", type=int, default=0)
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--pilot", choices=sorted({estimator for estimator, *_ in ARMS.values()}))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = figures_folder(asked.profile) / "data"
    if asked.pilot:
        pilots([asked.pilot], asked.profile)
        known = pilots(
            dict.fromkeys(estimator for estimator, *_ in ARMS.values()), asked.profile, False
        )
        write_atomically(folder / f"{RATES}.csv", known.to_csv(index=False, float_format="%.6g"))
        print(known.to_string(index=False))
    elif asked.arm:
        estimator = ARMS[asked.arm][0]
        if asked.arm not in MEDCOT_ARMS and piloted(estimator) is None:
            print(f"{estimator} had no pilot: its learning rate is {learning_rate(estimator)}")
        made = predicting if asked.candidates else runs
        frame, missing = made([asked.arm], [asked.checkpoint], asked.profile)
        meant = f"{of(asked.arm)}s {[*ARMS[asked.arm][3]]}"
        require(
            len(frame) > 0,
            f"--arm {asked.arm} --{of(asked.arm)} {asked.checkpoint}: expected one of {meant}"
            f"{', '.join(['', *missing])}",
        )
        print(frame.dropna(subset=["eval/accuracy"]).filter(regex="^(look|eval)/").T.to_string())
    else:
        frame, missing = runs(ARMS, {*CHECKPOINTS, *MEDCOT_SEEDS}, asked.profile, train=False)
        print(f"{frame.groupby('name').seed.nunique().to_string()}\n\nmissing:", *missing, sep="\n")


if __name__ == "__main__":
    main()
