"""Units of a program, for the hierarchy: the classes that the thesis names for Python (3.2.1) and
for Dafny (Fig. 3-1).

A unit begins with a comment that names its class; what the policy writes behind it is the
description in plain words (phase 1), and the code of the unit follows (phase 2). A unit ends at the
first empty line, or where the next comment begins.
"""

from collections.abc import Sequence

from mdmrl.sampling.hierarchy import Unit


def units_of(comment: str, names: Sequence[str]) -> tuple[Unit, ...]:
    """Units of these classes in a language whose comments begin with `comment`."""
    stops = ("\n\n", f"\n{comment} ")
    return tuple(Unit(name, f"{comment} {name.capitalize()}:", "\n\n", stops) for name in names)


PYTHON = units_of("#", ("imports", "constants", "helper function", "main function", "tests"))
DAFNY = units_of("//", ("function", "predicate", "lemma", "method", "specification"))
