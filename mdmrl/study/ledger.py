"""The claims ledger: what the thesis says, what was measured here, and the verdict.

The lines of `mdmrl.study.verdicts.ROWS` are judged; what else is measured has no verdict; errata
are a list of their own.
"""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mdmrl.config import Config, InputError, require, unknown
from mdmrl.evaluation.stats import holm
from mdmrl.evaluation.tables import markdown_table
from mdmrl.runs import write_atomically
from mdmrl.study.verdicts import ROWS, Row, row_of
from mdmrl.study.verdicts.rules import LEVEL

JUDGED = ("reproduced", "contradicted", "inconclusive")
VERDICTS = (*JUDGED, "measured", "erratum")
COLUMNS = ("What", "Thesis", "Measured here", "Seeds", "Notebook")
JUDGED_COLUMNS = ("Figure", "Claim", "Verdict", "Measured here")


@dataclass(kw_only=True)
class Claim(Config):
    """One entry of the ledger.

    Args:
        id: names the entry; recording it again replaces it.
        says, where: what the thesis says, or what was measured, and where ("Fig. 4-1").
        measured: what was measured here, in words.
        estimate, low, high: the number and its 95 % interval, in `unit`; None where there is none.
        seeds: training runs behind the number; 0 for exact arithmetic.
        verdict: one of `VERDICTS`: from the rule of a line that is judged, else "measured" or
            "erratum". That of a line marked `trained` follows from `p_holm`.
        row, line: of `mdmrl.study.verdicts.ROWS`; None and empty where nothing is judged.
        p, p_holm: by the rule, and corrected; `settled` fills in the second.
        conditional: it holds for the shipped checkpoints only.
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
    row: int | None = None
    line: str = ""
    p: float | None = None
    p_holm: float | None = None
    conditional: bool = False
    notebook: str = ""
    profile: str = ""

    def validate(self) -> None:
        require(bool(self.id), "a claim's id is empty: name it, as in 'fig_4_1_ar'")
        if self.verdict not in VERDICTS:
            raise unknown(f"verdict of claim {self.id}", self.verdict, VERDICTS)
        judged = self.verdict in JUDGED
        require(
            judged == (self.row is not None) == bool(self.line),
            f"claim {self.id}: verdict={self.verdict!r} with row={self.row}, line={self.line!r}: "
            "expected a row and a line where, and only where, a claim is judged",
        )
        if judged:
            row_of(self.row).require_line(self.line)
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

    def _repr_html_(self) -> str:
        said = html.escape(f"{self.verdict}: {self.says} ({self.where})")
        return f"<b>{said}</b><br>{html.escape(sentence(self))}"


def slug(name: str) -> str:
    """A name as part of an id: "MDM one_step, 16 steps" -> "mdm_one_step_16_steps"."""
    return re.sub(r"\W+", "_", name.lower())


def settled(claims: Iterable[Claim]) -> list[Claim]:
    """The claims with the verdicts of trained lines settled by Holm's correction over all that are
    declared, of which one that is not among the claims has p = 1.

    A rule's p is below 0.05 if and only if its own conditions hold, so that `p_holm` decides.
    """
    claims = list(claims)
    lines = [(row.number, line) for row in ROWS if row.trained for line in row.lines]
    known = {(claim.row, claim.line): claim.p for claim in claims if claim.p is not None}
    corrected = holm([known.get(line, 1.0) for line in lines]).tolist()
    of = dict(zip(lines, corrected, strict=True))

    def settle(claim: Claim) -> Claim:
        p = of.get((claim.row, claim.line))
        if p is None:
            return claim
        missed = "inconclusive" if claim.verdict == "reproduced" else claim.verdict
        return claim.replace(p_holm=p, verdict="reproduced" if p < LEVEL else missed)

    return [settle(claim) for claim in claims]


def record(claim: Claim, folder: str | Path) -> Path:
    """Add the claim to `folder/claims.json`, or replace it, and settle all verdicts anew; safe
    beside other writers."""
    path = Path(folder) / "claims.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".claims.lock")):
        known = {other.id: other for other in load(path)} | {claim.id: claim}
        entries = settled(known[id] for id in sorted(known))
        text = json.dumps([entry.to_dict() for entry in entries], indent=1)
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


def numbers(claim: Claim) -> str:
    """The number and its interval: "0.41 [0.32, 0.5]"; what was measured, where it is none."""
    if claim.estimate is None:
        return claim.measured
    ends = "" if claim.low is None else f" [{_number(claim.low)}, {_number(claim.high)}]"
    return f"{_number(claim.estimate)}{ends}"


def sentence(claim: Claim) -> str:
    """What was measured, in words, with the number and its interval."""
    if claim.estimate is None:
        return claim.measured
    found = numbers(claim)
    if claim.low is not None and found in claim.measured:  # a rule's sentence holds its interval
        return claim.measured
    return f"{claim.measured}: {found} {claim.unit}".rstrip()


def render(
    claims: Iterable[Claim], pictures: Mapping[int, str] | None = None, whole: bool = True
) -> str:
    """The claims as Markdown for a page beside `figures/`, without a newline at its end: a line a
    row that is judged, with the figure of `pictures` that shows its evidence; then errata, then
    what was measured beyond them. With `whole`, rows that nobody has judged yet too."""
    claims = settled(claims)
    parts = {}
    lines = [_judged(row, claims, pictures or {}, whole) for row in ROWS]
    if any(lines):
        parts["### Judged"] = markdown_table(JUDGED_COLUMNS, filter(None, lines))
    for verdict, heading in {"erratum": "### Errata", "measured": "### Measured"}.items():
        own = [claim for claim in claims if claim.verdict == verdict]
        cells = [
            (one.says, one.where, sentence(one), str(one.seeds or "-"), link(one.notebook))
            for one in sorted(own, key=lambda claim: claim.notebook)
        ]
        if cells or whole:
            parts[heading] = markdown_table(COLUMNS, cells) if cells else "None yet."
    return "\n\n".join(f"{heading}\n\n{body}" for heading, body in parts.items())


def _judged(
    row: Row, claims: Iterable[Claim], pictures: Mapping[int, str], whole: bool
) -> tuple[str, ...]:
    """The cells of a row: its picture, what it claims, how many of its lines came out how, and each
    line with its verdict, number and interval; none where there is nothing to say."""
    of = {claim.line: claim for claim in claims if claim.row == row.number}
    if not (of or whole):
        return ()
    shown, said = "", []
    if name := pictures.get(row.number):
        path = f"../figures/{name}.png"
        shown = f'<a href="{path}"><img src="{path}" width="160" alt="{name}"></a>'
    for claim in (of[line] for line in row.lines if line in of):
        ps = " / ".join(f"{p:.2g}" for p in (claim.p, claim.p_holm) if p is not None)
        facts = [f"p {ps}"] * bool(ps) + ["conditional on these checkpoints"] * claim.conditional
        text = f"**{claim.line}: {claim.verdict}.** {sentence(claim)}"
        said.append(f"{text} ({', '.join(facts)})" if facts else text)
    said += [link(name) for name in dict.fromkeys(claim.notebook for claim in of.values())]
    missing = [line for line in row.lines if line not in of]
    if missing and whole:
        said.append(f"Not judged yet: {'; '.join(missing)}")
    counts = Counter(claim.verdict for claim in of.values())
    verdict = ", ".join(f"{counts[name]} {name}" for name in JUDGED if counts[name])
    claim = f"**{row.number}{' T' if row.trained else ''}.** {row.says} ({row.where})"
    return shown, claim, verdict or "not judged yet", "<br>".join(said)


def link(notebook: str) -> str:
    """A link to a notebook from a page in `docs/` or `figures/`."""
    return f"[{notebook}](../notebooks/{notebook}.ipynb)"


def fill_claims(
    page: Path, claims_path: str | Path, pictures: Mapping[int, str] | None = None
) -> None:
    """Put the `full` profile's claims into the page's section `claims`."""
    claims = [claim for claim in load(claims_path) if claim.profile == "full"]
    none = "No `full` run has been recorded yet."
    fill_section(page, "claims", render(claims, pictures) if claims else none)


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
