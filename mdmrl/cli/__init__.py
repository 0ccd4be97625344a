"""The `mdmrl` command. Each command imports what it needs when it runs, so that help is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

import mdmrl
from mdmrl.cli import checkpoints
from mdmrl.cli.options import (
    Counts,
    Device,
    Draw,
    Dtype,
    Family,
    File,
    Files,
    Name,
    Pair,
    PolicyName,
    Rank,
    Rewards,
    Sampler,
    Settings,
    TaskName,
    Words,
    at_length_of,
    held_out,
    read_pairs,
    read_settings,
    read_yaml,
    require_one_kind,
    require_used,
    resumable,
)
from mdmrl.config import InputError, load_object, require, unknown

app = typer.Typer(
    help="Reinforcement learning of masked diffusion language models: a study anyone can rerun.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for made in (checkpoints.sft, checkpoints.adapt, checkpoints.export):
    app.command()(made)


@app.command()
def reproduce(
    more: Annotated[Words, Argument(metavar="NN", help="The same as --only NN.")] = None,
    profile: Annotated[str, Option(help="A file of notebooks/profiles.")] = "cpu",
    only: Annotated[Words, Option(help="Only those whose names begin so: --only 03 04.")] = None,
    force: Annotated[bool, Option("--force", help="Run unchanged ones again.")] = False,
    sweep: Annotated[Name, Option(metavar="NAME=A,B,C", help="A run for each value.")] = None,
    jobs: Annotated[int, Option("--jobs", "-j", help="Notebooks at a time, sharing cores.")] = 1,
) -> None:
    """Run the notebooks headlessly; write figures, tables and claims."""
    print(f"profile {profile}: loading", flush=True)  # which takes a while at first
    from mdmrl.study import reproduce as study

    chosen = [*(only or []), *(more or [])]
    if sweep is None:
        raise typer.Exit(study.reproduce(profile, chosen, force, jobs))
    name, equals, values = sweep.partition("=")
    require(bool(equals), f"--sweep {sweep}: expected NAME=A,B,C, as in beta=0,0.05,1")
    listed = values if values.startswith("[") else f"[{values}]"
    values = read_yaml(listed, f"--sweep {sweep}")
    raise typer.Exit(study.sweep(profile, chosen, name, values, force, jobs))


@app.command()
def html(profile: Annotated[str, Option(help="A file of notebooks/profiles.")] = "cpu") -> None:
    """Write the notebooks that were reproduced as pages, figures and static twins in them."""
    from mdmrl.study.notebooks import write_html

    print(*write_html(profile), sep="\n")


@app.command()
def doctor() -> None:
    """Say what this machine has of what the study needs, and which profiles it runs for how long;
    exit code 1 where something needed is missing."""
    from mdmrl.study.doctor import doctor

    raise typer.Exit(doctor())


@app.command()
def plan(
    profile: Annotated[str, Option(help="A file of notebooks/profiles.")] = "paper",
    gpus: Annotated[str, Option(metavar="NxGB", help="Cards, and memory of each.")] = "1x80",
) -> None:
    """Say what each policy of a profile takes of a card's memory, phase by phase, and whether it
    fits; needs neither weights nor a card."""
    from mdmrl.bench.planning import print_plan

    print_plan(profile, gpus)


@app.command()
def pretrain(
    name: Annotated[str, Argument(help="tokenizer, or a recipe: tiny-ar, tiny-mdm, ...")],
    output_dir: Annotated[File, Option(help="Default: runs/pretrain/NAME.")] = None,
    tokens: Annotated[float | None, Option(help="Another budget of document tokens.")] = None,
    seed: Annotated[int | None, Option(help="Instead of the recipe's.")] = None,
) -> None:
    """Train the tokenizer or a tiny model from scratch; goes on where it was stopped."""
    from mdmrl.zoo.pretrain import pretrain_by_name

    folder = output_dir or Path("runs") / "pretrain" / name
    print(f"{name}: saved in {pretrain_by_name(name, folder, tokens, seed)}")


# -- commands --------------------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    context: typer.Context,
    policy: Annotated[Name, Argument(help="A name, or a folder; none to score files.")] = None,
    task: TaskName = "medcot",
    data: Annotated[File, Option(help="Rows of your own instead of the task's.")] = None,
    n_shot: Annotated[int | None, Option(help="Solved examples before each prompt.")] = None,
    split: Annotated[str, Option(help="validation or test.")] = "test",
    limit: Annotated[int, Option(help="How many prompts.")] = 300,
    steps: Annotated[Counts, Option(help="Denoising steps; repeatable.")] = None,
    sampler: Sampler = None,
    seed: Annotated[Counts, Option(help="Of the sampler; repeatable.")] = None,
    samples: Annotated[int, Option(help="Completions a prompt, for pass@k.")] = 1,
    k: Annotated[Counts, Option("--k", help="Of pass@k (1 and all samples); repeatable.")] = None,
    reward: Rewards = None,
    draw: Draw = None,
    adapter: Annotated[File, Option(help="An adapter's folder, to put on the policy.")] = None,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: Annotated[int, Option(help="Completions drawn together.")] = 64,
    output_dir: Annotated[File, Option(help="Default: a folder of its own in runs/eval.")] = None,
    csv: Annotated[File, Option(help="Append the rows to this file.")] = None,
    json: Annotated[File, Option(help="Write the numbers to this file.")] = None,
    generations: Annotated[Files, Option(help="Score this file's; repeatable, no policy.")] = None,
    compare: Annotated[Pair, Option(metavar="A B", help="Files of examples, paired.")] = None,
) -> None:
    """Exact answers and rewards on held-out prompts, greedy unless asked, with intervals: of a
    policy, or of stored --generations; or --compare two evaluations of the same prompts."""
    from mdmrl.evaluation import command

    require_one_kind(context)
    if compare:
        return command.compare_evaluations(*compare, json)
    options = {} if n_shot is None else {"n_shot": n_shot}
    judged = mdmrl.load_task(task, data=data, **options)
    if generations:
        return command.evaluate_generations(judged, generations, output_dir, json)
    loaded = mdmrl.load_policy(policy, device=device, dtype=dtype, adapter=adapter, family=family)
    own = {"rewards": [load_object(name) for name in reward]} if reward else {}
    own |= {"draw": load_object(draw)} if draw else {}
    own |= {"output_dir": output_dir, "csv": csv, "json": json, "batch_size": batch_size}
    own |= {"steps": steps or [], "seeds": seed or [0], "samples": samples, "ks": k or []}
    with resumable():
        command.evaluate_policy(policy, loaded, judged, split, limit, read_pairs(sampler), **own)


@app.command()
def sample(
    policy: Annotated[str, Argument(help="A name, or a folder.")],
    prompt: Annotated[str, Argument(help="A user's message.")],
    sampler: Sampler = None,
    seed: Annotated[int, Option(help="Of the sampler.")] = 0,
    watch: Annotated[bool, Option("--watch", help="Play the steps.")] = False,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Complete one prompt; a terminal shows in colour which step wrote what."""
    from mdmrl.runs import generator_for
    from mdmrl.study.terminal import show

    loaded = mdmrl.load_policy(policy, device=device, dtype=dtype, family=family)
    generator = generator_for(seed, "sample", device=loaded.device)
    config = mdmrl.SamplerConfig.from_dict(read_pairs(sampler))
    show(mdmrl.generate(loaded, [prompt], config, generator, loaded.denoises), loaded, watch)


@app.command()
def train(
    settings: Settings = None,
    algorithm: Annotated[str, Option(help="grpo, ppo, dpo or rft.")] = "grpo",
    policy: PolicyName = "tiny-mdm",
    task: TaskName = None,
    data: Annotated[File, Option(help="JSONL with a prompt in each line.")] = None,
    reward: Rewards = None,
    draw: Draw = None,
    lora_r: Rank = 0,
    family: Family = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Learn from rewards (grpo, ppo, rft) or from pairs (dpo); on several processes by `torchrun
    --nproc-per-node N -m mdmrl train ...` or `accelerate launch -m mdmrl train ...`."""
    algorithms = {
        "grpo": (mdmrl.GRPOConfig, mdmrl.train_grpo),
        "ppo": (mdmrl.PPOConfig, mdmrl.train_ppo),
        "dpo": (mdmrl.DPOConfig, mdmrl.train_dpo),
        "rft": (mdmrl.RFTConfig, mdmrl.train_rft),
    }
    if algorithm not in algorithms:
        raise unknown("algorithm", algorithm, algorithms)
    made, run = algorithms[algorithm]
    given, pairs = read_settings(settings), algorithm == "dpo"
    require(algorithm == "grpo" or not draw, f"--draw is for grpo, not {algorithm}: leave it out")
    if pairs:
        require(not reward, "--reward is not for dpo, which learns from pairs: leave it out")
        wanted = "dpo learns from pairs: give --data FILE, JSONL with prompt, chosen and rejected"
        require(data is not None, wanted)
        rows = mdmrl.load_rows(data, ("prompt", "chosen", "rejected"))
        judged = mdmrl.load_task(task) if task else mdmrl.Task(name=data.stem, splits={})
    elif data and not task:
        judged = mdmrl.Task(name=data.stem, splits={"rl": mdmrl.load_rows(data)})
    else:
        judged = mdmrl.load_task(task or "medcot", data=data)
    config = made.from_dict(at_length_of(judged, given))
    if pairs:
        brought = [rows]
    else:
        rewards = [load_object(name) for name in reward or []] or list(judged.rewards)
        require(bool(rewards), "no reward: give --reward FILE.py:NAME, or a --task that has some")
        brought = [rewards, judged.rows("rl")]
    options = {"metric": judged.metric, "watch": judged.watch}
    options |= {"draw": load_object(draw)} if draw else {}
    trained = mdmrl.load_policy(policy, device=device, dtype=dtype, family=family)
    config = config.completed_as(judged, trained, given)
    if lora_r:
        mdmrl.add_lora(trained, r=lora_r, seed=config.seed)
    with resumable():
        print(run(trained, *brought, config, held_out(judged), **options))


@app.command()
def bench(
    context: typer.Context,
    what: Annotated[str, Argument(help="samplers, update, estimators, judge or import.")],
    policy: Annotated[str, Option(help="As elsewhere, or random-KIND:SHAPE.")] = "tiny-mdm",
    lengths: Annotated[Counts, Option(help="New tokens; repeatable.")] = None,
    steps: Annotated[Counts, Option(help="Denoising steps; repeatable.")] = None,
    batch: Annotated[Counts, Option(help="Prompts, or an update's texts, at once.")] = None,
    block_length: Annotated[int | None, Option(help="Of samplers with blocks, else 32.")] = None,
    prompt_length: Annotated[int, Option(help="Tokens of the longest prompt.")] = 128,
    repeats: Annotated[int, Option(help="Medians over so many.")] = 3,
    sampler: Annotated[Words, Option(help="Only that of this name; repeatable.")] = None,
    against: Annotated[str | None, Option(help="Set `update` beside this trainer, trl.")] = None,
    lora_r: Rank = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Annotated[File, Option(help="Write the numbers to this file.")] = None,
) -> None:
    """Time samplers, one GRPO update, its scoring by estimator, the judge of code, or the import of
    the package; run it on an idle machine."""
    from json import dumps

    from mdmrl.bench import judging, peers, samplers, updates
    from mdmrl.runs import write_atomically

    require_used(context, what, against)
    for name, several in (("lengths", lengths), ("batch", batch)):
        given = len(several or ())
        require(not against or given < 2, f"--against takes one of --{name}, got {given}")
    at_once = batch[0] if batch else peers.ROWS
    shape = (lengths or [128], steps or [], batch or [1, 16], block_length, prompt_length)
    how = (repeats, sampler or [], device, dtype)
    benches = {
        "samplers": lambda: samplers.bench_samplers(policy, *shape, *how),
        "update": lambda: (
            peers.bench_against(against, policy, shape[0][0], repeats, device, lora_r, at_once)
            if against
            else updates.bench_update(policy, repeats, device, dtype)
        ),
        "estimators": lambda: updates.bench_estimators(repeats, device=device),
        "judge": lambda: judging.bench_judge(repeats),
        "import": updates.bench_import,
    }
    if what not in benches:
        raise unknown("bench", what, benches)
    numbers = benches[what]()
    if json is not None:  # first, since printing ends where a pipe was closed
        write_atomically(json, dumps(numbers, indent=1) + "\n")
    if what == "samplers":
        samplers.print_bench(numbers)
    else:
        print(dumps(numbers, indent=1))


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, any other error keeps its
    traceback."""
    try:
        app()
    except InputError as error:
        print(f"mdmrl: {error}", file=sys.stderr)
        raise SystemExit(2) from None
