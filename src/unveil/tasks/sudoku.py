"""Sudoku on 4 x 4 or 9 x 9 cells: generated puzzles with exactly one solution, or puzzles from a CSV file."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any, Literal

from unveil.registry import UserError
from unveil.rewards.arithmetic import last_answer
from unveil.rewards.sudoku import is_valid_grid, judge_grid, keeps_givens, units
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.tasks.files import choose_rows, read_csv

_DEFAULT_BLANKS = {4: 8, 9: 40}
_MAX_BLANKS = {4: 12, 9: 54}
_MAX_FUTILE_DRAWS = 5_000


@dataclass(kw_only=True)
class Sudoku(Task, name="sudoku"):
    """Prompt: all cells row by row, 0 for empty, ``3 1 0 2 ...``; response: all cells filled in.

    Generated puzzles are test where a stable hash of the solution grid says so (one tenth). With
    ``test_file``, its puzzles are kept out of train instead (of the 288 grids of 4 x 4 a file may use most).
    """

    size: Literal[4, 9] = 4
    """Cells in a row."""

    blanks: int | None = None
    """Empty cells of generated puzzles, 1-12 for size 4 and 1-54 for size 9. None: 8 and 40."""

    train_file: str | None = None
    """CSV with columns Puzzle,Solution (size x size characters each, 0 for empty) to train on."""

    test_file: str | None = None
    """CSV of the same form to test on."""

    def __post_init__(self) -> None:
        if self.size not in _MAX_BLANKS:
            raise UserError(f"sudoku.size is {self.size!r} (allowed: 4, 9)")
        if self.blanks is not None and not 1 <= self.blanks <= _MAX_BLANKS[self.size]:
            allowed = f"1 to {_MAX_BLANKS[self.size]} for size {self.size}"
            raise UserError(f"sudoku.blanks is {self.blanks} (allowed: {allowed})")

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        path = self.train_file if split == "train" else self.test_file
        if path is not None:
            rows = self._train_rows if split == "train" else self._test_rows
            return [_problem(*row) for row in choose_rows(rows, split, count, seed, path)]
        rng = random.Random(f"sudoku/{split}/{seed}")
        blanks = _DEFAULT_BLANKS[self.size] if self.blanks is None else self.blanks
        found: dict[str, Problem] = {}
        futile = 0
        while len(found) < count:
            grid = _draw_grid(self.size, rng)
            futile += 1
            if self.test_file is None and _grid_split(grid) != split:
                continue
            puzzle = _dig(grid, self.size, blanks, rng)
            if puzzle is not None and puzzle not in found and puzzle not in self._test_puzzles:
                found[puzzle] = _problem(puzzle, grid)
                futile = 0
            if futile > _MAX_FUTILE_DRAWS:
                raise UserError(
                    f"sudoku: random draws give only {len(found)} {split} puzzles with size={self.size}, "
                    f"blanks={blanks}; {count} were asked for"
                )
        return list(found.values())

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Any valid grid that keeps the givens is correct.

        Score 1 where correct, else the share of empty cells that equal the stored solution, at most that of
        one wrong cell (a grid may have all of them right and a given wrong).
        """
        puzzle = problem.answer["puzzle"]
        verdict = judge_grid(last_answer(completion), puzzle, problem.answer["solution"])
        partial = min(verdict.empty_cells_right, 1 - 1 / puzzle.count("0"))
        return Verdict(
            correct=verdict.correct,
            score=1.0 if verdict.correct else partial,
            metrics={"well_formed": float(verdict.well_formed), "givens_kept": float(verdict.givens_kept)},
        )

    def recorded(self, question: str, truth: Any) -> Problem | None:
        """``truth`` is the filled grid; the puzzle stands in the question, all cells in one word."""
        cells = self.size**2
        puzzle = re.search(rf"\b[0-{self.size}]{{{cells}}}\b", question)
        if puzzle is None or "0" not in puzzle[0] or not isinstance(truth, str) or not is_valid_grid(truth, self.size):
            raise UserError(f"should hold a puzzle of {cells} cells and its solution, got {question!r} and {truth!r}")
        return Problem(id=question, prompt=question, answer={"puzzle": puzzle[0], "solution": truth})

    @cached_property
    def _test_rows(self) -> list[tuple[str, str]]:
        return [] if self.test_file is None else _read_rows(self.test_file, self.size)

    @cached_property
    def _test_puzzles(self) -> set[str]:
        return {puzzle for puzzle, _ in self._test_rows}

    @cached_property
    def _train_rows(self) -> list[tuple[str, str]]:
        rows = [] if self.train_file is None else _read_rows(self.train_file, self.size)
        if self.test_file is None:
            return [row for row in rows if _grid_split(row[1]) == "train"]
        return [row for row in rows if row[0] not in self._test_puzzles]


def solutions(puzzle: str, size: int, rng: random.Random | None = None) -> Iterator[str]:
    """All complete grids that keep the givens of ``puzzle``, by backtracking over the most constrained cell.

    With ``rng`` the digits of a cell are tried in random order, so the first solution is a random one.
    """
    digits = (1 << size) - 1
    free = [digits] * (3 * size)
    cells = [int(cell) for cell in puzzle]
    places = _unit_indices(size)
    empty = [index for index, cell in enumerate(cells) if cell == 0]
    for index, cell in enumerate(cells):
        if cell == 0:
            continue
        if all(free[unit] >> (cell - 1) & 1 for unit in places[index]):
            for unit in places[index]:
                free[unit] ^= 1 << (cell - 1)
        else:
            return

    def search(empty: list[int]) -> Iterator[str]:
        if not empty:
            yield "".join(map(str, cells))
            return
        fewest, chosen, candidates = size + 1, -1, 0
        for index in empty:
            row, column, box = places[index]
            here = free[row] & free[column] & free[box]
            number = here.bit_count()
            if number < fewest:
                fewest, chosen, candidates = number, index, here
                if number <= 1:
                    break
        order = [digit for digit in range(1, size + 1) if candidates >> (digit - 1) & 1]
        if rng is not None:
            rng.shuffle(order)
        others = [index for index in empty if index != chosen]
        for digit in order:
            cells[chosen] = digit
            for unit in places[chosen]:
                free[unit] ^= 1 << (digit - 1)
            yield from search(others)
            for unit in places[chosen]:
                free[unit] ^= 1 << (digit - 1)

    yield from search(empty)


@cache
def _unit_indices(size: int) -> list[tuple[int, ...]]:
    """For every cell the indices of its row, column and box in `units`."""
    return [tuple(unit for unit, members in enumerate(units(size)) if index in members) for index in range(size * size)]


@cache
def _peers(size: int) -> list[tuple[int, ...]]:
    """For every cell the cells that share a row, column or box with it."""
    return [
        tuple(sorted({peer for unit in places for peer in units(size)[unit]} - {index}))
        for index, places in enumerate(_unit_indices(size))
    ]


@cache
def _all_small_grids() -> list[str]:
    return list(solutions("0" * 16, 4))


def _draw_grid(size: int, rng: random.Random) -> str:
    if size == 4:
        return rng.choice(_all_small_grids())
    return next(solutions("0" * 81, 9, rng))


def _grid_split(grid: str) -> Split:
    return "test" if zlib.crc32(grid.encode()) % 10 == 0 else "train"


def _dig(grid: str, size: int, blanks: int, rng: random.Random) -> str | None:
    """Empty ``blanks`` random cells so that the solution stays unique; None where the drawn order fails."""
    cells, left = list(grid), blanks
    order = list(range(size * size))
    rng.shuffle(order)
    for index in order:
        cells[index] = "0"
        seen = {cells[peer] for peer in _peers(size)[index]} - {"0"}
        # With one candidate left the cell is forced, so the search is not needed.
        if len(seen) == size - 1 or len(list(islice(solutions("".join(cells), size), 2))) == 1:
            left -= 1
            if left == 0:
                return "".join(cells)
        else:
            cells[index] = grid[index]
    return None


def _problem(puzzle: str, solution: str) -> Problem:
    return Problem(
        id=f"sudoku-{puzzle}",
        prompt=" ".join(puzzle),
        answer={"puzzle": puzzle, "solution": solution},
        solution=" ".join(solution),
    )


def _read_rows(path: str, size: int) -> list[tuple[str, str]]:
    """Different (puzzle, solution) of a data file, in file order."""
    rows: dict[str, str] = {}
    digits = "123456789"[:size]
    for line, row in read_csv(path, ("Puzzle", "Solution")):
        puzzle, solution = row["Puzzle"].strip(), row["Solution"].strip()
        if len(puzzle) != size * size or not set(puzzle) <= set("0" + digits):
            expected = f"{size * size} characters of 0{digits} (size={size})"
            raise UserError(f"{path}:{line}: Puzzle {puzzle[:90]!r} is not {expected}")
        if "0" not in puzzle:
            raise UserError(f"{path}:{line}: Puzzle {puzzle!r} has no empty cell (0)")
        if not is_valid_grid(solution, size):
            raise UserError(f"{path}:{line}: Solution {solution[:90]!r} is not a valid {size} x {size} grid")
        if not keeps_givens(solution, puzzle):
            raise UserError(f"{path}:{line}: Solution {solution!r} changes givens of Puzzle {puzzle!r}")
        rows.setdefault(puzzle, solution)
    return list(rows.items())
