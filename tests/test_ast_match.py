"""AST match: against a brute-force count, on hostile sources, and what it does not see."""

import ast
import random
from collections import Counter

import pytest

from mdmrl.config import InputError
from mdmrl.rewards.code.ast_match import LONGEST, ast_match

CLAMP = """def clamp(x, low, high):
    if x < low:
        return low
    return high if x > high else x
"""


def brute_force(completion: str, reference: str) -> float:
    found, wanted = (
        Counter(ast.dump(node) for node in ast.walk(ast.parse(source)))
        for source in (completion, reference)
    )
    return (found & wanted).total() / wanted.total()


def expression(rng: random.Random, depth: int) -> ast.expr:
    def below() -> ast.expr:
        return expression(rng, depth - 1)

    if depth == 0:
        values = (0, 1, True, 1.0, 1j, "1", b"1", None, ...)
        leaf = rng.choice((ast.Name("a", ast.Load()), ast.Name("b", ast.Load()), None))
        return leaf or ast.Constant(rng.choice(values))
    match rng.randrange(7):
        case 0:
            return ast.BinOp(below(), rng.choice((ast.Add(), ast.Mult())), below())
        case 1:
            return ast.BoolOp(ast.And(), [below() for _ in range(rng.randint(2, 3))])
        case 2:
            return ast.Call(ast.Name("f", ast.Load()), [below()], [ast.keyword("k", below())])
        case 3:
            return ast.Compare(below(), [ast.Lt(), ast.Eq()], [below(), below()])
        case 4:
            return ast.Dict([None, below()], [below(), below()])
        case 5:
            return ast.Lambda(ast.parse("lambda a, *b, c=1: 0", mode="eval").body.args, below())
    return ast.List([below() for _ in range(rng.randrange(3))], ast.Load())


def program(rng: random.Random) -> str:
    body = [ast.Expr(expression(rng, rng.randrange(4))) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.5:
        loop = ast.parse("for i in x:\n    global a, b\n    return\n").body[0]
        body.append(ast.For(loop.target, loop.iter, [*loop.body, *body], []))
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))


def test_it_is_the_brute_force_count():
    rng, scores = random.Random(0), []
    for _ in range(1000):
        pair = program(rng), program(rng)
        scores.append(ast_match(*pair))
        assert scores[-1] == brute_force(*pair), pair
    assert min(scores) == 0.0 or min(scores) < 0.1
    assert len(set(scores)) > 300
    assert ast_match(CLAMP, CLAMP) == 1.0


def test_a_subtree_is_found_as_often_as_it_is_there():
    assert ast_match("x\nx\nx", "x") == pytest.approx(3 / 4)  # all but the module
    assert ast_match("x", "x\nx\nx") == pytest.approx(3 / 10)
    assert ast_match("1", "True") == ast_match("1", "1.0") == 0.0
    assert ast_match("'1'", "b'1'") == 0.0


def test_what_renaming_and_layout_do():
    renamed = CLAMP.replace("x", "value")
    assert 0.4 < ast_match(renamed, CLAMP) < 0.7
    assert ast_match(renamed, CLAMP) == brute_force(renamed, CLAMP)
    one = CLAMP.replace("def clamp", "def other")
    total = sum(1 for _ in ast.walk(ast.parse(CLAMP)))
    assert ast_match(one, CLAMP) == pytest.approx(1 - 2 / total)  # the function and the module
    laid_out = CLAMP.replace("    ", "  ").replace("x < low", "(x <\n low)") + "# the end"
    assert ast_match(laid_out, CLAMP) == 1.0


HOSTILE = {
    "empty": "",
    "no Python": "def f(:",
    "NUL": "x = 1\0",
    "surrogate": "x = '\ud800'",
    "huge": "x = 1\n" * 10_000_000,
    "huge in bytes": "'" + "é" * (LONGEST - 2) + "'",
    "brackets": "(" * 30_000,
    "attributes": "a" + ".b" * 30_000,
    "sum": "1" + "+1" * 32_000,
    "calls": "f(" * 199 + ")" * 199,
    "minus": "-" * 60_000 + "1",
    "elif": "if a: pass\n" + "elif b: pass\n" * 5000,
    "digits": "1" * 60_000,
    "hexadecimal": "0x" + "f" * 60_000,
    "statements": "y;" * 32_000,
    "escape": "'\\d'",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_hostile_completions_score_and_do_not_raise(name):
    score = ast_match(HOSTILE[name], CLAMP)
    assert 0.0 <= score < 0.3
    if name not in ("statements", "escape", "hexadecimal", "calls"):
        assert score == 0.0


@pytest.mark.parametrize("name", ("empty", "no Python", "NUL", "huge", "sum"))
def test_a_reference_that_is_none_is_an_error_that_names_it(name):
    with pytest.raises(InputError, match=r"reference '.*expected"):
        ast_match(CLAMP, HOSTILE[name])
    with pytest.raises(ValueError, match="reference '# nothing': expected at least one statement"):
        ast_match(CLAMP, "# nothing")
