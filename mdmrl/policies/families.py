"""The families of language models: what differs between them, and nothing else.

A `Policy` wraps a transformers causal-LM class and its tokenizer. A family says which position sees
which, which hidden state predicts which position, and names its sampler, its loss and its default
estimator. One of your own is a subclass:

    class Mine(MaskedDiffusionPolicy):
        sampler = my_sampler    # my_sampler(policy, prompts, config, generator, record)

    policy = load_policy(folder, family=Mine)
"""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.identity import digest
from mdmrl.policies.network import Network, no_progress_bars
from mdmrl.policies.patterns import blocks_of, packed, positions_of
from mdmrl.policies.reference import Reference
from mdmrl.policies.text import Text

LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


class Policy(Text, Network, Reference):
    """A language model with one interface for every family.

    A family's `sampler`, `loss` and `logp_estimator` are functions, or strings "module:function"
    (an estimator of ours by its name).

    Attributes:
        kind: a label: `"ar"` (autoregressive), `"mdm"` (masked diffusion), `"bd"` (block
            diffusion).
        sampler: completes prompts: f(policy, prompts, config, generator, record) -> SamplerOutput.
        loss: of a supervised batch: f(policy, batch, learn_prompt, generator) -> nats summed over
            the positions learnt, and their number.
        logp_estimator, remasking: estimator and commit rule of RL where none is asked for.
        denoises: whether completions are denoised in steps.
        mask_token_id: stands for what is not known yet, None where nothing does.
        logit_shift: True where position i is predicted by the hidden state of position i-1.
        block_length: of the blocks a block diffusion policy was trained with, else None.
        model: a transformers causal-LM, possibly wrapped by peft.
        positions_computed: by the network so far, those of the reference too.
        progress: the share of its supervised training that is behind it, for a family that goes by
            it.
    """

    kind: str
    sampler: str | Callable
    loss: str | Callable
    logp_estimator: str | Callable
    remasking: str | Callable | None = None
    denoises: bool = False
    mask_token_id: int | None = None
    logit_shift: bool = False
    block_length: int | None = None
    progress: float = 1.0

    def __init_subclass__(cls) -> None:
        """Functions that a family names are no methods: each has the policy as its argument."""
        super().__init_subclass__()
        for name in ("sampler", "loss", "logp_estimator", "remasking"):
            if inspect.isfunction(cls.__dict__.get(name)):
                setattr(cls, name, staticmethod(cls.__dict__[name]))

    def __init__(self, model, tokenizer):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self.positions_computed, rows = 0, len(model.get_input_embeddings().weight)
        require(
            len(tokenizer) <= rows,
            f"the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows: "
            "they do not belong to the same checkpoint",
        )
        require(
            tokenizer.eos_token_id is not None,
            "the tokenizer has no end-of-sequence token: completions could never end",
        )
        require(
            getattr(model.config, "max_position_embeddings", None) is not None,
            f"a {model.config.model_type} does not say how long its context is: expected a decoder "
            "with max_position_embeddings in its config",
        )
        require(
            model.base_model is not model,
            f"a {model.config.model_type} has no layers apart from its head, which are asked for "
            "alone: expected another decoder",
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def weights_fingerprint(self) -> str:
        """Ten hexadecimal digits of the kind, every weight and which of them are trained."""
        found = hashlib.sha256(self.kind.encode())
        for name, weight in self.model.named_parameters():
            found.update(f"{name} {weight.requires_grad} {weight.dtype}".encode())
            found.update(weight.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()[:10]

    def fingerprint(self) -> dict:
        """All of the policy that decides a result, in values that JSON can hold."""
        words, lora = self.tokenizer, None
        tokens = [sorted(words.get_vocab().items()), sorted(words.all_special_tokens)]
        if self.uses_lora:
            config = self.model.peft_config["default"]
            lora = {name: getattr(config, name, None) for name in LORA_SETTINGS}
            lora = {k: sorted(v) if isinstance(v, set | list) else v for k, v in lora.items()}
        settings = ("pad_token_id", "mask_token_id", "logit_shift", "block_length")
        return {
            "family": type(self).__name__,
            "weights": self.weights_fingerprint(),
            "tokenizer": digest(repr(tokens)),
            "chat_template": digest(repr(words.chat_template)),
            "end_token_ids": list(self.end_token_ids),
            **{name: getattr(self, name) for name in settings},
            "lora": lora,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and tokenizer the Hugging Face way, for `load_policy`.

        Of a model with an adapter only that is written, and the name of its base. A base that no
        name stands for, such as one that was trained after it was loaded, goes to `base/` inside.
        """
        options, base = {}, Path(folder) / "base"
        if self.uses_lora:
            options = {"save_embedding_layers": False, "selected_adapters": ["default"]}
        with no_progress_bars():
            self.model.save_pretrained(folder, **options)
            self.tokenizer.save_pretrained(folder)
            if self.uses_lora and not self.model.peft_config["default"].base_model_name_or_path:
                weights = {  # without what peft put between
                    name.replace(".base_layer.", "."): weight
                    for name, weight in self._transformer.state_dict().items()
                    if "lora_" not in name
                }
                self._transformer.save_pretrained(base, state_dict=weights)
                self.tokenizer.save_pretrained(base)


class AutoregressivePolicy(Policy):
    """Left to right: causal attention, position i predicted from i-1, exact KV cache."""

    kind = "ar"
    sampler = "mdmrl.sampling.autoregressive:sample"
    loss = "mdmrl.training.supervised:next_token_loss"
    logp_estimator = "exact"
    logit_shift = True


class MaskedDiffusionPolicy(Policy):
    """Every position sees every other; [MASK] marks what is still to be revealed.

    Args:
        mask_token_id: that of `model.config` unless given, else the tokenizer's. InputError for
            none, one that is not a token of its own, or one that the tokenizer disagrees on.
        logit_shift: see `Policy`; that of `model.config` unless given, else False. True for models
            grown from autoregressive ones, like Dream.

    Both are kept in `model.config`, so that a saved policy is loaded as it was.
    """

    kind = "mdm"
    sampler = "mdmrl.sampling.denoise:sample"
    loss = "mdmrl.training.supervised:masked_loss"
    logp_estimator = "trajectory"
    remasking = "state_confidence"
    denoises = True

    def __init__(
        self, model, tokenizer, mask_token_id: int | None = None, logit_shift: bool | None = None
    ):
        super().__init__(model, tokenizer)
        config, named = model.config, tokenizer.mask_token_id
        mask = getattr(config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        mask = named if mask is None else mask
        require(
            mask is not None,
            "a masked diffusion policy needs a mask token, and neither config.mask_token_id nor "
            "the tokenizer has one: set tokenizer.mask_token before saving the checkpoint",
        )
        require(
            named in (None, mask),
            f"mask token id {mask} in the config, but {named} in the tokenizer: they must agree",
        )
        rows = model.get_input_embeddings().weight.shape[0]
        fit = isinstance(mask, int) and 0 <= mask < rows
        require(fit, f"mask token id {mask!r} lies outside the embedding of {rows} rows")
        taken = {*self.end_token_ids, self.pad_token_id}
        require(
            mask not in taken,
            f"mask token id {mask} equals one of the end and padding tokens {sorted(taken)}: "
            "they must differ",
        )
        if named is None:
            token = tokenizer.convert_ids_to_tokens(mask)
            require(
                token is not None,
                f"mask token id {mask} is none of the tokenizer's {len(tokenizer)} tokens: "
                "set tokenizer.mask_token before saving the checkpoint",
            )
            added = tokenizer.added_tokens_decoder
            require(
                mask in added,
                f"mask token id {mask} is {token!r}, a piece of ordinary text: expected one of the "
                f"tokens added for a purpose, {sorted(added)}",
            )
            tokenizer.add_special_tokens({"mask_token": token})
        if logit_shift is None:
            logit_shift = getattr(config, "logit_shift", False)
        said = f"logit_shift={logit_shift!r:.80} in config.json: expected true or false"
        require(isinstance(logit_shift, bool), said)
        config.is_causal = False
        self.mask_token_id = config.mask_token_id = mask
        self.logit_shift = config.logit_shift = logit_shift


def require_both_sides(policy: MaskedDiffusionPolicy) -> None:
    """Refuse a network that looks back alone, whatever `is_causal` says: some have a mask of their
    own."""
    first, other = policy.end_token_ids[0], policy.mask_token_id
    ids = torch.tensor([[first, first], [first, other]], device=policy.device)
    with torch.no_grad():
        one, two = policy.hidden_states(ids)[:, 0]
    policy.positions_computed -= ids.numel()
    require(
        not torch.equal(one, two),
        f"a {policy.model.config.model_type} looks back alone, and cannot denoise: expected a "
        "decoder that sees both sides where its config has is_causal=False",
    )


class BlockDiffusionPolicy(MaskedDiffusionPolicy):
    """Masked diffusion within a block, left to right over blocks (Arriola et al. 2025, BD3-LM).

    A position sees its own block, all earlier ones and the prompt, which is a block of its own, so
    the keys and values of finished blocks never change. `model.config.block_length` holds the
    length it was trained with.
    """

    kind = "bd"
    loss = "mdmrl.training.supervised:block_loss"

    def __init__(self, model, tokenizer, mask_token_id: int | None = None):
        super().__init__(model, tokenizer, mask_token_id)
        require(
            not self.logit_shift,
            "logit_shift=True: the first position of a block would be predicted from the block "
            "before, which does not see it; expected a checkpoint that predicts in place",
        )
        length = getattr(model.config, "block_length", None)
        require(
            isinstance(length, int) and length >= 1,
            f"config.block_length={length!r:.80}: a block diffusion policy needs the length of its "
            "blocks, 1 or more",
        )

    @property
    def block_length(self) -> int:
        return self.model.config.block_length

    def pattern(self, width: int, length: int) -> Tensor:
        return blocks_of(width, length, self.block_length, self.device)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pattern: Tensor | None = None
    ) -> Tensor:
        """Hidden states in canvas positions, (B, L, H).

        Args:
            pattern: from `pattern`; every position sees what has no later block than its own.
        """
        require(
            pattern is not None,
            "a block diffusion policy must know where its blocks begin: give "
            "pattern=policy.pattern(prompt_width, completion_length)",
        )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sees = packed(pattern) & real.bool()[:, None, None]
        return self.hidden_states(input_ids, sees, position_ids=positions_of(real))


FAMILIES = {
    family.kind: family
    for family in (AutoregressivePolicy, MaskedDiffusionPolicy, BlockDiffusionPolicy)
}
