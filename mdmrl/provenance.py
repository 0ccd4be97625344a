"""Which device a policy is put on, and what a number was measured with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from mdmrl.config import require, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(asked: str | torch.device = "auto") -> str:
    """The device that `asked` means on this machine, in this process: `auto` is a card if there is
    one, else Apple's `mps`, else `cpu`. Where a launcher started several processes, `auto` and
    `cuda` give each its own card, by its number."""
    name, _, index = str(asked).partition(":")
    if name not in DEVICES or not (index.isdecimal() or str(asked) == name):
        raise unknown("device", asked, DEVICES)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cards else "mps" if apple else "cpu"
    require(
        name != "cuda" or cards > 0,
        f"{asked} asked, but this torch {torch.__version__} sees no card: ask for cpu, or install "
        "the card's driver and a build of torch for it",
    )
    require(name != "mps" or apple, "mps asked, but this torch sees no Apple GPU: ask for cpu")
    if name != "cuda":
        return name
    require(
        not index or int(index) < cards,
        f"{asked} asked, but the last of the {cards} cards is cuda:{cards - 1}",
    )
    if "LOCAL_RANK" not in os.environ:
        return str(asked) if index else name
    rank = int(os.environ["LOCAL_RANK"])
    processes = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    require(
        processes <= cards,
        f"{processes} processes on this machine, but each sees {cards} cards: start as many as "
        "there are cards, or ask for cpu",
    )
    require(
        index in ("", str(rank)) or processes == 1,
        f"{asked} asked by process {rank} of {processes}: ask for cuda, which gives each its own",
    )
    return f"cuda:{index or rank}"


def environment(device: str | torch.device) -> dict:
    """What a number was measured on, `device` being the policy's: versions, machine, threads,
    source revision."""
    packages = ("mdmrl", "torch", "transformers", "peft", "accelerate", "sentence-transformers")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "revision": revision(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine(device: str | torch.device) -> str:
    """The name of `device`: of a card, or of the processor with its number of cores."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(": ", 1)[1] for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores" + (", its GPU" if kind == "mps" else "")


def revision() -> str | None:
    """The git revision of the sources, marked if they were changed; None outside a checkout."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "-s", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
