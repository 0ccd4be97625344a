"""One end of the channel between the tests and a program: the same file at both, in every box.

A message is a line of JSON and is answered by one. The ends take turns; while one runs, the other
waits, so that a call may be answered by a call back. What crosses is data: plain values, tagged
where JSON has no such value, subclasses reduced to the base's; for anything else a handle, whose
calls come back. A call's lists, dicts and sets are known to both ends by number, so that the caller
sees what was changed in place, and which of the results are the arguments themselves.

    load source                  run it among the program's, or the tests', names -> loaded | failed
    names [name]                 the values that these names have                 -> return
    bind dict [name]             give names values; which are classes for sure    -> loaded
    call target args kwargs      target: an operation, or one of the receiver's handles
    return value states          states: the contents of the call's containers
    raise error states           after a call too
    opaque                       this end cannot hold what came

Nothing here is secret, or safe from a program that shares its process with one end: whatever such
an end says, the other takes for data. It is written in what Monty knows of Python;
`peer_cpython.py` goes on where there is all of it, and `peer_process.py` behind that. `send(line)
-> line`, `dumps` and `loads` (JSON) are each box's own.
"""
# ruff: noqa: F821

INTEGERS = 10**18  # beyond it in hexadecimal, for which Python has no limit of digits
CALLABLES = ("function", "builtin_function_or_method", "partial", "_lru_cache_wrapper", "type")
CONTAINERS = {"list": list, "dict": dict, "set": set}
PASSED = "int float str bool list tuple dict set frozenset bytes len abs min max sum sorted any all"
PASSED += " ord chr repr round ... NotImplemented"  # by name, as in f(xs, key=len)
KNOWN = {name: eval(name) for name in PASSED.split()}
RAISED = "Exception BaseException SystemExit KeyboardInterrupt ArithmeticError OverflowError "
RAISED += "ZeroDivisionError LookupError IndexError KeyError RuntimeError NotImplementedError "
RAISED += "RecursionError AttributeError NameError ValueError ImportError ModuleNotFoundError "
RAISED += "OSError PermissionError FileNotFoundError AssertionError MemoryError StopIteration "
RAISED += "SyntaxError TimeoutError TypeError"
ERRORS = {name: eval(name) for name in RAISED.split()}

namespace = {"__name__": "solution"}  # so that no `if __name__ == "__main__":` runs
mine, my_numbers = [], {}  # what the other end holds handles of
theirs = {}  # by id, the numbers of what stands here for the other end's
kept = []  # so that no id is used again


class Crossing:
    """The containers of one call."""

    def __init__(self):
        self.objects, self.numbers = {}, {}

    def enter(self, number, container):
        if number != len(self.objects):
            raise ValueError("containers out of order")
        self.objects[number] = container
        self.numbers[id(container)] = number
        return container


def encode(value, call):
    kind = type(value)
    if value is None or value is True or value is False or kind is str:
        return value
    if kind is int:
        return value if -INTEGERS < value < INTEGERS else ["int", hex(value)]
    if kind is float:
        return value if value - value == 0 else ["float", str(value)]
    if kind is tuple or kind is frozenset:
        return [kind.__name__, [encode(item, call) for item in value]]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", encode(value.real, call), encode(value.imag, call)]
    if kind is list or kind is dict or kind is set:
        return encode_container(value, kind.__name__, call)
    if id(value) in theirs:
        return ["yours", theirs[id(value)]]
    for name in KNOWN:
        if value is KNOWN[name]:
            return ["known", name]
    return encode_more(value, call)


def encode_container(value, name, call):
    if id(value) in call.numbers:
        return ["same", call.numbers[id(value)]]
    number = len(call.objects)
    call.enter(number, value)
    return [name, number, contents(value, call)]


def contents(value, call):
    if isinstance(value, dict):
        return [[encode(key, call), encode(value[key], call)] for key in list(value)]
    return [encode(item, call) for item in value]


def encode_more(value, call):
    if isinstance(value, BaseException):
        return ["error", [type(value).__name__], [encode(item, call) for item in value.args]]
    if isinstance(value, tuple):
        return named_tuple(value, call)
    if isinstance(value, dict):  # Counter, defaultdict
        return encode_container(value, "dict", call)
    return handle(value, "callable" if type(value).__name__ in CALLABLES else "object")


def named_tuple(value, call):
    items = [encode(item, call) for item in value]
    return ["named", type(value).__name__, list(value._fields), items]


def handle(value, kind):
    if id(value) not in my_numbers:
        my_numbers[id(value)] = len(mine)
        mine.append(value)
    return ["handle", my_numbers[id(value)], kind]


def decode(value, call):
    return DECODERS.get(value[0], decode_more)(value, call) if type(value) is list else value


def decode_all(items, call):
    return [decode(item, call) for item in items]


def decode_container(value, call):
    container = CONTAINERS[value[0]]()
    return fill(call.enter(value[1], container), value[2], call)


def fill(container, items, call):
    """Give a container other contents; a set or dict whose contents stay is left as it is."""
    if isinstance(container, dict):
        pairs = [(decode(key, call), decode(item, call)) for key, item in items]
        if [key for key, _ in pairs] != list(container):
            container.clear()
        for key, item in pairs:
            container[key] = item
        return container
    found = decode_all(items, call)
    if not isinstance(container, set):
        container.clear()
        container.extend(found)
    elif set(found) != container:
        container.clear()
        container.update(found)
    return container


def decode_named(value, call):
    from collections import namedtuple

    return namedtuple(value[1], value[2])(*decode_all(value[3], call))


def decode_error(value, call):
    args = decode_all(value[2], call)
    for name in value[1]:
        if name in ERRORS:
            try:
                return ERRORS[name](*args)
            except Exception:  # Monty's take one text
                return ERRORS[name](str(args[0]) if len(args) == 1 else str(tuple(args)))
    return RuntimeError(str(value[1][0]))


def decode_more(value, call):
    if value[0] != "handle" or value[2] != "callable":
        send(dumps(["opaque"]))
    number = value[1]

    def remote(*args, **kwargs):
        return ask(["yours", number], args, kwargs)

    theirs[id(remote)] = number
    kept.append(remote)
    return remote


DECODERS = {
    "int": lambda value, call: int(value[1], 16),
    "float": lambda value, call: float(value[1]),
    "bytes": lambda value, call: bytes.fromhex(value[1]),
    "complex": lambda value, call: complex(*decode_all(value[1:], call)),
    "tuple": lambda value, call: tuple(decode_all(value[1], call)),
    "frozenset": lambda value, call: frozenset(decode_all(value[1], call)),
    "same": lambda value, call: call.objects[value[1]],
    "yours": lambda value, call: mine[value[1]],
    "known": lambda value, call: KNOWN[value[1]],
    "named": decode_named,
    "error": decode_error,
    "list": decode_container,
    "dict": decode_container,
    "set": decode_container,
}


def ask(target, args, kwargs):
    """Have the other end call what is its own, and answer what it calls meanwhile."""
    call = Crossing()
    given = [encode(item, call) for item in args]
    named = [[name, encode(kwargs[name], call)] for name in kwargs]
    known = list(call.objects)
    reply = loads(send(dumps(["call", target, given, named])))
    while reply[0] == "call":
        reply = loads(send(dumps(answer(reply))))
    value = decode(reply[1], call)
    for number, items in reply[2]:
        if number in known:
            fill(call.objects[number], items, call)
    if reply[0] != "raise":
        return value
    if isinstance(value, StopIteration) and target[1] != "next":  # else it would end our loops
        raise RuntimeError("StopIteration")
    raise value


def answer(message):
    call = Crossing()
    try:
        function, kwargs = operation(message[1]), {}
        args = decode_all(message[2], call)
        for name, item in message[3]:
            kwargs[name] = decode(item, call)
        given = list(call.objects)
        try:
            value, kind = function(*args, **kwargs), "return"
        except BaseException as error:
            value, kind = error, "raise"
        reply = [kind, encode_result(function, value, call)]
        return [*reply, [[number, contents(call.objects[number], call)] for number in given]]
    except BaseException as error:  # of what came, or of what is to go
        return ["raise", ["error", [type(error).__name__, "RuntimeError"], [str(error)]], []]


def operation(target):
    return decode(target, None)


def encode_result(function, value, call):
    return encode(value, call)


def run(source):
    exec(source, namespace)


def bind(values, classes):
    namespace.update(values)


def perform(message):
    call = Crossing()
    if message[0] == "call":
        return answer(message)
    try:
        if message[0] == "names":
            found = {name: namespace[name] for name in message[1] if name in namespace}
            return ["return", encode(found, call), []]
        if message[0] == "bind":
            bind(decode(message[1], call), message[2])
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
