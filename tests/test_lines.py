"""What the rules of rows 1 to 6 are given: the right columns of the right arms, seed by seed."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mdmrl.study import lines
from mdmrl.study.experiment import label
from mdmrl.study.verdicts.table import LENGTH


@pytest.fixture
def recorded():
    """What reaches `outputs.judge`: by row and line, its columns and facts."""
    found = {}

    def judge(row, line, *columns, **facts):
        found[row, line] = [np.asarray(column).tolist() for column in columns], facts
        return "judged"

    return SimpleNamespace(judge=judge, found=found)


def test_nothing_is_judged_as_long_as_a_checkpoint_lacks(recorded):
    values = pd.Series([0.1, 0.2, 0.3], index=[0, 1, 4])
    said = lines.COUNTDOWN.judge(recorded, 1, "Countdown, greedy", values, prompts=500)
    assert said == "row 1, Countdown, greedy: not judged, no runs on checkpoint 2, 3, 5"
    whole = pd.Series(range(6), index=[5, 4, 3, 2, 1, 0])
    said = lines.COUNTDOWN.judge(recorded, 2, "line", whole, 2 * whole[::-1], prompts=500)
    assert said == "judged"
    (((first, second), facts),) = recorded.found.values()
    assert second == [2 * x for x in first] and facts["prompts"] == 500
    assert sorted(facts["checkpoints"]) == list(range(6))
    said = lines.MEDCOT.judge(recorded, 1, "MedCoT, greedy", whole[[5]], prompts=200)
    assert said == "row 1, MedCoT, greedy: not judged, no runs on seed 6, 7, 8, 9"


def log(name: str, seed: int, spread: float, ratio: float) -> pd.DataFrame:
    kl = [1.0, 1.0 + spread, 1.0 - spread, np.nan]
    own = {"name": name, "arm": label(name), "seed": seed, "run": f"{name}-{seed}"}
    norms = {"grad_norm/kl": ratio * 2.0, "grad_norm/surrogate": 2.0}
    return pd.DataFrame(
        {"step": range(4), "loss": [*[0.1] * 3, np.nan], "kl/sum": kl, **norms, **own}
    )


def test_the_rows_of_a_task_are_read_from_its_runs(recorded, monkeypatch):
    made = {"ar": (0.1, 0.5, 0.4), "ar_style": (1.0, 8.0, 0.0), "one_step": (0.5, 4.0, 0.1)}
    runs, gained = [], {}
    for seed in range(5, 10):
        for name, (spread, ratio, gain) in made.items():
            for ending in ("", "-free"):
                arm = f"medcot-{name}{ending}"
                runs.append(log(arm, seed, spread, ratio))
                gained[label(arm), seed] = gain + (0.2 if ending else 0.0) + seed / 100
    index = pd.MultiIndex.from_tuples(gained, names=["arm", "seed"])
    table = pd.DataFrame({"gain": gained.values()}, index=index, dtype=float)
    table["share"] = table.gain / 2
    monkeypatch.setattr(lines, "gains", lambda runs, profile, column, ceiling: table)
    runs = pd.concat(runs, ignore_index=True)

    lines.MEDCOT.learning(recorded, runs, "full", 200)
    assert recorded.found[1, "MedCoT, greedy"] == recorded.found[1, "MedCoT, sampled"]
    ((gain,), facts) = recorded.found[1, "MedCoT, greedy"]
    assert gain == pytest.approx([0.4 + seed / 100 for seed in range(5, 10)])
    assert facts == {"prompts": 200}  # one pair of checkpoints: a seed is a seed
    (share, twin), _ = recorded.found[2, "MedCoT, one_step, sampled"]
    assert share == pytest.approx([(0.1 + seed / 100) / 2 for seed in range(5, 10)])
    assert twin == pytest.approx([g / 2 for g in gain])

    lines.MEDCOT.kl_term(recorded, runs, "full", 200)
    ((spreads,), _) = recorded.found[3, "MedCoT, ar_style"]
    assert spreads == pytest.approx([np.log(10)] * 5)
    (bound, free, other), _ = recorded.found[4, "MedCoT, ar_style"]
    assert np.subtract(free, bound) == pytest.approx([0.1] * 5) and other == twin
    (mdm, ar), _ = recorded.found[5, "MedCoT, one_step"]
    assert mdm == pytest.approx([4.0] * 5) and ar == pytest.approx([0.5] * 5)


def test_longer_completions_are_set_beside_short_ones(recorded):
    """The long runs' loss and spread are e times the short ones'; they come 90 % of their way at
    the second look, the short ones at the third."""
    runs = []
    for seed in range(5, 10):
        for name, scale, rewards in (
            (lines.LONG, np.e, [1.0, 2.0, 2.0, 2.0]),
            (lines.SHORT, 1.0, [1.0, 1.5, 2.0, 2.0]),
        ):
            run = log(name, seed, 0.5 * scale, 1.0)
            runs.append(run.assign(loss=run.loss * scale, **{lines.LOOKED: rewards}))
    said = lines.longer(recorded, pd.concat(runs, ignore_index=True))
    assert said == ["judged"] * 3
    loss, spread, updates = (recorded.found[6, line][0][0] for line in LENGTH)
    assert loss == pytest.approx([1.0] * 5) and spread == pytest.approx([1.0] * 5)
    assert updates == pytest.approx([np.log(2 / 3)] * 5)
    nothing = lines.longer(recorded, pd.DataFrame())
    assert all("no runs on seed 5, 6, 7, 8, 9" in line for line in nothing)
