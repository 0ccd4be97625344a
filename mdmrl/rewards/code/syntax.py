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

DOUBTED = (ast.ClassDef, ast.GeneratorExp, ast.Set, ast.SetComp, ast.Try)
DOUBTED += (ast.Import, ast.ImportFrom)
DOUBTED_NAMES = {"set", "frozenset", "hash", "id", "repr"}
PASSING = (ast.Compare, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Call, ast.Assert, ast.Subscript)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)
SCOPES += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAZY = ("map", "zip", "filter", "enumerate", "reversed", "iter")
EAGER = "list tuple set frozenset dict sum min max sorted any all join extend update Counter deque"
EAGER = EAGER.split()
ENDLESS = ("count", "cycle", "repeat")  # of itertools
SETS = ("set", "frozenset", "union", "intersection", "difference", "symmetric_difference")
UNORDERED = "len sorted sum min max any all update isinstance issubset"
UNORDERED = {*SETS, *UNORDERED.split()}
# What calls a function for each item, or until it ends: which argument is that function.
CALLING = {"accumulate": 1, "groupby": 1, "map": 0, "filter": 0, "iter": 0, "starmap": 0}
CALLING |= {"takewhile": 0, "dropwhile": 0, "filterfalse": 0}
GUARD = """def __unstopped__(function):
    def call(*args):
        try:
            return function(*args)
        except StopIteration:
            raise RuntimeError("StopIteration")
    return call if callable(function) else function"""
# By which tests call functions that they do not name.
FINDING = {"eval", "exec", "globals", "locals", "vars", "dir", "getattr", "unittest", "sys"}
FILES = "open tempfile read_text write_text read_bytes write_bytes exists isfile listdir glob"
FILES = {*FILES.split()}
# What the ends have one each of: by what tests say of it, and by what programs do.
APART = {"files": (FILES, FILES), "random numbers": ({"seed"}, {"random"})}
APART |= {"an environment": ({"environ", "putenv"}, {"environ", "getenv"})}
APART |= {"standard streams": ({"stdin", "stderr", "redirect_stderr"}, {"stdin", "stderr"})}
# What tests that import nothing take for imported, by module; and modules that no box has.
HELPERS = {"collections": "Counter OrderedDict defaultdict deque namedtuple", "copy": "deepcopy"}
HELPERS |= {"math": "isclose isnan isinf sqrt ceil floor gcd factorial"}
HELPERS |= {"fractions": "Fraction", "decimal": "Decimal", "datetime": "datetime date timedelta"}
HELPERS = {name: module for module, names in HELPERS.items() for name in names.split()}
FOREIGN = {"numpy", "np", "pandas", "pd", "torch", "scipy", "sympy", "pytest"}
ALIKE = ("__init__", "__repr__", "__str__")
BUILT_IN = (int, float, complex, str, bytes, list, tuple, dict, set, range, type)
MEANINGLESS = (ast.Pass, ast.Return, ast.Raise, ast.Expr)


def inspected(source: str) -> dict:
    """Of a program: its `error` (None where it compiles), whether it is a `stub`, the names that it
    uses and gives no value (`free`) or declares `globals`, what it deals with that the ends have
    one each of (`apart`), and whether it has what another Python than CPython gets wrong: what is
    `special` (methods and generators, of which Monty has some), or, perhaps, what is `doubted`;
    what is `unlike` (rounding, the order of sets, classes that are named as Python's own errors,
    special methods and private names) Monty does otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
            compile(source, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    nodes = [*ast.walk(tree)]
    kinds = {*map(type, nodes)}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    methods = [item.name for kind in classes for item in kind.body if isinstance(item, FUNCTIONS)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    hidden = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    hidden += [node.id for node in nodes if isinstance(node, ast.Name) and not _is_loaded(node)]
    return {
        "error": None,
        "stub": _is_stub(tree),
        "free": sorted(names - _given(nodes)),
        "apart": [what for what, (_, known) in APART.items() if known & _words(nodes)],
        "globals": [name for node in nodes if isinstance(node, ast.Global) for name in node.names],
        "special": ast.GeneratorExp in kinds
        or any(name.startswith("__") and name != "__init__" for name in methods),
        "doubted": not (kinds.isdisjoint(DOUBTED) and names.isdisjoint(DOUBTED_NAMES)),
        "unlike": "round" in names
        or not kinds.isdisjoint((ast.Yield, ast.YieldFrom))
        or any(kind.bases or hasattr(builtins, kind.name) for kind in classes)
        or any(name.startswith("__") and name not in ALIKE for name in methods + hidden)
        or {ast.NamedExpr, ast.GeneratorExp} <= kinds
        or _is_lazy(nodes)
        or _orders_sets(nodes)
        or _has_loose_annotations(nodes),
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
            used = isinstance(parent, ast.For | ast.comprehension) and parent.iter is node
            used = used or isinstance(parent, ast.Starred)
            if not used and _called(parent) not in {*EAGER, *LAZY}:
                return True
    return False


def _orders_sets(nodes: list[ast.AST]) -> bool:
    """Whether the order of a set may show, since it is run through, popped from or given away."""
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    sets = {x for x in nodes if isinstance(x, ast.Set | ast.SetComp) or _called(x) in SETS}
    for node in reversed(nodes):  # the innermost first
        if isinstance(node, ast.BinOp) and {node.left, node.right} & sets:
            sets.add(node)
    held = {
        target.id
        for node in sets
        for target in getattr(parents[node], "targets", ())
        if isinstance(target, ast.Name)
    }
    sets |= {x for x in nodes if isinstance(x, ast.Name) and _is_loaded(x) and x.id in held}
    for node in sets:
        parent = parents[node]
        if isinstance(parent, ast.Call) and node in parent.args:
            shown = _called(parent) not in UNORDERED
        else:
            shown = getattr(parent, "attr", "") == "pop" or isinstance(parent, ast.Starred)
        if shown or getattr(parent, "iter", None) is node:
            return True
    return False


def _has_loose_annotations(nodes: list[ast.AST]) -> bool:
    """Whether an annotation has a name that is nowhere given, which Monty does not look at."""
    hints = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    names = set().union(*(_names(hint) for hint in hints if hint))
    return bool(names - _given(nodes) - {*dir(builtins)})


def _given(nodes: list[ast.AST]) -> set[str]:
    """The names that a source sets, defines or imports."""
    found = {node.id for node in nodes if isinstance(node, ast.Name) and not _is_loaded(node)}
    # Functions, classes, errors that are caught, what a `case` captures.
    found |= {getattr(node, field, None) for node in nodes for field in ("name", "rest")} - {None}
    aliases = [node.asname or node.name for node in nodes if isinstance(node, ast.alias)]
    return found | {alias.partition(".")[0] for alias in aliases}


def _words(nodes: list[ast.AST]) -> set[str]:
    """The names of attributes, of what is imported, and of Python's functions."""
    found = {getattr(node, "attr", None) for node in nodes} - {"open"}
    found |= {node.name for node in nodes if isinstance(node, ast.alias)}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return found | {node.id for node in nodes if isinstance(node, ast.Name)} - _given(nodes)


def _is_loaded(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _called(node: ast.AST | None) -> str | None:
    """The name of the function, or method, that a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", None))


def _is_stub(tree: ast.Module) -> bool:
    """Whether no function does more than return a constant, as -1 or [], raise or pass."""
    found = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    lines = [line for function in found for line in function.body]
    values = [value for line in lines if (value := getattr(line, "value", None))]
    return all(isinstance(line, MEANINGLESS) for line in lines) and not any(map(_names, values))


def wanted(tests: tuple[str, ...]) -> dict:
    """What tests want of a program, by kind: the `names` they may ask it for (what they define
    themselves, `bound`, and not in a function for itself, stays theirs); the `modules` of Python's
    that they take for imported, as in `math.isclose(f(2), 1.4)`; names that Python has `built_in`,
    the program's only where tests ask for no others, each with those in its calls; those they use
    as `classes`; the variables they set, `resets`; the classes they define, `given`; the modules
    that they import, or take for imported, and no box has, `foreign`; the statements that import
    what they may take for imported, beside what is the program's, `helpers`; what they deal with
    that the ends have one each of, `apart`; and whether they have any assert that runs.

    Raises:
        SyntaxError: tests that are no Python.
    """
    lines = [line for test in tests for line in ast.parse(test).body]
    nodes = [node for line in lines for node in ast.walk(line)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    if any(node.id in ("eval", "exec", "globals", "vars") for node in names):
        texts = [node.value for node in nodes if isinstance(getattr(node, "value", None), str)]
        found = re.findall(r"[^\W\d]\w*", " ".join(texts))
        names += [ast.Name(name, ast.Load()) for name in found]
    loaded = [node.id for node in names if _is_loaded(node)]
    bound = {node.id for node in names if not _is_loaded(node)}
    asked = {}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            asked.setdefault(node.value.id, []).append(node.attr)
    modules = {
        name
        for name in sys.stdlib_module_names.intersection(asked) - bound
        if len(asked[name]) == loaded.count(name)
        and all(hasattr(__import__(name), attribute) for attribute in asked[name])
    }
    own, built_in = {*loaded} - modules, {*dir(builtins)}
    others = own - built_in - _given(nodes) - {x.arg for x in nodes if isinstance(x, ast.arg)}
    helpers = others & {*HELPERS}
    if helpers == others:
        helpers = set()  # as of a task to write `gcd`
    foreign = {x for x in FOREIGN & others if len(asked.get(x, ())) == loaded.count(x)}
    around = {name: set() for name in own & built_in - bound if not others}
    for node in nodes:
        if isinstance(node, ast.Call) and _called(node) in around:
            around[_called(node)] |= _names(node) & {*around} - {_called(node)}
    targets = [x for line in lines if isinstance(line, ast.Assign) for x in line.targets]
    outside, found = [*lines], [node.names for node in nodes if isinstance(node, ast.Global)]
    for node in outside:  # which grows meanwhile
        outside += () if isinstance(node, SCOPES) else ast.iter_child_nodes(node)
    return {
        "names": sorted(own - built_in),
        "modules": sorted(modules),
        "built_in": around,
        "bound": sorted(_given(outside).union(*found)),
        "classes": _used_as_classes(nodes),
        "resets": {x.id for x in targets if isinstance(x, ast.Name)},
        "given": {line.name for line in lines if isinstance(line, ast.ClassDef)},
        "apart": [what for what, (known, _) in APART.items() if known & _words(nodes)],
        "foreign": sorted(_imported(nodes) - sys.stdlib_module_names | foreign),
        "helpers": tuple(f"from {HELPERS[name]} import {name}" for name in sorted(helpers)),
        "has_assert": any(isinstance(node, ast.Assert) for node in _reached(lines)),
    }


def _imported(nodes: list[ast.AST]) -> set[str]:
    """The modules that tests cannot do without."""
    tried = {x for node in nodes if isinstance(node, ast.Try) for x in ast.walk(node)}
    found = [node for node in nodes if node not in tried]
    names = [alias.name for node in found if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in found if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def _reached(lines: list[ast.stmt]) -> list[ast.AST]:
    """The nodes of tests but those of functions and classes that nothing names, as pytest would,
    and those behind the guard of a main program."""
    nodes, names, left = [], set(), lines

    def runs(line: ast.stmt) -> bool:
        named = isinstance(line, (*FUNCTIONS, ast.ClassDef)) and not line.decorator_list
        return not named or line.name in names or not names.isdisjoint(FINDING)

    while running := [line for line in left if runs(line)]:
        left = [line for line in left if not runs(line)]
        for line in running:
            is_guard = isinstance(line, ast.If) and "__name__" in _names(line.test)
            for part in line.orelse if is_guard else [line]:
                nodes += ast.walk(part)
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return nodes


def guarded(source: str, theirs: set[str]) -> str:
    """Tests, to be run behind `GUARD`, in which no exception stands for what it is not.

    In Python a StopIteration of a function ends the `map` that calls it, so that `all(map(lambda x:
    next(f(x)) == x * x, xs))` holds for an `f` of no items; here, as in generators (PEP 479), it is
    an error. And a failed assert is not caught by the name of an error of the program's (of
    `theirs`), which may be Python's `Exception`.
    """
    tree = ast.parse(source)
    nodes = [*ast.walk(tree)]
    theirs = theirs - _given(nodes) - {node.arg for node in nodes if isinstance(node, ast.arg)}
    calls = [node for node in nodes if _called(node) in CALLING and node.args[1:]]
    for node in calls:
        place = CALLING[_called(node)]
        if not any(isinstance(argument, ast.Starred) for argument in node.args[: place + 1]):
            function = ast.Name("__unstopped__", ast.Load())
            node.args[place] = ast.Call(function, [node.args[place]], [])
    handlers = [node for node in nodes if isinstance(node, ast.ExceptHandler) and node.type]
    handlers = [node for node in handlers if not theirs.isdisjoint(_names(node.type))]
    for node in handlers:
        node.name = node.name or "__error__"
        node.body[:0] = ast.parse(f"if type({node.name}).__name__ == 'AssertionError': raise").body
    return ast.unparse(tree) if calls or handlers else source


def _names(node: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


def _used_as_classes(nodes: list[ast.AST]) -> list[str]:
    """The names that tests use as one uses a class: with a capital, and what a call gives is kept,
    entered, asked for an attribute, or set beside another's; or without, and what a call gives is
    asked for an attribute that no built-in type has. A function may have a capital too, and what
    comes of that is compared with plain data, or goes through a function of Python's."""
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    found, held = set(), {}
    for node in nodes:
        if isinstance(node, ast.Call) and (name := getattr(node.func, "id", None)):
            parent = parents[node]
            if name[0].isupper():
                beside = [x for x in ast.iter_child_nodes(parent) if isinstance(x, ast.Call)]
                if len(beside) > 1 or not isinstance(parent, PASSING):
                    found.add(name)
            for target in getattr(parent, "targets", []):
                held.setdefault(getattr(target, "id", ""), set()).add(name)
    for node in nodes:
        if isinstance(node, ast.Attribute) and not any(hasattr(x, node.attr) for x in BUILT_IN):
            name = getattr(node.value, "id", None)
            called = getattr(getattr(node.value, "func", None), "id", None)
            found |= {name, called, *held.get(name, ())} - {None}
    return sorted(found)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(inspected(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
