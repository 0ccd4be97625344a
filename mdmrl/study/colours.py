"""The colour of each family, estimator and sampler, the same in every figure.

What appears in one figure can be told apart by anyone: colours differ in lightness too, where red
and green look alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def colour(name: str) -> str:
    """The colour of an arm by what it is: "AR", "MDM one_step, 16 steps", "bd blocks", "elbo"."""
    for phrase, found in TABLE.items():
        if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", name, re.IGNORECASE):
            return found
    return UNNAMED


def palette(names: Iterable[str]) -> dict[str, str]:
    """The colour of each name; variants of one thing share theirs and differ by `line_styles`."""
    return {name: colour(name) for name in names}


def line_styles(names: Iterable[str]) -> dict[str, str]:
    """The line of each name: solid for the first of a colour, then dashed, dotted, dash-dotted."""
    styles, seen = {}, {}
    for name in names:
        before = seen.setdefault(colour(name), [])
        styles[name] = LINES[len(before) % len(LINES)]
        before.append(name)
    return styles
