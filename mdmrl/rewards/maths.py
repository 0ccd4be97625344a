r"""Mathematics: whether the answer of a completion equals a reference in LaTeX.

The answer is the marked one (`mdmrl.rewards.answers`), or the whole completion where it is nothing
else: one line of symbols, a number and its unit, or the reference to the letter. Then, by the
reference:

* A number ("7", "\frac{3}{4}", "-1.5"): the answer must be one too (`plain_number`), of the same
  value, perhaps behind "x =" or before a unit or "\pmod{7}". What has yet to be worked out is no
  answer, so that "3/4 + 5/6", "\sqrt{16}" or "2^3" repeat the question and are wrong.
* Words ("\text{Evelyn}", "\text{June 20}"): the same words.
* Anything else (radicals, tuples, intervals, sets, polynomials): equal for math-verify.

math-verify runs in a worker process, one for each process that asks, started with the task or at
the first such question; apart from that start no answer takes a second. An answer that takes longer
is wrong.
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
import time
from fractions import Fraction
from pathlib import Path

from mdmrl.rewards.answers import (
    LONGEST,
    MAGNITUDE,
    VULGAR,
    answer_reward,
    extract_number,
    marked_answer,
    plain_number,
    plain_text,
    unwrapped,
    written,
)

LIMIT = 0.9  # seconds for a reply; the worker's own limit is below
START = 120  # seconds for math-verify to be imported on a busy machine

_COMMAND = re.compile(r"\\(?:(?:begin|end)\{\w*\}|[A-Za-z]+)")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}")
_FUNCTIONS = "pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|inf|infinity|frac"
_WORD = re.compile(rf"\b(?!(?:{_FUNCTIONS}|mod|and)\b)[^\W\d_]{{3,}}")
# Letters that are no unit: a variable, the imaginary unit, a function.
_UNITS = "cm|mm|km|kg|mg|ml|ft|in|yd|mi|lb|oz|hr|of"
_SYMBOL = re.compile(
    rf"(?<![^\W\d_])(?!(?:{_UNITS})\b)(?:[^\W\d_]{{1,2}}|{_FUNCTIONS})(?![^\W\d_])|!"
)
_MODULUS = re.compile(r"\s*\(?\s*\\?[pb]?mod\s*\{?\s*(\d{1,9})\s*\}?\s*\)?\s*\Z", re.ASCII)
_ROUNDED = re.compile(r"\.\d{5}|10\s*\^\s*\{?\s*-", re.ASCII)
_NAME = (
    r"\s*(?:[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?|\([a-z](?:,\s*[a-z])+\))\s*"  # x_1, f(x), (x,y)
)
_NAME_BEFORE = re.compile(rf"{_NAME}(?:=|\\in(?![a-z]))(?=[^=]*\Z)")
_LEFT_SIDE = re.compile(rf"{_NAME}|(?:\\[a-z]+|[^A-Za-z\\])+")  # a name or arithmetic
_AND = re.compile(r"[,;]|\\text\s*\{[^{}]*\}|\b(?:and|or)\b")
_DOUBT = re.compile(rf"\b(?:not|wrong|incorrect|false)\b|\b{MAGNITUDE}", re.I)
_BASE = re.compile(r"_\{?(\d{1,2})\}?\Z", re.ASCII)  # "52_8", eight the base
_NAMED = re.compile(r"\D*[^\W\d_]{2}[^\d=]*\d")  # "June 20" is no number
_LATEX = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"√\s*(\d+|[a-z]|\([^()]*\))", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        ("∞", r"\\infty "),
        ("[·⋅∗×]", r"\\cdot "),
        ("²", "^2"),
        ("³", "^3"),
    )
]


def maths_right(completion: str | list[dict], answer: str) -> bool:
    """Whether the answer that a completion gives equals `answer`, a reference in LaTeX.

    Raises:
        RuntimeError: the worker process cannot be started.
    """
    text, reference = written(completion), str(answer)
    if len(text) <= LONGEST and _same(text) == _same(reference) != "":
        return True
    given = maths_answer(text)
    if given is None:
        return False
    given = unwrapped(re.split(r"\\approx|≈", given)[0] or given)
    if "=" not in reference:
        given = unwrapped(_NAME_BEFORE.sub("", given, 1))
    expected = None if _NAMED.match(plain_text(reference)) else _number(reference)
    if expected is not None:
        return _number(given) == expected
    if _same(given) == _same(reference):
        return True
    base = _BASE.search(reference)
    if base:
        digits = reference[: base.start()]
        return _same(given) in (
            f"{digits}{form}" for form in ("", f"_{base[1]}", f"_{{{base[1]}}}")
        )
    if _WORD.search(_COMMAND.sub(" ", plain_text(reference))):
        return _same(given).casefold() == _same(reference).casefold()
    for pattern, new in _LATEX:
        given = pattern.sub(new, given)
    return _may_agree(reference, given) and _worker.agree(
        reference.replace("$", ""), given.replace("$", "")
    )


def _may_agree(reference: str, given: str) -> bool:
    """Whether math-verify is asked: not where it is known to take what is not equal for equal."""
    if _ROUNDED.search(given) and not _ROUNDED.search(reference):  # six digits do for it
        return False
    brackets = [re.match(r"(?:\\left\s*)?(\\?[(\[{])?", text)[1] for text in (reference, given)]
    if sorted(map(str, brackets)) in (["(", "\\{"], ["[", "\\{"]):
        return False  # a set for a tuple
    if _DOUBT.search(given) or "boxed" in given:  # it looks for boxes by rules of its own
        return False
    *lefts, _ = given.split("=") if "=" not in reference else [given]
    ends = (_LEFT_SIDE.fullmatch(x) or _LEFT_SIDE.fullmatch(_AND.split(x)[-1]) for x in lefts)
    return all(ends)  # not "2x = 6" for 6


def maths_answer(text: str) -> str | None:
    """What `text` gives as its answer: what it marks, or itself where it is one line of symbols or
    a number and its unit; None where that is empty or too long."""
    given = marked_answer(text)
    if given is None:
        given = text.strip()
        if len(given) > LONGEST or "\n" in given:
            return None
        if _WORD.search(_COMMAND.sub(" ", given)) and extract_number(given) is None:
            return None
    return given if 0 < len(given) <= LONGEST else None


def _number(text: str) -> Fraction | None:
    """The number that an answer is; None where anything in it has yet to be worked out."""
    text = re.sub(r"\\equiv|≡", "=", text)
    modulus = _MODULUS.search(plain := plain_text(text))
    value = plain_number(plain[: modulus.start()] if modulus else text)
    symbols = VULGAR.sub(" ", _TEXT.sub(" ", text.replace("\\!", ""))).rpartition("=")[2]
    if value is None or _SYMBOL.search(_COMMAND.sub(" ", symbols)):
        return None
    return value if modulus is None or 0 <= value < int(modulus[1]) else None


def _same(text: str) -> str:
    """`text` as it is compared for being the same to the letter."""
    text = unwrapped(_TEXT.sub(r"\1", re.sub(r"\\[dt]frac", r"\\frac", text)))
    return re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\s+", "", text)


class _Worker:
    """The process that asks math-verify: started when first needed and after a fork of this one,
    used by one thread at a time, ended with this process."""

    def __init__(self):
        self.lock, self.process, self.owner = threading.Lock(), None, None
        self.ready, self.owed = False, 0

    def agree(self, reference: str, answer: str) -> bool:
        """math-verify's verdict; False where it takes too long, or for what it cannot read.

        A busy machine may keep the worker from replying in time. Its reply then comes before that
        to the next question, and where neither comes in that one's time the worker is ended.
        """
        with self.lock:
            self._start()
            self._await()
            end, reply, kept = time.monotonic() + LIMIT, b"", False
            try:
                self.process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
                self.owed += 1
                while self.owed and (reply := self._reply(max(0, end - time.monotonic()))):
                    self.owed -= 1
                kept = self.owed < 2
            except OSError:
                pass
            finally:
                if not kept:
                    self.stop()
            return reply == b"1\n"

    def start(self) -> None:
        """Start it without waiting, so that the first question has less to wait for."""
        with self.lock:
            self._start()

    def _start(self) -> None:
        mine = self.process is not None and self.owner == os.getpid()
        if mine and self.process.poll() is None:
            return
        file = Path(__file__).with_name("maths_worker.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        # -P: this folder's modules must not stand for others of the same names.
        # A session of its own: an interrupt from the keyboard is not meant for it.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(file)],
            **pipes,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.owner, self.ready, self.owed = os.getpid(), False, 0

    def _await(self) -> None:
        if not self.ready and self._reply(START) != b"ready\n":
            self.stop()
            raise RuntimeError("math-verify's worker did not start: is math-verify installed?")
        self.ready = True

    def _reply(self, seconds: float) -> bytes:
        """The worker's next line; empty where there is none in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else b""

    def stop(self) -> None:
        """End the worker; one that belongs to the process that this was forked from goes on."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_worker = _Worker()
start_worker = _worker.start
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=lambda: setattr(_worker, "lock", threading.Lock()))

maths_reward = answer_reward("maths_reward", maths_right)
