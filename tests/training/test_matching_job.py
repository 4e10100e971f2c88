"""Pre-training of image models through the ordinary training loop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unveil.denoisers.image import ImageDenoiser
from unveil.denoisers.load import load_denoiser
from unveil.recipe import build
from unveil.registry import UserError
from unveil.tasks.base import Problem, Verdict
from unveil.tasks.images import ImageTask
from unveil.training.runs import PretrainRecipe, pretrain


@dataclass(kw_only=True)
class Halves(ImageTask, name="test_halves"):
    """Images (1, 4, 4) that are light on the side that the prompt names."""

    shape = (1, 4, 4)
    vocabulary = ["left", "right"]  # noqa: RUF012

    def examples(self, split: str, count: int, seed: int) -> tuple[list[str], Tensor]:
        right = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
        images = torch.zeros(count, 1, 4, 4)
        images[~right, :, :, :2] = 1
        images[right, :, :, 2:] = 1
        return ["right" if side else "left" for side in right.tolist()], images

    def problems(self, split: Any, count: int, seed: int) -> list[Problem]:
        return [Problem(id=f"{split}-{place}", prompt="left", answer={}) for place in range(count)]

    def check(self, problem: Problem, completion: Any) -> Verdict:
        return Verdict(correct=False, score=0.0)


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"image": {"network": {"name": "dit", "dim": 32, "layers": 1, "heads": 2, "hidden": 64}}},
        "data": {"tasks": [{"task": "test_halves"}], "batch": 64, **changes.pop("data", {})},
        "eval": {"every": 60, "problems": 64},
        "optim": {"lr": 3e-3, "microbatch": 64, **changes.pop("optim", {})},
        "snapshots": {"ema_decay": 0.9},
        "log": {"tensorboard": False},
        "updates": 120,
        **changes,
    }


def fitted(data: dict[str, Any], run: Path, **how: Any) -> ImageDenoiser:
    assert pretrain(build(PretrainRecipe, data), run, **how)
    model = load_denoiser(run / "model")
    assert isinstance(model, ImageDenoiser)
    return model


def held_out(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "eval"]


def test_a_model_learns_its_prompts_and_the_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    model = fitted(recipe(), tmp_path / "whole")
    losses = held_out(tmp_path / "whole")
    assert losses[0] == pytest.approx(2.0, abs=0.1)  # u = eps - x_0 has variance 1 + 1, and the network says 0
    assert losses[2] < 0.7 * losses[0]
    # From pure noise the guess is the mean of the data under the prompt.
    noise = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sides = {}
    for prompt in ("left", "right", ""):
        with torch.no_grad():
            x0 = model.guess(noise, torch.ones(32), model.condition([prompt] * 32)).x0.mean((0, 1, 2))
        sides[prompt] = float(x0[:2].mean() - x0[2:].mean())
    assert sides["left"] > 0.8
    assert sides["right"] < -0.8
    assert abs(sides[""]) < 0.6

    fitted(recipe(updates=60), tmp_path / "parts")
    path = tmp_path / "parts" / "recipe.yaml"
    path.write_text(path.read_text().replace("updates: 60", "updates: 120"))
    parts = fitted(recipe(), tmp_path / "parts", resume=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_the_gradient_does_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    models = [fitted(recipe(updates=1, optim={"microbatch": size}), tmp_path / str(size)) for size in (64, 24)]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"tasks": [{"task": "countdown"}]}}, "data.tasks.0: 'countdown' has texts, needed are images"),
        ({"data": {"tasks": []}}, "data.tasks: needed for a model of images"),
        ({"model": {"image": {"network": {"name": "dit", "patch": 3}}}}, "model.image.network.patch: 3 does not"),
        ({"model": {"image": {"network": "unet", "prediction": "edm"}}}, "model.image.prediction: .*'edm' is not"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        pretrain(build(PretrainRecipe, recipe(**changes)), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
