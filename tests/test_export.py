"""Exported policies, loaded again by us, by transformers, and by a network written out."""

import json

import pytest
import torch
from conftest import random_policy
from safetensors.torch import load_file
from test_families import bidirectional, ids_of, llada_logits, write_llada, write_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

from mdmrl import add_lora, load_policy
from mdmrl.config import InputError
from mdmrl.policies.export import export


def tuned(folder):
    """The policy of a folder, with an adapter that does something."""
    policy = add_lora(load_policy(folder), r=2)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(0.1)
    return policy


@pytest.mark.parametrize(("layout", "write"), [("dream", write_qwen), ("llada", write_llada)])
@torch.no_grad()
def test_a_tuned_policy_goes_back_to_the_layout_that_it_came_in(tmp_path, layout, write):
    write(tmp_path / "published", *["Dream"] * (layout == "dream"))
    policy = tuned(tmp_path / "published")
    expected = policy.logits(ids_of())
    export(policy, tmp_path / "out", layout)
    again = load_policy(tmp_path / "out")
    torch.testing.assert_close(again.logits(ids_of()), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.logits(ids_of()), policy.logits(ids_of()))
    for name in ("kind", "logit_shift", "mask_token_id", "end_token_ids", "pad_token_id"):
        assert getattr(again, name) == getattr(policy, name), name
    names = [load_file(tmp_path / f / "model.safetensors").keys() for f in ("published", "out")]
    assert names[0] == names[1]
    before, after = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("published", "out")
    )
    ignored = {"auto_map", "transformers_version", "max_window_layers", "sliding_window"}
    ignored |= {"vocab_size"} if layout == "llada" else {"use_sliding_window"}  # of rows in use
    assert {k: after.get(k) for k in before.keys() - ignored} == {
        k: before[k] for k in before.keys() - ignored
    }
    assert after["auto_map"]["AutoConfig"].split("--")[1].startswith(f"configuration_{layout}.")


@torch.no_grad()
def test_llada_s_own_network_computes_what_was_exported(tmp_path):
    """Of a Llama that was never LLaDA's."""
    write_qwen(tmp_path / "a2d", "a2d-llama")
    policy = load_policy(tmp_path / "a2d")
    policy.model.config.mask_token_id = policy.mask_token_id
    export(policy, tmp_path / "out", "llada")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    found = llada_logits(weights, ids_of(), eps=policy.model.config.rms_norm_eps)
    torch.testing.assert_close(found, policy.logits(ids_of()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_plain_is_what_transformers_loads(tmp_path, tokenizer):
    for family in ("ar", "mdm"):
        random_policy(family, tokenizer).save_pretrained(tmp_path / family)
        policy = tuned(tmp_path / family)
        export(policy, tmp_path / f"{family}-out", "plain")
        native = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{family}-out", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        assert not hasattr(native, "peft_config")
        ids, shift = ids_of(), policy.logit_shift
        expected = native(ids).logits if family == "ar" else bidirectional(native, ids)
        found = policy.logits(ids)
        torch.testing.assert_close(found[:, shift:], expected[:, : 9 - shift], rtol=1e-4, atol=1e-4)
        words = AutoTokenizer.from_pretrained(tmp_path / f"{family}-out")
        assert words("fever 7").input_ids == tokenizer("fever 7").input_ids


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("draem", "layout 'draem': did you mean 'dream'"),
        ("dream", r"Dream computes something else, in brackets: logit_shift=False \(True\)$"),
        ("llada", "layout='llada' for a Qwen2ForCausalLM: expected a LlamaForCausalLM"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(mdm, tmp_path, layout, message):
    with pytest.raises(InputError, match=message):
        export(mdm, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_biases_and_scaled_positions_are_no_llada(tmp_path):
    write_llada(tmp_path / "published")
    for name, value in {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
    }.items():
        policy = load_policy(tmp_path / "published")
        setattr(policy.model.config, name, value)
        with pytest.raises(InputError, match=f"llada computes something else.*{name}="):
            export(policy, tmp_path / "out", "llada")


def test_a_folder_that_holds_something_is_left_alone(mdm, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        export(mdm, tmp_path)
    with pytest.raises(InputError, match="mine is not empty: expected a new folder"):
        export(mdm, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
