"""Settings: dataclasses that coerce values by declared type and refuse unknown names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path


class InputError(ValueError):
    """A mistake of the user's: its message names the value, what was expected and how to mend it,
    and the command line shows that alone. Any other error keeps its traceback."""


def unknown(what: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`, with the nearest known one suggested."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {name!r}: {hint}known: {', '.join(known)}")


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_function(given: object, name: str, arguments: Sequence[str]) -> None:
    """Refuse what cannot be called with these arguments, by position."""
    wanted = f"expected a function of {', '.join(arguments)}"
    require(callable(given), f"{name}={given!r:.80}: {wanted}")
    try:
        inspect.signature(given).bind(*arguments)
    except ValueError:  # a builtin may have no signature that can be read
        return
    except TypeError as error:
        raise InputError(f"{name}={given!r:.80}: {error}; {wanted}") from None


def resolve(named: str | Callable) -> Callable:
    """What "module:function" names, imported when it is asked for, so that a lower room can name
    what an upper one holds; a function as it is."""
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)


IN_A_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")


def load_object(where: str):
    """The object that a file of the user's defines, from "path/to/file.py:name"; an InputError if
    there is none.

    The file is run as a module of its own, once for every call. It may import its neighbours only
    if they can be imported anyway.
    """
    found = IN_A_FILE.fullmatch(where)
    require(found is not None, f"{where!r}: expected FILE.py:NAME, as in my_rewards.py:short")
    path = Path(found["path"])
    require(path.is_file(), f"{where!r}: there is no file {path}")
    # Known by its path: dataclasses ask for their module, and no installed one has that name.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, found["name"]):
        raise unknown(f"object in {path}", found["name"], [n for n in vars(module) if n[0] != "_"])
    return getattr(module, found["name"])


@dataclasses.dataclass
class Config:
    """Base of every settings class.

    Values are coerced to the declared type when the object is made ("1e-5" from YAML becomes a
    float, "file.py:name" the function of that name where one is allowed), then `validate` runs.
    Unknown keys are refused, and the nearest one named.

    `MOVED` says where a setting of an older version is now.
    """

    MOVED: typing.ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args, **values):
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            require(key not in cls.MOVED, f"{key}={values[key]!r}: {cls.MOVED.get(key)}")
            if key not in known:
                raise unknown(f"{cls.__name__} key", key, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            setattr(self, field.name, _coerce(field.name, value, hints[field.name]))
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` naming the value, what was expected and how to mend it."""

    @classmethod
    def from_dict(cls, values: Mapping):
        require(isinstance(values, Mapping), f"{values!r:.80}: expected settings by name")
        return cls(**{str(name): value for name, value in values.items()})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def changed(self) -> dict:
        """The settings that are not at their defaults; what has no default always counts."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        return {k: v for k, v in self.to_dict().items() if v != _default(fields[k])}

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@functools.cache
def _hints(made: type) -> dict:
    return typing.get_type_hints(made)


def _default(field: dataclasses.Field):
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _coerce(name: str, value, declared):
    """`value` as the `declared` type: bool, int, float, str, a list, a dict, or a union of one of
    them, or of a list and one of them, with None, with `Callable`, or with both."""
    if getattr(value, "ndim", None) == 0:  # numpy's and torch's
        value = value.item()
    kinds = [declared]
    if isinstance(declared, types.UnionType):
        kinds = typing.get_args(declared)
        if value is None and types.NoneType in kinds:
            return None
        if Callable in kinds:
            if callable(value):
                return value
            if isinstance(value, str) and IN_A_FILE.fullmatch(value):
                return load_object(value)
        kinds = [kind for kind in kinds if kind not in (types.NoneType, Callable)]
        lists = [kind for kind in kinds if typing.get_origin(kind) is list]
        declared = lists[0] if lists and isinstance(value, list | tuple) else kinds[0]
    origin = typing.get_origin(declared) or declared
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    mistake = InputError(f"{name}={value!r:.200}: expected {wanted}")
    text = str(value).lower()
    match value:
        case _ if origin is list and isinstance(value, Iterable) and not isinstance(value, str):
            (item,) = typing.get_args(declared)
            return [_coerce(name, v, item) for v in value]
        case Mapping() if origin is dict:
            return dict(value)
        case str() | os.PathLike() if origin is str:
            return os.fspath(value)
        case bool() | str() if origin is bool and text in ("true", "false"):
            return text == "true"
        case bool() if origin in (int, float):
            raise mistake
        case int() | float() | str() if origin in (int, float):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                raise mistake from None
            if origin is int and not (number.is_integer() and abs(number) < 2**63):
                raise mistake  # libraries have no larger ones
            return int(Decimal(value)) if origin is int else number  # large ones are no floats
    raise mistake
