"""What a profile takes of a card's memory, against sums over published shapes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import random_policy
from rich.console import Console

from mdmrl.bench import planning
from mdmrl.bench.planning import Work, kept_bytes, memory, print_plan, verdict
from mdmrl.config import InputError


def test_a_7b_model_with_the_thesis_s_lora_takes_what_its_shapes_say():
    found = memory(Work("ar", "qwen2.5-7b", 12, 256, 256, lora_r=48, dtype="bfloat16"))
    hidden, layers, heads, kv, mlp, vocabulary = 3584, 28, 28, 4, 18_944, 152_064
    small = kv * hidden // heads
    layer = 2 * hidden * hidden + hidden + 2 * (hidden + 1) * small + 3 * hidden * mlp + 2 * hidden
    body = vocabulary * hidden + layers * layer + hidden
    assert found["weights"] == 2 * body + 4 * vocabulary * hidden  # the head is float32
    assert found["trained"] == 4 * 4 * 32_243_712  # adapters, gradients, two moments
    assert found["cache"] == 12 * 512 * layers * 2 * small * 2
    assert found["logits"] == 3 * 12 * 256 * vocabulary * 4
    assert found["checkpointed"] < found["update"]
    assert verdict(found, 80) == "yes" and verdict(found, 16) == "no"
    everything = memory(Work("mdm", "qwen2.5-7b", 12, 256, 256, lora_r=0))
    assert everything["trained"] == 3 * everything["weights"] == 3 * everything["reference"]
    assert everything["cache"] == 0 and verdict(everything, 80) == "no"


def test_an_update_of_smollm2_was_planned_within_a_quarter_of_what_it_took():
    """Of what `bench update --policy smollm2-135m --against trl` measured: a whole process."""
    folder = Path(__file__).parents[1] / "figures" / "data"
    measured = json.loads((folder / "bench_update_smollm2-135m_trl.json").read_text())
    prompt = 48  # tokens of the longer of its two prompts
    planned = memory(Work("ar", "smollm2", 12, measured["length"], prompt, lora_r=0))
    assert planned["checkpointed"] == pytest.approx(measured["rows"]["mdmrl"]["memory"], rel=0.25)


def test_what_autograd_keeps_on_meta_is_what_it_keeps(tokenizer):
    """Of the same network with weights and with content."""
    policy = random_policy("ar", tokenizer)
    policy.model.set_attn_implementation("eager")
    kept = {}

    def note(tensor):
        if tensor.ndim < 4 or tensor.shape[-2:] != (24, 24):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = policy.hidden_states(torch.ones(3, 24, dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    expected = sum(size for place, size in kept.items() if place not in weights)
    assert hidden.requires_grad
    policy.model.to("meta")
    assert kept_bytes(policy, 3, 24) == pytest.approx(expected, rel=0.02)


def test_a_plan_is_a_table(monkeypatch, capsys):
    work = Work("mdm", "smollm2", 2, 16, 16, lora_r=0, passes=4)
    monkeypatch.setattr(planning, "work_of", lambda profile: [("03_reward_curves", "mine", work)])
    monkeypatch.setattr(planning, "Console", lambda width: Console(width=width, color_system=None))
    print_plan("paper", "2x24")
    text = capsys.readouterr().out
    assert "GB on each of 2 x 24 GB" in text
    row = next(line for line in text.splitlines() if line.startswith("│ 03 "))
    assert "every weight" in row and "2 x 16+16" in row and "yes" in row
    for gpus in ("80", "1x\u00b2", "0x80", "1x-80", "x", ""):
        with pytest.raises(InputError, match=f"--gpus {gpus}: expected how many and GB of each"):
            print_plan("paper", gpus)
