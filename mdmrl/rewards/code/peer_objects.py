"""What stands at one end for the objects and classes of the other, and what is asked of this end
for the other's: behind `peer_cpython.py`, in its namespace. What the program asks of the tests' end
is to call what the tests gave it, or an operation on that, but for the attributes by which Python
shows its own works.
"""
# ruff: noqa: F821

import _thread

NAMING = ("__name__", "__qualname__", "__doc__", "__module__")
PYTHONS = "getattr setattr delattr hasattr isinstance issubclass repr str format"
MORE_THAN_METHODS = (type, property, staticmethod, classmethod)
KEPT = {"__repr__", "__str__", "__format__", "__call__"}  # of any class's own
trusted = set()  # numbers of classes that the tests use as such
built = set()  # numbers of objects that the tests have called a class, or computed, for
stopping = set()  # numbers of methods that may end a loop
lock = _thread.RLock()


def apply(name, *operands):
    return ask(["operation", name], operands, {})


def asking(name):
    """A method that is an operation at the other end."""
    return lambda self, *operands: apply(name, self, *operands)


class Meta(type):
    """Of the classes that stand for the other end's."""

    def __new__(meta, name, bases, names):
        """A class of the tests' that extends one of the program's: made at the program's end."""
        own = {k: x for k, x in names.items() if k[:2] != "__" or callable(x)}
        if "__classcell__" in names or any(isinstance(x, MORE_THAN_METHODS) for x in own.values()):
            give_up()  # the first is of `super()`
        made = apply("subclass", name, bases, own)
        trusted.add(theirs[id(made)])
        return made

    def __call__(self, /, *args, **kwargs):
        made = ask(["yours", theirs[id(self)]], args, kwargs)
        built.add(theirs.get(id(made)))
        return made

    def __getattr__(self, name):
        return attribute(self, name)

    def __instancecheck__(self, instance):
        told = type.__instancecheck__(self, instance)
        return told or (is_remote(instance) and apply("isinstance", instance, self))

    def __subclasscheck__(self, kind):
        told = type.__subclasscheck__(self, kind)
        return told or (isinstance(kind, Meta) and apply("issubclass", kind, self))

    __setattr__, __getitem__ = asking("setattr"), asking("getitem")
    __iter__, __len__, __contains__ = map(asking, ("__iter__", "__len__", "__contains__"))


class Remote:
    """An object of the other end."""

    __slots__ = ()

    def __getattr__(self, name):
        if state["judging"] and name in PREDICATES and not is_trusted(self):
            return doubted_method(self, name)
        return attribute(self, name)

    __setattr__, __delattr__, __copy__ = asking("setattr"), asking("delattr"), asking("copy")
    __repr__, __str__, __format__ = asking("repr"), asking("str"), asking("format")

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
    if not all(isinstance(base, Meta) or base in DATA or is_native(base) for base in bases):
        raise TypeError("no class to extend")
    if not any(isinstance(base, Meta) for base in bases):
        bases.append(Remote)
    names, real = {"__slots__": (), "__module__": known[0] or "solution"}, standard(*known)
    names["__doc__"] = property(lambda self: attribute(self, "__doc__"))
    has_data = base_of(data) or base_of(data, DATA)
    for special, is_there in specials:
        native = getattr(data, special, None) if has_data and special not in KEPT else None
        if special == "__hash__":
            names[special] = (lambda self: hashes[theirs[id(self)]]) if is_there else None
        elif special in FORWARDED:
            names[special] = forwarded(special, native) if is_there else None
    if isinstance(real, type):
        names["__class__"] = property(lambda self: real)
    made = type.__new__(Meta, name, tuple(bases), names)
    if any(theirs.get(id(base)) in trusted for base in made.__mro__):
        trusted.add(number)
    return made


def is_remote(value):
    return isinstance(type(value), Meta)


def is_trusted(remote):
    return theirs[id(type(remote))] in trusted


def is_meant(remote):
    """Whether the tests have made it by themselves, so that it is in no answer's place."""
    return is_trusted(remote) and theirs[id(remote)] in built


def attribute(remote, name):
    if name == "__dataclass_fields__" and apply("hasattr", remote, name):
        made = __import__("dataclasses").make_dataclass("C", apply("fields", remote))
        return made.__dataclass_fields__
    found = apply("getattr", remote, name)
    if name in ("send", "throw", "__next__") and id(found) in theirs:
        stopping.add(theirs[id(found)])
    return found


def may_stop(target):
    return target[1] in ("__next__", "__anext__", "await") or target[1] in stopping


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
            if name in ("__exit__", "__aexit__") and is_due(*operands[1:]):
                if name == "__exit__":
                    apply(name, self, *operands)
                raise operands[1]
        if name == "__call__":
            return ask(["yours", theirs[id(self)]], operands, named)
        return apply(name, self, *operands)

    return forward


def stands_for(made, coded):
    number = coded[1]
    remotes[number], hashes[number], theirs[id(made)] = made, coded[4], number
    return made


def decode_handle(value):
    number, how = value[1:3]
    if how == "class":
        return remotes[number]
    if len(value) == 3:  # from Monty, of which only functions are known
        return decode_more(value)
    if how == "coroutine":
        return awaited(number, value)
    if number not in remotes:
        stands_for(object.__new__(decode(value[3])), value)
    hashes[number] = value[4]
    return remotes[number]


def decode_valued(value):
    if value[1] not in remotes:
        data = decode(value[5])
        if type(data) not in DATA:
            raise TypeError("no data")
        stands_for(type(data).__new__(decode(value[3]), data), value)
    return remotes[value[1]]


async def awaited(number, value):
    return apply("await", stands_for(object.__new__(decode(value[3])), value))


DECODERS.update(handle=decode_handle, valued=decode_valued)


# -- what is asked of this end ---------------------------------------------------------------------


def missing(value, *others):
    return NotImplemented


def special_method(name):
    """Alone, whose NotImplemented the caller's end acts on."""
    return lambda value, *others: getattr(type(value), name, missing)(value, *others)


def method(value):
    return (lambda *args, **named: value(*args, **named)) if callable(value) else value


async def result_of(awaitable):
    return await awaitable


OPERATIONS = {name: special_method(name) for name in FORWARDED}
OPERATIONS |= {
    **{name: getattr(builtins, name) for name in PYTHONS.split()},
    "getitem": lambda value, item: value[item],
    "copy": lambda value: __import__("copy").copy(value),
    "deepcopy": lambda value: __import__("copy").deepcopy(value),
    "await": lambda value: __import__("asyncio").run(result_of(value)),
    "fields": lambda value: [*value.__dataclass_fields__],
    "subclass": lambda name, bases, own: type(bases[0])(
        name, bases, {key: method(value) for key, value in own.items()}
    ),
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
        given = (named and id(value) in my_numbers) or name == "input"
        if given and name == "setattr" and (isinstance(value, type) or callable(operands[1])):
            give_up()  # what the tests' own methods say, it could say then
        result = OPERATIONS[name](value, *operands) if given else None
        if not given or type(result).__name__ in WORKS:
            raise AttributeError(f"no {name} of {asked or 'that'} at the tests' end")
        return result

    return operate


_bind = bind


def bind(classes, names, rebound, given, heap):
    for name, coded in heap[3]:
        if name in classes and type(coded) is list and coded[0] == "handle" and coded[2] == "class":
            trusted.add(coded[1])
    _bind(classes, names, rebound, given, heap)
