"""The child process that reads programs, for what `mdmrl.rewards.code.syntax` says of them."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import threading
from contextlib import suppress

from mdmrl.rewards.code import syntax

LONGEST_SOURCE = 2**16  # bytes
COMPILING = 10  # seconds
TRIES = 3


class Reader:
    """A context; one child, started when it is first needed and again whenever it is stuck. A
    source at which it ends is read again: it may have been ended from outside."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def inspected(self, source: str) -> dict:
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > LONGEST_SOURCE:
            return {"error": f"{size} bytes of source: expected at most {LONGEST_SOURCE}"}
        with self.lock:
            for _ in range(TRIES):
                line = self._answer(json.dumps(source).encode() + b"\n")
                if line is not None and line.endswith(b"\n"):
                    return json.loads(line)
                self.__exit__()
                if line is None:
                    break
        return {"error": "CPython does not get through it"}

    def _answer(self, line: bytes) -> bytes | None:
        """A line, or less of one where the child has ended; None where it is stuck."""
        if self.process is None:
            command = [sys.executable, "-I", "-S", syntax.__file__]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            streams["stderr"] = subprocess.DEVNULL
            self.process = subprocess.Popen(command, **streams, start_new_session=True)
        with suppress(OSError):
            self.process.stdin.write(line)
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline() if waiting.select(COMPILING) else None
