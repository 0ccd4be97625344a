"""The program in what a policy wrote."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import islice

from mdmrl.rewards.text import completion_text

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w.+-]*)(.*)$", re.M)
_PYTHON = ("py", "ipython")
_QUOTES = re.compile(r"\"{3}|'{3}")
_DEFINES = re.compile(r"^(?:async\s+def|def|class)\s+(\w+)|^(\w+)\s*=\s*lambda\b", re.M)
_GIVES = r"^(?:(?:async\s+def|def|class)\s+(\w+)|(\w+)\s*=[^=]|(?:from|import)\s+(.*))"
_GIVES = re.compile(_GIVES, re.M)
_MOST = 20  # fences to try, so that hostile texts take no time
_ASIDE = re.compile(r"_*(?:test|demo|main|example|check|run_)", re.I)
_SIGNATURE = re.compile(r"^(?:@[^\n]*\n)*(?:async\s+)?def\s+(\w+)", re.M)
_BODY = re.compile(r":[ \t]*(?:#.*)?\n(?:[ \t]*\n)*([ \t]+)\S")
# How a text begins that is code from its first line on.
_CODE = r"(?:async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[:(]|(?:from\s+[\w.]+\s+)?import\b|@\w"
_CODE += r"|[A-Za-z_]\w*\s*=\s*\S|\"{3}|'{3}"
_CODE = re.compile(rf"(?:\s*#.*\n)*\s*(?:{_CODE})|(?:\s*\n)?(?: {{2,}}|\t)\S")


def extract_code(completion: str | list[dict], signature: str = "") -> str:
    """The source of a completion: of a chat's text the last fenced block of Python that defines
    something, and more than tests or a demonstration (else the last block), behind such before it
    as define what it uses, or use what it defines; of any other text all of it.

    Args:
        signature: what the policy was to go on from, as HumanEval's prompts: imports perhaps, then
            a `def` line and a docstring. A body is put behind it, indented as that is if it, or its
            first line alone, is not; where the completion has the function itself, only what stands
            before the `def` is kept.
    """
    text = completion_text(completion).removeprefix("\ufeff")
    blocks = _blocks(text)
    last = max(range(len(blocks)), key=lambda i: (_rank(blocks[i]), i), default=None)
    code = text if last is None else _joined(blocks[: last + 1])
    heads = [*_SIGNATURE.finditer(signature)]
    if not heads:
        return code
    if re.search(rf"^(?:async\s+)?def\s+{heads[-1][1]}\b", code, re.M):
        return signature[: heads[-1].start()] + code
    lines = [line for line in code.splitlines() if line.strip()] or [""]
    first, *others = (len(line) - len(line.lstrip()) for line in lines)
    if not first:
        indent = found[1] if (found := _BODY.search(signature, heads[-1].end())) else "    "
        opens = lines[0].rstrip().endswith((":", "(", "[", "{", "\\"))
        at_first = others and min(others) > 0 and (not opens or others[0] > min(others))
        body = code.lstrip("\n")
        code = indent + body if at_first else textwrap.indent(body, indent)
    return signature.rstrip() + "\n" + code.lstrip("\n")


def _blocks(text: str) -> list[str]:
    """The fenced blocks of Python; none where the first fence is in a docstring of a program, and
    what stands before it where that is code, whose fence the prompt has opened."""
    found, end = [], 0
    while opening := _FENCE.search(text, end):
        is_python = opening[2].lower().startswith(_PYTHON)
        before, start = text[end : opening.start()], opening.end() + 1
        if opening[3].rstrip().endswith(opening[1]):  # on one line
            found.append(("" if is_python else opening[2]) + opening[3].rstrip().rstrip(opening[1]))
            end = opening.end()
            continue
        is_code = not found and _CODE.match(before)
        if (is_code or (not found and _DEFINES.search(before))) and _is_quoting(before):
            return []
        if is_code and not opening[2]:
            return [before]
        inner = _FENCE.search(text, start)
        nested = inner and not opening[2] and inner[2].lower().startswith(_PYTHON)
        if nested and not _is_quoting(text[start : inner.start()]):
            end = opening.end()  # of nothing, or of what began within a line
            continue
        marks = (x for x in _FENCE.finditer(text, start) if not x[2])
        marks = [*islice((x for x in marks if x[1].startswith(opening[1])), _MOST)]
        closing = [mark for mark in marks if not _is_quoting(text[start : mark.start()])] or marks
        stop, end = (closing[0].start(), closing[0].end()) if closing else (len(text), len(text))
        if is_python or not opening[2]:
            found.append(textwrap.dedent(text[start:stop]))
    return found


def _is_quoting(text: str) -> bool:
    """Whether a text ends within a string of three quotes."""
    quote = None
    for mark in _QUOTES.findall(text):
        quote = mark if quote is None else None if quote == mark else quote
    return quote is not None


def _rank(block: str) -> int:
    names = {name for names in _DEFINES.findall(block) for name in names if name}
    return bool(names) + any(not _ASIDE.match(name) for name in names)


def _joined(blocks: list[str]) -> str:
    """The last block, behind those before it that define what it does not, and which it uses or
    which, being functions and classes, use it."""
    code = blocks[-1]
    for block in reversed(blocks[-_MOST:-1]):
        given, own = (_words(" ".join(map(" ".join, _GIVES.findall(x)))) for x in (block, code))
        uses = _rank(block) > 1 and given - own and (own - given) & _words(block)
        if uses or (given - own) & _words(code):
            code = f"{block.rstrip()}\n{code}"
    return code


def _words(text: str) -> set[str]:
    return {*re.findall(r"\w+", text)}


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
        extract_code(text, head or "")
        if before is None
        else f"{before}{completion_text(text)}{after or ''}"
        for text, head, before, after in rows
    ]
