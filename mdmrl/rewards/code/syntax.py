"""What can be told of a program by reading it; also the child process that reads untrusted ones.

`compile` and `ast.parse` hold the interpreter's lock, on a hostile source for long, and may crash;
so the child, this file run by itself, does it: a line of JSON with the source in, one with what
`inspected` says out.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
import warnings

DOUBTED = (ast.Set, ast.SetComp, ast.Try, ast.Import, ast.ImportFrom)
DOUBTED_NAMES = {"set", "frozenset", "hash", "id", "repr"}
KEEPING = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.withitem, ast.Expr)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MEANINGLESS = (ast.Pass, ast.Return, ast.Raise, ast.Expr)


def inspected(source: str) -> dict:
    """Of a program: its `error` (None where it compiles), whether it is a `stub`, and whether it
    has what another Python than CPython gets wrong: what is `special` (methods and generators, of
    which Monty has some), or, perhaps, what is `doubted`; what is `unlike` (rounding, and classes
    that are named as Python's own errors) Monty does otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
            compile(source, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    nodes = [*ast.walk(tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    methods = [item.name for kind in classes for item in kind.body if isinstance(item, FUNCTIONS)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return {
        "error": None,
        "stub": _is_stub(tree),
        "unlike": "round" in names or any(hasattr(builtins, kind.name) for kind in classes),
        "special": any(name.startswith("__") and name != "__init__" for name in methods)
        or any(isinstance(node, ast.GeneratorExp) for node in nodes),
        "doubted": bool(classes)
        or any(isinstance(node, ast.GeneratorExp) for node in nodes)
        or any(isinstance(node, DOUBTED) for node in nodes)
        or any(isinstance(node, ast.Name) and node.id in DOUBTED_NAMES for node in nodes),
    }


def _is_stub(tree: ast.Module) -> bool:
    """Whether no function does more than return a constant, raise or pass."""
    found = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return all(
        isinstance(line, MEANINGLESS)
        and isinstance(getattr(line, "value", None), ast.Constant | None)
        for function in found
        for line in function.body
    )


def classes_of(tests: tuple[str, ...]) -> list[str]:
    """The names with a capital that tests somewhere use as one uses a class: what a call gives is
    named, entered, asked for an attribute, or set beside another's. A function may have a capital
    too, and what comes of that is compared with plain data alone."""
    found = set()
    for node in (node for test in tests for node in ast.walk(ast.parse(test))):
        if isinstance(node, ast.Attribute):
            found |= _called(ast.walk(node.value))
        elif isinstance(node, KEEPING):
            found |= _called(ast.iter_child_nodes(node))
        elif isinstance(node, ast.Compare | ast.BinOp):
            sides = [_called([side]) for side in ast.iter_child_nodes(node)]
            if sum(map(bool, sides)) > 1:
                found.update(*sides)
    return sorted(found)


def _called(nodes) -> set[str]:
    """The names with a capital that are called in `nodes`."""
    calls = (node for node in nodes if isinstance(node, ast.Call))
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return {name for name in names if name[0].isupper()}


def names_wanted(tests: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """The names that tests may want of a program (what they define themselves stays theirs), the
    modules of Python's that they take for imported, as in `math.isclose(f(2), 1.4)`, and the names
    that Python has built in. These are the program's only where tests want no others.

    Raises:
        SyntaxError: tests that are no Python.
    """
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    loaded = [node.id for node in names if isinstance(node.ctx, ast.Load)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    dotted = [owner.id for owner in owners if isinstance(owner, ast.Name)]
    modules = {
        name
        for name in sys.stdlib_module_names.intersection(dotted) - bound
        if dotted.count(name) == loaded.count(name)
    }
    own, built_in = {*loaded} - modules, {*dir(builtins)}
    others = own - built_in - bound
    return sorted(own - built_in), sorted(modules), sorted(own & built_in - bound) * (not others)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(inspected(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
