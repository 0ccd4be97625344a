"""A room imports only from itself and the rooms above it, so that there are no circles."""

import ast
from pathlib import Path

import pytest

import mdmrl

LIBRARY = Path(mdmrl.__file__).parent
MODULES = [*LIBRARY.rglob("*.py")]
HANDED_ON = mdmrl._EXPORTS
ROOMS = (
    {"config"},
    {"runs", "identity", "provenance", "progress"},
    {"diffusion", "diffusion_exact"},
    {"policies"},
    {"sampling"},
    {"rewards"},
    {"tasks"},
    {"evaluation"},
    {"training"},
    {"rl"},
    {"study"},
    {"zoo"},
    {"bench"},
    {"cli", "__main__"},
)


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from, wherever in it; what `mdmrl` itself hands on counts as
    from where it is."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module="mdmrl"):
                names |= {HANDED_ON.get(a.name, f"mdmrl.{a.name}") for a in node.names}
            case ast.ImportFrom(level=0):
                names.add(node.module)
            case ast.Import():
                names |= {HANDED_ON.get(a.name, a.name) for a in node.names}
            case ast.Attribute(value=ast.Name(id="mdmrl")):
                names.add(HANDED_ON.get(node.attr, f"mdmrl.{node.attr}"))
    return {name.split(".")[1] for name in names if name.startswith("mdmrl.")}


@pytest.mark.parametrize("place", range(len(ROOMS)), ids=lambda place: min(ROOMS[place]))
def test_a_room_imports_only_from_those_above(place):
    above = set.union(*ROOMS[: place + 1])
    for room in ROOMS[place]:
        modules = [*LIBRARY.glob(f"{room}.py"), *LIBRARY.glob(f"{room}/**/*.py")]
        assert modules, room
        for module in modules:
            assert imported(module) <= above, module


def test_every_module_is_in_a_room():
    rooms = set.union(*ROOMS) | {"__init__"}
    assert {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in MODULES} == rooms
