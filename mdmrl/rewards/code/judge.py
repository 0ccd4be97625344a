"""The judge: whether programs that a policy wrote pass tests that they never see.

Tests and program share no process. The tests run in one interpreter (Monty), the program in
another (`mdmrl.rewards.code.boxes`), and between them only data travels (`peer.py`): a program can
give answers, and nothing else. What Monty does not support, in a program or in its tests, is judged
again in bubblewrap, both ends in a CPython of their own; where that is not to be had it is
`unsupported`.

The grades are those of the thesis (section 3.3.1), read as follows. `passed` (1): every test holds.
`failed` (-0.3): an assert does not. `runtime` (-0.6): any other exception, whether the program
raises it when it is loaded (an AssertionError too) or when it is called, as when a name is missing;
`timeout` and `memory` (-0.6). `compile` (-1): CPython does not compile it, or it has more than 64
KiB. No grade: `unsupported`, also where tests import what is not Python's own, or a program fails
that deals with files, say, which it does not share with tests that do so too, or passes by its own
`isclose` alone, which its tests take for imported; and `infra_error` where the judge itself failed,
three times in a row.
A guard `if __name__ == "__main__":` does not run; asserts that a program brings along are no tests.
A table of the visible tests' answers earns 1: hence held-out tests (`code_reward`).
"""

from __future__ import annotations

import builtins
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache

from mdmrl.config import InputError, require, unknown
from mdmrl.rewards.code import syntax
from mdmrl.rewards.code.boxes import Ended, Limits, monty
from mdmrl.rewards.code.extract import extract_code
from mdmrl.rewards.code.reader import Reader
from mdmrl.rewards.code.sandbox import bubblewrap, why_not_bubblewrap

BOXES = {"monty": monty, "bubblewrap": bubblewrap}
GRADES = {
    "passed": 1.0,
    "failed": -0.3,
    "runtime": -0.6,
    "timeout": -0.6,
    "memory": -0.6,
    "compile": -1.0,
    "unsupported": None,
    "infra_error": None,
}
TRIES = 3
UNSUPPORTED_SHARE = 0.05
DETAIL = 500  # characters
BROKEN = "the program broke the channel"

# Errors that are the program's own in any Python; others may be for want of something in Monty.
_OWN_ERRORS = ("ZeroDivisionError", "IndexError", "KeyError", "NameError", "UnboundLocalError")
_LACKING = re.compile(r"monty|not (yet )?support|cannot suspend", re.I)
_NO_MODULE = re.compile(r"No module named '(\w+)|from '(\w+)'")
_NO_NAME = re.compile(r"name '(\w+)'")
_NO_ATTRIBUTE = re.compile(r"'(\w+)'(?: object)? has no attribute '(\w+)'")


@dataclass(frozen=True)
class Verdict:
    """Of one program: `outcome`, a key of `GRADES`; `detail`, what was raised, where it did not
    pass, at most 500 characters and none of them a control character; whether it is a `stub`."""

    outcome: str
    detail: str = ""
    stub: bool = False

    @property
    def grade(self) -> float | None:
        return GRADES[self.outcome]


def judge(
    completions: Sequence[str | list[dict]],
    tests: Sequence[Sequence[str]],
    box: str | Callable = "monty",
    signatures: Sequence[str] | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
) -> list[Verdict]:
    """Run each completion's program against its tests.

    Args:
        completions: texts or messages; `extract_code` says what is their program.
        tests: for each completion sources of Python with asserts, run in order in one namespace in
            which they find the program's functions, classes and constants by name.
        box: "monty", "bubblewrap", or a function as `mdmrl.rewards.code.boxes` describes.
        signatures: what each completion was to go on from, where it may be a bare body.
        workers: programs at a time; as many as there are cores unless given.

    Raises:
        InputError: tests without any assert that runs, or that are no Python; a box that is not to
            be had.
    """
    if isinstance(box, str):
        if box not in BOXES:
            raise unknown("box", box, BOXES)
        box = BOXES[box]
    limits, workers = limits or Limits(), workers or os.cpu_count() or 1
    for name, column in (("tests", tests), ("signatures", signatures)):
        fit = column is None or len(column) == len(completions)
        require(fit, f"{len(completions)} completions: expected as many {name}")
    checked = [check_tests(sources, index) for index, sources in enumerate(tests)]
    texts = map(extract_code, completions, signatures or [""] * len(completions))
    with ExitStack() as stack:
        batch = _Batch(stack, box, limits, workers)
        verdicts = list(batch.threads.map(batch.verdict, texts, checked))
    _warn_of_unsupported(verdicts)
    return verdicts


def syntax_verdicts(programs: Sequence[str]) -> list[Verdict]:
    """`passed` where the program compiles, `compile` where it does not."""
    with Reader() as reader:
        found = [reader.inspected(program) for program in programs]
    return [_compiled(program) or Verdict("passed", stub=program["stub"]) for program in found]


def check_tests(sources: Sequence[str], index: int = 0) -> tuple[str, ...]:
    """The tests of row `index`.

    Raises:
        InputError: they are no list of sources of Python, or have no assert that runs: they would
            hold for any program.
    """
    where = f"tests[{index}]"
    listed = isinstance(sources, list | tuple) and all(isinstance(x, str) for x in sources)
    require(listed, f"{where}, {sources!r:.80}: expected a list of strings")
    try:
        has_assert = _wanted(tuple(sources))["has_assert"]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{where}, {sources!r:.80}: expected Python ({error})") from None
    wanted = "expected at least one assert that runs, as in 'assert f(2) == 4', else all would pass"
    require(has_assert, f"{where}, {sources!r:.80}: {wanted}")
    return tuple(sources)


@lru_cache(4096)
def _wanted(tests: tuple[str, ...]) -> dict:
    """What tests want of a program, as `read` what is read of them themselves, and as `loaded` the
    sources to run, each with the test that it is of."""
    wanted = {**syntax.wanted(tests), "read": syntax.inspected("\n".join(tests))}
    theirs = {*wanted["names"]} - {*wanted["bound"]}
    loaded = [(syntax.guarded(test, theirs), test) for test in tests]
    before = [f"import {name}" for name in wanted["modules"]]
    before += [syntax.GUARD] * any(source != test for source, test in loaded)
    return {**wanted, "loaded": [*((source, "") for source in before), *loaded]}


class _Batch:
    """The boxes and processes that a batch of programs shares."""

    def __init__(self, stack: ExitStack, box: Callable, limits: Limits, workers: int):
        self.wall, self.stopped = limits.wall, False
        # Entered first, so that it is left last: an interrupt closes the boxes, which ends what the
        # threads wait for.
        self.threads = stack.enter_context(ThreadPoolExecutor(workers))
        self.reader = stack.enter_context(Reader())
        self.places = [(box, monty)]
        if why_not_bubblewrap() is None:
            self.places.append((box if box is not monty else bubblewrap, bubblewrap))
        kinds = dict.fromkeys(kind for place in self.places for kind in place)
        self.open = {kind: stack.enter_context(kind(limits, workers)) for kind in kinds}
        stack.callback(setattr, self, "stopped", True)

    def verdict(self, source: str, tests: tuple[str, ...]) -> Verdict:
        program, deadline = self.reader.inspected(source), time.monotonic() + self.wall
        if wrong := _compiled(program):
            return wrong
        helpers = _wanted(tests)["helpers"]
        found = self._judged(source, program, (*helpers, *tests), deadline)
        if not helpers or found.outcome == "passed":
            return found
        by_its_own = self._judged(source, program, tests, deadline)
        if by_its_own.outcome == "passed":
            said = f"it passes with its own alone of what the tests lack: {'; '.join(helpers)}"
            return Verdict("unsupported", said, program["stub"])
        return max(found, by_its_own, key=lambda x: math.inf if x.grade is None else x.grade)

    def _judged(self, source: str, program: dict, tests: tuple, deadline: float) -> Verdict:
        wanted = _wanted(tests)
        if wanted["foreign"]:
            said = f"the tests import {', '.join(wanted['foreign'])}, which no box has"
            return Verdict("unsupported", said, program["stub"])
        given = sorted(wanted["given"].intersection(program["free"]))
        elsewhere = program["unlike"] or wanted["read"]["unlike"]
        for place in self.places[-1 * elsewhere :]:
            ends = zip(place, (program, wanted["read"]), strict=True)
            in_monty = [read for kind, read in ends if kind is monty]
            if any(read["unlike"] for read in in_monty):
                found = Ended("unsupported", "it has what Monty does otherwise than CPython")
                break
            found = self._tried(source, tests, given, place, deadline)
            found.outcome, certain = _trusted(found, in_monty)
            lost = found.outcome in ("failed", "runtime")
            if lost and not wanted["resets"].isdisjoint(program["globals"]):
                found = Ended("unsupported", "the tests set a global variable of the program's")
            if lost and (both := {*wanted["apart"]} & {*program["apart"]}):
                said = f"the tests and the program have {', '.join(sorted(both))} of their own each"
                found = Ended("unsupported", said)
            if certain or self.stopped or time.monotonic() > deadline:
                break
        return Verdict(found.outcome, _clean(found.detail), program["stub"])

    def _tried(self, *job) -> Ended:
        for _ in range(TRIES):
            try:
                found = self._run(*job)
            except Ended as error:
                found = error
            except Exception as error:  # an outage, of whatever kind, is no grade
                found = Ended("infra_error", f"{type(error).__name__}: {error}")
            if found.outcome not in ("infra_error", "killed") or self.stopped:
                break
        # What is killed each time has done it itself.
        return Ended("runtime", found.detail) if found.outcome == "killed" else found

    def _run(self, source: str, tests: tuple, given: list, place: tuple, deadline: float) -> Ended:
        wanted, (box, beside) = _wanted(tests), (self.open[kind] for kind in place)
        with box("solution") as program:
            reply = _reply(program(_line("load", source), deadline))
            if reply[0] != "loaded":
                return _raised(*map(str, (*reply, "", "")[1:3]), loading=True)
            asked = [*wanted["built_in"]] or wanted["names"]
            heap = _reply(program(_line("names", asked, given), deadline))[-1]
            if not (isinstance(heap, list) and heap[3:]):
                raise Ended("runtime", BROKEN)
            if wanted["built_in"]:
                heap[3] = _innermost(heap[3], wanted["built_in"])
                if not heap[3]:
                    said = f"defines none of {', '.join(asked)}, which the tests ask for"
                    return Ended("runtime", said)
            with beside("tests") as asserts:  # which come into being only now
                first = _line("bind", wanted["classes"], asked, wanted["bound"], given, heap)
                lines = [(_line("load", source), test) for source, test in wanted["loaded"]]
                for line, test in ((first, ""), *lines):
                    line = _fit(asserts(line, deadline))
                    while not line.startswith(('["loaded"', '["failed"')):
                        line = _fit(program(line, deadline), made_up=monty not in place)
                        line = _fit(asserts(line, deadline))
                    if line.startswith('["failed"'):
                        return _raised(*json.loads(line)[1:], test=test)
        return Ended("passed", "")


def _reply(line: str) -> list:
    """What a program's end says, which it may say wrongly on purpose."""
    with suppress(ValueError, RecursionError):
        reply = json.loads(line)
        if isinstance(reply, list) and reply:
            return reply
    raise Ended("runtime", BROKEN)


def _innermost(told: list, around: dict[str, set[str]]) -> list:
    """Of the program's names that Python has too, those that tests call; the others stay Python's,
    as `abs` in `abs(sum(2, 3) - 5) < 1e-6`."""
    with suppress(TypeError, ValueError, KeyError):
        defined = {name for name, _ in told}
        return [[name, value] for name, value in told if defined.isdisjoint(around[name])]
    raise Ended("runtime", BROKEN)


def _fit(line: str, made_up: bool = False) -> str:
    if line.startswith('["opaque"'):
        if made_up:  # CPython holds any value of CPython's
            raise Ended("runtime", BROKEN)
        raise Ended("unsupported", "it takes more than this judge can do with either end apart")
    return line


def _trusted(found: Ended, in_monty: list[dict]) -> tuple[str, bool]:
    """The outcome, and whether it is CPython's for sure; Monty's lacks are no program's fault."""
    outcome, (name, message) = found.outcome, found.error
    if not in_monty:
        return outcome, True
    special = any(read["special"] for read in in_monty)
    lacks = _lacks(name, message) or (name == "TypeError" and special)
    if outcome == "unsupported" or (outcome == "runtime" and lacks):
        return "unsupported", False
    if outcome == "failed":
        return outcome, not any(read["doubted"] for read in in_monty)
    own = name in _OWN_ERRORS and not special
    return outcome, outcome in ("passed", "infra_error") or own


def _lacks(name: str, message: str) -> bool:
    """Whether an error is about what CPython has: syntax, a module, a name, an attribute."""
    if name == "SyntaxError" or _LACKING.search(message):
        return True
    if name in ("ModuleNotFoundError", "ImportError"):
        found = _NO_MODULE.search(message)
        return found is None or (found[1] or found[2]) in sys.stdlib_module_names
    if name == "NameError":
        found = _NO_NAME.search(message)
        return found is not None and (found[1].startswith("__") or hasattr(builtins, found[1]))
    if name == "AttributeError" and (found := _NO_ATTRIBUTE.search(message)):
        kind = getattr(builtins, found[1], None)
        return kind is None or found[2].startswith("__") or hasattr(kind, found[2])
    return False


def _warn_of_unsupported(verdicts: list[Verdict]) -> None:
    """Once a process."""
    global _warned
    count = sum(verdict.outcome == "unsupported" for verdict in verdicts)
    if count > UNSUPPORTED_SHARE * len(verdicts) and not _warned:
        _warned = True
        refusal = why_not_bubblewrap()
        said = f"{count} of {len(verdicts)} programs need more than this judge has and were not "
        said += "judged" if refusal is None else f"judged; the bubblewrap box is refused: {refusal}"
        warnings.warn(said, stacklevel=3)


_warned = False


def _line(*message) -> str:
    return json.dumps(message)


def _raised(name: str, message: str, test: str = "", loading: bool = False) -> Ended:
    """What an exception makes of a program."""
    outcome = {"AssertionError": "failed", "MemoryError": "memory"}.get(name, "runtime")
    where = "when loaded" if loading else test.strip().partition("\n")[0]
    outcome = "runtime" if loading and outcome == "failed" else outcome
    return Ended(outcome, f"{where}: {name}: {message}", (name, message))


def _compiled(program: dict) -> Verdict | None:
    return Verdict("compile", _clean(program["error"])) if program["error"] is not None else None


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:DETAIL])
