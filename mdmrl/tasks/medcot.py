"""MedCoT: medical chain-of-thought in the format of the thesis's appendix B.

The tiny models learn a generated corpus: a table of real medical facts (`conditions.tsv`), four
question types, varied wording, reasoning of several paragraphs. The habits of form are imperfect
on purpose (tags are dropped, paragraphs run together, the answer is sometimes a sentence), so that
RL has something to teach.

Splits are made by the combination of a condition and three of its findings: every question asked
about a held-out combination is held out with it, and so are the prompts of RL.
"""

import csv
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path

from mdmrl.config import require
from mdmrl.rewards.medical import PACKAGED_ENCODER, medical_rewards
from mdmrl.rewards.text import TAGS, exact_answer, repetition
from mdmrl.tasks.base import MASKED, SPLITS, Task, hub_rows, load_rows, split_of

FINDINGS_SHOWN = 3
REPETITIVE = 0.2

SYSTEM_PROMPT = (
    "Answer the medical question. Think in short paragraphs, and respond in this format:\n"
    "<reasoning>\n...\n</reasoning>\n\n<answer>\n...\n</answer>"
)

OPENINGS = (
    "A patient has {0}, {1} and {2}.",
    "A patient presents with {0}, {1} and {2}.",
    "Someone comes in with {0}, {1} and {2}.",
    "The findings are {0}, {1} and {2}.",
)
QUESTIONS = {
    "condition": ("What is the most likely diagnosis?", "Which condition explains this?"),
    "mechanism": ("What is the underlying mechanism?", "Which process causes this?"),
    "test": ("Which test is decisive?", "Which test would confirm the diagnosis?"),
    "system": ("Which organ system is affected?", "Where does the problem lie?"),
}
RESPONSES = {
    "condition": "The most likely diagnosis is {condition}, that is, {mechanism}.",
    "mechanism": "The underlying mechanism is {mechanism}, as seen in {condition}.",
    "test": "The decisive test is {test}, which confirms {condition}.",
    "system": "The {system} system is affected, because this is {condition}.",
}
# Wordings of one paragraph are equally long, so that style does not shift what follows.
# fmt: off
PARAGRAPHS = (
    ("Both {f0} and {f1} point to the {system} system.",
     "Here {f0} and {f1} hint at the {system} system."),
    ("Adding {f2}, this fits {condition}, which means {mechanism}.",
     "Given {f2}, it is {condition}, which means {mechanism}."),
    ("In {condition} one would also expect {also}, {more} or {most}.",
     "For {condition} we might also see {also}, {more} or {most}."),
    ("To confirm it, {test} is decisive.", "To be sure, {test} is needed."),
)
# fmt: on

# How a text is tagged, and how often; only the first form has all four tags.
TAGGINGS = {
    "<reasoning>{reasoning}</reasoning>{gap}<answer>{answer}</answer>": 0.40,
    "{reasoning}{gap}<answer>{answer}</answer>": 0.15,
    "<reasoning>{reasoning}{gap}<answer>{answer}</answer>": 0.10,
    "<reasoning>{reasoning}</reasoning>{gap}<answer>{answer}": 0.10,
    "<reasoning>{reasoning}</reasoning>{gap}The answer is {answer}.": 0.15,
    "{reasoning}{gap}The answer is {answer}.": 0.10,
}
# How paragraphs are set apart, and how often: each by a break, only the answer, or not at all.
SPACINGS = {("\n\n", "\n\n"): 0.35, (" ", "\n\n"): 0.35, (" ", " "): 0.30}


@dataclass(frozen=True)
class Condition:
    """One row of the table of facts."""

    condition: str
    system: str
    mechanism: str
    test: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Combination:
    """A condition with the findings a question shows: the unit that splits are made of."""

    condition: Condition
    findings: tuple[str, ...]


@lru_cache(maxsize=1)
def conditions() -> tuple[Condition, ...]:
    text = resources.files("mdmrl.tasks").joinpath("conditions.tsv").read_text("utf-8")
    facts = csv.DictReader(text.splitlines(), delimiter="\t")
    return tuple(Condition(**f | {"findings": tuple(f["findings"].split("; "))}) for f in facts)


@lru_cache(maxsize=4)
def combinations(split: str) -> tuple[Combination, ...]:
    """Every combination of a condition and three of its findings that falls into `split`."""
    return tuple(
        Combination(condition, shown)
        for condition in conditions()
        for shown in itertools.combinations(condition.findings, FINDINGS_SHOWN)
        if split_of(condition.condition, *shown) == split
    )


def question_row(combination: Combination, kind: str, rng: random.Random) -> dict:
    """One question about a combination, with a freshly worded reasoning and answer: the fields of
    the real data set, the `prompt`, and the tagged `completion` that pre-training learns."""
    fact = combination.condition
    findings = rng.sample(combination.findings, FINDINGS_SHOWN)
    unseen = [finding for finding in fact.findings if finding not in findings]
    slots = vars(fact) | dict(zip(("also", "more", "most"), unseen, strict=True))
    slots |= {f"f{i}": finding for i, finding in enumerate(findings)}
    (inner, gap), *_ = rng.choices(list(SPACINGS), SPACINGS.values())
    reasoning = inner.join(rng.choice(wordings).format(**slots) for wordings in PARAGRAPHS)
    question = f"{rng.choice(OPENINGS).format(*findings)} {rng.choice(QUESTIONS[kind])}"
    (tagging,) = rng.choices(list(TAGGINGS), TAGGINGS.values())
    answer, response = slots[kind], RESPONSES[kind].format(**slots)
    completion = tagging.format(reasoning=reasoning, gap=gap, answer=answer)
    real = {"Question": question, "Complex_CoT": reasoning, "Response": response, "Answer": answer}
    return {"prompt": question, **real, "completion": completion}


def rows(split: str, seed: int = 0) -> list[dict]:
    """The questions of a split, one of each kind for every combination, in a fixed order."""
    rng = random.Random(f"medcot/{split}/{seed}")
    questions = [question_row(c, kind, rng) for c in combinations(split) for kind in QUESTIONS]
    rng.shuffle(questions)
    return questions


def stream(seed: int, start: int = 0) -> Iterator[dict]:
    """An endless supply of pre-training questions; item i depends on (seed, i) alone."""
    pool = combinations("pretrain")
    for index in itertools.count(start):
        rng = random.Random(f"medcot/stream/{seed}/{index}")
        yield question_row(rng.choice(pool), rng.choice(list(QUESTIONS)), rng)


def load_real(source: str | Path) -> list[dict]:
    """Rows of the real data set from a JSON/JSONL file, or from the hub through `datasets`.

    `Answer` is optional there (the thesis's copy has it, the published one has not); without it
    a row has no true metric.
    """
    if Path(source).suffix in (".json", ".jsonl"):
        found = load_rows(source, required=("Question", "Complex_CoT", "Response"))
    else:
        found = hub_rows(str(source), "en", "train")
    for number, row in enumerate(found, 1):
        for name in ("Question", "Complex_CoT", "Response", "Answer"):
            value, said = row.get(name), f"{source}: row {number}, field {name!r} is"
            require(isinstance(value, str | None), f"{said} {value!r:.80}: expected a text")
    return [{"prompt": row["Question"], **row, "Answer": row.get("Answer") or ""} for row in found]


def metric(completion: str, row: dict) -> bool | None:
    """Whether the answer is right; None without a reference."""
    return exact_answer(completion, row["Answer"]) if row["Answer"] else None


def watch(texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """The symptoms of appendix C: `format_rate`, the share of texts with all four tags, and
    `failure_rate`, of those that lack one, keep a [MASK], or repeat more than `REPETITIVE` of
    their 4-grams."""
    tagged = [all(tag in text for tag in TAGS) for text in texts]
    broken = [MASKED in ids or repetition(ids) > REPETITIVE for ids in token_ids]
    fails = [bad or not good for good, bad in zip(tagged, broken, strict=True)]
    return {"format_rate": sum(tagged) / len(texts), "failure_rate": sum(fails) / len(texts)}


def task(
    data: str | Path | None = None,
    faithful: bool = True,
    encoder: str = PACKAGED_ENCODER,
    answer_only: bool = False,
) -> Task:
    """MedCoT, generated or real; the real rows are split by a hash of their question. For the other
    arguments see `medical_rewards`."""
    splits = {split: partial(rows, split) for split in SPLITS}
    if data is not None:
        splits = {split: [] for split in SPLITS}
        for row in load_real(data):
            splits[split_of(row["Question"])].append(row)
    rewards = medical_rewards(faithful, encoder, answer_only)
    judged = {"rewards": rewards, "metric": metric, "watch": watch}
    return Task("medcot", splits, **judged, stream=stream if data is None else None)
