"""Dafny: a method's body from its specification, judged by the verifier; and two case studies.

Specifications are templates (`dafny_templates.txt`: the largest of two, a clamp, a search, a fill,
a sum, ...) whose holes are filled with expressions, conditions or steps, so that all parts of a new
one occur in others. Template and fillings decide the split; names and constants are drawn. The
prompt is the specification, in the column `specification` too, the completion the body between its
braces. In `case_studies` are the problems of the thesis's appendix A with programs of our own.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from mdmrl.rewards.dafny import DafnyError, Verdict, dafny_reward, judge
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import Generator, task_of, text_of

VARIANTS = 20  # rows of a specification
VALUES = ("@", "@ + k", "@ - k", "k * @", "-@")
# What stands in the holes of a template; @ is what the hole is applied to, k a constant.
HOLES = {
    "A": VALUES,
    "B": VALUES,
    "C": (*VALUES[1:], "@ + x", "x - @"),
    "E": ("k", "x", "@", "@ + k", "k * @", "x + @", "x - @"),
    "P": ("@ == x", "@ != x", "@ < x", "@ > x", "@ < k", "@ > k", "@ == k", "@ % 2 == 0"),
    "S": ("@ + n", "@ - n", "@ + k", "@ + k * n", "@ + n * n", "k * @", "n * @", "k - @", "n - @"),
}
NAMES = {"M": ("M", "Do", "Go", "Run", "Make", "Work"), "r": ("r", "out", "res"), "n": ("n", "m")}

PROBLEM = r"(.*?)\n\n(.*?)\n\n```dafny\n(.*?)\n```"
PROGRAM = r"(.*?): (\w+)\n\n```dafny\n(.*?)\n```\n*(.*)"
STANDS_HERE = "// The specification stands here."


@cache
def templates() -> dict[str, tuple[str, str]]:
    """Specification and body by name."""
    text = resources.files("mdmrl.tasks").joinpath("dafny_templates.txt").read_text("utf-8")
    found = {}
    for part in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        specification, _, body = rest.partition("\n--\n")
        found[name] = (specification, body.strip())
    return found


@cache
def combinations() -> list[tuple[str, ...]]:
    """Every template with what fills its holes, each as "A=@ + k"."""
    found = []
    for name, (specification, _) in templates().items():
        holes = sorted(set(re.findall(r"<(\w):", specification)))
        filled = itertools.product(*([f"{hole}={v}" for v in HOLES[hole]] for hole in holes))
        found += [(name, *filling) for filling in filled]
    return found


def draw(rng: random.Random) -> tuple[str, dict]:
    """A specification with its body; each template is as frequent."""
    name = rng.choice(list(templates()))
    return specified(rng.choice([c for c in combinations() if c[0] == name]), rng)


def specified(combination: tuple[str, ...], rng: random.Random) -> tuple[str, dict]:
    name, *fillings = combination
    filled = dict(filling.split("=", 1) for filling in fillings)
    if "S" in filled:  # the step of the body is that of the specification, at i
        filled["T"] = re.sub(r"\bn\b", "i", filled["S"])
    words = {"k": str(rng.randint(2, 9))} | {old: rng.choice(new) for old, new in NAMES.items()}
    specification, body = (
        re.sub(
            r"\b\w\b",
            lambda word: words.get(word[0], word[0]),
            re.sub(r"<(\w):(.*?)>", lambda hole: filled[hole[1]].replace("@", hole[2]), text),
        )
        for text in templates()[name]
    )
    row = {"prompt": specification, "specification": specification, "completion": body}
    key = "/".join(combination)
    return f"{key}\0{specification}", row | {"combination": key}


class Specifications(Generator):
    """A generator of few items, whose rows are `VARIANTS` of each combination of the split."""

    def rows(self, split: str, limit: int | None = None) -> list[dict]:
        rng = random.Random(f"{self.name}/{split}")
        own = [c for c in combinations() if self.split_of("/".join(c)) == split]
        found = dict(specified(c, rng) for c in own for _ in range(VARIANTS))
        rows = list(found.values())
        rng.shuffle(rows)
        return rows[:limit]


@dataclass(frozen=True)
class CaseStudy:
    """A problem of the thesis's appendix A: the prompt, with a Python program to be translated, the
    specification, and by name programs, each with what was recorded of it (Dafny 2.3.0)."""

    prompt: str
    specification: str
    programs: Mapping[str, Verdict]


def case_studies() -> dict[str, CaseStudy]:
    """The case studies by name, as they are in `dafny_cases.md`."""
    text = resources.files("mdmrl.tasks").joinpath("dafny_cases.md").read_text("utf-8")
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        problem, *programs = re.split(r"^### ", part, flags=re.MULTILINE)
        name, prompt, specification = re.match(PROBLEM, problem, re.DOTALL).groups()
        recorded = {}
        for written in programs:
            title, outcome, program, said = re.match(PROGRAM, written, re.DOTALL).groups()
            errors = re.findall(r"^\* line (\d+), (.*?): (.*)", said, re.MULTILINE)
            detail = "" if errors else said.removeprefix("* ").strip()
            errors = tuple(DafnyError(int(line), *more) for line, *more in errors)
            program = program.replace(STANDS_HERE, specification)
            recorded[title] = Verdict(outcome, errors, detail, program)
        prompt = f"{prompt}\n\n{specification}"
        found[name] = CaseStudy(prompt, specification, recorded)
    return found


def read(fields: dict) -> dict:
    """The row of an item from elsewhere: `prompt`, and its `specification` where that is another
    text, perhaps `completion`."""
    prompt = text_of(fields, "prompt")
    return {"prompt": prompt, "specification": text_of(fields, "specification", "prompt")}


def metric(completion: str, row: dict) -> bool | None:
    """Whether the verifier accepts the program; None where it failed itself."""
    return _of_batch([completion], [row])[0]


def _of_batch(completions: Sequence[str], rows: Sequence[dict]) -> list[bool | None]:
    verdicts = judge(completions, [row["specification"] for row in rows])
    return [None if v.grade is None else v.outcome == "verified" for v in verdicts]


metric.of_batch = _of_batch


def task(data=None, n_shot: int = 0) -> Task:
    """For the arguments see `items.task_of`."""
    return task_of(
        Specifications("dafny", draw),
        data,
        n_shot,
        read,
        sampler={"max_new_tokens": 128, "steps": 128},
        rewards=[dafny_reward],
        metric=metric,
    )
