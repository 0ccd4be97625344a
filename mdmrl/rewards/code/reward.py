"""The code reward of the thesis (section 3.3.1): R_c, what the judge says, and R_a, how much of the
reference's syntax tree is there. The true metric, held-out tests, is never part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mdmrl.rewards.code.ast_match import ast_match
from mdmrl.rewards.code.boxes import Limits
from mdmrl.rewards.code.extract import programs_of
from mdmrl.rewards.code.judge import GRADES, Verdict, judge, syntax_verdicts

INFRA_SHARE = 0.01


def correctness_reward(
    prompts,
    completions,
    completion_ids=None,
    tests=None,
    held_out_tests=None,
    box: str | Callable = "monty",
    limits: Limits | None = None,
    log_metric: Callable | None = None,
    log_extra: Callable | None = None,
    **columns,
) -> list[float | None]:
    """R_c: 1 all tests pass, -0.3 one fails, -0.6 run-time error, -1 no program (`judge` says what
    counts as which). Of a row without tests: 1 where the program compiles, else -1. None where the
    judge gives no grade.

    Columns, each of which may be missing, or None in a row: `tests`, lists of sources with asserts;
    `held_out_tests`, the same, which are logged and pay nothing; `signature`, what the policy goes
    on from, where it may write a bare body; `prefix` and `suffix`, what a span that it fills in
    stands between.

    Logs the shares `code/OUTCOME` of each outcome, `code/stub_rate` of programs that do nothing,
    and `code/held_out_pass_rate`; in the column `outcome` what became of each.

    Raises:
        InputError: tests without an assert; a box that is not to be had.
        RuntimeError: more than 1 % of the programs so far could not be judged for reasons that lie
            in the judge, three tries each.
    """
    programs = _programs(completions, columns)
    options = {"box": box, "limits": limits}
    found = _judged(programs, _column(tests, completions), options)
    rest = [index for index in range(len(programs)) if index not in found]
    if rest:
        found |= zip(rest, syntax_verdicts([programs[index] for index in rest]), strict=True)
    verdicts = [found[index] for index in range(len(programs))]
    if log_metric is not None and verdicts:
        for outcome in GRADES:
            log_metric(f"code/{outcome}", _share(v.outcome == outcome for v in verdicts))
        log_metric("code/stub_rate", _share(verdict.stub for verdict in verdicts))
        held_out = _judged(programs, _column(held_out_tests, completions), options)
        if passes := [v.outcome == "passed" for v in held_out.values() if v.grade is not None]:
            log_metric("code/held_out_pass_rate", _share(passes))
    if log_extra is not None:
        log_extra("outcome", [verdict.outcome for verdict in verdicts])
    return [verdict.grade for verdict in verdicts]


def ast_reward(prompts, completions, completion_ids=None, reference=None, **columns) -> list[float]:
    """R_a in [0, 1]: the share of the subtrees of the column `reference`, a source, that are in the
    program (`ast_match`); 0 of a row without reference."""
    rows = zip(_programs(completions, columns), _column(reference, completions), strict=True)
    return [ast_match(program, goal) if goal else 0.0 for program, goal in rows]


def code_reward(
    prompts, completions, completion_ids=None, faithful: bool = True, log_metric=None, **columns
) -> list[float | None]:
    """R_c + R_a in [-1, 2], as the thesis has it; None where the judge gives no grade. See
    `correctness_reward` and `ast_reward`, each a reward of its own, for the columns and options.

    Args:
        faithful: the sum. Otherwise R_a pays only where all tests pass, so that it pays nothing to
            have the reference's look.
        log_metric: gets the means `code/R_c` and `code/R_a` too.
    """
    given = (prompts, completions, completion_ids)
    correct = correctness_reward(*given, log_metric=log_metric, **columns)
    alike = ast_reward(*given, **columns)
    if log_metric is not None:
        for name, values in (("R_c", [x for x in correct if x is not None]), ("R_a", alike)):
            if values:
                log_metric(f"code/{name}", _share(values))
    return [
        None if r_c is None else r_c + r_a * (faithful or r_c == 1)
        for r_c, r_a in zip(correct, alike, strict=True)
    ]


def _programs(completions, columns: dict) -> list[str]:
    given = (columns.get(name) for name in ("signature", "prefix", "suffix"))
    return programs_of(completions, *(_column(column, completions) for column in given))


def _column(values: Sequence | None, completions: Sequence) -> Sequence:
    return values or [None] * len(completions)


def _share(values) -> float:
    values = list(values)
    return sum(values) / len(values)


_counts = {"judged": 0, "broken": 0}


def _judged(programs, tests, options: dict) -> dict[int, Verdict]:
    """By index, the verdicts on programs that have tests."""
    rows = [index for index, sources in enumerate(tests) if sources]
    if not rows:
        return {}
    chosen = ([column[row] for row in rows] for column in (programs, tests))
    verdicts = judge(*chosen, **options)
    broken = [verdict for verdict in verdicts if verdict.outcome == "infra_error"]
    _counts["judged"] += len(verdicts)
    _counts["broken"] += len(broken)
    if broken and _counts["broken"] > INFRA_SHARE * _counts["judged"]:
        raise RuntimeError(
            f"the judge failed on {_counts['broken']} of {_counts['judged']} programs, more than "
            f"{INFRA_SHARE:.0%}, and stops here; the last: {broken[-1].detail}"
        )
    return dict(zip(rows, verdicts, strict=True))
