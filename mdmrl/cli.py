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
