"""The lm-evaluation-harness asks the study's policies (needs the extra `lm-eval`)."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mdmrl.config import InputError
from mdmrl.evaluation.likelihood import log_likelihoods
from mdmrl.sampling import SamplerConfig, generate

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mdmrl.evaluation.lm_eval import PolicyLM  # noqa: E402

CHOICES = ["joint aspiration", "blood count", "rest"]
ROWS = [
    {"question": "Which test is decisive for gout?", "choices": CHOICES, "gold": 0},
    {"question": "What helps against fever?", "choices": CHOICES[::-1], "gold": 1},
]


@pytest.fixture
def tasks(tmp_path):
    """The folder of two local tasks, `local_text` and `local_choice`, over ROWS."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    text = {
        "task": "local_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    for task in (text, choice):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return tmp_path


def asked(kind, *arguments):
    return [Instance(kind, {}, arguments, 0)]


def answer(lm, text, **gen_kwargs):
    return lm.generate_until(asked("generate_until", text, gen_kwargs), disable_tqdm=True)[0]


def plain(policy):
    """The same policy as a base model, which continues texts as they stand."""
    policy = copy.copy(policy)
    policy.tokenizer = copy.deepcopy(policy.tokenizer)
    policy.tokenizer.chat_template = None
    return policy


def test_the_harness_runs_local_tasks(any_policy, tasks):
    """Texts are those of `generate`, choices those with the highest log-likelihood."""
    lm = PolicyLM(any_policy, batch_size=4, n_mc=8)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    done = lm_eval.simple_evaluate(
        lm, tasks=["local_text", "local_choice"], task_manager=manager, bootstrap_iters=0
    )
    questions = [row["question"] for row in ROWS]
    config = SamplerConfig(max_new_tokens=8 if any_policy.block_length else 6)
    output = generate(plain(any_policy), questions, config)
    texts = any_policy.decode(output.completion_ids[:, :6], output.completion_mask[:, :6])
    samples = sorted(done["samples"]["local_text"], key=lambda sample: sample["doc_id"])
    assert [s["resps"][0][0] for s in samples] == [text.split("\n\n")[0] for text in texts]

    right = []
    for row in ROWS:
        (context,) = any_policy.tokenize([row["question"]])
        wholes = any_policy.tokenize([f"{row['question']} {choice}" for choice in row["choices"]])
        pairs = [(context, ids[len(context) :]) for ids in wholes]
        values = [value for value, _ in log_likelihoods(any_policy, pairs, n_mc=8)]
        right.append(values.index(max(values)) == row["gold"])
    assert done["results"]["local_choice"]["acc,none"] == sum(right) / len(right)


def test_a_request_says_how_texts_are_drawn(mdm):
    lm = PolicyLM(mdm, steps=4, seed=3)
    config = SamplerConfig(max_new_tokens=8, steps=4)
    (greedy,) = generate(plain(mdm), ["What is fever?"], config).completions
    assert answer(lm, "What is fever?", max_gen_toks=8, do_sample=False, top_p=0.9) == greedy
    assert (
        answer(lm, "What is fever?", max_gen_toks=8, until=greedy[5]) == greedy.split(greedy[5])[0]
    )
    sampled = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    assert answer(lm, "What is fever?", **sampled) == answer(lm, "What is fever?", **sampled)
    assert answer(lm, "What is fever?", **sampled) != greedy
    assert answer(PolicyLM(mdm, steps=4), "What is fever?", **sampled) != answer(
        lm, "What is fever?", **sampled
    )
    with pytest.raises(InputError, match="did you mean 'remasking'"):
        answer(lm, "What is fever?", remaskin="random")
    with pytest.raises(InputError, match="did you mean 'steps'"):
        PolicyLM(mdm, stpes=4)
    with pytest.raises(InputError, match="batch_size='auto'"):
        PolicyLM(mdm, batch_size="auto")


def test_the_chat_template_is_that_of_generate(policy):
    lm = PolicyLM(policy)
    rendered = lm.apply_chat_template([{"role": "user", "content": "What is fever?"}])
    config = SamplerConfig(max_new_tokens=8)
    (text,) = generate(policy, ["What is fever?"], config).completions
    assert answer(lm, rendered, max_gen_toks=8) == text


def test_what_is_too_long_loses_its_beginning(any_policy):
    lm, limit = PolicyLM(any_policy, n_mc=1), any_policy.context_length
    longer = "fever " * limit
    room = limit - 8
    kept = any_policy.tokenizer.decode(lm.tok_encode(longer)[-room:])
    assert len(lm.tok_encode(kept)) == room
    assert answer(lm, longer, max_gen_toks=8) == answer(lm, kept, max_gen_toks=8)
    context, rest = lm._encode_pair(longer, " rest")
    room = limit - (any_policy.block_length or len(rest))
    (by_hand,) = log_likelihoods(any_policy, [(context[-room:], rest)], n_mc=1)
    (found,) = lm.loglikelihood(asked("loglikelihood", longer, " rest"), disable_tqdm=True)
    assert found == pytest.approx(by_hand)
    with pytest.raises(InputError, match="leave no room"):
        answer(lm, "x", max_gen_toks=limit)
    with pytest.raises(InputError, match="expected at least 1, and fewer"):
        lm.loglikelihood(asked("loglikelihood", "x", longer), disable_tqdm=True)


def test_a_long_text_is_scored_in_windows(ar):
    """Each token once, the first window given the end token, the last as much as there is room."""
    lm, longest = PolicyLM(ar), ar.context_length - 1
    text = "Gout is painful. " * longest
    ids = lm.tok_encode(text)[: longest + 5]
    text = ar.tokenizer.decode(ids)
    assert lm.tok_encode(text) == ids
    first, second = ([ar.tokenizer.eos_token_id], ids[:longest]), (ids[4:longest], ids[longest:])
    by_hand = sum(value for value, _ in log_likelihoods(ar, [first, second]))
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", text), disable_tqdm=True)
    assert found == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_the_command_line_finds_the_model(tasks):
    command = Path(sys.executable).with_name("lm_eval")
    arguments = ["--model", "mdmrl", "--model_args", "policy=tiny-mdm,steps=2,n_mc=4"]
    which = ["--tasks", "local_text,local_choice", "--include_path", str(tasks)]
    out = ["--output_path", str(tasks / "out"), "--device", "cpu", "--batch_size", "8"]
    done = subprocess.run(
        [command, *arguments, *which, *out],
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tasks / "out").rglob("results_*.json")
    results = json.loads(results.read_text())["results"]
    assert {"local_text", "local_choice"} == results.keys()
    assert 0 <= results["local_choice"]["acc,none"] <= 1
