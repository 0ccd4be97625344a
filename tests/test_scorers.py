"""Scorers against hand labels, brute force, and texts that were made to fool or stop them."""

import itertools
import json
import multiprocessing
import operator
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from mdmrl.config import InputError
from mdmrl.rewards import (
    choice_reward,
    choice_right,
    countdown_reward,
    countdown_right,
    extract_number,
    maths_reward,
    maths_right,
    number_reward,
    number_right,
    sudoku_reward,
    sudoku_right,
)
from mdmrl.rewards.countdown import countdown_solution, countdown_value
from mdmrl.rewards.maths import _worker

LABELLED = Path(__file__).parent / "labelled"
RIGHT = {
    "countdown": lambda row: countdown_right(row["completion"], row["nums"], row["target"]),
    "gsm": lambda row: number_right(row["completion"], row["answer"]),
    "math": lambda row: maths_right(row["completion"], row["answer"]),
    "choice": lambda row: choice_right(row["completion"], row["answer"]),
    "sudoku": lambda row: sudoku_right(row["completion"], row["answer"]),
}


def labelled(task: str) -> list[dict]:
    return [json.loads(line) for line in (LABELLED / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", RIGHT)
def test_scorers_agree_with_hand_labels(task):
    rows = labelled(task)
    assert len(rows) >= 60
    assert 0.3 < sum(row["right"] for row in rows) / len(rows) < 0.7
    assert [row for row in rows if RIGHT[task](row) != row["right"]] == []


# ------------------------------------------------------------------ Countdown by brute force

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def expressions(nums: tuple[int, ...]):
    """Every expression over `nums` in their order: its text, value (None: not defined), steps."""
    if len(nums) == 1:
        yield str(nums[0]), Fraction(nums[0]), []
    for cut in range(1, len(nums)):
        pairs = itertools.product(expressions(nums[:cut]), expressions(nums[cut:]))
        for ((left, a, before), (right, b, after)), (sign, apply) in itertools.product(
            pairs, SIGNS.items()
        ):
            defined = None not in (a, b) and not (sign == "/" and b == 0)
            value = apply(a, b) if defined else None
            yield f"({left}{sign}{right})", value, [*before, *after, f"{a}{sign}{b}={value}"]


@pytest.mark.parametrize("nums", [(2, 3, 4), (6, 1, 3), (5, 5, 10), (4, 2, 2, 8)])
def test_countdown_values_every_expression(nums):
    orders = set(itertools.permutations(nums)) if len(nums) == 3 else [nums]
    for order in orders:
        for text, value, steps in expressions(order):
            assert countdown_value(text, nums) == value, text
            assert countdown_value(text, [*nums, 1]) is None
            assert countdown_value(text, nums[1:]) is None
            if value is None:
                continue
            assert countdown_value(f"{text[1:-1]} = {value}", nums) == value
            assert countdown_value(f"{text} = {value + 1}", nums) is None
            assert countdown_value(",".join(steps), nums) == value, steps
            assert countdown_value(",".join(steps[:-1]), nums) is None
            assert countdown_value(f"{','.join(steps)}1", nums) is None


def test_countdown_knows_precedence():
    """Against the reading of a text from its left, term by term, without any tree."""
    rng = random.Random(0)
    for _ in range(2000):
        nums = [rng.randint(1, 20) for _ in range(rng.randint(2, 6))]
        signs = [rng.choice("+-*/") for _ in nums[1:]]
        total, term = Fraction(0), Fraction(nums[0])
        for sign, number in zip(signs, nums[1:], strict=True):
            if sign in "*/":
                term = SIGNS[sign](term, number)
            else:
                total, term = total + term, Fraction(number if sign == "+" else -number)
        space = rng.choice(["", " "])
        text = space.join(map(str, itertools.chain(*zip(["", *signs], nums, strict=True)))).strip()
        assert countdown_value(text, rng.sample(nums, len(nums))) == total + term, text


def test_solutions_are_one_if_they_are_one_function_of_their_numbers():
    """Against the values of every expression at random numbers in the place of the given ones."""
    nums, rng = (2, 3, 4), random.Random(0)
    points = [[Fraction(rng.randint(10**6, 10**7)) for _ in nums] for _ in range(2)]
    by_solution, by_values = {}, {}
    for order in itertools.permutations(range(3)):
        written_as = expressions(tuple(nums[i] for i in order))
        at_points = [expressions(tuple(point[i] for i in order)) for point in points]
        for (text, value, _), *there in zip(written_as, *at_points, strict=True):
            solution = countdown_solution(text, nums)
            assert countdown_value(solution, nums) == value
            assert countdown_solution(solution, nums) == solution
            assert countdown_solution(f"<answer>{text[1:-1]} = {value}</answer>", nums) == solution
            by_solution.setdefault(solution, set()).add(text)
            by_values.setdefault(tuple(value for _, value, _ in there), set()).add(text)
    assert {*map(frozenset, by_solution.values())} == {*map(frozenset, by_values.values())}


def test_solutions_of_other_forms():
    assert countdown_solution("8-(13-14)", [8, 13, 14]) == "14+8-13"
    assert countdown_solution("8-(13-14)", [8, 13]) is None
    assert countdown_solution("1/0", [1, 0]) is None
    assert countdown_solution("7", [7]) == "7"
    assert countdown_solution("8+13=21,14+21=35", [8, 13, 14]) == "8+13=21,14+21=35"
    with_factors = countdown_solution("(8-3)*(9-2)", [2, 3, 8, 9])
    assert with_factors != countdown_solution("(3-8)*(2-9)", [2, 3, 8, 9])


# ------------------------------------------------------------------ numbers and grids


def test_numbers_are_read_in_every_form():
    rng = random.Random(0)
    for _ in range(2000):
        n, d = rng.choice([-1, 1]) * rng.randint(0, 10 ** rng.randint(1, 7)), rng.randint(2, 99)
        cents, sign = rng.randint(0, 99), "-" if n < 0 else ""
        forms = {
            f"{n}": n,
            f"{n:,}": n,
            f"{n}.{cents:02}": n + (-1 if n < 0 else 1) * Fraction(cents, 100),
            f"{sign}${abs(n):,}.": n,
            f"{n}/{d}": Fraction(n, d),
            f"${sign}\\frac{{{abs(n)}}}{{{d}}}$": Fraction(n, d),
            f"{n:,}".replace(",", "{,}").replace("-", "\u2212"): n,
            f"{n} apples": n,
        }
        for form, value in forms.items():
            assert extract_number(form) == value, form
            for marked in (
                f"<answer>{form}</answer>",
                f"1 2\n#### {form}\n3",
                f"\\boxed{{{form}}}",
            ):
                assert extract_number(marked) == value, marked


def test_sudoku_has_as_many_solutions_as_are_known():
    """Of the 288 grids, 12 begin with 1234."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    grids = ["1234" + "".join(rest) for rest in itertools.product(rows, repeat=3)]
    assert sum(sudoku_right(grid, "0" * 16) for grid in grids) == 12
    assert sum(sudoku_right(grid, "0" * 15 + "1") for grid in grids) < 12


# ------------------------------------------------------------------ any text whatever

MARKS = ["<answer>", "</answer>", "\\boxed{", "}", "####", "The answer is ", "\n", " "]
SYMBOLS = [*"0123456789+-*/()=.,;:$%ABCD−٣", "\\frac{", "\\sqrt{", "^", "_", "or", "not"]
PAIRS = [
    ("<answer>", "</answer>"),
    ("\\boxed{", "}"),
    ("#### ", ""),
    ("the answer is ", "."),
    ("", ""),
]


def random_texts(number: int, seed: int = 0):
    """Soups of the tokens of answers, random characters, and labelled completions cut short."""
    rng = random.Random(seed)
    real = [row["completion"] for task in RIGHT for row in labelled(task)]
    for index in range(number):
        match index % 4:
            case 0:
                yield "".join(rng.choices(MARKS + SYMBOLS, k=rng.randint(0, 30)))
            case 1:
                soup = "".join(rng.choices(SYMBOLS, k=rng.randint(0, 12)))
                opening, closing = rng.choice(PAIRS)
                yield f"{opening}{soup}{closing}"
            case 2:
                yield "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 40)))
            case 3:
                text = rng.choice(real)
                start, end = sorted(rng.choices(range(len(text) + 1), k=2))
                yield text[:start] + text[end:]


LONG = 10**6
BAITS = [
    *("9**9**9", "9^9^9", "9" * 250, "9" * 5000, "1e999999999", "0.1" + "0" * 250, "1/" * 99 + "1"),
    *(
        "(" * 99 + "1" + ")" * 99,
        "(" * 5000,
        "-" * 199 + "1",
        "1+" * 99 + "1",
        "[" * 199,
        "lambda:0",
    ),
    *("9^{9^{9^{9}}}", "(10^9)!", "10^{10^{10}}!", "\\sqrt{" * 40 + "2" + "}" * 40, "\\frac" * 50),
    *("\\int_0^1 x^x dx", "\\sum_{n=1}^{10^{9}} n^n", "\\prod_{n=1}^{10^9} n", "x^{99999999}"),
    *("(a+b+c+d)^{4000}", "\\binom{10^9}{10^8}", "\\gcd(10^{99999}, 6)", "{" * 150 + "}" * 150),
    *(
        "\x00",
        "\ud800",
        "1\u202e2",
        "\u200b1",
        "\ufeff2",
        "{0.__class__}",
        "%n%s",
        "\\input{/etc/x}",
    ),
    *("__import__('os').getpid()", "{1+1}", "' * 10**9 + '", "\\" * 299, "A" * 299, "A " * 149),
    *("(A" * 99, "B or " * 60, "1,234" * 60, "1 1/" * 70, "$" * 299, "**" * 149, "x=" * 149),
]
FLOODS = [
    *(
        bait * (LONG // len(bait))
        for bait in ("<answer>", "</answer>", "<answer></answer>", "####")
    ),
    *(bait * (LONG // len(bait)) for bait in ("\\boxed{", "\\boxed", "{", "}", "{}", "\\boxed{}")),
    *(bait * (LONG // len(bait)) for bait in ("the answer is ", "answer:", "Answer\n", "the \n")),
    *(
        bait * (LONG // len(bait))
        for bait in ("1", "1+", "(", " ", "\n", "\t#", "$", "\\", "**", "A")
    ),
    *(
        "\\boxed{" + "{" * LONG,
        "\\boxed{" * 9 + " " * LONG,
        "<answer>" + "1 " * LONG,
        "a\u0301" * LONG,
    ),
    *("\\boxed{" + "1" * LONG + "}", "#### " + "9" * LONG, "the answer is " + "-" * LONG),
]
HOSTILE = [o + bait + c for bait in BAITS for o, c in PAIRS[:3]] + BAITS + FLOODS


def scored(text: str, answer: str = "5") -> dict[str, float]:
    """The seconds that each scorer takes for a text. Each must give True or False."""
    calls = {
        "countdown": lambda: countdown_right(text, [8, 13, 14], 35),
        "number": lambda: number_right(text, "18"),
        "choice": lambda: choice_right(text, "B"),
        "maths": lambda: maths_right(text, answer),
        "sudoku": lambda: sudoku_right(text, "1" + "0" * 15),
    }
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        assert call() in (True, False)
        seconds[name] = time.perf_counter() - start
    return seconds


@pytest.fixture(scope="module")
def worker():
    """math-verify's worker, started: its start is not any answer's time."""
    assert maths_right("\\boxed{\\sqrt{12}}", "2\\sqrt{3}")
    return _worker


def test_no_random_text_stops_a_scorer():
    for text in random_texts(10_000):
        seconds = scored(text)
        assert max(seconds.values()) < 1, (text, seconds)


def test_no_hostile_text_stops_a_scorer(worker):
    assert len(HOSTILE) >= 100
    process = worker.process
    for text in HOSTILE:
        asked = text.startswith("<answer>")  # where each bait is once
        seconds = scored(text, "2\\sqrt{3}" if asked else "5")
        assert max(seconds.values()) < 1, (text[:80], seconds)
    assert worker.process is process
    assert maths_right("\\boxed{\\sqrt{12}}", "2\\sqrt{3}")


@pytest.mark.slow
def test_no_random_answer_stops_math_verify(worker):
    rng, process = random.Random(1), worker.process
    tokens = [*SYMBOLS, "x", "\\pi", "\\le", "\\infty", "[", "]", "\\{", "\\}", "!", "}", "}"]
    for _ in range(150):
        soup = "".join(rng.choices(tokens, k=rng.randint(1, 15)))
        start = time.perf_counter()
        maths_right(
            f"<answer>{soup}</answer>", rng.choice(["2\\sqrt{3}", "(1,2]", "x^2+1", "1,-2"])
        )
        assert time.perf_counter() - start < 1, soup
    assert worker.process is process


# ------------------------------------------------------------------ math-verify's process

EQUAL = ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{\\sqrt{2}}{2}")


@pytest.mark.slow
def test_a_worker_that_was_killed_costs_no_answer(worker):
    worker.process.kill()
    worker.process.wait()
    assert maths_right(*EQUAL)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(worker):
    os.kill(worker.process.pid, signal.SIGSTOP)
    for _ in range(2):
        start = time.perf_counter()
        assert not maths_right(*EQUAL)
        assert time.perf_counter() - start < 1
    assert maths_right(*EQUAL)


def test_a_late_reply_is_not_the_next_one_s(worker):
    process = worker.process
    os.kill(process.pid, signal.SIGSTOP)
    assert not maths_right("\\boxed{\\sqrt{3}}", "\\frac{3}{\\sqrt{3}}")
    os.kill(process.pid, signal.SIGCONT)
    assert not maths_right("\\boxed{\\sqrt{5}}", EQUAL[1])
    assert maths_right(*EQUAL)
    assert worker.process is process


def test_threads_share_a_worker(worker):
    process, verdicts = worker.process, {}
    pairs = {"\\sqrt{8}": True, "\\sqrt{3}": False, "2\\sqrt{2}+0": True, "\\sqrt{18}": False}

    def ask(given: str) -> None:
        verdicts[given] = maths_right(f"\\boxed{{{given}}}", "2\\sqrt{2}")

    threads = [threading.Thread(target=ask, args=(given,)) for given in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == pairs
    assert worker.process is process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a fork of a process with threads
def test_a_forked_process_has_its_own_worker(worker):
    pool = multiprocessing.get_context("fork").Pool(1)
    with pool:
        verdict, pid = pool.apply(verdict_and_worker)
    assert verdict
    assert pid != worker.process.pid
    assert maths_right(*EQUAL)


def verdict_and_worker() -> tuple[bool, int]:
    return maths_right(*EQUAL), _worker.process.pid


@pytest.mark.slow
def test_the_worker_ends_with_its_process():
    code = (
        "import os, signal\n"
        "from mdmrl.rewards.maths import _worker, maths_right\n"
        f"assert maths_right(*{EQUAL!r})\n"
        "print(_worker.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pid, waited = int(done.stdout), time.time() + 20
    while Path(f"/proc/{pid}").exists() and time.time() < waited:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break  # nobody is there to collect it
        time.sleep(0.05)
    assert time.time() < waited


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, mdmrl.rewards\n"
        "heavy = {'sympy', 'math_verify', 'torch', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ as rewards


def test_countdown_rewards_form_a_little():
    completions = ["8+13+14", "<answer>8+13-14</answer>", "8+13", "8+13+14=36", ""]
    rows = {"nums": [[8, 13, 14]] * 5, "target": [35] * 5}
    assert countdown_reward(["8,13,14:35"] * 5, completions, **rows) == [1.0, 0.1, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reward", "right", "wrong", "answer"),
    [
        (number_reward, "#### 18", "#### 19", "18"),
        (choice_reward, "(B)", "(C)", "B"),
        (maths_reward, "\\boxed{3/4}", "\\boxed{4/3}", "\\frac{3}{4}"),
        (sudoku_reward, "1234341221434321", "1234341221434312", "1" + "0" * 15),
    ],
)
def test_rewards_take_texts_and_messages(reward, right, wrong, answer):
    message = [{"role": "assistant", "content": right}]
    completions = [right, wrong, message]
    answers = [answer] * 3
    assert reward(prompts=["?"] * 3, completions=completions, answer=answers) == [1.0, 0.0, 1.0]
    with pytest.raises(InputError, match=f"{reward.__name__!r} needs the column 'answer'"):
        reward(prompts=["?"], completions=[right])


def test_references_that_are_none_are_refused():
    with pytest.raises(InputError, match="'B or C': expected A, B, C or D"):
        choice_right("B", "B or C")
    with pytest.raises(InputError, match="'eighteen': expected one number"):
        number_right("18", "eighteen")
    with pytest.raises(InputError, match="expected 16 cells"):
        sudoku_right("1", "123")
    with pytest.raises(InputError, match="needs the column 'nums'"):
        countdown_reward(["?"], ["1+1"], target=[2])
