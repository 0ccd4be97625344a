"""The reward explorer against the rewards themselves."""

import pytest

from mdmrl.study.explorer import Explorer
from mdmrl.tasks import load_task
from mdmrl.tasks.base import Task


def test_medical_components_and_why():
    task = load_task("medcot")
    row = task.rows("validation", 1)[0]
    text = f"<reasoning>{row['Response']}\n\n</reasoning><answer>{row['Answer']}"
    shown = Explorer(task, row, text).table(text).set_index("component")
    assert shown.value["depth"] == pytest.approx(0.1) and "1 paragraph" in shown.why["depth"]
    assert shown.value["format"] == pytest.approx(0.45) and "</answer>" in shown.why["format"]
    paid = shown.value[["accuracy", "depth", "format"]].sum()
    assert shown.value["reward"] == pytest.approx(paid)
    assert shown.value["exact"] == float(task.metric(text, row))


def test_code_says_which_test_failed():
    task = load_task("code", parts=True)
    row = task.rows("validation", 1)[0]
    explorer = Explorer(task, row, row["completion"])
    right = explorer.table(row["completion"]).set_index("component")
    assert right.value["correctness_reward"] == 1 and right.why["correctness_reward"] == "passed"
    assert right.value["exact"] == 1
    wrong = explorer.table("    return None").set_index("component")
    assert wrong.value["correctness_reward"] == pytest.approx(-0.3)
    assert "assert" in wrong.why["correctness_reward"]


def test_the_widget_follows_the_text(monkeypatch):
    """Also a reward of one's own that abstains, with a reason of its own."""

    def length(prompts, completions, **columns):
        return [float(len(text)) if text else None for text in completions]

    task = Task("mine", {}, rewards=[length])
    explorer = Explorer(task, {"prompt": "?"}, "abc", {"length": lambda *_: "its <length>"})
    box = explorer.widget()
    text, view = box.children
    assert "its &lt;length&gt;" in view.value and ">3<" in view.value
    text.value = ""
    assert view.value == explorer.shown("") and "abstains" in view.value
    assert "never paid" not in view.value
    monkeypatch.setenv("MDMRL_NOTEBOOK", "02_rewards")
    assert explorer._repr_mimebundle_() == {"text/html": explorer._repr_html_()}
