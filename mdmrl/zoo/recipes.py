"""Recipes of the shipped tiny models: what `mdmrl pretrain NAME` trains, beside the tokenizer.

Within a task all families have the same parameters, tokenizer and stream of documents. An
autoregressive model needs a fraction of the tokens; `tiny-mdm-equal` and `tiny-mdm-countdown-equal`
are the masked diffusion models at that budget, and do not ship. Nor does `tiny-mdm-adapted`, made
of `tiny-ar` by `mdmrl.policies.adapt`, at a tenth of tiny-mdm's. Those of reasoning and code begin
with the weights of their autoregressive twin, as Dream did with Qwen's: from scratch they learn too
slowly for two cores. The one of Dafny is autoregressive, and begins with the one of code. A start's
tokens come on top of those named.

Of Countdown there are six pairs, one a seed: the masked diffusion model, and an autoregressive twin
trained, decay included, just so long that its greedy accuracy on the test items is within three
points of its partner's at full steps, so that RL starts equal. `tiny-ar-countdown` is the first
pair's, trained for longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources

from mdmrl.config import Config, require, unknown
from mdmrl.policies import load_tokenizer
from mdmrl.policies.families import FAMILIES
from mdmrl.sampling.config import require_at_least
from mdmrl.zoo.tokenizer_training import train_tokenizer

VOCABULARY = 4096
BYTES = 256 + 5  # with the special tokens


def shipped_tokenizer():
    """The one that the tiny models of prose share."""
    return load_tokenizer(resources.files("mdmrl.zoo") / "tokenizer")


def byte_tokenizer():
    """A token a byte, and the special ones: for tasks without words."""
    return train_tokenizer((), BYTES)


COUNTS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
COUNTS += ("max_position_embeddings", "canvas", "block_length", "batch_size")
COUNTS += ("logging_steps", "save_steps")
ATTENTION = ("sdpa", "eager")
TOKENIZERS = {"words": shipped_tokenizer, "bytes": byte_tokenizer}


@dataclass
class PretrainConfig(Config):
    """Recipe of a tiny model. Field names are transformers' where it has one."""

    family: str = "mdm"
    task: str = "medcot"
    tokenizer: str = "words"  # of 4,096 pieces, or "bytes"
    start: str | None = None  # a policy of the same shape whose weights to begin with
    annealing: float | None = None  # of an autoregressive start that is `adapted`, shift and all
    tokens: float = 6e6  # document tokens to see
    hidden_size: int = 128
    num_hidden_layers: int = 6
    intermediate_size: int = 384
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    canvas: int = 128  # completion positions of the diffusion models, where the row names none
    block_length: int = 16  # of the block diffusion model
    batch_size: int = 48
    learning_rate: float = 3e-3
    muon_learning_rate: float = 2e-2
    warmup_share: float = 0.01
    decay_share: float = 0.3
    max_grad_norm: float = 1.0
    logging_steps: int = 50
    save_steps: int = 200
    bf16: bool = True  # mixed precision, where the processor has it
    attn_implementation: str = "sdpa"  # "eager" is faster in bf16 where sequences are short
    seed: int = 0

    def validate(self) -> None:
        if self.family not in FAMILIES:
            raise unknown("family", self.family, FAMILIES)
        if self.tokenizer not in TOKENIZERS:
            raise unknown("tokenizer", self.tokenizer, TOKENIZERS)
        require(
            self.annealing is None or (self.family == "mdm" and self.start is not None),
            f"annealing={self.annealing} with family={self.family!r}, start={self.start!r}: "
            "expected 'mdm' and an autoregressive start to adapt",
        )
        require_at_least(self, **dict.fromkeys(COUNTS, 1))
        for name in ("tokens", "learning_rate", "muon_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}={value}: expected a positive number")
        warmup, decay, heads = self.warmup_share, self.decay_share, self.num_attention_heads
        require(0 <= warmup < 1, f"warmup_share={warmup}: expected [0, 1)")
        require(0 < decay <= 1, f"decay_share={decay}: expected (0, 1]")
        require(
            self.hidden_size % (2 * heads) == 0,
            f"hidden_size={self.hidden_size}: expected a multiple of twice the "
            f"num_attention_heads={heads}",
        )
        if self.attn_implementation not in ATTENTION:
            raise unknown("attn_implementation", self.attn_implementation, ATTENTION)
        require(
            self.canvas % self.block_length == 0,
            f"block_length={self.block_length}: expected a divisor of canvas={self.canvas}",
        )


MEDCOT = PretrainConfig()
COUNTDOWN = PretrainConfig(
    task="countdown",
    tokenizer="bytes",
    tokens=16e6,
    canvas=12,
    block_length=4,
    max_position_embeddings=64,
    batch_size=128,
    attn_implementation="eager",
)
REASONING = PretrainConfig(
    task="reasoning",
    canvas=48,
    block_length=4,
    max_position_embeddings=256,
    batch_size=96,
    attn_implementation="eager",
)
CODE = PretrainConfig(task="code", canvas=64, max_position_embeddings=256, batch_size=96)
# Document tokens of each pair's autoregressive model.
MATCHED_TOKENS = (1.42e6, 1.42e6, 1.42e6, 2.9e6, 1e6, 5.4e5)

RECIPES = {
    "tiny-ar": MEDCOT.replace(family="ar", tokens=4e6, warmup_share=0.015),
    "tiny-mdm": MEDCOT.replace(tokens=42e6, warmup_share=6e4 / 42e6),
    "tiny-bd": MEDCOT.replace(family="bd", start="tiny-mdm", tokens=2.4e6, bf16=False),
    "tiny-mdm-equal": MEDCOT.replace(tokens=4e6, warmup_share=0.015),
    "tiny-mdm-adapted": MEDCOT.replace(
        start="tiny-ar", annealing=0.0, tokens=4.2e6, warmup_share=0.015
    ),
    "tiny-mdm-countdown-equal": COUNTDOWN.replace(tokens=8e6),
    "tiny-ar-countdown": COUNTDOWN.replace(family="ar", tokens=8e6),
    "tiny-ar-reasoning": REASONING.replace(family="ar", tokens=8e6),
    "tiny-mdm-reasoning": REASONING.replace(start="tiny-ar-reasoning", tokens=12e6),
    "tiny-bd-reasoning": REASONING.replace(
        family="bd",
        start="tiny-mdm-reasoning",
        tokens=1e6,
        bf16=False,
        attn_implementation="sdpa",
    ),
    "tiny-ar-code": CODE.replace(family="ar", tokens=1e6),
    "tiny-mdm-code": CODE.replace(start="tiny-ar-code", tokens=6e6),
    "tiny-bd-code": CODE.replace(family="bd", start="tiny-mdm-code", tokens=1e6, bf16=False),
    "tiny-ar-dafny": PretrainConfig(
        family="ar", task="dafny", start="tiny-ar-code", tokens=2e6, max_position_embeddings=320
    ),
}
for pair, matched in enumerate(MATCHED_TOKENS):
    suffix = f"-s{pair}" if pair else ""
    RECIPES[f"tiny-mdm-countdown{suffix}"] = COUNTDOWN.replace(seed=pair)
    twin = COUNTDOWN.replace(family="ar", tokens=matched, seed=pair)
    RECIPES[f"tiny-ar-countdown-matched{suffix}"] = twin
