r"""Mathematics: whether the answer of a completion equals a reference in LaTeX.

The answer is the marked one (`mdmrl.rewards.answers`), or the whole completion where it is nothing
else: one line of symbols, without prose. Then, by the reference:

* A number ("7", "\frac{3}{4}", "-1.5"): the answer must be one too (`plain_number`), of the same
  value, perhaps behind "x =" or before a unit or "\pmod{7}". What has yet to be worked out is no
  answer, so that "3/4 + 5/6", "\sqrt{16}" or "2^3" repeat the question and are wrong.
* Words ("\text{Evelyn}"): the same words.
* Anything else (radicals, tuples, intervals, sets, polynomials): equal for math-verify.

math-verify runs in a worker process, one for each process that asks, started at the first such
question; apart from that start no answer takes a second. An answer that takes longer is wrong.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from mdmrl.rewards.answers import (
    LONGEST,
    answer_reward,
    marked_answer,
    plain_number,
    plain_text,
    unwrapped,
    written,
)

LIMIT = 0.9  # seconds for a reply; the worker's own limit is below
START = 120  # seconds for math-verify to be imported on a busy machine

_COMMAND = re.compile(r"\\[A-Za-z]+")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}")
_FUNCTIONS = "pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod|inf|infinity|frac"
_WORD = re.compile(rf"\b(?!(?:{_FUNCTIONS})\b)[^\W\d_]{{3,}}")
# Letters that are no unit: a variable, the imaginary unit, a function.
_SYMBOL = re.compile(rf"(?<![^\W\d_])(?:[^\W\d_]|{_FUNCTIONS})(?![^\W\d_])|!")
_MODULUS = re.compile(r"\s*\(?\s*\\?[pb]?mod\s*\{?\s*(\d{1,9})\s*\}?\s*\)?\s*\Z", re.ASCII)


def maths_right(completion: str | list[dict], answer: str) -> bool:
    """Whether the answer that a completion gives equals `answer`, a reference in LaTeX.

    Raises:
        RuntimeError: the worker process cannot be started.
    """
    text = written(completion)
    given = marked_answer(text)
    if given is None:
        given = text.strip()
        if len(given) > LONGEST or "\n" in given or _WORD.search(_COMMAND.sub(" ", given)):
            return False
    if not 0 < len(given) <= LONGEST:
        return False
    reference = str(answer)
    expected = plain_number(reference)
    if expected is not None:
        return _number(given) == expected
    if _same(given) == _same(reference):
        return True
    if _WORD.search(_COMMAND.sub(" ", plain_text(reference))):
        return False
    # math-verify takes six digits of a value for the value, and one of several boxes.
    decimals = re.search(r"\d\.\d", given) and not re.search(r"\d\.\d", reference)
    if decimals or "boxed" in given:
        return False
    return _worker.agree(reference.replace("$", ""), unwrapped(given).replace("$", ""))


def _number(text: str) -> Fraction | None:
    """The number that an answer is; None where anything in it has yet to be worked out."""
    modulus = _MODULUS.search(text)
    text = text[: modulus.start()] if modulus else text
    value = plain_number(text)
    symbols = _TEXT.sub(" ", text).rpartition("=")[2]
    if value is None or _SYMBOL.search(_COMMAND.sub(" ", symbols)):
        return None
    return value if modulus is None or 0 <= value < int(modulus[1]) else None


def _same(text: str) -> str:
    """`text` as it is compared for being the same to the letter."""
    text = unwrapped(plain_text(text)).replace("{", "").replace("}", "")
    return re.sub(r"\s+|\\[dt](?=frac)", "", text).casefold()


class _Worker:
    """The process that asks math-verify: started when first needed and after a fork of this one,
    used by one thread at a time, ended with this process."""

    def __init__(self):
        self.lock, self.process, self.owner = threading.Lock(), None, None

    def agree(self, reference: str, answer: str) -> bool:
        """math-verify's verdict; False where it takes too long, or for what it cannot read."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self._start()
            try:
                self.process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
                self.process.stdin.flush()
                return self._reply(LIMIT) == b"1\n"
            except (OSError, TimeoutError):
                self.stop()
                return False

    def _start(self) -> None:
        file = Path(__file__).with_name("maths_worker.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        # -P: this folder's modules must not stand for others of the same names.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(file)], stderr=subprocess.DEVNULL, **pipes
        )
        self.owner = os.getpid()
        if self._reply(START) != b"ready\n":
            self.stop()
            raise RuntimeError("math-verify's worker did not start: is math-verify installed?")

    def _reply(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        return self.process.stdout.readline()

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=lambda: setattr(_worker, "lock", threading.Lock()))

maths_reward = answer_reward("maths_reward", maths_right)
