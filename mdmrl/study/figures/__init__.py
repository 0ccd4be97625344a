"""Every figure of the study, drawn from its tables; `python -m mdmrl.study.figures` redraws those
that are committed, and writes the gallery."""

from mdmrl.study.figures import (
    benchmark,
    blocks,
    curves,
    diffusion,
    estimators,
    later,
    speed,
    stability,
    values,
)
from mdmrl.study.figures.registry import FIGURES, drawing
