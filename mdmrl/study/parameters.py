"""The parameters of a notebook: names, types and values of its one cell of literals, and what does
not fit them."""

import ast
import sys
from collections.abc import Mapping
from itertools import pairwise
from types import UnionType
from typing import NamedTuple, get_args, get_origin

from mdmrl.config import InputError, require, unknown
from mdmrl.progress import in_a_notebook

INJECTED = "# Parameters\n"  # what papermill's cell begins with


class Parameter(NamedTuple):
    """A type, that of the value where none is written, and the value, a literal."""

    kind: object
    value: object


def declared(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that a cell sets, by name; `where` is what an error calls the notebook."""
    found = {}
    for statement in ast.parse(source).body:
        try:
            typed = isinstance(statement, ast.AnnAssign)
            target = statement.target if typed else statement.targets[0]
            value = ast.literal_eval(statement.value)
            kind = eval(ast.unparse(statement.annotation)) if typed else type(value)
            found[target.id] = Parameter(kind, value)
        except (AttributeError, ValueError):
            raise InputError(
                f"{where}: '{ast.unparse(statement)}' in the parameters cell: "
                "expected one name set to a literal; compute in the next cell"
            ) from None
    return found


def check(known: Mapping[str, Parameter], given: Mapping[str, object], where: str) -> None:
    """Raise an InputError that names the first of the `given` that is not `known`, or whose value
    is of another type."""
    for name, value in given.items():
        if name not in known:
            raise unknown(f"parameter of {where}", name, known)
        kind = known[name].kind
        said = getattr(kind, "__name__", kind) if get_origin(kind) is None else kind
        wanted = f"expected {said}, as in {known[name].value!r}"
        require(_fits(value, kind), f"parameter of {where} {name}={value!r}: {wanted}")


def check_injected() -> None:
    """`check` what papermill has injected into the notebook that runs, which it would only warn of;
    nothing elsewhere, or where the cell before it was not run."""
    cells = sys.modules["IPython"].get_ipython().user_ns["In"] if in_a_notebook() else []
    for before, cell in pairwise(cells):
        if cell.startswith(INJECTED) and before:
            given = declared(cell, "papermill").items()
            known = declared(before, "this notebook")
            check(known, {name: found.value for name, found in given}, "this notebook")


def _fits(value, kind) -> bool:
    """Whether a value is of a type such as int, list[float], dict[str, str] or str | None; an int
    is a float too, and True is no int."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer is UnionType:
        return any(_fits(value, one) for one in inner)
    if outer is float:
        return type(value) in (int, float)
    if type(value) is not outer:
        return False
    if outer is dict:
        value = [part for pair in value.items() for part in pair]
        inner *= len(value) // 2
    else:
        value = value if outer is list else []
        inner *= len(value)
    return not inner or all(map(_fits, value, inner))
