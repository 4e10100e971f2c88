from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.rewards.sudoku import is_valid_grid, judge_grid, keeps_givens

PUZZLE = "3102200002100320"
SOLUTION = "3142243142131324"
NINE = "".join(str((3 * (row % 3) + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))


def all_grids() -> set[str]:
    """The 4 x 4 grids by trying every four permutations as rows, looking at columns and boxes written out."""
    grids = set()
    for a, b in product(permutations("1234"), repeat=2):
        if all(len({a[i], a[i + 1], b[i], b[i + 1]}) == 4 for i in (0, 2)):
            for c, d in product(permutations("1234"), repeat=2):
                columns = all(len({a[i], b[i], c[i], d[i]}) == 4 for i in range(4))
                if columns and all(len({c[i], c[i + 1], d[i], d[i + 1]}) == 4 for i in (0, 2)):
                    grids.add("".join(a + b + c + d))
    return grids


GRIDS = all_grids()


def test_the_valid_4x4_grids_are_the_288_known_ones_and_nothing_next_to_them() -> None:
    assert len(GRIDS) == 288
    for grid in GRIDS:
        assert is_valid_grid(grid, 4)
        for place in range(16):
            for digit in "012345":
                changed = grid[:place] + digit + grid[place + 1 :]
                assert is_valid_grid(changed, 4) == (changed in GRIDS)


def test_each_kind_of_unit_is_looked_at() -> None:
    latin_without_boxes = "1234234134124123"
    rows_and_boxes_only = "1234341212343412"
    columns_and_boxes_only = "1313242431314242"
    for grid in (latin_without_boxes, rows_and_boxes_only, columns_and_boxes_only):
        assert not is_valid_grid(grid, 4)
    assert is_valid_grid(NINE, 9)
    assert not is_valid_grid(NINE[9:18] + NINE[:9] + NINE[18:27] + NINE[27:][::-1], 9)
    assert not is_valid_grid(NINE[27:36] + NINE[9:27] + NINE[:9] + NINE[36:], 9)


@pytest.mark.parametrize("layout", ["{}", " {} ", "{}\n"])
@pytest.mark.parametrize("joint", ["", " ", "|", " | ", "\n"])
def test_layouts_of_a_right_grid(layout: str, joint: str) -> None:
    answer = layout.format(joint.join(SOLUTION))
    assert judge_grid(answer, PUZZLE, SOLUTION) == (True, True, True, 1.0)


def test_another_valid_solution_is_correct() -> None:
    puzzle = "0" * 16
    other = min(GRIDS - {SOLUTION})
    verdict = judge_grid(other, puzzle, SOLUTION)
    assert verdict.correct
    assert verdict.empty_cells_right == sum(x == y for x, y in zip(other, SOLUTION, strict=True)) / 16


def test_a_valid_grid_that_changes_a_given_is_wrong() -> None:
    other = min(GRIDS - {SOLUTION})
    assert judge_grid(other, PUZZLE, SOLUTION)[:3] == (True, False, False)


def test_partial_answers() -> None:
    empty = [place for place, cell in enumerate(PUZZLE) if cell == "0"]
    assert len(empty) == 8
    assert SOLUTION[empty[0]] == "4"
    one_wrong = SOLUTION[: empty[0]] + "1" + SOLUTION[empty[0] + 1 :]
    assert judge_grid(one_wrong, PUZZLE, SOLUTION) == (True, True, False, 7 / 8)
    given_wrong = "1" + SOLUTION[1:]
    assert judge_grid(given_wrong, PUZZLE, SOLUTION) == (True, False, False, 1.0)
    assert judge_grid(PUZZLE, PUZZLE, SOLUTION) == (False, True, False, 0.0)
    assert judge_grid(SOLUTION[:-1], PUZZLE, SOLUTION) == (False, True, False, 7 / 8)
    assert judge_grid(SOLUTION + "1", PUZZLE, SOLUTION) == (False, True, False, 1.0)
    assert judge_grid("", PUZZLE, SOLUTION) == (False, False, False, 0.0)
    assert judge_grid("5" + SOLUTION[1:], PUZZLE, SOLUTION)[0] is False


def test_givens() -> None:
    assert keeps_givens("12", "1200")
    assert not keeps_givens("1", "1200")
    assert not keeps_givens("2200", "1200")
    assert keeps_givens("", "00")


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("01234 |\n", max_size=40))
def test_no_text_raises_and_correct_means_the_only_solution(text: str) -> None:
    verdict = judge_grid(text, PUZZLE, SOLUTION)
    assert verdict.correct == ("".join(text.replace("|", "").split()) == SOLUTION)
    assert 0 <= verdict.empty_cells_right <= 1
