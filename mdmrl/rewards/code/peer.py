"""One end of the channel between the tests and a program: the same file at both, in every box.

A message is one line of JSON and is answered by one. The ends take turns; while one runs, the other
waits, so that a call may be answered by a call back. What crosses is data: plain values, tagged
where JSON has no such value, subclasses reduced to the base's; for anything else a handle, whose
calls come back. A call's lists, dicts and sets are known to both ends by number, so that the caller
sees what was changed in place, and which of the results are the arguments themselves.

    load source                  run it in the program's or the tests' namespace -> loaded | failed
    names [name]                 the values of these globals                     -> return
    bind dict                    make them globals here                          -> loaded
    call target args kwargs      target: an operation, or one of the receiver's handles
    return value states          states: the contents of the call's containers
    raise error states           after a call too
    opaque                       this end cannot hold what came

Nothing here is secret, or safe from a program that shares its process with one end: whatever such
an end says, the other takes for data. It is written in what Monty knows of Python;
`peer_cpython.py` goes on where there is all of it. `send(line) -> line`, `dumps` and `loads` (JSON)
are each box's own.
"""
# ruff: noqa: F821

INTEGERS = 10**18  # beyond it in hexadecimal, for which Python has no limit of digits
CALLABLES = ("function", "builtin_function_or_method", "partial", "_lru_cache_wrapper", "type")
KNOWN = {  # values that are passed by name, as in f(xs, key=len)
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple,
    "dict": dict, "set": set, "frozenset": frozenset, "bytes": bytes, "len": len, "abs": abs,
    "min": min, "max": max, "sum": sum, "sorted": sorted, "any": any, "all": all, "ord": ord,
    "chr": chr, "repr": repr, "round": round, "...": ..., "NotImplemented": NotImplemented,
}  # fmt: skip
ERRORS = {
    "Exception": Exception, "BaseException": BaseException, "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt, "ArithmeticError": ArithmeticError,
    "OverflowError": OverflowError, "ZeroDivisionError": ZeroDivisionError,
    "LookupError": LookupError, "IndexError": IndexError, "KeyError": KeyError,
    "RuntimeError": RuntimeError, "NotImplementedError": NotImplementedError,
    "RecursionError": RecursionError, "AttributeError": AttributeError, "NameError": NameError,
    "ValueError": ValueError, "ImportError": ImportError, "OSError": OSError,
    "ModuleNotFoundError": ModuleNotFoundError, "PermissionError": PermissionError,
    "FileNotFoundError": FileNotFoundError, "AssertionError": AssertionError,
    "MemoryError": MemoryError, "StopIteration": StopIteration, "SyntaxError": SyntaxError,
    "TimeoutError": TimeoutError, "TypeError": TypeError,
}  # fmt: skip

namespace = {"__name__": "solution"}  # so that no `if __name__ == "__main__":` runs
mine = []  # what the other end holds handles of, by number
my_numbers = {}
their_numbers = {}  # by id, of what stands here for the other end's
kept = []  # so that no id is used again


class Crossing:
    """The containers of one call."""

    def __init__(self):
        self.objects = {}
        self.numbers = {}

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
    if id(value) in their_numbers:
        return ["yours", their_numbers[id(value)]]
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
    if type(value) is not list:
        return value
    tag = value[0]
    if tag == "int":
        return int(value[1], 16)
    if tag == "float":
        return float(value[1])
    if tag == "tuple":
        return tuple([decode(item, call) for item in value[1]])
    if tag == "frozenset":
        return frozenset([decode(item, call) for item in value[1]])
    if tag == "bytes":
        return bytes.fromhex(value[1])
    if tag == "complex":
        return complex(decode(value[1], call), decode(value[2], call))
    if tag == "list" or tag == "dict" or tag == "set":
        empty = [] if tag == "list" else {} if tag == "dict" else set()
        return fill(call.enter(value[1], empty), value[2], call)
    if tag == "same":
        return call.objects[value[1]]
    if tag == "yours":
        return mine[value[1]]
    if tag == "known":
        return KNOWN[value[1]]
    return decode_more(value, call)


def fill(container, items, call):
    """Give a container other contents; those of a set or dict that stay, stay in place."""
    if isinstance(container, dict):
        pairs = [(decode(key, call), decode(item, call)) for key, item in items]
        if [key for key, _ in pairs] != list(container):
            container.clear()
        for key, item in pairs:
            container[key] = item
    elif isinstance(container, set):
        found = {decode(item, call) for item in items}
        if found != container:
            container.clear()
            container.update(found)
    else:
        found = [decode(item, call) for item in items]
        container.clear()
        container.extend(found)
    return container


def decode_more(value, call):
    tag = value[0]
    if tag == "error":
        return make_error(value, call)
    if tag == "named":
        from collections import namedtuple

        items = [decode(item, call) for item in value[3]]
        return namedtuple(value[1], value[2])(*items)
    if tag == "handle" and value[2] == "callable":
        number = value[1]

        def remote(*args, **kwargs):
            return ask(["yours", number], args, kwargs)

        their_numbers[id(remote)] = number
        kept.append(remote)
        return remote
    send(dumps(["opaque"]))
    raise ValueError("no such value here")


def make_error(value, call):
    args = [decode(item, call) for item in value[2]]
    for name in value[1]:
        if name in ERRORS:
            try:
                return ERRORS[name](*args)
            except Exception:  # Monty's take one text
                return ERRORS[name](str(args[0]) if len(args) == 1 else str(tuple(args)))
    return RuntimeError(str(value[1][0]))


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
    if reply[0] == "raise":
        raise value
    return value


def answer(message):
    call = Crossing()
    try:
        function = operation(message[1])
        args = [decode(item, call) for item in message[2]]
        kwargs = {name: decode(item, call) for name, item in message[3]}
        given = list(call.objects)
        try:
            value, kind = function(*args, **kwargs), "return"
        except BaseException as error:
            value, kind = error, "raise"
        reply = [kind, encode_result(function, value, call)]
        reply.append([[n, contents(call.objects[n], call)] for n in given])
        return reply
    except BaseException as error:  # of what came, or of what is to go
        return ["raise", ["error", [type(error).__name__, "RuntimeError"], [str(error)]], []]


def operation(target):
    return decode(target, None)


def encode_result(function, value, call):
    return encode(value, call)


def run(source):
    exec(source, namespace)


def bind(values):
    namespace.update(values)


def perform(message):
    call = Crossing()
    if message[0] == "call":
        return answer(message)
    if message[0] == "names":
        found = {name: namespace[name] for name in message[1] if name in namespace}
        return ["return", encode(found, call), []]
    try:
        if message[0] == "bind":
            bind(decode(message[1], call))
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
