"""A room imports only from itself and the rooms above it, so that there are no circles."""

import ast
from pathlib import Path

import pytest

import mdmrl

LIBRARY = Path(mdmrl.__file__).parent
ROOMS = (
    {"config"},
    {"runs", "identity", "provenance"},
    {"diffusion", "diffusion_exact"},
    {"policies"},
    {"sampling"},
    {"rewards"},
    {"tasks"},
    {"evaluation"},
)


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from, wherever in it."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    return {name.split(".")[1] for name in names if name.startswith("mdmrl.")}


@pytest.mark.parametrize("place", range(len(ROOMS)), ids=lambda place: min(ROOMS[place]))
def test_a_room_imports_only_from_those_above(place):
    above = set.union(*ROOMS[: place + 1])
    for room in ROOMS[place]:
        modules = [*LIBRARY.glob(f"{room}.py"), *LIBRARY.glob(f"{room}/*.py")]
        for module in modules:
            assert imported(module) <= above, module
