"""The `mdmrl` command. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import sys
import traceback
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


Sampler = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="A field of SamplerConfig: block_length=32; repeatable."
    ),
]


def _sampler(pairs: list[str] | None):
    """The SamplerConfig of `KEY=VALUE` pairs."""
    from mdmrl import SamplerConfig
    from mdmrl.config import require

    for pair in pairs or []:
        require("=" in pair, f"--sampler {pair}: expected KEY=VALUE, as in block_length=32")
    return SamplerConfig.from_dict(dict(pair.split("=", 1) for pair in pairs or []))


@app.command("eval")
def evaluate(
    policy: Annotated[str, typer.Argument(help="A name, or a folder.")],
    task: Annotated[str, typer.Option(help="The task.")] = "medcot",
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    limit: Annotated[int, typer.Option(help="How many prompts.")] = 300,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Denoising steps, half the tokens unless given; repeatable."),
    ] = None,
    sampler: Sampler = None,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
) -> None:
    """Exact answers and rewards on held-out prompts, greedy unless asked, with intervals."""
    from mdmrl.evaluation.tables import append_rows, evaluation_table, print_table

    frame = evaluation_table(policy, task, split, limit, _sampler(sampler), steps or [None])
    print_table(frame)
    if csv is not None:
        append_rows(frame, csv)


@app.command()
def sample(
    policy: Annotated[str, typer.Argument(help="A name, or a folder.")],
    prompt: Annotated[str, typer.Argument(help="A user's message.")],
    sampler: Sampler = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
) -> None:
    """Complete one prompt."""
    from mdmrl import generate, load_policy
    from mdmrl.runs import generator_for

    output = generate(
        load_policy(policy), [prompt], _sampler(sampler), generator_for(seed, "sample")
    )
    print(output.completions[0])


@app.command()
def sft(
    config: Annotated[Path | None, typer.Argument(help="YAML: SFTConfig's fields.")] = None,
    policy: Annotated[str, typer.Option(help="A name, or a folder.")] = "tiny-mdm",
    data: Annotated[Path | None, typer.Option(help="JSONL with prompt and completion.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Judge by this task's validation rows; learn from it without --data."),
    ] = None,
    lora_r: Annotated[int, typer.Option(help="LoRA rank; 0 trains every weight.")] = 0,
) -> None:
    """Fine-tune on completions, of your own or of a task's pre-training split; takes
    `accelerate launch -m mdmrl sft ...` too."""
    import yaml

    from mdmrl import SFTConfig, add_lora, load_policy, load_rows, load_task, train_sft
    from mdmrl.config import require

    require(bool(data or task), "nothing to learn from: give --data FILE, --task NAME or both")
    settings = SFTConfig.from_dict((yaml.safe_load(config.read_text()) if config else None) or {})
    judged = load_task(task) if task else None
    rows = load_rows(data, ("prompt", "completion")) if data else judged.rows("pretrain")
    trained = load_policy(policy)
    if lora_r:
        add_lora(trained, r=lora_r, seed=settings.seed)
    held_out, metric = (judged.rows("validation", 48), judged.metric) if judged else ((), None)
    print(train_sft(trained, rows, settings, held_out, metric) / "model")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML: fields of GRPOConfig or PPOConfig.")],
    algorithm: Annotated[str, typer.Option(help="grpo or ppo.")] = "grpo",
    policy: Annotated[str, typer.Option(help="A name, or a folder.")] = "tiny-mdm",
    task: Annotated[str, typer.Option(help="The task.")] = "medcot",
    lora_r: Annotated[int, typer.Option(help="LoRA rank; 0 trains every weight.")] = 0,
) -> None:
    """Train with GRPO or PPO; `accelerate launch -m mdmrl train ...` on several processes."""
    import yaml

    import mdmrl
    from mdmrl import add_lora, load_policy, load_task
    from mdmrl.config import unknown

    algorithms = {
        "grpo": (mdmrl.GRPOConfig, mdmrl.train_grpo),
        "ppo": (mdmrl.PPOConfig, mdmrl.train_ppo),
    }
    if algorithm not in algorithms:
        raise unknown("algorithm", algorithm, algorithms)
    chosen, run = algorithms[algorithm]
    settings = chosen.from_dict(yaml.safe_load(config.read_text()) or {})
    judged = load_task(task)
    trained = load_policy(policy)
    if lora_r:
        add_lora(trained, r=lora_r, seed=settings.seed)
    held_out = judged.rows("validation", 48)
    print(run(trained, judged.rewards, judged.rows("rl"), settings, held_out, judged.metric))


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
        ),
        "update": lambda: bench_update(policy),
        "estimators": lambda: bench_estimators(repeats),
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
    """Run the command line; bad input is one line and exit code 2, a bug keeps its traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(raised_in).is_relative_to(Path(__file__).parent)
        if isinstance(error, ValueError) and not ours:
            raise
        print(f"mdmrl: {error}", file=sys.stderr)
        raise SystemExit(2) from None
