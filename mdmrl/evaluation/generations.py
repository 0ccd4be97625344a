"""Stored completions, of whoever wrote them: scored, or two sets of them compared."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mdmrl.config import InputError, require
from mdmrl.evaluation.examples import prompt_hash
from mdmrl.evaluation.stats import mcnemar, paired_interval
from mdmrl.rewards.text import completion_text
from mdmrl.tasks import Task, countdown
from mdmrl.tasks.base import numbered_rows, verdicts

# LLaDA's end tokens, which d1's files keep; what stands behind the first is no part of the text.
END = re.compile(r"<\|(?:eot_id|endoftext)\|>")
ANSWERED = ("gsm", "math", "choice", "sudoku")  # tasks whose `answer` is a text


def score_generations(task: Task, paths: Sequence[str | Path]) -> pd.DataFrame:
    """The completions of one or more files, which are one set, as `task` scores them.

    A file holds either rows in JSONL (or a JSON list of rows) with `completion`, a string or a list
    of messages, and the columns that the task's metric reads, for Countdown also `input` and
    `output`; or what d1's `eval/eval.py` stores (Zhao et al. 2025): an object whose list
    `generations` holds objects with `question`, `generations`, the text with LLaDA's end tokens,
    and `ground_truth`, which is `[[numbers], target]` for Countdown and the answer for any other
    task. An answer that is null is not judged.

    Returns:
        A row a completion: `file`, `index`, `prompt_hash`, `completion`, `extracted` and `score`,
        as in `mdmrl.evaluation.examples`.

    Raises:
        InputError: naming the file and its line or entry, for what cannot be scored.
    """
    require(task.metric is not None, f"task {task.name} has no metric to score completions with")
    examples = []
    for path in paths:
        for where, row in _stored(Path(path), task):
            text = row["completion"]
            example = {"file": str(path), "index": len(examples), "prompt_hash": prompt_hash(row)}
            example |= {"completion": text}
            example |= {"extracted": task.extract(text) if task.extract else None}
            examples.append(example | {"score": _score(task, text, row, where)})
    return pd.DataFrame(examples).astype({"score": float})


def _score(task: Task, text: str, row: dict, where: str) -> float | None:
    if "answer" in row and row["answer"] is None:
        return None
    try:
        (verdict,) = verdicts(task.metric, [text], [row])
    except KeyError as error:
        wanted = f"no column {error}, which {task.name} is scored by"
        raise InputError(f"{where}: {wanted} (found: {', '.join(row)})") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return None if verdict is None else float(verdict)


def _stored(path: Path, task: Task) -> list[tuple[str, dict]]:
    """The rows of a file as the task's metric reads them, each behind its place."""
    try:
        whole = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # which `numbered_rows` says in words, or JSONL
        whole = None
    if isinstance(whole, dict) and isinstance(whole.get("generations"), list):
        require(len(whole["generations"]) > 0, f"{path}: no generations")
        entries = enumerate(whole["generations"])
        numbered = [(f"{path}: generations[{i}]", entry) for i, entry in entries]
        numbered = [(where, _of_d1(entry, task, where)) for where, entry in numbered]
    else:
        numbered = numbered_rows(path)
    return [(where, _readable(row, task, where)) for where, row in numbered]


def _of_d1(entry: dict, task: Task, where: str) -> dict:
    fields = ("question", "generations", "ground_truth")
    require(isinstance(entry, dict), f"{where}: expected an object, got {entry!r:.80}")
    missing = [name for name in fields if name not in entry]
    require(not missing, f"{where}: no {', '.join(missing)} (found: {', '.join(entry)})")
    text, truth = entry["generations"], entry["ground_truth"]
    require(isinstance(text, str), f"{where}: generations is {text!r:.80}: expected a text")
    row = {"prompt": entry["question"], "completion": END.split(text, maxsplit=1)[0]}
    if task.name != "countdown":
        return row | {"answer": truth}
    pair = isinstance(truth, list) and len(truth) == 2
    require(pair, f"{where}: ground_truth is {truth!r:.80}: expected [[numbers], target]")
    return row | {"nums": truth[0], "target": truth[1]}


def _readable(row: dict, task: Task, where: str) -> dict:
    """A row whose completion is a text, and its answer of the type that the scorer takes."""
    require("completion" in row, f"{where}: no completion (found: {', '.join(row) or 'nothing'})")
    try:
        text = completion_text(row["completion"])
    except (TypeError, AttributeError) as error:
        raise InputError(f"{where}: {error}") from None
    # A lone surrogate, which JSON can hold, is in no file.
    row = row | {"completion": text.encode("utf-8", "replace").decode()}
    if task.name == "countdown" and "input" in row and "nums" not in row:
        try:
            row = countdown.read(row) | row  # its completion, not the solution
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if task.name == "countdown" and {"nums", "target"} <= row.keys():
        nums, target = row["nums"], row["target"]
        fit = isinstance(nums, list) and all(map(_is_whole, (*nums, target)))
        said = f"nums={nums!r:.80}, target={target!r:.40}"
        require(fit, f"{where}: {said}: expected a list of whole numbers, and a whole number")
        row |= {"nums": [int(x) for x in nums], "target": int(target)}
    if task.name in ANSWERED and row.get("answer") is not None:
        row["answer"] = _answer(row["answer"], where)
    return row


def _is_whole(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0


def _answer(value, where: str) -> str:
    """An answer as text, a worked one by what stands behind its `####`."""
    fit = isinstance(value, str | int | float) and not isinstance(value, bool)
    fit = fit and (isinstance(value, str) or math.isfinite(value))
    require(fit, f"{where}: answer {value!r:.80}: expected a text or a number")
    if isinstance(value, str):
        return value.rpartition("####")[2].strip()
    return str(int(value)) if value % 1 == 0 else repr(value)


def compare(a: str | Path | pd.DataFrame, b: str | Path | pd.DataFrame) -> dict:
    """Two evaluations over the same items, paired by `prompt_hash`.

    `n` items that both judge; the accuracy of each; `difference`, that of `b` minus that of `a`,
    with Tango's 95 % `interval`; how many are right `both` times, in `only_a`, in `only_b`, and in
    `neither`; and `p` of McNemar's exact test.

    Args:
        a, b: examples, files of them, or the run folders that hold them.

    Raises:
        InputError: files that hold other items, or several completions of one.
    """
    names = [x if isinstance(x, str | Path) else name for x, name in ((a, "a"), (b, "b"))]
    scores = [_scores(x, name) for x, name in zip((a, b), names, strict=True)]
    same = scores[0].keys() & scores[1].keys()
    require(
        len(same) == len(scores[0]) == len(scores[1]),
        f"{names[0]} has {len(scores[0])} items and {names[1]} has {len(scores[1])}, of which "
        f"{len(same)} are in both: expected the same prompts and answers in both",
    )
    pairs = Counter((scores[0][key], scores[1][key]) for key in same)
    only_a, only_b, both, neither = (pairs[p] for p in ((1, 0), (0, 1), (1, 1), (0, 0)))
    n = only_a + only_b + both + neither
    require(n > 0, f"{names[0]} and {names[1]}: no item is judged in both")
    difference = paired_interval(only_b, only_a, n)
    return {
        "a": {"name": str(names[0]), "accuracy": (both + only_a) / n},
        "b": {"name": str(names[1]), "accuracy": (both + only_b) / n},
        "n": n,
        "left_out": len(same) - n,
        "difference": difference.estimate,
        "interval": [difference.low, difference.high],
        **{"both": both, "only_a": only_a, "only_b": only_b, "neither": neither},
        "p": mcnemar(only_a, only_b),
    }


def _scores(
    examples: str | Path | pd.DataFrame, name: str | Path
) -> dict[tuple[str, int], float | None]:
    """The score of every item; a prompt that is there twice is two items."""
    if isinstance(examples, pd.DataFrame):
        rows = json.loads(examples.to_json(orient="records"))  # in which nan is null
        numbered = [(f"{name}, row {i}", row) for i, row in enumerate(rows)]
    else:
        path = Path(examples)
        file = path / "examples.jsonl" if path.is_dir() else path
        require(file.is_file(), f"{path}: there is no such file of examples")
        numbered = numbered_rows(file)
    found, seen, drawn = {}, Counter(), set()
    for where, row in numbered:
        fit = {"prompt_hash", "score"} <= row.keys() and row["score"] in (0, 1, None)
        fit = fit and isinstance(row["prompt_hash"], str)
        require(fit, f"{where}: expected prompt_hash and a score of 0, 1 or null, got {row!r:.80}")
        drawn.add((row.get("seed"), row.get("sample")))
        key = row["prompt_hash"], seen[row["prompt_hash"]]
        seen[row["prompt_hash"]] += 1
        found[key] = row["score"]
    require(
        len(drawn) == 1,
        f"{name} has {len(drawn)} completions of an item, and McNemar's test wants one: evaluate "
        "with one seed and one sample",
    )
    return found
