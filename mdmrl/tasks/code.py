"""Code: small Python functions, each a combination of parts that all occur elsewhere.

A function keeps, changes and gathers the numbers of a list or the words of a text, or chooses
between two formulas for a number. An item's combination (which filter, map and end; or which
condition and formulas) decides its split, so that a fifth of them, validation and test, are in no
training item, with any wording, names, constants or style. The prompt is the head of the function
with its docstring, the completion the body.

With `infilling` a span of the body is the completion, and the prompt a prefix-suffix-middle
document (Bavarian et al. 2022); `prefix` and `suffix` are for those who see both sides. Of the
pre-training stream `INFILLING` is such documents.
"""

import csv
import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import resources
from pathlib import Path

from mdmrl.config import require
from mdmrl.rewards.code import (
    ast_reward,
    check_tests,
    code_reward,
    correctness_reward,
    judge,
    programs_of,
)
from mdmrl.tasks.base import Task, numbered_rows
from mdmrl.tasks.items import Generator, task_of, text_of

INFILLING = 0.25
SIMPLE = ("all", "same", "list", "zero")  # parts that make nothing harder
NOTHING = (("all", "same", "list"), ("all", "same", "spaced"))
VISIBLE, HELD_OUT = 3, 5  # tests
LONGEST_SPAN = 24  # characters

# The parts of each kind of function, and the names that its argument has.
KINDS = {
    "numbers": (("keep", "change", "gather"), ("xs", "nums", "values")),
    "words": (("keep", "change", "gather"), ("text", "line", "words")),
    "number": (("condition", "formula", "formula"), ("n", "num", "value")),
}
NAMES = ("f", "solve", "compute")
OPENINGS = ("return {}.", "give {}.", "compute {}.", "{}.")
CONDITIONAL = ("{1} if {0}, else {2}", "{1} when {0}, otherwise {2}")
CHOICES = (
    "    return {1} if {0} else {2}",
    "    if {0}:\n        return {1}\n    return {2}",
    "    if {0}:\n        r = {1}\n    else:\n        r = {2}\n    return r",
)
TEXT = re.findall(r"\w+", "apple owl ice tree sun under boat a orange on planet idea")


@cache
def parts(kind: str, part: str) -> dict[str, tuple[list[str], str]]:
    """By name, what the parts of a kind of function are in words and in Python: {k}, {m} and {c}
    are constants, {n} is the argument, {} what the part is applied to."""
    text = resources.files("mdmrl.tasks").joinpath("code_parts.tsv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    own = [row for row in rows if (row["kind"], row["part"]) == (kind, part)]
    return {row["name"]: (row["words"].split("; "), row["python"]) for row in own}


@cache
def combinations() -> list[tuple[str, ...]]:
    """Every kind of function with its parts, but those that do nothing."""
    every = (
        (kind, *names)
        for kind, (named, _) in KINDS.items()
        for names in itertools.product(*(parts(kind, part) for part in named))
    )
    return [c for c in every if c[1:] not in NOTHING and c[2] != c[3]]


def draw(rng: random.Random, infilling: float = 0.0) -> tuple[str, dict]:
    """An item without its tests: a combination told in words and written in a style. With the
    chance `infilling` a span of its body is the completion."""
    combination = rng.choice(combinations())
    head, body = function(combination, rng)
    row = {
        "prompt": head,
        "signature": head,
        "completion": body,
        "reference": head + body,
        "difficulty": sum(name not in SIMPLE for name in combination[1:]),
        "combination": "/".join(combination),
    }
    if rng.random() < infilling:
        words = [(word.start(), word.end()) for word in re.finditer(r"\w+|[^\w\s]+", body)]
        start, _ = rng.choice(words)
        end = rng.choice([end for _, end in words if start < end <= start + LONGEST_SPAN])
        gap = {"prefix": head + body[:start], "suffix": body[end:]}
        document = "<prefix>{prefix}<suffix>{suffix}<middle>".format(**gap)
        row |= {"prompt": document, "completion": body[start:end], **gap}
    return f"{row['combination']}\0{row['prompt']}", row


def function(combination: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """A function of the combination: its head, with its docstring, and its body."""
    kind, *names = combination
    named, arguments = KINDS[kind]
    argument = rng.choice(arguments)
    k = rng.randint(2, 5)
    m = k + rng.randint(1, 3)  # no divisor of k, so that multiples of k leave different rests
    constants = {"k": k, "m": m, "c": rng.choice("aeo"), "n": argument}
    used = [parts(kind, part)[name] for part, name in zip(named, names, strict=True)]
    words = [rng.choice(words) for words, _ in used]
    if kind == "number":
        python = (python.format(**constants) for _, python in used)
        body = rng.choice(CHOICES).format(*python)
        told = rng.choice(CONDITIONAL).format(*(text.format(**constants) for text in words))
    else:
        told = ""
        for text in words:
            told = text.format(told, **constants)
        keep, change, gather = (python for _, python in used)
        items = f"{argument}.split()" if kind == "words" else argument
        keep, change = (python.format(**constants) for python in (keep, change))
        body = _gathered(keep, change, gather, items, rng)
    told = rng.choice(OPENINGS).format(told)
    head = f'def {rng.choice(NAMES)}({argument}):\n    """{told[0].upper()}{told[1:]}"""\n'
    return head, body


def _gathered(keep: str, change: str, gather: str, items: str, rng: random.Random) -> str:
    """The body of a function over a sequence: at once, in two steps, or by a loop."""
    found = f"[{change} for x in {items}{keep and f' if {keep}'}]"
    style = rng.randrange(3)
    if style == 0:
        return f"    return {gather.format(found)}"
    if style == 1:
        return f"    r = {found}\n    return {gather.format('r')}"
    step = f"if {keep}:\n            r.append({change})" if keep else f"r.append({change})"
    return f"    r = []\n    for x in {items}:\n        {step}\n    return {gather.format('r')}"


def tested(row: dict) -> dict:
    """The row with its tests, visible and held out: asserts of what the reference gives, both with
    different results, so that no constant passes."""
    rng, space, results, seen, ranks = random.Random(row["reference"]), {}, {}, Counter(), {}
    exec(row["reference"], space)
    name, argument = re.search(r"def (\w+)\((\w+)\)", row["reference"]).groups()
    kind = next(kind for kind, (_, arguments) in KINDS.items() if argument in arguments)
    while True:
        given = _argument(kind, rng)
        if repr(given) in results:
            continue
        result = results[repr(given)] = repr(space[name](given))
        ranks[repr(given)] = seen[result]
        seen[result] += 1
        chosen = sorted(results, key=ranks.get)
        sets = chosen[:VISIBLE], chosen[VISIBLE : VISIBLE + HELD_OUT]
        if len(sets[1]) == HELD_OUT and all(len({results[a] for a in part}) > 1 for part in sets):
            break
    tests, held_out = ([f"assert {name}({a}) == {results[a]}" for a in part] for part in sets)
    return row | {"tests": tests, "held_out_tests": held_out}


def _argument(kind: str, rng: random.Random):
    if kind == "number":
        return rng.randint(-12, 20)
    if kind == "numbers":
        return [rng.randint(-9, 12) for _ in range(rng.randint(0, 6))]
    return " ".join(rng.sample(TEXT, rng.randint(0, 5)))


class Functions(Generator):
    """A generator whose rows are tested; its stream is not."""

    def rows(self, split: str, limit: int | None = None) -> list[dict]:
        return [tested(row) for row in super().rows(split, limit)]


def read(fields: dict) -> dict:
    """The row of an item from elsewhere: `prompt`, the head of a function; `tests` and perhaps
    `held_out_tests`, lists of sources with asserts."""
    head, tests = text_of(fields, "prompt") + "\n", list(check_tests(fields.get("tests")))
    held_out = list(check_tests(fields.get("held_out_tests", tests)))
    return {"prompt": head, "signature": head, "tests": tests, "held_out_tests": held_out}


def refuse_wrong(data: str | Path) -> None:
    """Refuse a file of whose solutions any does not pass its own tests, naming the line."""
    rows = [(where, fields | read(fields)) for where, fields in numbered_rows(data)]
    rows = [(where, row) for where, row in rows if row.get("completion")]
    bodies, heads = ([row[name] for _, row in rows] for name in ("completion", "signature"))
    tests = [row["tests"] + row["held_out_tests"] for _, row in rows]
    verdicts = judge(bodies, tests, signatures=heads)
    for (where, _), found in zip(rows, verdicts, strict=True):
        said = f"{where}: its own completion earns {found.grade}, {found.outcome}: {found.detail}"
        require(found.outcome == "passed", said)


def metric(completion: str, row: dict) -> bool | None:
    """Whether the function passes its held-out tests; None where there are none, or it could not be
    judged."""
    return _of_batch([completion], [row])[0]


def _of_batch(completions: Sequence[str], rows: Sequence[dict]) -> list[bool | None]:
    tested = [i for i, row in enumerate(rows) if row["held_out_tests"]]
    columns = ([rows[i].get(name) for i in tested] for name in ("signature", "prefix", "suffix"))
    programs = programs_of([completions[i] for i in tested], *columns)
    verdicts = judge(programs, [rows[i]["held_out_tests"] for i in tested])
    found: list[bool | None] = [None] * len(rows)
    for i, verdict in zip(tested, verdicts, strict=True):
        found[i] = None if verdict.grade is None else verdict.outcome == "passed"
    return found


metric.of_batch = _of_batch


def task(data=None, infilling: bool = False, parts: bool = False, n_shot: int = 0) -> Task:
    """`infilling` makes spans the completions, `parts` the two parts of the reward rewards of their
    own, to be weighed; for the other arguments see `items.task_of`.

    Raises:
        InputError: of a file with solutions, naming the line, where one does not pass its tests.
    """
    require(data is None or not infilling, f"data={data}: only generated functions have gaps")
    made = task_of(
        Functions("code", partial(draw, infilling=float(infilling))),
        data,
        n_shot,
        read,
        sampler={"max_new_tokens": 64, "steps": 64},
        rewards=[correctness_reward, ast_reward] if parts else [code_reward],
        metric=metric,
    )
    if data is not None:
        refuse_wrong(data)
    supply = Generator("code", partial(draw, infilling=INFILLING)).stream
    return made if data is not None else replace(made, stream=supply)
