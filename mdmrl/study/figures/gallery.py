"""The page of all figures, `figures/README.md`."""

from pathlib import Path

from mdmrl.study import ledger
from mdmrl.study.figures import FIGURES

HEAD = """# Figures

What is seen, and what draws it. Each figure is drawn from tables in [data](data) alone: `make
figures` redraws all of them, without a model, and writes this page. Numbers in its sentences are
filled from the [ledger](../docs/results.md#claims) and from the tables; intervals are 95 %. Beside
each figure lie its PDF and, in its JSON, where it comes from."""


def gallery(folder: Path) -> str:
    """The page: each figure of `folder` with what it says, and the commands that draw it and that
    make its data; then the names of those that no full run has made yet."""
    claims = {claim.id: claim for claim in ledger.load(folder / "claims.json")}
    by_notebook: dict[str, list[str]] = {}
    for name in FIGURES:
        by_notebook.setdefault(FIGURES[name].notebook, []).append(name)
    parts, missing = [HEAD], []
    for notebook, names in sorted(by_notebook.items()):
        drawn = [name for name in names if (folder / f"{name}.png").exists()]
        missing += [f"`{name}` ({ledger.link(notebook)})" for name in names if name not in drawn]
        if drawn:
            command = f"mdmrl reproduce --profile full --only {notebook}"
            parts.append(f"## {notebook}\n\n{ledger.link(notebook)}; data: `{command}`")
        for name in drawn:
            of = FIGURES[name]
            tables = [f"[{table}](data/{table}.csv)" for table in of.tables]
            source = f", from {', '.join(tables)}" if tables else ""
            drawing = f"`python -m mdmrl.study.figures {name}`{source}"
            shown = f"![{name}]({name}.png)\n\n{of.finding(folder, claims)}"
            parts.append(f"### {name}\n\n{shown}\n\n{drawing}")
    if missing:
        said = "No full run has made the data of these yet"
        parts.append(f"## Not drawn yet\n\n{said}: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def pictures(folder: Path) -> dict[int, str]:
    """Of each row of claims that is judged the figure of `folder` that shows its evidence."""
    drawn = [name for name in FIGURES if (folder / f"{name}.png").exists()]
    return {row: name for name in reversed(drawn) for row in FIGURES[name].rows}
