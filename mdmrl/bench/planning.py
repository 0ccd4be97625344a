"""What training at a profile's scale takes of a card's memory, from shapes alone.

A network of the published shape is made on the meta device, where tensors have no content, and run
once; what autograd keeps of that pass is counted. The rest is arithmetic:

    held      weights, gradients and AdamW's two moments of those that are trained, the reference
    rollout   keys and values (autoregressive), one layer at work, logits of the positions drawn
    scoring   one layer at work, logits of a micro-batch and their log-softmax
    update    what autograd keeps of a micro-batch, or of one layer and every layer's input with
              gradient checkpointing; logits, their log-softmax and gradient

Attention matrices are not counted: fused kernels never have them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mdmrl.bench.samplers import SHAPES
from mdmrl.config import require
from mdmrl.policies import Policy
from mdmrl.policies.families import FAMILIES
from mdmrl.policies.load import DTYPES, SMOLLM2
from mdmrl.policies.lora import THESIS_TARGETS
from mdmrl.study.notebooks import notebook_parameters, plan
from mdmrl.zoo.pretrain import fresh_model
from mdmrl.zoo.recipes import shipped_tokenizer

# Kind and shape of the policies that profiles name, beside the tiny ones.
KNOWN = {
    SMOLLM2: ("ar", "smollm2"),
    "../runs/adapt/model": ("mdm", "smollm2"),  # its twin, by `mdmrl adapt`
    "Qwen/Qwen2.5-7B-Instruct": ("ar", "qwen2.5-7b"),
    "Dream-org/Dream-v0-Instruct-7B": ("mdm", "qwen2.5-7b"),
    "GSAI-ML/LLaDA-8B-Instruct": ("mdm", "llada-8b"),
}
# By notebook, the parameters whose policies it trains: every weight, or by the thesis's LoRA.
TRAINED = {
    "00_tour": ("policy",),
    "03_reward_curves": ("policy_ar", "policy_mdm"),
    "04_kl_instability": ("policy_ar", "policy_mdm"),
    "08_block_rl": ("policy_mdm",),
    "10_hierarchy": ("rl_policies", "pipeline_policy"),
    "11_reward_ablation": ("policy",),
    "12_code_completion": ("policy_ar", "policy_mdm", "policy_bd"),
    "16_starting_point": ("policy_ar", "policy_mdm", "real_policy"),
    "17_few_steps": ("policy_mdm",),
}
BY_LORA = ("real_policy",)
BY_TRAJECTORY = ("11_reward_ablation", "12_code_completion")
RANK = 48  # of the thesis's LoRA
PROMPT = 256  # tokens: a question with its instruction
LENGTHS = ("max_completion_length", "max_new_tokens", "flat_tokens")
IN_DTYPE = ("policy", "smollm2")  # what a notebook's `dtype` is of
PHASES = ("rollout", "scoring", "update", "checkpointed")
ROWS = 12  # completions of an update, where a notebook says nothing
ROOM = 0.9  # of a card: what its driver and the gaps between tensors leave


@dataclass(frozen=True)
class Work:
    """One policy at work: `rows` completions of a forward pass, of `length` tokens behind `prompt`.

    lora_r: 0 trains every weight, None nothing. dtype: of the body, see `load_policy`. passes: that
    the estimator of log p makes before the way back; the steps, for `trajectory`.
    """

    kind: str
    shape: str
    rows: int
    length: int
    prompt: int = PROMPT
    lora_r: int | None = None
    dtype: str = "float32"
    passes: int = 1


def memory(work: Work) -> dict[str, float]:
    """Bytes by part: `weights`; `trained`, adapters, gradients and moments; `reference`;
    `activations` and `logits` of an update; `cache`; and the peaks of the `PHASES` of the work."""
    policy = on_meta(work)
    network, config = policy.model, policy.model.config
    weights = sum(map(_bytes, network.parameters()))
    trained = [p for p in network.parameters() if p.requires_grad]
    trained = 0 if work.lora_r is None else sum(map(_bytes, trained))
    adapters = trained if work.lora_r else 0
    reference = weights if work.lora_r == 0 else adapters
    width, drawn = work.prompt + work.length, work.rows * work.length
    layers, kept = config.num_hidden_layers, kept_bytes(policy, work.rows, width)
    at_work = kept / layers
    body = DTYPES[work.dtype].itemsize
    inputs = work.passes * layers * work.rows * width * config.hidden_size * body
    size = config.hidden_size // config.num_attention_heads
    cache = layers * work.rows * width * 2 * config.num_key_value_heads * size * body
    cache = 0 if policy.denoises else cache
    logits = 4 * config.vocab_size  # float32
    at_once = drawn if policy.denoises else work.rows
    held = weights + 3 * trained + (reference if trained else 0)
    found = {
        "weights": weights - adapters,
        "trained": adapters + 3 * trained,
        "reference": reference if trained else 0,
        "cache": cache,
        "rollout": held + cache + at_work + 3 * at_once * logits,
    }
    if trained:
        found |= {"activations": work.passes * kept, "logits": 3 * drawn * logits}
        found["scoring"] = held + at_work + 2 * drawn * logits
        found["update"] = held + work.passes * kept + 3 * drawn * logits
        found["checkpointed"] = held + inputs + at_work + 3 * drawn * logits
    return found


def on_meta(work: Work) -> Policy:
    """A policy of that shape without weights, its adapter on it."""
    tokenizer, context = shipped_tokenizer(), max(4096, work.prompt + work.length)
    model = fresh_model(work.kind, tokenizer, SHAPES[work.shape], context, 32, 0, "meta")
    model.model.to(DTYPES[work.dtype])
    model.set_attn_implementation("eager")  # a fused kernel has none for the meta device
    policy = FAMILIES[work.kind](model, tokenizer)
    if work.lora_r:
        lora = peft.LoraConfig("CAUSAL_LM", r=work.lora_r, target_modules=THESIS_TARGETS)
        policy.model = peft.get_peft_model(model, lora, low_cpu_mem_usage=True)
    return policy


def kept_bytes(policy: Policy, rows: int, width: int) -> int:
    """What autograd keeps of a pass over (rows, width) tokens for the way back, weights and
    attention matrices left out."""
    own = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        matrix = tensor.ndim == 4 and tensor.shape[-2:] == (width, width)
        if storage._cdata not in own and not matrix:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    sees = torch.ones(rows, 1, width, width, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = policy.hidden_states(ids, sees, position_ids=ids)
    del hidden
    return sum(kept.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def work_of(profile: str) -> Iterator[tuple[str, str, Work]]:
    """Notebook, policy and work of every policy of a profile that is not tiny."""
    for path, changes in plan(profile):
        given = {name: p.value for name, p in notebook_parameters(path).items()} | changes
        length = next((given[name] for name in LENGTHS if name in given), 128)
        rows = given.get("completions", given.get("batch_size", ROWS))
        for name, value in given.items():
            for policy in value if isinstance(value, list) else [value]:
                if not isinstance(policy, str) or policy not in KNOWN:
                    continue
                kind, shape = KNOWN[policy]
                trains, lora = name in TRAINED.get(path.stem, ()), name in BY_LORA
                work = Work(kind, shape, rows, length)
                if trains:
                    by_steps = kind != "ar" and path.stem in BY_TRAJECTORY
                    passes = given["steps"] if by_steps else 1
                    work = replace(work, lora_r=RANK if lora else 0, passes=passes)
                if lora:
                    work = replace(work, length=given["real_length"], dtype=given["real_dtype"])
                elif name in IN_DTYPE:
                    work = replace(work, dtype=given.get("dtype", work.dtype))
                yield path.stem, policy, work


def print_plan(profile: str, gpus: str) -> None:
    """A table of what each policy of a profile takes, in GB, and whether a card has it.

    Args:
        gpus: how many, and GB of each, as in "1x80". Every card holds all of it, and makes an
            update's completions of its own.
    """
    count, _, size = gpus.partition("x")
    fit = count.isdecimal() and size.isdecimal() and int(count) and int(size)
    require(bool(fit), f"--gpus {gpus}: expected how many and GB of each, as in 1x80")
    parts = ("weights", "trained", "reference", "activations", "logits", "cache", *PHASES)
    names = ["", "policy", "trains", "completions", *parts, "fits"]
    title = f"profile {profile}, GB on each of {count} x {size} GB"
    table = Table(*names, title=title, title_justify="left")
    for notebook, policy, work in dict.fromkeys(work_of(profile)):
        found = memory(work)
        trains = {None: "-", 0: "every weight"}.get(work.lora_r, f"LoRA, r={work.lora_r}")
        text = f"{work.rows} x {work.prompt}+{work.length}"
        sizes = (f"{found[part] / 1e9:.1f}" if part in found else "-" for part in parts)
        table.add_row(notebook[:2], policy, trains, text, *sizes, verdict(found, int(size)))
    Console(width=190).print(table)


def verdict(found: Mapping[str, float], size: int) -> str:
    """Whether all phases fit into a card of `size` GB, and how."""
    room = ROOM * size * 1e9
    others = max(found.get(phase, 0) for phase in ("rollout", "scoring"))
    if max(others, found.get("update", 0)) <= room:
        return "yes"
    recomputed = max(others, found.get("checkpointed", others))
    return "with gradient checkpointing" if recomputed <= room else "no"
