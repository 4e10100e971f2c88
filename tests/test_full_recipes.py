"""The recipes at the papers' size: each says every key it needs, and runs two updates with sizes cut down.

The model is replaced by a toy folder in the published format; what is cut are sizes alone. Method, dtype, chat
template, adapters and gradient checkpointing are the recipe's own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import published
from unveil.cli.main import main
from unveil.recipe import build, load
from unveil.rewards.base import Metadata, Reward, Score
from unveil.samplers.decoding import DecodeRecipe
from unveil.systems import catalogue
from unveil.training.runs import TrainRecipe, train

RECIPES = Path(published.__file__).parent.parent / "src" / "unveil" / "recipes"
SYSTEMS = [system.name for system in catalogue() if system.family == "masked"]
TRAINED = [name for name in SYSTEMS if name != "first_hitting_sampler"]
LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy models, and data files of the tasks that read some."""
    root = tmp_path_factory.mktemp("full")
    published.write(root / "llada", "llada", max_sequence_length=512)
    published.write(root / "dream", "dream", max_position_embeddings=512)
    published.write(root / "mdlm", "mdlm")
    for split, first in (("train", 0), ("test", 50)):
        sums = [
            {"question": f"what is {n} + 1?", "answer": f"it is {n + 1}\n#### {n + 1}"} for n in range(first, first + 8)
        ]
        (root / f"gsm8k-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
        programs = [
            {"text": f"add {n}", "code": "def f(x): return x", "test_list": [f"assert f(1) == {n + 1}"]}
            for n in range(first, first + 8)
        ]
        (root / f"mbpp-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in programs))
    return root


def short(sampler: dict[str, Any]) -> dict[str, Any]:
    """The sampler with few steps and blocks, everything else as it is."""
    cut = dict(sampler, steps=4)
    if sampler.get("block_length") is not None:
        cut["block_length"] = LENGTH if sampler["block_length"] >= 128 else LENGTH // 2
    return cut


def cut_down(name: str, folder: Path) -> TrainRecipe:
    """The recipe as it is but for its sizes, its model and its data."""
    data = load(RECIPES / name / "full.yaml")
    model, policy = data["model"], data["policy"]
    model["path"] = str(folder / ("dream" if "DiffuCoder" in model["path"] else "llada"))
    if model.get("lora"):
        model["lora"]["rank"] = 2
    if model.get("unmask"):
        model["unmask"] |= {"heads": 2}
    rollout = policy["rollout"]
    rollout |= {"sampler": short(rollout["sampler"]), "response_length": LENGTH, "prompts": 2, "group_size": 3}
    if policy.get("filter"):
        policy["filter"] |= {"pool": 3, "decoder": short(policy["filter"]["decoder"])}
    if policy.get("groups"):
        policy["groups"] |= {"free_tail": 2, "chunk_min": 1, "chunk_max": 2, "replacements": 2}
    policy["inner_updates"] = min(policy["inner_updates"], 2)
    task = policy["task"]["name"]
    if task in ("countdown", "gsm8k"):  # the toy has a token per letter
        policy["task"]["prompt_template"] = {"countdown": "{numbers} = {target}", "gsm8k": "{question}"}[task]
    if task in ("gsm8k", "mbpp"):
        policy["task"] |= {f"{split}_file": str(folder / f"{task}-{split}.jsonl") for split in ("train", "test")}
    if policy.get("selector", {}).get("name") == "top_advantage":
        policy["selector"]["k"] = 2
    decoders = {key: short(value) for key, value in data["eval"]["decoders"].items()}
    data["eval"] |= {"problems": 2, "decoders": dict([next(iter(decoders.items()))]), "shown": 1}
    data |= {"updates": 2, "log": {"tensorboard": False}}
    data["optim"] |= {"lr": 1e-3}  # the toy's weights and bf16 would round the papers' steps away
    return build(TrainRecipe, data)


@dataclass(kw_only=True)
class Spread(Reward, name="tiny_spread"):
    """A number for every text: of a random model the tasks' own rewards are all 0, and equal groups teach nothing."""

    def scores(self, completions: list[str], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return [zlib.crc32(text.encode()) % 100 / 100 for text in completions]


def test_every_masked_system_has_one() -> None:
    assert {path.parent.name for path in RECIPES.glob("*/full.yaml")} >= set(SYSTEMS)


@pytest.mark.parametrize("name", TRAINED)
def test_two_updates(name: str, folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = cut_down(name, folder)
    recipe.policy.reward = Spread()
    assert train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert len(updates) == 2 and all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in updates)
    if recipe.policy.inner_updates == 1:
        assert updates[0]["ratio_deviation"] == 0
    before = load_file(Path(recipe.model.path) / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = any(not torch.equal(before[key].to(after[key].dtype), after[key]) for key in before)
    assert moved == (recipe.model.train != "unmask") and before.keys() == after.keys()
    assert (tmp_path / "run" / "adapter").is_dir() == (recipe.model.lora is not None)


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_user_runs_is_valid(name: str) -> None:
    data = load(RECIPES / name / "full.yaml", ["model.path=/models/LLaDA-8B-Instruct"])
    recipe = build(TrainRecipe, data)
    assert recipe.model.path == "/models/LLaDA-8B-Instruct" and recipe.model.chat and recipe.system == name
    length = recipe.policy.rollout.response_length
    for sampler in (recipe.policy.rollout.sampler, *recipe.eval.decoders.values()):
        sampler.check_fits(length)
    # Full training keeps its weights in fp32, adapters and frozen models have theirs in bf16.
    whole = recipe.model.lora is None and recipe.model.train != "unmask"
    assert recipe.model.dtype == ("fp32" if whole else "bf16")
    text = (RECIPES / name / "full.yaml").read_text()
    assert f"unveil train {name}/full model.path=/models/" in text and "Differs from" in text


def test_a_folder_that_is_not_there_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "mdpo/full", f"model.path={tmp_path}/LLaDA", "--run", str(tmp_path / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "no such folder" in errors[0] and not (tmp_path / "run").exists()


def test_the_first_hitting_recipe_decodes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = build(DecodeRecipe, load(RECIPES / "first_hitting_sampler" / "full.yaml"))
    assert recipe.response_length == recipe.sampler.steps == 1024
    changes = [f"model.path={folder / 'mdlm'}", "response_length=12", "sampler.steps=12"]
    assert main(["decode", "--recipe", "first_hitting_sampler/full", *changes, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["forwards"] == 12 and result["completions"][0]["prompt"] == ""
