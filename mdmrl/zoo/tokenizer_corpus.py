"""Text of every task family planned, for the one tokenizer that all tiny models share.

The tokenizer is trained once and shipped, so it must already know the words of tasks that come
later: medicine, Python functions, Dafny, arithmetic and word problems.
"""

import ast
import inspect
import itertools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mdmrl.tasks import medcot

MEDICAL_TEXTS = 12_000
FUNCTION_TEXTS = 1_500
REASONING_TEXTS = 3_000
MAX_FUNCTION_LINES = 15

DAFNY = """\
function Fib(n: nat): nat { if n < 2 then n else Fib(n - 1) + Fib(n - 2) }
method ComputeFib(n: nat) returns (b: nat)
  ensures b == Fib(n)
{
  var i := 0; var a := 1; b := 0;
  while i < n
    invariant 0 <= i <= n && a == Fib(i + 1) && b == Fib(i)
    decreases n - i
  {
    a, b := a + b, a; i := i + 1;
  }
}
method Max(a: array<int>) returns (m: int)
  requires a.Length > 0
  ensures forall k :: 0 <= k < a.Length ==> m >= a[k]
  ensures exists k :: 0 <= k < a.Length && m == a[k]
lemma Associative(x: int, y: int) ensures x + y == y + x { assert true; }
predicate Sorted(s: seq<int>) { forall i, j :: 0 <= i < j < |s| ==> s[i] <= s[j] }
"""

REASONING = (
    "Use the numbers {a}, {b} and {c} to make {t}. "
    "<reasoning>{a} + {b} = {s}\n\n{s} * {c} = {t}</reasoning>\n\n"
    "<answer>({a} + {b}) * {c}</answer>",
    "There are {a} apples in a box and {b} in a basket. {c} children share them equally. "
    "How many apples does each child get? <reasoning>In total {a} + {b} = {s} apples.\n\n"
    "{s} / {c} is the share of each.</reasoning>\n\n<answer>{q}</answer>",
    "Solve for x: {a}x + {b} = {t}. <reasoning>Subtract {b} from both sides.\n\n"
    "Divide both sides by {a}.</reasoning>\n\n<answer>\\boxed{{{q}}}</answer>",
    "A shop sells {a} books at ${b} each and {c} pens. How much money is that in dollars? "
    "<reasoning>First multiply {a} by {b}, then add the pens.</reasoning>\n\n<answer>{t}</answer>",
    "All cats are animals. Some animals have {a} legs. Does it follow that some cats have {b}? "
    "Answer yes or no. Which of the options (A), (B), (C), (D) is correct? <answer>no</answer>",
)


def texts(seed: int = 0) -> Iterator[str]:
    """The tokenizer's training texts, the same for the same seed and Python version."""
    for row in itertools.islice(medcot.stream(seed), MEDICAL_TEXTS):
        yield f"{row['prompt']}{row['completion']} {row['Response']}"
    yield from itertools.islice(standard_library_functions(), FUNCTION_TEXTS)
    rng = random.Random(f"reasoning/{seed}")
    for _ in range(REASONING_TEXTS):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        slots = {"a": a, "b": b, "c": c, "s": a + b, "t": (a + b) * c, "q": (a + b) // c}
        yield rng.choice(REASONING).format(**slots)
    yield DAFNY


def standard_library_functions() -> Iterator[str]:
    """Documented functions of the standard library, of up to `MAX_FUNCTION_LINES` lines."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text("utf-8", errors="strict")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                text = ast.get_source_segment(source, node)
                if text.count("\n") < MAX_FUNCTION_LINES:
                    yield inspect.cleandoc(text)
