"""What can be told of a program by reading it; also the child process that reads untrusted ones.

`compile` and `ast.parse` hold the interpreter's lock, on a hostile source for long, and may crash;
so the child, this file run by itself, does it: a line of JSON with the source in, one with what
`inspected` says out.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
import warnings

DOUBTED = (ast.Set, ast.SetComp, ast.Try, ast.Import, ast.ImportFrom)
DOUBTED_NAMES = {"set", "frozenset", "hash", "id", "repr"}
PASSING = (ast.Compare, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Call, ast.Assert, ast.Subscript)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LAZY = ("map", "zip", "filter", "enumerate", "reversed", "iter")
EAGER = "list tuple set frozenset dict sum min max sorted any all join extend update Counter deque"
EAGER = EAGER.split()
ENDLESS = ("count", "cycle", "repeat")  # of itertools
BUILT_IN = (int, float, complex, str, bytes, list, tuple, dict, set, range, type)
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
        "unlike": "round" in names
        or any(kind.bases or hasattr(builtins, kind.name) for kind in classes)
        or any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes)
        or _is_lazy(nodes)
        or _has_loose_annotations(nodes),
        "special": any(name.startswith("__") and name != "__init__" for name in methods)
        or any(isinstance(node, ast.GeneratorExp) for node in nodes),
        "globals": [name for node in nodes if isinstance(node, ast.Global) for name in node.names],
        "doubted": bool(classes)
        or any(isinstance(node, ast.GeneratorExp) for node in nodes)
        or any(isinstance(node, DOUBTED) for node in nodes)
        or any(isinstance(node, ast.Name) and node.id in DOUBTED_NAMES for node in nodes),
    }


def _is_lazy(nodes: list[ast.AST]) -> bool:
    """Whether there is an iterator that is not used up at once, for which Monty has a list."""
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    for node in nodes:
        if isinstance(node, ast.alias) and node.name in ENDLESS:
            return True
        if isinstance(node, ast.Attribute) and node.attr in ENDLESS:
            if getattr(node.value, "id", "") == "itertools":
                return True
        elif isinstance(node, ast.GeneratorExp) or _called(node) in LAZY:
            parent = parents.get(node)
            looped = isinstance(parent, ast.For | ast.comprehension) and parent.iter is node
            if not (
                looped or isinstance(parent, ast.Starred) or _called(parent) in {*EAGER, *LAZY}
            ):
                return True
    return False


def _has_loose_annotations(nodes: list[ast.AST]) -> bool:
    """Whether an annotation has a name that is nowhere given, which Monty does not look at."""
    given = {node.id for node in nodes if isinstance(node, ast.Name) and not _is_loaded(node)}
    given |= {node.name for node in nodes if isinstance(node, (ast.ClassDef, *FUNCTIONS))}
    for node in nodes:
        if isinstance(node, ast.alias):
            given.add((node.asname or node.name).partition(".")[0])
    for node in nodes:
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            names = {x.id for x in ast.walk(hint) if isinstance(x, ast.Name)} if hint else set()
            if names - given - {*dir(builtins)}:
                return True
    return False


def _is_loaded(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _called(node: ast.AST | None) -> str | None:
    """The name of the function, or method, that a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", None))


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
    """The names that tests use as one uses a class: with a capital, and what a call gives is kept,
    entered, asked for an attribute, or set beside another's; or without, and what a call gives is
    asked for an attribute that no built-in type has. A function may have a capital too, and what
    comes of that is compared with plain data, or goes through a function of Python's."""
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    found, held = set(), {}
    for node in nodes:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        name, parent = node.func.id, parents.get(node)
        if name[0].isupper():
            beside = [side for side in ast.iter_child_nodes(parent) if isinstance(side, ast.Call)]
            if len(beside) > 1 or not isinstance(parent, PASSING):
                found.add(name)
        for target in getattr(parent, "targets", []):
            held.setdefault(getattr(target, "id", None), set()).add(name)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            own = not any(hasattr(kind, node.attr) for kind in BUILT_IN)
            if isinstance(node.value, ast.Name):
                found |= {node.value.id, *held.get(node.value.id, ())} if own else set()
            elif isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
                found |= {node.value.func.id} if own else set()
    return sorted(found)


def names_wanted(tests: tuple[str, ...]) -> tuple[list[str], ...]:
    """The names that tests may want of a program (what they define themselves stays theirs), the
    modules of Python's that they take for imported, as in `math.isclose(f(2), 1.4)`, and the names
    that Python has built in. These are the program's only where tests want no others.

    Raises:
        SyntaxError: tests that are no Python.
    """
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    if any(node.id in ("eval", "exec") for node in names):
        texts = [node.value for node in nodes if isinstance(getattr(node, "value", None), str)]
        found = re.findall(r"[^\W\d]\w*", " ".join(texts))
        names += [ast.Name(name, ast.Load()) for name in found]
    loaded = [node.id for node in names if isinstance(node.ctx, ast.Load)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    dotted = [owner.id for owner in owners if isinstance(owner, ast.Name)]
    asked = {name: set() for name in sys.stdlib_module_names.intersection(dotted) - bound}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            asked.get(node.value.id, set()).add(node.attr)
    modules = {
        name
        for name, attributes in asked.items()
        if dotted.count(name) == loaded.count(name)
        and all(hasattr(__import__(name), attribute) for attribute in attributes)
    }
    own, built_in = {*loaded} - modules, {*dir(builtins)}
    others = own - built_in - bound
    only = sorted(own & built_in - bound) * (not others)
    lines = [
        line for test in tests for line in ast.parse(test).body if isinstance(line, ast.Assign)
    ]
    resets = [
        target.id for line in lines for target in line.targets if isinstance(target, ast.Name)
    ]
    return sorted(own - built_in), sorted(modules), only, sorted(bound), resets


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(inspected(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
