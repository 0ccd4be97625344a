"""Sudoku of 4 x 4: rows, columns and boxes each hold 1 to 4, and the clues stay."""

from __future__ import annotations

import re

from mdmrl.config import require
from mdmrl.rewards.answers import LONGEST, answer_reward, marked_answer, unwrapped, written

UNITS = [
    *([4 * row + column for column in range(4)] for row in range(4)),
    *([4 * row + column for row in range(4)] for column in range(4)),
    *([top + i for i in (0, 1, 4, 5)] for top in (0, 2, 8, 10)),
]
_BETWEEN = re.compile(r"[\s|,+\-`]+")


def extract_grid(text: str) -> str | None:
    """The 16 digits of the grid that `text` gives, row by row: its marked answer, or the whole text
    where it is nothing else. White space, commas and the lines of a frame are not read."""
    marked = marked_answer(text)
    found = text if marked is None else marked
    cells = _BETWEEN.sub("", unwrapped(found)) if len(found) <= LONGEST else ""
    return cells if re.fullmatch("[1-4]{16}", cells) else None


def sudoku_right(completion: str | list[dict], puzzle: str) -> bool:
    """Whether a completion solves `puzzle`: 16 cells row by row, 1 to 4 or a blank (0, "." or "_");
    of several solutions each is right, and a solved puzzle has one.

    Raises:
        InputError: `puzzle` is not of this form.
    """
    clues = re.sub(r"[0._]", "0", _BETWEEN.sub("", str(puzzle)))
    require(
        re.fullmatch("[0-4]{16}", clues) is not None,
        f"sudoku {puzzle!r:.80}: expected 16 cells, 1 to 4 or 0 for a blank",
    )
    grid = extract_grid(written(completion))
    if grid is None or any(clue not in ("0", cell) for clue, cell in zip(clues, grid, strict=True)):
        return False
    return all(len({grid[cell] for cell in unit}) == 4 for unit in UNITS)


sudoku_reward = answer_reward("sudoku_reward", sudoku_right)
