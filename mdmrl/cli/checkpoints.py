"""Commands that make one checkpoint of another without rewards."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import mdmrl
from mdmrl.cli.options import (
    Device,
    Dtype,
    Family,
    File,
    Name,
    PolicyName,
    Rank,
    Settings,
    at_length_of,
    held_out,
    read_settings,
    resumable,
)
from mdmrl.config import require

Data = Annotated[File, Option(help="JSONL with prompt and completion.")]
Judged = Annotated[
    Name, Option(help="Judge by this task's validation rows; learn from it without --data.")
]


def sft(
    settings: Settings = None,
    policy: PolicyName = "tiny-mdm",
    data: Data = None,
    task: Judged = None,
    lora_r: Rank = 0,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Fine-tune on completions, of your own or of a task's pre-training split; on several processes
    by `torchrun --nproc-per-node N -m mdmrl sft ...` or `accelerate launch -m mdmrl sft ...`."""
    rows = _rows(data, task)
    loaded = mdmrl.load_policy(policy, device=device, dtype=dtype, family=family)
    _learn(loaded, rows, task, lora_r, read_settings(settings))


def adapt(
    policy: Annotated[str, Argument(help="An autoregressive one: a name, or a folder.")],
    settings: Settings = None,
    data: Data = None,
    task: Judged = None,
    annealing: Annotated[
        float, Option(help="Share of the updates over which it comes to look ahead.")
    ] = 0.0,
    mask_token: Annotated[
        Name, Option(help="For a tokenizer that has none: <|mask|> unless given.")
    ] = None,
    lora_r: Rank = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Make an autoregressive policy a masked diffusion one, and fine-tune it as `sft` does."""
    from mdmrl.policies.adapt import adapted

    rows = _rows(data, task)
    made = adapted(mdmrl.load_policy(policy, device=device, dtype=dtype), annealing, mask_token)
    _learn(made, rows, task, lora_r, {"output_dir": "runs/adapt"} | read_settings(settings))


def _rows(data: File, task: Name) -> list[dict]:
    require(bool(data or task), "nothing to learn from: give --data FILE, --task NAME or both")
    if data:
        return mdmrl.load_rows(data, ("prompt", "completion"))
    return mdmrl.load_task(task).rows("pretrain")


def _learn(policy, rows: list[dict], task: Name, lora_r: int, given: dict) -> None:
    judged = mdmrl.load_task(task) if task else None
    config = mdmrl.SFTConfig.from_dict(at_length_of(judged, given) if judged else given)
    if judged:
        config = config.completed_as(judged, policy, given)
    if lora_r:
        mdmrl.add_lora(policy, r=lora_r, seed=config.seed)
    judging = {}
    if judged and (watched := held_out(judged)):
        judging = {"eval_rows": watched, "metric": judged.metric, "watch": judged.watch}
    with resumable():
        print(mdmrl.train_sft(policy, rows, config, **judging) / "model")


def export(
    policy: Annotated[str, Argument(help="A name, or a folder; an adapter's too.")],
    folder: Annotated[Path, Argument(help="A new one.")],
    layout: Annotated[str, Option(help="dream, llada, or plain: that of transformers.")] = "plain",
    adapter: Annotated[File, Option(help="An adapter's folder, to merge in.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Write a policy's weights, its adapter merged in, in the layout of a published family."""
    from mdmrl.policies.export import export

    export(mdmrl.load_policy(policy, device=device, dtype=dtype, adapter=adapter), folder, layout)
    print(folder)
