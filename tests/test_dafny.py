"""Dafny: what is refused, how the verifier is run and read, and the task's programs under it."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mdmrl.config import InputError
from mdmrl.rewards import dafny
from mdmrl.rewards.dafny import assemble, dafny_reward, feedback, judge, repair, verify
from mdmrl.tasks import dafny as task_of_dafny
from mdmrl.tasks import load_task

HEAD = "method Abs(x: int) returns (r: int)\n  ensures r >= 0 && (r == x || r == -x)"
RIGHT = "if x < 0 { r := -x; } else { r := x; }"
SUM = """function F(n: nat): int { if n == 0 then 0 else F(n - 1) + n }
method M(n: nat) returns (r: int)
  ensures r == F(n)"""
LOOP = """r := 0;
var i := 0;
while i < n
  invariant 0 <= i <= n && r == F(i)
{ i := i + 1; r := r + i; }"""
installed = pytest.mark.skipif(shutil.which("dafny") is None, reason="Dafny is not installed")

CHEATS = {
    "assume": "assume false;",
    "assume (": "assume(r >= 0);",
    "expect": "expect false;",
    "attribute": "assert {:split_here} true;",
    "attribute apart": "{ /* */:verify false} r := x;",
    "decreases *": "while true\n  decreases /* any */ *\n{ }",
    "skeleton": "...; r := x;",
    "string": 'var s := "/*"; assume false; var t := "*/";',
    "character": "var c := '\"'; assume false; var d := '\"';",
    "preprocessor": "#if X\nr := x;\n#endif",
    "hidden by a comment's end": "/* /* */ // */\nassume false;",
    "method closed": "r := x; }\nmethod B() { ",
    "bodiless lemma": HEAD + "{ L(); }\nlemma L() ensures false",
    "bodiless, a set in its clause": HEAD + "{ L(); }\nlemma L() ensures false || 1 in {1}",
    "bodiless, a set compared": HEAD + "{ L(); }\nlemma L() ensures {} == {} && false && {1} > {1}",
    "bodiless, sets": HEAD
    + "{ L(); }\nlemma L() ensures {1} == {1} && {} != {2} - {3} ==> 1 in {}",
    "bodiless, a calculation": HEAD
    + "{ L(); }\nlemma L() ensures calc == { 0; 0; } {1} == {1} && false",
    "bodiless, a proof": HEAD + "{ L(); }\nlemma L() ensures assert 1 in {1} by { } {1} == {}",
    "bodiless, a match": HEAD + "{ L(); }\nlemma L() ensures match 0 { case _ => false }",
    "bodiless before another": HEAD + "{ L(); }\nlemma L() ensures false lemma N() { }",
    "bodiless method": HEAD + "{ L(); }\nmethod L() ensures false",
    "bodiless function": HEAD + "{ assert F(); }\npredicate F() ensures F() && false",
    "old semicolon": HEAD + "{ L(); }\nlemma L() ensures false;",
    "requires false": HEAD + "{ r := x; }\nlemma L() requires (false) { }",
    "verify false": HEAD + "{ L(); }\nlemma {:verify false} L() ensures false { }",
    "easier": HEAD.replace("r >= 0 && ", "") + "{ r := x; }",
    "a further requirement": HEAD.replace("\n", "\n  requires x > 0\n") + "{ r := x; }",
    "another requirement behind": HEAD + "\n  requires x >= 0\n{ r := x; }",
    "only in a comment": "// " + HEAD.replace("\n", " ") + "{ }\nmethod B() { }",
    "in a class": "class C { " + HEAD + "{ r := x; } }",
    "a type of the same name": HEAD + "{ r := x; }\ntype int = nat",
    "a module": "module A { }\n" + HEAD + "{ r := x; }",
    "include": 'include "/etc/passwd"\n' + HEAD + "{ r := x; }",
    "long": "r := x;" * 10_000,
    "long, a fence": "```" + " " * 100_000 + "`;",
}


@pytest.mark.parametrize("name", CHEATS)
def test_programs_that_cheat_are_refused_before_the_verifier_runs(monkeypatch, name):
    monkeypatch.setattr(dafny, "verify", None)
    (verdict,) = judge([CHEATS[name]], [HEAD])
    assert (verdict.outcome, verdict.grade) == ("refused", -1.0)
    assert verdict.detail


def test_a_function_of_the_specification_is_not_declared_anew():
    again = "function F(n: nat): int { 0 }\n"
    assert assemble(f"{SUM} {{ r := 0; }}\n{again}", SUM)[1] == "F declared anew"
    assert "declared anew" in assemble(f"{again}{SUM} {{ r := 0; }}", SUM)[1]
    assert assemble(f"{SUM} {{ r := 0; }}\n{again.replace('F', 'G')}", SUM)[1] == ""


ALLOWED = {
    "body": LOOP,
    "body in braces": f"{{ {LOOP} }}",
    "two blocks": "{ r := 0; } { r := r; }",
    "program": f"{SUM}\n{{\n{LOOP}\n}}",
    "laid out and remarked": f"// a sum\n{SUM.replace(' ', '  ')} /* { {1} } */ {{ {LOOP} }}",
    "fenced": f"Here it is:\n```dafny\n{SUM} {{ {LOOP} }}\n```\nDone.",
    "fenced with returns": f"It is:\n``` dafny\n{SUM} {{ {LOOP} }}\n```\n".replace("\n", "\r\n"),
    "fence that is not closed": f"It is:\n```dafny verify\n{SUM} {{ {LOOP} }}\n",
    "fence of the prompt's": f"{LOOP}\n```\nIt verifies.",
    "fences behind": f"```dafny\n{LOOP}```\nRun\n```sh\ndafny x;\n```\nsays\n```\n0 errors\n```",
    "helpers": f"{SUM} {{ {LOOP} }}\nlemma L(s: set<int>)\n  requires 1 in s\n  decreases s\n"
    "  ensures s > {} || |s| == 1\n{ }\nfunction method G(): seq<int> { [1] }\n"
    "predicate P() reads {} { forall i :: i in {1} ==> i == 1 }",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_honest_programs_are_not_refused(name):
    program, reason = assemble(ALLOWED[name], SUM)
    if name == "helpers":  # what a > stands before is more than is read
        assert reason == "lemma L without a body"
        program, reason = assemble(ALLOWED[name].replace("s > {}", "s != {}"), SUM)
    assert reason == ""
    assert program.count("method M(") == 1 or "laid" in name
    assert "/*" not in program and "//" not in program


# -- the verifier, a stand-in ----------------------------------------------------------------------

OLD = """program.dfy(7,0): Error BP5003: A postcondition might not hold on this return path.
program.dfy(2,12): Related location: This is the postcondition that might not hold.
Execution trace:
    (0,0): anon0

Dafny program verifier finished with 0 verified, 1 error
"""
NEW = """program.dfy(7,0): Error: a postcondition could not be proved on this return path
  |
7 | { r := x; }
  | ^

program.dfy(2,12): Related location: this is the postcondition that could not be proved

Dafny program verifier finished with 0 verified, 1 error
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A `dafny` on the PATH that says what it is told."""

    def install(version: str, body: str):
        script = tmp_path / "dafny"
        script.write_text(
            f"#!/bin/sh\n[ \"$1\" = --version ] && {{ echo '{version}'; exit 1; }}\n"
            f'echo "$*" >> {tmp_path}/calls\n{body}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        clear()
        return tmp_path / "calls"

    def clear():
        dafny._command.cache_clear()
        dafny._verified.cache_clear()

    yield install
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize(
    ("version", "said", "command"),
    [
        ("Dafny: Error: unknown switch: --version", OLD, "/compile:0 /nologo /rlimit:1000000"),
        ("4.11.0+abc", NEW, "verify --verification-time-limit=30"),
    ],
)
def test_either_command_line_is_called_and_read(stand_in, version, said, command):
    calls = stand_in(version, f"cat <<'END'\n{said}END\nexit 4")
    for _ in range(2):  # the second time from what is kept
        (verdict,) = judge(["r := x;"], [HEAD])
        (error,) = verdict.errors
        assert (error.line, error.kind) == (7, "postcondition")
        assert "[line 2: " in error.message
        assert (verdict.outcome, verdict.grade) == ("unproved", -0.3)
    (call,) = calls.read_text().splitlines()
    assert call.startswith(command)


def test_outcomes_of_the_verifier(stand_in):
    for code, said, outcome in (
        (0, "Dafny program verifier finished with 1 verified, 0 errors", "verified"),
        (0, "note, this loop has no body\n... finished with 1 verified, 0 errors", "refused"),
        (0, "Dafny program verifier finished with 0 verified, 0 errors", "refused"),
        (2, "p.dfy(3,7): Error: invalid Rhs\n1 parse errors detected in p.dfy", "invalid"),
        (4, "p.dfy(3,0): Timed out on BP5003: A postcondition\n... 0 verified", "timeout"),
        (4, "p.dfy(3,0): Out of resource on BP5003: A post\n... 0 verified", "timeout"),
        (0, "0 verified, 0 errors, 1 time out", "infra_error"),
        (137, "Killed", "infra_error"),
    ):
        stand_in("old", f"cat <<'END'\n{said}\nEND\nexit {code}")
        verdict = verify("method A() { }")
        assert verdict.outcome == outcome, said
    assert dafny_reward(["?"], ["r := x;"], specification=[HEAD]) == [None]


def test_a_verifier_that_hangs_is_stopped_with_its_children(stand_in, tmp_path):
    stand_in("old", f"sleep 600 & echo $! > {tmp_path}/child\nsleep 600")
    begun = time.monotonic()
    verdict = verify("method A() { }", limit=1.5)
    assert (verdict.outcome, verdict.grade) == ("timeout", -0.6)
    assert time.monotonic() - begun < 60
    assert_gone(tmp_path / "child")


def test_an_interrupt_ends_the_verifier(stand_in, tmp_path):
    stand_in("old", f"echo $$ > {tmp_path}/child\nsleep 600")
    call = "from mdmrl.rewards.dafny import judge; judge(['method A() { }'] , [None], 500)"
    process = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert_gone(tmp_path / "child")


def assert_gone(file):
    child = int(file.read_text())
    for _ in range(100):
        state = re.search(r"^State:\s+(\w)", status(child), re.MULTILINE)
        if state is None or state[1] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} lives")


def status(process: int) -> str:
    try:
        with open(f"/proc/{process}/status") as file:
            return file.read()
    except OSError:
        return ""


def test_each_different_program_is_verified_once(stand_in):
    calls = stand_in("old", "echo 1 verified, 0 errors")
    logged = {}
    columns = {"specification": [HEAD] * 4, "log_metric": logged.__setitem__, "other": [1] * 4}
    texts = ["r := x;", "r := x; // again", "assume false;", [{"content": "r := x;"}]]
    assert dafny_reward(["?"] * 4, texts, **columns) == [1.0, 1.0, -1.0, 1.0]
    assert len(calls.read_text().splitlines()) <= 2
    assert (logged["dafny/verified"], logged["dafny/refused"]) == (0.75, 0.25)
    with pytest.raises(InputError, match="needs the column 'specification'"):
        dafny_reward(["?"], ["r := x;"])


def test_without_dafny_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    dafny._command.cache_clear()
    with pytest.raises(InputError, match="apt install dafny"):
        verify("method A() { }")


def test_errors_are_the_next_rounds_prompt(stand_in):
    stand_in(
        "old",
        "grep -q right program.dfy && echo 1 verified, 0 errors && exit 0\n"
        f"cat <<'END'\n{OLD}END\nexit 4",
    )
    asked = []

    def write(prompt: str) -> str:
        asked.append(prompt)
        return ["assume false;", "r := x;", "var right := x; r := right;", "never"][len(asked) - 1]

    verdicts = repair(write, "Fill it in.", HEAD, rounds=4)
    assert [verdict.outcome for verdict in verdicts] == ["refused", "unproved", "verified"]
    assert asked[0] == "Fill it in."
    assert "refused: assume" in asked[1] and asked[1].startswith("Fill it in.\n\n")
    assert "line 7, postcondition: A postcondition might not hold" in asked[2]
    assert asked[2] == feedback("Fill it in.", verdicts[1])
    assert len(repair(write, "?", HEAD, rounds=1)) == 1


# -- the verifier itself ---------------------------------------------------------------------------


@installed
def test_the_verifier_itself():
    texts = [RIGHT, "r := x;", "r := y;", "r := ", "while true { }", "while true r := x;"]
    verdicts = judge(texts, [HEAD] * len(texts))
    outcomes = ["verified", "unproved", "invalid", "invalid", "unproved", "refused"]
    assert [verdict.outcome for verdict in verdicts] == outcomes
    kinds = [verdict.errors and verdict.errors[0].kind for verdict in verdicts]
    assert kinds == [(), "postcondition", "resolution/type", "parse", "termination", ()]
    assert verdicts[2].errors[0].line == 4


@installed
@pytest.mark.slow
def test_a_proof_that_does_not_end_is_stopped():
    powers = (
        "method A(x: int, y: int, z: int) returns (r: int)\n  requires x > 0 && y > 0 && z > 0\n"
    )
    program = powers + "  ensures x*x*x*x*x + y*y*y*y*y != z*z*z*z*z\n{ r := 1; }"
    assert verify(program).outcome == "timeout"
    assert verify(program, limit=1).detail == "stopped after 1 s"


@installed
@pytest.mark.slow
def test_every_combinations_body_verifies():
    rng = random.Random(3)
    drawn = [task_of_dafny.specified(c, rng)[1] for c in task_of_dafny.combinations()]
    verdicts = judge([r["completion"] for r in drawn], [r["specification"] for r in drawn], 120)
    failed = {row["combination"]: v for row, v in zip(drawn, verdicts, strict=True) if v.grade != 1}
    assert not failed


@installed
@pytest.mark.slow
def test_the_case_studies_verdicts_are_those_recorded():
    for name, study in task_of_dafny.case_studies().items():
        recorded = list(study.programs.values())
        found = judge([v.program for v in recorded], [study.specification] * len(recorded), 120)
        for was, now in zip(recorded, found, strict=True):
            assert (now.outcome, now.errors, now.detail) == (was.outcome, was.errors, was.detail), (
                name
            )


# -- the task --------------------------------------------------------------------------------------


def test_the_case_studies():
    studies = task_of_dafny.case_studies()
    assert sorted(studies) == ["Course schedule", "Fibonacci"]
    for study in studies.values():
        outcomes = [verdict.outcome for verdict in study.programs.values()]
        assert {"verified", "unproved", "invalid", "refused"} == set(outcomes)
        assert "```python" in study.prompt and study.prompt.endswith(study.specification)
        for verdict in study.programs.values():
            assert bool(verdict.errors or verdict.detail) == (verdict.outcome != "verified")
            reason = assemble(verdict.program, study.specification)[1]
            if verdict.detail != "no body":  # which the verifier says
                assert reason == verdict.detail


def test_whole_specifications_are_in_one_split(tokenizer):
    task = load_task("dafny")
    rows = {split: task.rows(split) for split in ("pretrain", "rl", "validation", "test")}
    keys = {split: {row["combination"] for row in found} for split, found in rows.items()}
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) > 200
    assert len(keys["validation"] | keys["test"]) > 0.15 * len(set.union(*keys.values()))
    for found in rows.values():
        assert len({row["prompt"] for row in found}) == len(found) > 100
    every = [row for found in rows.values() for row in found]
    assert {row["specification"] == row["prompt"] for row in every} == {True}
    lengths = map(len, tokenizer([row["completion"] for row in every]).input_ids)
    assert max(lengths) + 1 <= task.sampler["max_new_tokens"]
    # No hole or letter for a constant is left, and no name is without its declaration.
    assert not any(
        re.search(r"[@<]\w:|@|\bk\b", row["prompt"] + row["completion"]) for row in every
    )
    stream = task.stream(5)
    assert {next(stream)["combination"] for _ in range(300)} <= keys["pretrain"]
    assert (
        next(task.stream(5, 7))
        == [row for row, _ in zip(task.stream(5), range(8), strict=False)][7]
    )


def test_bodies_are_read_as_they_are():
    rows = load_task("dafny").rows("validation")
    for row in rows:
        program, reason = assemble(row["completion"], row["specification"])
        assert reason == ""
        assert program == f"{row['specification']}\n{{\n{row['completion']}\n}}\n"


def test_rows_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "method A() returns (r: int)\\n  ensures r == 1"}\n')
    (row,) = load_task("dafny", data=file).rows("test")
    assert row["specification"] == row["prompt"]
