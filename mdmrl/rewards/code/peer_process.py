"""The process that an end in CPython is: its channel, its JSON and its limits. It runs behind
`peer_cpython.py`, in the same namespace."""
# ruff: noqa: F821

import _json
import os

_ask = ask


def ask(target, args, kwargs):
    with lock:  # for programs with threads
        return _ask(target, args, kwargs)


def run(source):
    if "random" in source:  # so that the same program earns the same
        __import__("random").seed(0)
    exec(compile(source, "<program>", "exec"), namespace)


class Json:
    """What `json` gives its scanner to go by."""

    strict, object_hook, object_pairs_hook, memo = True, None, None, {}
    parse_int, parse_float, parse_constant = int, float, float


scan, text = _json.make_scanner(Json), _json.encode_basestring_ascii
chunks = _json.make_encoder(None, None, text, None, ": ", ", ", False, False, True)


def loads(line):
    return scan(line, 0)[0]


def dumps(value):
    return "".join(chunks(value, 0))


def send(message):
    view = memoryview(message.encode() + b"\n")
    while view:
        view = view[os.write(channel["fd"], view) :]
    line = channel["lines"].readline()
    if not line:
        os._exit(0)
    return line.decode()


def start(role, cpu, memory):
    """Keep the channel, give up the standard streams, and set the limits: here, inside the
    sandbox's own user namespace, so that processes are counted apart from those beside it."""
    import resource

    channel.update(fd=os.dup(0), lines=os.fdopen(os.dup(0), "rb"))
    null = os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    limits = {"AS": memory, "FSIZE": 2**24, "NPROC": 32, "NOFILE": 64, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    module = sys.modules[role] = type(sys)(role)
    vars(module).update(namespace, __name__=role)
    globals()["namespace"] = vars(module)
    serve()
