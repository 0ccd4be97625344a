"""The worker process of `mdmrl.rewards.maths`: math-verify, run as a file of its own.

Reads a JSON list [reference, answer] a line and prints 1 or 0. Each pair is judged in a fork that
the kernel ends when its time is up, whatever it is doing, so that no pair slows or sways another,
and nothing has to be started again. It ends when its input does.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import sys

LIMIT = 0.7  # seconds
MEMORY = 2 * 2**30  # bytes of addresses
# Judged once at the start, so that what the parser and SymPy learn is there in every fork.
WARM_UP = (
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"2\sqrt[3]{5}-1", r"\sqrt2"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"y = -2x + \frac{3}{4}", r"4y+8x=3"),
    (r"f(x)=3x^{10}", r"3e^{2x}"),
    (r"\sin x", r"\cos{\left(2\theta\right)}+\log_2 3 + \ln 5"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"),
    (r"(1,2),(3,4)", r"(3,4), (1,2)"),
    (r"[-2,7)", r"x \in [-2,7]"),
    (r"(-\infty,2]\cup[3,5)", r"x \le 2 \text{ or } 3 \le x < 5"),
    (r"-2 < x", r"x \geq 2"),
    (r"\{1,-2\}", r"x=1, x=-2"),
    (r"1 \pm 2\sqrt{3}", r"1+2\sqrt{3}, 1-2\sqrt{3}"),
    (r"6 - 5i", r"-5i + 6"),
    (r"3 \cdot 10^{8}", r"3 \times 10^8"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&0\\3&1\end{pmatrix}"),
    (r"\emptyset", r"5!\%"),
    ("a b", "k"),
)


def agree(reference: str, answer: str) -> bool:
    from math_verify import parse, verify

    # Its own time limits are whole seconds; the fork's replaces them.
    gold = parse(f"${reference}$", parsing_timeout=None)
    given = parse(rf"$\boxed{{{answer}}}$", parsing_timeout=None)
    return bool(gold and given) and verify(gold, given, timeout_seconds=None)


def judge(line: str) -> bytes:
    """1 or 0, by a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            with contextlib.suppress(OSError, ValueError):  # where there is no such limit
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.write(writer, b"1" if agree(*json.loads(line)) else b"0")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or b"0"


def main() -> None:
    for pair in WARM_UP:
        agree(*pair)
    gc.collect()
    gc.freeze()  # else a fork that collects would copy all that is loaded
    print("ready", flush=True)
    for line in sys.stdin:
        print(judge(line).decode(), flush=True)


if __name__ == "__main__":
    main()
