r"""The answer that a completion gives, by documented rules, and whether it is the right one.

What a completion marks counts: what its last `<answer>` holds, even nothing; without any, its last
closed `\boxed{}`; else what stands behind its last `####` on that line; else the sentence behind
its last "the answer is" ("the final answer is" and a line's "Answer:" too), up to a reason such as
", because". Where nothing is marked, the completion is an answer only if it is nothing else. What
is ambiguous is wrong.

Everything is linear in the length of the text, and an answer of more than 300 characters is none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from mdmrl.config import require
from mdmrl.rewards.text import answer_block, completion_text, strip_tags

LONGEST = 300  # characters of an answer
READ = 100_000  # the characters, at the end of a completion, that a mark is looked for in

# Generations of other repositories are stored with the tokens that end them.
_END_TOKENS = re.compile(r"<\|(?:endoftext|eot_id|im_end)\|>")
_PHRASE = re.compile(
    r"\bthe (?:(?:final|correct|right|best) )?(?:answer|option|choice) is\b"
    r"|^[ \t*#]{0,8}(?:the )?(?:(?:final|correct|right|best) )?answer(?: is\b|(?=\W{0,3}:))",
    re.IGNORECASE | re.MULTILINE,
)
_CUT_TAG = re.compile(r"<(?:/\w{0,6})?\Z")
_REASON = r"[,;]?\s(?:because|since|as)\b|[,;]\s(?:not|which|where|so)\b"
_BEFORE_SENTENCE = re.compile(r"(?:[:\s]|\*\*(?=[:\s])|(?:\$\$|\\\[)\s)*")
_SENTENCE_END = re.compile(rf"\n|\.(?=\s|\Z)|{_REASON}", re.IGNORECASE)
# Not a power: "2**3**2" stays.
_BOLD = re.compile(r"(?<![\w)*])(\*{1,2})(?=\S)([^*\n]+)(?<=\S)\1(?![\w(*])")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_WRAPPERS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")),
    *(("**", "**"), ("`", "`"), ('"', '"')),
)


def written(completion: str | list[dict]) -> str:
    """The text of a completion, with a new line for a token that ends it."""
    return _END_TOKENS.sub("\n", completion_text(completion))


def marked_answer(text: str) -> str | None:
    """What `text` marks as its answer, by the rules above; None where it marks nothing. A block
    that itself marks an answer, such as one box, gives that."""
    text = text[-READ:]
    block = answer_block(text)
    if block is None:
        return _marked_without_tags(text, last_box=True)
    block = _CUT_TAG.sub("", block).rstrip()  # of a completion that ends within the closing tag
    inner = _marked_without_tags(block, last_box=False)
    return block if inner is None else inner


def _marked_without_tags(text: str, last_box: bool) -> str | None:
    boxes = _boxes(text)
    if boxes and (last_box or len(set(boxes)) == 1):
        return boxes[-1].strip()
    if boxes:
        return text  # in one block, boxes that differ are ambiguous
    _, mark, rest = text.rpartition("####")
    if mark:
        return strip_tags(rest.lstrip().partition("\n")[0])
    phrases = [phrase.end() for phrase in _PHRASE.finditer(text)]
    if not phrases:
        return None
    rest = strip_tags(text[phrases[-1] :])
    rest = rest[_BEFORE_SENTENCE.match(rest).end() :]
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0].strip()
    return sentence.removesuffix("**") if sentence.count("**") % 2 else sentence


def _boxes(text: str) -> list[str]:
    r"""What the closed `\boxed{}` of a text hold, in the order in which they open."""
    opened, closed = [], []
    for token in _BRACES.finditer(text):
        if token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                closed.append((start, token.start()))
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append((token.end(), token[0] != "{"))
    return [text[start:end] for start, end in sorted(closed)]


def _without_bold(text: str) -> str:
    return _BOLD.sub(r"\2", text)


def unwrapped(text: str) -> str:
    """`text` without what stands around an answer: white space, mathematics' and markdown's marks,
    a full stop."""
    for _ in range(8):
        before, text = text, text.strip().removesuffix(".").strip()
        for opening, closing in _WRAPPERS:
            inside = text[len(opening) : -len(closing)]
            around = text.startswith(opening) and text.endswith(closing)
            if around and inside and opening not in inside and closing not in inside:
                text = inside
        if text == before:
            break
    return text


# ------------------------------------------------------------------ numbers

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{_UNSIGNED})"
    rf"(?:\s*/\s*(?P<bottom>-?{_UNSIGNED}))?",
    re.ASCII,
)
_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*(-?{_UNSIGNED})\s*\}}|(\d))\s*(?:\{{\s*(-?{_UNSIGNED})\s*\}}|(\d))",
    re.ASCII,
)
_REPLACED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\!|\\left|\\right", ""),
        (r"\{,\}|(?<=\d)\\,(?=\d{3}(?!\d))", ","),
        (r"\\[,;: ]|[~\u00a0\u2009\u202f]", " "),
        (r"[\u2212\u2013]", "-"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°"),
        (r"\\([%$])", r"\1"),
        (r"(?:(?<=[A-Za-z]{2})|(?<=\bm))\s?(?:\^\{?[23]\}?|[²³])", ""),  # the power of a unit
        (r"[-]\s*[$€£¥]\s*(?=[\d.])", "-"),
        (r"[$€£¥]|\\[()\[\]{}]", " "),
        (r"\\equiv|≡", "="),
        (r"\\(?:times|cdot)(?![A-Za-z])|[·⋅∗]", "×"),
        (r"\\div(?![A-Za-z])", "÷"),
    )
]
VULGAR = re.compile("[¼-¾⅐-⅞]")
_AMBIGUOUS_WORDS = re.compile(
    r"\b(?:or|not|nor|neither|never|cannot|than|wrong|incorrect|false)\b|n['’]t\b", re.I
)
_NO_NUMBER = re.compile(r"[\\<>≤≥≠±∞√π|]|!=|\[MASK\]")
# What makes a number a part of something else.
MAGNITUDE = r"(?:hundred|thousand|million|billion|trillion)s?\b"
_PART_BEFORE = re.compile(
    r"(?:[\w.,]|[-+*/×÷^_]\s*[({\[]*|\b(?:minus|negative|twice|double|triple|half(?: of)?|over"
    r"|under|above|below|but|except)[\s(]*)\Z",
    re.IGNORECASE,
)
_PART_AFTER = re.compile(
    r"_|[\s)}\]]*[+*/^×÷]|\s*-\s*(?:\Z|[^\w\s])|\.\.|…|\s*k\b"
    rf"|(?i:\s*(?:{MAGNITUDE}|(?:squared|cubed|plus|minus)\b))"
    r"|(?i:.*\band (?:a|one|two|three)[ -](?:half|third|quarter))"
)
_NAME = re.compile(r"[^\d,;]*")
_ARITHMETIC = re.compile(r"(?:[0-9\s.+\-*/()%×÷]|,(?=[0-9])|[^\W\d_]{3,})+")


def plain_number(text: str) -> Fraction | None:
    r"""The one number that `text` holds, exactly: a decimal, a fraction or a mixed number, with a
    sign, thousands commas, a currency, a unit or words around it; in LaTeX or not.

    A percent sign is a unit, "18%" is 18. Of an equation the right side counts where its left is a
    name or arithmetic: "x = 18", "9 * 2 = 18". None is what has two numbers (also "18 or 18"), a
    "not", "or" or "than", a number that is part of more ("3^2", "x3", "2\pi", "< 5", "5 million",
    "twice 5", "5 and a half"), a zero below, or digits that are not 0 to 9.
    """
    if len(text) > LONGEST:
        return None
    text = plain_text(text)
    if _AMBIGUOUS_WORDS.search(text) or _NO_NUMBER.search(text):
        return None
    if "=" in text:
        *lefts, right = text.split("=")
        if len(lefts) == 1 and _NAME.fullmatch(right) and right.strip():
            lefts, right = [right], lefts[0]
        if not all(_NAME.fullmatch(left) or _ARITHMETIC.fullmatch(left) for left in lefts):
            return None
        text = right
    found = _NUMBER.search(text)
    if found is None:
        return None
    before, after = text[: found.start()], text[found.end() :]
    if any(map(str.isdigit, before + after)) or _PART_BEFORE.search(before):
        return None
    if _PART_AFTER.match(after):
        return None
    top, bottom = (
        Fraction((part or "1").replace(",", "")) for part in found.group("top", "bottom")
    )
    if bottom == 0:
        return None
    value = Fraction(found["whole"] or 0) + top / bottom
    return -value if found["sign"] == "-" else value


def plain_text(text: str) -> str:
    r"""`text` with LaTeX's spaces, signs, `\text` and fractions of numbers as plain characters."""
    text = _without_bold(unwrapped(text))
    for _ in range(4):
        text = _TEXT_COMMAND.sub(r" \1 ", text)
    for pattern, new in _REPLACED:
        text = pattern.sub(new, text)
    text = VULGAR.sub(_vulgar_fraction, text)
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).strip()
    return re.sub(r"^-\s+|(?<=[=(])\s*-\s+", "-", text)


def _vulgar_fraction(character: re.Match) -> str:
    return f" {unicodedata.normalize('NFKC', character[0])} ".replace("\u2044", "/")


# A number, what stands before it and a unit of at most three words.
_BARE_NUMBER = re.compile(r"(?:[A-Za-z] *=)?[-+( ]*[\d.][\d.,/ ]*[%°)]?(?: *[^\W\d_]+[./]?){0,3}")


def extract_number(text: str) -> Fraction | None:
    """The number that `text` gives: the one in its marked answer (`plain_number`), or the whole
    text where it is nothing but a number and its unit."""
    marked = marked_answer(text)
    if marked is not None:
        return plain_number(marked)
    if len(text) > LONGEST or not _BARE_NUMBER.fullmatch(plain_text(text)):
        return None
    return plain_number(text)


def number_right(completion: str | list[dict], answer: str | int | float) -> bool:
    """Whether the number that a completion gives equals `answer`, exactly.

    Raises:
        InputError: `answer` is no number.
    """
    expected = extract_number(str(answer))
    require(expected is not None, f"answer {answer!r:.80}: expected one number, as in '18'")
    return extract_number(written(completion)) == expected


# ------------------------------------------------------------------ choices

_LEAD = re.compile(
    r"(?:(?:the|my|correct|right|best|final|answer|option|choice|letter|is|it|it['’]s|would|must|be|so|thus"
    r"|therefore|i|choose|pick|select|only|clearly|definitely|probably)[\s:,]+)*",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"[(\[]?(?P<letter>[A-Da-d])"
    r"(?:[)\].:]+|\s+[-\u2013\u2014:](?=\s)|,(?=\s+\w\w)|\s+(?=\()|[ \t]*\n)"
)
_ALONE = re.compile(
    r"(?:[(\[{]?(?P<letter>[A-Da-d])[)\]}]?"
    r"|(?P<capital>[A-D])\s+(?:is|must be|would be)\s+(?:the\s+)?(?:correct|right|best|answer)"
    r"(?:\s+(?:answer|option|choice|one))?)[\s.,;:!?]*"
)
_ANOTHER = re.compile(
    r"\W*(?:(?:or|and)\b\W*)?[A-D](?=[).:\]]|\W*(?:[,/&]|or\b|and\b|\Z))|\W*[a-d]\W*\Z"
    r"|.*(?<!\w)[A-D][).:\]]|.*\bor\W+[A-D]\W*\Z",
    re.DOTALL,
)
_REFUTED = re.compile(
    r"\s*(?:(?:is|must be) (?:the )?(?:wrong|incorrect|false)"
    r"|(?:is not|isn['’]t|cannot be|can['’]t be) (?:the )?(?:correct|right|best|answer|it))\b"
)


def extract_choice(text: str) -> str | None:
    r"""The option A to D that `text` gives, by its letter: in its marked answer, or in the whole
    text where that is one line.

    The letter stands alone, "B", "(b)", "**B**", "option B", "B is correct", or is the label of an
    option whose text follows: "B. Paris", "(B) Paris", "B: Paris", "B - Paris". So "A cat", "Plan
    B", "not A" and "(A) is wrong" give none, nor do two letters ("A or B", "A) x, B) y"). A reason
    behind "because" is not read. Letters of other scripts that look like these are others.
    """
    marked = marked_answer(text)
    if (len(text) if marked is None else len(marked)) > LONGEST:
        return None
    answer = text.strip() if marked is None else marked
    if marked is None and "\n" in answer:
        return None
    for _ in range(4):
        answer = _TEXT_COMMAND.sub(r"\1", answer)
    answer = _without_bold(unwrapped(answer))
    answer = re.split(_REASON, answer, maxsplit=1, flags=re.I)[0]
    answer = unwrapped(answer[_LEAD.match(answer).end() :])
    alone = _ALONE.fullmatch(answer)
    if alone:
        return (alone["letter"] or alone["capital"]).upper()
    label = _LABELLED.match(answer)
    if label is None or any(x.match(answer, label.end()) for x in (_ANOTHER, _REFUTED)):
        return None
    return label["letter"].upper()


def choice_right(completion: str | list[dict], answer: str) -> bool:
    """Whether the option that a completion gives is `answer`, a letter.

    Raises:
        InputError: `answer` is none of A to D.
    """
    expected = extract_choice(answer)
    require(expected is not None, f"answer {answer!r:.80}: expected A, B, C or D")
    return extract_choice(written(completion)) == expected


# ------------------------------------------------------------------ rewards


def column(reward: str, name: str, values: Sequence | None, completions: Sequence) -> Sequence:
    """`values` of a column that a reward reads, one a completion, or an InputError."""
    found = len(values) if values is not None else "none"
    require(
        found == len(completions),
        f"the reward {reward!r} needs the column {name!r} with one entry for each of the "
        f"{len(completions)} completions, got {found}: add it to the rows",
    )
    return values


def answer_reward(name: str, right: Callable[..., bool]) -> Callable:
    """The reward called `name`: 1 where `right(completion, answer)`, else 0, the reference in the
    column `answer`."""

    def reward(prompts, completions, completion_ids=None, answer=None, **columns) -> list[float]:
        answers = column(name, "answer", answer, completions)
        return [float(right(*pair)) for pair in zip(completions, answers, strict=True)]

    reward.__name__ = reward.__qualname__ = name
    return reward


number_reward = answer_reward("number_reward", number_right)
choice_reward = answer_reward("choice_reward", choice_right)
