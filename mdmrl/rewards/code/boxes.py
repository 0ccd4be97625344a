"""Boxes: where a program runs, out of reach of everything but the messages of `peer.py`.

A box is a function of one signature, so that others plug in a service of their own:

    with box(limits, workers) as session:       # for a batch; at most `workers` programs at a time
        with session(role) as turn:             # role: "solution", or "tests" for the other end
            line = turn(line, deadline)         # a message, as one line of JSON, to the next

`session` gives a fresh interpreter that runs `peer.py`, and `turn` raises `Ended` where no message
comes by the deadline (of `time.monotonic`), or ever. This module has the box `monty`;
`mdmrl.rewards.code.sandbox` has `bubblewrap`, and `process_session` for whatever command starts a
Python.
"""

from __future__ import annotations

import os
import shlex
import string
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from threading import Event

from mdmrl.config import require

LONGEST_MESSAGE = 2**25  # characters
PATIENCE = 6
STARTING = 60  # seconds for an interpreter to start on a busy machine
PEER = Path(__file__).with_name("peer.py").read_text()
Turn = Callable[[str, float], str]
Session = Callable[[str], AbstractContextManager[Turn]]

_CHANNEL = "__channel__"
_START = f"import json\nsend, dumps, loads = {_CHANNEL}, json.dumps, json.loads\n{PEER}\nserve()"


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


@contextmanager
def monty(limits: Limits, workers: int) -> Iterator[Session]:
    """pydantic-monty: an interpreter without an operating system, on every platform, without
    privileges. A fresh process for each program, so that none sees another's remains. On Linux the
    kernel limits its processor time, and a longer wall limit is that of sleep: what computes on a
    busy machine has `PATIENCE` times as long."""
    import pydantic_monty

    closing = Event()
    # `import string`, which Monty lacks, as far as programs want it.
    constants = {name: value for name, value in vars(string).items() if isinstance(value, str)}
    path, script = _limited_binary(limits.cpu)
    wall = limits.wall * (1 if script is None or limits.wall <= limits.cpu else PATIENCE)
    late = wall - limits.wall
    seconds = {"max_feed_duration_secs": wall, "max_suspensions": 10**7}
    rules = {
        "limits": {**seconds, "max_memory": limits.memory * 2**20},
        "external_modules": {"string": pydantic_monty.ExternalModule(constants)},
        "os_policy": {"random_start": {"seed": 0}, "sleep_system_max": float("inf")},
    }

    @contextmanager
    def session(role: str) -> Iterator[Turn]:
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(pools[role].checkout(**rules))
                state = opened.feed_start(
                    _START,
                    print_callback=lambda stream, text: None,
                    external_lookup={_CHANNEL: print},
                )
                state, _ = _next_message(state, time.monotonic() + STARTING, late, closing)
            except (pydantic_monty.MontyError, OSError) as error:
                raise Ended("infra_error", f"Monty does not start: {error}") from error

            def turn(line: str, deadline: float) -> str:
                nonlocal state
                try:
                    state = state.resume({"return_value": line})
                    state, reply = _next_message(state, deadline, late, closing)
                except pydantic_monty.MontyError as error:
                    raise _monty_ended(error) from None
                return reply

            yield turn

    size = {"min_processes": min(workers, 2), "max_processes": workers}
    alone = {"binary_path": path, "max_checkouts_per_worker": 1, "request_timeout": wall}
    try:
        with (
            pydantic_monty.Monty(**size, **alone) as programs,
            pydantic_monty.Monty(**size, request_timeout=limits.wall) as tests,
        ):
            pools = {"solution": programs, "tests": tests}
            yield session
    finally:
        closing.set()  # whoever sleeps in a program's place
        if script is not None:
            os.close(script)


def _next_message(state, deadline: float, late: float, closing: Event) -> tuple:
    """Run on to the next message, as late as that behind the deadline if nothing sleeps: the
    suspended state, and the message."""
    while True:
        name = getattr(state, "function_name", None)
        if asleep := name == "system.sleep":
            closing.wait(max(0.0, min(float(state.args[0]), deadline - time.monotonic() + 0.01)))
        if closing.is_set() or time.monotonic() > deadline + late * (not asleep):
            raise Ended("timeout", "the program took too long")
        if name == _CHANNEL:
            message = state.args[0] if state.args else None
            if not (isinstance(message, str) and len(message) <= LONGEST_MESSAGE):
                raise Ended("runtime", "the program's answer is no message, or too long")
            return state, message
        if asleep:
            state = state.resume({"return_value": None})
        elif hasattr(state, "resume_auto"):
            state = state.resume_auto()
        else:
            raise Ended("runtime", "the program left the channel")


def _monty_ended(error) -> Ended:
    """What became of the program by the error that Monty raised."""
    kind, said = type(error.exception()).__name__, str(error)
    if SIGXCPU.name in said:
        return Ended("timeout", "the program took too much processor time")
    if getattr(error, "timed_out", False) or "time limit" in said:
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
