"""A task: prompts with references, the rewards that RL sees, and the true metric it does not."""

from __future__ import annotations

import hashlib
import json
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdmrl.config import InputError, require, unknown
from mdmrl.rewards.protocol import plain

if TYPE_CHECKING:
    from mdmrl.policies import Policy
    from mdmrl.sampling.hierarchy import Unit

Reward = Callable[..., Sequence[float | None]]
Rows = Sequence[dict]

SPLITS = {"pretrain": 0.70, "rl": 0.15, "validation": 0.05, "test": 0.10}
MASKED = -1  # stands for a leftover [MASK] in the token ids that `Task.watch` gets


@dataclass(frozen=True)
class Task:
    """Prompts and how their completions are judged.

    Attributes:
        splits: rows by name of a split, or a function giving them: `rl` is trained on,
            `validation` watched meanwhile, `test` evaluated; only those that are asked for are
            needed. A row holds `prompt` (a string or a message list) and the reference columns
            that rewards and metric read.
        rewards: summed in training, logged apart.
        metric: `metric(completion, row) -> bool`, the true metric, None where a row cannot be
            judged; never part of the reward. One that is faster for many at once has an attribute
            `of_batch(completions, rows)`, a list of the same.
        stream: `stream(seed, start)`, the endless supply for pre-training, or None.
        units: what the hierarchy writes a completion in, none where it is written whole.
        watch: `watch(texts, token_ids)`, what else to log of completions, a number by name.
        sampler: fields of `SamplerConfig` that the task is completed with where nothing else is
            said.
        extract: the answer that a completion gives, as text, or None.
    """

    name: str
    splits: Mapping[str, Rows | Callable[[], Rows]]
    rewards: Sequence[Reward] = ()
    metric: Callable[[str, dict], bool | None] | None = None
    stream: Callable | None = None
    units: Sequence[Unit] = ()
    watch: Callable[[list[str], list[list[int]]], Mapping[str, float]] | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)
    extract: Callable[[str], str | None] | None = None

    def __post_init__(self) -> None:
        fit = isinstance(self.splits, Mapping)
        require(
            fit, f"task {self.name}: splits={self.splits!r:.80}: expected rows by name of a split"
        )

    def rows(self, split: str, limit: int | None = None, system: str | None = None) -> list[dict]:
        """Rows of a split, the first `limit`; `system` puts a system message before each prompt,
        for a model that was not pre-trained on the task's format."""
        if split not in self.splits:
            raise unknown(f"split of {self.name}", split, self.splits)
        require(limit is None or limit >= 1, f"limit={limit}: expected 1 or more rows")
        found = self.splits[split]
        rows = list(found() if callable(found) else found)[:limit]
        require(len(rows) > 0, f"split {split!r} of {self.name} is empty")
        if system is not None:
            rows = [{**row, "prompt": with_system(system, row["prompt"])} for row in rows]
        return rows

    def sampler_for(self, policy: Policy, **said) -> dict:
        """The fields of `SamplerConfig` that are `said`, and the task's own for length and steps
        where these say nothing of them."""
        own = dict(self.sampler)
        sized = said.get("step_sizes", "equal") != "equal"
        given = said.keys() & {"max_new_tokens", "threshold", "entropy_bound"}
        if not policy.denoises or sized or given:
            own.pop("steps", None)
        return own | said


def verdicts(metric: Callable, completions: Sequence[str], rows: Rows) -> Sequence[bool | None]:
    """What a task's `metric` says of completions of `rows`; an InputError where that is not True,
    False or None for each."""
    of_batch = getattr(metric, "of_batch", None)
    found = [*(of_batch(completions, rows) if of_batch else map(metric, completions, rows))]
    count, name = len(completions), getattr(metric, "__name__", type(metric).__name__)
    said = f"metric {name!r} returned {len(found)} verdicts: expected one for each of {count} texts"
    require(len(found) == count, said)
    for index, verdict in enumerate(found):
        number = plain(verdict)
        fit = number is None or (isinstance(number, int | float) and number in (0, 1))
        said = f"metric {name!r} returned {verdict!r:.80} for completion {index}"
        require(fit, f"{said}: expected True, False, or None where it cannot be judged")
    return found


def split_of(*parts: str, shares: Mapping[str, float] = SPLITS) -> str:
    """The split that an item falls into: a hash of what makes it itself, so that it never changes
    with the order or the number of items. The `shares` of the splits sum to 1."""
    text = "|".join(("split", *parts)).encode(errors="surrogatepass")
    digest = hashlib.sha256(text).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48
    for name, width in shares.items():
        share -= width
        if share < 0:
            return name
    return "test"  # the widths sum to one up to rounding


def with_system(system: str, prompt: str) -> list[dict]:
    """A user's prompt as messages behind a system message."""
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def load_rows(
    path: str | Path, required: Sequence[str] = ("prompt",), lenient: bool = False
) -> list[dict]:
    """Read a JSONL file (or a JSON list) of rows.

    Args:
        lenient: leave a bad line out, and warn of how many there are.

    Raises:
        InputError: naming file:line, for a line that is no JSON object, is not UTF-8, or lacks a
            `required` field (present, a non-empty string or message list).
    """
    rows, bad = [], []
    for where, entry in _entries(path):
        try:
            row = _object(where, entry)
            _require_fields(where, row, required)
            rows.append(row)
        except InputError as error:
            if not lenient:
                raise
            bad.append(error)
    if bad:
        said = f"{path}: {len(bad)} of {len(bad) + len(rows)} rows are left out"
        warnings.warn(f"{said}, the first for this: {bad[0]}", stacklevel=2)
    require(len(rows) > 0, f"{path}: no rows")
    return rows


def numbered_rows(path: str | Path) -> list[tuple[str, dict]]:
    """The objects of a JSONL file (or a JSON list), each behind its "file:line".

    Raises:
        InputError: as `load_rows`, whatever fields there are.
    """
    rows = [(where, _object(where, entry)) for where, entry in _entries(path)]
    require(len(rows) > 0, f"{path}: no rows")
    return rows


def _entries(path: str | Path) -> Iterator[tuple[str, object]]:
    """Where each row of a file stands, and its line, or what a JSON list holds there."""
    path = Path(path)
    require(path.is_file(), f"{path}: there is no such file of rows")
    raw = path.read_bytes().removeprefix(BOM_UTF8)
    if path.suffix == ".json":
        listed = _parsed(raw, path)
        require(isinstance(listed, list), f"{path}:1: expected a JSON list of rows")
        yield from ((f"{path}:{number}", row) for number, row in enumerate(listed, 1))
    else:
        lines = enumerate(raw.split(b"\n"), 1)
        yield from ((f"{path}:{number}", line) for number, line in lines if line.strip())


def _parsed(raw: bytes, path: str | Path, first: int = 1):
    """JSON whose first line has that number."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = first + raw[: error.start].count(b"\n")
        raise InputError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:  # also for numbers, and depths, without end
        line = first + getattr(error, "lineno", 1) - 1
        raise InputError(f"{path}:{line}: no JSON ({getattr(error, 'msg', error)})") from None


def _object(where: str, row) -> dict:
    """An entry as an object, or an InputError that says where it stands."""
    if isinstance(row, bytes):
        path, _, number = where.rpartition(":")
        row = _parsed(row, path, int(number))
    require(isinstance(row, dict), f"{where}: expected an object, got {row!r:.80}")
    return row


def _require_fields(where: str, row: dict, required: Sequence[str]) -> None:
    found = f"missing or empty (fields found: {', '.join(row) or 'none'})"
    wanted = 'expected a string or a list of messages like {"role": "user", "content": "..."}'
    for name in required:
        value, said = row.get(name), f"{where}: field {name!r} is"
        require(isinstance(value, str | list) and len(value) > 0, f"{said} {found}")
        fit = isinstance(value, str) or all(map(_is_message, value))
        require(fit, f"{said} {value!r:.80}: {wanted}")


def hub_rows(name: str, config: str | None, split: str) -> list[dict]:
    """A split of a data set on the hub, through `datasets` (the extra `hub`)."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name} is no file; the hub needs pip install datasets") from None

    try:
        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # of many classes
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be loaded: {type(error).__name__}: {said}") from error


def _is_message(value) -> bool:
    fields = ("role", "content")
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in fields)
