"""Redraw the committed figures from `figures/data`, without a model, and write the pages that show
them:

    python -m mdmrl.study.figures                   all of them
    python -m mdmrl.study.figures block_rl kl_law   these
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from mdmrl.study import plots
from mdmrl.study.figures import FIGURES, drawing
from mdmrl.study.notebooks import load_profile, notebook_parameters
from mdmrl.study.outputs import figures_folder, project_root, save
from mdmrl.study.reproduce import write_docs


def redraw(folder: Path, name: str) -> bool:
    """Draw a figure again whose provenance lies in `folder`; whether it does. That stays as it is:
    the run that it tells of is the same."""
    of, origin = drawing(name), folder / f"{name}.json"
    if origin.exists():
        plots.use_style()
        known = json.loads(origin.read_text())
        facts = parameters(of.notebook, known["profile"]) | known
        save(of.draw(facts, *of.read(folder)), folder, name)
        plt.close("all")
    return origin.exists()


def parameters(notebook: str, profile: str) -> dict:
    """A notebook's parameters in a profile: facts of its figures."""
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    declared = {name: found.value for name, found in notebook_parameters(path).items()}
    return declared | load_profile(profile)[notebook]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mdmrl.study.figures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="of figures; all of them if none")
    matplotlib.use("agg")
    folder, names = figures_folder("full"), parser.parse_args(arguments).names or FIGURES
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(redraw, folder), names)
        done = [name for name, known in zip(names, drawn, strict=True) if known]
    write_docs(folder)
    print(f"{len(done)} figures drawn: {', '.join(done)}")


if __name__ == "__main__":
    main()
