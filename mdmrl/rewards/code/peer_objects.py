"""What stands at one end for the objects and classes of the other: behind `peer_cpython.py`, in the
same namespace.

The tests' end gives nothing away by them. An operand is often the very value that a test expects,
so where a program's object is asked about plain data (`it == 9`, `9 in it`, `it - 9`) it is asked
about decoys too, in an order that it cannot know, and what holds for those holds for nothing. An
object of a class that the tests do not use as one themselves, as they do in `Stack().push(1)`,
stands perhaps in an answer's place: a data type's methods are then the data type's own, and where
only its word would make it right there is no verdict. What the program asks of the tests' end is to
call what the tests gave it, or an operation on that, but for the attributes by which Python shows
its own works.
"""
# ruff: noqa: F821, SIM905

import _thread

NAMING = ("__name__", "__qualname__", "__doc__", "__module__")
PREDICATES = "startswith endswith issubset issuperset isdisjoint union intersection difference "
PREDICATES += "symmetric_difference count index find rfind equals __contains__ __eq__ __ne__ "
PREDICATES = (PREDICATES + "__lt__ __le__ __gt__ __ge__").split()  # of what a data type would say
KEPT = {"__repr__", "__str__", "__format__", "__call__"}  # of any class's own
STRANGER = object()  # that no object has anything to do with
trusted = set()  # numbers of classes that the tests use as such
stopping = set()  # numbers of methods that may end a loop
draws = {"state": 1}
lock = _thread.RLock()


class Meta(type):
    """Of the classes that stand for the other end's."""

    def __new__(meta, name, bases, names):
        give_up()  # a class of the tests' that extends one of the program's

    def __call__(self, /, *args, **kwargs):
        return ask(["yours", theirs[id(self)]], args, kwargs)

    def __getattr__(self, name):
        return attribute(self, name)

    def __setattr__(self, name, value):
        apply("setattr", self, name, value)

    def __instancecheck__(self, instance):
        told = type.__instancecheck__(self, instance)
        return told or isinstance(type(instance), Meta) and apply("isinstance", instance, self)

    def __subclasscheck__(self, kind):
        told = type.__subclasscheck__(self, kind)
        return told or isinstance(kind, Meta) and apply("issubclass", kind, self)

    def __iter__(self):
        return apply("__iter__", self)

    def __len__(self):
        return apply("__len__", self)

    def __contains__(self, item):
        return apply("__contains__", self, item)

    def __getitem__(self, item):
        return apply("getitem", self, item)


class Remote:
    """An object of the other end."""

    __slots__ = ()

    def __getattr__(self, name):
        if state["judging"] and name in PREDICATES and not is_trusted(self):
            return doubted_method(self, name)
        return attribute(self, name)

    def __setattr__(self, name, value):
        apply("setattr", self, name, value)

    def __delattr__(self, name):
        apply("delattr", self, name)

    def __repr__(self):
        return apply("repr", self)

    def __str__(self):
        return apply("str", self)

    def __format__(self, how):
        return apply("format", self, how)

    def __copy__(self):
        return apply("copy", self)

    def __deepcopy__(self, seen):
        return apply("deepcopy", self)

    @property
    def __dict__(self):
        try:
            return attribute(self, "__dict__")
        except AttributeError:
            return {}


def class_made(number, name, bases, specials, known):
    """The class that stands for one of the other end's, as `description` describes it."""
    bases = [decode(base) for base in bases]
    data = next((base for base in bases if not isinstance(base, Meta)), object)
    if not any(isinstance(base, Meta) for base in bases):
        bases.append(Remote)
    names, real = {"__slots__": (), "__module__": known[0] or "solution"}, standard(*known)
    names["__doc__"] = property(lambda self: attribute(self, "__doc__"))
    for special_name, is_there in specials:
        native = getattr(data, special_name, None) if base_of(data) or base_of(data, DATA) else None
        if special_name == "__hash__":
            names[special_name] = (lambda self: hashes[theirs[id(self)]]) if is_there else None
        elif special_name in FORWARDED:
            native = None if special_name in KEPT else native
            names[special_name] = forwarded(special_name, native) if is_there else None
    if isinstance(real, type):
        names["__class__"] = property(lambda self: real)
    made = type.__new__(Meta, name, tuple(bases), names)
    if any(theirs.get(id(base)) in trusted for base in made.__mro__):
        trusted.add(number)
    return made


def is_trusted(remote):
    return theirs[id(type(remote))] in trusted


def attribute(remote, name):
    if name == "__dataclass_fields__" and apply("hasattr", remote, name):
        return __import__("dataclasses").make_dataclass("C", apply("fields", remote)).__dataclass_fields__
    found = apply("getattr", remote, name)
    if name in ("send", "throw", "__next__") and id(found) in theirs:
        stopping.add(theirs[id(found)])
    return found


def may_stop(target):
    return target[1] in ("__next__", "__anext__", "await") or target[1] in stopping


def apply(name, *operands):
    return ask(["operation", name], operands, {})


def forwarded(name, native):
    """A special method; `native` is the data type's own, which an answer's place calls for."""

    def forward(self, /, *operands, **named):
        if state["judging"]:
            if native is not None and not is_trusted(self):
                return native(self, *operands)
            if name in COMPARED:
                return compared(self, name, *operands)
            if name in COMPUTED or name in INPLACE:
                return computed(self, name, *operands)
        if name == "__call__":
            return ask(["yours", theirs[id(self)]], operands, named)
        return apply(name, self, *operands)

    return forward


# -- doubts, at the tests' end ---------------------------------------------------------------------


def is_remote(value):
    return isinstance(type(value), Meta)


def compared(self, name, other):
    if state["decoding"]:
        return (self is other) != (name == "__ne__")
    if is_remote(other):
        result = apply(name, self, other)
        if result is NotImplemented or not result or name == "__ne__":
            return result
        return not holds(name, self, STRANGER)
    result, strange, alike = about(self, name, other)
    if result is NotImplemented or (name == "__contains__" and not result):
        return result
    if name in ("__eq__", "__ne__"):
        equal = name == "__eq__"
        if result != equal:
            return result
        false = equal in (strange, *alike)
        if not false and not is_trusted(self):
            give_up()
        return result != false
    false = strange is True or {*alike} == {True}
    if not is_trusted(self):
        if not false and {*alike} != {result}:
            give_up()
        false = True
    if false and name == "__contains__":
        return False
    if false:
        raise TypeError(f"an object of the program's compares ({name}) with anything")
    return result


def computed(self, name, *operands):
    result = apply(name, self, *map(copied, operands))
    if result is NotImplemented or any(map(is_remote, operands)):
        return result
    known = is_trusted(self)
    if known and is_remote(result):
        return result
    if not is_remote(result):
        _, _, alike = about(self, name, *operands)
        if alike and all(type(other) is type(result) and other == result for other in alike):
            raise TypeError(f"an object of the program's computes {name} with anything alike")
    elif result is self and name not in INPLACE:
        raise TypeError(f"an object of the program's is its own {name} with plain data")
    return result if known else give_up()


def doubted_method(self, name):
    method = attribute(self, name)

    def call(value, *more):
        if is_remote(value):
            return method(value, *more)
        result, strange = [method(copied(x), *more) for x in (value, decoys(value)[0])]
        if result == strange or is_remote(result):
            raise AttributeError(name)
        give_up()

    return call


def about(self, name, value, *more):
    """What an object says about plain data, about a stranger, and about decoys of the data's kind."""
    asked = [value, STRANGER, *decoys(value)]
    found = [None] * len(asked)
    for index in sorted(range(len(asked)), key=draw):
        try:
            found[index] = apply(name, self, copied(asked[index]), *more)
            if name in COMPARED and found[index] is not NotImplemented:
                found[index] = bool(found[index])
        except Exception as error:
            found[index] = error
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0], found[1], found[2:]


def draw(_):
    draws["state"] = (draws["state"] * 6364136223846793005 + 1442695040888963407) % 2**64
    return draws["state"] >> 33


def copied(value):
    """So that who is asked cannot change it."""
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def decoys(value):
    """Plain data of the same type that is not equal to it."""
    kind, found = type(value), []
    if kind is bool:
        found = [not value]
    elif kind in (int, float):
        far = 10**6 + abs(value) * (7 + draw(0) % 5)
        found = [value + 1 + draw(0) % 3, value - 1 - draw(0) % 3, -value - 7, value + far, value - far]
    elif kind in (str, bytes, list, tuple):
        extra = {str: "a", bytes: b"a"}.get(kind) or kind((decoys(value[-1]) or [0])[:1] if value else [0])
        found = [value + extra, extra + value, value[1:], value[:-1] + extra, value[::-1]]
    elif kind in (set, frozenset):
        found = [value | {"a"}, value ^ {next(iter(value), 0)}]
    elif kind is dict:
        found = [{**value, "a": 0}, {key: (decoys(item) or [0])[0] for key, item in value.items()}]
    elif value is None:
        found = [0, ""]
    return [other for other in found if other != value]


def holds(name, *operands):
    try:
        result = apply(name, *operands)
        return result is not NotImplemented and bool(result)
    except Exception:
        return False


# -- what is asked of this end ---------------------------------------------------------------------


def special_method(name):
    """Alone, whose NotImplemented the caller's end acts on."""
    return lambda value, *others: getattr(type(value), name, missing)(value, *others)


def missing(value, *others):
    return NotImplemented


async def result_of(awaitable):
    return await awaitable


OPERATIONS = {name: special_method(name) for name in FORWARDED}
for kind in (getattr, setattr, delattr, hasattr, isinstance, issubclass, repr, str, format):
    OPERATIONS[kind.__name__] = kind
OPERATIONS |= {
    "getitem": operator.getitem,
    "copy": lambda value: __import__("copy").copy(value),
    "deepcopy": lambda value: __import__("copy").deepcopy(value),
    "await": lambda value: __import__("asyncio").run(result_of(value)),
    "fields": lambda value: [*value.__dataclass_fields__],
    "input": lambda none, *prompt: input(*prompt),
}
_ask = ask


def ask(target, args, kwargs):
    with lock:  # for programs with threads
        return _ask(target, args, kwargs)


def operation(target):
    if target[0] == "operation":
        return guarded(target[1]) if state["judging"] else OPERATIONS[target[1]]
    if state["judging"] and target[0] != "yours":
        raise TypeError("only what the tests gave is called at their end")
    return decode(target)


def guarded(name):
    """The operation, at the tests' end: on what they gave, and not to see Python's own works, as
    `f.__globals__` does, or the frame of a generator."""

    def operate(value, *operands):
        asked = operands[0] if name.endswith("attr") else ""
        named = type(asked) is str and (asked[:2] != "__" or asked in NAMING)
        given = named and id(value) in my_numbers or name == "input"
        result = OPERATIONS[name](value, *operands) if given else None
        if not given or type(result).__name__ in WORKS:
            raise AttributeError(f"no {name} of {asked or 'that'} at the tests' end")
        return result

    return operate


_bind = bind


def bind(classes, names, rebound, heap):
    for name, coded in heap[3]:
        if name in classes and type(coded) is list and coded[0] == "handle" and coded[2] == "class":
            trusted.add(coded[1])
    _bind(classes, names, rebound, heap)
