"""The claims ledger: what the thesis says, what was measured here, and the verdict."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mdmrl.config import Config, InputError, require, unknown
from mdmrl.runs import write_atomically

VERDICTS = ("reproduced", "contradicted", "inconclusive", "erratum")
COLUMNS = ("Claim", "Thesis", "Measured here", "Seeds", "Verdict", "Notebook")


@dataclass(kw_only=True)
class Claim(Config):
    """One row of the ledger.

    Args:
        id: names the row; recording it again replaces the row.
        says, where: what the thesis says, and where ("Fig. 4-1").
        measured: what was measured here, in words.
        estimate, low, high: the number and its 95 % interval, in `unit`; None where there is none.
        seeds: training runs behind the number; 0 for exact arithmetic.
        verdict: one of `VERDICTS`, from a rule, most of them in `mdmrl.study.verdicts`.
        conditional: the verdict holds for the shipped checkpoints only.
        notebook, profile: what recorded it; `Outputs.claim` fills them in.
    """

    id: str
    says: str
    where: str
    measured: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    unit: str = ""
    verdict: str
    conditional: bool = False
    notebook: str = ""
    profile: str = ""

    def validate(self) -> None:
        require(bool(self.id), "a claim's id is empty: name the row, as in 'fig_4_1_ar'")
        if self.verdict not in VERDICTS:
            raise unknown(f"verdict of claim {self.id}", self.verdict, VERDICTS)
        require(self.seeds >= 0, f"claim {self.id}: seeds={self.seeds}: expected 0 or more")
        numbers = {name: getattr(self, name) for name in ("estimate", "low", "high")}
        for name, value in numbers.items():
            require(
                value is None or math.isfinite(value),
                f"claim {self.id}: {name}={value}: expected a finite number; "
                "give None and say in `measured` what happened",
            )
        none = self.low is None and self.high is None
        said = ", ".join(f"{name}={value}" for name, value in numbers.items())
        require(
            none or (None not in numbers.values() and self.low <= self.high),
            f"claim {self.id}: {said}: an interval needs an estimate and both ends in order",
        )


def slug(name: str) -> str:
    """A name as part of an id: "MDM one_step, 16 steps" -> "mdm_one_step_16_steps"."""
    return re.sub(r"\W+", "_", name.lower())


def record(claim: Claim, folder: str | Path) -> Path:
    """Add the claim to `folder/claims.json`, or replace its row; safe beside other writers."""
    path = Path(folder) / "claims.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".claims.lock")):
        rows = {row.id: row for row in load(path)} | {claim.id: claim}
        text = json.dumps([rows[id].to_dict() for id in sorted(rows)], indent=1)
        write_atomically(path, text + "\n")
    return path


def load(path: str | Path) -> list[Claim]:
    """The claims of a ledger file, sorted by id; none if there is no file yet."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        return [Claim.from_dict(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path.name} is no claims ledger ({error}): delete it and run the notebooks again"
        ) from error


def cells(claim: Claim) -> tuple[str, ...]:
    """The claim as plain text, one entry for each of `COLUMNS`."""
    measured = claim.measured
    if claim.estimate is not None:
        number, ends = _number(claim.estimate), ""
        if claim.low is not None:
            ends = f" [{_number(claim.low)}, {_number(claim.high)}]"
        if not ends or number + ends not in measured:  # a verdict's sentence holds its interval
            measured += f": {number}{ends} {claim.unit}".rstrip()
    verdict = claim.verdict + ", conditional on these checkpoints" * claim.conditional
    return claim.says, claim.where, measured, str(claim.seeds or "-"), verdict, claim.notebook


def render(claims: Iterable[Claim]) -> str:
    """The claims as a Markdown table for a page of `docs/`, without a newline at its end."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for claim in claims:
        *texts, notebook = (" ".join(c.split()).replace("|", r"\|") for c in cells(claim))
        lines.append((*texts, f"[{notebook}](../notebooks/{notebook}.ipynb)"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill_claims(page: Path, claims_path: str | Path) -> None:
    """Put the `full` profile's claims into the page's section `claims`."""
    claims = [claim for claim in load(claims_path) if claim.profile == "full"]
    none = "No `full` run has been recorded yet."
    fill_section(page, "claims", render(claims) if claims else none)


def fill_section(page: Path, name: str, body: str) -> None:
    """Replace what stands between the lines `<!-- name:start -->` and `<!-- name:end -->`, each of
    which a page must have once."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    require(
        text.count(start) == text.count(end) == 1 and text.index(start) < text.index(end),
        f"{page.parent.name}/{page.name} has no place for the {name}: "
        f"it needs one line {start} and, below it, one line {end}",
    )
    before, after = text[: text.index(start)], text[text.index(end) :]
    write_atomically(page, f"{before}{start}\n\n{body}\n\n{after}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
