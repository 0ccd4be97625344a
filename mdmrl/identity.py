"""What tells one run from another: text that names a function, an object or data, and changes when
what it does can change.

    our own parts   by name and by `VERSION` of their module, whatever their code looks like today
    a library's     by name and by the library's version
    a user's        by source, and by what they capture: closures, defaults, attributes, the globals
                    they read, and what these capture
    data            by value

What a function writes itself when it is called (a counter, a global, an attribute) is its state and
does not count. Of a list, dict or set that it captures there counts what was in it when the
function was first seen by this process: it may be a log.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from importlib import metadata
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

INSTALLED = tuple({sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")})
PLAIN = (type(None), bool, int, float, complex, str, bytes, Path, re.Pattern, torch.dtype)
MADE_BY = ("__init__", "__post_init__", "__new__")
_first_seen: WeakKeyDictionary = WeakKeyDictionary()


def digest(text: str) -> str:
    """Ten hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def fingerprint(thing) -> str:
    """A name and ten digits for a function or an object: equal only where both do the same."""
    named = thing.func if isinstance(thing, functools.partial) else thing
    name = getattr(named, "__name__", None) or type(named).__name__
    seen = {}
    with contextlib.suppress(TypeError):  # what cannot be referred to weakly
        seen = _first_seen.setdefault(thing, seen)
    return f"{name} {digest(_Description(seen).of(thing))}"


def named(kind: type) -> str:
    """A class of ours by its name, any other by its fingerprint."""
    return fingerprint(kind) if _is_users(kind) else kind.__name__


def described(data) -> str:
    """All that an identity of data, such as rows, depends on, as text."""
    return _Description({}).of(data)


def known(part):
    """A part of an identity in values that JSON can hold: settings as they are, functions and rows
    by their fingerprints."""
    if isinstance(part, dict):
        return {name: known(value) for name, value in part.items()}
    if isinstance(part, list | tuple) and part and isinstance(part[0], Mapping):
        return digest(described(part))
    return fingerprint(part) if callable(part) else part


class _Description:
    """One reading of a thing and all that it holds. `seen` has containers by id, each with its text
    when it was first seen; it holds them, so that no id is taken twice."""

    def __init__(self, seen: dict[int, tuple[object, str]]):
        self.seen, self.above = seen, []

    def of(self, thing) -> str:
        if isinstance(thing, PLAIN):
            return repr(thing)
        if id(thing) in self.above:
            return f"what holds it, {len(self.above) - self.above.index(id(thing))} up"
        if id(thing) in self.seen:
            return self.seen[id(thing)][1]
        self.above.append(id(thing))
        text = "(" + " ".join(self._parts(thing)) + ")"
        self.above.pop()
        if isinstance(thing, list | dict | set):
            self.seen[id(thing)] = (thing, text)
        return text

    def _all(self, things: Iterable) -> Iterator[str]:
        return map(self.of, things)

    def _parts(self, thing) -> Iterator[str]:
        match thing:
            case Mapping():
                yield from sorted(f"{self.of(k)}: {self.of(v)}" for k, v in thing.items())
            case Set():
                yield from sorted(self._all(thing))
            case np.ndarray() if thing.dtype.kind not in "biufc":  # text, dates, objects
                yield f"{thing.dtype} {thing.shape} {self.of(thing.ravel().tolist())}"
            case torch.Tensor() | np.ndarray():
                array = torch.as_tensor(thing).detach().cpu().contiguous().flatten()
                content = hashlib.sha256(array.view(torch.uint8).numpy())
                yield f"{array.dtype} {tuple(thing.shape)} {content.hexdigest()}"
            case Sequence():
                yield from self._all(thing)
            case types.ModuleType():
                yield f"module {thing.__name__}"
            case functools.partial():
                yield from self._all((thing.func, thing.args, thing.keywords))
            case types.MethodType():
                yield from self._all((thing.__func__, thing.__self__))
            case types.FunctionType():
                yield _source(thing)
                yield from self._all(_captured(thing))
            case type():
                yield _source(thing)
                if _is_users(thing):
                    yield from self._all(_routines(thing))
                    yield from self._all(thing.__bases__)
            case types.BuiltinFunctionType():
                yield thing.__qualname__
            case _ if hasattr(thing, "fingerprint"):
                yield str(thing.fingerprint())
            # Their repr leaves out rows and weights.
            case torch.nn.Module() if not _is_users(type(thing)):
                yield from self._all((type(thing), repr(thing), thing.state_dict()))
            case _ if _package(type(thing)) == "pandas" and hasattr(thing, "to_dict"):
                yield from self._all((type(thing), thing.to_dict()))
            case _ if not _is_users(type(thing)) and type(thing).__repr__ is not object.__repr__:
                yield f"{_source(type(thing))} {re.sub(r' at 0x[0-9a-f]+', '', repr(thing))}"
            case _:
                held, state = getattr(thing, "__dict__", {}), _written_by_methods(type(thing))
                yield self.of(type(thing))
                yield from self._all(sorted((k, v) for k, v in held.items() if k not in state))


def _source(thing) -> str:
    """A user's by its text, where that can be read, else by its compiled code; any other by name
    and version."""
    package, name = _package(thing), thing.__qualname__
    if package == "mdmrl":
        return f"{name} {getattr(sys.modules.get(thing.__module__), 'VERSION', 1)}"
    if not _is_users(thing):
        return f"{package} {_version(package)} {name}"
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        text = ""
    # Two lambdas may stand on one line, and what was typed to an interpreter is not kept.
    if isinstance(thing, types.FunctionType) and (not text or name.endswith("<lambda>")):
        plain = [[c for c in code.co_consts if isinstance(c, PLAIN)] for code in _codes(thing)]
        text += f"{[(code.co_code.hex(), code.co_names) for code in _codes(thing)]} {plain}"
    return text or name


def _is_users(thing: types.FunctionType | type) -> bool:
    """Whether a function or class is neither ours nor installed."""
    if _package(thing) in ("mdmrl", "builtins"):
        return False
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return file is None or not file.startswith(INSTALLED)


def _package(thing: types.FunctionType | type) -> str:
    return (thing.__module__ or "").partition(".")[0]


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


def _names(function: types.FunctionType, *operations: str) -> set[str]:
    """What a function reads or writes by these operations of the interpreter."""
    steps = (step for code in _codes(function) for step in dis.get_instructions(code))
    return {step.argval for step in steps if step.opname in operations}


def _captured(function: types.FunctionType) -> Iterator:
    """What a function knows beside its text, but for what it writes itself."""
    state = _names(function, "STORE_DEREF", "STORE_GLOBAL")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            if name not in state:
                yield cell.cell_contents
    if _is_users(function):
        yield from (function.__defaults__, function.__kwdefaults__)
        known = function.__globals__
        read = _names(function, "LOAD_GLOBAL", "LOAD_NAME") - state
        yield from (known[name] for name in sorted(read & known.keys()))


def _routines(kind: type) -> list[types.FunctionType]:
    """The functions that a class defines, static ones and properties too."""
    inner = [getattr(v, "__func__", getattr(v, "fget", v)) for v in vars(kind).values()]
    return [value for value in inner if isinstance(value, types.FunctionType)]


def _written_by_methods(kind: type) -> set[str]:
    """Attributes that an object's methods set when it is used."""
    methods = [f for base in kind.__mro__ for f in _routines(base) if f.__name__ not in MADE_BY]
    return set().union(*(_names(method, "STORE_ATTR") for method in methods))
