"""What tells one run from another: text that names a function, an object or data, and changes when
what it does can change.

    our own parts   by name and by `VERSION` of their module, whatever their code looks like today
    a library's     by name and by the library's version
    a user's        by source, and by what they capture: closures, defaults, bound objects, the
                    globals they name, and what these capture
    data            by value
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

INSTALLED = tuple({sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")})
PLAIN = (type(None), bool, int, float, complex, str, bytes, Path, re.Pattern, torch.dtype)


def digest(text: str) -> str:
    """Ten hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def fingerprint(thing) -> str:
    """A name and ten digits for a function or an object: equal only where both do the same."""
    named = thing.func if isinstance(thing, functools.partial) else thing
    name = getattr(named, "__name__", None) or type(named).__name__
    return f"{name} {digest(described(thing))}"


def described(thing, above: tuple[int, ...] = ()) -> str:
    """All that `fingerprint` depends on, as text; `above` are the ids of what holds `thing`."""
    if isinstance(thing, PLAIN):
        return repr(thing)
    if id(thing) in above:
        return f"itself, {len(above) - above.index(id(thing))} up"
    return "(" + " ".join(_parts(thing, (*above, id(thing)))) + ")"


def _parts(thing, above: tuple[int, ...]) -> Iterator[str]:
    def inner(value) -> str:
        return described(value, above)

    match thing:
        case Mapping():
            yield from sorted(f"{inner(key)}: {inner(value)}" for key, value in thing.items())
        case Set():
            yield from sorted(map(inner, thing))
        case torch.Tensor() | np.ndarray():
            array = torch.as_tensor(thing).detach().cpu().contiguous()
            content = hashlib.sha256(
                array.view(torch.uint8).numpy() if array.ndim else str(array.item()).encode()
            )
            yield f"{array.dtype} {tuple(array.shape)} {content.hexdigest()}"
        case Sequence():
            yield from map(inner, thing)
        case types.ModuleType():
            yield f"module {thing.__name__}"
        case functools.partial():
            yield from map(inner, (thing.func, thing.args, thing.keywords))
        case types.MethodType():
            yield from map(inner, (thing.__func__, thing.__self__))
        case types.FunctionType():
            yield _source(thing)
            yield from (
                inner(cell.cell_contents) for cell in thing.__closure__ or () if _filled(cell)
            )
            if _is_users(thing):
                yield from map(inner, (thing.__defaults__, thing.__kwdefaults__))
                yield from map(inner, _named_globals(thing))
        case type():
            yield _source(thing)
            if _is_users(thing):
                yield from map(inner, [v for v in vars(thing).values() if inspect.isroutine(v)])
                yield from map(inner, thing.__bases__)
        case types.BuiltinFunctionType():
            yield thing.__qualname__
        case _ if hasattr(thing, "fingerprint"):
            yield str(thing.fingerprint())
        case _ if not _is_users(type(thing)) and type(thing).__repr__ is not object.__repr__:
            yield f"{_source(type(thing))} {re.sub(r' at 0x[0-9a-f]+', '', repr(thing))}"
        case _:
            yield inner(type(thing))
            yield inner(getattr(thing, "__dict__", {}))


def _source(thing) -> str:
    """A user's by its text, where that can be read, else by its compiled code; any other by name
    and version."""
    module, name = thing.__module__ or "", thing.__qualname__
    package = module.partition(".")[0]
    if package == "mdmrl":
        return f"{name} {getattr(sys.modules.get(module), 'VERSION', 1)}"
    if not _is_users(thing):
        return f"{package} {_version(package)} {name}"
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        text = ""
    # Two lambdas may stand on one line, and an interpreter's own lines are not kept.
    if isinstance(thing, types.FunctionType) and (not text or thing.__name__ == "<lambda>"):
        text += " ".join(f"{c.co_code.hex()} {c.co_names} {_plain(c)}" for c in _codes(thing))
    return text or name


def _is_users(thing) -> bool:
    """Whether a function or class is neither ours nor installed."""
    module = sys.modules.get(thing.__module__ or "")
    if (thing.__module__ or "").partition(".")[0] in ("mdmrl", "builtins"):
        return False
    file = getattr(module, "__file__", None)
    return file is None or not file.startswith(INSTALLED)


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "python"


def _codes(function: types.FunctionType) -> Iterator[types.CodeType]:
    """The code of a function and of those it defines."""
    found = [function.__code__]
    while found:
        yield (code := found.pop())
        found += [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _plain(code: types.CodeType) -> list[str]:
    return [repr(const) for const in code.co_consts if not isinstance(const, types.CodeType)]


def _named_globals(function: types.FunctionType) -> list:
    names = {
        at.argval
        for code in _codes(function)
        for at in dis.get_instructions(code)
        if at.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return [function.__globals__[name] for name in sorted(names & function.__globals__.keys())]


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
