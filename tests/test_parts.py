"""docs/parts.md says which model families use which parts as the recipes and the code's checks do."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
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
    assert ("objective", "reinforce") in possible[parts.MASKED] & possible[parts.UNIFORM] & possible[parts.IMAGES]
    assert ("objective", "fit") in possible[parts.IMAGES] - possible[parts.MASKED] - possible[parts.UNIFORM]
    assert ("weighting", "mdpo") in possible[parts.MASKED] & possible[parts.UNIFORM] - possible[parts.IMAGES]
    assert ("group_hook", "inpaint") in possible[parts.MASKED] - possible[parts.UNIFORM] - possible[parts.IMAGES]
    assert ("advantage", "improvement") in possible[parts.IMAGES]


@pytest.mark.parametrize("method", parts.methods(), ids=lambda method: f"{method.family.split()[0]}-{method.name}")
def test_what_a_method_accepts_trains(tmp_path: Path, method: parts.Method) -> None:
    tried = [trial for trial in parts.trials() if trial.method is method]
    assert {trial.refused is None for trial in tried} == {True, False}
    for number, trial in enumerate(tried):
        if trial.refused is not None:
            key = parts.PLACES[parts.kind_of(trial.part)]
            assert "\n" not in trial.refused and f"'{trial.part.name}'" in trial.refused
            assert any(name in trial.refused for name in (key, "likelihood")), trial.refused
            continue
        job = replace(method, net=copy.deepcopy(method.net)).job(tmp_path / str(number), trial.config())
        measured = job.update(0, job.trainer.optimise)
        assert math.isfinite(measured["loss"]) and measured["skipped"] == 0, trial
        assert measured["grad_norm"] > 0 or measured["group_reward_std"] == 0, trial


def test_features_of_images_are_refused_for_texts() -> None:
    with pytest.raises(UserError, match="'novelty' compares images, and the task's samples are texts"):
        tiny.policy("mdpo", advantage=NoveltyAdvantage())
