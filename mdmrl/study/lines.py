"""The lines of rows 1 to 6 of the table of claims, from runs of `mdmrl.study.experiment`: does RL
train either family, is it the KL term that decides, and what do longer completions change?"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from mdmrl.study import quantities
from mdmrl.study.experiment import ARMS, CHECKPOINTS, MEDCOT_SEEDS, label
from mdmrl.study.looks import gains
from mdmrl.study.outputs import Outputs
from mdmrl.study.prose import REWARD_CEILING
from mdmrl.study.verdicts.table import LENGTH as LENGTHS

FAMILIES = ("ar", "ar_style", "one_step")  # what a row sets side by side, AR first
NORMS = ("grad_norm/kl", "grad_norm/surrogate")
LOOKED = "eval/sampled/reward"
LONG, SHORT = "medcot-ar", "medcot-ar-short"  # what row 6 sets side by side


class Lines(NamedTuple):
    """How a task's runs are read: what its lines are called, the arms of `FAMILIES` whose learning
    rows 1 and 2 judge, those with the thesis's KL term and without it, the seeds that all need, and
    the ceiling of what is looked at: `columns` of `looks.gains`, greedy and sampled. The methods
    take how many held-out items the looks were at."""

    task: str
    learn: tuple[str, ...]
    bound: tuple[str, ...]
    free: tuple[str, ...]
    seeds: Sequence[int]
    ceiling: float
    columns: dict[str, str]

    def learning(self, outputs: Outputs, runs: pd.DataFrame, profile: str, prompts: int) -> list:
        """Rows 1 and 2: what RL gains AR, and which share of the headroom the MDM closes."""
        said = []
        for decoded, column in self.columns.items():
            table = gains(runs, profile, column, self.ceiling)
            gain, share = (self.per_seed(table[name]) for name in ("gain", "share"))
            twin, *others = map(label, self.learn)
            line = f"{self.task}, {decoded}"
            said.append(self.judge(outputs, 1, line, gain[twin], prompts=prompts))
            for name, arm in zip(FAMILIES[1:], others, strict=True):
                line = f"{self.task}, {name}, {decoded}"
                said.append(self.judge(outputs, 2, line, share[arm], share[twin], prompts=prompts))
        return said

    def kl_term(self, outputs: Outputs, runs: pd.DataFrame, profile: str, prompts: int) -> list:
        """Rows 3 to 5: how the KL of the MDM spreads beside AR's, what its removal restores of the
        greedy gain, and how large its gradient is beside the surrogate's."""
        logged = runs.dropna(subset=["loss"]).groupby(["arm", "seed"]) if len(runs) else {}
        spread = {key: np.log(run["kl/sum"].std()) for key, run in logged}
        ratio = {key: quantities.kl_ratio(*(run[n] for n in NORMS)) for key, run in logged}
        spread, ratio = (self.per_seed(pd.Series(values)) for values in (spread, ratio))
        greedy = next(iter(self.columns.values()))
        share = self.per_seed(gains(runs, profile, greedy, self.ceiling).share)
        (twin, *bound), (_, *free), said = map(label, self.bound), map(label, self.free), []
        for name, arm, released in zip(FAMILIES[1:], bound, free, strict=True):
            line, three = f"{self.task}, {name}", (share[arm], share[released], share[twin])
            said.append(self.judge(outputs, 3, line, spread[arm] - spread[twin]))
            said.append(self.judge(outputs, 4, line, *three, prompts=prompts))
            said.append(self.judge(outputs, 5, line, ratio[arm], ratio[twin]))
        return said

    def per_seed(self, values: pd.Series) -> pd.DataFrame:
        """Values with index (arm, seed) as a column an arm, by label, of all arms; nan where a run
        lacks."""
        arms = [*dict.fromkeys(map(label, ARMS))]
        table = pd.DataFrame(index=pd.Index([*self.seeds], name="seed"), columns=arms)
        for (arm, seed), value in values.items():
            table.loc[seed, arm] = value
        return table.astype(float)

    def judge(self, outputs: Outputs, row: int, line: str, *columns: pd.Series, **facts) -> str:
        """`outputs.judge` of columns with a value a seed, which is their index; or, as long as one
        of the seeds lacks in any of them, that nothing is judged."""
        table = pd.concat(columns, axis=1, join="inner").dropna()
        if missing := [str(seed) for seed in self.seeds if seed not in table.index]:
            kind = "seed" if self.seeds is MEDCOT_SEEDS else "checkpoint"
            return f"row {row}, {line}: not judged, no runs on {kind} {', '.join(missing)}"
        values = (table.iloc[:, place].to_numpy() for place in range(len(columns)))
        clusters = {"checkpoints": [*table.index]} if self.seeds is CHECKPOINTS else {}
        return outputs.judge(row, line, *values, **clusters, **facts)


COUNTDOWN = Lines(
    "Countdown",
    learn=FAMILIES,
    bound=tuple(f"{name}-k3" for name in FAMILIES),
    free=FAMILIES,
    seeds=CHECKPOINTS,
    ceiling=1.0,
    columns={"greedy": "greedy/accuracy", "sampled": "sampled/reward"},
)
MEDCOT = Lines(
    "MedCoT",
    learn=tuple(f"medcot-{name}" for name in FAMILIES),
    bound=tuple(f"medcot-{name}" for name in FAMILIES),
    free=tuple(f"medcot-{name}-free" for name in FAMILIES),
    seeds=MEDCOT_SEEDS,
    ceiling=REWARD_CEILING,
    columns={"greedy": "greedy/reward", "sampled": "sampled/reward"},
)


def longer(outputs: Outputs, runs: pd.DataFrame) -> list[str]:
    """Row 6, on MedCoT: log ratios, long to short completions of the AR model, of the mean loss, of
    the standard deviation over training of the summed KL, and of the updates until looks at
    held-out samples have come 90 % of their way."""
    by_run = [*runs.groupby(["arm", "seed"])] if len(runs) else []
    quantity_of = (
        ("loss", np.mean),
        ("kl/sum", np.std),
        (LOOKED, partial(quantities.updates_to, window=1)),
    )
    said = []
    for line, (column, quantity) in zip(LENGTHS, quantity_of, strict=True):
        curves = {key: run[column].dropna().to_numpy() for key, run in by_run}
        values = {key: np.log(quantity(curve)) for key, curve in curves.items()}
        table = MEDCOT.per_seed(pd.Series(values, dtype=float))
        said.append(MEDCOT.judge(outputs, 6, line, table[label(LONG)] - table[label(SHORT)]))
    return said
