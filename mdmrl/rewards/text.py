"""Completions as text: tags, repetition, and the answer a completion gives.

Everything here is linear in the length of the text, whatever a policy writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NGRAM = 4
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
ANSWER_PHRASE = "the answer is"

_FENCE = re.compile(r"```([^\n`]*)$", re.MULTILINE)
# A full stop ends a sentence only before white space or the end: "5.5 mg" stays whole.
_SENTENCE_END = re.compile(r"\n|\.(?=\s|\Z)")


def completion_text(completion: str | list[dict]) -> str:
    """The text the policy wrote: a string, or the assistant's messages of a conversation, whose
    content may be a string, None (a bare tool call) or a list of typed parts."""
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(m, dict) for m in completion):
        raise TypeError(
            f"completion {completion!r:.80}: expected a string or a list of messages such as "
            "{'role': 'assistant', 'content': '...'}"
        )
    written = [m for m in completion if m.get("role", "assistant") == "assistant"]
    return "\n".join(_content_text(message.get("content")) for message in written)


def _content_text(content: str | list[dict] | None) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def fenced(text: str, languages: Sequence[str]) -> list[str]:
    """What stands before the first fence (it may go on in one that the prompt has opened), and the
    fenced blocks that are said to be in one of the languages, "" where nothing is said."""
    before, *parts = _FENCE.split(text)
    blocks = zip(parts[::4], parts[1::4], strict=True)
    return [before, *(x for said, x in blocks if "".join(said.lower().split()[:1]) in languages)]


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same sequence; 0 below four tokens."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def strip_tags(text: str) -> str:
    """`text` without the four tags; a space takes their place so that words stay apart."""
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text.strip()


def answer_block(text: str) -> str | None:
    """What the last `<answer>` holds, up to its closing tag or the end; None without one."""
    _, opening, rest = text.rpartition("<answer>")
    return strip_tags(rest.partition("</answer>")[0]) if opening else None


def normalise_answer(text: str) -> str:
    """`text` in lower case, white space collapsed, punctuation at its end removed."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


def extract_answer(text: str) -> str | None:
    """The answer a text gives, normalised: the last `<answer>` block, even an empty one; without
    any, the sentence after the last "the answer is"; without that, None."""
    block = answer_block(text)
    if block is not None:
        return normalise_answer(block)
    _, phrase, rest = text.casefold().rpartition(ANSWER_PHRASE)
    sentence = strip_tags(rest).lstrip(": \t\n\r")
    return normalise_answer(_SENTENCE_END.split(sentence, maxsplit=1)[0]) if phrase else None


def exact_answer(completion: str | list[dict], Answer: str) -> bool:
    """The true metric: whether the completion's answer is `Answer`, both normalised. An empty
    answer is never right."""
    answer = extract_answer(completion_text(completion))
    return bool(answer) and answer == normalise_answer(Answer)
