"""The text side of a policy: prompts into token ids, completions into text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mdmrl.config import InputError, require

Prompt = str | list[dict]
BROKEN = "\ufffd"  # what bytes of an unfinished character decode to


def as_messages(text: Prompt, role: str) -> list[dict]:
    """A string as the only message of `role`; a list of messages as it is."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def require_texts(texts: Sequence, what: str) -> None:
    """Refuse no texts at all, and a string: that is a sequence too, of one text a character."""
    require(not isinstance(texts, str), f"{texts!r} is one string: expected a list of them")
    require(len(texts) > 0, f"no {what} given: expected at least one")


def require_conversation(given, what: str) -> None:
    """Refuse what is neither a text nor a list of messages, and text that is no Unicode."""
    messages = as_messages(given, "user")
    require(
        isinstance(messages, list) and len(messages) > 0 and all(map(_is_message, messages)),
        f"{what} is {given!r:.80}: expected a text, or a list of messages like "
        '{"role": "user", "content": "..."}',
    )
    for text in _written(messages):
        whole = text.encode(errors="ignore").decode() == text
        require(whole, f"{what} has half a character, a lone surrogate: {text!r:.80}; take it out")


def _is_message(given) -> bool:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        return False
    content = given.get("content")
    parts = content if isinstance(content, list) else ()
    written = all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)
    return isinstance(content, str | list) and written


def _written(prompt: Prompt) -> Iterator[str]:
    """The texts in a prompt that are the user's own, not the chat template's."""
    for message in as_messages(prompt, "user"):
        content = message["content"]
        yield from [content] if isinstance(content, str) else [part["text"] for part in content]


@dataclass
class Prompts:
    """Encoded prompts, left-padded: `input_ids` and `attention_mask` are (B, P)."""

    input_ids: Tensor
    attention_mask: Tensor


class Text:
    """Encodes and decodes with `self.tokenizer` and its chat template."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's, then those of generation_config."""
        given = self._transformer.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id

    def encode(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 0, begun: Sequence[str] | None = None
    ) -> Prompts:
        """`token_lists` as one left-padded batch on the policy's device."""
        return self.pad(self.token_lists(prompts, max_new_tokens, begun))

    def token_lists(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 0, begun: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Encode strings (a user's message) or message lists with the chat template, one list of
        token ids a prompt.

        A tokenizer without one belongs to a base model: there a string is plain text to continue,
        as in TRL's standard format, and a message list is an error, as in transformers. `begun` are
        texts that the completions begin with; they alone may hold mask tokens.

        Raises:
            InputError: no prompts, a message list without a chat template, a prompt that spells
                the mask or an end token, has no tokens or leaves no room for `max_new_tokens`.
        """
        require_texts(prompts, "prompts")
        plain = self.tokenizer.chat_template is None
        for number, prompt in enumerate(prompts):
            require_conversation(prompt, f"prompt {number}")
            empty = not plain and not any(_written(prompt))
            require(not empty, f"prompt {number} is empty: {prompt!r:.80}")
        self._refuse_reserved_tokens(prompts)
        require(
            not plain or all(isinstance(p, str) for p in prompts),
            "the tokenizer has no chat template for lists of messages: set "
            "tokenizer.chat_template, or give strings, which are continued as plain text",
        )
        asked = prompts if plain else self.render([as_messages(p, "user") for p in prompts], True)
        if begun is not None:
            asked = [prompt + text for prompt, text in zip(asked, begun, strict=True)]
        rows = self._fitting(asked, max_new_tokens, add_special_tokens=plain)
        for number, row in enumerate(rows if begun is None else ()):  # of a role, say
            said = f"prompt {number} has a mask token behind its template: {prompts[number]!r:.200}"
            require(self.tokenizer.mask_token_id not in row, said)
        return rows

    def _refuse_reserved_tokens(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what a user wrote if it would end or mask the text that it stands in. The tokens
        decide, as a tokenizer may take more than one spelling for them."""
        reserved = {*self.end_token_ids, self.tokenizer.mask_token_id}
        for number, prompt in enumerate(prompts):
            for text in _written(prompt):
                ids = self.tokenizer(text, add_special_tokens=False).input_ids
                spelled = self.tokenizer.convert_ids_to_tokens(sorted(reserved.intersection(ids)))
                require(
                    not spelled,
                    f"prompt {number} spells {', '.join(spelled)}, which ends or masks a text: "
                    f"take it out of {text!r:.200} (`infill` is for texts with gaps)",
                )

    def render(
        self, conversations: Sequence[list[dict]], add_generation_prompt: bool = False
    ) -> list[str]:
        """Lists of messages as the chat template writes them, parts of a content as one text; an
        InputError for what it refuses."""
        # Qwen3 answers at once; other templates have no such switch.
        options = {"tokenize": False, "enable_thinking": False}
        options["add_generation_prompt"] = add_generation_prompt
        texts = [
            [{**message, "content": "".join(_written([message]))} for message in messages]
            for messages in conversations
        ]
        try:
            return self.tokenizer.apply_chat_template(texts, **options)
        except TemplateError as error:
            said = f"the chat template refuses a conversation ({error})"
            raise InputError(f"{said}: mend its messages, or tokenizer.chat_template") from None

    def encode_texts(
        self, texts: Sequence[str], max_new_tokens: int = 0, add_special_tokens: bool = False
    ) -> Prompts:
        """Encode texts as they stand, whatever tokens they spell. With `add_special_tokens` a text
        gets what the tokenizer puts before it, but no end: it is to be continued."""
        return self.pad(self._fitting(texts, max_new_tokens, add_special_tokens))

    def _fitting(
        self, texts: Sequence[str], max_new_tokens: int, add_special_tokens: bool
    ) -> list[list[int]]:
        """Token ids of texts that have some, and leave room for `max_new_tokens`."""
        rows = self.tokenize(texts, add_special_tokens)
        require(all(rows), "a prompt encodes to no tokens: expected at least one")
        longest = max(map(len, rows))
        require(
            longest + max_new_tokens <= self.context_length,
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
            f"{self.context_length}: shorten the prompt or lower max_new_tokens",
        )
        return rows

    def tokenize(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of texts as they stand, one list a text; see `encode_texts`."""
        rows = self.tokenizer(list(texts), add_special_tokens=add_special_tokens).input_ids
        ends = self.end_token_ids if add_special_tokens else ()
        for row in rows:
            while row and row[-1] in ends:
                row.pop()
        return rows

    def pad(self, rows: Sequence[Sequence[int]]) -> Prompts:
        """Token ids of prompts, one list a prompt, as a left-padded batch."""
        longest = max(map(len, rows))
        ids = [torch.tensor(row) for row in rows]
        padded = pad_sequence(ids, True, self.pad_token_id, "left").to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        columns = torch.arange(longest, device=self.device)
        return Prompts(padded, columns >= longest - lengths[:, None])

    def decode(self, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
        """Texts up to the first end token, without the tokens that frame a text (leftover masks
        too). Tags stay, also where the tokenizer holds them as special tokens."""
        framing = torch.tensor(list(self._framing_token_ids()), device=completion_ids.device)
        shown = completion_mask & ~torch.isin(completion_ids, framing)
        rows = [ids[mask] for ids, mask in zip(completion_ids, shown, strict=True)]
        return self.tokenizer.batch_decode(rows)

    def _framing_token_ids(self) -> set[int]:
        """Beginning, ends, padding, mask, and the special tokens of the chat format's turns."""
        named = self.tokenizer
        ids = {*self.end_token_ids, named.pad_token_id, named.bos_token_id, named.mask_token_id}
        if named.chat_template is not None:
            turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
            try:
                (text,) = self.render([turns])
            except InputError:  # some know no system
                (text,) = self.render([turns[1:]])
            added = named.added_tokens_decoder
            turn = named(text, add_special_tokens=False).input_ids
            ids |= {token for token in turn if token in added and added[token].special}
        return ids - {None}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One string for each token, which together are the text. A character of several tokens
        stands at the one that completes it, special tokens as they are spelled."""
        pieces, done = [], 0
        for stop in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:stop])
            whole = text if stop == len(ids) else text.rstrip(BROKEN)
            pieces.append(whole[done:])
            done = max(done, len(whole))
        return pieces

    def is_end(self, ids: Tensor) -> Tensor:
        """Where `ids` are end tokens; bool, of the same shape."""
        return torch.isin(ids, torch.tensor(self.end_token_ids, device=ids.device))

    def completion_mask(self, completion_ids: Tensor) -> Tensor:
        """True up to and including the first end token, (B, L) bool."""
        ends = self.is_end(completion_ids)
        return ends.cumsum(1) - ends.long() == 0
