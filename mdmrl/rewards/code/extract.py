"""The program in what a policy wrote."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from mdmrl.rewards.text import completion_text

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_DEFINES = re.compile(r"^(?:async\s+)?(?:def|class)\s", re.M)
_SIGNATURE = re.compile(r"^(?:@[^\n]*\n)*(?:async\s+)?def\s+(\w+)", re.M)


def extract_code(completion: str | list[dict], signature: str = "") -> str:
    """The source of a completion: of a chat's text the last fenced block of Python that defines
    something (else the last block), of any other text all of it.

    Args:
        signature: what the policy was to go on from, as HumanEval's prompts: imports perhaps, then
            a `def` line and a docstring. A body is put behind it, indented if it is not; where the
            completion has the function itself, only what stands before the `def` is kept.
    """
    text = completion_text(completion)
    fenced = _FENCE.search(text)
    inside = fenced is not None and text.count('"""', 0, fenced.start()) % 2 == 1
    blocks = [] if inside else _FENCE.findall(text)  # a docstring may have a fence too
    blocks = [code for language, code in blocks if language.lower() in _LANGUAGES]
    defining = [code for code in blocks if _DEFINES.search(code)]
    code = [*blocks, *defining][-1] if blocks else text
    heads = [*_SIGNATURE.finditer(signature)]
    if not heads:
        return textwrap.dedent(code) if blocks else code
    if re.search(rf"^(?:async\s+)?def\s+{heads[-1][1]}\b", code, re.M):
        return signature[: heads[-1].start()] + code
    first, *rest = [line for line in code.splitlines() if line.strip()] or [""]
    if not first.startswith((" ", "\t")):
        started = rest and all(line.startswith((" ", "\t")) for line in rest)
        at_first = started and not first.rstrip().endswith((":", "(", "[", "{", "\\"))
        body = code.lstrip("\n")
        code = "    " + body if at_first else textwrap.indent(body, "    ")
    return signature.rstrip() + "\n" + code.lstrip("\n")


def programs_of(
    completions: Sequence[str | list[dict]],
    signatures: Sequence[str | None],
    prefixes: Sequence[str | None],
    suffixes: Sequence[str | None],
) -> list[str]:
    """The source of each completion: what `extract_code` says; where there is a prefix, the policy
    was to write what stands between it and the suffix, to the letter."""
    rows = zip(completions, signatures, prefixes, suffixes, strict=True)
    return [
        extract_code(text, signature or "")
        if before is None
        else f"{before}{completion_text(text)}{after}"
        for text, signature, before, after in rows
    ]


_LANGUAGES = ("", "python", "py", "python3")
