"""Where the items of a task come from: its generator, a file, the hub or reasoning-gym."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from mdmrl.config import InputError, require
from mdmrl.tasks.base import Task, hub_rows, numbered_rows, split_of

# Of generated items: the share that each split has, and how many of them are its rows.
SHARES = {"pretrain": 0.65, "rl": 0.15, "validation": 0.05, "test": 0.15}
ROWS = {"pretrain": 5000, "rl": 2000, "validation": 500, "test": 2000}
DRAWS = 100  # for each row, before a split is taken to have no more
Found = Sequence[tuple[str, dict]]  # the fields of items, each behind where they stand
GYM, GYM_ITEMS = "reasoning-gym", 500


@dataclass(frozen=True)
class Generator:
    """Items that a program draws, shared out to splits by a hash of what makes each itself.

    Attributes:
        draw: `draw(rng) -> (key, row)`. The key says what the item is, whatever its wording, the
            names in it or the order of its options; where it holds a NUL, what stands before that
            decides the split, and all of it whether two items are one. The row has a `prompt`, the
            columns that the scorer reads, and a right `completion`.
    """

    name: str
    draw: Callable[[random.Random], tuple[str, dict]]

    def split_of(self, key: str) -> str:
        """The split of an item."""
        return split_of(self.name, key.partition("\0")[0], shares=SHARES)

    def rows(self, split: str, limit: int | None = None) -> list[dict]:
        """The first `limit` items of a split, distinct and in a fixed order: of `ROWS` of them, or
        of as many as there are. They are shuffled, since what is drawn first is drawn often, and
        easier."""
        return [dict(row) for row in _rows(self, split, ROWS[split])[:limit]]

    def unseen(self, count: int) -> list[dict]:
        """That many distinct items of any split but `pretrain`, in a fixed order: where one split
        has too few."""
        rng, found = random.Random(f"{self.name}/unseen"), {}
        while len(found) < count:
            key, row = self.draw(rng)
            if self.split_of(key) != "pretrain":
                found.setdefault(key, row)
        return list(found.values())

    def stream(self, seed: int, start: int = 0) -> Iterator[dict]:
        """An endless supply of pre-training items; item i depends on (seed, i) alone."""
        for index in itertools.count(start):
            rng = random.Random(f"{self.name}/stream/{seed}/{index}")
            drawn = (self.draw(rng) for _ in itertools.count())
            yield next(row for key, row in drawn if self.split_of(key) == "pretrain")


@lru_cache(maxsize=16)
def _rows(generator: Generator, split: str, count: int) -> list[dict]:
    rng, found = random.Random(f"{generator.name}/{split}"), {}
    for _ in range(DRAWS * count):
        key, row = generator.draw(rng)
        if generator.split_of(key) == split:
            found.setdefault(key, row)
        if len(found) == count:
            break
    rows = list(found.values())
    rng.shuffle(rows)
    return rows


@dataclass(frozen=True)
class Original:
    """A task's data set on the hub.

    Attributes:
        config, split: what is evaluated.
        examples: the split that worked examples are from, or None where there is no other.
        max_new_tokens: which its solutions need, also where they lie in a file; None: the task's.
    """

    config: str | None
    split: str
    examples: str | None = None
    max_new_tokens: int | None = 256


@dataclass(frozen=True)
class Gym:
    """A task of reasoning-gym.

    Attributes:
        name, settings: what it has there.
        fields: `fields(item)`, an item's fields as the task reads them.
        shared: whether its items can be the generator's, whose key is then the prompt; those of
            split `pretrain` are left out.
    """

    name: str
    fields: Callable[[dict], dict]
    settings: Mapping[str, int] = field(default_factory=dict)
    shared: bool = False


def task_of(
    items: Generator,
    data: str | Path | None,
    n_shot: int,
    read: Callable[[dict], dict],
    original: Original | None = None,
    gym: Gym | None = None,
    **judged,
) -> Task:
    """A task of generated items, or of those that `data` names.

    Args:
        data: a JSON or JSONL file, a name on the hub or "reasoning-gym"; all its rows are both
            split `rl` and split `test`.
        n_shot: so many worked examples stand before a prompt, each as question, solution and an
            empty line, as base models are asked. They are the first rows of the file, which are
            then not scored, or of the hub's other split; of the generator's `pretrain` split where
            `data` gives no solutions, or is None.
        read: `read(fields) -> row`, or an InputError, to which file and line are added.
        judged: the other attributes of the `Task`.
    """
    require(n_shot >= 0, f"n_shot={n_shot}: expected 0 or more worked examples")
    judged["name"] = items.name
    if data is None:
        splits = {split: partial(_generated, items, split, n_shot) for split in ROWS}
        return Task(splits=splits, stream=items.stream, **judged)
    data = str(data)
    found, examples = _found(items.name, data, n_shot, original, gym)
    rows, shown = _read(found, read), _read(examples[:n_shot], read)
    if data == GYM and gym.shared:
        rows = [row for row in rows if items.split_of(row["prompt"]) != "pretrain"]
    if not all("completion" in row for row in shown):
        shown = []
    elif examples is found:
        require(len(rows) > n_shot, f"{data}: {len(rows)} rows, expected more than n_shot={n_shot}")
        rows = rows[n_shot:]
    rows = with_examples(rows, shown or (items.rows("pretrain", n_shot) if n_shot else []))
    if original and original.max_new_tokens and data != GYM and "prompt" not in found[0][1]:
        judged["sampler"] = {"max_new_tokens": original.max_new_tokens}
    return Task(splits={"rl": rows, "test": rows}, **judged)


def with_examples(rows: Sequence[dict], examples: Sequence[dict]) -> list[dict]:
    """The rows with worked examples before each prompt."""
    shown = "".join(f"{row['prompt']}\n{row['completion']}\n\n" for row in examples)
    return [row | {"prompt": shown + row["prompt"]} for row in rows]


def text_of(fields: Mapping, *names: str) -> str:
    """What stands in the first of the fields `names` that there is, a text or a whole number."""
    value = next((fields[name] for name in names if name in fields), None)
    text = str(value).strip() if isinstance(value, str | int) else ""
    said = " or ".join(map(repr, names))
    found = "missing or empty" if value in (None, "") else f"{value!r:.80}, no text"
    require(bool(text), f"field {said} is {found} (fields found: {', '.join(fields) or 'none'})")
    return text


def _generated(items: Generator, split: str, n_shot: int) -> list[dict]:
    shown = n_shot and split != "pretrain"
    examples = items.rows("pretrain", n_shot) if shown else []
    return with_examples(items.rows(split), examples)


def _found(
    task: str, data: str, n_shot: int, original: Original | None, gym: Gym | None
) -> tuple[Found, Found]:
    """What `data` names, and where worked examples are: the same, another split, or nowhere."""
    if data == GYM:
        return _from_gym(task, gym), []
    if Path(data).suffix in (".json", ".jsonl") or Path(data).is_file():
        rows = numbered_rows(data)
        return rows, rows
    wanted = f"expected FILE.jsonl, {GYM!r} or a data set on the hub of the kind of {task}"
    require(original is not None and "/" in data, f"data={data!r}: {wanted}")
    rows = _from_hub(data, original.config, original.split)
    if n_shot and original.examples:
        return rows, _from_hub(data, original.config, original.examples)
    return rows, rows


def _read(found: Found, read: Callable[[dict], dict]) -> list[dict]:
    """The rows, each with its other fields too, which one's own rewards may read."""
    rows = []
    for where, fields in found:
        try:
            rows.append(fields | read(fields))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return rows


def _from_hub(name: str, config: str | None, split: str) -> Found:
    return [(f"{name}, row {i}", row) for i, row in enumerate(hub_rows(name, config, split), 1)]


def _from_gym(task: str, gym: Gym | None) -> Found:
    require(gym is not None, f"{GYM} has no items of {task}: give a file of rows")
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(f"data={GYM!r} needs its package: pip install 'mdmrl[gym]'") from None
    items = reasoning_gym.create_dataset(gym.name, size=GYM_ITEMS, seed=0, **gym.settings)
    return [(f"{GYM} {gym.name}, item {i}", gym.fields(item)) for i, item in enumerate(items)]
