"""Published diffusion checkpoints whose own code is a renamed Qwen2, Qwen3 or Llama.

Each is read into the native class of transformers with bidirectional attention; the code that it
ships is never run. `PUBLISHED` is the one place that knows how they differ: field and weight names,
whether logits are shifted, which token ends a turn. Saved again, such a checkpoint is an ordinary
native one.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from mdmrl.config import InputError, require
from mdmrl.policies.network import no_progress_bars


@contextlib.contextmanager
def loading(what: str):
    """What transformers and peft say of files that they cannot read, in one line. They raise errors
    of many classes, `Exception` itself among them."""
    try:
        with no_progress_bars():
            yield
    except InputError:
        raise
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise InputError(f"{what} cannot be loaded: {type(error).__name__}: {said}") from error


def require_safetensors(source: str) -> None:
    """Refuse a folder whose weights are in pickles alone, which can run code."""
    folder = Path(source)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    require(
        not pickled or any(folder.glob("*.safetensors")),
        f"{source} has its weights in {', '.join(pickled[:2])}: expected safetensors, since "
        "pickles are not read; load it with transformers or peft and save_pretrained it again",
    )


OTHER = ("architectures", "auto_map", "layer_types", "model_type", "use_sliding_window")


def _same_names(fields: dict) -> dict:
    """Fields of a config.json that has the native names.

    The sliding window is left out: the families' own code masks nothing but padding.
    """
    return {name: value for name, value in fields.items() if name not in OTHER}


def _older_names(fields: dict) -> dict:
    """Native fields as the families' own code, of an older transformers, reads them."""
    ours = ("is_causal", "logit_shift", "rope_parameters")
    older = {"rope_theta": fields["rope_theta"], "rope_scaling": None, "use_sliding_window": False}
    return {name: value for name, value in _same_names(fields).items() if name not in ours} | older


# What makes LLaDA's configurable block a Llama's. Its other switches (biases, fused projections,
# norms of queries and keys) add or rename weights, which the loading of the weights refuses.
LLADA_AS_LLAMA = {
    "activation_type": "silu",
    "alibi": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}
# What else its code must be told, whose own defaults are another block's.
LLADA_PLAIN = {
    "block_type": "llama",
    "block_group_size": 1,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "rope_full_precision": True,
    "flash_attention": False,
    "init_device": "cpu",
    **dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0),
}
# Llama's names and LLaDA's.
LLADA_FIELDS = {
    "vocab_size": "embedding_size",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
    **{name: name for name in ("rms_norm_eps", "rope_theta")},
    **{f"{name}_token_id": f"{name}_token_id" for name in ("mask", "eos", "pad")},
}


def _llada_names(fields: dict) -> dict:
    for name, expected in LLADA_AS_LLAMA.items():
        require(
            fields.get(name) == expected,
            f"LLaDA with {name}={fields.get(name)!r}: expected {expected!r}, as in a Llama",
        )
    implied = {  # its vocab_size may count only the rows in use
        "embedding_size": fields["vocab_size"],
        "mlp_hidden_size": fields["mlp_ratio"] * fields["d_model"],
        "n_kv_heads": fields["n_heads"],
    }
    fields = fields | {name: fields[name] or value for name, value in implied.items()}
    own = {name: fields[theirs] for name, theirs in LLADA_FIELDS.items()}
    return own | {"bos_token_id": None}


def _names_of_llada(fields: dict) -> dict:
    found = {theirs: fields[name] for name, theirs in LLADA_FIELDS.items()}
    found |= {"vocab_size": fields["vocab_size"], "mlp_ratio": 4}
    return LLADA_AS_LLAMA | LLADA_PLAIN | found


# Applied one after another, so the head, also called ff_out, comes before the blocks' ff_out.
LLADA_WEIGHTS = {
    r"^model\.transformer\.wte": "model.embed_tokens",
    r"^model\.transformer\.ln_f": "model.norm",
    r"^model\.transformer\.ff_out": "lm_head",
    r"^model\.transformer\.blocks": "model.layers",
    r"\.attn_norm": ".input_layernorm",
    r"\.q_proj": ".self_attn.q_proj",
    r"\.k_proj": ".self_attn.k_proj",
    r"\.v_proj": ".self_attn.v_proj",
    r"\.attn_out": ".self_attn.o_proj",
    r"\.ff_norm": ".post_attention_layernorm",
    r"\.ff_proj": ".mlp.gate_proj",
    r"\.up_proj": ".mlp.up_proj",
    r"\.ff_out": ".mlp.down_proj",
}


# Fields of a configuration that change no logits.
NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
NOT_COMPUTED += ("bos_token_id", "initializer_range", "pretraining_tp", "sliding_window")
NOT_COMPUTED += ("max_window_layers", "use_sliding_window", "auto_map", "rope_scaling")


@dataclass(frozen=True)
class Published:
    """How checkpoints of one `model_type` become native ones.

    Attributes:
        model: the native class.
        architecture: what the family's own code calls it. A `model_type` is not enough: there are
            mixtures of experts called llada and block diffusion models called Dream.
        turn_end: the token that ends a turn, beside the tokenizer's end-of-sequence token.
        logit_shift: whether position i is predicted by the hidden state of position i-1.
        fields: turns the fields of config.json into native ones.
        weights: regular expressions of weight names, and what to put in their place.
        unfields: turns native fields into those of config.json.
        code: where the family's own code lies, a hub's name and then a file and class of each
            `Auto...`, for config.json to say.
    """

    model: type[PreTrainedModel]
    architecture: str
    turn_end: str
    logit_shift: bool = False
    fields: Callable[[dict], dict] = _same_names
    weights: Mapping[str, str] = field(default_factory=dict)
    unfields: Callable[[dict], dict] = _older_names
    code: tuple[str, Mapping[str, str]] = ("", MappingProxyType({}))

    def config(self, fields: dict) -> PreTrainedConfig:
        """The native configuration of a checkpoint with these fields in its config.json."""
        architectures = fields.get("architectures") or [self.architecture]
        require(
            architectures == [self.architecture],
            f"{fields['model_type']} checkpoint with architectures {architectures}: "
            f"expected [{self.architecture!r}], others compute something else",
        )
        config = self.model.config_class(**self.fields(fields))
        config.is_causal = False
        config.logit_shift = self.logit_shift
        return config

    def published(self, config: PreTrainedConfig, model_type: str) -> dict:
        """The fields of config.json that `config` turns into this configuration, which for all that
        is computed must be the same; InputError names what is not."""
        given, (place, classes) = config.to_dict(), self.code
        given["rope_theta"] = config.rope_parameters["rope_theta"]
        fields = self.unfields(given) | {
            "model_type": model_type,
            "architectures": [self.architecture],
            "auto_map": {name: f"{place}--{found}" for name, found in classes.items()},
        }
        back = self.config(fields).to_dict() | {"rope_theta": given["rope_theta"]}
        names = sorted((given.keys() | back.keys()) - set(NOT_COMPUTED))
        other = [name for name in names if given.get(name) != back.get(name)]
        said = ", ".join(f"{name}={given.get(name)!r} ({back.get(name)!r})" for name in other)
        require(not other, f"{model_type} computes something else, in brackets: {said}")
        return fields

    def published_name(self, weight: str) -> str:
        """The checkpoint's name of a native weight."""
        for theirs, native in reversed(self.weights.items()):
            anchor = "^" if theirs.startswith("^") else ""
            plain = theirs.removeprefix("^").replace("\\", "")
            weight = re.sub(anchor + re.escape(native), plain, weight)
        return weight


# By `model_type`. Sources: the checkpoints' own modelling code (GSAI-ML/LLaDA-8B-Instruct,
# Dream-org/Dream-v0-Instruct-7B), ML-GSAI/LLaDA, DreamLM/Dream; for a2d, adapted from causal models
# without a shift, ZHZisZZ/dllm (ca176752). Its block diffusion models bear the same names and
# cannot be told apart.
PUBLISHED = {
    "llada": Published(
        transformers.LlamaForCausalLM,
        "LLaDAModelLM",
        "<|eot_id|>",
        False,
        _llada_names,
        LLADA_WEIGHTS,
        _names_of_llada,
        (
            "GSAI-ML/LLaDA-8B-Instruct",
            {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModel": "modeling_llada.LLaDAModelLM",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            },
        ),
    ),
    "Dream": Published(
        transformers.Qwen2ForCausalLM,
        "DreamModel",
        "<|im_end|>",
        logit_shift=True,
        code=(
            "Dream-org/Dream-v0-Instruct-7B",
            {
                "AutoConfig": "configuration_dream.DreamConfig",
                "AutoModel": "modeling_dream.DreamModel",
            },
        ),
    ),
    "a2d-qwen2": Published(transformers.Qwen2ForCausalLM, "A2DQwen2LMHeadModel", "<|im_end|>"),
    "a2d-qwen3": Published(transformers.Qwen3ForCausalLM, "A2DQwen3LMHeadModel", "<|im_end|>"),
    "a2d-llama": Published(transformers.LlamaForCausalLM, "A2DLlamaLMHeadModel", "<|eot_id|>"),
}

# Tokenizer classes to load as they are: one that is remote code, by the native class with the same
# rules; Qwen's, which AutoTokenizer finds only after warnings about an unknown model_type; and what
# belongs to no architecture.
TOKENIZERS = {
    **dict.fromkeys(("DreamTokenizer", "Qwen2Tokenizer"), transformers.Qwen2Tokenizer),
    "TokenizersBackend": transformers.PreTrainedTokenizerFast,
    "PreTrainedTokenizerFast": transformers.PreTrainedTokenizerFast,
}


def read_fields(source: str) -> dict:
    """The fields of a folder's or hub name's config.json; InputError for no such file, or a
    `model_type` that no native class here computes."""
    with loading(source):
        fields, _ = PreTrainedConfig.get_config_dict(source)
    require(isinstance(fields, dict), f"{source}: config.json holds {fields!r:.80}, no object")
    model_type = fields.get("model_type")
    require(isinstance(model_type, str | None), f"{source}: model_type={model_type!r:.80}, no text")
    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encodes = model_type in encoders or fields.get("is_encoder_decoder")
    native = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encodes
    require(
        native or model_type in PUBLISHED,
        f"{source} is of model_type {model_type!r}: expected a decoder that transformers has or "
        f"one of {', '.join(PUBLISHED)}; a checkpoint's own code is never run",
    )
    return fields


def load_model(source: str, fields: dict, tokenizer, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or hub name in a native class, every weight read from the checkpoint.

    `config.is_causal`, `config.logit_shift` and `config.mask_token_id` say what kind it is, and
    `generation_config.eos_token_id` lists the tokens that end a completion.

    Args:
        fields: from `read_fields`.

    Raises:
        InputError: a config.json that asks for more than the native class computes, or weights that
            do not fit it (named).
    """
    # Mismatched sizes are let through here to be refused below, with both.
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options["use_safetensors"] = True
    require_safetensors(source)
    family, native = PUBLISHED.get(fields["model_type"]), AutoModelForCausalLM
    with loading(source):
        if family is None:
            options["trust_remote_code"] = False
        else:
            native = family.model
            options |= {"config": family.config(fields), "key_mapping": dict(family.weights)}
        model, report = native.from_pretrained(source, **options)
    faults = [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(f"{name} is not part of the model" for name in sorted(report["unexpected_keys"])),
        *(
            f"{name} is {tuple(saved)} where config.json asks for {tuple(made)}"
            for name, saved, made in sorted(report["mismatched_keys"])
        ),
    ]
    said = "; ".join(faults[:4]) + (f" and {len(faults) - 4} more" if len(faults) > 4 else "")
    require(not faults, f"the weights of {source} do not fit its config: {said}")
    if family is None:
        return model
    model._weight_conversions = None  # or save_pretrained would write the old names again
    # The settings that came along are those of the family's own sampler.
    ends = model.generation_config.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends])]
    ends.append(tokenizer.get_vocab().get(family.turn_end))
    model.generation_config = GenerationConfig(
        eos_token_id=[end for end in dict.fromkeys(ends) if end is not None],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
