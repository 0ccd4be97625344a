"""What `peer.py` is in CPython beyond that: it runs behind it, in the same namespace.

Whatever is no data is a `Remote` at the other end, on which Python's operators work too. The tests'
end gives nothing away by that: an operand is often the very value that a test expects, so an object
that a program returned where a number or a list was due is equal to none, and an operator that was
given plain data must not answer with plain data. Only what the tests themselves made by calling a
class (a name with a capital that they use as one) is trusted to say `3 in it` or `it < 3`, and a
comparison that holds for a stranger too holds for nothing. What the program asks of the tests' end
is to call what the tests gave it, or an operation on that, but for the attributes by which Python
shows its own works.
"""
# ruff: noqa: F821, SIM905

# As few imports as can be, and none of `json`, which with `re` behind it takes as long as Python.
import _collections
import _thread
import builtins
import math
import operator
import sys

KNOWN.update({f.__name__: f for f in (object, type, slice, reversed, enumerate, zip, map, filter)})
KNOWN.update({f.__name__: f for f in (iter, next, pow, divmod, math.sqrt, math.floor, math.ceil)})
KNOWN.update({f"str.{name}": f for name, f in vars(str).items() if name[0] != "_"})
for name, kind in vars(builtins).items():
    if isinstance(kind, type) and issubclass(kind, BaseException):
        ERRORS[name] = kind
CONTAINERS["deque"] = _collections.deque
# Values that are made again of what they are made of.
MADE = [
    "builtins.range",
    "builtins.slice",
    "builtins.bytearray",
    "decimal.Decimal",
    "fractions.Fraction",
]
MADE += ["datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta"]
BASES = {int: int.__pos__, float: float.__pos__, frozenset: frozenset.union}
BASES |= {kind: lambda x, kind=kind: kind.__getitem__(x, slice(None)) for kind in (str, bytes)}
BASES[tuple] = lambda x: tuple(tuple.__iter__(x))
WORKS = ("module", "frame", "code", "traceback")
PREDICATES = "startswith endswith issubset issuperset isdisjoint union intersection difference "
PREDICATES += "symmetric_difference count index find rfind equals __contains__ __eq__ __ne__ "
PREDICATES = (PREDICATES + "__lt__ __le__ __gt__ __ge__").split()  # of what a data type would say
BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod".split()
COMPARED = "eq ne lt le gt ge".split()
UNARY = "len bool str repr hash abs round int float complex index neg pos invert".split()
FORWARDED = "getitem setitem delitem next dir enter exit setattr delattr reversed".split()

errors = {}  # classes that stand for the program's own exceptions, by handle
remotes = {}
lock = _thread.RLock()
channel = {}


# -- values ----------------------------------------------------------------------------------------


def encode_more(value, call):
    kind = type(value)
    if isinstance(value, BaseException):
        return encode_error(value, call)
    if isinstance(value, type) and issubclass(value, BaseException):
        return [*handle(value, "error"), value.__name__, built_in(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return named_tuple(value, call)
    name = f"{kind.__module__}.{kind.__name__}"
    if name in MADE and kind is vars(sys.modules[kind.__module__]).get(kind.__name__):
        return ["made", name, encode(value.__reduce__()[1], call)]
    for base in BASES:  # the base's own value, whatever is overridden
        if isinstance(value, base):
            return encode(BASES[base](value), call)
    for base in CONTAINERS:
        if isinstance(value, CONTAINERS[base]):
            return encode_container(value, base, call)
    if isinstance(value, type):
        return handle(value, "class")
    if kind.__name__ == "coroutine":
        return handle(value, "coroutine")
    return handle(value, "callable" if callable(value) else "object")


def built_in(kind):
    """The names of Python's own classes among a class of errors and its bases."""
    return [base.__name__ for base in kind.__mro__ if ERRORS.get(base.__name__) is base]


def encode_error(error, call):
    kind = type(error)
    coded = ["error", built_in(kind)]
    try:
        coded.append([encode(item, call) for item in error.args])
    except Exception:
        coded.append([repr(error)[:200]])
    if ERRORS.get(kind.__name__) is kind or id(kind) in theirs:
        return coded
    return [*coded, encode_more(kind, call), encode(list(vars(error).items()), call)]


_decode_error = decode_error


def decode_error(value, call):
    if len(value) == 3:
        return _decode_error(value, call)
    kind = decode(value[3], call)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise TypeError("no class of errors")
    error = kind(*decode_all(value[2], call))
    error.__dict__.update(decode(value[4], call))
    return error


def decode_made(value, call):
    module, _, kind = MADE[MADE.index(value[1])].partition(".")
    return getattr(__import__(module), kind)(*decode(value[2], call))


def decode_handle(value, call):
    number, kind = value[1:3]
    if kind == "error":
        if number not in errors:
            made = ERRORS[value[4][0]] if value[4] else Exception
            if made.__name__ != value[3]:
                made = type(value[3], (made,), {"__init__": lambda self, *args, **named: None})
            theirs[id(made)] = number
            errors[number] = made
        return errors[number]
    if kind == "coroutine":
        return awaited(number)
    return remote_for(number, "class" if kind == "class" else "free")


async def awaited(number):
    return apply("await", remote_for(number, "free"))


DECODERS.update(error=decode_error, made=decode_made, handle=decode_handle, deque=decode_container)


def encode_result(function, value, call):
    """As `encode`; but an instance that was asked for, of a class of the program's that extends a
    built-in one, is an object."""
    asked = isinstance(function, type) and type(value) is function
    if asked and function.__module__ == "solution" and not isinstance(value, tuple | BaseException):
        return handle(value, "object")
    return encode(value, call)


# -- objects of the other end ----------------------------------------------------------------------


class Remote:
    """An object of the other end. `_trust`: "class", "named class" (see above), "named" (made
    by calling one), "tainted" (by an operator that was given plain data) or "free"."""

    __slots__ = ("_number", "_trust")

    def __getattr__(self, name):
        doubted = self._trust == "free" and name in PREDICATES
        if judging() and (doubted or self._trust == "tainted"):
            raise AttributeError(name)
        return apply("getattr", self, name)

    def __call__(self, *args, **kwargs):
        free = {number for number, trust in remotes if trust == "free"}
        made = ask(["yours", self._number], args, kwargs)
        if self._trust != "named class" or type(made) is not Remote or made._number in free:
            return made
        remotes.pop((made._number, "free"))
        return remote_for(made._number, "named")

    def __iter__(self):
        if self._trust == "tainted":
            raise TypeError("an object of the program's has no items here")
        iterator = apply("iter", self)
        while True:
            try:
                item = apply("next", iterator)
            except StopIteration:
                return
            yield item

    def __contains__(self, item):
        if believed(self, item):
            return bool(apply("contains", self, item)) and not holds("contains", self, object())
        return any(item is other or item == other for other in self)

    def __instancecheck__(self, instance):
        return type(instance) is Remote and apply("isinstance", instance, self)

    def __subclasscheck__(self, kind):
        return type(kind) is Remote and apply("issubclass", kind, self)

    def __format__(self, how):
        return format(str(self), how)


def remote_for(number, trust):
    if (number, trust) not in remotes:
        made = remotes[number, trust] = object.__new__(Remote)
        object.__setattr__(made, "_number", number)
        object.__setattr__(made, "_trust", trust)
        theirs[id(made)] = number
    return remotes[number, trust]


def apply(name, *operands):
    return ask(["operation", name], operands, {})


def holds(name, *operands):
    try:
        return apply(name, *operands) is True
    except Exception:
        return False


def judging():
    return namespace["__name__"] == "tests"


def believed(remote, other):
    """Whether what `remote` makes of `other` may be plain data."""
    return not judging() or remote._trust == "named" or type(other) is Remote


def binary(name, swapped):
    def operate(self, other):
        both = type(other) is Remote
        result = apply(name if both else f"__r{name}__" if swapped else f"__{name}__", self, other)
        if result is NotImplemented or believed(self, other):
            return result
        if type(result) is not Remote:
            raise TypeError(f"an object of the program's answers {name} with plain data")
        return remote_for(result._number, "tainted")

    return operate


def compared(name):
    def compare(self, other):
        if not believed(self, other):
            if name in ("eq", "ne"):
                return name == "ne"
            raise TypeError(f"an object of the program's is given plain data to compare ({name})")
        method = f"__{name}__"
        result = apply(name if type(other) is Remote else method, self, other)
        if result is True and name != "ne" and judging() and holds(method, self, object()):
            return False
        return result

    return compare


def forwarded(name):
    def forward(self, *args):
        if self._trust == "tainted":
            raise TypeError(f"an object of the program's has no {name} here")
        return apply(name, self, *args)

    return forward


def special(name):
    """A special method alone, whose NotImplemented the caller's end acts on."""
    return lambda value, other: getattr(type(value), name, missing)(value, other)


def missing(value, other):
    return NotImplemented


OPERATIONS = {
    "and": operator.and_,
    "or": operator.or_,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *error: type(value).__exit__(value, *error),
    "await": lambda coroutine: __import__("asyncio").run(coroutine),
}
CALLED = ["getattr", "iter", "contains", "isinstance", "issubclass"]
for name in (*BINARY, *COMPARED, *UNARY, *FORWARDED, *CALLED):
    OPERATIONS.setdefault(name, getattr(builtins, name, None) or getattr(operator, name, None))
for name in BINARY:
    setattr(Remote, f"__{name}__", binary(name, False))
    setattr(Remote, f"__r{name}__", binary(name, True))
    OPERATIONS[f"__{name}__"] = special(f"__{name}__")
    OPERATIONS[f"__r{name}__"] = special(f"__r{name}__")
for name in COMPARED:
    setattr(Remote, f"__{name}__", compared(name))
    OPERATIONS[f"__{name}__"] = special(f"__{name}__")
for name in (*UNARY, *FORWARDED):
    setattr(Remote, f"__{name}__", forwarded(name))


def operation(target):
    if target[0] == "operation":
        return guarded(target[1]) if judging() else OPERATIONS[target[1]]
    if judging() and target[0] != "yours":
        raise TypeError("only what the tests gave is called at their end")
    return decode(target, None)


def guarded(name):
    """The operation, at the tests' end: on what they gave, and not to see Python's own works, as
    `f.__globals__` does, or the frame of a generator."""

    def operate(value, *operands):
        asked = operands[0] if name in ("getattr", "setattr", "delattr") else ""
        given = id(value) in my_numbers and type(asked) is str and asked[:2] != "__"
        result = OPERATIONS[name](value, *operands) if given else None
        if not given or type(result).__name__ in WORKS:
            raise AttributeError(f"no {name} of {asked or 'that'} at the tests' end")
        return result

    return operate


def bind(values, classes):
    for name, value in values.items():
        if type(value) is Remote and value._trust == "class" and name in classes:
            value = remote_for(value._number, "named class")
        namespace[name] = value
