"""What a language model is to this study.

A `Policy` wraps a transformers causal-LM class and its tokenizer and owns what differs between
families: the attention pattern, the mask token, and which hidden state predicts which position.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from mdmrl.config import require

Prompt = str | list[dict]


def as_messages(text: Prompt, role: str) -> list[dict]:
    """A string as the only message of `role`; a list of messages as it is."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def refuse_bare_string(texts: Sequence) -> None:
    """A string is a sequence too, of one prompt a character."""
    require(not isinstance(texts, str), f"{texts!r} is one string: expected a list of them")


@contextlib.contextmanager
def no_progress_bars():
    """Load or save without transformers' progress bars: they end up in logs and notebooks."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass
class Prompts:
    """Encoded prompts, left-padded: `input_ids` and `attention_mask` are (B, P)."""

    input_ids: Tensor
    attention_mask: Tensor


class Policy:
    """A language model with one interface for every family.

    Attributes:
        kind: `"ar"` (autoregressive), `"mdm"` (masked diffusion) or `"bd"` (block diffusion).
        logit_shift: True where position i is predicted by the hidden state of position i-1.
        block_length: of the blocks a block diffusion policy was trained with, else None.
        denoises: whether completions are made in denoising steps.
        sampler: what `generate` calls, "module:function", of (policy, prompts, config, generator,
            record).
        model: a transformers causal-LM, possibly wrapped by peft.
        pushed: positions pushed through the network so far.
    """

    kind: str
    logit_shift: bool
    denoises: bool
    sampler: str
    block_length: int | None = None

    def __init__(self, model, tokenizer):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self._reference = None
        self.pushed = 0
        rows = model.get_input_embeddings().weight.shape[0]
        require(
            len(tokenizer) <= rows,
            f"the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows: "
            "they do not belong to the same checkpoint",
        )
        require(
            tokenizer.eos_token_id is not None,
            "the tokenizer has no end-of-sequence token: completions could never end",
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's, then those of generation_config."""
        given = self._transformer.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def context_length(self) -> int:
        return self.model.config.max_position_embeddings

    # -- text -----------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 0,
        begun: Sequence[str] | None = None,
    ) -> Prompts:
        """Encode strings (a user's message) or message lists with the chat template.

        A tokenizer without one belongs to a base model: there a string is plain text to continue,
        as in TRL's standard format, and a message list is an error, as in transformers. `begun` are
        texts that the completions begin with.

        Raises:
            ValueError: an empty batch, messages without a chat template, a prompt of no tokens or
                one that leaves no room for `max_new_tokens`.
        """
        refuse_bare_string(prompts)
        require(len(prompts) > 0, "no prompts given: expected at least one")
        begun = [""] * len(prompts) if begun is None else begun
        if self.tokenizer.chat_template is None:
            require(
                all(isinstance(p, str) for p in prompts),
                "the tokenizer has no chat template for lists of messages: set "
                "tokenizer.chat_template, or give strings, which are continued as plain text",
            )
            whole = [prompt + text for prompt, text in zip(prompts, begun, strict=True)]
            return self.encode_texts(whole, max_new_tokens, add_special_tokens=True)
        asked = self.render([as_messages(prompt, "user") for prompt in prompts], True)
        whole = [prompt + text for prompt, text in zip(asked, begun, strict=True)]
        return self.encode_texts(whole, max_new_tokens)

    def render(
        self, conversations: Sequence[list[dict]], add_generation_prompt: bool = False
    ) -> list[str]:
        """Lists of messages as the chat template writes them."""
        return self.tokenizer.apply_chat_template(
            conversations,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # Qwen3 answers at once; other templates have no such switch
        )

    def encode_texts(
        self, texts: Sequence[str], max_new_tokens: int = 0, add_special_tokens: bool = False
    ) -> Prompts:
        """Encode texts as they stand, without a chat template; raises as `encode`."""
        batch = self.tokenizer(
            list(texts), add_special_tokens=add_special_tokens, padding=True, return_tensors="pt"
        )
        require(
            bool(batch.attention_mask.any(1).all()),
            "a prompt encodes to no tokens: expected at least one",
        )
        longest = batch.input_ids.shape[1]
        require(
            longest + max_new_tokens <= self.context_length,
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{self.context_length}: shorten the prompt or lower max_new_tokens",
        )
        return Prompts(batch.input_ids.to(self.device), batch.attention_mask.to(self.device).bool())

    def decode(self, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
        """Texts up to the first end token, special tokens (leftover masks too) left out."""
        rows = [ids[mask] for ids, mask in zip(completion_ids, completion_mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def completion_mask(self, completion_ids: Tensor) -> Tensor:
        """True up to and including the first end token, (B, L) bool."""
        ends = torch.isin(completion_ids, torch.tensor(self.end_token_ids, device=self.device))
        return ends.cumsum(1) - ends.long() == 0

    # -- network --------------------------------------------------------------------------------

    @property
    def _transformer(self):
        """The transformers causal-LM inside any peft wrapper; LoRA layers sit inside it."""
        get_base = getattr(self.model, "get_base_model", None)
        return get_base() if get_base else self.model

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache=None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states as the network lays them out, (B, L, H); see `forward`.

        With a `cache`, `input_ids` are the new tokens and `attention_mask` covers all of them. A
        4-D mask, (B, 1, L, K) bool, says what each position sees; it needs `position_ids`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.ndim == 2:
            attention_mask = attention_mask.long()
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        self.pushed += input_ids.numel()
        return self._transformer.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def pattern(self, width: int, length: int) -> Tensor | None:
        """Which block each column of a canvas belongs to, where the family has blocks, else None.

        Args:
            width: columns of the prompt, P; length: of the completion, L.
        """
        return None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pattern: Tensor | None = None
    ) -> Tensor:
        """Hidden states in canvas positions, (B, L, H): `head(hidden[:, i])` predicts token i.

        `pattern`, from the method of that name, is for families with blocks.

        Where the family shifts (autoregressive ones), nothing predicts position 0 and its row
        repeats its own hidden state; no sampler or estimator reads it.
        """
        hidden = self.hidden_states(input_ids, attention_mask)
        return torch.cat([hidden[:, :1], hidden[:, :-1]], 1) if self.logit_shift else hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., H); give it only the rows needed."""
        return self._transformer.get_output_embeddings()(hidden.float())

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pattern: Tensor | None = None
    ) -> Tensor:
        """Float32 logits in canvas positions, (B, L, V)."""
        return self.head(self.forward(input_ids, attention_mask, pattern))

    # -- training -------------------------------------------------------------------------------

    def trainable_parameters(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def uses_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    def sync_reference(self) -> None:
        """Copy the policy into the reference.

        With LoRA the reference is the disabled adapter until the first call, then a frozen second
        adapter; without LoRA it is a frozen copy of the model.
        """
        if not self.uses_lora:
            self._reference = copy.deepcopy(self.model).requires_grad_(False)
            return
        if self._reference is None:
            with torch.random.fork_rng():
                self.model.add_adapter("reference", self.model.peft_config["default"])
            self.model.eval()
            self._reference = "reference"
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if ".default." in name:
                    weights[name.replace(".default.", ".reference.")].copy_(weight)
        self._activate("default")

    @contextlib.contextmanager
    def reference(self):
        """Inside this context the policy is its reference (no gradient)."""
        if not self.uses_lora:
            require(
                self._reference is not None, "no reference yet: call policy.sync_reference() first"
            )
        with torch.no_grad():
            if not self.uses_lora:
                policy, self.model = self.model, self._reference
                try:
                    yield
                finally:
                    self.model = policy
            elif self._reference is None:
                with self.model.disable_adapter():
                    yield
                self._activate("default")
            else:
                self._activate("reference")
                try:
                    yield
                finally:
                    self._activate("default")

    def _activate(self, adapter: str) -> None:
        """Switch adapters; peft turns the active one's gradients on, so set them right again."""
        self.model.base_model.set_adapter(adapter)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name and ".default." in name)

    def fingerprint(self) -> str:
        """Ten hexadecimal digits of the family, every weight and which of them are trained."""
        digest = hashlib.sha256(self.kind.encode())
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {weight.requires_grad} {weight.dtype}".encode())
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:10]

    def reference_state(self) -> dict[str, Tensor]:
        """Weights of the reference that a checkpoint must keep; empty while it is the base."""
        if self._reference is None:
            return {}
        if self.uses_lora:
            weights = self.model.named_parameters()
            return {n: w.detach() for n, w in weights if ".reference." in n}
        return {n: w.detach() for n, w in self._reference.named_parameters()}

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `reference_state` returned."""
        if not state:
            return
        self.sync_reference()
        model = self.model if self.uses_lora else self._reference
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                weights[name].copy_(value)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model (or its adapter) and tokenizer the Hugging Face way."""
        options = {}
        if self.uses_lora:
            options = {"save_embedding_layers": False, "selected_adapters": ["default"]}
        with no_progress_bars():
            self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)


class AutoregressivePolicy(Policy):
    """Left to right: causal attention, position i predicted from i-1, exact KV cache."""

    kind = "ar"
    logit_shift = True
    denoises = False
    sampler = "mdmrl.sampling.autoregressive:sample"


class MaskedDiffusionPolicy(Policy):
    """Every position sees every other; [MASK] marks what is still to be revealed.

    Args:
        mask_token_id: the tokenizer's mask token unless given.
        logit_shift: see `Policy`; True for models grown from autoregressive ones, like Dream.

    Both are kept in `model.config`, so that a saved policy is loaded as it was.

    Raises:
        ValueError: no mask token, one that is not a token of its own, or one that tokenizer and
            `mask_token_id` disagree on.
    """

    kind = "mdm"
    denoises = True
    sampler = "mdmrl.sampling.denoise:sample"

    def __init__(
        self, model, tokenizer, mask_token_id: int | None = None, logit_shift: bool = False
    ):
        super().__init__(model, tokenizer)
        named = tokenizer.mask_token_id
        mask = named if mask_token_id is None else mask_token_id
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
        require(0 <= mask < rows, f"mask token id {mask} lies outside the embedding of {rows} rows")
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
        self.mask_token_id = model.config.mask_token_id = mask
        self.logit_shift = model.config.logit_shift = logit_shift


class BlockDiffusionPolicy(MaskedDiffusionPolicy):
    """Masked diffusion within a block, left to right over blocks (Arriola et al. 2025, BD3-LM).

    A position sees its own block, all earlier ones and the prompt, which is a block of its own, so
    the keys and values of finished blocks never change. `model.config.block_length` holds the
    length it was trained with.
    """

    kind = "bd"

    def __init__(
        self, model, tokenizer, mask_token_id: int | None = None, logit_shift: bool = False
    ):
        require(
            not logit_shift,
            "logit_shift=True: the first position of a block would be predicted from the block "
            "before, which does not see it; expected a checkpoint that predicts in place",
        )
        super().__init__(model, tokenizer, mask_token_id)

    @property
    def block_length(self) -> int:
        return self.model.config.block_length

    def pattern(self, width: int, length: int) -> Tensor:
        """The block of every column, (P+L,): 0 for the prompt, then 1, 1, ..., 2, 2, ..."""
        blocks = 1 + torch.arange(length, device=self.device) // self.block_length
        return torch.cat([blocks.new_zeros(width), blocks])

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
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = attention_mask.bool()
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        sees = attention_mask[:, None, None] & (pattern[:, None] >= pattern)
        return self.hidden_states(input_ids, sees, position_ids=positions)
