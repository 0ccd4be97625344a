"""`mdmrl eval`: a policy's evaluation and its run folder, stored generations, comparisons."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats

from mdmrl import Task, cli
from mdmrl.config import InputError
from mdmrl.evaluation.generations import compare, score_generations
from mdmrl.evaluation.stats import paired_interval, wilson_interval
from mdmrl.policies import add_lora
from mdmrl.runs import read_rows
from mdmrl.tasks import load_task

TASKS = """
from mdmrl import Task

ROWS = [{"prompt": f"Question {i}?", "number": i} for i in range(6)]
half = Task("half", {"test": ROWS, "rl": ROWS}, metric=lambda text, row: row["number"] % 2 == 0,
            sampler={"max_new_tokens": 6, "steps": 3}, extract=lambda text: text[:1])
drawn = Task("drawn", {"test": ROWS}, metric=lambda text, row: sum(map(ord, text)) % 2 == 0)
"""
TEXT = Task("text", {}, metric=lambda text, row: text == row["answer"])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path


@pytest.fixture
def saved(mdm, ar):
    for name, policy in (("mdm", mdm), ("ar", ar)):
        policy.save_pretrained(name)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `mdmrl eval`; returns what it printed, or its one line of error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mdmrl", "eval", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert stop.value.code in (0, None, 2)
        if stop.value.code != 2:
            return said.out
        assert said.err.startswith("mdmrl: ") and said.err.count("\n") == 1, said.err
        return said.err

    return run


def written(file="out.json"):
    return json.loads(Path(file).read_text())


# -- a policy --------------------------------------------------------------------------------------


def test_a_policy_is_evaluated_as_the_task_says(call, saved):
    for policy, nfe in (("mdm", 3), ("ar", 6)):
        said = call(policy, "--task", "tasks.py:half", "--json", "out.json")
        assert "6 items: runs/eval" in said
        found = written()
        assert found["accuracy"] == 0.5
        assert found["n"] == 6
        assert found["interval"] == pytest.approx(wilson_interval(3, 6)[1:])
        assert (found["task"], found["policy"], found["seeds"]) == ("half", policy, [0])
        assert found["sampler"]["max_new_tokens"] == found["nfe"] * 6 // nfe == 6
        assert found["environment"]["torch"]
        folder = Path(found["folder"])
        assert folder.parent == Path("runs/eval") and folder.name.startswith(f"{policy}-half-")
        rows = read_rows(folder / "examples.jsonl")
        assert [row["score"] for row in rows] == [1, 0] * 3
        assert all(row["extracted"] == row["completion"][:1] for row in rows)
        assert sum(row["positions"] for row in rows) == found["positions"]
        config = json.loads((folder / "config.json").read_text())
        assert config["sampler"]["steps"] == (3 if policy == "mdm" else None)
        assert config["policy"]["weights"]
        assert (folder / "environment.json").exists()
        assert written(folder / "summary.json") == found


def test_what_is_said_takes_the_place_of_what_the_task_says(call, saved):
    words = ("--task", "tasks.py:half", "--json", "out.json")
    for said, length, steps in (
        (["--sampler", "max_new_tokens=4"], 4, None),
        (["--sampler", "steps=2"], 6, 2),
        (["--sampler", "threshold=0.9"], 6, None),
        (["--steps", "6"], 6, 6),
    ):
        call("mdm", *words, *said)
        sampler = written()["sampler"]
        assert (sampler["max_new_tokens"], sampler["steps"]) == (length, steps), said
    call("mdm", *words, "--steps", 2, "--steps", 3, "--output-dir", "mine")
    found = written()
    assert [report["sampler"]["steps"] for report in found] == [2, 3]
    assert [report["folder"] for report in found] == ["mine/steps-2", "mine/steps-3"]


def test_an_evaluation_that_is_there_is_not_made_again(call, saved, monkeypatch):
    words = ("mdm", "--task", "tasks.py:half", "--json", "out.json")
    call(*words)
    first = Path("out.json").read_text()
    monkeypatch.setattr("mdmrl.evaluation.accuracy.Judge.__call__", None)
    call(*words)
    assert Path("out.json").read_text() == first


def test_progress_is_shown(saved, monkeypatch, capsys):
    words = ["eval", "mdm", "--task", "tasks.py:half", "--batch-size", "4"]
    cli.app(words, standalone_mode=False)
    assert "half: completion 6 of 6, accuracy 0.5, 0 s left" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    cli.app([*words[:-1], "5"], standalone_mode=False)
    shown = capsys.readouterr().err
    assert "half: 100%" in shown and "6/6" in shown and "accuracy=0.5" in shown


def test_rows_of_ones_own(call, saved, here):
    rows = [{"prompt": f"Mine {i}?", "number": 2 * i} for i in range(3)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("ar", "--task", "tasks.py:half", "--data", "rows.jsonl", "--json", "out.json")
    found = written()
    assert (found["n"], found["accuracy"]) == (3, 1)


def test_an_adapter_is_put_on_a_policy(call, saved, ar):
    add_lora(ar, r=2, seed=0)
    with torch.no_grad():
        for name, weight in ar.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    ar.save_pretrained("adapter")
    words = ("--task", "tasks.py:half", "--sampler", "max_new_tokens=4")
    call("ar", *words, "--output-dir", "plain")
    call("ar", *words, "--adapter", "adapter", "--output-dir", "adapted")
    call("adapter", *words, "--output-dir", "folder")  # which names its base
    texts = {
        name: [row["completion"] for row in read_rows(Path(name) / "examples.jsonl")]
        for name in ("plain", "adapted", "folder")
    }
    assert texts["adapted"] == texts["folder"] != texts["plain"]


def test_a_table_that_is_none_is_found_before_any_work_and_left_alone(call, saved):
    words = ("mdm", "--task", "tasks.py:half", "--csv", "mine.csv", "--output-dir", "kept")
    for content in (b"", b"\xff\xfe\x00", b"a,b\n1,2,3\n4,5,6,7\n"):
        Path("mine.csv").write_bytes(content)
        assert "mine.csv is no CSV to append to" in call(*words)
        assert Path("mine.csv").read_bytes() == content
    assert not Path("kept").exists()
    Path("file").touch()
    assert "no folder that can be written" in call(*words[:3], "--output-dir", "file")


def test_several_seeds_and_pass_at_k(call, saved):
    words = ["ar", "--task", "tasks.py:drawn", "--sampler", "max_new_tokens=4"]
    words += ["--sampler", "temperature=1", "--json", "out.json"]
    said = call(*words, "--seed", 0, "--seed", 1, "--samples", 4, "--k", 1, "--k", 3, "--k", 8)
    found = written()
    assert (found["n"], found["completions"], found["seeds"]) == (6, 48, [0, 1])
    assert found["by_seed"].keys() == {"0", "1"}
    assert sum(found["by_seed"].values()) / 2 == pytest.approx(found["accuracy"])
    chances = [found["pass@k"][k]["estimate"] for k in ("1", "3", "8")]
    assert chances[0] == pytest.approx(found["accuracy"])
    assert chances == sorted(chances)
    assert "pass@8" in said and "6 items, 48 completions" in said
    for word, message in (
        (("--samples", 2), "samples=2: at temperature=0"),
        (("--seed", 0, "--seed", 1), "seeds=[0, 1]: at temperature=0"),
    ):
        assert message in call("ar", "--task", "tasks.py:drawn", *word)
    assert "k=9: expected 1 to 8" in call(*words, "--samples", 8, "--k", 9)


def test_what_is_asked_must_be_one_thing(call):
    assert "got none of them: expected one of a policy, --generations, --compare" in call()
    assert "got policy, compare: expected one of" in call("mdm", "--compare", "a", "b")
    assert "--compare would ignore --k, --task" in call(
        "--compare", "a", "b", "--task", "gsm", "--k", 1
    )
    assert "--generations would ignore --n-shot" in call("--generations", "a", "--n-shot", 1)
    assert "unknown option of medcot 'n_shot'" in call("mdm", "--n-shot", 2)
    assert "takes no options, got n_shot" in call("mdm", "--task", "tasks.py:half", "--n-shot", 2)


# -- stored generations ----------------------------------------------------------------------------


def write(name, rows):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    Path(name).write_text(text)
    return name


def d1(name, *entries):
    fields = ("question", "generations", "ground_truth")
    generations = [dict(zip(fields, entry, strict=True)) for entry in entries]
    return write(name, json.dumps({"generations": generations, "gen_length": 128}))


COUNTDOWN = [
    {"completion": "14+(8+13)", "nums": [8, 13, 14], "target": 35},
    {"completion": "14+8+14", "nums": [8, 13, 14], "target": 36},
    {"completion": "", "nums": [1, 2], "target": 3},
    {"completion": [{"role": "assistant", "content": "1+2"}], "nums": [1, 2], "target": 3},
]


def test_rows_and_the_layout_of_d1_are_one_set(call):
    rows = write("rows.jsonl", COUNTDOWN)
    end = "<|eot_id|><|endoftext|>" + "<|endoftext|>" * 3
    stored = d1(
        "countdown_128_0_generations.json",
        [
            "Numbers: [49, 55, 53]",
            f"so\n<answer>\n\\boxed{{49+55-53}}\n</answer>{end}",
            [[49, 55, 53], 51],
        ],
        ["Numbers: [3, 4]", f"<answer>3+3</answer>{end}", [[3, 4], 6]],
        ["Numbers: [3, 4]", f"3*4<|endoftext|>\\boxed{{3+4}}{end}", [[3, 4], 12]],
    )
    said = call(
        *("--task", "countdown", "--generations", rows, "--generations", stored, "--json", "o.json")
    )
    assert said == "countdown: accuracy 0.571 [0.25, 0.842], 7 items\n"
    found = written("o.json")
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["n"] == 7
    assert found["interval"] == pytest.approx(list(wilson_interval(4, 7)[1:]))
    assert found["files"] == [rows, stored]
    assert (found["prompts"], found["left_out"], found["task"]) == (6, 0, "countdown")


def test_answers_of_gsm_are_numbers_or_texts():
    path = d1(
        "gsm.json",
        ["a", "The answer is 18.", 18.0],
        ["b", "<answer>1,000</answer>", "200 * 5 = <<200*5=1000>>1000\n#### 1,000"],
        ["c", "\\boxed{0.5}", 0.5],
        ["d", "#### 7", 8],
        ["e", "#### 7", None],
    )
    found = score_generations(load_task("gsm"), [path])
    assert found.score.tolist()[:4] == [1, 1, 1, 0]
    assert pd.isna(found.score[4])
    assert found.extracted.tolist() == ["18", "1000", "1/2", "7", "7"]
    rows = write(
        "gsm.jsonl", [{"completion": "#### 7", "answer": 7}, {"completion": "", "answer": "7"}]
    )
    assert score_generations(load_task("gsm"), [rows]).score.tolist() == [1, 0]


def test_choices_and_mathematics():
    path = d1("choice.json", ["a", "<answer>B</answer>", "B"], ["b", "A or B", "B"])
    assert score_generations(load_task("choice"), [path]).score.tolist() == [1, 0]
    path = d1("math.json", ["a", r"so \boxed{\frac{1}{2}}", "0.5"], ["b", "it is 4", r"\sqrt{2}"])
    assert score_generations(load_task("math"), [path]).score.tolist() == [1, 0]


def test_other_layouts_of_countdown_and_any_text_are_scored():
    target = {"completion": "8+13+14", "input": "8,13,14", "output": "35"}
    solution = {"completion": "8+13", "input": "8,13,14,35", "output": "8+13=21,21+14=35"}
    surrogate = {"completion": "\ud8001", "nums": [1], "target": 1}
    path = write("rows.jsonl", [target, solution, surrogate])
    assert score_generations(load_task("countdown"), [path]).score.tolist() == [1, 0, 0]


ROW = {"completion": "1+2", "nums": [1, 2], "target": 3}
BAD = {
    "no file": (None, r"bad\.jsonl: there is no such file"),
    "no JSON": ('{"completion"', r"bad\.jsonl:1: no JSON"),
    "no object": ("[1]\n", r"bad\.jsonl:1: expected an object"),
    "nothing": ("\n", r"bad\.jsonl: no rows"),
    "no completion": ([ROW, {"nums": [1], "target": 1}], r"bad\.jsonl:2: no completion"),
    "no text": ([ROW | {"completion": 3}], r"bad\.jsonl:1: completion 3: expected a string"),
    "odd messages": ([ROW | {"completion": ["x"]}], r"bad\.jsonl:1: completion \['x'\]: expected"),
    "no target": ([{"completion": "1", "nums": [1]}], r"bad\.jsonl:1: no column 'target'"),
    "words": ([ROW | {"nums": ["one"]}], r"bad\.jsonl:1: nums=\['one'\], target=3: expected"),
    "half": ([ROW | {"target": 0.5}], r"bad\.jsonl:1: .*target=0.5: expected"),
    "empty set": ('{"generations": []}', r"bad\.jsonl: no generations"),
    "no entry": ('{"generations": [3]}', r"bad\.jsonl: generations\[0\]: expected an object"),
    "other entry": (
        '{"generations": [{"question": "", "text": ""}]}',
        r"generations\[0\]: no generations, ground_truth \(found: question, text\)",
    ),
    "no text there": (
        '{"generations": [{"question": "", "generations": ["a"], "ground_truth": [[1], 1]}]}',
        r"generations\[0\]: generations is \['a'\]: expected a text",
    ),
    "no pair": (
        '{"generations": [{"question": "", "generations": "a", "ground_truth": 4}]}',
        r"generations\[0\]: ground_truth is 4: expected \[\[numbers\], target\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_named(name):
    rows, message = BAD[name]
    if rows is not None:
        write("bad.jsonl", rows)
    with pytest.raises(InputError, match=message):
        score_generations(load_task("countdown"), ["bad.jsonl"])


def test_an_answer_is_a_text_or_a_number():
    path = write("bad.jsonl", [{"completion": "7", "answer": [7]}])
    with pytest.raises(
        InputError, match=r"bad\.jsonl:1: answer \[7\]: expected a text or a number"
    ):
        score_generations(load_task("gsm"), [path])
    path = write("bad.jsonl", [{"completion": "7", "answer": "seven"}])
    with pytest.raises(InputError, match=r"bad\.jsonl:1: answer 'seven': expected one number"):
        score_generations(load_task("gsm"), [path])
    with pytest.raises(InputError, match="task none has no metric"):
        score_generations(Task("none", {}), [path])


def test_a_task_of_ones_own_scores_as_it_likes():
    path = write(
        "rows.jsonl", [{"completion": "x", "answer": "x"}, {"completion": "y", "answer": 3}]
    )
    assert score_generations(TEXT, [path]).score.tolist() == [1, 0]


# -- comparisons -----------------------------------------------------------------------------------


def examples(name, scores, **more):
    rows = [{"prompt_hash": key, "score": score, **more} for key, score in scores.items()]
    return write(name, rows)


def test_two_evaluations_are_paired_by_prompt(call):
    a = dict(enumerate("1110000011"))
    b = dict(enumerate("1011111011"))
    a, b = ({f"{k}": int(v) for k, v in x.items()} for x in (a, b))
    one = examples("a.jsonl", a)
    other = examples("b.jsonl", dict(reversed(b.items())))  # in another order
    said = call("--compare", one, other, "--json", "out.json")
    found = written()
    assert (found["both"], found["only_a"], found["only_b"], found["neither"]) == (4, 1, 4, 1)
    assert (found["a"]["accuracy"], found["b"]["accuracy"], found["n"]) == (0.5, 0.8, 10)
    assert found["p"] == pytest.approx(stats.binomtest(1, 5).pvalue)
    interval = paired_interval(4, 1, 10)
    assert [found["difference"], *found["interval"]] == pytest.approx(list(interval))
    assert found["difference"] == pytest.approx(0.3)
    assert "McNemar's exact p = 0.375" in said
    # What one of the two does not judge is in neither accuracy.
    examples("a.jsonl", a | {"0": None})
    found = compare(one, other)
    assert (found["n"], found["left_out"], found["both"]) == (9, 1, 3)


def test_policies_are_compared_by_their_folders(call, saved):
    for policy in ("mdm", "ar"):
        call(policy, "--task", "tasks.py:drawn", "--output-dir", policy + "-run")
    found = compare("mdm-run", "ar-run/examples.jsonl")
    assert found["n"] == 6
    frames = [pd.read_json(f"{policy}-run/examples.jsonl", lines=True) for policy in ("mdm", "ar")]
    inside = compare(*frames)
    assert inside.pop("a")["accuracy"] == found.pop("a")["accuracy"] == frames[0].score.mean()
    assert inside.pop("b")["name"] == "b" != found.pop("b")["name"]
    assert inside == found
    with pytest.raises(InputError, match="a has 6 items and b has 5, of which 5 are"):
        compare(frames[0], frames[1][1:])
    call("ar", "--task", "tasks.py:drawn", "--limit", 4, "--output-dir", "four")
    with pytest.raises(InputError, match=r"mdm-run has 6 items and four has 4, of which 4 are in"):
        compare("mdm-run", "four")


def test_stored_generations_are_compared_too(call):
    for name, answers in (("one", "189"), ("other", "188")):
        entries = [["a", f"#### {answers[0]}", 1], ["b", f"#### {answers[1:]}", 88]]
        call("--task", "gsm", "--generations", d1(name, *entries), "--output-dir", f"{name}-run")
    found = compare("one-run", "other-run")
    assert (found["n"], found["both"], found["only_b"]) == (2, 1, 1)


def test_what_cannot_be_paired_is_refused():
    one = examples("a.jsonl", {"p": 1, "q": 0})
    for name, scores, message in (
        ("b.jsonl", {"p": 1, "r": 0}, "2 items and b.jsonl has 2, of which 1 are in both"),
        ("c.jsonl", {"p": 0.5, "q": 1}, r"c\.jsonl:1: expected prompt_hash and a score of 0, 1"),
        ("d.jsonl", {"p": None, "q": None}, "no item is judged in both"),
    ):
        with pytest.raises(InputError, match=message):
            compare(one, examples(name, scores))
    with pytest.raises(InputError, match="there is no such file of examples"):
        compare(one, "none.jsonl")
    for odd in (3, None, ["p"]):
        with pytest.raises(InputError, match=r"odd\.jsonl:1: expected prompt_hash"):
            compare(one, write("odd.jsonl", [{"prompt_hash": odd, "score": 1}]))
    rows = [{"prompt_hash": "p", "score": 1, "seed": s, "sample": 0} for s in (0, 1)]
    with pytest.raises(InputError, match=r"twice\.jsonl has 2 completions of an item"):
        compare(write("twice.jsonl", rows), one)


def test_a_prompt_that_is_there_twice_is_two_items():
    rows = [{"prompt_hash": "p", "score": score} for score in (1, 0)]
    found = compare(write("a.jsonl", rows), write("b.jsonl", rows[::-1]))
    assert (found["n"], found["only_a"], found["only_b"]) == (2, 1, 1)
