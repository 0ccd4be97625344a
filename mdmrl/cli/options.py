"""Options that commands share, and how their words are read."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml
from typer import Argument, Option

import mdmrl
from mdmrl.config import InputError, require

File, Name, Words, Counts = Path | None, str | None, list[str] | None, list[int] | None
Files, Pair = list[Path] | None, tuple[Path, Path] | None

PolicyName = Annotated[str, Option(help="A name, a folder, or a hub's organisation/model.")]
Family = Annotated[Name, Option(metavar="FILE.py:NAME", help="The policy's class, if yours.")]
Device = Annotated[str, Option(help="auto (a card if there is one), cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, Option(help="Of the policy's body: float32 or bfloat16.")]
TaskName = Annotated[Name, Option(metavar="NAME|FILE.py:NAME", help="Medcot without --data.")]
Rewards = Annotated[
    Words, Option(metavar="FILE.py:NAME", help="A reward instead of the task's; repeatable.")
]
Draw = Annotated[Name, Option(metavar="FILE.py:NAME", help="What completes prompts.")]
Rank = Annotated[int, Option(help="LoRA rank; 0 trains every weight.")]
Settings = Annotated[
    Words,
    Argument(metavar="[FILE.yaml] [KEY=VALUE]...", help="Settings, as in sampler.steps=16."),
]
Sampler = Annotated[
    Words,
    Option(metavar="KEY=VALUE", help="A field of SamplerConfig: block_length=32; repeatable."),
]


def read_settings(given: Words) -> dict:
    """Settings by name, from the words of a command line."""
    found: dict = {}
    for word in given or []:
        key, equals, value = word.partition("=")
        outer, _, inner = key.partition(".")
        if not equals:
            found |= _from_file(Path(word))
        elif inner:
            beside = {} if found.get(outer) is None else found[outer]
            require(isinstance(beside, dict), f"{word}: {outer}={beside!r} has no settings inside")
            found[outer] = {**beside, inner: read_yaml(value, repr(value))}
        else:
            found[outer] = read_yaml(value, repr(value))
    return found


def _from_file(path: Path) -> dict:
    wanted = f"{str(path)!r}: expected a file of settings, FILE.yaml, or KEY=VALUE"
    require(path.suffix in (".yaml", ".yml"), wanted)
    require(path.is_file(), f"there is no file {path}")
    found = read_yaml(path.read_bytes(), path) or {}
    require(isinstance(found, dict), f"{path}: expected settings, a line `name: value` each")
    return found


def read_yaml(text: str | bytes, where: object):
    """What a text in YAML says; `where` is what an error calls it."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # as of the date 2026-13-01
        wanted = "expected YAML, as in 3, 1e-5 or [1, 2]"
        raise InputError(f"{where}: {wanted} ({' '.join(str(error).split())})") from None


def read_pairs(given: Words) -> dict:
    """Fields of SamplerConfig by name, from `KEY=VALUE` pairs."""
    for pair in given or []:
        require("=" in pair, f"--sampler {pair}: expected KEY=VALUE, as in block_length=32")
    found = (pair.split("=", 1) for pair in given or [])
    return {key: read_yaml(value, repr(value)) for key, value in found}


def require_one_kind(context: typer.Context) -> None:
    """Of `mdmrl eval`: a policy, stored generations or a comparison, and what goes with it."""
    goes_with = {"generations": {"task", "output_dir", "json"}, "compare": {"json"}}
    given = given_in(context)
    kinds = [kind for kind in ("policy", *goes_with) if kind in given]
    said = ", ".join(kinds) or "none of them"
    require(len(kinds) == 1, f"got {said}: expected one of a policy, --generations, --compare")
    ignored = given - {kinds[0]} - goes_with.get(kinds[0], given)
    named = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(ignored))
    require(not ignored, f"--{kinds[0]} would ignore {named}: leave it out")


# What of the options of `mdmrl bench` each of them goes by.
BENCHES = {
    "samplers": "policy lengths steps batch block_length prompt_length repeats sampler device "
    "dtype",
    "update": "policy repeats device dtype",
    "update --against": "policy lengths repeats device against lora_r batch",
    "estimators": "repeats device",
    "judge": "repeats",
    "import": "",
}


def require_used(context: typer.Context, what: str, against: Name) -> None:
    """Refuse an option that a bench would ignore."""
    name = f"{what} --against" if against and what == "update" else what
    used = {"what", "json", *BENCHES.get(name, "").split()}
    ignored = [f"--{option.replace('_', '-')}" for option in sorted(given_in(context) - used)]
    said = f"bench {name} would ignore {', '.join(ignored)}: leave it out"
    require(name not in BENCHES or not ignored, said)


def given_in(context: typer.Context) -> set[str]:
    """The options that a command line names."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source.name != "DEFAULT"}


def at_length_of(task: mdmrl.Task, given: dict) -> dict:
    """The settings with the task's length, where they say nothing of one: sizes of steps, say, must
    add up to it."""
    length = task.sampler.get("max_new_tokens")
    return ({"max_completion_length": length} if length else {}) | given


def held_out(task: mdmrl.Task) -> Sequence[dict]:
    """What training is watched on."""
    return task.rows("validation", 48) if "validation" in task.splits else ()


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C says how to go on, and is exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("mdmrl: stopped; the same command goes on from what it has kept", file=sys.stderr)
        raise typer.Exit(130) from None
