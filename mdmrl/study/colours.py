"""The colour of each family, estimator and sampler, the same in every figure: the hue says what an
arm is, its shade in how many denoising steps, the dash which variant.

What appears in one figure can be told apart by anyone: colours differ in lightness too, where red
and green look alike.
"""

import re
from collections.abc import Iterable

from matplotlib.colors import to_hex, to_rgb

AR, MDM, BD = "#0173b2", "#de8f05", "#029e73"
SKY, INDIGO, WINE, SAND = "#88ccee", "#332288", "#661100", "#ddcc77"
RED, BLACK, GREY = "#d55e00", "#000000", "#949494"

# The first phrase found in a name, as whole words, decides.
# fmt: off
TABLE = {
    # families of which one word says enough
    "bd": BD, "block diffusion": BD,
    # estimators of log p of a masked diffusion model
    "ar_style": RED, "one_step": SKY, "trajectory": INDIGO, "elbo": "#ca9161",
    "complementary": "#ece133", "overlapping": WINE, "quadrature": "#44aa99", "coupled": "#aa4499",
    "upper_bound": "#3b3b3b", "ar_order": "#117733", "random_mask": GREY,
    "ar": AR, "smollm2": AR,
    # arms that score by `trajectory` or `one_step`, and do not say so
    "recommended": INDIGO, "exact": INDIGO, "state": SKY, "ppo": BLACK,
    "mdm": MDM,
    # samplers of a masked diffusion model; `whole` is the arm that scores whole texts by `one_step`
    "whole completion": MDM, "whole": SKY, "dual cache": WINE, "prefix cache": SKY,
    "threshold": SAND, "blocks": INDIGO,
    "flat": SAND, "unit after unit": SKY, "units at once": INDIGO,
    # what judges half-denoised text, and what follows from it
    "v": INDIGO, "two gates": INDIGO, "mean log-probability": SAND, "permuted": SKY, "bands": RED,
    "prompt alone": GREY, "majority vote": BLACK,
    # RL at few and at many steps
    "base": GREY, "equal updates": SKY, "depth capped": SAND, "equal cost": INDIGO,
    "many steps": BLACK,
    # ways to train, of one model; `ppo` is above
    "online rft": WINE, "rft": RED, "sft": SAND, "dpo": SKY, "grpo": INDIGO,
}
# fmt: on
UNNAMED = GREY  # a policy or arm of the reader's own
LINES = ("-", "--", ":", "-.")
# The parts of the medical reward: greys, and a warning for the one without a bound.
PARTS = {"accuracy": "#3b3b3b", "depth": "#b66dff", "format": "#bdbdbd"}
# How much black the fewest denoising steps get, white where below 0, and the most.
TONES, OF_PALE = (-0.35, 0.4), (0.0, 0.6)
STEPS = r",? \b(\d+) steps?\b"


def colour(name: str) -> str:
    """The hue of an arm by what it is: "AR", "MDM one_step, 16 steps", "bd blocks", "elbo"."""
    for phrase, found in TABLE.items():
        if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", name, re.IGNORECASE):
            return found
    return UNNAMED


def palette(names: Iterable[str]) -> dict[str, str]:
    """The colour of each name: its hue, lighter or darker where names of one hue have several
    numbers of denoising steps. Variants of one thing share theirs and differ by `line_styles`."""
    names = list(names)
    steps = {name: int(found[1]) for name in names if (found := re.search(STEPS, name))}
    shades = {}
    for name in names:
        counts = sorted({steps[other] for other in steps if colour(other) == colour(name)})
        tone = 0.0
        if name in steps and len(counts) > 1:
            place = counts.index(steps[name]) / (len(counts) - 1)
            fewest, most = OF_PALE if sum(to_rgb(colour(name))) > 1.8 else TONES
            tone = fewest + place * (most - fewest)
        shades[name] = tinted(colour(name), tone)
    return shades


def tinted(hue: str, tone: float) -> str:
    """A colour mixed with as much white as `tone` is below 0, or black as it is above."""
    return to_hex([x * (1 - abs(tone)) + max(-tone, 0.0) for x in to_rgb(hue)])


def line_styles(names: Iterable[str]) -> dict[str, str]:
    """The line of each name: solid for the first of a hue, whatever its steps; then dashed, dotted,
    dash-dotted."""
    styles, seen = {}, {}
    for name in names:
        variants = seen.setdefault(colour(name), [])
        variant = re.sub(STEPS, "", name)
        if variant not in variants:
            variants.append(variant)
        styles[name] = LINES[variants.index(variant) % len(LINES)]
    return styles
