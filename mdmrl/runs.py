"""Run folders, metrics, atomic checkpoints, random-number derivation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from mdmrl.config import InputError, require
from mdmrl.provenance import environment

STOP = ".stop"  # in a run's folder: whoever trains is to stop
ENVIRONMENT, LOGS = "environment.json", ("metrics", "samples", "examples")


def derived_seed(seed: int, purpose: str, step: int = 0, index: int = 0) -> int:
    """A 63-bit seed that depends on all four arguments and nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(
    seed: int, purpose: str, step: int = 0, index: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """The generator of one purpose at one step; the global random state is never touched."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, step, index))


def kept_random_state(device: torch.device):
    """A context that puts back the global random state of the processor and of `device`, and makes
    nothing on any other card."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """A context, and a decorator, in which numbers below 1e-38 are zero on this thread of the
    processor. The gradients of a policy that has grown sure are full of them, and products of them
    take several times as long."""
    already = not (torch.full((), 1e-39) * 1.0).item()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


def filled(held: Mapping, since: Mapping) -> dict:
    """`held`, and what it does not name yet from `since`, settings inside settings too."""
    both = {k: filled(held[k], v) for k, v in since.items() if isinstance(held.get(k), Mapping)}
    return {**since, **held, **both}


def as_json(value, **options) -> str:
    """Strict JSON, in which nan and infinities are null."""

    def strict(x):
        x = x.tolist() if hasattr(x, "tolist") else x  # numpy's and torch's
        if isinstance(x, Mapping):
            return {str(key): strict(inner) for key, inner in x.items()}
        if isinstance(x, list | tuple):
            return [*map(strict, x)]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(strict(value), sort_keys="indent" in options, allow_nan=False, **options)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a crash, or a `NotWritten`, leaves the old one or the new one, and
    never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        said = f"{path} cannot be written ({error})"
        raise NotWritten(f"{said}: make room, or choose another place") from error


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` once it is whole; a crash, or an error,
    which is a `NotWritten`, leaves what was there before."""
    aside = target.with_name(f".{target.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    except Exception as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise NotWritten(f"{target} cannot be written ({error}): make room") from error


def read_rows(path: Path, by: str | None = None) -> list[dict]:
    """Rows of a JSONL log, none without a file; a last line that a crash cut short is left out. All
    have to have a whole number in the column `by`, if that is named."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        fit = isinstance(row, dict) and (by is None or isinstance(row.get(by), int))
        said = f"{path}:{number} is no JSON row: {line[:60]!r}"
        require(fit, f"{said}; take the line out, its row is lost")
        rows.append(row)
    return rows


class RunFolderError(InputError, FileExistsError):
    """A run folder that cannot be used: it holds something else, or another process writes it."""


class NotWritten(InputError, OSError):
    """The disk did not take what a run keeps; what it kept before is whole."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop; its last finished update is kept, and the same call goes on."""


def being_written(folder: str | Path) -> bool:
    """Whether a process, this one too, has the run of that folder open."""
    path = Path(folder) / ".lock"
    try:
        with FileLock(path, timeout=0) if path.exists() else nullcontext():
            return False
    except Timeout:
        return True


def request_stop(folder: str | Path) -> None:
    """Ask whoever trains the run of that folder, in whatever process, to stop after the update at
    hand. Where nobody does, nothing is left behind."""
    if being_written(folder):
        (Path(folder) / STOP).touch()


class Run:
    """A run folder: `config.json`, `environment.json`, `metrics.jsonl`, `samples.jsonl`, and
    `checkpoints/step-NNNNNN/`, each complete or absent.

    Args:
        identity: all that decides the results. A folder that holds another run is refused; only
            `max_steps` may be raised, so that a run can be extended.
        since: values of settings that a folder of an older version does not name yet.
        writes: False on all processes but one; device: of the policy, for `environment.json`.

    Raises:
        RunFolderError: the folder holds another run, or other files, or another process writes it.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping, since=None, writes=True, device="cpu"
    ):
        self.folder = Path(folder)
        with _for_writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # Hidden are the lock, and what a write that was cut off left.
        held = {path.name for path in self.folder.iterdir() if path.name[0] != "."} - {ENVIRONMENT}
        if held and "config.json" not in held:
            raise RunFolderError(
                f"{self.folder} is not empty and holds no run: choose another output_dir"
            )
        self._lock = FileLock(self.folder / ".lock")  # let go by the system when its process dies
        with _for_writing(self.folder):
            if writes:
                self._lock.acquire(timeout=0.3)  # `being_written` holds it for a moment
                (self.folder / STOP).unlink(missing_ok=True)
        try:
            self._open(json.loads(as_json(identity)), since or {}, writes, device)
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: dict, since: Mapping, writes: bool, device) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            made_on = as_json(environment(device), indent=1)
            write_atomically(self.folder / ENVIRONMENT, made_on)
            write_atomically(path, as_json(wanted, indent=1))
            return
        held = filled(_json_object(path), since)
        changed = sorted(k for k in held.keys() | wanted.keys() if held.get(k) != wanted.get(k))
        known = held.get("max_steps")
        extended = changed == ["max_steps"] and isinstance(known, int)
        extended = extended and wanted["max_steps"] > known
        if changed and not extended:
            detail = ", ".join(f"{k} {held.get(k)!r} -> {wanted.get(k)!r}" for k in changed)
            raise RunFolderError(
                f"{self.folder} holds another run ({detail[:500]}): choose another output_dir or "
                "delete the folder (only max_steps may be raised)"
            )
        if extended and writes:
            write_atomically(path, as_json(wanted, indent=1))

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called since the run was opened."""
        return (self.folder / STOP).exists()

    def log(self, row: Mapping, name: str = "metrics") -> None:
        """Append one row to `<name>.jsonl`; what is no finite number becomes null."""
        path = self.folder / f"{name}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(as_json(row) + "\n")
        except TypeError as error:
            wanted = "expected numbers, texts, and lists of them"
            raise InputError(f"a row of {path}: {error}; {wanted}") from None
        except OSError as error:
            said = f"{path} cannot be written ({error}): make room"
            raise NotWritten(f"{said}; the same call goes on from the last checkpoint") from error

    def logged(self, name: str = "metrics", by: str = "step") -> list[dict]:
        """The complete rows of `<name>.jsonl`, each with a whole number in the column `by`."""
        return read_rows(self.folder / f"{name}.jsonl", by)

    def complete(self, max_steps: int) -> bool:
        """Whether the run's last row, that of step `max_steps`, has been logged."""
        rows = self.logged()
        return bool(rows) and rows[-1]["step"] == max_steps

    def rewind(self, step: int, by: str = "step") -> None:
        """Drop logged rows of steps at or after `step`: a resumed run writes them again. `by` is
        the column that has the step."""
        for path in (self.folder / f"{name}.jsonl" for name in LOGS):
            kept = [as_json(row) + "\n" for row in read_rows(path, by) if row[by] < step]
            if path.exists():
                write_atomically(path, "".join(kept))

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write(folder)` fill a checkpoint, which takes the place of the one before: written
        aside, every file synced and listed with its SHA-256 in `manifest.json`, then renamed, so
        that a crash at any byte leaves the previous one whole; so does a `NotWritten`."""
        target = self.folder / "checkpoints" / f"step-{step:06d}"
        with written_aside(target) as aside:
            write(aside)
            manifest = {}
            for path in sorted(p for p in aside.rglob("*") if p.is_file()):
                _sync(path)
                manifest[str(path.relative_to(aside))] = _sha256(path)
            write_atomically(aside / "manifest.json", json.dumps(manifest, indent=1))
        _sync(target.parent)
        left = r"\.?step-(\d+)(?:\.aside)?"  # what a crash cut off, too
        for _, older in _checkpoints(self.folder, left):
            if older != target:
                shutil.rmtree(older)
        return target

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint whose files match its manifest, or None where
        there is none; a RunFolderError where none of them does."""
        damaged = []
        for step, folder in _checkpoints(self.folder):
            try:
                listed = _json_object(folder / "manifest.json")
                whole = all(_sha256(folder / name) == digest for name, digest in listed.items())
            except OSError:
                whole = False
            if whole and listed:
                return step, folder
            damaged.append(folder)
            warnings.warn(f"{folder} is damaged, and not used", stacklevel=2)
        if damaged:
            said = "a file is missing or is not what was written"
            raise RunFolderError(f"{damaged[0]}: {said}; delete {damaged[0].parent} to start again")
        return None


@contextmanager
def _for_writing(folder: Path) -> Iterator[None]:
    """What keeps a folder from being written to, as an error."""
    try:
        yield
    except Timeout:
        raise RunFolderError(
            f"another process is writing to {folder}: wait for it, end it, or choose another "
            "output_dir"
        ) from None
    except OSError as error:
        said = f"{folder} is no folder that can be written to ({error})"
        raise NotWritten(f"{said}: make room, or choose another output_dir") from error


def _checkpoints(run: Path, called: str = r"step-(\d+)") -> list[tuple[int, Path]]:
    """(step, folder) of those that a run has, the newest first; what else lies there is the
    user's."""
    named = ((re.fullmatch(called, path.name), path) for path in (run / "checkpoints").glob("*"))
    return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)


def _json_object(path: Path) -> dict:
    """What a file of a run holds; a RunFolderError where that is no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        said = f"{path} is damaged, and no JSON object"
        raise RunFolderError(f"{said}: mend it, or delete {path.parent} to start again")
    return found


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
