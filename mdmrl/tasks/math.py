"""Mathematics: linear equations, sums and products of fractions, modular arithmetic.

The prompt asks in one line, "Solve for x: 3x + 5 = 20.", the completion is a short working and the
answer in LaTeX, "\\boxed{5}" or "\\boxed{\\frac{3}{4}}". An item is its equation or expression, and
splits are made of these. The original is MATH-500 (Hendrycks et al. 2021; Lightman et al. 2023).
"""

import random
from fractions import Fraction
from math import gcd

from mdmrl.rewards.maths import maths_answer, maths_reward, maths_right, start_worker
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import Generator, Gym, Original, task_of, text_of

LARGEST_DENOMINATOR = 12
LARGEST_SHARED = 24


def draw(rng: random.Random) -> tuple[str, dict]:
    kind = rng.choices((equation, fractions, remainder), (0.4, 0.25, 0.35))[0]
    key, question, work, answer = kind(rng)
    completion = f"{work}\n\\boxed{{{answer}}}"
    return key, {"prompt": question, "answer": answer, "completion": completion}


def latex(value: Fraction) -> str:
    """A number in LaTeX, a fraction in lowest terms."""
    if value.denominator == 1:
        return str(value)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def equation(rng: random.Random) -> tuple[str, str, str, str]:
    """ax + b = cx + d, also with c = 0."""
    x, slope, c = rng.randint(-9, 12), rng.randint(2, 9), rng.choice((0, 0, 2, 3, 4))
    b = rng.choice([n for n in range(-20, 21) if n])
    d = (slope * x) + b
    right = f"{c}x {'+' if d >= 0 else '-'} {abs(d)}" if c else str(d)
    text = f"{slope + c}x {'+' if b > 0 else '-'} {abs(b)} = {right}"
    return text, f"Solve for x: {text}.", f"{slope}x={slope * x}\nx={x}", str(x)


def fractions(rng: random.Random) -> tuple[str, str, str, str]:
    while True:
        below = [rng.randint(2, LARGEST_DENOMINATOR) for _ in range(2)]
        a, b = (Fraction(rng.randint(1, 2 * n), n) for n in below)
        sign = rng.choice("+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        shared = a.denominator * b.denominator
        if sign != "*":
            shared //= gcd(a.denominator, b.denominator)
        if value > 0 and shared <= LARGEST_SHARED and 1 not in (a.denominator, b.denominator):
            text = f"{a} {sign} {b}"
            work = f"{value * shared}/{shared}"
            return text, f"What is {text} as a fraction?", work, latex(value)


def remainder(rng: random.Random) -> tuple[str, str, str, str]:
    """What a*b + c leaves when it is divided by m."""
    a, b, c, m = (rng.randint(2, largest) for largest in (9, 9, 20, 12))
    value = a * b + c
    text = f"({a} * {b} + {c}) mod {m}"
    quotient, rest = divmod(value, m)
    work = f"{a * b}+{c}={value}\n{value}-{quotient * m}={rest}"
    return text, f"What is {text}?", work, str(rest)


def read(fields: dict) -> dict:
    """The row of an item from elsewhere: `problem` (or `prompt`), `answer` in LaTeX, and as in
    MATH-500 perhaps `solution`."""
    row = {"prompt": text_of(fields, "prompt", "problem"), "answer": text_of(fields, "answer")}
    completion = fields.get("solution", fields.get("completion"))
    return row if completion is None else row | {"completion": completion}


def _of_gym(item: dict) -> dict:
    facts = item["metadata"]
    text = facts["equation"].replace("*" + facts["variable"], "x").replace(facts["variable"], "x")
    answer = item["answer"]
    return {
        "problem": f"Solve for x: {text}.",
        "answer": answer,
        "solution": f"\\boxed{{{answer}}}",
    }


def metric(completion: str, row: dict) -> bool:
    return maths_right(completion, row["answer"])


def task(data=None, n_shot: int = 0) -> Task:
    """For the arguments see `items.task_of`."""
    start_worker()
    return task_of(
        Generator("math", draw),
        data,
        n_shot,
        read,
        sampler={"max_new_tokens": 28, "steps": 28},
        original=Original(None, "test"),
        gym=Gym("simple_equations", _of_gym),
        rewards=[maths_reward],
        metric=metric,
        extract=maths_answer,
    )
