"""Multiple choice: four options, one of them right, answered by a letter, "<answer>B</answer>".

Four kinds of questions, graded by how hard they are without working: a sum among numbers near it,
the largest of four fractions, a product modulo a small number, and which finding belongs to a
condition (the facts of MedCoT). An item is its question, for a condition or fractions with the set
of its options; their order is drawn and makes no other item. So every medical fact is met in
pre-training, beside other findings. Guessing is right in `CHANCE` of them. The original is GPQA
(Rein et al. 2023).
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

from mdmrl.config import require
from mdmrl.rewards.answers import choice_reward, choice_right, extract_choice
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import Generator, Original, task_of, text_of
from mdmrl.tasks.medcot import conditions

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)


def row(question: str, right: str, wrong: Sequence[str], rng: random.Random) -> dict:
    """The row of a question, its options in an order drawn from `rng`."""
    options = [right, *wrong]
    rng.shuffle(options)
    answer = LETTERS[options.index(right)]
    lines = (f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return {
        "prompt": "\n".join((question, *lines)),
        "answer": answer,
        "completion": f"<answer>{answer}</answer>",
    }


def draw(rng: random.Random, seed: int = 0) -> tuple[str, dict]:
    """An item; another `seed` gives the same one with its options in another order."""
    key, question, right, wrong = rng.choice((sum_of_product, largest, modular, finding))(rng)
    return key, row(question, right, wrong, random.Random(f"choice/order/{seed}/{rng.random()}"))


def sum_of_product(rng: random.Random) -> tuple[str, str, str, list[str]]:
    a, b, c = (rng.randint(3, largest) for largest in (9, 19, 49))
    right = a * b + c
    near = [right + off for off in (-20, -10, -a, -2, -1, 1, 2, a, 10, 20) if right + off > 0]
    wrong = rng.sample(sorted(set(near)), 3)
    return f"{a}*{b}+{c}", f"What is {a} * {b} + {c}?", str(right), list(map(str, wrong))


def largest(rng: random.Random) -> tuple[str, str, str, list[str]]:
    found: set[Fraction] = set()
    while len(found) < len(LETTERS):
        below = rng.randint(2, 12)
        found.add(Fraction(rng.randrange(1, below), below))
    *wrong, right = map(str, sorted(found))
    return " ".join((*wrong, right)), "Which is largest?", right, wrong


def modular(rng: random.Random) -> tuple[str, str, str, list[str]]:
    (a, b), m = sorted(rng.choices(range(3, 40), k=2)), rng.randint(4, 12)
    right = a * b % m
    wrong = rng.sample([n for n in range(m) if n != right], 3)
    return f"{a}*{b} mod {m}", f"What is {a} * {b} mod {m}?", str(right), list(map(str, wrong))


def finding(rng: random.Random) -> tuple[str, str, str, list[str]]:
    facts = rng.choice(conditions())
    wrong: set[str] = set()
    while len(wrong) < 3:
        wrong.add(rng.choice(rng.choice(conditions()).findings))
        wrong -= set(facts.findings)
    right, wrong = rng.choice(facts.findings), sorted(wrong)
    key = "; ".join((facts.condition, *sorted((right, *wrong))))
    return key, f"Which is seen in {facts.condition}?", right, wrong


def read(fields: dict, seed: int = 0) -> dict:
    """The row of an item from elsewhere: GPQA's `Question`, `Correct Answer` and `Incorrect Answer
    1` to `3`, or a `prompt` with its options and the right letter as `answer`."""
    if "prompt" in fields:
        answer = text_of(fields, "answer")
        wanted = f"expected a letter, {' or '.join(LETTERS)}"
        require(answer in (*LETTERS,), f"field 'answer' is {answer!r:.80}: {wanted}")
        question = {"prompt": text_of(fields, "prompt"), "answer": answer}
        return question | {"completion": f"<answer>{answer}</answer>"}
    question, right = text_of(fields, "Question"), text_of(fields, "Correct Answer")
    wrong = [text_of(fields, f"Incorrect Answer {number}") for number in (1, 2, 3)]
    return row(question, right, wrong, random.Random(f"choice/order/{seed}/{question}"))


def metric(completion: str, row: dict) -> bool:
    return choice_right(completion, row["answer"])


def task(data=None, n_shot: int = 0, seed: int = 0) -> Task:
    """With another `seed` options stand in another order; for the rest see `items.task_of`."""
    return task_of(
        Generator("choice", partial(draw, seed=seed)),
        data,
        n_shot,
        partial(read, seed=seed),
        sampler={"max_new_tokens": 8, "steps": 8},
        original=Original("gpqa_main", "train"),
        rewards=[choice_reward],
        metric=metric,
        extract=extract_choice,
    )
