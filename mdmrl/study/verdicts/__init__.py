"""The verdict rules of the claims that rest on training, written before the runs; where one was
changed after a look, the notebook says so.

A rule is a function of plain numbers (most of them from `mdmrl.study.quantities`), one value a seed
in every column where nothing else is said, the same seed at the same place. Intervals are 95 %
t-intervals over seeds. With fewer than five seeds the verdict is always "inconclusive", and an
interval of seeds of which one gave no finite number fulfils no condition.

Where a rule says no more than that quantities are above bounds (below 0), it is reproduced iff the
lower (upper) end of every interval is, contradicted iff the other end of one lies on the other
side, and the interval given is that of the first.
"""

from mdmrl.study.verdicts.curves import (
    appc_failures,
    cold_start_helps,
    fig41_ar_rises,
    fig41_mdm_does_not_converge,
    fig42_kl_is_the_cause,
    fig43_longer_is_steadier,
)
from mdmrl.study.verdicts.inference import (
    few_steps_pay,
    hierarchy_is_faster,
    value_guides,
    value_judges,
)
from mdmrl.study.verdicts.instability import (
    block_rl_cures_kl,
    kl_is_cured,
    kl_law_predicts,
    stability_needs_steps,
)
from mdmrl.study.verdicts.rules import Verdict
from mdmrl.study.verdicts.speed import (
    diffusion_samples_faster,
    fig44_crossing,
    fig44_less_accurate,
)
