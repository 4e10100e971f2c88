from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.registry import UserError, lookup
from unveil.tasks.base import Problem, Task
from unveil.tasks.sudoku import Sudoku, solutions

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
PROBLEM = Problem(id="p", prompt=" ".join(PUZZLE), answer={"puzzle": PUZZLE, "solution": SOLUTION})
GOLDEN_4 = ["2 4 0 0 0 3 0 2 3 0 2 0 0 0 3 1", "0 1 4 0 0 0 2 1 3 4 1 0 0 2 0 0"]
GOLDEN_9 = "900007000701200000020019000070340080396020010045970236000130700017692348634700190"


def is_grid(cells: str, size: int) -> bool:
    box = {4: 2, 9: 3}[size]
    marks: set[tuple[object, ...]] = set()
    for place, cell in enumerate(cells):
        row, column = divmod(place, size)
        marks |= {("row", row, cell), ("column", column, cell), ("box", row // box, column // box, cell)}
    return len(marks) == 3 * size * size


ROWS = ["".join(row) for row in permutations("1234")]
HALVES = [a + b for a, b in product(ROWS, repeat=2) if not {*a[:2]} & {*b[:2]}]
GRIDS = [upper + lower for upper, lower in product(HALVES, repeat=2) if is_grid(upper + lower, 4)]


def count_naively(cells: list[str]) -> int:
    """Number of 9 x 9 solutions, at most 2, trying 1..9 in the first empty cell."""
    if "0" not in cells:
        return 1
    place = cells.index("0")
    row, column = divmod(place, 9)
    seen = {cells[9 * row + i] for i in range(9)} | {cells[9 * i + column] for i in range(9)}
    seen |= {cells[9 * (row // 3 * 3 + i) + column // 3 * 3 + j] for i, j in product(range(3), repeat=2)}
    total = 0
    for digit in sorted({*"123456789"} - seen):
        total += count_naively([*cells[:place], digit, *cells[place + 1 :]])
        if total >= 2:
            break
    return total


def fits(grid: str, puzzle: str) -> bool:
    return all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def test_it_is_a_task_called_sudoku() -> None:
    assert lookup(Task, "sudoku") is Sudoku


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(GRIDS), st.sets(st.integers(0, 15)), st.integers(0, 15), st.sampled_from("01234"))
def test_the_solver_finds_every_solution(grid: str, holes: set[int], place: int, digit: str) -> None:
    cells = ["0" if index in holes else cell for index, cell in enumerate(grid)]
    cells[place] = digit
    puzzle = "".join(cells)
    found = list(solutions(puzzle, 4))
    assert len(found) == len(set(found))
    assert set(found) == {grid for grid in GRIDS if fits(grid, puzzle)}


@settings(max_examples=60, deadline=None)
@given(st.none() | st.integers(1, 12), st.sampled_from(["train", "test"]), st.integers())
def test_generated_4x4_puzzles_have_one_solution(blanks: int | None, split: str, seed: int) -> None:
    task = Sudoku(blanks=blanks)
    for problem in task.problems(split, 5, seed):  # type: ignore[arg-type]
        puzzle, solution = problem.answer["puzzle"], problem.answer["solution"]
        assert problem.prompt == " ".join(puzzle) and problem.solution == " ".join(solution)
        assert problem.id == f"sudoku-{puzzle}"
        assert puzzle.count("0") == (8 if blanks is None else blanks)
        assert [grid for grid in GRIDS if fits(grid, puzzle)] == [solution]
        assert task.check(problem, problem.solution).correct


@pytest.mark.parametrize(("blanks", "expected"), [(None, 40), (54, 54), (1, 1)])
def test_generated_9x9_puzzles_have_one_solution(blanks: int | None, expected: int) -> None:
    task = Sudoku(size=9, blanks=blanks)
    for problem in task.problems("train", 3, 0):
        puzzle, solution = problem.answer["puzzle"], problem.answer["solution"]
        assert puzzle.count("0") == expected
        assert is_grid(solution, 9) and fits(solution, puzzle)
        assert count_naively(list(puzzle)) == 1
        assert task.check(problem, str(problem.solution)).correct


def test_the_same_arguments_give_the_same_problems_everywhere() -> None:
    assert [p.prompt for p in Sudoku().problems("train", 2, 0)] == GOLDEN_4
    assert Sudoku(size=9).problems("test", 1, 0)[0].prompt == " ".join(GOLDEN_9)
    task = Sudoku()
    assert task.problems("train", 50, 5) == task.problems("train", 50, 5) != task.problems("train", 50, 6)
    assert task.problems("train", 50, 5)[:20] == task.problems("train", 20, 5)


def test_train_and_test_have_different_solution_grids() -> None:
    task = Sudoku()
    grids = {}
    for split in ("train", "test"):
        problems = task.problems(split, 3000, 0)
        assert len({p.id for p in problems}) == 3000
        grids[split] = {p.answer["solution"] for p in problems}
    assert not grids["train"] & grids["test"]
    assert grids["train"] | grids["test"] == set(GRIDS)
    assert 0.05 < len(grids["test"]) / 288 < 0.15


def test_more_puzzles_than_there_are() -> None:
    assert len(Sudoku(blanks=1).problems("test", 300, 0)) == 300
    message = r"sudoku: random draws give only \d+ test puzzles with size=4, blanks=1; 5000 were asked for"
    with pytest.raises(UserError, match=message):
        Sudoku(blanks=1).problems("test", 5000, 0)


@pytest.mark.parametrize(("size", "blanks"), [(4, 0), (4, 13), (9, 0), (9, 55), (4, -1)])
def test_blanks_out_of_range(size: int, blanks: int) -> None:
    with pytest.raises(UserError, match=rf"sudoku.blanks is {blanks} \(allowed: 1 to \d+ for size {size}\)"):
        Sudoku(size=size, blanks=blanks)  # type: ignore[arg-type]


def test_size_out_of_range() -> None:
    with pytest.raises(UserError, match=r"sudoku.size is 5 \(allowed: 4, 9\)"):
        Sudoku(size=5)  # type: ignore[arg-type]


def test_check_scores() -> None:
    task = Sudoku()
    right = task.check(PROBLEM, "<answer>3142|2431|\n4213|1324</answer>")
    assert (right.correct, right.score, right.metrics) == (
        True,
        1.0,
        {"well_formed": 1.0, "givens_kept": 1.0},
    )
    cell = task.check(PROBLEM, "3112243142131324")
    assert (cell.correct, cell.score, cell.metrics) == (
        False,
        7 / 8,
        {"well_formed": 1.0, "givens_kept": 1.0},
    )
    given_changed = task.check(PROBLEM, "1142243142131324")
    assert (given_changed.correct, given_changed.score) == (False, 7 / 8)
    assert given_changed.metrics == {"well_formed": 1.0, "givens_kept": 0.0}
    none = task.check(PROBLEM, "no idea")
    assert (none.correct, none.score, none.metrics) == (False, 0.0, {"well_formed": 0.0, "givens_kept": 0.0})


def test_another_valid_grid_is_correct() -> None:
    puzzle = "0" * 16
    problem = Problem(id="p", prompt=puzzle, answer={"puzzle": puzzle, "solution": SOLUTION})
    for grid in GRIDS:
        verdict = Sudoku().check(problem, grid)
        assert (verdict.correct, verdict.score) == (True, 1.0)


def test_every_single_changed_cell_is_wrong() -> None:
    for place, digit in product(range(16), "012345x"):
        changed = SOLUTION[:place] + digit + SOLUTION[place + 1 :]
        verdict = Sudoku().check(PROBLEM, changed)
        assert verdict.correct == (changed == SOLUTION)
        assert (verdict.score == 1) == verdict.correct


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("01234 |\n<answer>/{}", max_size=40))
def test_check_never_raises(text: str) -> None:
    verdict = Sudoku().check(PROBLEM, text)
    assert 0 <= verdict.score <= 1
    assert (verdict.score == 1) == verdict.correct


def write(tmp_path: Path, *rows: str, name: str = "data.csv") -> str:
    path = tmp_path / name
    path.write_text("\n".join(("Puzzle,Solution", *rows)) + "\n")
    return str(path)


def test_a_test_file_is_read_in_order_and_its_puzzles_are_kept_out_of_train(tmp_path: Path) -> None:
    one_blank = [f"{grid[:place]}0{grid[place + 1 :]},{grid}" for grid in GRIDS for place in range(16)]
    held_out, rest = one_blank[:4000:2], {row[:16] for row in one_blank[1:4000:2] + one_blank[4000:]}
    task = Sudoku(blanks=1, test_file=write(tmp_path, *held_out, held_out[0]))
    problems = task.problems("test", 2000, 5)
    assert [f"{p.answer['puzzle']},{p.answer['solution']}" for p in problems] == held_out
    assert problems[0].solution == " ".join(GRIDS[0])
    with pytest.raises(UserError, match=r"data\.csv: holds 2000 different test problems, 2001 were asked for"):
        task.problems("test", 2001, 0)
    train = task.problems("train", 2000, 0)
    assert {p.answer["puzzle"] for p in train} <= rest
    assert {p.answer["solution"] for p in train} == set(GRIDS)


def test_a_train_file_is_shuffled_and_leaves_out_what_is_test(tmp_path: Path) -> None:
    rows = [f"0{grid[1:]},{grid}" for grid in GRIDS]
    task = Sudoku(train_file=write(tmp_path, *rows))
    train = task.problems("train", 200, 0)
    assert len({p.id for p in train}) == 200
    assert train != task.problems("train", 200, 1)
    tested = {p.answer["solution"] for p in task.problems("test", 500, 0)}
    assert not tested & {p.answer["solution"] for p in train}
    with pytest.raises(UserError, match=rf"data\.csv: holds {288 - len(tested)} different train problems, 288"):
        task.problems("train", 288, 0)
    test_file = write(tmp_path, *rows[10:20], name="test.csv")
    both = Sudoku(train_file=str(tmp_path / "data.csv"), test_file=test_file)
    assert {p.answer["solution"] for p in both.problems("train", 278, 0)} == {*GRIDS[:10], *GRIDS[20:]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{PUZZLE[1:]},{SOLUTION}", r"Puzzle '102.*' is not 16 characters of 01234 \(size=4\)"),
        (f"5{PUZZLE[1:]},{SOLUTION}", "Puzzle '5102.*' is not 16 characters"),
        (f".{PUZZLE[1:]},{SOLUTION}", r"Puzzle '\.102.*' is not 16 characters"),
        (f"{SOLUTION},{SOLUTION}", r"Puzzle '3142.*' has no empty cell \(0\)"),
        (f"{PUZZLE},{SOLUTION[:-1]}", "Solution '3142.*' is not a valid 4 x 4 grid"),
        (f"{PUZZLE},{PUZZLE}", "Solution '3102.*' is not a valid 4 x 4 grid"),
        (f"{PUZZLE},{SOLUTION[:-1]}1", "Solution '3142.*' is not a valid 4 x 4 grid"),
        (f"{PUZZLE},{GRIDS[0]}", "Solution '1234.*' changes givens of Puzzle '3102.*'"),
        (PUZZLE, "1 fields, the header has 2"),
    ],
)
def test_broken_rows_are_named_with_their_line(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path, f"{PUZZLE},{SOLUTION}", row)
    with pytest.raises(UserError, match=rf"data\.csv:3: {message}"):
        Sudoku(test_file=path).problems("test", 1, 0)
    with pytest.raises(UserError, match=rf"data\.csv:3: {message}"):
        Sudoku(train_file=path).problems("train", 1, 0)
