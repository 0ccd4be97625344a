"""One GRPO update of an autoregressive policy by this package, by TRL's trainer, and as textbooks
write it: what each takes, of seconds and of memory, for the same model, batch and lengths.

Each runs in a process of its own, whose memory at its peak is what it took.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mdmrl.config import require, unknown
from mdmrl.policies import add_lora, load_policy
from mdmrl.policies.lora import THESIS_TARGETS
from mdmrl.provenance import environment
from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import CHECKED, train_grpo
from mdmrl.runs import read_rows
from mdmrl.tasks import load_task

GROUP, BETA, RATE = 6, 0.04, 1e-6
PROMPTS = 2
ROWS = PROMPTS * GROUP
TARGETS = [name for name in THESIS_TARGETS if name != "lm_head"]  # whose adapters TRL refuses


def bench_against(
    peer: str,
    policy: str = "tiny-ar",
    length: int = 128,
    repeats: int = 3,
    device: str = "auto",
    lora_r: int = 0,
    batch: int = ROWS,
) -> dict:
    """Median seconds of an update of 2 x 6 completions of `length` tokens, KL included, and bytes
    at the peak, of ours, of the textbook and of `peer` ("trl"), and both as ratios to ours. All
    weights are trained, or adapters of rank `lora_r` on `TARGETS`, whose reference is the network
    without them; both trainers, not the textbook, learn from `batch` completions at once, and draw
    them all at once, as TRL does."""
    if peer != "trl":
        raise unknown("trainer", peer, ["trl"])
    require(find_spec("trl") is not None, "--against trl needs its package: pip install trl")
    require(repeats >= 1, f"repeats={repeats}: expected at least 1")
    require(lora_r >= 0, f"lora_r={lora_r}: expected a rank, or 0 to train every weight")
    fit = batch in range(GROUP, ROWS + 1, GROUP)
    require(fit, f"batch={batch}: expected {GROUP} or {ROWS} of the {ROWS} completions at once")
    loaded = load_policy(policy, device=device)
    most = loaded.context_length - 1
    require(1 <= length <= most, f"lengths={length}: expected 1 to {most}, its prompt left out")
    require(not loaded.denoises, f"policy={policy!r}: trl has no diffusion; expected tiny-ar")
    place = environment(loaded.device)
    with tempfile.TemporaryDirectory() as folder:
        _without_an_end(loaded)
        loaded.save_pretrained(folder)
        asked = {"folder": folder, "length": length, "repeats": repeats, "lora_r": lora_r}
        asked |= {"batch": batch, "device": loaded.device.type}
        del loaded
        rows = {}
        for who in RUNNERS:
            command = [sys.executable, "-m", __name__, who, json.dumps(asked)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[who] = json.loads(done.stdout.splitlines()[-1])
    for row in rows.values():
        row |= {f"{name}_ratio": row[name] / rows["mdmrl"][name] for name in ("seconds", "memory")}
    said = [policy, f"LoRA of rank {lora_r}" if lora_r else "", f"{batch} at once"]
    said = ", ".join(filter(None, said if batch < ROWS else said[:2]))
    return {"policy": said, "length": length, "repeats": repeats, "rows": rows, **place}


def _without_an_end(policy) -> None:
    """Let a token that is never drawn be the end, so that all completions have the same length."""
    words = policy.tokenizer
    taken = {*policy.end_token_ids, policy.pad_token_id}
    spare = [i for i in words.all_special_ids if i not in taken][-1]
    words.eos_token = words.convert_ids_to_tokens(spare)
    policy.model.generation_config.eos_token_id = policy.model.config.eos_token_id = spare


def odd(prompts, completions, completion_ids, **columns) -> list[float]:
    """A reward that costs nothing: the share of odd tokens."""
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def prompts() -> list[dict]:
    return [{"prompt": row["prompt"]} for row in load_task("medcot").rows("rl", PROMPTS)]


def adapters(lora_r: int) -> peft.LoraConfig | None:
    """As `add_lora` has them, without dropout; None for every weight."""
    settings = {"lora_alpha": 128, "lora_dropout": 0.0, "target_modules": TARGETS}
    return peft.LoraConfig("CAUSAL_LM", r=lora_r, **settings) if lora_r else None


def of_ours(
    folder: str, length: int, repeats: int, device: str, lora_r: int, batch: int
) -> Iterator[float]:
    """Seconds of each update, those left out in which a ratio is checked."""
    policy = load_policy(folder, device=device)
    if lora_r:
        add_lora(policy, lora_r, lora_dropout=0.0, target_modules=TARGETS)
    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=f"{output}/run",
            max_steps=CHECKED + repeats,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=ROWS // batch,
            per_device_rollout_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=length,
            beta=BETA,
            kl_estimator="k3",
            epsilon=0.2,
            learning_rate=RATE,
            save_steps=CHECKED + repeats,
            gradient_checkpointing=True,
        )
        run = train_grpo(policy, [odd], prompts(), config)
        rows = read_rows(run / "metrics.jsonl")
        yield from (row["step_time"] for row in rows[CHECKED:-1])


def of_textbook(
    folder: str, length: int, repeats: int, device: str, lora_r: int, batch: int
) -> Iterator[float]:
    """The algorithm as it is written down, whole logits and all."""
    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    if lora_r:
        model = reference = peft.get_peft_model(model, adapters(lora_r))
        as_it_was = model.disable_adapter
    else:
        reference, as_it_was = copy.deepcopy(model), nullcontext
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    asked = [row["prompt"] for row in prompts() for _ in range(GROUP)]
    if words.chat_template is not None:
        asked = [[{"role": "user", "content": text}] for text in asked]
        asked = words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    given = words(asked, return_tensors="pt", padding=True).to(device)
    width = given.input_ids.shape[1]

    def logps(network, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1]
        found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return found[:, width - 1 :]

    for _ in range(repeats):
        start = time.perf_counter()
        how = {"do_sample": True, "top_k": 0, "max_new_tokens": length}
        ids = model.generate(input_ids=given.input_ids, attention_mask=given.attention_mask, **how)
        mask = torch.cat([given.attention_mask, torch.ones_like(ids[:, width:])], 1)
        rewards = torch.tensor(odd(None, None, ids[:, width:].tolist()), device=device)
        groups = rewards.view(-1, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        with torch.no_grad():
            old = logps(model, ids, mask)
            with as_it_was():
                ref = logps(reference, ids, mask)
        new = logps(model, ids, mask)
        ratio, d = (new - old).exp(), ref - new
        gain = torch.min(
            ratio * advantages.view(-1, 1), ratio.clamp(0.8, 1.2) * advantages.view(-1, 1)
        )
        (-(gain - BETA * (d.exp() - d - 1)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - start


def of_trl(
    folder: str, length: int, repeats: int, device: str, lora_r: int, batch: int
) -> Iterator[float]:
    """TRL's GRPO trainer, its defaults where they are not the others' settings."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig as Config
    from trl import GRPOTrainer

    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = prompts()
    if words.chat_template is not None:
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as output:
        config = Config(
            output_dir=output,
            max_steps=1 + repeats,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=ROWS // batch,
            num_generations=GROUP,
            max_completion_length=length,
            beta=BETA,
            learning_rate=RATE,
            bf16=False,
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        data = Dataset.from_list(rows)
        parts = {"args": config, "train_dataset": data, "processing_class": words}
        parts |= {"peft_config": adapters(lora_r)}
        GRPOTrainer(model, odd, callbacks=[Clock()], **parts).train()
    yield from times[1:]


RUNNERS = {"mdmrl": of_ours, "textbook": of_textbook, "trl": of_trl}


def peak(device: str) -> int:
    """Bytes that this process has taken at most, on the card where it used one."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    who, asked = sys.argv[1], json.loads(sys.argv[2])
    seconds = [*RUNNERS[who](**asked)]
    print(json.dumps({"seconds": statistics.median(seconds), "memory": peak(asked["device"])}))
