"""R_a: how much of the reference's syntax a program has (definitions.md is PPOCoder's formula,
Shojaee et al. 2023: matched subtrees over those of the *reference*).

A subtree is a node of Python's `ast` with all below it, and two are the same where `ast.dump` says
the same of them. So names and constants count: renaming a variable loses every subtree that it is
in and none of the others, while layout, comments and brackets lose nothing. With every name another
a right program still keeps about a third of the count: constants, operators, and the contexts
(`Load`) that any program has.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from mdmrl.config import require

LONGEST = 2**16  # bytes of source: the parser holds the interpreter's lock, and no timer stops it
CACHED = 4096  # references


def ast_match(completion: str, reference: str) -> float:
    """Count(AST_completion ∩ AST_reference) / Count(AST_reference), a multiset intersection of
    subtrees, in [0, 1]; 0 for a completion that does not parse, or of more than `LONGEST` bytes.

    Raises:
        InputError: a reference that does not parse, is too long, or holds no statement.

    >>> ast_match("def f(x):\n    return x", "def f(x):\n    return x  # itself")
    1.0
    """
    numbers, counts, total = _subtrees(reference)
    tree = _parsed(completion)
    if tree is None:
        return 0.0
    # A subtree that the reference lacks has no number, and so has none that it is a part of.
    found = Counter(_numbered(tree, lambda key: numbers.get(key, -1)))
    return sum(min(count, found[number]) for number, count in counts.items()) / total


@lru_cache(CACHED)
def _subtrees(reference: str) -> tuple[dict, Counter, int]:
    """The reference's different subtrees, numbered; how often each occurs; how many there are."""
    tree = _parsed(reference)
    said = f"reference {reference!r:.200}"
    require(tree is not None, f"{said}: expected Python that parses, {LONGEST} bytes at most")
    require(len(tree.body) > 0, f"{said}: expected at least one statement")
    numbers: dict[tuple, int] = {}
    counts = Counter(_numbered(tree, lambda key: numbers.setdefault(key, len(numbers))))
    return numbers, counts, counts.total()


def _parsed(source: str) -> ast.Module | None:
    if len(source) > LONGEST or len(source.encode("utf-8", "surrogatepass")) > LONGEST:
        return None
    try:
        # "\d" warns, which may be an error where this is called.
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _numbered(tree: ast.AST, number: Callable[[tuple], int]) -> list[int]:
    """The number of every node's subtree, those below before those above."""
    order, fields, numbers = [tree], [], {}
    for node in order:  # which grows meanwhile
        held = vars(node)
        fields.append([held[name] for name in node._fields])
        for value in fields[-1]:
            if type(value) is list:
                order += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST):
                order.append(value)
    found = []
    for node, values in zip(reversed(order), reversed(fields), strict=True):
        # In its parent's key a node is its number, and a value stands with its type: 1 is not True.
        key = [type(node)]
        for value in values:
            if type(value) is list:
                key.append(tuple([numbers.get(id(item), item) for item in value]))
            elif (below := numbers.get(id(value))) is not None:
                key.append(below)
            else:
                key.append((type(value), value))
        numbers[id(node)] = known = number(tuple(key))  # `Load` and its like are one object each
        found.append(known)
    return found
