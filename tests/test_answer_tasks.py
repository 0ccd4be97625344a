"""Tasks whose answers can be checked: generators, splits, rows from elsewhere."""

import csv
import itertools
import json
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from mdmrl import cli
from mdmrl.config import InputError
from mdmrl.tasks import CHECKED, items, load_task
from mdmrl.tasks.sudoku import grids
from mdmrl.zoo import pretrain
from mdmrl.zoo.recipes import PretrainConfig

FULL = dict(items.ROWS)


@pytest.fixture(scope="module", autouse=True)
def generated():
    """The rows of every task by split, which are fewer here: the first of them."""
    items.ROWS.update({"pretrain": 600, "rl": 400, "validation": 200, "test": 800})
    yield {name: {s: load_task(name).rows(s) for s in FULL} for name in CHECKED}
    items.ROWS.update(FULL)


# -- the generators --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", (*CHECKED, "reasoning"))
def test_every_completion_is_right_and_earns_the_reward(name):
    task = load_task(name)
    (reward,) = task.rewards
    rows = task.rows("validation")
    assert all(task.metric(row["completion"], row) for row in rows)
    wrong = [*rows[1:], rows[0]]
    pairs = zip(rows, wrong, strict=True)
    assert sum(task.metric(other["completion"], row) for row, other in pairs) < 0.5 * len(rows)
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    prompts, completions = columns.pop("prompt"), columns.pop("completion")
    assert reward(prompts, completions, **columns) == [1.0] * len(rows)
    assert set(reward(prompts, ["nothing"] * len(rows), **columns)) == {0.0}


@pytest.mark.parametrize("name", CHECKED)
def test_a_split_has_distinct_items_in_a_fixed_order(generated, name):
    for split, rows in generated[name].items():
        assert len({json.dumps(row) for row in rows}) == len(rows) == items.ROWS[split]
    assert load_task(name).rows("validation") == generated[name]["validation"]


@pytest.mark.parametrize("name", ("countdown", "choice", "math"))
def test_there_are_items_for_a_whole_split(monkeypatch, generated, name):
    monkeypatch.setattr(items, "ROWS", FULL)
    rows = load_task(name).rows("test")
    assert len(rows) == len({identity(name, row) for row in rows}) == 2000
    fewer = {identity(name, row) for row in generated[name]["test"]}
    assert len(fewer) == 800 and fewer < {identity(name, row) for row in rows}


def identity(name: str, row: dict) -> str:
    """What an item is, whatever its wording, its names and the order of its options."""
    match name:
        case "countdown":
            return f"{sorted(row['nums'])} {row['target']}"
        case "gsm":
            return re.sub(r"<answer>.*", "", row["completion"])
        case "choice":
            question, *options = row["prompt"].split("\n")
            fixed = question.startswith("What is")
            return question if fixed else f"{question} {sorted(o[3:] for o in options)}"
    return row["prompt"]


@pytest.mark.parametrize("name", CHECKED)
def test_splits_share_no_item(generated, name):
    found = {s: {identity(name, row) for row in rows} for s, rows in generated[name].items()}
    learnt = itertools.islice(load_task(name).stream(0), 1000)
    found["pretrain"] |= {identity(name, row) for row in learnt}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other


@pytest.mark.parametrize("name", (*CHECKED, "reasoning"))
def test_an_item_of_a_stream_depends_on_the_seed_and_its_number_alone(name):
    stream = load_task(name).stream
    rows = list(itertools.islice(stream(3), 30))
    assert list(itertools.islice(stream(3, 20), 10)) == rows[20:]
    assert list(itertools.islice(stream(4, 20), 10)) != rows[20:]


@pytest.mark.parametrize("name", CHECKED)
def test_completions_fit_the_length_that_the_task_sets(generated, name, tokenizer):
    longest = load_task(name).sampler["max_new_tokens"]
    for rows in generated[name].values():
        encoded = tokenizer([row["completion"] for row in rows]).input_ids
        assert max(map(len, encoded)) + 1 <= longest  # with the end token
    assert longest % 4 == 0


def test_countdown_reaches_the_target_with_every_number(generated):
    for row in generated["countdown"]["test"]:
        assert eval(row["completion"]) == row["target"]
        assert sorted(map(int, re.findall(r"\d+", row["completion"]))) == row["nums"]
        assert row["prompt"] == f"{','.join(map(str, row['nums']))}:{row['target']}"
    four = load_task("countdown", numbers=4)
    assert {len(row["nums"]) for row in four.rows("validation")} == {4}
    assert four.sampler == {"max_new_tokens": 16, "steps": 16}


STORY = (
    (r"There are (\d+) \w+ in a box\.|\w+ has (\d+) \w+\.$", lambda now, n: n),
    (r"\w+ (?:has|finds) (\d+) boxes of (\d+) \w+\.", lambda now, k, n: k * n),
    (r"\w+ (?:buys|adds) (\d+) boxes of (\d+)\.", lambda now, k, n: now + k * n),
    (r"\w+ (?:sells|gets) (\d+) boxes of (\d+)\.", lambda now, k, n: now - k * n),
    (r"\w+ (?:buys|adds) (\d+)(?: more)?\.|(\d+) more come\.", lambda now, n: now + n),
    (r"\w+ sells (\d+)\.|\w+ gets (\d+) of them\.|(\d+) are lost\.", lambda now, n: now - n),
    (r"(?:Then|Soon) there are (\d+) times as many\.", lambda now, n: now * n),
    (r"Each costs (\d+) dollars\.", lambda now, n: now * n),
    (r"(\d+) children share them\.", lambda now, n: now / n),
    (r"How .*\?", lambda now: now),
)


def test_a_word_problem_means_its_answer(generated):
    counts = Counter()
    for row in generated["gsm"]["test"]:
        now = None
        for sentence in re.findall(r".+?[.?](?=\s|$)", row["prompt"]):
            (rule,) = [
                (found, then)
                for form, then in STORY
                if (found := re.fullmatch(form, sentence.strip()))
            ]
            found, then = rule
            now = then(now, *(int(n) for n in found.groups() if n))
        assert now == int(row["answer"]), row
        *steps, last = row["completion"].split("\n")
        assert all(eval(left) == int(right) for left, right in (s.split("=") for s in steps))
        assert last == f"<answer>{row['answer']}</answer>"
        counts[len(steps)] += 1
    assert sorted(counts) == [2, 3, 4]


def test_mathematics_is_solved_by_other_means(generated):
    kinds = Counter()
    for row in generated["math"]["test"]:
        top_bottom = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", row["answer"])
        if top_bottom:
            sign, top, bottom = top_bottom.groups()
            answer = Fraction(int(sign + top), int(bottom))
            assert answer.denominator == int(bottom) > 1, "not in lowest terms"
        else:
            answer = Fraction(int(row["answer"]))
        assert row["completion"].endswith(f"\\boxed{{{row['answer']}}}")
        kind, asked = re.match(r"(Solve for x:|What is) (.*)[.?]", row["prompt"]).groups()
        if kind == "Solve for x:":  # both sides are linear, so that two points give the root
            text = re.sub(r"(\d)x", r"\1*x", asked)
            left, right = text.split(" = ")
            at = [eval(left, {"x": x}) - eval(right, {"x": x}) for x in (0, 1)]
            expected = Fraction(-at[0], at[1] - at[0])
        elif "fraction" in asked:
            kind = "fraction"
            expected = eval(re.sub(r"(\d+)/(\d+)", r"Fraction(\1, \2)", asked.split(" as ")[0]))
        else:
            expected = eval(asked.replace("mod", "%"))
        kinds[kind] += 1
        assert answer == expected, row
    assert min(kinds.values()) > 0.1 * kinds.total()


def options_of(row: dict) -> tuple[str, dict[str, str]]:
    question, *options = row["prompt"].split("\n")
    assert [option[:3] for option in options] == ["A) ", "B) ", "C) ", "D) "]
    return question, {option[0]: option[3:] for option in options}


def test_one_option_is_right_and_it_is_the_answer(generated):
    table = resources.files("mdmrl.tasks").joinpath("conditions.tsv").read_text("utf-8")
    facts = {f["condition"]: f for f in csv.DictReader(table.splitlines(), delimiter="\t")}
    kinds = Counter()
    for row in generated["choice"]["test"]:
        question, options = options_of(row)
        kind, asked = re.match(r"(What is|Which is (?:seen in )?)(.*)\?", question).groups()
        kind = "mod" if " mod " in asked else kind
        if kind == "Which is seen in ":
            right = [
                o for o, text in options.items() if text in facts[asked]["findings"].split("; ")
            ]
        elif kind == "Which is ":
            values = {option: Fraction(text) for option, text in options.items()}
            right = [o for o, value in values.items() if value == max(values.values())]
        else:
            right = [
                o for o, text in options.items() if int(text) == eval(asked.replace("mod", "%"))
            ]
        assert right == [row["answer"]], row
        assert len(set(options.values())) == 4
        kinds[kind] += 1
    assert min(kinds.values()) > 0.15 * kinds.total()
    assert len(kinds) == 4


def test_the_order_of_options_comes_from_the_seed_and_each_letter_is_as_often_right(generated):
    first, second = generated["choice"]["test"], load_task("choice", seed=1).rows("test")
    moved = 0
    for one, other in zip(first, second, strict=True):
        (question, options), (again, shuffled) = options_of(one), options_of(other)
        assert question == again
        assert sorted(options.values()) == sorted(shuffled.values())
        assert options[one["answer"]] == shuffled[other["answer"]]
        moved += options != shuffled
    assert moved > 0.9 * len(first)
    for rows in (first, second, list(itertools.islice(load_task("choice").stream(0), 2000))):
        counts = Counter(row["answer"] for row in rows)
        expected = len(rows) / 4
        chi_squared = sum((counts[letter] - expected) ** 2 / expected for letter in "ABCD")
        assert chi_squared < 16.3  # 0.1 % of uniform draws exceed it, at 3 degrees of freedom


def test_a_puzzle_has_the_one_solution(generated):
    lines = ["".join(line) for line in itertools.permutations("1234")]
    solved = set()
    for rows in itertools.product(lines, repeat=4):
        columns = {"".join(column) for column in zip(*rows, strict=True)}
        boxes = [rows[i][j : j + 2] + rows[i + 1][j : j + 2] for i in (0, 2) for j in (0, 2)]
        if all(len(set(unit)) == 4 for unit in [*columns, *boxes]):
            solved.add("".join(rows))
    assert set(grids()) == solved
    assert len(solved) == 288
    for row in generated["sudoku"]["test"][:200]:
        clues = row["prompt"].replace("\n", "")
        fit = [g for g in solved if all(c in (".", d) for c, d in zip(clues, g, strict=True))]
        assert fit == [row["answer"].replace("\n", "")]
        assert 6 <= clues.count(".") <= 10


def test_a_split_with_few_items_ends(monkeypatch):
    monkeypatch.setattr(items, "ROWS", dict.fromkeys(items.ROWS, 50))

    def draw(rng: random.Random):
        number = rng.randrange(30)
        return str(number), {"prompt": str(number)}

    few = items.Generator("few", draw)
    found = {split: [row["prompt"] for row in few.rows(split)] for split in items.ROWS}
    assert sorted(itertools.chain(*found.values()), key=int) == [str(n) for n in range(30)]


# -- rows from elsewhere ---------------------------------------------------------------------------


def read(tmp_path, name: str, *rows: dict, **options):
    """The task `name` with rows of a file."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_task(name, data=path, **options)


GPQA = {
    "Question": "Which planet is largest?",
    "Correct Answer": "Jupiter",
    **{f"Incorrect Answer {i}": planet for i, planet in enumerate(("Mars", "Venus", "Earth"), 1)},
}
SOLVED = "1234\n3412\n2143\n4321"
PUZZLE = "1.34\n3412\n2143\n432."
LAYOUTS = [
    ("countdown", {"nums": [14, 8, 13], "target": 35}, "8,13,14:35", None),
    ("countdown", {"input": "14,8,13", "output": "35"}, "8,13,14:35", None),
    ("countdown", {"input": [14, 8, 13], "output": 35}, "8,13,14:35", None),
    ("countdown", {"input": "14 8 13 35", "output": "14+8=22,22+13=35"}, "8,13,14:35", "14+8+13"),
    ("gsm", {"question": "Why?", "answer": "3*6=18\n#### 18"}, "Why?", "18"),
    ("gsm", {"prompt": "Why?", "answer": "18"}, "Why?", "18"),
    ("gsm", {"prompt": "Why?", "answer": 18}, "Why?", "18"),
    ("math", {"problem": "What?", "answer": "\\frac{3}{4}", "solution": "So"}, "What?", "0.75"),
    ("math", {"prompt": "What?", "answer": "\\frac{3}{4}"}, "What?", "\\boxed{\\frac34}"),
    ("choice", GPQA, None, None),
    ("choice", {"prompt": "Which?\nA) x\nB) y", "answer": "B"}, "Which?\nA) x\nB) y", "B"),
    ("sudoku", {"puzzle": PUZZLE, "solution": SOLVED}, PUZZLE, SOLVED),
    ("sudoku", {"input": "1034341221434320", "output": SOLVED}, PUZZLE, SOLVED),
    (
        "sudoku",
        {
            "puzzle": [[1, 0, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 0]],
            "solution": [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]],
        },
        PUZZLE,
        "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1",
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "right"), LAYOUTS)
def test_every_layout_is_read(tmp_path, name, row, prompt, right):
    task = read(tmp_path, name, row, row)
    (found, again) = task.rows("rl")
    assert task.rows("test") == [found, again]
    assert task.stream is None
    assert prompt in (None, found["prompt"])
    if name == "countdown":
        assert (found["nums"], found["target"]) == ([8, 13, 14], 35)
    elif right is None:
        _, options = options_of(found)
        assert sorted(options.values()) == ["Earth", "Jupiter", "Mars", "Venus"]
        assert options[found["answer"]] == "Jupiter"
    if right is not None:
        assert task.metric(right, found)
        assert not task.metric("5", found)


def test_options_are_refused_by_name():
    for task, option, message in (
        ("countdown", "number", "unknown option of countdown 'number': did you mean 'numbers'"),
        ("gsm", "numbers", "unknown option of gsm 'numbers'.* known: n_shot"),
        ("medcot", "n_shot", "known: answer_only, encoder, faithful"),
        ("medcot-sections", "n_shot", "known: answer_only, encoder, faithful"),
        ("reasoning", "n_shot", "unknown option of reasoning"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(task, **{option: 1})


def test_rows_of_the_original_s_layout_get_the_length_of_its_solutions(tmp_path):
    row = {"question": "Why?", "answer": "#### 18", "level": 3}
    original = read(tmp_path, "gsm", row)
    assert original.sampler == {"max_new_tokens": 256}
    assert original.rows("test")[0]["level"] == 3  # which one's own reward may read
    assert read(tmp_path, "gsm", {"prompt": "Why?", "answer": "18"}).sampler["steps"] == 48
    four = {"nums": [1, 2, 3, 4], "target": 10}
    assert read(tmp_path, "countdown", LAYOUTS[0][1], four).sampler["max_new_tokens"] == 16


def test_the_options_of_a_file_are_ordered_by_the_seed(tmp_path):
    orders = {read(tmp_path, "choice", GPQA, seed=s).rows("test")[0]["prompt"] for s in range(20)}
    assert len(orders) > 5
    assert len({read(tmp_path, "choice", GPQA).rows("test")[0]["prompt"] for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("countdown", {"nums": [1, 2]}, "field 'target' is missing or empty"),
        ("countdown", {"nums": [1, "x"], "target": 3}, r"field 'nums' is \[1, 'x'\]: expected"),
        ("countdown", {"nums": [True, 2], "target": 3}, "field 'nums' is"),
        ("countdown", {"nums": [1, 2], "target": "3.5"}, "field 'target' is '3.5': expected"),
        ("countdown", {"nums": [1, 2], "target": "1" * 5000}, "field 'target' is '111"),
        ("countdown", {"nums": ["1" * 5000], "target": 3}, "field 'nums' is"),
        ("countdown", {"input": "a,b", "output": "3"}, "field 'input' is 'a,b': expected"),
        ("countdown", {"input": "3", "output": "1+2=3"}, "field 'input' holds the target alone"),
        ("countdown", {"input": "1,2"}, "field 'output' is missing"),
        ("countdown", {"question": "?"}, r"field 'target' is missing.*fields found: question"),
        ("gsm", {"answer": "18"}, "field 'prompt' or 'question' is missing"),
        ("gsm", {"question": "?", "answer": "none"}, "field 'answer' is 'none': expected a number"),
        ("gsm", {"question": ["?"], "answer": "1"}, r"field 'prompt' or 'question' is \['\?'\]"),
        ("math", {"problem": "?", "answer": ""}, "field 'answer' is missing or empty"),
        ("choice", {"prompt": "?", "answer": "E"}, "field 'answer' is 'E': expected a letter"),
        ("choice", {"Question": "?"}, "field 'Correct Answer' is missing"),
        ("sudoku", {"puzzle": "123", "solution": SOLVED}, "field 'puzzle' is '123': expected 16"),
        (
            "sudoku",
            {"puzzle": PUZZLE, "solution": SOLVED.replace("4", "1")},
            "field .solution.* expected a solution of",
        ),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, name, row, message):
    good = next(layout for task, layout, *_ in LAYOUTS if task == name)
    with pytest.raises(InputError, match=rf"mine\.jsonl:2: {message}"):
        read(tmp_path, name, good, row)


def test_the_original_comes_from_the_hub(monkeypatch):
    def load_dataset(name, config=None, split=None):
        assert (name, config) == ("openai/gsm8k", "main")
        return [{"question": f"{split} {i}?", "answer": f"So\n#### {i}"} for i in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = load_task("gsm", data="openai/gsm8k", n_shot=2)
    assert [row["answer"] for row in task.rows("test")] == ["0", "1", "2"]
    shown = "train 0?\nSo\n#### 0\n\ntrain 1?\nSo\n#### 1\n\n"
    assert task.rows("test")[1]["prompt"] == f"{shown}test 1?"
    assert task.sampler == {"max_new_tokens": 256}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="the hub needs pip install datasets"):
        load_task("gsm", data="openai/gsm8k")
    with pytest.raises(InputError, match=r"data='gsm8k': expected FILE\.jsonl, 'reasoning-gym'"):
        load_task("gsm", data="gsm8k")


@pytest.mark.parametrize("name", CHECKED)
def test_worked_examples_are_of_the_pretraining_split(generated, name):
    task = load_task(name, n_shot=3)
    examples = generated[name]["pretrain"][:3]
    shown = "".join(f"{row['prompt']}\n{row['completion']}\n\n" for row in examples)
    plain, found = generated[name]["validation"], task.rows("validation")
    assert [row["prompt"] for row in found] == [shown + row["prompt"] for row in plain]
    assert [row["completion"] for row in found] == [row["completion"] for row in plain]
    with pytest.raises(InputError, match="n_shot=-1: expected 0 or more"):
        load_task(name, n_shot=-1)


def test_worked_examples_of_a_file_are_its_first_rows_and_not_scored(tmp_path, generated):
    rows = [{"question": f"{i}?", "answer": f"So\n#### {i}"} for i in range(4)]
    found = read(tmp_path, "gsm", *rows, n_shot=2).rows("test")
    assert [row["answer"] for row in found] == ["2", "3"]
    assert found[0]["prompt"] == "0?\nSo\n#### 0\n\n1?\nSo\n#### 1\n\n2?"
    with pytest.raises(InputError, match="4 rows, expected more than n_shot=4"):
        read(tmp_path, "gsm", *rows, n_shot=4)
    (bare,) = read(tmp_path, "countdown", {"nums": [1, 2], "target": 3}, n_shot=1).rows("test")
    example = generated["countdown"]["pretrain"][0]
    assert bare["prompt"] == f"{example['prompt']}\n{example['completion']}\n\n1,2:3"


GYM = {  # as version 0.1.25 writes them
    "countdown": {
        "question": "Find a way to make 35 ...",
        "answer": "14 + 8 + 13",
        "metadata": {"numbers": [14, 8, 13], "target": 35, "expression": "14 + 8 + 13"},
    },
    "gsm_symbolic": {
        "question": "How many? Give the result as your final answer. Do not include units.",
        "answer": "44",
        "metadata": {"answer_value": 44, "answer_cot": "53-9=44\n#### 44"},
    },
    "simple_equations": {
        "question": "Solve for e: 56 - 98*e = -1218",
        "answer": "13",
        "metadata": {"equation": "56 - 98*e = -1218", "variable": "e"},
    },
    "mini_sudoku": {
        "question": "In 4x4 Mini Sudoku: ...",
        "answer": "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1",
        "metadata": {
            "puzzle": [[1, 0, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 0]],
            "solution": [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]],
        },
    },
}


def test_items_of_reasoning_gym_have_our_form(monkeypatch):
    def create_dataset(name, size, seed, **settings):
        return [GYM[name]]

    monkeypatch.setattr(items.Generator, "split_of", lambda self, key: "test")
    fake = SimpleNamespace(create_dataset=create_dataset)
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    prompts = {"countdown": "8,13,14:35", "gsm": "How many?", "sudoku": PUZZLE}
    prompts |= {"math": "Solve for x: 56 - 98x = -1218."}
    for name, prompt in prompts.items():
        task = load_task(name, data=Path("reasoning-gym"))  # as the command line has it
        (row,) = task.rows("test")
        assert row["prompt"] == prompt
        assert task.metric(row["completion"], row)
        assert not task.metric("5", row)
    with pytest.raises(InputError, match="reasoning-gym has no items of choice"):
        load_task("choice", data="reasoning-gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install 'mdmrl\[gym\]'"):
        load_task("math", data="reasoning-gym")


@pytest.mark.parametrize("name", ("countdown", "gsm", "math", "sudoku"))
def test_reasoning_gym_itself(monkeypatch, name):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(items, "GYM_ITEMS", 30)
    task = load_task(name, data="reasoning-gym")
    rows = task.rows("test")
    assert len(rows) == 30 if name in ("gsm", "math") else 3 < len(rows) < 20
    learnt = {identity(name, row) for row in itertools.islice(load_task(name).stream(1), 3000)}
    assert not learnt & {identity(name, row) for row in rows}
    assert all(task.metric(row["completion"], row) for row in rows)
    assert load_task(name, data="reasoning-gym").rows("test") == rows
    if name == "countdown":
        assert {len(row["nums"]) for row in rows} == {3}
        assert max(max(row["nums"]) for row in rows) <= 20
        assert all(1 <= row["target"] <= 99 for row in rows)


# -- the mixture, and what completes a task --------------------------------------------------------


def test_the_mixture_is_made_of_its_tasks(generated):
    mixture = load_task("reasoning")
    rows, shares = mixture.rows("validation"), (0.3, 0.25, 0.2, 0.25)
    for found, error in ((rows, 0), (list(itertools.islice(mixture.stream(0), 2000)), 0.04)):
        counts = Counter(row["task"] for row in found)
        names = ("gsm", "math", "choice", "countdown")
        assert [counts[name] / len(found) for name in names] == pytest.approx(shares, abs=error)
    for row in rows:
        own = {key: row[key] for key in row if key not in ("task", "canvas")}
        assert own in generated[row["task"]]["validation"]
        assert row["canvas"] == load_task(row["task"]).sampler["max_new_tokens"]
    with pytest.raises(InputError, match="needs the column 'task'"):
        mixture.rewards[0](["?"], ["!"], answer=["1"])
    with pytest.raises(InputError, match="the mixture has items of its own"):
        load_task("reasoning", data="mine.jsonl")


@pytest.mark.parametrize("share", (0, 1))
def test_pretraining_fills_a_canvas_up_as_the_row_says(monkeypatch, mdm, share):
    monkeypatch.setattr(pretrain, "WHOLE_SHARE", share)
    config, stream = PretrainConfig(batch_size=6, canvas=48), load_task("reasoning").stream
    found = itertools.islice(pretrain.batches(mdm, stream, config), 8)
    lengths = [int(batch.completion[0].sum()) for batch in found]
    canvases = sorted(row["canvas"] for row in itertools.islice(stream(0), 48))
    by_row = [max(canvases[start : start + 6]) for start in range(0, 48, 6)]
    assert lengths == ([48] * 8 if share else by_row)
    assert len(set(by_row)) > 2


def test_a_task_says_its_length_and_steps_where_nothing_else_is_said(ar, mdm):
    task = load_task("countdown")
    assert task.sampler_for(mdm) == {"max_new_tokens": 12, "steps": 12}
    assert task.sampler_for(ar) == {"max_new_tokens": 12}
    assert task.sampler_for(mdm, steps=4) == {"max_new_tokens": 12, "steps": 4}
    assert task.sampler_for(mdm, max_new_tokens=8) == {"max_new_tokens": 8}
    parallel = {"max_new_tokens": 12, "threshold": 0.9}
    assert task.sampler_for(mdm, threshold=0.9) == parallel
    assert load_task("medcot").sampler_for(mdm, temperature=1.0) == {"temperature": 1.0}


@pytest.mark.parametrize(
    ("policy", "said", "expected"),
    [
        ("tiny-mdm", [], (12, {"steps": 12})),
        ("tiny-ar", [], (12, {})),
        ("tiny-mdm", ["sampler.steps=3"], (12, {"steps": 3})),
        ("tiny-mdm", ["max_completion_length=8"], (8, {})),
    ],
)
@pytest.mark.parametrize("command", ("train", "sft"))
def test_training_completes_as_the_task_says(monkeypatch, command, policy, said, expected):
    got = []
    trained = {"train": "mdmrl.rl.grpo.train_grpo", "sft": "mdmrl.training.sft.train_sft"}
    monkeypatch.setattr(trained[command], lambda *given, **more: got.extend(given) or cli.Path())
    arguments = [command, *said, "--policy", policy, "--task", "countdown"]
    monkeypatch.setattr(sys, "argv", ["mdmrl", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    (config,) = [value for value in got if hasattr(value, "max_completion_length")]
    assert (config.max_completion_length, config.sampler) == expected
