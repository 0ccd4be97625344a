"""Fine-tuning: its losses against exact ones, what it may not see, and what a run must survive."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import nested, random_policy

import mdmrl.training.sft as sft
from mdmrl import cli
from mdmrl.policies import add_lora, load_policy
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import train_grpo
from mdmrl.rl.oracle import Oracle, denoiser_of
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.tasks import load_task
from mdmrl.training.config import SFTConfig
from mdmrl.training.data import rows_of_step
from mdmrl.training.sft import backward, held_out_loss, summed_loss, train_sft
from mdmrl.training.supervised import encode_pairs
from mdmrl.zoo.toy import toy_policy

ROWS = [
    {"prompt": "Name a fruit.", "completion": "an apple"},
    {"prompt": "And a tall tree?", "completion": "oak"},
    {"prompt": "A stone?", "completion": "flint or so"},
]
HELD_OUT = [{"prompt": "A bird?", "completion": "a wren"}, {"prompt": "Fish?", "completion": "cod"}]


def settings(folder="unused", **changes):
    small = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 12,
    }
    return SFTConfig(**nested(small | changes))


def pairs_of(policy, rows=ROWS, length=12):
    return encode_pairs(policy, rows, length)


# -- the losses ------------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(policy, pairs):
    """-log p of every token of every completion, each in a forward pass of its own."""
    total = 0.0
    for prompt, completion in pairs:
        for k, token in enumerate(completion):
            ids = torch.tensor([prompt + completion[:k]])
            total -= policy.model(input_ids=ids).logits[0, -1].log_softmax(-1)[token].item()
    return total


def test_the_autoregressive_loss_is_that_of_one_token_after_the_other(ar):
    pairs = pairs_of(ar)
    tokens = sum(len(completion) for _, completion in pairs)
    loss, positions = summed_loss(ar, pairs, settings(), generator_for(0, "x"))
    assert positions == tokens
    assert loss.item() == pytest.approx(token_by_token(ar, pairs), rel=1e-4)
    # Two batches of different numbers of tokens, averaged over tokens.
    found = held_out_loss(ar, pairs, settings())
    assert found == pytest.approx(token_by_token(ar, pairs) / tokens, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mdm", "bd"])
def test_the_diffusion_losses_estimate_the_exact_elbo(family):
    """For blocks the oracle takes one after the other, each given the clean ones before it."""
    policy = toy_policy("abc", family, block_length=2)
    rows = [{"prompt": "ab", "completion": "ca"}, {"prompt": "b", "completion": "cab"}]
    pairs, end = encode_pairs(policy, rows, 4), policy.tokenizer.eos_token_id
    exact = 0.0
    for row, (_, completion) in zip(rows, pairs, strict=True):
        x0 = torch.tensor([completion + [end] * (4 - len(completion))])
        denoiser = denoiser_of(policy, row["prompt"], 4, suppress_mask=False)
        oracle = Oracle(denoiser, x0, policy.mask_token_id, policy.block_length)
        exact -= oracle.elbo().item() / 2
    found = []
    for i in range(40):
        noise = generator_for(0, "elbo", i)
        loss, positions = summed_loss(policy, pairs * 8, settings(max_completion_length=4), noise)
        assert positions == 16 * 4
        found.append(loss.double() / 16)
    found = torch.stack(found)
    error = found.std() / math.sqrt(len(found))
    assert error < 0.05 * exact
    assert abs(found.mean() - exact) < 3 * error


def test_prompt_tokens_have_no_loss(any_policy):
    """No gradient reaches the network through a prediction of theirs, and none is masked."""
    policy = any_policy
    pairs = pairs_of(policy)
    width = max(len(prompt) for prompt, _ in pairs)
    inputs, hidden = [], []
    transformer = policy.model.model
    transformer.register_forward_pre_hook(
        lambda module, args, given: inputs.append(given["input_ids"]), with_kwargs=True
    )
    transformer.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state)
    )
    loss, _ = summed_loss(policy, pairs, settings(), generator_for(0, "x"))
    hidden[0].retain_grad()
    loss.backward()
    learnt = hidden[0].grad.abs().sum(-1) > 0
    for row, (prompt, completion) in enumerate(pairs):
        assert inputs[0][row, width - len(prompt) : width].tolist() == prompt
        columns = learnt[row].nonzero()[:, 0].tolist()
        if policy.kind == "ar":  # the token before predicts
            assert columns == list(range(width - 1, width - 1 + len(completion)))
        else:  # the noised canvas, behind the clean one for blocks
            first = width if policy.kind == "mdm" else width + 12
            assert columns
            assert min(columns) >= first
            noised = inputs[0][row, first:]
            assert len(noised) == 12
            masked = (noised == policy.mask_token_id).nonzero()[:, 0]
            assert columns == (masked + first).tolist()


def test_micro_batches_give_the_gradient_of_the_whole(ar):
    pairs = pairs_of(ar)  # 2 + 1 rows of different lengths
    whole = backward(ar, pairs, settings(per_device_train_batch_size=3), 0, 0)
    expected = {n: p.grad.clone() for n, p in ar.trainable_parameters().items()}
    ar.model.zero_grad()
    assert backward(ar, pairs, settings(), 0, 0) == pytest.approx(whole)
    for name, parameter in ar.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_dropout_is_on_and_depends_on_the_step_alone(ar, rng_untouched):
    """An autoregressive loss has no other noise."""
    add_lora(ar, r=2, lora_dropout=0.5)

    def slope(step):
        ar.model.zero_grad(set_to_none=True)
        backward(ar, pairs_of(ar), settings(), step, 0)
        slopes = {n: p.grad for n, p in ar.trainable_parameters().items()}
        return next(g for n, g in slopes.items() if "lora_B" in n)

    first = slope(0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert torch.equal(first, slope(0))
    assert not torch.equal(first, slope(1))
    assert not ar.model.training


# -- documents -------------------------------------------------------------------------------------


def test_documents_are_those_of_pretraining(mdm):
    end = mdm.tokenizer.eos_token_id
    for row, (prompt, completion) in zip(ROWS, pairs_of(mdm), strict=True):
        text = f"<|user|>{row['prompt']}<|assistant|>"
        assert prompt == mdm.tokenizer(text).input_ids
        assert completion == [*mdm.tokenizer(row["completion"]).input_ids, end]


def test_messages_are_what_the_template_makes_of_them(ar):
    def said(role, content):
        return {"role": role, "content": content}

    question, answer = said("user", "A?"), said("assistant", "B")
    (plain,) = pairs_of(ar, [{"prompt": "A?", "completion": "B"}])
    assert pairs_of(ar, [{"prompt": [question], "completion": [answer]}]) == [plain]
    turns = [answer, said("user", "C?"), said("assistant", "D")]
    ((_, several),) = pairs_of(ar, [{"prompt": "A?", "completion": turns}])
    assert ar.tokenizer.decode(several) == "B<|end|><|user|>C?<|assistant|>D<|end|>"


@pytest.mark.parametrize("behind", ["<|end|>\n", "<|user|>", ""])
def test_a_completion_ends_with_the_token_that_ends_the_turn(ar, behind):
    """The template's, without the line break behind it; the tokenizer's where it writes none."""
    ar.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        f"{{% if m.role == 'assistant' %}}{behind}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ar.model.generation_config.eos_token_id = ar.tokenizer.convert_tokens_to_ids("<|user|>")
    ((prompt, completion),) = pairs_of(ar, [{"prompt": "A?", "completion": "B"}])
    assert ar.tokenizer.decode(prompt) == "[user]A?[assistant]"
    assert ar.tokenizer.decode(completion) == "B" + (behind.strip() or "<|end|>")


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ar", "mdm", "bd"])
def test_two_examples_are_learnt_by_heart(tmp_path, family):
    policy = toy_policy("abcdef", family, block_length=3)
    rows = [{"prompt": "ab", "completion": "cab"}, {"prompt": "ba", "completion": "defac"}]
    config = settings(
        tmp_path / "run",
        max_steps=60,
        per_device_train_batch_size=32,
        max_completion_length=6,
        warmup_steps=5,
    )
    train_sft(policy, rows, config)
    own = {"steps": 6} if policy.denoises else {}
    sampler = SamplerConfig(max_new_tokens=6, **own)
    assert generate(policy, ["ab", "ba"], sampler).completions == ["cab", "defac"]


def test_the_learning_rate_rises_and_falls():
    config = settings(max_steps=5, warmup_steps=2, learning_rate=6)
    assert [config.learning_rate_at(step) for step in range(5)] == pytest.approx([3, 6, 6, 4, 2])
    assert settings(max_steps=4, learning_rate=4).learning_rate_at(3) == pytest.approx(1)


def test_a_run_logs_what_it_promises_and_touches_nothing_global(
    any_policy, tmp_path, rng_untouched
):
    policy = any_policy
    start = copy.deepcopy(policy.model)
    config = settings(tmp_path / "run", max_steps=1)
    before = held_out_loss(policy, pairs_of(policy, HELD_OUT), config)
    drawn = rows_of_step(pairs_of(policy), 2, 0, 0, 1, 0)
    loss, positions = summed_loss(policy, drawn, config, generator_for(0, "noise"))
    slopes = torch.autograd.grad(loss / positions, [*policy.model.parameters()])
    norm = math.sqrt(sum(slope.square().sum().item() for slope in slopes))
    rows = read_rows(
        train_sft(policy, ROWS, config, HELD_OUT, lambda text, row: True) / "metrics.jsonl"
    )
    moved = [
        (new - old).abs().max().item()
        for new, old in zip(policy.model.parameters(), start.parameters(), strict=True)
    ]
    assert max(moved) == pytest.approx(1e-2, rel=1e-3)  # Adam's first step
    assert rows[0]["loss"] == pytest.approx(loss.item() / positions, rel=1e-4)
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert rows[0]["step_time"] > 0
    assert (rows[0]["learning_rate"], rows[0]["epoch"]) == pytest.approx((1e-2, 2 / 3))
    assert rows[0]["num_tokens"] == sum(len(completion) for _, completion in drawn)
    assert [row["eval/accuracy"] for row in rows] == [1, 1]
    assert rows[0]["eval/loss"] == pytest.approx(before)
    after = held_out_loss(policy, pairs_of(policy, HELD_OUT), config)
    assert rows[1]["eval/loss"] == pytest.approx(after)
    assert rows[1]["step"] == 1
    assert "loss" not in rows[1]


def test_a_cold_start_with_float32_adapters_over_bfloat16_leads_into_rl(mdm, tmp_path):
    head = mdm.model.lm_head
    mdm.model.to(torch.bfloat16)
    head.float()
    add_lora(mdm, r=2)
    trained = mdm.trainable_parameters()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    start = {n: p.clone() for n, p in trained.items()}
    folder = train_sft(mdm, ROWS, settings(tmp_path / "sft"))
    assert any(not torch.equal(p, start[n]) for n, p in trained.items())
    assert not mdm.uses_lora
    tuned = load_policy(folder / "model")
    saved = dict(tuned.model.named_parameters())
    for name, parameter in mdm.model.named_parameters():
        assert torch.equal(saved[name], parameter.float()), name
        assert parameter.requires_grad

    def short(prompts, completions, completion_ids, **columns):
        return [-len(ids) for ids in completion_ids]

    add_lora(tuned, r=2)
    config = GRPOConfig(
        output_dir=str(tmp_path / "rl"),
        max_steps=1,
        max_completion_length=8,
        sampler={"steps": 2} if tuned.denoises else {},
    )
    rows = read_rows(train_grpo(tuned, [short], ROWS, config) / "metrics.jsonl")
    assert rows[0]["kl"] == 0  # the reference is the policy as it was fine-tuned


def test_a_merged_adapter_says_what_it_said(policy, tmp_path):
    from mdmrl.policies import merge_lora

    add_lora(policy, r=4)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator_for(0, "move")))
    ids = torch.arange(5, 25)[None]
    before = policy.logits(ids)
    with policy.reference():
        assert (policy.logits(ids) - before).abs().max() > 0.1
    after = merge_lora(policy).logits(ids)
    torch.testing.assert_close(after, before, atol=1e-4 * before.abs().max().item(), rtol=1e-4)


# -- runs ------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("family", "lora"), [("ar", False), ("mdm", True), ("bd", True)])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    shared_policies, tmp_path, monkeypatch, family, lora
):
    base, real = shared_policies[family], (sft.backward, sft.held_out_loss)

    def start(folder, cut=None):
        """Break the run off before the update of step `cut`, or before its last row."""
        policy = type(base)(copy.deepcopy(base.model), base.tokenizer)
        if lora:
            add_lora(policy, r=2, lora_dropout=0.5)

        def updating(policy, drawn, config, step, *rest):
            if step == cut:
                raise Interrupted
            return real[0](policy, drawn, config, step, *rest)

        def looking(*arguments):
            if cut == "end" and len(read_rows(folder / "metrics.jsonl")) == 5:
                raise Interrupted
            return real[1](*arguments)

        monkeypatch.setattr(sft, "backward", updating)
        monkeypatch.setattr(sft, "held_out_loss", looking)
        config = settings(
            folder, max_steps=5, save_steps=2, eval_steps=3, gradient_accumulation_steps=2
        )
        try:
            train_sft(policy, ROWS, config, HELD_OUT)
        except Interrupted:
            return None
        return policy

    def timeless(folder):
        rows = read_rows(folder / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "step_time"} for row in rows]

    whole = start(tmp_path / "whole")
    assert [row["step"] for row in timeless(tmp_path / "whole")] == [0, 1, 2, 3, 4, 5]
    for cut in (1, 3, "end"):
        assert start(tmp_path / "cut", cut) is None
    resumed = start(tmp_path / "cut")
    expected = dict(whole.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    # A complete run is not trained again: its weights are loaded.
    log = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    again = start(tmp_path / "whole", 0)
    assert again.fingerprint() == whole.fingerprint()
    assert load_policy(tmp_path / "whole" / "model").fingerprint() == whole.fingerprint()
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == log


def test_a_folder_of_another_run_is_refused(ar, tmp_path):
    start = copy.deepcopy(ar.model)
    train_sft(ar, ROWS, settings(tmp_path / "run", max_steps=1))
    for rows, changes, name in ((ROWS[:2], {}, "rows"), (ROWS, {"seed": 1}, "seed")):
        ar.model = copy.deepcopy(start)
        with pytest.raises(FileExistsError, match=rf"another run.*{name}"):
            train_sft(ar, rows, settings(tmp_path / "run", max_steps=1, **changes))


def test_weights_that_are_not_finite_end_the_run_before_an_update(ar, tmp_path):
    with torch.no_grad():
        ar.model.lm_head.weight[100] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 0 on prompts \[.+\]: lower"):
        train_sft(ar, ROWS, settings(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


LONG = "one two three " * 8
BAD_ROWS = {
    "none": ([], (), "no training rows"),
    "no completion": ([{"prompt": "x"}], (), "row 1 has the fields prompt: expected .*completion"),
    "too long": (
        [ROWS[0], {"prompt": "x", "completion": LONG}],
        (),
        r"row 2, completion 'one two three .*max_completion_length=12",
    ),
    "no room": ([{"prompt": "1 " * 250, "completion": "x"}], (), "row 1, completion 'x.*of 512"),
    "a question": (
        [{"prompt": "x", "completion": [{"role": "user", "content": "y"}]}],
        (),
        "row 1: the chat template writes .*<.user.>y",
    ),
    "held out": (ROWS, [ROWS[1]], "held-out prompt 'And a tall tree.' is among"),
    "held out, too long": (ROWS, [{"prompt": "x", "completion": LONG}], "row 1, completion 'one"),
}


@pytest.mark.parametrize(("rows", "held_out", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_name_before_any_work(mdm, tmp_path, rows, held_out, message):
    with pytest.raises(ValueError, match=message):
        train_sft(mdm, rows, settings(tmp_path / "run"), held_out)
    assert not (tmp_path / "run").exists()


def test_the_context_holds_an_autoregressive_completion_or_a_diffusion_canvas(ar, mdm):
    prompt = "1" * 496  # and two tokens of the template
    row = {"prompt": prompt, "completion": "22"}
    ((ids, completion),) = pairs_of(ar, [row], 16)
    assert (len(ids), len(completion)) == (498, 3)
    with pytest.raises(ValueError, match="a prompt of 498 tokens and 16 more exceed"):
        pairs_of(mdm, [row], 16)
    with pytest.raises(ValueError, match="a prompt of 498 tokens and 15 more exceed"):
        pairs_of(ar, [row | {"completion": "2" * 14}], 16)


def test_what_a_family_cannot_learn_is_refused(mdm, bd, tmp_path):
    row = {"prompt": "x", "completion": "so <|mask|>"}
    with pytest.raises(ValueError, match=r"row 1, completion .*holds the mask token"):
        pairs_of(mdm, [row])
    with pytest.raises(ValueError, match=r"max_completion_length=10: expected a multiple .*of 4"):
        train_sft(bd, ROWS, settings(tmp_path / "run", max_completion_length=10))


def test_a_base_models_text_goes_on_and_takes_no_messages():
    policy = toy_policy("abc", "ar")
    row = {"prompt": "ab", "completion": "c"}
    assert pairs_of(policy, [row]) == [([0, 1], [2, policy.tokenizer.eos_token_id])]
    assert pairs_of(policy, [row | {"completion": "c<|end|>"}]) == pairs_of(policy, [row])
    with pytest.raises(ValueError, match="no chat template"):
        pairs_of(policy, [row | {"completion": [{"role": "assistant", "content": "c"}]}])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("eval_steps", 0),
        ("save_steps", 0),
        ("learning_rate", "inf"),
        ("max_grad_norm", 0),
        ("weight_decay", -1),
        ("warmup_steps", 3),
        ("steps", 13),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        settings(**{key: value})


# -- the command -----------------------------------------------------------------------------------


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mdmrl", "sft", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_the_command_trains_on_a_users_file(mdm, tmp_path, monkeypatch, capsys):
    mdm.save_pretrained(tmp_path / "base")
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    config = settings(tmp_path / "run").to_dict()
    (tmp_path / "sft.yaml").write_text(json.dumps(config))
    arguments = ["--policy", tmp_path / "base", "--data", tmp_path / "mine.jsonl", "--lora-r", "2"]
    assert call(monkeypatch, *arguments, tmp_path / "sft.yaml") == 0
    printed = capsys.readouterr().out.strip()
    assert printed == str(tmp_path / "run" / "model")
    assert load_policy(printed).fingerprint() != load_policy(tmp_path / "base").fingerprint()


def test_the_command_names_a_malformed_line_and_wants_data(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{json.dumps(ROWS[0])}\n{{"prompt": "x"}}')
    assert call(monkeypatch, "--data", path) == 2
    assert f"{path}:2: field 'completion' is missing" in capsys.readouterr().err
    assert call(monkeypatch) == 2
    assert "give --data FILE, --task NAME or both" in capsys.readouterr().err


def test_a_tasks_rows_are_none_of_those_held_out_or_kept_for_rl(mdm, tmp_path, monkeypatch):
    mdm.save_pretrained(tmp_path / "base")
    calls = []
    monkeypatch.setattr(
        sft,
        "train_sft",
        lambda *given, eval_rows, **_: calls.append((given, eval_rows)) or tmp_path,
    )
    assert call(monkeypatch, "--policy", tmp_path / "base", "--task", "medcot") == 0
    ((_, rows, config), held_out) = calls[0]
    task = load_task("medcot")
    others = {row["prompt"] for split in ("rl", "validation", "test") for row in task.rows(split)}
    assert len(rows) > 1000
    assert not others & {row["prompt"] for row in rows}
    assert held_out == task.rows("validation")[:48]
    assert config == SFTConfig()


# -- several processes -----------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
from mdmrl import SFTConfig, load_policy, train_sft

base, config, rows = map(json.loads, sys.argv[1:])
train_sft(load_policy(base), rows, SFTConfig.from_dict(config))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_both_shares(tokenizer, tmp_path):
    policy = random_policy("ar", tokenizer)
    policy.save_pretrained(tmp_path / "base")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    shared = settings(tmp_path / "two", per_device_train_batch_size=1).to_dict()
    arguments = [json.dumps(value) for value in (str(tmp_path / "base"), shared, ROWS)]
    # What `accelerate launch` uses for several GPUs; its own CPU launcher wants mpirun.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *(tmp_path / "script.py", *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    alone = train_sft(policy, ROWS, settings(tmp_path / "one"))
    rows, expected = (read_rows(f / "metrics.jsonl") for f in (tmp_path / "two", alone))
    for found, row in zip(rows[:-1], expected[:-1], strict=True):
        for name in ("loss", "grad_norm", "epoch", "learning_rate"):
            assert found[name] == pytest.approx(row[name], rel=1e-3), name
        assert found["num_tokens"] == row["num_tokens"] / 2
    tuned = dict(load_policy(tmp_path / "two" / "model").model.named_parameters())
    for name, weight in policy.model.named_parameters():
        torch.testing.assert_close(tuned[name], weight, atol=1e-3, rtol=1e-3, msg=name)
