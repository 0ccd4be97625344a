"""The `mdmrl` command. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _mdmrl() -> None:
    """Reinforcement learning of masked diffusion language models: a study anyone can rerun."""


@app.command()
def reproduce(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="NN", help="The same as --only NN.")
    ] = None,
    profile: Annotated[str, typer.Option(help="A file of notebooks/profiles.")] = "cpu",
    only: Annotated[
        list[str] | None, typer.Option(help="Only those whose names begin so: --only 03 04.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run unchanged ones again.")] = False,
) -> None:
    """Run the notebooks headlessly; write figures, tables and claims."""
    print(f"profile {profile}: loading", flush=True)  # which takes a while at first
    from mdmrl.study.reproduce import reproduce

    raise typer.Exit(reproduce(profile, [*(only or []), *(more or [])], force))


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="tokenizer, or a recipe: tiny-ar, tiny-mdm, ...")],
    output_dir: Annotated[Path | None, typer.Option(help="Default: runs/pretrain/NAME.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Another budget of document tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and noise.")] = 0,
) -> None:
    """Train the tokenizer or a tiny model from scratch; goes on where it was stopped."""
    from mdmrl.zoo.pretrain import pretrain_by_name

    folder = output_dir or Path("runs") / "pretrain" / name
    print(f"{name}: saved in {pretrain_by_name(name, folder, tokens, seed)}")


# -- options that commands share -------------------------------------------------------------------

PolicyName = Annotated[str, typer.Option(help="A name, a folder, or a hub's organisation/model.")]
Family = Annotated[
    str | None, typer.Option(metavar="FILE.py:NAME", help="The policy's class, where it is yours.")
]
Device = Annotated[str, typer.Option(help="auto (a card if there is one), cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="Of the policy's body: float32 or bfloat16.")]
TaskName = Annotated[
    str | None, typer.Option(metavar="NAME|FILE.py:NAME", help="The task; medcot without --data.")
]
Rank = Annotated[int, typer.Option(help="LoRA rank; 0 trains every weight.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE.yaml] [KEY=VALUE]...",
        help="Settings, as in learning_rate=1e-5 or sampler.steps=16, those of a file first.",
    ),
]
Sampler = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="A field of SamplerConfig: block_length=32; repeatable."
    ),
]


def _settings(given: list[str] | None) -> dict:
    """Settings by name, from the words of a command line."""
    from mdmrl.config import require

    found: dict = {}
    for word in given or []:
        key, equals, value = word.partition("=")
        if not equals:
            require(
                Path(word).suffix in (".yaml", ".yml"),
                f"{word!r}: expected a file of settings, FILE.yaml, or KEY=VALUE",
            )
            found |= _from_yaml(Path(word))
            continue
        outer, _, inner = key.partition(".")
        if inner:
            found[outer] = {**found.get(outer, {}), inner: _value(value)}
        else:
            found[outer] = _value(value)
    return found


def _from_yaml(path: Path) -> dict:
    import yaml

    from mdmrl.config import InputError, require

    require(path.is_file(), f"there is no file {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    require(isinstance(found, dict), f"{path}: expected settings, a line `name: value` each")
    return found


def _value(text: str):
    import yaml

    from mdmrl.config import InputError

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{text!r}: expected a value of YAML, as in 3, 1e-5 or [1, 2]") from None


def _sampler(pairs: list[str] | None):
    """The SamplerConfig of `KEY=VALUE` pairs."""
    from mdmrl import SamplerConfig
    from mdmrl.config import require

    for pair in pairs or []:
        require("=" in pair, f"--sampler {pair}: expected KEY=VALUE, as in block_length=32")
    return SamplerConfig.from_dict(dict(pair.split("=", 1) for pair in pairs or []))


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C says how to go on, and is exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("mdmrl: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None


# -- commands --------------------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    policy: Annotated[str, typer.Argument(help="A name, or a folder.")],
    task: TaskName = "medcot",
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    limit: Annotated[int, typer.Option(help="How many prompts.")] = 300,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Denoising steps, half the tokens unless given; repeatable."),
    ] = None,
    sampler: Sampler = None,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
) -> None:
    """Exact answers and rewards on held-out prompts, greedy unless asked, with intervals."""
    from mdmrl import load_policy
    from mdmrl.evaluation.tables import append_rows, evaluation_table, print_table

    loaded = load_policy(policy, device=device, dtype=dtype, family=family)
    frame = evaluation_table(loaded, task, split, limit, _sampler(sampler), steps or [])
    print_table(frame.assign(policy=policy))
    if csv is not None:
        append_rows(frame.assign(policy=policy), csv)


@app.command()
def sample(
    policy: Annotated[str, typer.Argument(help="A name, or a folder.")],
    prompt: Annotated[str, typer.Argument(help="A user's message.")],
    sampler: Sampler = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Complete one prompt."""
    from mdmrl import generate, load_policy
    from mdmrl.runs import generator_for

    loaded = load_policy(policy, device=device, dtype=dtype, family=family)
    generator = generator_for(seed, "sample", device=loaded.device)
    print(generate(loaded, [prompt], _sampler(sampler), generator).completions[0])


@app.command()
def sft(
    settings: Settings = None,
    policy: PolicyName = "tiny-mdm",
    data: Annotated[Path | None, typer.Option(help="JSONL with prompt and completion.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Judge by this task's validation rows; learn from it without --data."),
    ] = None,
    lora_r: Rank = 0,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Fine-tune on completions, of your own or of a task's pre-training split; on several processes
    by `torchrun --nproc-per-node N -m mdmrl sft ...` or `accelerate launch -m mdmrl sft ...`."""
    from mdmrl import SFTConfig, add_lora, load_policy, load_rows, load_task, train_sft
    from mdmrl.config import require

    require(bool(data or task), "nothing to learn from: give --data FILE, --task NAME or both")
    config = SFTConfig.from_dict(_settings(settings))
    judged = load_task(task) if task else None
    rows = load_rows(data, ("prompt", "completion")) if data else judged.rows("pretrain")
    trained = load_policy(policy, device=device, dtype=dtype, family=family)
    if lora_r:
        add_lora(trained, r=lora_r, seed=config.seed)
    judging = {}
    if judged and "validation" in judged.splits:
        judging = {"eval_rows": judged.rows("validation", 48), "metric": judged.metric}
        judging["watch"] = judged.watch
    with _resumable():
        print(train_sft(trained, rows, config, **judging) / "model")


@app.command()
def train(
    settings: Settings = None,
    algorithm: Annotated[str, typer.Option(help="grpo or ppo.")] = "grpo",
    policy: PolicyName = "tiny-mdm",
    task: TaskName = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with a prompt in each line.")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:NAME", help="A reward instead of the task's; repeatable."),
    ] = None,
    draw: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="What completes prompts (grpo).")
    ] = None,
    lora_r: Rank = 0,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Train with GRPO or PPO; on several processes by `torchrun --nproc-per-node N -m mdmrl train
    ...` or `accelerate launch -m mdmrl train ...`."""
    import mdmrl
    from mdmrl import Task, add_lora, load_policy, load_rows, load_task
    from mdmrl.config import load_object, require, unknown

    algorithms = {
        "grpo": (mdmrl.GRPOConfig, mdmrl.train_grpo),
        "ppo": (mdmrl.PPOConfig, mdmrl.train_ppo),
    }
    if algorithm not in algorithms:
        raise unknown("algorithm", algorithm, algorithms)
    chosen, run = algorithms[algorithm]
    config = chosen.from_dict(_settings(settings))
    if data and not task:
        judged = Task(name=data.stem, splits={"rl": load_rows(data)})
    else:
        judged = load_task(task or "medcot", data=data)
    rewards = [load_object(name) for name in reward or []] or list(judged.rewards)
    require(len(rewards) > 0, "no reward: give --reward FILE.py:NAME, or a --task that has some")
    trained = load_policy(policy, device=device, dtype=dtype, family=family)
    if lora_r:
        add_lora(trained, r=lora_r, seed=config.seed)
    held_out = judged.rows("validation", 48) if "validation" in judged.splits else ()
    options = {"metric": judged.metric, "watch": judged.watch}
    options |= {"draw": load_object(draw)} if draw else {}
    require(algorithm == "grpo" or not draw, "--draw is for grpo: ppo has a sampler of its own")
    with _resumable():
        print(run(trained, rewards, judged.rows("rl"), config, held_out, **options))


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="samplers, update, estimators or import.")],
    policy: Annotated[
        str, typer.Option(help="A name, a folder, or for samplers random-KIND:SHAPE.")
    ] = "tiny-mdm",
    lengths: Annotated[list[int] | None, typer.Option(help="New tokens; repeatable.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Denoising steps; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts a batch; repeatable.")] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Of samplers with blocks, 32 unless given.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Medians over so many.")] = 3,
    sampler: Annotated[
        list[str] | None, typer.Option(help="Only this one, as the table names it; repeatable.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
) -> None:
    """Time samplers, one GRPO update, its scoring by estimator, or the import of the package; run
    it on an idle machine."""
    from json import dumps

    from mdmrl.bench.samplers import bench_samplers, print_bench
    from mdmrl.bench.updates import bench_estimators, bench_import, bench_update
    from mdmrl.config import unknown

    benches = {
        "samplers": lambda: bench_samplers(
            policy,
            lengths or [128],
            steps or [],
            batch or [1, 16],
            block_length,
            prompt_length,
            repeats,
            sampler or [],
            device,
            dtype,
        ),
        "update": lambda: bench_update(policy, device=device, dtype=dtype),
        "estimators": lambda: bench_estimators(repeats, device=device),
        "import": bench_import,
    }
    if what not in benches:
        raise unknown("bench", what, benches)
    numbers = benches[what]()
    if json is not None:  # first, since printing ends where a pipe was closed
        json.write_text(dumps(numbers, indent=1) + "\n")
    if what == "samplers":
        print_bench(numbers)
    else:
        print(dumps(numbers, indent=1))


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, any other error keeps its
    traceback."""
    from mdmrl.config import InputError

    try:
        app()
    except InputError as error:
        print(f"mdmrl: {error}", file=sys.stderr)
        raise SystemExit(2) from None
