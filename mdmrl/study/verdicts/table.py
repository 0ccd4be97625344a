"""The claims that are judged (the 21 rows of the second edition) and the lines of each.

This list is what the ledger corrects for: Holm's correction is over all lines of the rows marked
`trained`, of which one that nobody has recorded has p = 1. Edit it before a run, never after.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from mdmrl.config import unknown
from mdmrl.study.verdicts import inference, learning
from mdmrl.study.verdicts.rules import Verdict


@dataclass(frozen=True)
class Row:
    """One claim of the thesis.

    Attributes:
        number: 1 to 21; where, says: where the thesis says what.
        rule: what judges one of the `lines`; unit: of the number that it gives.
        trained: marked T: it rests on training, and its lines are corrected for their number.
    """

    number: int
    where: str
    says: str
    rule: Callable[..., Verdict]
    lines: Sequence[str]
    unit: str = ""
    trained: bool = False

    def require_line(self, line: str) -> None:
        if line not in self.lines:
            raise unknown(f"line of row {self.number}", line, self.lines)


def _each(*parts: Sequence[str]) -> list[str]:
    """The names of lines: every combination of one of each part."""
    return [", ".join(line) for line in product(*parts)]


T = True
DECODED = ("greedy", "sampled")
TASKS = ("Countdown", "MedCoT")
ESTIMATORS = ("ar_style", "one_step")
BENCHMARKS = ("Countdown", "GSM", "MATH", "choice")  # the rows of Table 4-1
ARMS = _each(TASKS, ESTIMATORS)
LENGTH = ("loss", "spread of the summed KL", "updates to 90 % of the final reward")
# fmt: off
ROWS = (
    Row(1, "Fig. 4-1", "RL improves the autoregressive model.",
        learning.ar_improves, _each((*TASKS, "code"), DECODED), "", T),
    Row(2, "Fig. 4-1", "The masked diffusion model does not converge.",
        learning.mdm_does_not_converge, _each(ARMS, DECODED), "of the headroom", T),
    Row(3, "Fig. 4-2", "The masked diffusion model's loss is unstable.",
        learning.loss_is_unstable, ARMS, "log ratio", T),
    Row(4, "Fig. 4-2", "The KL term is the cause.",
        learning.kl_is_the_cause, ARMS, "of the headroom", T),
    Row(5, "Fig. 4-2", "The KL term dominates the update.",
        learning.kl_dominates, ARMS, "times the other gradient's norm"),
    Row(6, "Fig. 4-3", "Longer completions make AR training smaller in loss, steadier, faster.",
        learning.longer_is_better, LENGTH, "log ratio", T),
    Row(7, "Table 4-1", "RL helps the masked diffusion model.",
        inference.rl_helps, BENCHMARKS, "of the items", T),
    Row(8, "Table 4-1", "The tuned masked diffusion model passes the autoregressive model.",
        inference.mdm_passes_ar, BENCHMARKS, "of the items", T),
    Row(9, "Table 4-1, 4.4", "Planning favours diffusion.",
        inference.planning_favours_diffusion, ("equal tokens", "plateau"), "of the items"),
    Row(10, "Fig. 4-4", "Diffusion is faster only below some number of denoising steps (16).",
        inference.faster_at_few_steps, TASKS, "steps"),
    Row(11, "Fig. 4-4", "Diffusion is less accurate even at 128 denoising steps.",
        inference.less_accurate, TASKS, "of the prompts"),
    Row(12, "App. C, 4.1", "Few denoising steps leave broken texts.",
        inference.few_steps_fail, (*_each(TASKS[1:], ESTIMATORS), "code"), "of the texts"),
    Row(13, "4.3", "Block-level RL cures the KL instability.",
        learning.block_rl_cures_kl, ("blocks", "PPO"), "log ratio", T),
    Row(14, "1.2, 3.3.3", "A value function judges half-denoised text.",
        inference.value_judges, ("Countdown",), "area"),
    Row(15, "4.4", "Stability needs many denoising steps.",
        learning.stability_needs_steps, ESTIMATORS, "Spearman's correlation", T),
    Row(16, "1.2, 3.2", "Diffusion speeds up the sampling of RL.",
        learning.samples_faster, ("positions computed", "rollout seconds"), "", T),
    Row(17, "5.1", "A cold start helps.",
        learning.cold_start_helps, ("AR", *ESTIMATORS), "of reward", T),
    Row(18, "4.3", "Rewards are hacked.",
        learning.reward_is_hacked, ("MedCoT", "code"), "", T),
    Row(19, "3.2.1", "The hierarchy is faster.",
        inference.hierarchy_is_faster, ("tiny-mdm", "tiny-ar"), "of flat's forward passes"),
    Row(20, "5.2, Fig. 5-2", "RL narrows what a model can solve.",
        learning.rl_narrows, ("AR", "MDM"), "log odds", T),
    Row(21, "App. A", "Dafny: Fibonacci needs a function, attempts at course schedules fail.",
        inference.dafny_case, ("Fibonacci", "course schedule")),
)
# fmt: on


def row_of(number: int) -> Row:
    if not 1 <= number <= len(ROWS):
        raise unknown("row", number, [str(row.number) for row in ROWS])
    return ROWS[number - 1]
