"""What a sampler is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from mdmrl.config import Config, require, unknown
from mdmrl.sampling.rules import RULES, Rule, rule_of
from mdmrl.sampling.schedule import STEP_SIZES

CACHES = ("prefix", "dual")
FOR_EVERY_FAMILY = ("max_new_tokens", "temperature", "top_k", "top_p")


LARGEST = 1e30  # beyond it, and below its inverse, float32 soon has no numbers


def require_config(config) -> None:
    """Refuse what is no `SamplerConfig`. Samplers ask, since `generate`, source and all, is part of
    the identity of recorded runs."""
    fit = isinstance(config, SamplerConfig)
    require(fit, f"config={config!r:.80}: expected a SamplerConfig(...)")


def require_at_least(config: Config, **lowest: float) -> None:
    """Refuse settings that are given and below their lowest value, or that float32 cannot bear."""
    for name, least in lowest.items():
        value = getattr(config, name)
        holds = value is None or least <= value <= LARGEST
        require(holds, f"{name}={value}: expected at least {least}, and at most {LARGEST:.0e}")
        require(not value or value >= 1 / LARGEST, f"{name}={value}: expected 0 or 1e-30 and more")


@dataclass
class SamplerConfig(Config):
    """How completions are drawn, for every family.

    Attributes:
        max_new_tokens: completion positions, L.
        steps: denoising steps, shared out evenly over all blocks; None means half of
            `max_new_tokens`, as in d1, or as the text needs with `threshold` or `entropy_bound`.
        block_length: reveal blocks of so many positions, left to right (semi-autoregressive, as
            LLaDA); None means the whole completion, and its own blocks for block diffusion.
        step_sizes: how many positions of a block each step reveals: `"equal"` shares them out
            evenly, the remainder to the first steps; `"ascending"` reveals 1, 2, 4, ... and at the
            last step the rest, in as many steps as doubling needs where `steps` is None; or the
            sizes themselves, a list that adds up to the block.
        remasking: which open positions a step reveals first (`mdmrl.sampling.rules`). By the drawn
            token, as LLaDA: `"low_confidence"`. From the state alone: `"state_confidence"`,
            `"margin"` (Dream's topk_margin), `"entropy"`, `"sequential"`, `"random"`.
        order_temperature: above 0, `"state_confidence"` draws the positions of a step one after the
            other, each in proportion to its confidence to the power of 1/order_temperature (the law
            of Plackett and Luce, by Gumbel noise: Kool et al. 2019); 0 takes the surest.
        threshold: reveal every position whose confidence reaches this probability, and always the
            surest (parallel decoding, Wu et al. 2025, Fast-dLLM); needs one of the two confidences.
        entropy_bound: reveal the longest run of best-ranked positions whose entropies sum to at
            most this many nats, the largest of them left out (Ben-Hamu et al. 2025, EB-Sampler).
        revise: at each step after a block's first, mask so many of its least probable revealed
            tokens again and reveal as many more (in the manner of Wang et al. 2025, ReMDM-conf).
        end_last: reveal positions whose most probable token ends the text only once no other is
            left in the block, as LLaDA does for its instruct models: else a canvas filled up with
            end tokens is revealed from its far end, where they are surest, and texts come out
            short. The drawn token does not decide: at temperature 1 the redrawing of postponed
            positions would select against end tokens.
        stop_at_end: a row is done once its first end token and all before it are revealed, and
            padded behind; with `revise`, or guided by a value function, once the block of its end
            token is. No text changes.
        temperature: 0 takes the most probable token. top_k, top_p: above it, draw from the k most
            probable tokens, then from the smallest set that holds the tempered probability p.
        cfg_scale: raise what the prompt adds (classifier-free, as LLaDA): logits
            u + (1 + cfg_scale) (c - u) with u from a masked prompt; doubles the work.
        cache: keys and values that a bidirectional policy keeps between the steps of a block,
            approximately (Wu et al. 2025): `"prefix"` those before the block, `"dual"` those after
            it too. Other policies always keep theirs, exactly.
        cache_refresh: run the whole canvas again every so many steps; None: at a block's start.
        suppress_mask: never draw [MASK]; else a drawn one stays in the text, as it can with Dream.
    """

    max_new_tokens: int = 128
    steps: int | None = None
    block_length: int | None = None
    step_sizes: str | list[int] = "equal"
    remasking: str | Callable = "low_confidence"
    order_temperature: float = 0.0
    threshold: float | None = None
    entropy_bound: float | None = None
    revise: int = 0
    end_last: bool = True
    stop_at_end: bool = True
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    cfg_scale: float = 0.0
    cache: str | None = None
    cache_refresh: int | None = None
    suppress_mask: bool = True

    def validate(self) -> None:
        length, steps, block = self.max_new_tokens, self.steps, self.block_length
        require_at_least(self, max_new_tokens=1, top_k=1, cache_refresh=1, temperature=0)
        require_at_least(self, cfg_scale=0, revise=0, order_temperature=0, entropy_bound=0)
        for name in ("top_p", "threshold"):
            value = getattr(self, name)
            fit = value is None or 1 / LARGEST <= value <= 1
            require(fit, f"{name}={value}: expected (0, 1], and at least 1e-30")
        require(
            block is None or (block >= 1 and length % block == 0),
            f"block_length={block}: expected a divisor of max_new_tokens={length}",
        )
        require(
            steps is None or 1 <= steps <= length,
            f"steps={steps}: expected 1 to max_new_tokens={length}, since a step reveals at "
            "least one token",
        )
        blocks = length // (block or length)
        require(
            steps is None or steps >= blocks,
            f"steps={steps}: expected at least {blocks}, one for each block of {block}",
        )
        require(
            self.temperature > 0 or (self.top_k is None and self.top_p == 1),
            f"top_k={self.top_k}, top_p={self.top_p} would be ignored: at temperature=0 the most "
            "probable token is taken; leave them out, or raise the temperature",
        )
        if self.cache not in (None, *CACHES):
            raise unknown("cache", self.cache, CACHES)
        require(
            self.cache_refresh is None or self.cache is not None,
            f"cache_refresh={self.cache_refresh} with cache=None: expected a cache to refresh",
        )
        self._validate_step_sizes()
        self._validate_order()

    def _validate_step_sizes(self) -> None:
        sizes, block = self.step_sizes, self.block_length or self.max_new_tokens
        blocks, given = self.max_new_tokens // block, f"step_sizes={self.step_sizes}"
        if isinstance(sizes, list):
            require(
                sum(sizes) == block and min(sizes) >= 1,
                f"{given}: expected sizes of at least 1 that add up to the block of {block} "
                "(max_new_tokens, or block_length where it is given)",
            )
            require(
                self.steps in (None, len(sizes) * blocks),
                f"{given} with steps={self.steps}: the sizes make {len(sizes) * blocks} steps; "
                "leave steps out",
            )
        elif sizes not in STEP_SIZES:
            raise unknown("step_sizes", sizes, STEP_SIZES)
        elif sizes == "ascending" and self.steps is not None:
            most = block.bit_length() * blocks
            require(
                self.steps <= most,
                f"{given} with steps={self.steps}: 1, 2, 4, ... reach the block of {block} in at "
                f"most {most} steps in all; lower steps, or leave it out",
            )
        require(
            sizes == "equal" or not self.parallel,
            f"{given} with threshold={self.threshold}, entropy_bound={self.entropy_bound}: the "
            "text decides how many positions a step reveals, so leave step_sizes out",
        )

    def _validate_order(self) -> None:
        threshold, rule, ordered = self.threshold, self.rule, self.order_temperature
        drawn = rule.before_drawing and rule.log_probability
        require(
            not ordered or (drawn and not (self.parallel or self.end_last)),
            f"order_temperature={ordered} with remasking={rule.name}: expected remasking="
            "'state_confidence', end_last=False and no threshold or entropy_bound beside it",
        )
        given = f"threshold={threshold}, entropy_bound={self.entropy_bound}"
        require(None in (threshold, self.entropy_bound), f"{given}: expected only one of them")
        require(
            not self.parallel or (self.steps is None and not self.revise),
            f"{given} with steps={self.steps}, revise={self.revise}: the text decides how many "
            "positions a step reveals, so leave the other two out",
        )
        require(
            threshold is None or rule.log_probability,
            f"threshold={threshold} with remasking={rule.name}: a threshold is a probability; "
            f"expected {' or '.join(name for name in RULES if RULES[name].log_probability)}, or a "
            "Rule(..., log_probability=True)",
        )

    def to_dict(self) -> dict:
        """Every setting, the commit rule by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"remasking": self.rule.name}

    def described(self, but: Sequence[str] = ()) -> str:
        """The settings that are not at their defaults, as in "block_length=32 cache=dual"."""
        return " ".join(f"{name}={v}" for name, v in self.changed().items() if name not in but)

    @property
    def rule(self) -> Rule:
        return rule_of(self.remasking)

    @property
    def parallel(self) -> bool:
        """True where the text, not a quota, decides how many positions a step reveals."""
        return self.threshold is not None or self.entropy_bound is not None

    @property
    def untempered(self) -> bool:
        """True where tokens are drawn from the policy's own distribution, or are its best."""
        return self.temperature in (0, 1) and self.top_k is None and self.top_p == 1

    @property
    def denoising_steps(self) -> int:
        """Steps over all blocks; only an upper bound where `parallel`."""
        length, block = self.max_new_tokens, self.block_length or self.max_new_tokens
        if self.parallel:
            return length
        if self.step_sizes == "equal":
            return self.steps or max(-(-length // 2), length // block)
        if self.step_sizes == "ascending":
            return self.steps or block.bit_length() * (length // block)
        return len(self.step_sizes) * (length // block)

    def in_blocks_of(self, own: int | None) -> SamplerConfig:
        """The same for a policy with blocks of its `own`, or None."""
        if own is None:
            return self
        require(
            self.block_length in (None, own),
            f"block_length={self.block_length}: this policy was trained with blocks of {own}",
        )
        require(
            self.cache is None,
            f"cache={self.cache!r}: a block-causal policy keeps an exact cache of its own; leave "
            "it out",
        )
        return self.replace(block_length=own)

    def refuse_denoising_options(self) -> None:
        """Raise for an option that left-to-right sampling would ignore."""
        for name, value in self.changed().items():
            require(
                name in FOR_EVERY_FAMILY,
                f"{name}={value}: an autoregressive policy reveals one token after the other, up "
                "to the end of its text, and keeps an exact cache of its own; leave it out",
            )
