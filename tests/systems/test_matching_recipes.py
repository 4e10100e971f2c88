"""The recipes of DiffusionNFT and AWM at the papers' size make two updates of a toy in the published format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import tiny
from unveil.cli.recipes import find_recipe
from unveil.recipe import build, load
from unveil.training.runs import TrainRecipe, train


@pytest.mark.parametrize("name", ["diffusion_nft", "awm"])
def test_two_updates(tmp_path: Path, name: str) -> None:
    """What is cut are sizes alone; the rewards need published weights, and statistics of pixels stand for them."""
    tiny("sd3").save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("".join(f"{word}\n" for word in "abcdefghijklmnopqrst"))
    data: dict[str, Any] = load(find_recipe(f"{name}/full"))
    data["model"] |= {"path": str(tmp_path / "sd3"), "pipeline": {"resolution": 16}}
    data["model"]["lora"] |= {"rank": 2}
    policy = data["policy"]
    policy["task"] |= {"train_file": str(tmp_path / "prompts.txt"), "judge": {"name": "pixels", "statistic": "brightness"}}
    policy["reward"] = {"name": "pixels", "statistic": "brightness"}
    policy["rollout"] |= {"prompts": 2, "group_size": 3}
    data["eval"] |= {"problems": 1, "decoders": {"ode": {"name": "latent", "steps": 2}}, "shown": 1}
    data |= {"updates": 2, "log": {"tensorboard": False}}
    run = tmp_path / "run"
    train(build(TrainRecipe, data), run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert len(updates) == 2 and all(0 < line["grad_norm"] < 1e3 for line in updates)
