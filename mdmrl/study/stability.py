"""How steady training was: one row a run, and what goes along with what."""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from mdmrl.study import quantities
from mdmrl.study.prose import REWARD_CEILING

SPREAD = ("loss", "kl", "grad_norm")


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an arm and seed of `runs`, how far it came and how evenly: `gain` and `headroom` of
    the reward, `closed`, their ratio, and `collapsed`; what of the gain each part of the reward is,
    `gain/accuracy` and so on; the standard deviations over training of loss, KL (without beta) and
    gradient norm before clipping, `loss/std` and so on; the largest KL of a token, `kl/max`."""
    rows = []
    parts = runs.columns[runs.columns.str.fullmatch("rewards/[^/]+/mean")]
    for (arm, seed), run in runs.groupby(["arm", "seed"], sort=False):
        updates = run.sort_values("step").dropna(subset=["loss"])
        reward = updates.reward.to_numpy()
        gain, room = quantities.gain(reward), quantities.headroom(reward, REWARD_CEILING)
        row = {"arm": arm, "seed": seed, "gain": gain, "headroom": room, "closed": gain / room}
        row |= {"collapsed": quantities.collapsed(reward)}
        row |= {f"gain/{x.split('/')[1]}": quantities.gain(updates[x].array) for x in parts}
        row |= {f"{name}/std": updates[name].std() for name in SPREAD}
        rows.append(row | {"kl/max": updates["kl/max"].max()})
    return pd.DataFrame(rows)


def correlations(frame: pd.DataFrame, one: str, other: str) -> list[float]:
    """Spearman's correlation of two columns over the rows of each seed; nan where one of them is
    constant."""
    return [
        float(spearmanr(rows[one], rows[other]).statistic)
        if rows[one].nunique() > 1 and rows[other].nunique() > 1
        else np.nan
        for _, rows in frame.groupby("seed")
    ]
