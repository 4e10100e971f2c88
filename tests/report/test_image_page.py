"""The page of a run on images: what it holds, what it refuses, and when it speaks of a reward that is gamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_run import STEPS, UPDATES, write_image_run

from unveil.registry import UserError
from unveil.report.page import _page_data, build_page
from unveil.report.run_folder import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_image_run(tmp_path / "run")


def data_of(run: Path) -> dict[str, Any]:
    return _page_data(run.name, read_run(run))


def test_the_page_holds_images_chains_and_what_is_watched(run: Path) -> None:
    data = data_of(run)
    assert {sample["step"] for sample in data["samples"]} == set(UPDATES)
    assert all(sample["image"].startswith("data:image/png;base64,") for sample in data["samples"])
    assert len(data["trajectories"][0]["steps"]) == STEPS
    assert set(data["steps"]) == {"ratio_deviation", "clip_high"}
    column = data["steps"]["ratio_deviation"]["values"][-1]
    assert len(column) == STEPS and column[-1] is None and column[0] < column[-2]
    assert {"measure/distance", "measure/diversity", "reward"} <= set(data["evals"]["ode"])
    assert data["samples"][0]["image"] in build_page(run)


def test_a_reward_that_leads_away_from_the_data_is_named(run: Path, tmp_path: Path) -> None:
    (found,) = data_of(run)["hacking"]
    start = "The reward may be gamed. With ode, the optimised reward (held-out) rises from 0.461 to 0.949"
    assert found["sentence"].startswith(start)
    assert "distance to the nearest real image rises since update 0 (from 1.15 to 1.93)" in found["sentence"]
    assert found["others"] == ["diversity falls since update 0 (from 2.07 to 0.902)"]
    assert found["keys"] == ["measure/distance", "measure/diversity"]
    assert data_of(write_image_run(tmp_path / "good", gamed=False))["hacking"] == []


def test_parts_of_the_reward_are_told_by_role_and_weight(run: Path) -> None:
    text = "policy: {reward: {name: sum, parts: {a: {role: audit, weight: -1}, b: {}}}}"
    (run / "recipe.yaml").write_text(text)
    expected = {"a": {"role": "audit", "weight": -1.0}, "b": {"role": "optimise", "weight": 1.0}}
    assert data_of(run)["parts"] == expected
    for broken in ("policy: [", "policy: {reward: jpeg}", "just a text", "policy: {reward: {parts: [1]}}"):
        (run / "recipe.yaml").write_text(broken)
        assert data_of(run)["parts"] == {}


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/a.png",
        "data:image/svg+xml;base64,AAAA",
        "data:image/png;base64,AA<AA",
        "data:text/html,<script>",
        7,
    ],
)
@pytest.mark.parametrize("name", ["samples", "trajectories"])
def test_what_is_no_png_is_refused(run: Path, name: str, image: Any) -> None:
    path = run / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    (record if name == "samples" else record["steps"][2])["image"] = image
    path.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]))
    with pytest.raises(UserError, match=rf"{name}\.jsonl' line 2.*'image' must be a data: address of a PNG"):
        build_page(run)
