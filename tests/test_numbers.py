"""Measured numbers in README, docs and the notebooks' texts: each is what its file says.

An interval, `0.44 [0.35, 0.53]`, must be that of a claim or of an arm, written as it is, negated,
as an exponential or in percent. What is said in other words stands in `said_in`, made from the
files, or is a number of its own notebook: a claim without an interval, or of a figure's sentence.
Any other decimal, percentage, thousand or million must be a setting, listed below.
"""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from test_docs import PAGES, ROOT

from mdmrl.evaluation.stats import t_interval
from mdmrl.study import ledger
from mdmrl.study.figures import FIGURES
from mdmrl.tasks.code import combinations

DATA, ZOO = ROOT / "figures" / "data", ROOT / "mdmrl" / "zoo"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Levels of intervals, settings, definitions, versions, and what the thesis and other papers give.
SETTINGS = {
    "": {"95 %", "99.4 %", "0.05", "2.8"},
    "README": {"3.11", "135 million", "71 %", "29 %"},  # the last two: test_docs
    "bench": {"100 %"},
    "glossary": {"5 %", "1.44"},
    "licences": {"2.0"},
    "tasks": {"-0.3", "-0.6"},
    "training": {"0.1", "0.2", "0.95", "1.16", "1.5"},
    "00_tour": {"0.7"},
    "01_masked_diffusion": {"0.5", "0.3", "0.2", "100,000"},
    "02_rewards": {"0.1", "0.15", "-0.3", "-0.6"},
    "03_reward_curves": {"0.1"},
    "04_kl_instability": {"1.5"},
    "05_estimator_lab": {"1.5"},
    "06_benchmark_tables": {"8 M", "10.7 M"},
    "08_block_rl": {"5 %"},
    "10_hierarchy": {"5 %", "135 M"},
    "11_reward_ablation": set(),
    "12_code_completion": {"135 M"},
    "13_dafny": {"-0.3", "-0.6"},
    "14_pass_at_k": {"50 %"},
    "16_starting_point": {"42 %", "135 M"},
    "17_few_steps": {"0.2"},
}

NO_PROSE = [
    r"<!-- (\w+):start -->.*?<!-- \1:end -->",  # by `write_docs`
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|<details>.*?</details>",
    r"\]\([^)]*\)",
    r"^#+ [^\n]*$|^\| *\d\.\d[^|\n]*\|",  # headings, and sections of the thesis
    r"\b(?:[Ss]ections?|[Ff]igs?\.|Tables?|[Nn]otebooks?|[Rr]ows?|eq\.|[Aa]pp(?:endix|\.)|Qwen|TRL|"
    r"LLaDA|License)\s?[\dA-C][\d.-]*",
    r"\(\d(?:\.\d){1,2}[^)]*\)",
]
NUMBER = r"-?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"({NUMBER})( %)? \[({NUMBER})(?: %)?, ({NUMBER})(?: %)?\]")
MEASURED = re.compile(
    r"(?<![\w.^-])-?(?:\d+(?:\.\d+)? (?:%|million\b|M\b)|\d+\.\d+(?!\w|\.\d)|\d{1,3}(?:,\d{3})+)"
)
CHANGES = (lambda x: x, lambda x: -x, math.exp, lambda x: 100 * x, lambda x: -100 * x)


def page_text(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return text


def prose(text: str) -> str:
    for pattern in NO_PROSE:
        text = re.sub(pattern, " ", text, flags=re.S | re.M)
    return " ".join(text.split())


def arms() -> list[tuple[float, float, float]]:
    """Shares of the headroom that arms close."""
    tables = (pd.read_csv(DATA / f"{name}.csv") for name in ("kl_cured", "kl_grid"))
    groups = (group.closed for table in tables for _, group in table.groupby("arm"))
    return [tuple(t_interval(closed)) for closed in groups]


def claims() -> list[tuple[float, float, float]]:
    found = json.loads((ROOT / "figures" / "claims.json").read_text())
    ends = ([claim[end] for end in ("estimate", "low", "high")] for claim in found)
    return [tuple(three) for three in ends if None not in three]


KNOWN = claims() + arms()


def is_known(*interval: str) -> bool:
    """Whether estimate, low and high are those of a file, rounded as they are written."""
    written = [len(number.partition(".")[2]) for number in interval]
    for ends in KNOWN:
        for change in CHANGES if max(map(abs, ends)) < 20 else CHANGES[:2]:
            estimate, *bounds = map(change, ends)
            pairs = zip((estimate, *sorted(bounds)), written, strict=True)
            if all(f"{x:.{d}f}" == n for (x, d), n in zip(pairs, interval, strict=True)):
                return True
    return False


def exact(notebook: str, numbers: set[str]) -> set[str]:
    """Those of the numbers that are the notebook's own, in its claims or its figures' sentences."""
    ledger_of = {c.id: c for c in ledger.load(ROOT / "figures" / "claims.json")}
    own = [c.estimate for c in ledger_of.values() if c.notebook == notebook and c.low is None]
    of = [drawn for drawn in FIGURES.values() if drawn.notebook == notebook]
    there = (all((DATA / f"{table}.csv").exists() for table in drawn.tables) for drawn in of)
    pairs = zip(of, there, strict=True)
    said = " ".join(x.finding(ROOT / "figures", ledger_of) for x, drawn in pairs if drawn)
    digits = {number: len(number.partition(".")[2]) for number in numbers if number[-1].isdigit()}
    claimed = {n for n, d in digits.items() if any(f"{x:.{d}f}" == n for x in own if x is not None)}
    return claimed | {*MEASURED.findall(said)}


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.stem)
def test_every_measured_number_is_that_of_its_file(path):
    text = prose(page_text(path))
    for phrase in said_in(path.stem):
        assert phrase in text, f"{path.name} does not say {phrase!r}, which its file does"
        text = text.replace(phrase, " ")
    for found in INTERVAL.finditer(text):
        estimate, _, low, high = found.groups()
        assert is_known(estimate, low, high), f"{path.name}: {found[0]} is in no file"
    left = set(MEASURED.findall(INTERVAL.sub(" ", text)))
    left -= SETTINGS[""] | SETTINGS.get(path.stem, set()) | exact(path.stem, left)
    assert not left, f"{path.name}: expected a file's numbers, or settings that are listed: {left}"


def test_an_interval_that_is_in_no_file_is_noticed():
    estimate, low, high = KNOWN[-1]
    assert is_known(f"{estimate:.2f}", f"{low:.2f}", f"{high:.2f}")
    assert is_known(f"{-estimate:.3f}", f"{-high:.3f}", f"{-low:.3f}")
    assert not is_known(f"{estimate + 0.01:.2f}", f"{low:.2f}", f"{high:.2f}")
    assert MEASURED.findall("of 300 it has 61 %, 1.5 nats and 2,330,496, or 42 million (8.5)") == [
        *("61 %", "1.5", "2,330,496", "42 million", "8.5")
    ]


# ------------------------------------------------------------------ what is said in other words


def said_in(page: str) -> list[str]:
    return {"results": results, "tasks": tasks, "README": front}.get(page, list)()


def shares(column: str, arm: str) -> str:
    """What a component makes of the gain of an arm, in percent."""
    table = pd.read_csv(DATA / "kl_cured.csv")
    means = table[table.arm == arm].mean(numeric_only=True)
    return f"{100 * means[column] / means.gain:.0f} %"


def results() -> list[str]:
    grid = pd.read_csv(DATA / "kl_grid.csv")
    keys = ["form", "β", "steps"]
    closed = {
        name: grid[grid.main.str.contains(name)].groupby(keys).closed.apply(t_interval)
        for name in ("ar_style", "one_step")
    }
    gained = [key for key, interval in closed["ar_style"].items() if interval.low > 0]
    assert gained == [("k1", 1.0, 64)]  # "in one of ..."
    light = [x.estimate for (_, b, _), x in closed["one_step"].items() if b == 0.05]
    assert all(x.low <= 0 for (_, b, _), x in closed["one_step"].items() if b == 1)
    exact = pd.read_csv(DATA / "few_steps.csv").groupby(["model", "steps"]).accuracy.mean() * 100
    equal, games, capped, many = (
        exact[name, 64]
        for name in (
            *("few steps, equal updates", "few steps, equal cost"),
            *("few steps, equal cost, depth capped", "many steps"),
        )
    )
    costs = pd.read_csv(DATA / "few_steps_cost.csv").groupby("arm").mean(numeric_only=True)
    whole = costs.token_forwards + costs["token_forwards/scoring"]
    assert round(whole["many steps"] / whole["few steps, equal updates"]) == 7  # "a seventh"
    recipes = {name: json.loads((ZOO / name / "recipe.json").read_text()) for name in TWINS}
    (shape,) = {tuple(recipe[key] for key in SHAPE) for recipe in recipes.values()}
    read = {name: pd.read_csv(ZOO / name / "log.csv").tokens.iloc[-1] / 1e6 for name in TWINS}
    depth, base = "gain/depth", exact["base", 64]
    return [
        f"in one of {len(closed['ar_style'])} combinations",
        f"{min(light):.2f} to {max(light):.2f} of the headroom are closed",
        f"{games:.0f} % are exact at 64 steps, {base:.0f} % before RL",
        f"ceiling has them, {capped:.0f} % are",
        f"{shares(depth, 'recommended, 64 steps')} are paragraph breaks",
        f"its autoregressive twin's gain {shares(depth, 'AR, k2, β = 0.05')}",
        f"rise from {base:.0f} % to between {min(equal, capped, many):.0f} and "
        f"{max(equal, capped, many):.0f} %",
        "{:,} parameters ({} layers of width {}, 4,096 tokens)".format(*shape),
        f"has read {read['tiny-ar']:.1f} million tokens",
        f"has read {read['tiny-mdm']:.0f} million",
        f"trained for another {read['tiny-bd']:.1f} million",
    ]


TWINS = ("tiny-ar", "tiny-mdm", "tiny-bd")
SHAPE = ("parameters", "num_hidden_layers", "hidden_size")


def tasks() -> list[str]:
    return [f"has {len(combinations())} combinations"]


def front() -> list[str]:
    found = (json.loads(path.read_text()) for path in ZOO.glob("*/recipe.json"))
    sizes = {round(recipe["parameters"] / 1e6) for recipe in found if "parameters" in recipe}
    assert sizes == {1, 2}
    return ["tiny models of one to two million parameters"]


# ------------------------------------------------------------------ how long it takes

WORDS = {"half a": 0.5, "a": 1, "two": 2, "three": 3, "ten": 10}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_minutes_are_those_that_were_timed(path):
    """Within a factor of two, the machine being another."""
    timed = json.loads((ROOT / "notebooks" / "profiles" / "seconds.json").read_text())["cpu"]
    opening = "".join(json.loads(path.read_text())["cells"][0]["source"])
    minutes = sum(timed[path.stem]) / 60
    for sentence in re.split(r"(?<=[.?]) ", opening):
        if "`cpu`" in sentence and (said := re.search(r"about (half a|\w+) minutes?", sentence)):
            number = WORDS.get(said[1]) or float(said[1])
            assert number / 2 <= max(minutes, 0.5) <= number * 2, f"{sentence} It took {minutes}"
