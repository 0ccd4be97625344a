"""Samplers: `generate` draws completions from any policy, `infill` fills gaps."""

from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.generate import generate, infill
from mdmrl.sampling.output import SamplerOutput, Step
