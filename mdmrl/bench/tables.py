"""The tables of `docs/bench.md`, from what `mdmrl bench` wrote to a folder."""

import json
from pathlib import Path

from mdmrl.evaluation.tables import markdown_table

# By section: which files, and each column with its cell.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "bench": (
        "bench_samplers*.json",
        {
            "policy": "{policy}",
            "sampler": "{sampler}",
            "batch": "{batch}",
            "tokens": "{length}",
            "steps": "{steps}",
            "positions computed": "{token_forwards:,}",
            "samples/s": "{samples_per_second:.3g}",
            "speed-up": "{speedup:.2f}",
            "same tokens": "{agreement:.1%}",
            "machine": "{machine}, {threads} threads",
        },
    ),
    "updates": (
        "bench_update_*.json",
        {
            "policy": "{policy}",
            "trainer": "{way}",
            "tokens": "{length}",
            "seconds": "{seconds:.3g}",
            "times ours": "{seconds_ratio:.2f}",
            "memory at its peak, GB": "{gigabytes:.3g}",
            "times our memory": "{memory_ratio:.2f}",
            "machine": "{machine}, {threads} threads",
        },
    ),
    "judge": (
        "bench_judge*.json",
        {
            "box": "{way}",
            "programs/s": "{per_second:.3g}",
            "programs": "{programs}",
            "machine": "{machine}, {threads} threads",
        },
    ),
}


def bench_tables(folder: Path) -> dict[str, str]:
    """The table of each section of the page that `folder` has numbers for."""
    tables = {}
    for section, (files, columns) in TABLES.items():
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(files))]
        rows = [numbers | row for numbers in found for row in _rows(numbers["rows"])]
        if rows:
            cells = [[cell.format(**row) for cell in columns.values()] for row in rows]
            tables[section] = markdown_table(tuple(columns), cells)
    return tables


def _rows(rows: list[dict] | dict[str, dict]) -> list[dict]:
    """Rows that a dictionary names have their name as `way`, and memory in GB."""
    if isinstance(rows, dict):
        named = [row | {"way": name} for name, row in rows.items()]
        return [row | {"gigabytes": row["memory"] / 1e9} for row in named]
    return rows
