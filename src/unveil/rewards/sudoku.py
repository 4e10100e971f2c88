"""Judges a filled Sudoku grid. Grids are strings of size x size characters, row by row, "0" for empty."""

from __future__ import annotations

from functools import cache
from math import isqrt
from typing import NamedTuple


class GridVerdict(NamedTuple):
    """What `judge_grid` finds.

    Attributes:
        well_formed: exactly size x size cells, each a digit of 1..size.
        givens_kept: every cell that the puzzle gives is as given.
        correct: a valid complete grid that keeps the givens, be it the stored solution or another one.
        empty_cells_right: share of the puzzle's empty cells that equal the stored solution.
    """

    well_formed: bool
    givens_kept: bool
    correct: bool
    empty_cells_right: float


@cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Cell indices of all rows, columns and boxes (3 * size tuples of size indices); size is 4 or 9."""
    box = isqrt(size)
    rows = [tuple(size * row + column for column in range(size)) for row in range(size)]
    columns = list(zip(*rows, strict=True))
    boxes = [
        tuple(size * row + column for row in range(top, top + box) for column in range(left, left + box))
        for top in range(0, size, box)
        for left in range(0, size, box)
    ]
    return (*rows, *columns, *boxes)


def is_valid_grid(cells: str, size: int) -> bool:
    """Whether every row, column and box of a complete grid holds each of 1..size once."""
    if len(cells) != size * size:
        return False
    digits = set("123456789"[:size])
    return all({cells[index] for index in unit} == digits for unit in units(size))


def keeps_givens(cells: str, puzzle: str) -> bool:
    """Whether ``cells`` (of any length) equals ``puzzle`` at all non-empty cells of the puzzle."""
    return all(given in ("0", cells[index : index + 1]) for index, given in enumerate(puzzle))


def judge_grid(answer: str, puzzle: str, solution: str) -> GridVerdict:
    """Compare an answer with a puzzle that has at least one empty cell, and with its stored solution.

    White space and "|" between cells are ignored. A shorter or longer answer is compared cell by cell from
    the start, cells that are not there count as wrong. Never raises.
    """
    cells = "".join(answer.replace("|", " ").split())
    size = isqrt(len(puzzle))
    well_formed = len(cells) == len(puzzle) and set(cells) <= set("123456789"[:size])
    givens_kept = keeps_givens(cells, puzzle)
    empty = [index for index, given in enumerate(puzzle) if given == "0"]
    right = sum(cells[index : index + 1] == solution[index] for index in empty)
    correct = givens_kept and is_valid_grid(cells, size)
    return GridVerdict(well_formed, givens_kept, correct, right / len(empty))
