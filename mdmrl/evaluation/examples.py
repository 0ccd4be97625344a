"""Evaluation one example at a time: what each prompt was completed with, how the task's metric
judged it, and what it cost.

    evaluated = evaluate_examples(policy, load_task("countdown"), rows)
    summary(evaluated.examples)["accuracy"]

An example is a row of `examples`, in a run folder a line of `examples.jsonl`:

    batch          which batch it was drawn in
    index          which of the rows; seed, sample: which of its completions
    prompt_hash    of the prompt and the columns that it is scored by: what two evaluations are
                   paired by
    completion     the text; extracted: the answer it gives (`Task.extract`)
    score          1 or 0, None where the metric abstains; reward, rewards/NAME: where asked for
    seconds        its share of the time that completing its batch took, scoring left out
    positions      its share of the positions that the network computed for its batch
    nfe            forward passes of its batch, which all of its examples went through
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from mdmrl.config import require
from mdmrl.evaluation.accuracy import Batch, Judge, Mean, average
from mdmrl.evaluation.stats import clustered_interval, pass_at_k
from mdmrl.identity import known, named
from mdmrl.policies import Policy
from mdmrl.progress import Progress
from mdmrl.rewards import RewardLog
from mdmrl.runs import Run
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.tasks import Task

ALGORITHM = "evaluate-1"  # part of a run's identity: raise it when results change
SCORED = {"nums", "target", "answer"}  # what the tasks with checked answers are scored by


class Evaluation(NamedTuple):
    """The examples, and the averages that `mdmrl.evaluate` gives."""

    examples: pd.DataFrame
    averages: dict[str, float | None]


def evaluate_examples(
    policy: Policy,
    task: Task,
    rows: Sequence[dict],
    sampler: SamplerConfig | None = None,
    *,
    seeds: Sequence[int] = (0,),
    samples: int = 1,
    rewards: Sequence[Callable] = (),
    draw: Callable = generate,
    batch_size: int = 64,
    output_dir: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Complete the prompt of every row `samples` times for each of the `seeds`, and judge it.

    A batch is drawn with a generator of its seed and of the place of its first completion, so that
    a run that was cut off goes on with the same bits (on one machine, seconds apart).

    Args:
        sampler: the task's own where it is None.
        rewards: to compute too; draw: what completes the prompts, called as `generate` is.
        output_dir: a run folder, which gets `examples.jsonl`, `metrics.jsonl` (monitors of every
            batch), `config.json` (what the run is known by) and `environment.json`; a run that it
            holds goes on, or is read where it is complete.
        progress: show how far it has come.

    Raises:
        InputError: several completions of a prompt from a sampler that always draws the same.
        RunFolderError: see `Run`.
    """
    sampler = sampler or SamplerConfig.from_dict(task.sampler_for(policy))
    _require_chance(sampler, seeds, samples, draw)
    require(batch_size >= 1, f"batch_size={batch_size}: expected 1 or more")
    how = {"seeds": seeds, "samples": samples, "batch_size": batch_size}
    how |= {"rewards": rewards, "draw": draw}
    items = [row for row in rows for _ in range(samples)]
    places = [(seed, start) for seed in seeds for start in range(0, len(items), batch_size)]
    judge = Judge(policy, items, sampler, rewards, task.metric, draw, task.watch)
    with ExitStack() as stack:
        run = None
        if output_dir is not None:
            identity = evaluation_identity(policy, task, rows, sampler, **how)
            since = {"sampler": SamplerConfig().to_dict()}
            run = stack.enter_context(Run(output_dir, identity, since, device=policy.device))
        batches, examples = _kept(run) if run else ([], [])
        shown = progress and len(batches) < len(places)
        size, unit = len(items) * len(seeds), "completion"
        bar = stack.enter_context(Progress(task.name, len(examples), size, shown, unit))
        for number, (seed, start) in enumerate(places[len(batches) :], len(batches)):
            log = RewardLog()
            batch = judge(start, batch_size, seed, log)
            made = _examples(batch, task, rows, number, seed, start, samples)
            monitors = {"batch": number, "rows": len(made)}
            monitors |= {"monitors": log.beside(batch.monitors)}
            if run:
                for example in made:
                    run.log(example, "examples")
                run.log(monitors)  # last: without it the batch is drawn again
            examples += made
            batches.append(monitors)
            bar.update(len(examples), {"accuracy": _mean(row["score"] for row in examples)})
    frame = pd.DataFrame(examples)
    numbers = [name for name in frame if name == "score" or name.startswith("reward")]
    frame = frame.astype(dict.fromkeys(numbers, float))
    return Evaluation(frame, _averages(frame, batches, task.metric is not None))


def _kept(run: Run) -> tuple[list[dict], list[dict]]:
    """What a run has of its first batches, up to one of which a row is lost, and their examples;
    what stands behind is dropped, to be drawn again."""
    batches, examples = run.logged(by="batch"), run.logged("examples", by="batch")
    made = Counter(example["batch"] for example in examples)
    whole = [(row["batch"], row.get("rows")) == (i, made[i]) for i, row in enumerate(batches)]
    count = [*whole, False].index(False)
    run.rewind(count, by="batch")
    return batches[:count], [example for example in examples if example["batch"] < count]


def evaluation_identity(
    policy: Policy,
    task: Task,
    rows: Sequence[dict],
    sampler: SamplerConfig,
    seeds: Sequence[int] = (0,),
    samples: int = 1,
    rewards: Sequence[Callable] = (),
    draw: Callable = generate,
    batch_size: int = 64,
) -> dict:
    """All that decides the results of `evaluate_examples`, in values that JSON can hold."""
    judging = {"metric": task.metric, "extract": task.extract, "watch": task.watch}
    return {
        "algorithm": ALGORITHM,
        "policy": policy.fingerprint() | {"family": named(type(policy))},
        "device": policy.device.type,
        "task": {"name": task.name, "rows": known(list(rows)), **known(judging)},
        "sampler": sampler.to_dict(),
        "rewards": [known(reward) for reward in rewards],
        "draw": known(draw),
        **{"seeds": list(seeds), "samples": samples, "batch_size": batch_size},
    }


def prompt_hash(row: Mapping) -> str:
    """16 hexadecimal digits of a row's prompt and of `SCORED`; where it has none of these, of all
    its columns but the reference solution `completion`."""
    named = SCORED & row.keys() or row.keys() - {"completion"}
    asked = {name: row[name] for name in (named | {"prompt"}) & row.keys()}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def summary(examples: pd.DataFrame, ks: Sequence[int] = ()) -> dict:
    """What the scores of `examples` come to.

    `n` items of which each has one or more completions that were judged, `accuracy`, the mean over
    items of the share that is right, and its 95 % `interval` (`clustered_interval`, which is
    Wilson's where an item has one completion); `left_out`, how many completions were not judged;
    the accuracy `by_seed` where there are several; and where `ks` are given `pass@k`, each with its
    interval over items. Without a judged completion accuracy and interval are None.

    Raises:
        InputError: a k that is larger than the number of completions of an item.
    """
    judged = examples.dropna(subset="score")
    items = judged.groupby("index").score.agg(["sum", "size"])
    found: dict = {"accuracy": None, "interval": None, "n": len(items)}
    if len(items):
        each = int(items["size"].max())
        share = clustered_interval(items["sum"] / items["size"], each)
        found |= {"accuracy": share.estimate, "interval": [share.low, share.high]}
    found |= {"completions": len(judged), "left_out": len(examples) - len(judged)}
    seeds = sorted(set(examples.seed)) if "seed" in examples else []
    found["seeds"] = seeds
    if len(seeds) > 1:
        means = judged.groupby("seed").score.mean()
        found["by_seed"] = {str(seed): float(mean) for seed, mean in means.items()}
    if ks:
        found["pass@k"] = {str(k): _passing(items, k) for k in ks}
    return found


def _passing(items: pd.DataFrame, k: int) -> dict:
    each = int(items["size"].min()) if len(items) else 0
    require(1 <= k <= each, f"k={k}: expected 1 to {each}, the completions of a prompt")
    chances = [pass_at_k(int(n), int(right), k) for n, right in items[["size", "sum"]].to_numpy()]
    share = clustered_interval(chances, each // k)  # so many disjoint sets of k
    return {"estimate": share.estimate, "interval": [share.low, share.high]}


def _require_chance(sampler: SamplerConfig, seeds: Sequence[int], samples: int, draw) -> None:
    require(samples >= 1, f"samples={samples}: expected 1 or more")
    require(len(seeds) > 0, "no seeds: expected one or more, as in seeds=[0]")
    require(len(set(seeds)) == len(seeds), f"seeds={list(seeds)}: expected each once")
    same = "at temperature=0 the completions of a prompt are all the same: set a temperature"
    require(samples == 1 or sampler.temperature > 0, f"samples={samples}: {same}")
    # A rule or a sampler of one's own may draw at random where tokens are not drawn.
    may_vary = sampler.temperature > 0 or sampler.order_temperature > 0 or draw is not generate
    may_vary |= sampler.remasking == "random" or callable(sampler.remasking)
    require(len(seeds) == 1 or may_vary, f"seeds={list(seeds)}: {same}, or give one seed")


def _examples(
    batch: Batch, task: Task, rows: Sequence[dict], number: int, seed: int, start: int, samples: int
) -> list[dict]:
    texts, size = batch.output.completions, len(batch.rows)
    columns = {name.removesuffix("/mean"): x.tolist() for name, x in batch.columns.items()}
    scores = columns.pop("accuracy", [math.nan] * size)
    cost = {
        "seconds": batch.seconds / size,
        "nfe": batch.output.nfe,
        "positions": batch.output.token_forwards / size,
    }
    return [
        {
            "batch": number,
            "index": (start + i) // samples,
            "seed": seed,
            "sample": (start + i) % samples,
            "prompt_hash": prompt_hash(rows[(start + i) // samples]),
            "completion": texts[i],
            "extracted": task.extract(texts[i]) if task.extract else None,
            "score": None if math.isnan(scores[i]) else int(scores[i]),
            **{name: values[i] for name, values in columns.items()},
            **cost,
        }
        for i in range(size)
    ]


def _averages(frame: pd.DataFrame, batches: Sequence[dict], judged: bool) -> dict:
    of: dict[str, list[Mean]] = defaultdict(list)
    for batch in batches:
        for name, value in batch["monitors"].items():
            of[name] += [] if value is None else [(value, batch["rows"])]
    averages = {name: average(means) for name, means in of.items()}
    for name in frame:
        if name == "reward" or name.startswith("rewards/"):
            averages[name + "/mean" * (name != "reward")] = _mean(frame[name])
    return averages | ({"accuracy": _mean(frame.score)} if judged else {})


def _mean(values) -> float | None:
    counting = [x for x in values if x is not None and not math.isnan(x)]
    return sum(counting) / len(counting) if counting else None
