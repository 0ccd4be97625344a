"""Samplers: `generate` draws completions from any policy."""

from mdmrl.sampling.config import SamplerConfig, SamplerOutput, Step
from mdmrl.sampling.generate import generate

__all__ = ["SamplerConfig", "SamplerOutput", "Step", "generate"]
