"""MedCoT: the table, its splits, the lengths of its texts, and loading other people's rows."""

import itertools
import json
import re
import sys
from collections import Counter

import pytest

from mdmrl.config import InputError
from mdmrl.rewards.text import extract_answer, normalise_answer
from mdmrl.tasks import load_rows, load_task, medcot
from mdmrl.tasks.medcot import (
    OPENINGS,
    PARAGRAPHS,
    QUESTIONS,
    RESPONSES,
    SPLITS,
    TAGGINGS,
    combinations,
    conditions,
    rows,
    stream,
)

LONGEST_COMPLETION = 128  # the canvas of the tiny diffusion model, end token included
LONGEST_PROMPT = 50


@pytest.fixture(scope="module")
def split_rows():
    return {split: rows(split) for split in SPLITS}


# -- the table -------------------------------------------------------------------------------------


def test_the_table_is_whole():
    table = conditions()
    assert len(table) >= 150
    assert len({c.condition for c in table}) == len(table)
    systems = Counter(c.system for c in table)
    assert min(systems.values()) >= 2  # a differential diagnosis needs another condition
    for c in table:
        texts = (c.condition, c.system, c.mechanism, c.test, *c.findings)
        assert all(text and text == text.strip() and ";" not in text for text in texts)
        assert len(set(c.findings)) == len(c.findings) >= 4
        # Findings are joined by commas and "and", so these may not be part of one.
        assert not any("," in f or " and " in f for f in c.findings)


def test_no_three_findings_fit_two_conditions():
    """A question has one right answer."""
    shown = Counter(
        frozenset(three) for c in conditions() for three in itertools.combinations(c.findings, 3)
    )
    assert max(shown.values()) == 1


# -- splits ----------------------------------------------------------------------------------------


def combination_of(row):
    """(condition, findings) of a question, read back from its text alone."""
    for opening in OPENINGS:
        pattern = re.escape(opening).replace(r"\{0\}", "(.+?)").replace(r"\{1\}", "(.+?)")
        match = re.match(pattern.replace(r"\{2\}", "(.+?)"), row["Question"])
        if match:
            shown = frozenset(match.groups())
            (condition,) = [c for c in conditions() if shown <= set(c.findings)]
            assert condition.condition in row["Response"]
            return condition.condition, shown
    raise AssertionError(row["Question"])


def test_splits_share_no_combination_of_condition_and_findings(split_rows):
    found = {split: {combination_of(row) for row in of} for split, of in split_rows.items()}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    every = {
        (c.condition, frozenset(three))
        for c in conditions()
        for three in itertools.combinations(c.findings, 3)
    }
    assert set.union(*found.values()) == every
    for split, share in SPLITS.items():
        assert len(found[split]) / len(every) == pytest.approx(share, abs=0.03)
        expected = {(c.condition.condition, frozenset(c.findings)) for c in combinations(split)}
        assert found[split] == expected


def test_pretraining_never_sees_a_held_out_question(split_rows):
    held_out = {row["Question"] for s in ("rl", "validation", "test") for row in split_rows[s]}
    held_out_combinations = {
        combination_of(row) for s in ("rl", "validation", "test") for row in split_rows[s]
    }
    for i, row in enumerate(itertools.islice(stream(0), 20_000)):
        assert row["Question"] not in held_out
        if i < 2_000:
            assert combination_of(row) not in held_out_combinations


def test_splits_are_fixed_and_ask_every_kind_of_question(split_rows):
    assert rows("rl") == split_rows["rl"]
    assert rows("rl", seed=1) != split_rows["rl"]
    for split, of in split_rows.items():
        asked = Counter(
            kind
            for row in of
            for kind, wordings in QUESTIONS.items()
            if row["Question"].endswith(wordings)
        )
        assert set(asked.values()) == {len(combinations(split))}
        assert asked.keys() == QUESTIONS.keys()


def test_the_stream_goes_on_anywhere():
    whole = list(itertools.islice(stream(5), 30))
    for start in (0, 1, 17):
        assert list(itertools.islice(stream(5, start), 30 - start)) == whole[start:]
    assert list(itertools.islice(stream(6), 30)) != whole
    assert len({row["completion"] for row in whole}) > 25


# -- texts -----------------------------------------------------------------------------------------


def test_rows_hold_what_they_promise():
    facts = {c.condition: c for c in conditions()}
    for row in itertools.islice(stream(1), 500):
        fact = facts[combination_of(row)[0]]
        assert row["prompt"] == row["Question"]
        assert row["Answer"] in (fact.condition, fact.mechanism, fact.test, fact.system)
        assert row["Answer"] in row["Response"]
        assert all(text in row["Complex_CoT"] for text in (fact.condition, fact.test))
        assert row["Complex_CoT"] in row["completion"]
        assert extract_answer(row["completion"]) == normalise_answer(row["Answer"])
    assert set(RESPONSES) == set(QUESTIONS)


def test_habits_of_form_are_imperfect_at_their_rates():
    n = 4000
    texts = [row["completion"] for row in itertools.islice(stream(2), n)]
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    share = sum(all(tag in text for tag in tags) for text in texts) / n
    expected = sum(v for k, v in TAGGINGS.items() if all(tag in k for tag in tags))
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)
    assert sum(TAGGINGS.values()) == pytest.approx(1)
    breaks = Counter(text.count("\n\n") for text in texts)
    gaps = len(PARAGRAPHS) - 1
    for (inner, gap), expected in medcot.SPACINGS.items():
        found = breaks[gaps * (inner == "\n\n") + (gap == "\n\n")] / n
        assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """Number of tokens of each of some texts."""

    def count(texts):
        return [len(ids) for ids in tokenizer(list(texts)).input_ids]

    return count


def longest_texts(fact):
    """Texts about a condition, one for every choice and order of findings and every choice of
    wordings: the longest completion is one of these, tagged in full and widely spaced."""
    for shown in itertools.combinations(fact.findings, 3):
        unseen = [f for f in fact.findings if f not in shown]
        for last in shown:
            one, two = (f for f in shown if f != last)
            slots = {"f0": one, "f1": two, "f2": last}
            slots |= dict(zip(("also", "more", "most"), unseen, strict=True))
            slots |= {k: getattr(fact, k) for k in ("condition", "system", "mechanism", "test")}
            for wordings in itertools.product(*PARAGRAPHS):
                yield "\n\n".join(wording.format(**slots) for wording in wordings)


def test_no_completion_exceeds_the_canvas(tokens):
    """Every completion of the wordiest conditions, the order of two findings aside."""

    def words(fact):
        return sum(tokens([fact.mechanism] * 2 + [fact.test] * 2 + [fact.condition] * 3))

    longest = 0
    for fact in sorted(conditions(), key=words)[-30:]:
        answer = max((fact.condition, fact.mechanism, fact.test), key=lambda a: tokens([a])[0])
        reasoning = max(zip(tokens(longest_texts(fact)), longest_texts(fact), strict=True))[1]
        completions = [t.format(reasoning=reasoning, gap="\n\n", answer=answer) for t in TAGGINGS]
        longest = max(longest, *tokens(completions))
    assert 100 <= longest + 1 <= LONGEST_COMPLETION  # the end token
    sample = tokens(row["completion"] for row in itertools.islice(stream(3), 3000))
    assert max(sample) <= longest


def test_no_prompt_exceeds_its_bound(tokens):
    texts = []
    for fact in conditions():
        lengths = tokens(f" {finding}" for finding in fact.findings)
        longest = [f for _, f in sorted(zip(lengths, fact.findings, strict=True))[-3:]]
        texts += [
            f"<|user|>{opening.format(*longest)} {question}<|assistant|>"
            for opening in OPENINGS
            for wordings in QUESTIONS.values()
            for question in wordings
        ]
    assert max(tokens(texts)) <= LONGEST_PROMPT


# -- the task --------------------------------------------------------------------------------------


def test_the_task_by_name(split_rows):
    task = load_task("medcot")
    assert task.rows("rl") == split_rows["rl"]
    assert task.rows("test", limit=3) == split_rows["test"][:3]
    with_system = task.rows("test", limit=1, system="Think.")[0]
    assert [m["role"] for m in with_system["prompt"]] == ["system", "user"]
    assert with_system["prompt"][1]["content"] == with_system["Question"]
    row = split_rows["test"][0]
    assert task.metric(f"<answer>{row['Answer'].upper()}.</answer>", row)
    assert not task.metric("<answer>nothing</answer>", row)
    assert [reward.__name__ for reward in task.rewards] == ["accuracy", "depth", "format"]
    with pytest.raises(ValueError, match=r"did you mean 'test'"):
        task.rows("tests")
    with pytest.raises(ValueError, match="did you mean 'medcot'"):
        load_task("medcott")


# -- other people's rows ---------------------------------------------------------------------------

GOOD = {"prompt": "Why?", "Answer": "because", "note": 3}


def test_rows_of_jsonl_and_json_are_read(tmp_path):
    other = {"prompt": [{"role": "user", "content": "ü\u2028"}]}
    lines = f"{json.dumps(GOOD)}\r\n\n{json.dumps(other, ensure_ascii=False)}"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([GOOD, other]))
    assert load_rows(tmp_path / "a.jsonl") == [GOOD, other]
    assert load_rows(str(tmp_path / "a.json")) == [GOOD, other]


BAD_LINES = {
    "truncated": (b'{"prompt": "Wh', "no JSON"),
    "missing field": (b'{"question": "Why?"}', r"'prompt' is missing .*question"),
    "empty field": (b'{"prompt": ""}', "'prompt' is missing or empty"),
    "a number": (b'{"prompt": 3}', "'prompt' is missing or empty"),
    "null": (b'{"prompt": null}', "'prompt' is missing or empty"),
    "no object": (b'["prompt"]', "expected an object"),
    "no messages": (b'{"prompt": ["Why?"]}', "'prompt' is .'Why.'.: expected .*list of messages"),
    "no content": (b'{"prompt": [{"role": "user"}]}', "'prompt' is .*list of messages"),
    "bad UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "a number without end": (b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "no JSON"),
    "a depth without end": (b'{"prompt": ' + b"[" * 100_000, "no JSON"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n\n" + good + b"\n" + line + b"\n" + good)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:4: .*{message}"):
        load_rows(path)


def test_lenient_a_malformed_line_is_left_out_and_counted(tmp_path):
    path, good = tmp_path / "mine.jsonl", json.dumps(GOOD).encode()
    lines = [good, *(line for line, _ in BAD_LINES.values()), good]
    path.write_bytes(b"\n".join(lines))
    said = rf"{len(BAD_LINES)} of {len(lines)} rows are left out.*mine.jsonl:2: no JSON"
    with pytest.warns(UserWarning, match=said):
        assert load_rows(path, lenient=True) == [GOOD, GOOD]
    path.write_bytes(lines[1])
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(InputError, match="no rows"):
        load_rows(path, lenient=True)


def test_lines_of_other_systems_are_read(tmp_path):
    path, good = tmp_path / "mine.jsonl", json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\r\n" + good + b"\r\n")
    assert load_rows(path) == [GOOD, GOOD]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: no rows"):
        load_rows(path)
    path = path.with_suffix(".json")
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: no rows"):
        load_rows(path)
    path.write_text('[\n{"prompt": "x"},\n{')
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:3: no JSON"):
        load_rows(path)
    with pytest.raises(InputError, match="no such file"):
        load_rows(tmp_path / "yours.jsonl")


@pytest.mark.parametrize(
    ("name", "value"),
    [("Question", [{"role": "user", "content": "x"}]), ("Answer", 5), ("Response", ["x"])],
)
def test_a_field_of_the_real_format_that_is_no_text_is_named(tmp_path, name, value):
    row = {"Question": "q", "Complex_CoT": "c", "Response": "r"}
    path = tmp_path / "real.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {name: value}))
    with pytest.raises(InputError, match=rf"'{name}' is"):
        load_task("medcot", data=path)
    path.write_text(json.dumps(row | {"Question": "\ud800"}))
    assert sum(map(len, load_task("medcot", data=path).splits.values())) == 1


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_real_format_is_loaded(tmp_path, suffix):
    """Fields of medical-o1-reasoning-SFT; `Answer` only in the thesis's copy."""
    real = [
        {"Question": f"Question {i}?", "Complex_CoT": "Hm.\n\nSo.", "Response": f"It is {i}."}
        for i in range(200)
    ]
    real[0]["Answer"] = "zero"
    text = json.dumps(real) if suffix == "json" else "\n".join(map(json.dumps, real))
    path = tmp_path / f"real.{suffix}"
    path.write_text(text)
    task = load_task("medcot", data=path)
    of = {split: task.rows(split) for split in SPLITS}
    found = {row["Question"]: row for part in of.values() for row in part}
    assert sum(map(len, of.values())) == len(found) == 200
    for row in real:
        expected = {"prompt": row["Question"], "Answer": row.get("Answer", ""), **row}
        assert found[row["Question"]] == expected
    assert load_task("medcot", data=path).rows("rl") == of["rl"]
    assert task.stream is None
    assert task.metric("<answer>Zero.</answer>", found["Question 0?"])
    assert task.metric("<answer>One.</answer>", found["Question 0?"]) is False
    assert task.metric("<answer></answer>", found["Question 1?"]) is None  # nothing to judge by


def test_a_malformed_real_file_is_named(tmp_path):
    path = tmp_path / "real.jsonl"
    path.write_text('{"Question": "x", "Complex_CoT": "y"}')
    with pytest.raises(ValueError, match=r"real\.jsonl:1: field 'Response'"):
        load_task("medcot", data=path)


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="some/rows is no file; the hub needs pip install"):
        load_task("medcot", data="some/rows")


def test_a_split_that_is_empty_is_refused(tmp_path):
    path = tmp_path / "real.jsonl"
    path.write_text('{"Question": "x", "Complex_CoT": "y", "Response": "z"}')
    task = load_task("medcot", data=path)
    (full,) = [split for split in SPLITS if task.splits[split]]
    empty = next(split for split in SPLITS if split != full)
    with pytest.raises(ValueError, match=f"split '{empty}' of medcot is empty"):
        task.rows(empty)


def test_an_answer_of_null_counts_as_none(tmp_path):
    path = tmp_path / "real.jsonl"
    row = {"Question": "x", "Complex_CoT": "y", "Response": "z", "Answer": None}
    path.write_text(json.dumps(row))
    task = load_task("medcot", data=path)
    (found,) = [row for split in SPLITS for row in task.splits[split]]
    assert task.metric("<answer>z</answer>", found) is None


def test_the_split_of_a_real_question_depends_on_its_text_alone(tmp_path):
    assert medcot.split_of("Why?") == medcot.split_of("Why?")
    shares = Counter(medcot.split_of(f"Question {i}") for i in range(5000))
    for split, share in SPLITS.items():
        assert shares[split] / 5000 == pytest.approx(share, abs=0.02)
