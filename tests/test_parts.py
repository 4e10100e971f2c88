"""docs/parts.md says which model families use which parts as the recipes and the code's checks do."""

from __future__ import annotations

from pathlib import Path

import pytest

import parts
import tiny
from unveil.registry import UserError
from unveil.systems.gardo import NoveltyAdvantage

PAGE = Path(__file__).parent.parent / "docs" / "parts.md"


def test_the_page_shows_the_table() -> None:
    assert parts.table() in PAGE.read_text(encoding="utf-8")


def test_the_page_names_what_nothing_places() -> None:
    assert f"In no recipe, and placed by no check: {parts.left_over()}." in PAGE.read_text(encoding="utf-8")


def test_a_part_that_a_family_cannot_have_is_in_none_of_its_cells() -> None:
    possible = parts.accepted()
    assert ("likelihood", "transition") in possible[parts.IMAGES] - possible[parts.MASKED] - possible[parts.UNIFORM]
    assert ("likelihood", "reverse") in possible[parts.MASKED] & possible[parts.UNIFORM] - possible[parts.IMAGES]
    assert ("regulariser", "mean_space") in possible[parts.IMAGES] - possible[parts.MASKED]
    assert ("kernel", "flow") not in possible[parts.MASKED] | possible[parts.UNIFORM]


def test_features_of_images_are_refused_for_texts() -> None:
    with pytest.raises(UserError, match="'novelty' compares images, and the task's samples are texts"):
        tiny.policy("mdpo", advantage=NoveltyAdvantage())
