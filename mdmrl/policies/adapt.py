"""Masked diffusion from an autoregressive checkpoint (Gong et al. 2025, DiffuLLaMA; Dream).

The weights stay, and so does the shift: position i is predicted by the hidden state of position
i-1. New are the attention, to both sides, and the mask token. What is made here is untrained:
`train_sft` and `mdmrl.zoo.pretrain` teach it to fill in masks.
"""

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies.families import MaskedDiffusionPolicy, Policy, require_both_sides
from mdmrl.policies.patterns import positions_of

MASK = "<|mask|>"


class AdaptedPolicy(MaskedDiffusionPolicy):
    """A masked diffusion policy that learns to look ahead little by little.

    While it is trained (`model.train()`), a position sees all that stands before it, and each
    position behind it with probability `progress / annealing`, drawn anew for each forward pass
    from the global random state, as dropout is. From `progress = annealing` on, and outside
    training, it sees everything.

    Attributes:
        annealing: the share of training after which every position is seen; 0 for none of this.
    """

    annealing: float = 0.0

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache=None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if not self.model.training or self.progress >= self.annealing:
            return super().hidden_states(input_ids, attention_mask, cache, position_ids)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        width, device = input_ids.shape[1], input_ids.device
        ahead = torch.rand(width, width, device=device) < self.progress / self.annealing
        before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # Padding sees itself, so that no row of the softmax is empty.
        own = torch.eye(width, dtype=torch.bool, device=device)
        sees = own | ((before | ahead) & real.bool()[:, None, None])
        return super().hidden_states(input_ids, sees, position_ids=positions_of(real))

    def fingerprint(self) -> dict:
        return super().fingerprint() | {"annealing": self.annealing}


def adapted(policy: Policy, annealing: float = 0.0, mask_token: str | None = None) -> AdaptedPolicy:
    """The masked diffusion policy that begins with the weights of an autoregressive one, which is
    used up.

    Args:
        annealing: see `AdaptedPolicy`.
        mask_token: for a tokenizer that has none: one of its added tokens, whose row is kept, or a
            new one, `<|mask|>` where it is None. A new one begins with the mean of all rows, in the
            embedding and in the head.

    Raises:
        InputError: a policy that is not autoregressive, has an adapter, or cannot look ahead;
            `annealing` outside [0, 1]; a mask token that is text, ends one, or cannot be seen.
    """
    require(
        policy.kind == "ar" and not policy.uses_lora,
        f"a policy of kind {policy.kind!r}{' with an adapter' * policy.uses_lora}: expected an "
        "autoregressive one without an adapter",
    )
    require(0 <= annealing <= 1, f"annealing={annealing}: expected a share, from 0 to 1")
    tokenizer, model = policy.tokenizer, policy.model
    own = tokenizer.mask_token
    said = f"mask_token={mask_token!r}: the tokenizer has {own!r} already; leave it out"
    require(own is None or mask_token in (None, own), said)
    if own is None:
        mask_token = MASK if mask_token is None else mask_token
        known = mask_token in tokenizer.get_vocab()
        added = mask_token in tokenizer.get_added_vocab()
        require(not known or added, f"mask_token={mask_token!r} is a piece of ordinary text")
        require(
            mask_token != "" and mask_token.isprintable(),
            f"mask_token={mask_token!r}: expected characters that can be seen, as in <|mask|>",
        )
        tokenizer.add_special_tokens({"mask_token": mask_token})
        rows = len(model.get_input_embeddings().weight)
        if not known:
            _give_row(model, tokenizer.mask_token_id, rows)
    made = AdaptedPolicy(model, tokenizer, tokenizer.mask_token_id, logit_shift=True)
    made.annealing = annealing
    require_both_sides(made)
    return made


@torch.no_grad()
def _give_row(model, token: int, rows: int) -> None:
    """Set the new token's row to the mean of the others, in embedding and head."""
    if token >= rows:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[token] = layer.weight[: min(token, rows)].float().mean(0).to(layer.weight)
