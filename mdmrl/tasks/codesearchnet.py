"""CodeSearchNet (Husain et al. 2019): the body of a Python function from its head and docstring.

Rows have the data set's own fields: a local JSONL, a name on the hub, or, where nothing is given,
records mined from what is installed, the functions of at most `LONGEST` lines at the top of the
standard library's modules and of further `packages`. Of these a whole module or package is in one
split. Doctests with literal results become tests where the reference passes them alone and no stub
does; a function without any has no tests, and its reward is for syntax.
"""

import ast
import doctest
import itertools
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from mdmrl.config import InputError, require
from mdmrl.rewards.code import code_reward, judge
from mdmrl.tasks.base import Task, hub_rows, numbered_rows, split_of
from mdmrl.tasks.code import metric
from mdmrl.tasks.items import SHARES, text_of

LONGEST = 15  # lines of a mined body
PARTITIONS = {"pretrain": "train", "rl": "train", "validation": "valid", "test": "test"}


def read(fields: dict) -> dict:
    """The row of a record: its function's head with the docstring, and its body.

    Raises:
        InputError: a record without code, or whose code is no function of this Python with a
            docstring and a body on lines of its own.
    """
    code = text_of(fields, "code", "whole_func_string", "original_string", "func_code_string")
    try:
        function, *others = _parsed(code).body
        docstring = ast.get_docstring(function)
        fit = docstring and not others and function.name
        end = function.body[0].end_lineno
        fit = fit and function.body[1].lineno > end
    except (SyntaxError, ValueError, TypeError, IndexError, RecursionError, MemoryError):
        fit = False
    wanted = "expected one function of this Python, with a docstring and a body on its own lines"
    require(bool(fit), f"{code!r:.80}: {wanted}")
    lines = code.splitlines(keepends=True)
    head, tests = "".join(lines[:end]), doctests(function.name, docstring)
    row = {"prompt": head, "signature": head, "completion": "".join(lines[end:])}
    return row | {"reference": code, "tests": tests, "held_out_tests": tests}


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():  # of escapes in strings
        warnings.simplefilter("ignore")
        return ast.parse(source)


def doctests(name: str, docstring: str) -> list[str]:
    """The docstring's examples as sources with asserts; none unless one calls the function, or
    where any imports something, which could be the function itself."""
    found, calls = [], False
    try:
        for example in doctest.DocTestParser().get_examples(docstring):
            tree = _parsed(example.source)
            if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)):
                return []
            source, want = ast.unparse(tree), example.want.strip()
            if want:
                ast.literal_eval(want)
                calls |= any(getattr(node, "id", None) == name for node in ast.walk(tree))
                source = f"assert ({source}) == ({want})"
                ast.parse(source)
            found.append(source)
    except (SyntaxError, ValueError, TypeError):  # an example whose result is no literal
        pass
    return found if calls else []


def gated(rows: Sequence[dict]) -> list[dict]:
    """The rows, without the tests that their reference fails, or a stub passes."""
    tested = [row for row in rows if row["tests"]]
    columns = [[row[name] for row in tested] for name in ("tests", "prompt", "completion")]
    bad = set()
    for stub in (None, "return None", "return {}", "return True", "return 0", "return {0}"):
        names = [re.search(r"\((?:\s*(\w+))?", row["prompt"])[1] or "()" for row in tested]
        bodies = [stub.format(name) for name in names] if stub else columns[2]
        verdicts = judge(bodies, columns[0], signatures=columns[1])
        passed = [verdict.outcome == "passed" for verdict in verdicts]
        bad |= {id(row) for row, p in zip(tested, passed, strict=True) if p == bool(stub)}
    none = {"tests": [], "held_out_tests": []}
    return [row | none if id(row) in bad else row for row in rows]


@cache
def mined(packages: tuple[str, ...]) -> list[dict]:
    """Records of what is installed, in CodeSearchNet's fields; `partition` is the split."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = {name: library / name for name in sorted(sys.stdlib_module_names - {"this"})}
    for name in packages:
        spec = find_spec(name)
        require(spec is not None, f"packages: {name!r} is not installed")
        roots[name] = Path(spec.origin).parent
    found = []
    for name, root in roots.items():
        partition = split_of("codesearchnet", name, shares=SHARES)
        for file in sorted(root.rglob("*.py") if root.is_dir() else [root.with_suffix(".py")]):
            path = file.relative_to(root.parent)
            if not file.is_file() or any("test" in part for part in path.parts):
                continue
            source = file.read_text("utf-8", errors="replace")
            lines = source.splitlines(keepends=True)
            for node in _parsed(source).body:
                plain = isinstance(node, ast.FunctionDef) and not node.decorator_list
                if not plain or len(node.body) < 2 or not ast.get_docstring(node):
                    continue
                if node.end_lineno - node.body[0].end_lineno <= LONGEST:
                    code = "".join(lines[node.lineno - 1 : node.end_lineno])
                    of = {"repo": name, "path": str(path), "func_name": node.name}
                    found.append({**of, "code": code, "partition": partition})
    return found


@cache
def rows(data: str | None, packages: tuple[str, ...], split: str) -> list[dict]:
    """The rows of a split, those that `read` refuses left out; of all that are in a file where its
    records have no `partition`."""
    wanted, partition = {split, PARTITIONS[split]}, PARTITIONS[split]
    if data is None:
        found = [fields for fields in mined(packages) if fields["partition"] == split]
    elif Path(data).is_file():
        found = [f for _, f in numbered_rows(data) if f.get("partition", split) in wanted]
    else:
        found = hub_rows(data, "python", {"valid": "validation"}.get(partition, partition))
    kept, mistake = [], None
    for fields in found:
        try:
            kept.append(fields | read(fields))
        except InputError as error:
            mistake = error
    said = f"{len(found) - len(kept)} of {len(found)} records are left out, such as {mistake}"
    require(data is None or len(kept) > 0, f"{data}, split {split!r}: {said}")
    if data is not None and mistake:
        warnings.warn(f"{data}, split {split!r}: {said}", stacklevel=2)
    return gated(kept)


def stream(packages: tuple[str, ...], seed: int, start: int = 0) -> Iterator[dict]:
    """An endless supply of mined functions; item i depends on (seed, i) alone."""
    items = rows(None, packages, "pretrain")
    for index in itertools.count(start):
        yield random.Random(f"codesearchnet/stream/{seed}/{index}").choice(items)


def task(data=None, packages: Sequence[str] = ()) -> Task:
    """`data` is a file or a name on the hub; else functions are mined from the standard library
    and from installed `packages`."""
    packages, data = tuple(packages), data and str(data)
    splits = {split: partial(rows, data, packages, split) for split in PARTITIONS}
    judged = {"rewards": [code_reward], "metric": metric}
    sampler = {"max_new_tokens": 256, "steps": 256}
    supply = partial(stream, packages) if data is None else None
    return Task("codesearchnet", splits, stream=supply, sampler=sampler, **judged)
