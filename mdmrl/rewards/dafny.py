"""Dafny's verifier as a judge of programs.

The policy is given a specification, functions and the head of one method, and writes the method's
body, or a whole program that has the specification word for word and lemmas or functions of its
own beside it. What the verifier would believe without proof is refused before it runs: `assume` and
its like, attributes such as `{:verify false}`, lemmas, methods, functions and loops without a body,
`decreases *`, `requires false`, and another specification. So are literals of strings and
characters, by which the reading here could differ from Dafny's; comments are taken out of what is
verified.

Dafny is the current one (`dafny verify`) or Debian's 2.3 (`dafny /compile:0`), whichever is there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from mdmrl.config import require
from mdmrl.rewards.answers import column, written
from mdmrl.rewards.text import fenced

LIMIT = 60.0  # seconds for a program, of which it needs 2 on a machine that does nothing else
RESOURCES = 1_000_000  # of Z3's for a proof, some seconds; unlike them the same under load
LONGEST = 2**14  # characters of a program
CACHED = 2**14  # verdicts
GRADES = {
    "verified": 1.0,
    "unproved": -0.3,
    "timeout": -0.6,
    "invalid": -1.0,  # it does not parse, or its names and types do not fit
    "refused": -1.0,
    "infra_error": None,
}
INSTALL = (
    "Dafny is not installed: apt install dafny (Debian, Ubuntu), brew install dafny, or dotnet "
    "tool install --global dafny; it must be on the PATH"
)


@dataclass(frozen=True)
class DafnyError:
    """What Dafny says of a line, counted from 1; `kind` is "parse", "resolution/type" or what could
    not be proved, such as "postcondition"."""

    line: int
    kind: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """The outcome, one of `GRADES`, with the verifier's errors or another reason as `detail`;
    `program` is what was verified, or would have been."""

    outcome: str
    errors: tuple[DafnyError, ...] = ()
    detail: str = ""
    program: str = ""

    @property
    def grade(self) -> float | None:
        """The reward; None where the verifier itself failed."""
        return GRADES[self.outcome]


# ------------------------------------------------------------------ what is refused

_TOKEN = re.compile(
    r"[A-Za-z_][\w'?]*|\d\w*|<==>|==>|<==|->|=>|::|:=|:\||==|!=|<=|>=|&&|\|\||\.\."
    r"|[-+*/%<>=!?&|^.,:;()\[\]{}]",
    re.ASCII,
)
_tokens = _TOKEN.findall
_FORBIDDEN = {
    r"\bassume\b": "assume",
    r"\bexpect\b": "expect, which is assumed",
    r"\{ :": "an attribute {: }",
    r"\bdecreases \*": "decreases *",
    r"\brequires (?:\( )*false\b": "requires false",
    r"\.\. \.": "a skeleton statement ...",
    r"\b(?:include|refines|witness)\b": "include, refines or witness",
}
_HELPERS = {"function", "predicate", "lemma", "method"}
_DECLARATION = re.compile(
    r"function|predicate|lemma|method|co(?:lemma|method|predicate)|constructor|iterator|class|trait"
    r"|(?:co)?datatype|(?:new)?type|module|import|export|const|static|abstract|inductive|twostate"
)
_BODIED = _HELPERS | {"colemma", "comethod", "copredicate", "constructor", "iterator"}
_CLAUSES = {"requires", "ensures", "reads", "modifies", "decreases"}
_NO_HEAD = {";", "}", ":=", ":|", "match", "calc", "by"}  # of a statement in an expression
_OPEN_SET = {"in", "then", "else", "multiset", "iset", "!", "==", "!=", "<", "<=", ">=", "+", "-"}
_OPEN_SET |= {"&&", "||", "==>", "<==", "<==>"} | _CLAUSES


def assemble(completion: str | list[dict], specification: str | None = None) -> tuple[str, str]:
    """The program that a completion makes, without comments, and the reason to refuse it, "" where
    there is none.

    Args:
        completion: a program, or the body of the specification's method with or without its
            braces; in a chat's answer the last block with a statement or a brace in it.
        specification: functions and the head of the method, which the program must contain as they
            stand; None for a program that brings its own.
    """
    found = fenced(written(completion), ("", "dafny", "dfy"))
    text = [*found[:1], *(block for block in found if re.search("[{;]", block))][-1].strip()
    if len(text) > LONGEST:
        return "", f"{len(text)} characters, of at most {LONGEST}"
    program = _without_comments(text)
    if specification is not None and not any(map(_DECLARATION.fullmatch, _tokens(program))):
        body = program.strip()
        whole = body[:1] == "{" and _closing(_tokens(body), 0) == len(_tokens(body)) - 1
        program = specification.rstrip() + (f"\n{body}\n" if whole else f"\n{{\n{body}\n}}\n")
    return program, _cheat(program, specification) or ""


def _cheat(program: str, specification: str | None) -> str | None:
    """Why a program without comments is refused."""
    if left := _TOKEN.sub("", program).split():
        return f"the characters {left[0]:.20}"
    tokens = _tokens(program)
    for pattern, reason in _FORBIDDEN.items():
        if re.search(pattern, " ".join(tokens)):
            return reason
    for place, token in enumerate(tokens):
        if token in _BODIED and not _has_body(tokens, place):
            return f"{token} {' '.join(tokens[place + 1 : place + 2])} without a body"
    if specification is None:
        return None
    wanted = _tokens(_without_comments(specification))
    for start in range(len(tokens)):
        end = start + len(wanted)
        alone = tokens[start - 1 : start] in ([], ["}"]) and tokens[end : end + 1] == ["{"]
        if not alone or tokens[start:end] != wanted:
            continue
        own = [*tokens[:start], ";", *tokens[end:]]  # helpers, under names of their own
        for token, name in itertools.pairwise(own):
            if token not in _HELPERS and _DECLARATION.fullmatch(token):
                return f"{token}, which is no function, lemma or method"
            if token in _HELPERS and name in wanted and name not in _HELPERS:
                return f"{name} declared anew"
        return None
    return "another specification"


def _has_body(tokens: Sequence[str], start: int) -> bool:
    """Whether the declaration whose keyword is at `start` has a body: a block where its head cannot
    go on, so that it is no set in a clause. In doubt, as behind > or *, it has none."""
    place = start + 1
    place += tokens[start] in ("function", "predicate") and tokens[place : place + 1] == ["method"]
    while place < len(tokens) and (tokens[place] != "{" or tokens[place - 1] in _OPEN_SET):
        if tokens[place] in _NO_HEAD or _DECLARATION.fullmatch(tokens[place]):
            return False
        place = 1 + (_closing(tokens, place) if tokens[place] in "([{" else place)
    head = tokens[start:place]
    anything = head[-1] == "*" and head[-2] in _CLAUSES
    of_type = head[-1] == ">" and not _CLAUSES & set(head)
    return place < len(tokens) and bool(anything or of_type or re.match(r"[\w)\]}]", head[-1]))


def _closing(tokens: Sequence[str], start: int) -> int:
    """Where the bracket at `start` is closed; the end where it is not."""
    changes = ((token in "([{") - (token in ")]}") for token in tokens[start:])
    depths = enumerate(itertools.accumulate(changes), start)
    return next((place for place, depth in depths if depth == 0), len(tokens))


def _without_comments(text: str) -> str:
    """`text` with a space for each comment, its lines kept; block comments nest, as Dafny's do."""
    kept, depth, line = [], 0, False
    for part in re.split(r"(//|/\*|\*/|\n)", text):
        if part == "\n":
            line = False
            kept.append(part)
        elif line or (part == "//" and not depth):
            line = True
        elif part == "/*" or (part == "*/" and depth):
            depth += 1 if part == "/*" else -1
            kept.append(" ")
        elif not depth:
            kept.append(part)
    return "".join(kept)


# ------------------------------------------------------------------ the verifier

_ERROR = re.compile(
    r"^[^\n(]*\((\d+),\d+\): (?:((?:Error|(?:Timed out|Out of resource) on)(?: BP\d+)?: )|"
    r"(Related (?:location|message): ))(.*)$",
    re.MULTILINE,
)
_KIND = re.compile(
    "postcondition|precondition|invariant|assertion|termination|decreases|index|division|modifies"
)

_running: set[subprocess.Popen] = set()


def verify(program: str, limit: float = LIMIT) -> Verdict:
    """The verifier's verdict on a program as it stands, kept by its text; nothing is refused here.

    A program is stopped after `limit` seconds with all the processes that it started.

    Raises:
        InputError: Dafny is not installed.
    """
    command = _command()
    require(limit > 0, f"limit={limit}: expected seconds")
    try:
        return _verified(program, limit, command)
    except OSError as error:
        return Verdict("infra_error", detail=str(error), program=program)


def judge(
    completions: Sequence, specifications: Sequence[str | None], limit: float = LIMIT
) -> list[Verdict]:
    """The verdict on each completion with its specification (see `assemble`); as many programs at
    a time as there are processors, each different one once."""
    made = [assemble(*pair) for pair in zip(completions, specifications, strict=True)]
    programs = dict.fromkeys(program for program, reason in made if not reason)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            found = pool.map(lambda program: verify(program, limit), programs)
            verdicts = dict(zip(programs, found, strict=True))
        except BaseException:  # an interrupt, which those that run have not got
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(_running):
                _end(process)
            raise
    return [
        Verdict("refused", detail=reason, program=program) if reason else verdicts[program]
        for program, reason in made
    ]


@cache
def _command() -> tuple[str, ...]:
    """The command line before the file, with its limit for one proof."""
    found = shutil.which("dafny")
    require(found is not None, INSTALL)
    # The older one knows no --version, and says so.
    asked = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=120)
    if re.match(r"(\d+)\.", asked.stdout.strip()):
        return found, "verify", f"--verification-time-limit={LIMIT // 2:.0f}"
    return found, "/compile:0", "/nologo", f"/rlimit:{RESOURCES}"


def _end(process: subprocess.Popen) -> None:
    """End Dafny and the prover, a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@lru_cache(CACHED)
def _verified(program: str, limit: float, command: tuple[str, ...]) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.dfy"
        file.write_text(program, "utf-8")
        process = subprocess.Popen(
            [*command, file.name],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process)
        try:
            output = process.communicate(timeout=limit)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            return Verdict("timeout", detail=f"stopped after {limit:g} s", program=program)
        finally:
            _end(process)
            process.communicate()
            _running.discard(process)
    errors = _errors(output)
    if process.returncode == 0 and (proved := re.search(r"(\d+) verified, 0 errors\s*$", output)):
        bare = "has no body" in output  # its warning of what it believed
        reason = "nothing to verify" if proved[1] == "0" else "no body" * bare
        return Verdict("refused" if reason else "verified", detail=reason, program=program)
    if not errors:
        raise OSError(f"dafny ended with {process.returncode}: {output[-500:]}")
    late = all(error.kind == "timeout" for error in errors)
    outcome = "invalid" if process.returncode == 2 else "timeout" if late else "unproved"
    return Verdict(outcome, errors, program=program)


def _errors(output: str) -> tuple[DafnyError, ...]:
    """The errors in what Dafny prints, each with the places that it relates to."""
    found: list[DafnyError] = []
    early = re.search("(parse|resolution/type) errors? detected", output)
    for line, error, related, message in _ERROR.findall(output):
        if related and found:
            said = f"{found[-1].message} [line {line}: {message}]"
            found[-1] = replace(found[-1], message=said)
        elif error:
            word = _KIND.search(message)
            kind = "timeout" if error.startswith(("Timed", "Out")) else word[0] if word else "other"
            found.append(DafnyError(int(line), early[1] if early else kind, message))
    return tuple(dict.fromkeys(found))


# ------------------------------------------------------------------ reward and feedback


def dafny_reward(
    prompts, completions, completion_ids=None, specification=None, log_metric=None, **columns
) -> list[float | None]:
    """The grade of each completion (`GRADES`), its specification in the column of that name."""
    wanted = column("dafny_reward", "specification", specification, completions)
    verdicts = judge(completions, wanted)
    if log_metric is not None:
        for outcome in GRADES:
            share = sum(verdict.outcome == outcome for verdict in verdicts) / len(verdicts)
            log_metric(f"dafny/{outcome}", share)
    return [verdict.grade for verdict in verdicts]


def feedback(prompt: str, verdict: Verdict) -> str:
    """The next round's prompt: what was asked, what was written, and what the verifier said."""
    said = "\n".join(f"line {e.line}, {e.kind}: {e.message}" for e in verdict.errors)
    said = said or f"{verdict.outcome}: {verdict.detail}"
    parts = (prompt, verdict.program.strip(), f"Dafny says:\n{said}", "Correct the program.")
    return "\n\n".join(parts)


def repair(
    write: Callable[[str], str], prompt: str, specification: str | None = None, rounds: int = 3
) -> list[Verdict]:
    """The verdicts on what `write(prompt)` gives, round by round, each prompt the feedback on the
    round before, until one is verified."""
    require(rounds >= 1, f"rounds={rounds}: expected 1 or more")
    verdicts: list[Verdict] = []
    while len(verdicts) < rounds and not (verdicts and verdicts[-1].outcome == "verified"):
        asked = feedback(prompt, verdicts[-1]) if verdicts else prompt
        verdicts += judge([write(asked)], [specification])
    return verdicts
