"""The image recipes at the papers' size, as ``test_full_recipes.py``: two updates on a tiny pipeline of the right kind.

One module, because it takes seconds to import ``diffusers``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pipelines
from unveil.cli.main import main
from unveil.recipe import build, load
from unveil.systems import catalogue
from unveil.training.runs import TrainRecipe, train

RECIPES = Path(pipelines.__file__).parent.parent / "src" / "unveil" / "recipes"
FULL = [system.name for system in catalogue() if (RECIPES / system.name / "full.yaml").is_file()]
IMAGE = [system.name for system in catalogue() if system.family == "image" and system.name in FULL]
KINDS = {
    "CompVis/stable-diffusion-v1-4": "sd",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines and a file of prompts."""
    root = tmp_path_factory.mktemp("full")
    for kind in set(KINDS.values()):
        pipelines.tiny(kind).save_pretrained(root / kind)
    (root / "prompts.txt").write_text("".join(f"{number} cats\n" for number in range(60)))
    return root


def without_large_networks(data: Any) -> Any:
    """Plug-ins that would open a published network, replaced by some that look at pixels."""
    if not isinstance(data, dict):
        return data
    if data.get("name") in ("clip", "image_reward", "aesthetic"):
        return {"name": "pixels", "statistic": "brightness"}
    if data.get("name") == "vision":
        return {"name": "pixels"}
    return {key: without_large_networks(value) for key, value in data.items()}


def cut_down(name: str, folder: Path) -> TrainRecipe:
    """The recipe as it is but for its sizes, its model, its data and rewards that are large networks."""
    data = load(RECIPES / name / "full.yaml")
    model, policy = data["model"], data["policy"]
    model["path"] = str(folder / KINDS[model["path"]])
    model["pipeline"] |= {"resolution": 16} | ({"prompt_tokens": 12} if "prompt_tokens" in model["pipeline"] else {})
    model["lora"]["rank"] = 2
    policy["task"] |= {"train_file": str(folder / "prompts.txt")}
    policy |= {key: without_large_networks(policy[key]) for key in ("task", "reward", "advantage") if key in policy}
    if policy["likelihood"].get("draws"):
        policy["likelihood"]["draws"] = 2
    rollout = policy["rollout"]
    samplers = [rollout["sampler"], *data["eval"]["decoders"].values()]
    for sampler in samplers:
        sampler["steps"] = 4
        if sampler.get("window", {}).get("name") == "suffix":
            sampler["window"] |= {"first": 3, "last": 4, "stages": 2}
            sampler["branches"] = 3
    rollout |= {"prompts": 3, "group_size": 6 if "branches" in rollout["sampler"] else 2, "batch_size": 12}
    data["eval"] |= {"problems": 2, "shown": 1}
    data["optim"] |= {"lr": 1e-2, "microbatch": 64}
    return build(TrainRecipe, data | {"updates": 2, "log": {"tensorboard": False}})


@pytest.mark.parametrize("name", IMAGE)
def test_two_updates(name: str, folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = cut_down(name, folder)
    assert train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert len(updates) == 2 and all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in updates)
    steps = recipe.policy.minibatches * recipe.policy.inner_updates
    assert [line["optimizer_steps"] for line in updates] == [steps, 2 * steps]
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    part = "unet" if (Path(recipe.model.path) / "unet").is_dir() else "transformer"
    before, after = (
        load_file(path / part / "diffusion_pytorch_model.safetensors")
        for path in (Path(recipe.model.path), tmp_path / "run" / "model")
    )
    moved = {key for key, value in before.items() if not torch.equal(value.to(after[key].dtype), after[key])}
    assert moved and all("attn" in key for key in moved) and before.keys() == after.keys()


def test_a_pipeline_is_evaluated(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ("task.judge={name: pixels, statistic: brightness}", "task.solved_at=0.4")
    task = (
        "--task",
        "prompts",
        f"task.train_file={folder / 'prompts.txt'}",
        *judge,
        "--problems",
        "3",
        "--samples",
        "2",
    )
    how = ("pipeline.resolution=16", "--steps", "2", "--grids", "table:offset=1", "--guidance", "none,2")
    argv = ["eval", str(folder / "sd"), *task, *how, "--rewards", "jpeg", "--json"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)["results"]
    assert [line["forwards_per_sample"] for line in told] == [2, 4] and all(0 < line["score"] < 1 for line in told)
    assert len(list((tmp_path / "out" / "images" / "01").iterdir())) == 6
    assert main([argv[0], argv[1], *task, "--json"]) == 2
    assert "--steps: required, for the model comes without a recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", IMAGE)
def test_what_a_user_runs_is_valid(name: str) -> None:
    recipe = build(TrainRecipe, load(RECIPES / name / "full.yaml", ["model.path=/models/pipeline"]))
    assert recipe.system == name and recipe.model.dtype == "bf16" and recipe.model.lora is not None
    samplers: list[Any] = [recipe.policy.rollout.sampler, *recipe.eval.decoders.values()]
    for sampler in samplers:
        sampler.check_fits(None)
    branches = getattr(samplers[0], "branches", None)
    assert branches is None or recipe.policy.rollout.group_size % branches == 0
    text = (RECIPES / name / "full.yaml").read_text()
    assert f"unveil train {name}/full model.path=/models/" in text and "Differs from" in text
