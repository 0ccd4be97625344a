"""Sudoku of 4 x 4, Countdown's sibling for planning.

The prompt is the grid, a row a line with "." for a blank, the completion the solved one. A puzzle
has 6 to 10 blanks and one solution. An item is its puzzle, and splits are made of puzzles: there
are only 288 solved grids, and most are met in every split.
"""

import random
import re
from functools import cache

from mdmrl.config import require
from mdmrl.rewards.sudoku import UNITS, extract_grid, sudoku_reward, sudoku_right
from mdmrl.tasks.base import Task
from mdmrl.tasks.items import Generator, Gym, task_of

BLANKS = (6, 10)


@cache
def grids() -> list[str]:
    """The 288 solved grids, 16 digits each."""
    found = [""]
    for cell in range(16):
        seen = {other for unit in UNITS if cell in unit for other in unit if other < cell}
        found = [g + d for g in found for d in "1234" if d not in {g[other] for other in seen}]
    return found


@cache
def holding(cell: int, digit: str) -> int:
    """Which of `grids` have the digit in the cell, a bit each."""
    return sum(1 << i for i, grid in enumerate(grids()) if grid[cell] == digit)


def solutions(puzzle: str) -> int:
    """How many grids agree with the 16 cells of a puzzle."""
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != ".":
            left &= holding(cell, digit)
    return left.bit_count()


def lines(cells: str) -> str:
    return "\n".join(cells[start : start + 4] for start in range(0, 16, 4))


def draw(rng: random.Random) -> tuple[str, dict]:
    while True:
        solution = rng.choice(grids())
        blanks = rng.sample(range(16), rng.randint(*BLANKS))
        puzzle = "".join("." if cell in blanks else solution[cell] for cell in range(16))
        if solutions(puzzle) == 1:
            return lines(puzzle), _row(puzzle, solution)


def _row(puzzle: str, solution: str) -> dict:
    solved = lines(solution)
    return {"prompt": lines(puzzle), "answer": solved, "completion": solved}


def read(fields: dict) -> dict:
    """The row of an item from elsewhere: `puzzle` and `solution`, `input` and `output`, or `prompt`
    and `answer`, each a text or lists; a blank is 0, ".", "_" or "*"."""
    names = {"input": "output", "prompt": "answer"}
    given = next((name for name in names if name in fields), "puzzle")
    wanted = names.get(given, "solution")
    puzzle, solution = _cells(fields, given), _cells(fields, wanted)
    legal = sudoku_right(solution, puzzle)
    require(legal, f"field {wanted!r} is {solution}: expected a solution of the puzzle {puzzle}")
    return _row(puzzle, solution)


def _cells(fields: dict, name: str) -> str:
    value = fields.get(name)
    cells = re.sub(r"[0_*]", ".", re.sub(r"[\s,|\[\]]", "", str(value)))
    wanted = "expected 16 cells, 1 to 4 or 0 for a blank"
    require(re.fullmatch(r"[1-4.]{16}", cells), f"field {name!r} is {value!r:.80}: {wanted}")
    return cells


def metric(completion: str, row: dict) -> bool:
    return sudoku_right(completion, row["answer"])


def task(data=None, n_shot: int = 0) -> Task:
    """For the arguments see `items.task_of`."""
    return task_of(
        Generator("sudoku", draw),
        data,
        n_shot,
        read,
        sampler={"max_new_tokens": 20, "steps": 20},
        gym=Gym("mini_sudoku", lambda item: item["metadata"], shared=True),
        rewards=[sudoku_reward],
        metric=metric,
        extract=extract_grid,
    )
