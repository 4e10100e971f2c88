"""The page of a run on images: what it holds, what it refuses, and when it speaks of a reward that is gamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_run import STEPS, UPDATES, write_image_run

from unveil.registry import UserError
from unveil.report.page import _drift, _page_data, build_page
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
    (sentence,) = data_of(run)["drift"]
    assert sentence.startswith("With ode, from update 0 to 40, held-out reward rose from 0.461 to 0.949")
    assert "distance to the nearest real image 1.15 → 1.93 (+68%); diversity 2.07 → 0.902 (-56%)" in sentence
    assert data_of(write_image_run(tmp_path / "good", gamed=False))["drift"] == []


@pytest.mark.parametrize(
    ("base", "last", "signs"),
    [
        ({"reward": 1.0, "measure/distance": 1.0}, {"reward": 2.0, "measure/distance": 1.16}, 1),
        ({"reward": 1.0, "measure/distance": 1.0}, {"reward": 2.0, "measure/distance": 1.1}, 0),
        ({"reward": 1.0, "measure/distance": 1.0}, {"reward": 0.5, "measure/distance": 2.0}, 0),
        ({"reward": 1.0, "measure/diversity": 1.0}, {"reward": 2.0, "measure/diversity": 1.5}, 0),
        ({"accuracy": 0.5, "measure/diversity": 1.0}, {"accuracy": 0.6, "measure/diversity": 0.6}, 1),
        ({"reward": -2.0, "measure/frechet": 1.0}, {"reward": -1.0, "measure/frechet": 1.6}, 1),
        ({"reward": 1.0}, {"reward": 2.0}, 0),
        ({"reward": 1.0, "measure/distance": None}, {"reward": 2.0, "measure/distance": 3.0}, 0),
    ],
)
def test_signs_of_drift(base: dict[str, Any], last: dict[str, Any], signs: int) -> None:
    lines = [{"step": 0, "decoder": "a", **base}, {"step": 9, "decoder": "a", **last}]
    assert len(_drift(lines)) == signs


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
