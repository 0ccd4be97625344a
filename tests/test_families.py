"""Published checkpoints as native policies, on tiny random ones in the published layout.

The logits are checked against something that shares no code with the loading: LLaDA's network
written out here over its own weight names, and for the others the causal transformers class under a
hand-made mask in which every position sees every other.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mdmrl import SamplerConfig, generate, load_policy
from mdmrl.config import InputError, resolve
from mdmrl.policies import (
    AutoregressivePolicy,
    BlockDiffusionPolicy,
    MaskedDiffusionPolicy,
    add_lora,
)
from mdmrl.policies.adapt import adapted
from mdmrl.policies.patterns import positions_of
from mdmrl.rl.logprobs import ESTIMATORS, draw_noise, estimator
from mdmrl.rl.rollout import Rollout
from mdmrl.runs import generator_for
from mdmrl.zoo.tokenizer_training import train_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ROWS = 320


def write_json(path, values):
    path.write_text(json.dumps(values))


def edit_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def random_weights(shapes, seed=0):
    """Large enough that logits are spread and attention matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1.0 if "norm" in name or "ln_f" in name else 0.0)
        + 0.3 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def ids_of(rows=2, length=9):
    return torch.randint(5, 270, (rows, length), generator=torch.Generator().manual_seed(1))


# -- LLaDA -----------------------------------------------------------------------------------------

LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "block_type": "llama",
    "d_model": 16,
    "embedding_size": ROWS,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "max_sequence_length": 64,
    "mlp_hidden_size": 24,
    "mlp_ratio": 4,
    "model_type": "llada",
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "rms_norm_eps": 1e-3,
    "rope": True,
    "rope_theta": 77.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "vocab_size": 300,
    "weight_tying": False,
}


def llada_tokenizer():
    """Without a declared mask token and with two ends, as LLaDA's."""
    tokenizer = train_tokenizer(["fever and rash"] * 3, 270)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mdm_mask|>", "<|eot_id|>"]})
    tokenizer.mask_token = None
    return tokenizer


def write_llada(folder, **changes):
    """A checkpoint as GSAI-ML publishes it, and its weights."""
    folder.mkdir(exist_ok=True)
    tokenizer = llada_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LLADA | {
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    config |= changes
    write_json(folder / "config.json", config)
    (folder / "configuration_llada.py").write_text("raise SystemExit('remote code was run')")
    d, mlp = config["d_model"], config["mlp_hidden_size"] or 4 * config["d_model"]
    kv = d // config["n_heads"] * (config["n_kv_heads"] or config["n_heads"])
    shapes = {"wte.weight": (ROWS, d), "ln_f.weight": (d,)}
    if not config["weight_tying"]:
        shapes["ff_out.weight"] = (ROWS, d)
    for i in range(config["n_layers"]):
        block = {
            "attn_norm": (d,),
            "q_proj": (d, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "attn_out": (d, d),
            "ff_norm": (d,),
            "ff_proj": (mlp, d),
            "up_proj": (mlp, d),
            "ff_out": (d, mlp),
        }
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    weights = random_weights({f"model.transformer.{n}": shape for n, shape in shapes.items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def llada_logits(weights, ids, heads=4, layers=2, eps=1e-3, theta=77.0):
    """LLaDA's network by its own names; heads of queries share those of keys where fewer."""

    def weight(name):
        return weights[f"model.transformer.{name}.weight"]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight(name)

    def turned(x):  # (B, heads, L, size): each pair (j, j + size/2) is a plane
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2])[:, None] / theta ** (torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weight("wte")[ids]
    size = x.shape[-1] // heads
    for i in range(layers):
        normed = norm(x, f"blocks.{i}.attn_norm")
        q, k, v = (
            (normed @ weight(f"blocks.{i}.{p}_proj").T).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in "qkv"
        )
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (turned(k), v))
        seen = scaled_dot_product_attention(turned(q), k, v)
        x = x + seen.transpose(1, 2).flatten(2) @ weight(f"blocks.{i}.attn_out").T
        normed = norm(x, f"blocks.{i}.ff_norm")
        gate, up = (normed @ weight(f"blocks.{i}.{p}_proj").T for p in ("ff", "up"))
        x = x + (silu(gate) * up) @ weight(f"blocks.{i}.ff_out").T
    head = "ff_out" if "model.transformer.ff_out.weight" in weights else "wte"
    return norm(x, "ln_f") @ weight(head).T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_tying": True},
        {"n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None, "vocab_size": ROWS},
    ],
)
@torch.no_grad()
def test_llada_computes_what_its_own_network_does(tmp_path, changes):
    weights = write_llada(tmp_path, **changes)
    policy = load_policy(tmp_path)
    assert (policy.kind, policy.logit_shift) == ("mdm", False)
    assert type(policy.model) is LlamaForCausalLM
    assert policy.context_length == 64
    torch.testing.assert_close(policy.logits(ids_of()), llada_logits(weights, ids_of()))


def test_llada_has_its_mask_from_the_config_and_both_ends(tmp_path):
    write_llada(tmp_path)
    policy = load_policy(tmp_path)
    tokenizer = policy.tokenizer
    mask, end, turn = tokenizer.convert_tokens_to_ids(["<|mdm_mask|>", "<|end|>", "<|eot_id|>"])
    assert policy.mask_token_id == tokenizer.mask_token_id == mask
    assert policy.end_token_ids == (end, turn)
    assert policy.model.config.bos_token_id is None  # a Llama's default would be 1
    a, b = tokenizer(" fever rash").input_ids[:2]
    ids = torch.tensor([[a, turn, b, end], [a, mask, end, turn]])
    completed = policy.completion_mask(ids)
    assert completed.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert policy.decode(ids, completed) == [tokenizer.decode([a])] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_type": "swiglu"}, "activation_type='swiglu': expected 'silu'"),
        ({"alibi": True}, "alibi=True"),
        ({"scale_logits": True}, "scale_logits=True"),
        ({"layer_norm_type": "default"}, "layer_norm_type='default'"),
        ({"architectures": ["LLaDAMoEModelLM"]}, r"LLaDAMoEModelLM.*expected \['LLaDAModelLM'\]"),
        ({"embedding_size": ROWS + 8}, rf"embed_tokens.weight is \({ROWS}, 16\).*\({ROWS + 8}, 16"),
        ({"n_layers": 1}, r"layers.1.input_layernorm.weight is not part.* and 5 more"),
    ],
)
def test_a_llada_that_is_no_llama_is_refused(tmp_path, changes, message):
    write_llada(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)


def test_no_weight_is_drawn_at_random_or_left_out(tmp_path):
    weights = write_llada(tmp_path)
    del weights["model.transformer.blocks.1.up_proj.weight"]
    weights["model.transformer.blocks.0.q_proj.bias"] = torch.ones(16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_policy(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(error.value)
    assert "model.layers.0.self_attn.q_proj.bias is not part" in str(error.value)


# -- Dream and dllm's a2d --------------------------------------------------------------------------

A2D = {
    "a2d-qwen2": (Qwen2Config, Qwen2ForCausalLM, "A2DQwen2LMHeadModel"),
    "a2d-qwen3": (Qwen3Config, Qwen3ForCausalLM, "A2DQwen3LMHeadModel"),
    "a2d-llama": (LlamaConfig, LlamaForCausalLM, "A2DLlamaLMHeadModel"),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]


def write_qwen_tokenizer(folder, tokenizer_class, **roles):
    """vocab.json, merges.txt and added tokens, as Qwen2.5 and Dream publish theirs."""
    merges = [("l", "o"), ("lo", "w")]
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(len(tokens) + i): {"content": token, "special": True, **flags}
        for i, token in enumerate(SPECIAL)
    }
    settings = {
        "added_tokens_decoder": added,
        "chat_template": CHAT,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": tokenizer_class,
        **roles,
    }
    if tokenizer_class == "DreamTokenizer":
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
        (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code was run')")
    write_json(folder / "tokenizer_config.json", settings)
    return {token: len(tokens) + i for i, token in enumerate(SPECIAL)}


def write_qwen(folder, model_type, tied=False, **changes):
    """A checkpoint of the family and the causal native model with its weights."""
    folder.mkdir(exist_ok=True)
    dream = model_type == "Dream"
    config_class, model_class, architecture = A2D["a2d-qwen2" if dream else model_type]
    tokenizer_class = "DreamTokenizer" if dream else "Qwen2Tokenizer"
    special = write_qwen_tokenizer(folder, tokenizer_class, mask_token="<|mask|>")
    native = model_class(
        config_class(
            vocab_size=ROWS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 77.0},
            attn_implementation="eager",
        )
    ).eval()
    drawn = random_weights({n: w.shape for n, w in native.named_parameters()})
    native.load_state_dict(drawn, strict=not tied)
    native.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "bos_token_id"):
        fields.pop(name, None)
    fields |= {
        "model_type": model_type,
        "architectures": ["DreamModel" if dream else architecture],
        "auto_map": {
            "AutoConfig": "configuration_own.Config",
            "AutoModel": "modeling_own.Model",
        },
        "rope_scaling": None,
        "rope_theta": 77.0,
        "use_sliding_window": True,  # which the families' own code does not apply
        "sliding_window": 2,
        "max_window_layers": 0,
        "eos_token_id": special["<|endoftext|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    if dream:
        fields["mask_token_id"] = special["<|mask|>"]
    write_json(folder / "config.json", fields | changes)
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "alg": "origin",
            "eos_token_id": special["<|endoftext|>"],
            "steps": 512,
            "temperature": 0.0,
        },
    )
    return native, special


def bidirectional(native, ids):
    """Logits of a causal class where a mask of zeros lets every position see every other."""
    batch, length = ids.shape
    return native(ids, attention_mask=torch.zeros(batch, 1, length, length)).logits


@torch.no_grad()
def test_dream_predicts_a_position_from_the_one_before(tmp_path):
    native, special = write_qwen(tmp_path, "Dream")
    policy = load_policy(tmp_path)
    assert (policy.kind, policy.logit_shift) == ("mdm", True)
    assert type(policy.model) is Qwen2ForCausalLM
    assert policy.mask_token_id == special["<|mask|>"]
    assert policy.end_token_ids == (special["<|endoftext|>"], special["<|im_end|>"])
    found, expected = policy.logits(ids_of()), bidirectional(native, ids_of())
    torch.testing.assert_close(found[:, 1:], expected[:, :-1])


@pytest.mark.parametrize(
    ("model_type", "tied"), [("a2d-qwen2", True), ("a2d-qwen3", False), ("a2d-llama", False)]
)
@torch.no_grad()
def test_a2d_is_its_causal_model_seeing_everything(tmp_path, model_type, tied):
    native, special = write_qwen(tmp_path, model_type, tied)
    policy = load_policy(tmp_path)
    assert (policy.kind, policy.logit_shift) == ("mdm", False)
    assert type(policy.model) is type(native)
    assert policy.mask_token_id == special["<|mask|>"]
    torch.testing.assert_close(policy.logits(ids_of()), bidirectional(native, ids_of()))


def test_dreams_tokenizer_is_read_without_its_code(tmp_path):
    _, special = write_qwen(tmp_path, "Dream")
    policy = load_policy(tmp_path)
    byte = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    lo, low, newline, space = 256, 257, byte["Ċ"], byte["Ġ"]
    text = "<|im_start|>low\nlot e\u0301 7<|mask|>"  # NFC composes the e and its accent
    assert policy.tokenizer(text).input_ids == [
        special["<|im_start|>"], low, newline, lo, byte["t"], space, byte["Ã"], byte["©"],
        space, byte["7"], special["<|mask|>"],
    ]  # fmt: skip
    ids = policy.encode(["low"]).input_ids[0]
    assert policy.tokenizer.decode(ids) == (
        "<|im_start|>user\nlow<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("model_type", ["llada", "Dream", "a2d-qwen2"])
@torch.no_grad()
def test_one_new_token_is_the_most_probable_where_the_family_predicts_it(tmp_path, model_type):
    """The sampler end to end: a prompt, one mask, one step."""
    if model_type == "llada":
        weights = write_llada(tmp_path)
    else:
        native, _ = write_qwen(tmp_path, model_type)
    policy = load_policy(tmp_path)
    out = generate(policy, ["low"], SamplerConfig(max_new_tokens=1, end_last=False))
    canvas = out.sequences.clone()
    canvas[:, -1] = policy.mask_token_id
    if model_type == "llada":
        logits = llada_logits(weights, canvas)[0, -1]
    else:
        logits = bidirectional(native, canvas)[0, -2 if model_type == "Dream" else -1]
    logits[policy.mask_token_id] = -torch.inf
    assert out.sequences[0, -1] == logits.argmax()
    more = generate(policy, ["low", "lower low"], SamplerConfig(max_new_tokens=8, steps=4))
    assert not (more.completion_ids == policy.mask_token_id).any()


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "native"), [("llada", "llama"), ("Dream", "qwen2")])
@torch.no_grad()
def test_a_saved_family_is_a_native_checkpoint_and_the_same_policy(tmp_path, model_type, native):
    write = write_llada if model_type == "llada" else lambda f: write_qwen(f, "Dream")
    write(tmp_path / "published")
    policy = load_policy(tmp_path / "published")
    policy.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["model_type"] == native
    assert "auto_map" not in fields
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert names == AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict().keys()
    again = load_policy(tmp_path / "saved")
    for name in ("kind", "logit_shift", "mask_token_id", "end_token_ids", "pad_token_id"):
        assert getattr(again, name) == getattr(policy, name)
    assert torch.equal(again.logits(ids_of()), policy.logits(ids_of()))
    assert again.fingerprint() == policy.fingerprint()
    text = "<|im_start|>low\nfever 7"
    assert again.tokenizer(text).input_ids == policy.tokenizer(text).input_ids


@torch.no_grad()
def test_an_adapter_goes_on_top_of_a_family(tmp_path):
    write_qwen(tmp_path / "base", "Dream")
    policy = load_policy(tmp_path / "base")
    add_lora(policy, r=2)
    for weight in policy.trainable_parameters().values():
        weight.add_(0.1)
    policy.save_pretrained(tmp_path / "adapter")
    again = load_policy(tmp_path / "base", adapter=tmp_path / "adapter")
    assert again.logit_shift
    assert torch.equal(again.logits(ids_of()), policy.logits(ids_of()))
    assert again.end_token_ids == policy.end_token_ids


# -- text ------------------------------------------------------------------------------------------


def test_qwen_ends_where_its_generation_config_says(tmp_path):
    write_qwen(tmp_path, "a2d-qwen2")
    edit_json(tmp_path / "config.json", model_type="qwen2", use_sliding_window=False)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|im_end|>")
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [260, 258], "do_sample": True})
    policy = load_policy(tmp_path)
    assert policy.kind == "ar"
    assert policy.end_token_ids == (260, 258)  # <|im_end|>, <|endoftext|>
    ids = torch.tensor([[7, 258, 7], [7, 260, 7]])
    assert policy.completion_mask(ids).tolist() == [[True, True, False]] * 2


def test_a_base_model_continues_plain_text(mdm):
    mdm.tokenizer.chat_template = None
    batch = mdm.encode(["fever", "fever and rash"])
    assert batch.input_ids[1].tolist() == mdm.tokenizer("fever and rash").input_ids
    assert batch.input_ids[0][batch.attention_mask[0]].tolist() == mdm.tokenizer("fever").input_ids
    with pytest.raises(ValueError, match=r"no chat template.*set tokenizer\.chat_template"):
        mdm.encode([[{"role": "user", "content": "fever"}]])
    with pytest.raises(ValueError, match="no tokens"):
        mdm.encode(["fever", ""])


def test_a_tokenizer_without_padding_pads_with_its_end(mdm):
    mdm.tokenizer.pad_token = None
    policy = MaskedDiffusionPolicy(mdm.model, mdm.tokenizer)
    batch = policy.encode(["fever", "fever and rash for twelve days"])
    end = policy.tokenizer.eos_token_id
    assert policy.pad_token_id == end
    assert (batch.input_ids[~batch.attention_mask] == end).all()
    assert not batch.attention_mask.all()


# -- refusals --------------------------------------------------------------------------------------


def test_config_and_tokenizer_must_agree_on_the_mask(tmp_path):
    _, special = write_qwen(tmp_path, "Dream", mask_token_id=77)
    with pytest.raises(ValueError, match=rf"77 in the config, but {special['<|mask|>']} in the"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (ROWS, rf"{ROWS} lies outside the embedding of {ROWS} rows"),
        (-1, rf"-1 lies outside the embedding of {ROWS} rows"),
        (ROWS - 1, rf"{ROWS - 1} is none of the tokenizer's 272 tokens"),
        (
            77,
            r"mask token id 77 is '.+', a piece of ordinary text: expected one of the tokens "
            r"added for a purpose, \[0, 1, ",
        ),
        (1, r"mask token id 1 equals one of the end and padding tokens \[0, 1, 271\]"),
        (271, r"mask token id 271 equals one of the end"),  # <|eot_id|>, an end of the family
        (None, "neither config.mask_token_id nor the tokenizer"),
    ],
)
def test_a_wrong_mask_id_is_refused_with_both_numbers(tmp_path, mask, message):
    write_llada(tmp_path, mask_token_id=mask)
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    write_llada(tmp_path)
    tokenizer = llada_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(ROWS)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{272 + ROWS} tokens .* {ROWS} rows"):
        load_policy(tmp_path)


def test_an_architecture_known_only_to_its_own_code_is_refused(tmp_path):
    write_qwen(tmp_path, "Dream")
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('remote code was run')")
    edit_json(tmp_path / "config.json", model_type="sdar")
    with pytest.raises(ValueError, match=r"model_type 'sdar'.*llada, Dream.*never run"):
        load_policy(tmp_path)
    edit_json(tmp_path / "config.json", model_type="Dream", architectures=["DreamForCausalLM"])
    with pytest.raises(ValueError, match=r"DreamForCausalLM.*expected \['DreamModel'\]"):
        load_policy(tmp_path)


# -- folders that hold no policy -------------------------------------------------------------------

TINY = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def one_line(call, *arguments):
    """The message of the `InputError` that `call` raises, and of nothing else."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model_type", ["llada2_moe", "diffusion_gemma", "bert", "t5", "qwen2_vl"])
def test_a_foreign_family_is_refused_in_one_line(tmp_path, model_type):
    if model_type in CONFIG_MAPPING:
        CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    else:
        write_json(tmp_path / "config.json", {"model_type": model_type, **TINY})
    for tokenizer in (False, True):
        if tokenizer:
            llada_tokenizer().save_pretrained(tmp_path)
        message = one_line(load_policy, tmp_path)
        assert f"model_type '{model_type}': expected a decoder" in message


@pytest.mark.parametrize("model_type", ["bloom", "gpt2"])
def test_other_decoders_work_or_are_refused_in_one_line(tmp_path, model_type):
    sizes = {"vocab_size": ROWS, "n_layer": 1, "n_head": 2}
    config = CONFIG_MAPPING[model_type](**sizes, hidden_size=16, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    llada_tokenizer().save_pretrained(tmp_path)
    if model_type == "bloom":  # no positions, so no longest context
        assert "bloom does not say how long" in one_line(load_policy, tmp_path)
        return
    policy = load_policy(tmp_path)
    expected = policy.model(input_ids=ids_of()).logits
    torch.testing.assert_close(policy.logits(ids_of())[:, 1:], expected[:, :-1])
    assert generate(policy, ["low", "lower"], SamplerConfig(max_new_tokens=3)).nfe == 3


@pytest.mark.parametrize("call", ["load", "adapt"])
def test_a_decoder_that_looks_back_alone_is_no_diffusion_model(tmp_path, call):
    """Its mask is its own, whatever config.json says."""
    sizes = {"vocab_size": ROWS, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    config = CONFIG_MAPPING["gpt_neo"](**sizes, attention_types=[[["global", "local"], 1]])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    llada_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert policy.kind == "ar"
    if call == "load":
        mask = policy.tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
        edit_json(tmp_path / "config.json", is_causal=False, mask_token_id=mask)
        message = one_line(load_policy, tmp_path)
    else:
        message = one_line(adapted, policy)
    assert "a gpt_neo looks back alone, and cannot denoise: expected" in message


def test_a_decoder_whose_layers_are_not_apart_is_refused_in_one_line(tmp_path):
    config = CONFIG_MAPPING["llama4_text"](**TINY, head_dim=8, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    llada_tokenizer().save_pretrained(tmp_path)
    assert "a llama4_text has no layers apart from its head" in one_line(load_policy, tmp_path)


def test_a_broken_folder_is_refused_in_one_line(tmp_path):
    write_qwen(tmp_path, "a2d-qwen2")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    load_policy(tmp_path)
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        for kept in (whole[name][: len(whole[name]) // 2], b"", b"[]", b"null", None):
            path = tmp_path / name
            path.unlink() if kept is None else path.write_bytes(kept)
            if (name, kept) != ("tokenizer_config.json", None):  # then vocab.json is all there is
                assert str(tmp_path) in one_line(load_policy, tmp_path)
            path.write_bytes(whole[name])
    load_policy(tmp_path)


def test_a_published_config_without_a_field_is_refused_in_one_line(tmp_path):
    write_llada(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["n_heads"]
    write_json(tmp_path / "config.json", fields)
    assert "n_heads" in one_line(load_policy, tmp_path)


def test_the_command_line_says_it_in_one_line_and_exits_with_2(tmp_path, monkeypatch, capsys):
    from mdmrl.cli import main

    write_json(tmp_path / "config.json", {"model_type": "llada2_moe", **TINY})
    monkeypatch.setattr("sys.argv", ["mdmrl", "sample", str(tmp_path), "low"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "llada2_moe" in line


# -- a family of one's own -------------------------------------------------------------------------


@torch.no_grad()
def test_a_causal_checkpoint_taken_for_a_diffusion_model_sees_everything(tmp_path):
    native, special = write_qwen(tmp_path, "a2d-qwen3")
    edit_json(tmp_path / "config.json", model_type="qwen3", use_sliding_window=False)
    assert load_policy(tmp_path).kind == "ar"
    policy = load_policy(tmp_path, family=MaskedDiffusionPolicy)
    assert policy.mask_token_id == special["<|mask|>"]
    torch.testing.assert_close(policy.logits(ids_of()), bidirectional(native, ids_of()))
    policy.save_pretrained(tmp_path / "saved")
    assert load_policy(tmp_path / "saved").kind == "mdm"


OWN = """
from mdmrl.policies import AutoregressivePolicy


def draw(policy, prompts, config, generator, record):
    return policy.kind, prompts


class Own(AutoregressivePolicy):
    kind = "own"
    sampler = draw
    logp_estimator = draw

    def loss(self, batch, learn_prompt, generator):
        return self.kind, batch


def made(model, tokenizer):
    return Own(model, tokenizer)
"""


@pytest.mark.parametrize("name", ["Own", "made"])
def test_a_family_comes_from_a_file(tmp_path, name):
    write_qwen(tmp_path / "model", "a2d-qwen2")
    (tmp_path / "own.py").write_text(OWN)
    policy = load_policy(tmp_path / "model", family=f"{tmp_path}/own.py:{name}")
    assert resolve(policy.sampler)(policy, ["low"], None, None, False) == ("own", ["low"])
    assert resolve(policy.logp_estimator)(policy, ["low"], None, None, False) == ("own", ["low"])
    assert resolve(policy.loss)(policy, "batch", False, None) == ("own", "batch")
    assert (policy.denoises, policy.remasking, policy.block_length) == (False, None, None)


def test_a_family_that_makes_no_policy_is_refused(tmp_path):
    write_qwen(tmp_path, "a2d-qwen2")
    assert "made a tuple: expected a Policy" in one_line(
        lambda: load_policy(tmp_path, family=lambda *given: given)
    )


def test_what_makes_no_policy_is_no_family(tmp_path):
    (tmp_path / "mine.py").write_text("three = 3\nclass No: ...\n")
    for family in (3, f"{tmp_path}/mine.py:three", f"{tmp_path}/mine.py:No", lambda model: model):
        with pytest.raises(InputError, match=r"family=.*expected a function of model, tokenizer"):
            load_policy("tiny-ar", family=family)


def test_what_each_family_names_is_there():
    """Samplers, losses and estimators are of lower rooms, so that only their text is in this."""
    for family in (AutoregressivePolicy, MaskedDiffusionPolicy, BlockDiffusionPolicy):
        assert all(":" in named for named in (family.sampler, family.loss))
        assert family.logp_estimator in ESTIMATORS
        assert (family.remasking is not None) == family.denoises


# -- special tokens --------------------------------------------------------------------------------


def tagged(policy_class, mdm):
    """A policy whose tokenizer holds the tags of an answer as special tokens."""
    tokenizer, model = mdm.tokenizer, mdm.model
    tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    model.resize_token_embeddings(len(tokenizer))
    return policy_class(model, tokenizer)


TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]


def test_tags_that_are_special_tokens_stay_in_the_text(mdm):
    policy = tagged(MaskedDiffusionPolicy, mdm)
    text = "<reasoning>fever</reasoning><answer>gout</answer>"
    frame = "<|user|>", "<|assistant|>", "<|mask|>", "<|pad|>"
    ids = policy.tokenizer("".join(frame) + text + "<|end|><|pad|>x", return_tensors="pt").input_ids
    assert set(policy.tokenizer.convert_tokens_to_ids(TAGS)) < set(ids[0].tolist())
    assert policy.decode(ids, policy.completion_mask(ids)) == [text]


def test_markers_that_only_a_chat_template_knows_are_no_text(tmp_path):
    """<|im_start|> has no role in the tokenizer, and the system turn may be unknown."""
    write_qwen(tmp_path, "a2d-qwen2")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    policy = load_policy(tmp_path)
    ids = policy.tokenizer("<|im_start|>lot<|beginoftext|>low<|im_end|>", return_tensors="pt")
    shown = policy.decode(ids.input_ids, torch.ones_like(ids.input_ids).bool())
    assert shown == ["lot<|beginoftext|>low"]


@pytest.mark.parametrize("marks", ["</s>", "<s> </s>"])
def test_an_end_that_a_base_tokenizer_appends_is_left_out(mdm, marks):
    tokenizer = mdm.tokenizer
    tokenizer.chat_template = None
    front = tokenizer("<|user|>").input_ids if "<s>" in marks else []
    special = [("<|end|>", tokenizer.eos_token_id), ("<|user|>", 3)]
    assert tokenizer.convert_tokens_to_ids("<|user|>") == 3
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=("<|user|> " if front else "") + "$A <|end|>", special_tokens=special
    )
    assert tokenizer("fever").input_ids[-1] == tokenizer.eos_token_id
    batch = mdm.encode(["fever", "fever and rash"])
    for text, ids, real in zip(
        ["fever", "fever and rash"], batch.input_ids, batch.attention_mask, strict=True
    ):
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[real].tolist() == front + plain
    assert (batch.input_ids[:, -1] != tokenizer.eos_token_id).all()


class Near(MaskedDiffusionPolicy):
    """Every position sees few neighbours: a pattern that no room of the library knows of."""

    def hidden_states(self, input_ids, attention_mask=None, cache=None, position_ids=None):
        at = torch.arange(input_ids.shape[1])
        sees = ((at[:, None] - at).abs() <= 3) & attention_mask.bool()[:, None, None]
        return super().hidden_states(input_ids, sees, position_ids=positions_of(attention_mask))


def test_sampler_and_estimator_ask_the_same_network_of_a_family_of_ones_own(mdm):
    near = Near(mdm.model, mdm.tokenizer)
    config = SamplerConfig(max_new_tokens=8, steps=4, temperature=1.0, remasking="state_confidence")
    prompts = ["What is fever?", "And pain? Where?"]
    output = generate(near, prompts, config, generator_for(0, "near"), record=True)
    everyone = torch.ones(2, dtype=torch.bool)
    rollout = Rollout.of(output, torch.zeros(2), everyone, config)
    noise = draw_noise(rollout, 0.0, generator_for(0, "noise"))
    found = estimator("trajectory", near)(near, rollout, noise)
    shown = rollout.revealed_at >= 0
    torch.testing.assert_close(found[shown], output.logprobs[shown], atol=1e-5, rtol=1e-5)
    plain = estimator("trajectory", mdm)(mdm, rollout, noise)
    assert not torch.allclose(plain[shown], output.logprobs[shown], atol=1e-2)
