"""The network side of a policy: from token ids to hidden states to logits."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from mdmrl.policies.patterns import positions_of

LOGITS_AT_ONCE = 2**24  # numbers, 64 MB


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


class Network:
    """Runs `self.model`, a causal-LM of transformers that peft may have wrapped."""

    logit_shift: bool
    positions_computed: int
    bf16 = recomputes = False  # see `computing`

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def _transformer(self):
        """The transformers causal-LM inside any peft wrapper; LoRA layers sit inside it."""
        get_base = getattr(self.model, "get_base_model", None)
        return get_base() if get_base else self.model

    @contextlib.contextmanager
    def computing(self, bf16: bool, gradient_checkpointing: bool) -> Iterator[None]:
        """Inside, layers compute in bfloat16 where that is safe (autocast; weights and head stay as
        they are), and a backward pass makes again what it needs of a layer, so that nothing but
        each layer's input is held."""
        self.bf16, self.recomputes = bf16, gradient_checkpointing
        try:
            yield
        finally:
            self.bf16 = self.recomputes = False
            self._recompute(False)

    def _recompute(self, again: bool) -> None:
        for layer in self._transformer.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # It wants training mode, which the layer's parts, dropout, need not share.
                layer.gradient_checkpointing = layer.training = again
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

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
            position_ids = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        self.positions_computed += input_ids.numel()
        if self.recomputes and torch.is_grad_enabled():
            self._recompute(True)
        low = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else None
        with low or contextlib.nullcontext():
            return self._transformer.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=cache is not None,
            ).last_hidden_state

    def pattern(self, width: int, length: int) -> Tensor | None:
        """The block of every column of a canvas, (P+L,), or None where the family has no blocks;
        the prompt has `width` columns, P, and the completion `length`, L."""
        return None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pattern: Tensor | None = None
    ) -> Tensor:
        """Hidden states in canvas positions, (B, L, H): `head(hidden[:, i])` predicts token i.

        `pattern`, from the method of that name, is for families with blocks. Where the family
        shifts, nothing predicts position 0, and what its row holds is not to be read.
        """
        hidden = self.hidden_states(input_ids, attention_mask)
        return torch.cat([hidden[:, :1], hidden[:, :-1]], 1) if self.logit_shift else hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., H); give it only the rows needed."""
        return self._transformer.get_output_embeddings()(hidden.float())

    def of_logits(self, function: Callable, hidden: Tensor, *beside: Tensor) -> list[Tensor]:
        """`function(logits, *beside)` of hidden states (N, H) and what lies beside them, (N, ...),
        for some of the rows at a time; a backward pass makes logits again, so that never more than
        `LOGITS_AT_ONCE` of their numbers are held."""
        rows = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        parts = [*zip(*(x.split(rows) for x in (hidden, *beside)), strict=True)]

        def part(hidden: Tensor, *beside: Tensor) -> Tensor:
            return function(self.head(hidden), *beside)

        if len(parts) == 1:
            return [part(*parts[0])]
        return [checkpoint(part, *values, use_reentrant=False) for values in parts]

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pattern: Tensor | None = None
    ) -> Tensor:
        """Float32 logits in canvas positions, (B, L, V)."""
        return self.head(self.forward(input_ids, attention_mask, pattern))

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Those that are trained, by name; this process's shards of them where it has some."""
        if self.sharding is not None:
            return self.sharding.parameters
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}
