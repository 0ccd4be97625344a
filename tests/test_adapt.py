"""Masked diffusion policies made of autoregressive ones, against the definition."""

import pytest
import torch
from conftest import random_policy
from test_families import bidirectional, edit_json, ids_of, write_qwen
from typer.testing import CliRunner

from mdmrl import load_policy
from mdmrl.cli import app
from mdmrl.config import InputError
from mdmrl.policies.adapt import adapted
from mdmrl.policies.export import export
from mdmrl.training.config import SFTConfig
from mdmrl.training.sft import train_sft
from mdmrl.zoo.pretrain import PretrainConfig, pretrain

ROWS = [{"prompt": f"What is fever {i}?", "completion": "A raised temperature."} for i in range(4)]
PADDED = torch.tensor([[False, False, *[True] * 7], [True] * 9])
PREDICTED = PADDED & (PADDED.cumsum(1) > 1)  # from a token before


@torch.no_grad()
def test_it_is_the_same_network_seeing_everything_with_the_shift_kept(tmp_path):
    native, special = write_qwen(tmp_path, "a2d-qwen2")
    edit_json(tmp_path / "config.json", model_type="qwen2", use_sliding_window=False)
    policy = adapted(load_policy(tmp_path))
    assert (policy.kind, policy.logit_shift) == ("mdm", True)
    assert policy.mask_token_id == special["<|mask|>"]
    expected = bidirectional(native, ids_of())
    torch.testing.assert_close(policy.logits(ids_of())[:, 1:], expected[:, :-1])
    export(policy, tmp_path / "dream", "dream")
    again = load_policy(tmp_path / "dream")
    assert torch.equal(again.logits(ids_of()), policy.logits(ids_of()))


@torch.no_grad()
def test_before_any_annealing_it_is_the_autoregressive_policy(ar, rng_untouched):
    before = ar.logits(ids_of(), PADDED)
    policy = adapted(ar, annealing=0.5)
    policy.progress = 0.0
    policy.model.train()
    with torch.random.fork_rng():
        found = policy.logits(ids_of(), PADDED)
    torch.testing.assert_close(found[PREDICTED], before[PREDICTED])
    policy.model.eval()  # outside training it sees everything
    everything = policy.logits(ids_of(), PADDED)
    assert not torch.allclose(everything[PREDICTED], before[PREDICTED], atol=1e-2)
    policy.model.train()
    policy.progress = 0.5
    assert torch.equal(policy.logits(ids_of(), PADDED), everything)


@torch.no_grad()
def test_halfway_a_position_sees_half_of_what_stands_behind_it(ar):
    policy = adapted(ar, annealing=0.5)
    policy.progress, asked = 0.25, []
    policy.model.train()
    network = policy.model.base_model.forward
    policy.model.base_model.forward = lambda **given: (
        asked.append(given["attention_mask"]),
        network(**given),
    )[1]
    for seed in range(40):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            policy.logits(ids_of(), PADDED)
    sees = torch.stack(asked).float()  # (40, 2, 1, 9, 9)
    assert (sees[:, 1, 0].tril() == torch.ones(9, 9).tril()).all()
    share = sees[:, 1, 0][:, torch.ones(9, 9).triu(1).bool()].mean()
    assert abs(share - 0.5) < 4 * 0.5 / (40 * 36) ** 0.5
    assert not sees[:, 0, 0, 2:, :2].any()  # padding


def test_a_tokenizer_without_a_mask_gets_one(ar):
    policy = ar
    policy.tokenizer.mask_token = None
    rows = policy.model.get_input_embeddings().weight.detach().clone()
    head = policy.model.get_output_embeddings().weight.detach().clone()
    made = adapted(policy, mask_token="<|gap|>")
    assert made.mask_token_id == len(rows) and made.tokenizer.mask_token == "<|gap|>"
    for layer, before in (
        (made.model.get_input_embeddings(), rows),
        (made.model.get_output_embeddings(), head),
    ):
        assert torch.equal(layer.weight[:-1], before)
        torch.testing.assert_close(layer.weight[-1], before.mean(0))
    assert made.logits(torch.tensor([[5, made.mask_token_id]])).shape[-1] == len(rows) + 1


def test_what_cannot_be_adapted_is_refused(ar, mdm):
    with pytest.raises(InputError, match="kind 'mdm': expected an autoregressive one"):
        adapted(mdm)
    with pytest.raises(InputError, match=r"annealing=1.5: expected a share"):
        adapted(ar, 1.5)
    ar.tokenizer.mask_token = None
    with pytest.raises(InputError, match="'a' is a piece of ordinary text"):
        adapted(ar, mask_token="a")
    for unseen in ("", " \n", "\ud800"):
        with pytest.raises(InputError, match=r"mask_token=.*characters that can be seen"):
            adapted(ar, mask_token=unseen)
    ar.tokenizer.mask_token = "<|mask|>"
    with pytest.raises(InputError, match=r"the tokenizer has '<\|mask\|>' already"):
        adapted(ar, mask_token="<|gap|>")
    with pytest.raises(InputError, match="expected 'mdm' and an autoregressive start"):
        PretrainConfig(annealing=0.5)


def test_what_is_seen_depends_on_the_run_s_seed_alone(tokenizer, tmp_path, rng_untouched):
    def run(folder, elsewhere):
        policy = adapted(random_policy("ar", tokenizer), annealing=1.0)
        config = SFTConfig(
            output_dir=str(tmp_path / folder),
            max_steps=2,
            per_device_train_batch_size=2,
            max_completion_length=12,
        )
        with torch.random.fork_rng():
            torch.manual_seed(elsewhere)
            train_sft(policy, ROWS, config)
        return load_policy(tmp_path / folder / "model").logits(ids_of())

    assert torch.equal(run("one", 1), run("two", 2))


def test_the_recipe_goes_on_from_its_start(tokenizer, tmp_path):
    shapes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    shapes |= {"num_attention_heads": 2, "canvas": 16, "block_length": 4}
    random_policy("ar", tokenizer, **shapes).save_pretrained(tmp_path / "ar")
    config = PretrainConfig(
        start=str(tmp_path / "ar"), annealing=0.5, tokens=40, batch_size=2, bf16=False, **shapes
    )

    def stream(seed, start):
        while True:
            yield from ROWS

    made = pretrain(config, tokenizer, stream, tmp_path / "run")
    assert (made.kind, made.logit_shift) == ("mdm", True)


def test_the_command_adapts_a_folder(ar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ar.save_pretrained(tmp_path / "ar")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "What?", "completion": "That."}\n')
    words = "adapt ar --data mine.jsonl --annealing 0.5 max_steps=1 max_completion_length=8"
    done = CliRunner().invoke(app, [*words.split(), "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert load_policy("runs/adapt/model", device="cpu").logit_shift
    done = CliRunner().invoke(app, ["export", "runs/adapt/model", "out", "--layout", "dream"])
    assert done.exit_code == 0 and load_policy("out").logit_shift
