"""Rewards by hand on a table of texts, hostile ones among them."""

import random
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from mdmrl.config import InputError
from mdmrl.rewards.medical import (
    REFERENCES_KEPT,
    Accuracy,
    SentenceEncoder,
    capped_depth,
    depth,
    format_tags,
    medical_rewards,
)
from mdmrl.rewards.text import (
    completion_text,
    exact_answer,
    extract_answer,
    repetition,
    strip_tags,
)

FULL = "<reasoning>Hot joint.\n\nUrate.</reasoning>\n\n<answer>Gout</answer>"

# text, depth, format, answer
TEXTS = {
    "all four tags": (FULL, 0.2, 0.6, "gout"),
    "empty": ("", 0.0, 0.0, None),
    "two answers": ("<answer>a</answer> or <answer>b</answer>", 0.0, 0.3, "b"),
    "unclosed": ("<answer>Gout\n\nand more", 0.1, 0.15, "gout and more"),
    "unclosed last": ("<answer>a</answer><answer>b", 0.0, 0.3, "b"),
    "empty last block": ("<answer>a</answer><answer></answer>", 0.0, 0.3, ""),
    "nested": ("<answer>a<answer>b</answer>c</answer>", 0.0, 0.3, "b"),
    "closing tag only": ("gout</answer>", 0.0, 0.15, None),
    "foreign tag in block": ("<answer>gout</reasoning>", 0.0, 0.3, "gout"),
    "tags only": ("<reasoning></reasoning><answer></answer>", 0.0, 0.6, ""),
    "tag repeated": ("<answer>" * 50, 0.0, 0.15, ""),
    "upper-case tags": ("<ANSWER>gout</ANSWER>", 0.0, 0.0, None),
    "tag rebuilt by stripping": ("<ans<answer>wer>x", 0.0, 0.15, "wer>x"),
    "block before sentence": ("<answer>a</answer> The answer is b.", 0.0, 0.3, "a"),
    "sentence": ("So, The Answer is  Gout . And more.", 0.0, 0.0, "gout"),
    "sentence, colon, break": ("The answer is:\n\ngout\nmore", 0.1, 0.0, "gout"),
    "last sentence": ("The answer is a. No, the answer is b!", 0.0, 0.0, "b"),
    "decimal": ("The answer is 5.5 mg. Daily.", 0.0, 0.0, "5.5 mg"),
    "sentence in a tag": ("<reasoning>The answer is gout.</reasoning>", 0.0, 0.3, "gout"),
    "nothing after the phrase": ("the answer is", 0.0, 0.0, ""),
    "unicode": ("<answer>Ménière’s\u00a0Disease。İ</answer>", 0.0, 0.3, "ménière’s disease。i̇"),
    "newlines": ("\n" * 5000, 250.0, 0.0, None),
    "three newlines": ("a\n\n\nb", 0.1, 0.0, None),
    "four newlines": ("a\n\n\n\nb", 0.2, 0.0, None),
    "carriage returns": ("a\r\n\r\nb", 0.0, 0.0, None),
}


@pytest.mark.parametrize(("text", "breaks", "tags", "answer"), TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("wrap", [str, lambda t: [{"role": "assistant", "content": t}]])
def test_texts_by_hand(text, breaks, tags, answer, wrap):
    completion = wrap(text)
    assert depth([""], [completion]) == pytest.approx([breaks])
    assert capped_depth([""], [completion]) == pytest.approx([min(breaks, 0.2)])
    assert format_tags([""], [completion]) == pytest.approx([tags])
    assert extract_answer(completion_text(completion)) == answer


def test_completion_text():
    conversation = [
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "<answer>leaked</answer>"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
    ]
    assert completion_text(conversation) == "\na"
    assert completion_text([]) == ""
    for wrong in (None, 3, ["a"]):
        with pytest.raises(TypeError, match="expected a string or a list of messages"):
            completion_text(wrong)


def test_strip_tags_keeps_words_apart():
    assert strip_tags("<reasoning>urate</reasoning><answer>gout</answer>") == "urate  gout"
    assert strip_tags("<ans<answer>wer>x") == "<ans wer>x"


def test_exact_answer():
    assert exact_answer(FULL, "gout.")
    assert exact_answer("The answer is GOUT.", "Gout")
    assert not exact_answer(FULL, "urate")
    assert not exact_answer("gout", "gout")
    assert not exact_answer("<answer></answer>", "")


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1] * 8) == 1 - 1 / 5
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)


@pytest.mark.parametrize(
    "unit", ["<answer>", "<", "\n", "</answer>", "the answer is ", ".", " ", "<answer", ". \n<é"]
)
def test_hostile_text_takes_linear_time(unit):
    text = unit * (2_000_000 // len(unit))
    began = time.perf_counter()
    extract_answer(text)
    strip_tags(text)
    exact_answer("the answer is " + text, "gout")
    depth([""], [text])
    format_tags([""], [text])
    assert time.perf_counter() - began < 2  # some 0.1 s; quadratic time would be hours


# -- Accuracy -----------------------------------------------------------------------------------


class CountingEncoder(SentenceEncoder):
    """Counts what reaches the network."""

    def __init__(self, name="minilm"):
        super().__init__(name)
        self.batches = []

    def embed(self, texts):
        self.batches.append(list(texts))
        return super().embed(texts)


@pytest.fixture
def accuracy():
    reward = Accuracy()
    model = reward.encoder.model  # loaded once for all tests
    reward.encoder = CountingEncoder()
    reward.encoder.model = model
    return reward


@pytest.mark.parametrize(
    ("a", "b", "cosine"),
    [
        ("pulmonary embolism", "a blood clot in the lung", 0.58),
        ("pulmonary embolism", "hypospadias", 0.02),
        ("pulmonary embolism", "myocardial infarction", 0.33),
        ("Hypospadias", "The condition is hypospadias.", 0.84),
        ("hypertension", "hypotension", 0.48),
    ],
)
def test_packaged_encoder_gives_the_known_cosines(accuracy, a, b, cosine):
    (value,) = accuracy([""], [a], Response=[b])
    assert value / 2 == pytest.approx(cosine, abs=0.02)


def test_accuracy_of_extremes(accuracy):
    response = "The most likely diagnosis is gout."
    completions = [
        f"<reasoning></reasoning><answer>{response}</answer>",
        "",
        "<reasoning></reasoning><answer></answer>",
        "\n" * 5000,
        "\ud800 a lone surrogate",
        "gout",
        "gout",
    ]
    references = [response] * 5 + [None, " "]
    values = accuracy([""] * 7, completions, Response=references)
    assert values[0] == pytest.approx(2.0, abs=1e-5)
    assert values[1:4] == [0.0, 0.0, 0.0]
    assert 0 <= values[4] < 1
    assert values[5:] == [None, None]
    assert accuracy([], [], Response=[]) == []


def test_accuracy_is_clamped(accuracy):
    accuracy.encoder.embed = lambda texts: np.array(
        [[-1.0 if t == "no" else 1.0001] for t in texts]
    )
    values = accuracy(["", ""], ["yes", "no"], Response=["ref", "ref"])
    assert values == [2.0, 0.0]


def test_answer_only_reads_the_answer_tag():
    reward = Accuracy(answer_only=True)
    completions = ["Long story. <answer>gout</answer>", "The answer is gout.", FULL]
    values = reward([""] * 3, completions, Answer=["gout", "gout", "fracture"], Response=[""] * 3)
    assert values[0] == pytest.approx(2.0, abs=1e-5)
    assert values[1] == 0.0
    assert values[2] < 1


def test_references_are_encoded_once_and_equal_completions_together(accuracy):
    rows = dict(completions=["a", "b", "a", "a"], Response=["r", "r", "r", "s"])
    first = accuracy([""] * 4, **rows)
    assert accuracy.encoder.batches == [["a", "b"], ["r"], ["s"]]
    assert first[0] == first[2]
    accuracy.encoder.batches.clear()
    # Bit for bit: a resumed run starts with an empty cache and must see the same rewards.
    assert accuracy([""] * 4, **rows) == first
    assert accuracy.encoder.batches == [["a", "b"]]
    assert accuracy.encoder.reference.cache_info().maxsize == REFERENCES_KEPT


def test_texts_beyond_the_window_are_counted_and_reported_once(accuracy):
    long = "gout " * 300
    with pytest.warns(UserWarning, match="1 of 2 texts exceed the 256 tokens"):
        accuracy(["", ""], [long, "short"], Response=["r", "r"])
    assert accuracy.encoder.truncated == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracy([""], [long + "more"], Response=[long])
    assert accuracy.encoder.truncated == 3


def test_encoding_leaves_global_state_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    encoder = SentenceEncoder()
    encoder.embed(["a", "b"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert threads == torch.get_num_threads()


def test_missing_references_are_named(accuracy):
    with pytest.raises(ValueError, match=r"needs the column 'Response'.* 2 completions, got none"):
        accuracy(["", ""], ["a", "b"], Answer=["a", "b"])
    with pytest.raises(ValueError, match="got 1"):
        accuracy(["", ""], ["a", "b"], Response=["a"])
    for reference in (5, ["a"], True):
        with pytest.raises(InputError, match=r"Response=.* of completion 1: expected a text"):
            accuracy(["", ""], ["a", "b"], Response=["a", reference])


def test_an_encoder_that_cannot_be_loaded_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", unreachable)
    with pytest.raises(InputError, match="encoder 'no/model': expected 'minilm', a folder"):
        SentenceEncoder("no/model").embed(["a"])


def test_components_are_called_the_way_trl_does():
    rewards = medical_rewards()
    assert [reward.__name__ for reward in rewards] == ["accuracy", "depth", "format"]
    row = dict(Question="q", Complex_CoT="c", Response="It is gout.", Answer="gout")
    columns = {name: [value] * 2 for name, value in row.items()}
    prompts = [[{"role": "user", "content": "q"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in (FULL, "")]
    called = dict(completion_ids=[[1], [2]], trainer_state=None, log_extra=print, **columns)
    values = [r(prompts=prompts, completions=completions, **called) for r in rewards]
    assert 0 < values[0][0] <= 2
    assert [v[0] for v in values[1:]] == pytest.approx([0.2, 0.6])
    assert [v[1] for v in values] == [0.0, 0.0, 0.0]
    variants = medical_rewards(faithful=False, answer_only=True)
    assert [r.__name__ for r in variants] == ["answer_accuracy", "capped_depth", "format"]
    assert Accuracy().encoder is rewards[0].encoder  # one model a process


def test_a_reward_with_options_shows_them():
    assert repr(Accuracy()) == "Accuracy('minilm', answer_only=False)"
    assert repr(Accuracy("elsewhere", True)) == "Accuracy('elsewhere', answer_only=True)"


def test_import_is_light():
    heavy = "{'torch', 'sentence_transformers', 'transformers', 'numpy'}"
    code = f"import sys, mdmrl.rewards; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
