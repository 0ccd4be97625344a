"""The process that an end in CPython is: its channel, its JSON and its limits. It runs behind
`peer_cpython.py`, in the same namespace."""
# ruff: noqa: F821

import _json
import io
import os

PRINTED = 2**16  # bytes at a time

channel = {}
sources = {}  # by the name of the file that each seems to be in


def run(source):
    if state["judging"]:  # what it knows and the program does not
        draws["state"] ^= hash(source) % 2**63
    if "random" in source:  # so that the same program earns the same
        __import__("random").seed(0)
    path = f"<program{len(sources) or ''}>"
    sources[path] = source
    if "inspect" in source:
        lines = source.splitlines(keepends=True)
        __import__("linecache").cache[path] = len(source), None, lines, path
    exec(compile(source, path, "exec", dont_inherit=True), namespace)


class Output(io.BytesIO):
    """What is printed here, for who takes it in at the other end, and not more than that."""

    def write(self, text):
        if self.tell() < PRINTED:
            super().write(text)
        return len(text)


def printed():
    text = channel["output"].getvalue().decode("utf-8", "replace")
    channel["output"].seek(0)
    channel["output"].truncate()
    return text


def asked_for_input(*prompt):
    if not counts["depth"]:
        raise EOFError("EOF when reading a line")
    return apply("input", None, *prompt)


class Json:
    """What `json` gives its scanner to go by."""

    strict, object_hook, object_pairs_hook, memo = True, None, None, {}
    parse_int, parse_float, parse_constant = int, float, float


scan, text = _json.make_scanner(Json), _json.encode_basestring_ascii
chunks = _json.make_encoder(None, None, text, None, ":", ",", False, False, True)


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
    channel["output"] = Output()
    options = {"encoding": "utf-8", "errors": "replace", "write_through": True}
    channel["printed"] = sys.stdout = io.TextIOWrapper(channel["output"], **options)
    state["judging"] = role == "tests"
    if not state["judging"]:
        builtins.input = asked_for_input
    module = sys.modules[role] = type(sys)(role)
    vars(module).update(namespace, __name__=role, __file__=f"/tmp/{role}.py")
    globals()["namespace"] = vars(module)
    serve()
