"""One end of the channel between the tests and a program: the same file at both, in every box.

A message is a line of JSON and is answered by one. The ends take turns; while one runs, the other
waits, so that a call may be answered by a call back. What crosses is data: plain values, tagged
where JSON has no such value; for anything else a handle, whose calls come back. Lists, dicts, sets
and their like are shared: both ends hold a copy of each and know it by number, and a message tells
what has changed in any of them since the one before, as what the program's names stand for, so that
either end sees what the other did, however long ago it got hold of it.

    load source                  run it among the program's, or the tests', names -> loaded | failed
    names [name] [name]          from now on tell of these, and hear of those     -> names
    bind classes [name] * 3      what tests use as classes, ask for, set, give    -> loaded
    call target args kwargs      target: an operation, or one of the receiver's handles
    return value, raise error    the answers to it
    opaque                       this end cannot hold what came, or not judge it

All but the first and the last end in a `heap` (`packed`). Nothing here is secret, or safe from
a program that shares its process with one end: whatever such an end says, the other takes for data.
It is written in what Monty knows of Python; `peer_cpython.py` goes on where there is all of it, and
`peer_process.py` behind that. `send(line) -> line`, `dumps` and `loads` (JSON) are each box's own.
"""
# ruff: noqa: F821

INTEGERS = 10**18  # beyond it in hexadecimal, for which Python has no limit of digits
CALLABLES = ("function", "builtin_function_or_method", "partial", "_lru_cache_wrapper", "type")
CONTAINERS = {"list": list, "dict": dict, "set": set}
COLLECTIONS = ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple")
SHARED = 8  # as many containers, where it cannot be told which are still in use
PASSED = "int float str bool list tuple dict set frozenset bytes len abs min max sum sorted any all"
PASSED += " ord chr repr round ... NotImplemented"  # by name, as in f(xs, key=len)
RAISED = """Exception BaseException SystemExit KeyboardInterrupt ArithmeticError OverflowError
ZeroDivisionError LookupError IndexError KeyError RuntimeError NotImplementedError RecursionError
AttributeError NameError ValueError ImportError ModuleNotFoundError OSError PermissionError
FileNotFoundError AssertionError MemoryError StopIteration SyntaxError TimeoutError TypeError"""
KNOWN = {name: eval(name) for name in f"{PASSED} {RAISED}".split()}
KNOWN["NoneType"] = type(None)
ERRORS = {name: KNOWN[name] for name in RAISED.split()}

namespace = {"__name__": "solution"}  # so that no `if __name__ == "__main__":` runs
mine, my_numbers = [], {}  # what the other end holds handles of
theirs = {}  # by id, the numbers of what stands here for the other end's
kept = []  # so that no id is used again
shared, numbers = {}, {}  # containers by number, and the numbers by id
told = {}  # by number, what was in it when last told or heard of
fresh = []  # numbers that the other end has not heard of yet
gone = []  # numbers that it may forget
counts = {"shared": 0, "depth": 0, "bound": []}
watched = {}  # names whose values are told, and the values that were
heard = {}  # the same of the other end's


def encode(value):
    kind = type(value)
    if value is None or value is True or value is False or kind is str:
        return value
    if kind is int:
        return value if -INTEGERS < value < INTEGERS else ["int", hex(value)]
    if kind is float:
        return value if value - value == 0 else ["float", str(value)]
    if kind is tuple or kind is frozenset:
        return [kind.__name__, [encode(item) for item in value]]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", encode(value.real), encode(value.imag)]
    if id(value) in theirs:
        return ["yours", theirs[id(value)]]
    if container_type(kind.__name__) is kind:
        return ["shared", number_of(value)]
    for name in KNOWN:
        if value is KNOWN[name]:
            return ["known", name]
    return encode_more(value)


def container_type(name):
    if name not in CONTAINERS and name in COLLECTIONS:
        import collections

        CONTAINERS[name] = getattr(collections, name, None)
    return CONTAINERS.get(name)


def number_of(container):
    if id(container) not in numbers:
        fresh.append(enter(container))
    return numbers[id(container)]


def enter(container):
    number = counts["shared"]
    counts["shared"] = number + 1
    shared[number] = container
    numbers[id(container)] = number
    return number


def leave(number):
    numbers.pop(id(shared.pop(number)))
    told.pop(number, None)


def encode_more(value):
    if isinstance(value, BaseException):
        return ["error", [type(value).__name__], [encode(item) for item in value.args]]
    if isinstance(value, tuple):
        fields = [encode(item) for item in value]
        return ["named", type(value).__name__, list(value._fields), fields]
    return handle(value, "callable" if type(value).__name__ in CALLABLES else "object")


def handle(value, kind):
    if id(value) not in my_numbers:
        my_numbers[id(value)] = len(mine)
        mine.append(value)
    return ["handle", my_numbers[id(value)], kind]


def kind_of(container, name=None):
    """What makes an empty one: its type's name, and what else that takes."""
    name = name or type(container).__name__
    more = container.maxlen if name == "deque" else None
    return [name, encode(container.default_factory) if name == "defaultdict" else more]


def contents(container):
    """Whether its items, a dict's keys before its values, are as JSON has them; and these."""
    return [False, [encode(item) for item in items_of(container)]]


def items_of(container):
    if isinstance(container, dict):
        return [*list(container), *list(container.values())]
    return list(container)


def same(items, others):
    return len(items) == len(others) and all([a is b for a, b in zip(items, others, strict=True)])


def packed(*message):
    """A message with its heap: containers that are new to the other end, as number, kind and
    contents; those that have changed, as number and contents; those that it may forget; and names
    whose values have changed."""
    first = fresh[0] if fresh else counts["shared"]
    try:
        found = {name: namespace[name] for name in watched if name in namespace}
        found = {name: found[name] for name in found if found[name] is not watched[name]}
        names = [[name, encode(found[name])] for name in found]
        changes = [n for n in told if not same(items_of(shared[n]), told[n])]
        changes = [[number, contents(shared[number])] for number in changes]
        # `fresh` grows meanwhile.
        news = [[number, kind_of(shared[number]), contents(shared[number])] for number in fresh]
    except BaseException:
        for number in range(first, counts["shared"]):
            leave(number)
        counts["shared"] = first
        fresh.clear()
        raise
    for number, *_ in [*changes, *news]:
        told[number] = items_of(shared[number])
    watched.update(found)
    heap = [news, changes, list(gone), names]
    fresh.clear()
    gone.clear()
    return [*message, heap]


def forget():
    """Stop sharing what nobody holds any more: here, the oldest but what has a name."""
    named = [id(namespace[name]) for name in counts["bound"] if name in namespace]
    for number in list(shared)[:-SHARED]:
        if id(shared[number]) not in named:
            gone.append(number)
            leave(number)


def decode(value):
    return DECODERS.get(value[0], decode_more)(value) if type(value) is list else value


def decode_all(items):
    return [decode(item) for item in items]


def unpack(heap):
    news, changes, forgotten, names = heap[:4]
    for number, kind, _ in news:
        if number != enter(made_container(*kind)):
            raise ValueError("containers out of order")
    for number, *_, items in [*news, *changes]:
        fill(shared[number], items)
        told[number] = items_of(shared[number])
    for number in forgotten:
        leave(number)
    for name, value in names:
        if name in counts["bound"] and namespace.get(name) is heard.get(name):  # not set here
            namespace[name] = heard[name] = decode(value)


def made_container(name, more, *own):
    make = container_type(name)
    given = {"deque": [[], more], "defaultdict": [decode(more)]}.get(name, [])
    return make_own(make, given, *own) if own or not make else make(*given)


def make_own(make, given, own=None):
    give_up()


def fill(container, coded):
    """Give a container other contents; a set or dict whose contents stay is left as it is."""
    items = coded[1] if coded[0] else decode_all(coded[1])
    if isinstance(container, dict):
        keys, values = items[: len(items) // 2], items[len(items) // 2 :]
        if keys != list(container):
            container.clear()
        for index in range(len(keys)):
            container[keys[index]] = values[index]
    elif not isinstance(container, set):
        container.clear()
        container.extend(items)
    elif set(items) != container:
        container.clear()
        container.update(items)


def decode_error(value):
    args = decode_all(value[2])
    for name in value[1]:
        if name in ERRORS:
            try:
                return ERRORS[name](*args)
            except Exception:  # Monty's take one text
                return ERRORS[name](str(args[0]) if len(args) == 1 else str(tuple(args)))
    return RuntimeError(str(value[1][0]))


def decode_more(value):
    if value[0] != "handle" or value[2] != "callable":
        give_up()
    number = value[1]

    def remote(*args, **kwargs):
        return ask(["yours", number], args, kwargs)

    theirs[id(remote)] = number
    kept.append(remote)
    return remote


def give_up():
    """The tests, or the program, need more than this judge has."""
    send(dumps(["opaque"]))


DECODERS = {
    "int": lambda value: int(value[1], 16),
    "float": lambda value: float(value[1]),
    "bytes": lambda value: bytes.fromhex(value[1]),
    "complex": lambda value: complex(*decode_all(value[1:])),
    "tuple": lambda value: tuple(decode_all(value[1])),
    "frozenset": lambda value: frozenset(decode_all(value[1])),
    "shared": lambda value: shared[value[1]],
    "yours": lambda value: mine[value[1]],
    "known": lambda value: KNOWN[value[1]] if value[1] in KNOWN else give_up(),
    "named": lambda value: container_type("namedtuple")(*value[1:3])(*decode_all(value[3])),
    "error": decode_error,
}


def ask(target, args, kwargs):
    """Have the other end call what is its own, and answer what it calls meanwhile."""
    if not counts["depth"]:
        forget()
    given = [encode(item) for item in args]
    named = [[name, encode(kwargs[name])] for name in kwargs]
    reply = loads(send(dumps(packed("call", target, given, named))))
    while reply[0] == "call":
        reply = loads(send(dumps(answer(reply))))
    unpack(reply[-1])
    value = decode(reply[1])
    for item, code in zip(args, given, strict=True):
        # `f(x) is x`, of what is no container either; the numbers of handles are each end's own.
        if code == reply[1] and not ('"handle"' in dumps(code) or '"yours"' in dumps(code)):
            value = item if dumps(code) == dumps(reply[1]) else value
    if reply[0] != "raise":
        return value
    if isinstance(value, StopIteration) and not may_stop(target):  # it would end our loops
        raise RuntimeError("StopIteration")
    raise value


operation = decode


def may_stop(target):
    return False


def answer(message):
    counts["depth"] += 1
    try:
        unpack(message[-1])
        function, args = operation(message[1]), decode_all(message[2])
        kwargs = {name: decode(item) for name, item in message[3]}
        try:
            value, kind = function(*args, **kwargs), "return"
        except BaseException as error:
            value, kind = error, "raise"
        return packed(kind, encode(value))
    except BaseException as error:  # of what came, or of what is to go
        return packed("raise", encode(RuntimeError(f"{type(error).__name__}: {error}")))
    finally:
        counts["depth"] -= 1


def run(source):
    exec(source, namespace)


def bind(classes, names, rebound, given, heap):
    watched.update({name: watched for name in given})  # no value of theirs
    counts["bound"] = names
    unpack(heap)
    counts["bound"] = [name for name in names if name not in rebound]


def perform(message):
    if message[0] == "call":
        return answer(message)
    try:
        if message[0] == "names":
            watched.update({name: watched for name in message[1]})
            counts["bound"] = message[2]
            return packed("names")
        if message[0] == "bind":
            bind(*message[1:])
        else:
            run(message[1])
    except BaseException as error:
        name = "AssertionError" if isinstance(error, AssertionError) else type(error).__name__
        return ["failed", name, str(error)[:2000]]
    return ["loaded"]


def serve():
    message = ["loaded"]
    while True:
        message = perform(loads(send(dumps(message))))
