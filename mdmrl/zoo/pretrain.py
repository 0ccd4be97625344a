"""Pre-training of the tiny twins: one recipe, one corpus, three losses.

All families see the same stream of chat-formatted documents (prompt, completion, end token) in the
same order and minimise their loss of `mdmrl.training.supervised`. In `PROMPT_SHARE` of the batches
the prompt is learnt too (it is masked like the completion, or predicted like it), so that they also
know the law of questions. The block diffusion model begins with the weights of the masked diffusion
one, as in Arriola et al. 2025 (BD3-LM).

The budget counts the tokens of documents, not the positions computed: the canvas's filling end
tokens are the masked diffusion model's own expense.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from mdmrl.config import require, resolve, unknown
from mdmrl.policies import Policy, load_policy
from mdmrl.policies.adapt import adapted
from mdmrl.policies.families import FAMILIES
from mdmrl.progress import Progress
from mdmrl.provenance import environment
from mdmrl.runs import (
    Run,
    derived_seed,
    flushed_denormals,
    generator_for,
    kept_random_state,
    read_rows,
    write_atomically,
    written_aside,
)
from mdmrl.tasks import load_task
from mdmrl.training.checkpoints import load_optimizer, save_optimizer
from mdmrl.training.supervised import Batch, collate, encode_pairs
from mdmrl.zoo import tokenizer_corpus
from mdmrl.zoo.recipes import RECIPES, TOKENIZERS, VOCABULARY, PretrainConfig
from mdmrl.zoo.tokenizer_training import train_tokenizer
from mdmrl.zoo.tuned import TUNED, tune

SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
PROMPT_SHARE = 0.1
WHOLE_SHARE = 0.25
POOL = 8  # batches
HASHED_DOCUMENTS = 10_000

# What a model card says of the documents of a task.
SUBJECTS = {
    "medcot": "generated medical chain-of-thought questions. Its medical statements are templates "
    "over a small\ntable of facts, not advice",
    "countdown": "Countdown: an expression of given numbers that reaches a target",
    "code": "small Python functions, from their heads and docstrings",
    "dafny": "Dafny: bodies of small methods from their specifications",
    "reasoning": "Countdown, word problems, mathematics and questions of choice, all generated",
}


def make_policy(config: PretrainConfig, tokenizer) -> Policy:
    """A tiny model of the family with the weights of `config.start`, or with fresh ones that derive
    from the seed."""
    if config.annealing is not None:
        policy = adapted(load_policy(config.start, device="cpu"), config.annealing)
        policy.model.set_attn_implementation(config.attn_implementation)
        return policy
    own = [getattr(config, name) for name in SHAPE[:4]]
    shape = (*own, config.num_attention_heads, len(tokenizer))
    settings = (config.max_position_embeddings, config.block_length, config.seed)
    model = fresh_model(config.family, tokenizer, shape, *settings)
    if config.start:
        model.load_state_dict(load_policy(config.start).model.state_dict())
    model.set_attn_implementation(config.attn_implementation)
    return FAMILIES[config.family](model, tokenizer)


def fresh_model(
    family: str, tokenizer, shape, context: int, block_length: int, seed: int, device: str = "cpu"
) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, of the numbers that `SHAPE` names."""
    architecture = Qwen2Config(
        **dict(zip(SHAPE, shape, strict=True)),
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    architecture.is_causal = family == "ar"
    if family == "bd":
        architecture.block_length = block_length
    device = torch.device(device)
    with kept_random_state(device), device:
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(architecture)


def batches(policy: Policy, stream, config: PretrainConfig, first: int = 0) -> Iterator[Batch]:
    """Batches number `first`, `first` + 1, ... without end; documents are drawn `POOL` batches at a
    time and sorted by canvas and prompt length, to spare padding. A row's `canvas` stands for the
    config's, but for a share of the batches, `WHOLE_SHARE`: so each task is known at its own length
    and at the one that they have in common when RL mixes them."""
    end, skipped = policy.tokenizer.eos_token_id, first % POOL
    documents = stream(config.seed, (first - skipped) * config.batch_size)
    while True:
        drawn = list(itertools.islice(documents, POOL * config.batch_size))
        pool = []
        for canvas in sorted({row.get("canvas", config.canvas) for row in drawn}):
            rows = [row for row in drawn if row.get("canvas", config.canvas) == canvas]
            pairs = encode_pairs(policy, rows, canvas)
            pool += [(canvas, pair) for pair in sorted(pairs, key=lambda pair: len(pair[0]))]
        for start in range(skipped * config.batch_size, len(pool), config.batch_size):
            canvases, pairs = zip(*pool[start : start + config.batch_size], strict=True)
            whole = torch.rand((), generator=generator_for(config.seed, "canvas", first)).item()
            yield collate(pairs, config.canvas if whole < WHOLE_SHARE else max(canvases), end)
            first += 1
        skipped = 0


def optimizers(policy: Policy, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and biases."""
    inner, outer = [], []
    for name, weight in policy.trainable_parameters().items():
        (inner if weight.ndim == 2 and ".layers." in name else outer).append(weight)
    return [
        torch.optim.AdamW(outer, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.Muon(inner, lr=config.muon_learning_rate, weight_decay=0.01),
    ]


def native_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them it is slower than float32."""
    held = torch.cpu.get_capabilities()
    return any(held.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def learning_rate_factor(progress: float, config: PretrainConfig) -> float:
    """Linear warm-up, a plateau, linear decay to zero over the last `decay_share`."""
    rise = progress / config.warmup_share if config.warmup_share else 1.0
    return max(0.0, min(1.0, rise + 1e-3, (1.0 - progress) / config.decay_share))


@flushed_denormals()
def pretrain(config: PretrainConfig, tokenizer, stream, folder: str | Path) -> Policy:
    """Train a tiny model on `stream(seed, start)` of documents with `prompt` and `completion`, and
    save it in `folder/model`; resumes where it stopped."""
    run = Run(folder, config.to_dict(), since={"annealing": None})
    policy = make_policy(config, tokenizer)
    optims = optimizers(policy, config)
    base_rates = [o.param_groups[0]["lr"] for o in optims]
    step, seen = 0, 0
    if latest := run.latest_checkpoint():
        step, checkpoint = latest
        policy.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        for number, optim in enumerate(optims):
            load_optimizer(optim, checkpoint / f"optimizer-{number}.safetensors")
        seen = json.loads((checkpoint / "seen.json").read_text())
    run.rewind(step + 1)

    def write(checkpoint: Path) -> None:
        save_file(policy.model.state_dict(), checkpoint / "model.safetensors")
        for number, optim in enumerate(optims):
            save_optimizer(optim, checkpoint / f"optimizer-{number}.safetensors")
        (checkpoint / "seen.json").write_text(json.dumps(seen))

    autocast = config.bf16 and native_bfloat16()
    policy.model.train()
    clock, losses, whole = time.perf_counter(), [], int(config.tokens)
    bar = Progress(run.folder.name, seen, whole, unit="token")
    for batch in batches(policy, stream, config, step):
        if seen >= config.tokens:
            break
        draw = generator_for(config.seed, "pretrain", step)
        learn_prompt = torch.rand((), generator=draw).item() < PROMPT_SHARE
        for optim, rate in zip(optims, base_rates, strict=True):
            optim.param_groups[0]["lr"] = rate * learning_rate_factor(seen / config.tokens, config)
        policy.progress = seen / config.tokens
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with bf16, kept_random_state(policy.device):
            torch.manual_seed(derived_seed(config.seed, "dropout", step))
            total, count = resolve(policy.loss)(policy, batch, learn_prompt, draw)
            loss = total / count
        if not loss.isfinite():
            raise FloatingPointError(f"loss={loss.item()} at step {step}: training diverged")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step, seen = step + 1, seen + batch.document_tokens
        losses.append(loss.item())
        bar.update(min(seen, whole), {"loss": losses[-1]})
        if step % config.logging_steps == 0:
            pace = (time.perf_counter() - clock) / len(losses)
            row = {"step": step, "tokens": seen, "loss": sum(losses) / len(losses)}
            run.log({**row, "seconds_per_step": pace})
            clock, losses = time.perf_counter(), []
        if step % config.save_steps == 0:
            run.save_checkpoint(step, write)
    bar.close()
    policy.model.eval().to(torch.bfloat16)
    with written_aside(run.folder / "model") as aside:
        policy.save_pretrained(aside)
    return load_policy(run.folder / "model", device="cpu")


def pretrain_by_name(
    name: str, folder: Path, tokens: float | None = None, seed: int | None = None
) -> Path:
    """Train what `name` says, `tokenizer`, a recipe or a tuned policy, with another budget or seed
    where one is given; returns the folder of the saved model.

    Beside the weights lie the recipe with seed and data hash (`recipe.json`), the training log
    (`log.csv`) and a model card (`README.md`).
    """
    if name == "tokenizer":
        require(tokens is None, f"tokens={tokens}: the tokenizer has no such budget; leave it out")
        train_tokenizer(tokenizer_corpus.texts(seed or 0), VOCABULARY).save_pretrained(folder)
        return folder
    if name in TUNED:
        require(tokens is None, f"tokens={tokens}: {name} is tuned by RL, which has no such budget")
        return tune(name, folder, seed)
    if name not in RECIPES:
        raise unknown("recipe", name, ["tokenizer", *RECIPES, *TUNED])
    given = {"tokens": tokens, "seed": seed}
    config = RECIPES[name].replace(**{k: v for k, v in given.items() if v is not None})
    stream, model = load_task(config.task).stream, folder / "model"
    policy = pretrain(config, TOKENIZERS[config.tokenizer](), stream, folder)
    log = pd.DataFrame(read_rows(folder / "metrics.jsonl"))
    log.to_csv(model / "log.csv", index=False, float_format="%.6g")
    documents = "".join(map(str, itertools.islice(stream(config.seed, 0), HASHED_DOCUMENTS)))
    recipe = config.to_dict() | {
        "parameters": policy.model.num_parameters(),
        "autocast": config.bf16 and native_bfloat16(),
        "data_sha256_of_first_documents": hashlib.sha256(documents.encode()).hexdigest(),
        "documents_hashed": HASHED_DOCUMENTS,
        **environment(policy.device),
        "command": f"mdmrl pretrain {name}",
    }
    write_atomically(model / "recipe.json", json.dumps(recipe, indent=1) + "\n")
    write_atomically(model / "README.md", model_card(name, recipe, log))
    return model


def model_card(name: str, recipe: dict, log: pd.DataFrame) -> str:
    """The model card of a tiny model, from its recipe and log alone."""
    begun = f" after the weights of `{recipe['start']}`" if recipe["start"] else ""
    families = {"ar": "autoregressive", "mdm": "masked diffusion", "bd": "block diffusion"}
    last = log.iloc[-1]
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
---
# {name}

A tiny {families[recipe["family"]]} language model ({recipe["parameters"]:,} parameters, Qwen2
architecture) for {SUBJECTS[recipe["task"]]}.
For the study of reinforcement learning only.

* Data: an endless stream of `{recipe["task"]}` documents, SHA-256 of the first
  {recipe["documents_hashed"]:,}: `{recipe["data_sha256_of_first_documents"][:16]}`;
  seed {recipe["seed"]}.
* Budget: {last["tokens"] / 1e6:.1f} M document tokens{begun}, {last["step"]:,.0f} steps of
  {recipe["batch_size"]}; final training loss {last["loss"]:.3f} nats a token.
* Recipe and machine: `recipe.json`; training log: `log.csv`.
* Train it again: `mdmrl pretrain {name}`. Held-out numbers: `figures/data/tiny_models.csv`,
  by `mdmrl eval`.
"""
