"""Judged programs a second, beside the usual way: a fresh Python a program, tests appended."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mdmrl.config import require
from mdmrl.provenance import environment
from mdmrl.rewards.code import Verdict, judge
from mdmrl.rewards.code.sandbox import why_not_bubblewrap

PROGRAMS = 200


def bench_judge(repeats: int = 3, programs: int = PROGRAMS) -> dict:
    """Right programs of one function with three tests, as many at a time as there are cores: by
    each box, and by the usual way, which anything that a program says or does can deceive. Medians
    over `repeats` turns, after one to warm up, of programs a second; rows `way`, `per_second`."""
    require(repeats >= 1, f"repeats={repeats}: expected at least 1")
    sources = [f"def f(x):\n    return x * x + {k}\n" for k in range(programs)]
    tests = [[f"assert f({x}) == {x * x + k}" for x in (0, 3, -5)] for k in range(programs)]
    boxes = ["monty"] + ["bubblewrap"] * (why_not_bubblewrap() is None)
    ways: dict[str, Callable] = {name: partial(judge, box=name) for name in boxes}
    ways["a fresh python"] = _usual
    turns = [[_seconds(way, sources, tests) for way in ways.values()] for _ in range(1 + repeats)]
    medians = map(statistics.median, zip(*turns[1:], strict=True))
    pairs = zip(ways, medians, strict=True)
    rows = [{"way": name, "per_second": programs / seconds} for name, seconds in pairs]
    return {"rows": rows, "programs": programs, "repeats": repeats, **environment("cpu")}


def _seconds(way: Callable, sources: Sequence[str], tests: Sequence[list[str]]) -> float:
    start = time.perf_counter()
    verdicts = way(sources, tests)
    seconds = time.perf_counter() - start
    assert all(verdict.outcome == "passed" for verdict in verdicts), verdicts
    return seconds


def _usual(sources: Sequence[str], tests: Sequence[list[str]]) -> list[Verdict]:
    def verdict(source: str, asserts: list[str]) -> Verdict:
        text = "\n".join([source, *asserts])
        subprocess.run([sys.executable, "-c", text], check=True, timeout=60)
        return Verdict("passed")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(verdict, sources, tests))
