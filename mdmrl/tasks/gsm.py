"""GSM: word problems of two to four steps, after GSM8K (Cobbe et al. 2021).

An item is its arithmetic, a chain of steps whose results are whole and from 1 to 99. The prompt
tells it with names and things; the completion works it out, "3*4=12", "12+5=17", and gives
"<answer>17</answer>". Splits are made of the arithmetic alone: one chain told of apples and of
books, or in other sentences, is the same item.
"""

import operator
import random

from mdmrl.config import require
from mdmrl.rewards.answers import extract_number, number_reward, number_right
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import Generator, Gym, Original, task_of, text_of

LARGEST = 99
STEPS = (2, 3, 4)
NAMES = ("Tom", "Ben", "Mia", "Sam", "Zoe", "Leo", "Eva", "Anna")
THINGS = ("apples", "books", "pens", "stones", "cups", "balls", "coins", "birds")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
# The sentences of a story by what they do to the number so far: begin it, change it, ask for it.
# Boxes are a step of their own.
BEGIN = {
    "=": ("{name} has {n} {things}.", "There are {n} {things} in a box."),
    "=boxes": ("{name} has {k} boxes of {n} {things}.", "{name} finds {k} boxes of {n} {things}."),
}
CHANGE = {
    "+": ("{name} buys {n} more.", "{friend} adds {n} more.", "{n} more come."),
    "-": ("{name} sells {n}.", "{friend} gets {n} of them.", "{n} are lost."),
    "*": ("Then there are {n} times as many.", "Soon there are {n} times as many."),
    "+boxes": ("{name} buys {k} boxes of {n}.", "{friend} adds {k} boxes of {n}."),
    "-boxes": ("{name} sells {k} boxes of {n}.", "{friend} gets {k} boxes of {n}."),
}
ASK = {
    "=": ("How many {things} are there?", "How many {things} is that?"),
    "*": ("Each costs {n} dollars. How many dollars is that?",),
    "/": ("{n} children share them. How many does each get?",),
}


def draw(rng: random.Random) -> tuple[str, dict]:
    while True:
        events, lines = _chain(rng)
        if lines and all(1 <= value <= LARGEST for *_, value in lines):
            break
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
    story = " ".join(rng.choice(told).format(**words, k=k, n=n) for told, k, n in events)
    work, answer = "\n".join(f"{a}{sign}{b}={value}" for a, sign, b, value in lines), lines[-1][-1]
    completion = f"{work}\n<answer>{answer}</answer>"
    return work, {"prompt": story, "answer": str(answer), "completion": completion}


def _chain(rng: random.Random) -> tuple[list[tuple], list[tuple]]:
    """Events (sentences, boxes, number) and the steps (a, sign, b, result) that they make; no steps
    where there are too many or a division leaves a rest."""
    wanted, value, events, lines = rng.choice(STEPS), None, [], []
    for sentences in (BEGIN, *[CHANGE] * rng.randrange(wanted), ASK):
        kind = rng.choice(list(sentences))
        sign, boxes = kind[0], kind[1:]
        k, n = rng.randint(2, 9), rng.randint(2, 9 if boxes or sign in "*/" else 40)
        events.append((sentences[kind], k, n))
        if boxes:
            lines.append((k, "*", n, k * n))
            n *= k
        if value is None:
            value = n
        elif sign in SIGNS:
            if sign == "/" and value % n:
                return events, []
            lines.append((value, sign, n, SIGNS[sign](value, n)))
            value = lines[-1][-1]
    return events, lines if len(lines) == wanted else []


def read(fields: dict) -> dict:
    """The row of an item from elsewhere: `question` (or `prompt`) and `answer`, a number or, as in
    GSM8K, a solution that ends with "#### 18"."""
    question, solution = text_of(fields, "prompt", "question"), text_of(fields, "answer")
    *work, answer = solution.rpartition("####")
    wanted = "expected a number, alone or behind '####'"
    require(extract_number(answer) is not None, f"field 'answer' is {solution!r:.80}: {wanted}")
    row = {"prompt": question, "answer": answer.strip()}
    completion = solution if any(work) else fields.get("completion")
    return row if completion is None else row | {"completion": completion}


def _of_gym(item: dict) -> dict:
    question, _, _ = item["question"].partition(" Give the result as your final answer.")
    return {"question": question, "answer": item["metadata"]["answer_cot"]}


def metric(completion: str, row: dict) -> bool:
    return number_right(completion, row["answer"])


def extract(completion: str) -> str | None:
    number = extract_number(completion)
    return None if number is None else str(number)


def task(data=None, n_shot: int = 0) -> Task:
    """For the arguments see `items.task_of`."""
    return task_of(
        Generator("gsm", draw),
        data,
        n_shot,
        read,
        sampler={"max_new_tokens": 48, "steps": 48},
        original=Original("main", "test", "train"),
        gym=Gym("gsm_symbolic", _of_gym),
        rewards=[number_reward],
        metric=metric,
        extract=extract,
    )
