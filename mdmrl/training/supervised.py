"""Supervised learning of documents (prompt, completion, end token): batches and losses.

Pre-training and fine-tuning share them:

    ar    the cross-entropy of the next token
    mdm   the linear-schedule ELBO (`mdmrl.diffusion`) over a canvas that end tokens fill up, as
          LLaDA's SFT (Nie et al. 2025, algorithm 2)
    bd    the same block by block, each block noised at its own time and given the clean ones
          before it (Arriola et al. 2025, BD3-LM)

The prompt stays clean, unless it is learnt too. Times are drawn as `sample_times` does, where LLaDA
draws them uniformly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F

from mdmrl.config import require
from mdmrl.diffusion import linear_elbo_loss, mask_tokens, sample_times
from mdmrl.policies import BlockDiffusionPolicy, Policy, as_messages, require_conversation
from mdmrl.policies.patterns import hidden_beside

Pair = tuple[list[int], list[int]]
Loss = tuple[torch.Tensor, int]


@dataclass
class Batch:
    """Documents of one batch: prompts left-padded to P, completions filled up with end tokens to L.

    All tensors are (B, P+L). `prompt` and `completion` mark where real prompt tokens and the whole
    canvas lie, `written` the completion with its first end token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt: torch.Tensor
    completion: torch.Tensor
    written: torch.Tensor

    @property
    def document_tokens(self) -> int:
        return int(self.prompt.sum() + self.written.sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def encode_pairs(policy: Policy, rows: Sequence[dict], max_completion_length: int) -> list[Pair]:
    """Token ids of each row's `prompt`, and of its `completion` with the end token.

    A prompt is encoded as for sampling. A completion, a string or a list of messages, is what the
    chat template writes behind it, up to the token that ends the turn; without a template it is
    plain text. The tokenizer's end token is put where none stands.

    Raises:
        ValueError: a row without the two, one that the template cannot split, a mask token in a
            completion, or a completion that exceeds `max_completion_length` or, with its prompt
            (and what fills the canvas), the context. Nothing is cut.
    """
    require_fields(rows, "prompt", "completion")
    if not rows:
        return []
    own = policy.block_length
    require(
        own is None or max_completion_length % own == 0,
        f"max_completion_length={max_completion_length}: expected a multiple of the policy's "
        f"blocks of {own}",
    )
    prompts = policy.token_lists([row["prompt"] for row in rows])
    end_tokens = tuple(policy.tokenizer.convert_ids_to_tokens(policy.end_token_ids))
    pairs = []
    for prompt, text in zip(prompts, _completion_texts(policy, rows), strict=True):
        if text.rstrip().endswith(end_tokens):  # templates write a line break behind it
            text = text.rstrip()
        completion = policy.tokenizer(text, add_special_tokens=False).input_ids
        if not text.endswith(end_tokens):
            completion.append(policy.tokenizer.eos_token_id)
        name, size = f"row {len(pairs) + 1}, completion {text!r:.60}", len(completion)
        require(
            size <= max_completion_length,
            f"{name}: {size} tokens with the end token, expected at most "
            f"max_completion_length={max_completion_length}: raise it or shorten the text",
        )
        room = max_completion_length if policy.denoises else size
        require(
            len(prompt) + room <= policy.context_length,
            f"{name}: a prompt of {len(prompt)} tokens and {room} more exceed the context of "
            f"{policy.context_length}: shorten the texts or lower max_completion_length",
        )
        require(
            not policy.denoises or policy.mask_token_id not in completion,
            f"{name} holds the mask token {policy.tokenizer.mask_token}, which stands for what is "
            "not known yet and cannot be learnt: take it out",
        )
        pairs.append((prompt, completion))
    return pairs


def require_fields(rows: Sequence[dict], *names: str) -> None:
    """Refuse rows without these fields, which are conversations."""
    for number, row in enumerate(rows, start=1):
        held = ", ".join(map(str, row)) or "none"
        wanted = f"expected {', '.join(names[:-1])} and {names[-1]}"
        require({*names} <= row.keys(), f"row {number} has the fields {held}: {wanted}")
        for name in names:
            require_conversation(row[name], f"row {number}, {name},")


def _completion_texts(policy: Policy, rows: Sequence[dict]) -> list[str]:
    """What stands behind each row's prompt, as the model is to write it."""
    completions = [row["completion"] for row in rows]
    if policy.tokenizer.chat_template is None:
        require(
            all(isinstance(text, str) for text in completions),
            "the tokenizer has no chat template for completions that are lists of messages: set "
            "tokenizer.chat_template, or give strings",
        )
        return completions
    prompts = [as_messages(row["prompt"], "user") for row in rows]
    answers = [as_messages(text, "assistant") for text in completions]
    before = policy.render(prompts, add_generation_prompt=True)
    whole = policy.render([p + a for p, a in zip(prompts, answers, strict=True)])
    for number, (start, text) in enumerate(zip(before, whole, strict=True), start=1):
        require(
            text.startswith(start),
            f"row {number}: the chat template writes {text[: len(start)]!r} where the prompt to "
            f"complete is {start!r}: expected a completion that an assistant's message opens",
        )
    return [text[len(start) :] for start, text in zip(before, whole, strict=True)]


def collate(pairs: Sequence[Pair], canvas: int, end: int) -> Batch:
    """The batch of `pairs` with completions filled up to `canvas` positions with `end`."""
    width = max(len(prompt) for prompt, _ in pairs)
    longest = max(len(completion) for _, completion in pairs)
    require(longest <= canvas, f"a completion of {longest} tokens exceeds the canvas of {canvas}")
    ids = torch.full((len(pairs), width + canvas), end)
    attention = torch.ones_like(ids, dtype=torch.bool)
    written = torch.zeros_like(attention)
    for row, (prompt, completion) in enumerate(pairs):
        pad = width - len(prompt)
        ids[row, pad : width + len(completion)] = torch.tensor(prompt + completion)
        attention[row, :pad] = False
        written[row, width : width + len(completion)] = True
    canvas = (torch.arange(width + canvas) >= width).expand_as(attention)
    return Batch(ids, attention, prompt=attention & ~canvas, completion=canvas, written=written)


# The families' losses, each f(policy, batch, learn_prompt, generator) -> the loss summed over the
# positions that are learnt, in nats, and their number.


def next_token_loss(policy: Policy, batch: Batch, learn_prompt: bool, generator) -> Loss:
    """The cross-entropy of the tokens of completions and their ends, each given those before it."""
    width = int((~batch.completion[0]).sum()) + int(batch.written.sum(1).max())
    targets = batch.written | batch.prompt if learn_prompt else batch.written
    targets = targets[:, :width].clone()
    targets[:, 0] = False
    ids, attention = batch.input_ids[:, :width], batch.attention_mask[:, :width]
    hidden, tokens = policy.forward(ids, attention)[targets], ids[targets]
    summed = partial(F.cross_entropy, reduction="sum")
    return sum(policy.of_logits(summed, hidden, tokens)), len(tokens)


def masked_loss(policy: Policy, batch: Batch, learn_prompt: bool, generator) -> Loss:
    """The linear-schedule ELBO over the whole canvas."""
    maskable = batch.completion | batch.prompt if learn_prompt else batch.completion
    t, weight = sample_times(len(maskable), generator)
    xt, masked = mask_tokens(batch.input_ids, t, maskable, policy.mask_token_id, generator)
    hidden = policy.forward(xt, batch.attention_mask)[masked]
    nll = _surprise(policy, hidden, batch.input_ids[masked])
    count = int(maskable.sum())
    return linear_elbo_loss(nll, masked, weight, maskable) * count, count


def block_loss(policy: BlockDiffusionPolicy, batch: Batch, learn_prompt: bool, generator) -> Loss:
    """The block loss L_BD, all blocks in one pass: the clean canvas, (B, W), and beside
    it a noised copy of what is learnt, (B, N), whose blocks see themselves and the clean ones
    before them."""
    width = int((~batch.completion[0]).sum())
    pattern = policy.pattern(width, batch.input_ids.shape[1] - width)  # (W,)
    learnt = slice(0 if learn_prompt else width, None)
    x0, maskable = batch.input_ids[:, learnt], (batch.prompt | batch.completion)[:, learnt]
    block = pattern[learnt] - pattern[learnt][0]  # (N,), from 0
    t, weight = sample_times(len(x0) * int(block[-1] + 1), generator)
    t, weight = (v.view(len(x0), -1)[:, block] for v in (t, weight))  # (B, N)
    xt, masked = mask_tokens(x0, t, maskable, policy.mask_token_id, generator)
    columns = torch.arange(len(pattern), device=pattern.device)[learnt]
    canvas = batch.input_ids, batch.attention_mask
    _, hidden = hidden_beside(policy, *canvas, pattern, xt, columns)
    nll = _surprise(policy, hidden[masked], x0[masked])
    count = int(maskable.sum())
    return linear_elbo_loss(nll, masked, weight, maskable) * count, count


def _surprise(policy: Policy, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """-log p of `tokens` (N,) from the hidden states (N, H) that predict them."""
    each = partial(F.cross_entropy, reduction="none")
    return torch.cat(policy.of_logits(each, hidden, tokens))
