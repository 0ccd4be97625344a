"""The child process that reads programs, for what `mdmrl.rewards.code.syntax` says of them."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
from contextlib import suppress

from mdmrl.rewards.code import syntax

LONGEST_SOURCE = 2**16  # bytes
COMPILING = 10  # seconds


class Reader:
    """A context; one child, started when it is first needed and again whenever it is stuck."""

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
            if self.process is None:
                command = [sys.executable, "-I", "-S", syntax.__file__]
                streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
                streams["stderr"] = subprocess.DEVNULL
                self.process = subprocess.Popen(command, **streams, start_new_session=True)
            with suppress(OSError):
                self.process.stdin.write(json.dumps(source).encode() + b"\n")
            ready, _, _ = select.select([self.process.stdout], [], [], COMPILING)
            if ready and (line := self.process.stdout.readline()):
                return json.loads(line)
            self.__exit__()
        return {"error": "CPython does not get through it"}
