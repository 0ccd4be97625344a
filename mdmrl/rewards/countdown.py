r"""Countdown's scorer: bounded arithmetic, every given number used exactly once.

Two forms are accepted, bare where the completion is nothing else, or as its marked answer
(`mdmrl.rewards.answers`): one expression, "14+(8+13)", also with its value behind it, "= 35"; and
the solution in steps of one operation each, "8+13=21,14+21=35", separated by commas, semicolons or
new lines. Numbers are whole and written in the digits 0 to 9; the operators are + - * /, also as
"×", "÷", "·" or in LaTeX. Values are exact fractions, so a fractional intermediate counts.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction

from mdmrl.rewards.answers import column, marked_answer, unwrapped, written

LONGEST = 200  # characters, so that neither the parser nor a value has much to do
NEAR = 0.1  # the reward of a well-formed expression of the numbers that misses the target

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_WRITTEN = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\$([^$]*)\$", r"\1"),
        (r"\\left(?=\()|\\right(?=\))", ""),
        (r"\\[,;:! ]", " "),
        (r"×|·|⋅|\\times(?![A-Za-z])|\\cdot(?![A-Za-z])", "*"),
        (r"÷|\\div(?![A-Za-z])", "/"),
        (r"−|–", "-"),
    )
]
_FRACTION = re.compile(r"\\[dt]?frac *\{([^{}]*)\} *\{([^{}]*)\}")
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_LEADING_ZERO = re.compile(r"(?<!\d)0\d", re.ASCII)
_SEPARATOR = re.compile(r"\s*[,;\n]\s*")


def countdown_expression(text: str) -> str | None:
    """What `text` offers as its solution: its marked answer, or the whole text where nothing is
    marked; its operators as + - * /. None where that is empty or too long."""
    marked = marked_answer(text)
    found = (text if marked is None else marked).strip()
    if not 0 < len(found) <= LONGEST:
        return None
    found = unwrapped(found)
    for pattern, new in _WRITTEN:
        found = pattern.sub(new, found)
    for _ in range(4):
        found = _FRACTION.sub(r"((\1)/(\2))", found)
    return found.strip() or None


def countdown_value(text: str, nums: Sequence[int]) -> Fraction | None:
    """The value of the solution in `text`, exactly; None unless it is well-formed, uses each of
    `nums` exactly once and says nothing false."""
    found = countdown_expression(text)
    if found is None:
        return None
    given = Counter(int(number) for number in nums)
    value = _expression_value(found, given)
    return _steps_value(found, given) if value is None else value


def _expression_value(text: str, given: Counter) -> Fraction | None:
    """The value of one expression, with or without "= value" behind it."""
    expression, equals, stated = text.partition("=")
    tree = _parsed(expression)
    used = tree and [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    if not used or Counter(used) != given:
        return None
    value = _value(tree)
    return value if not equals or (value is not None and _number(stated) == value) else None


def _steps_value(text: str, given: Counter) -> Fraction | None:
    """The last result of a solution in steps, each of one operation on numbers given or reached
    before; None unless every result is right and all but the last are used."""
    left, result = Counter({Fraction(number): count for number, count in given.items()}), None
    for step in _SEPARATOR.split(text):
        expression, _, stated = step.partition("=")
        result = _number(stated)
        fit = (
            Counter(sides)
            for sign, *sides in _operations(expression)
            if Counter(sides) <= left and _result(sign, *sides) == result
        )
        used = next(fit, None)
        if used is None or result is None:
            return None
        left = left - used + Counter([result])
    return result if left == Counter([result]) else None


def _operations(text: str) -> Iterator[tuple[str, Fraction, Fraction]]:
    """The readings of `text` as one operation: "4*3/2" is 4 * 3/2 or 4*3 / 2, whatever fits."""
    for sign in re.finditer(r"[-+*/]", text if text.count("(") == text.count(")") else ""):
        left, right = _number(text[: sign.start()]), _number(text[sign.end() :])
        if left is not None and right is not None:
            yield sign[0], left, right


def _parsed(text: str) -> ast.expr | None:
    """The syntax tree of arithmetic on whole numbers; None where `text` is anything else."""
    text = text.strip()
    if not _EXPRESSION.fullmatch(text) or _LEADING_ZERO.search(text):
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction | None:
    """The value of a tree; None where it divides by zero or holds more than the four operations."""
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.BinOp():
            sides = _value(node.left), _value(node.right)
            return None if None in sides else _result(NODES.get(type(node.op)), *sides)
    return None


def _result(sign: str | None, left: Fraction, right: Fraction) -> Fraction | None:
    """What one operation gives; None for a division by zero and for other operations."""
    if sign not in OPERATORS or (right == 0 and sign == "/"):
        return None
    return OPERATORS[sign](left, right)


def _number(text: str) -> Fraction | None:
    """A number as it stands in a step and behind "=": whole or a fraction, perhaps negative."""
    found = re.fullmatch(r" *\(?(-?) *(0|[1-9][0-9]*)(?: */ *([1-9][0-9]*))?\)? *", text)
    return found and Fraction(int(found[1] + found[2]), int(found[3] or 1))


def countdown_right(completion: str | list[dict], nums: Sequence[int], target: int) -> bool:
    """Whether a completion reaches `target` with each of `nums` used exactly once."""
    return countdown_value(written(completion), nums) == int(target)


def countdown_solution(completion: str | list[dict], nums: Sequence[int]) -> str | None:
    """The solution in a completion, the same text for all ways to write it; None where it has no
    value (`countdown_value`).

    Two expressions are one solution if commuting and regrouping make one of the other, where a - b
    adds the opposite of b and a / b multiplies by its inverse: 8+(14-13) is (8-13)+14. No factor
    changes its sign, (a-b)*(c-d) for (b-a)*(d-c), which takes four numbers; nothing is computed, so
    that 7*1 and 7/1 are two. A solution in steps stands as it is.
    """
    text = written(completion)
    if countdown_value(text, nums) is None:
        return None
    found = countdown_expression(text)
    if _expression_value(found, Counter(int(number) for number in nums)) is None:
        return found
    return _normal(_parsed(found.partition("=")[0])).removeprefix("(").removesuffix(")")


def _normal(node: ast.expr) -> str:
    """A tree as text, in brackets where it is a sum or a product, whose operands are in order."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    signs = "+-" if NODES[type(node.op)] in "+-" else "*/"
    operands = sorted(_operands(node, signs, False))
    return "(" + "".join(signs[inverse] + text for inverse, text in operands)[1:] + ")"


def _operands(node: ast.expr, signs: str, inverse: bool) -> Iterator[tuple[bool, str]]:
    """What a sum adds or a product multiplies, each with whether it is its opposite or inverse."""
    if isinstance(node, ast.BinOp) and (name := NODES[type(node.op)]) in signs:
        yield from _operands(node.left, signs, inverse)
        yield from _operands(node.right, signs, inverse != (name == signs[1]))
    else:
        yield inverse, _normal(node)


def countdown_reward(
    prompts, completions, completion_ids=None, nums=None, target=None, **columns
) -> list[float]:
    """1 for a right completion, 0.1 for one that is well-formed and uses the numbers, else 0; the
    items in the columns `nums` and `target`."""
    nums = column("countdown_reward", "nums", nums, completions)
    target = column("countdown_reward", "target", target, completions)

    def reward(completion, nums: Sequence[int], target: int) -> float:
        value = countdown_value(written(completion), nums)
        return 0.0 if value is None else 1.0 if value == int(target) else NEAR

    return [reward(*item) for item in zip(completions, nums, target, strict=True)]
