"""Words by a reward for reading: the embedded base model has head room, and the recipes on it run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unveil.cli.recipes import find_recipe
from unveil.denoisers.load import load_denoiser
from unveil.recipe import build, load
from unveil.rewards.networks import Reader
from unveil.tasks.evaluate import judge, sample_problems
from unveil.tasks.glyphs import Glyphs
from unveil.training.runs import PretrainRecipe, TrainRecipe, train

RECIPES = ["diffusion_nft/ocr", "flow_grpo/ocr"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_base_model_of_words_leaves_head_room_and_both_readers_agree_on_what_it_draws() -> None:
    recipe = build(TrainRecipe, load(find_recipe("diffusion_nft/ocr")))
    task, denoiser = recipe.policy.task, load_denoiser("glyphs-base")
    assert isinstance(task, Glyphs)
    problems = task.problems("test", 120, seed=1)
    sampler = recipe.eval.decoders["ode"]
    with torch.no_grad():
        trajectory = sample_problems(denoiser, problems, sampler, seed=0, needs=set(), batch_size=120)
    judged = judge(task, problems, denoiser, trajectory)
    assert 0.2 < sum(verdict.correct for verdict in judged.verdicts) / 120 < 0.75, "documented: 30 to 60 %"
    assert task.measure(problems, judged.samples)["distance"] < 2.5, "letters, not blots"
    read = Reader.open("glyphs-reward").read(torch.stack(judged.samples))
    same = sum(own == other for own, other in zip(read, task.judge.read(torch.stack(judged.samples)), strict=True))
    assert same / 120 > 0.7


def test_the_readers_agree_on_what_the_base_model_was_taught() -> None:
    (mixed,) = build(PretrainRecipe, load(find_recipe("base-glyphs"))).data.tasks
    task = mixed.task
    assert isinstance(task, Glyphs)
    settings = [build(TrainRecipe, load(find_recipe(name))).policy.task for name in RECIPES]
    plain = [Glyphs(sizes=one.sizes, pitch=one.pitch, jitter=one.jitter) for one in (task, *settings)]  # type: ignore[attr-defined]
    assert plain[0] == plain[1] == plain[2] == settings[0] == settings[1], "drawn alike, and prompts without noise"
    words, images = Glyphs(sizes=task.sizes, pitch=task.pitch, jitter=task.jitter).examples("test", 200, seed=0)
    for reader in (task.judge, Reader.open("glyphs-reward")):
        assert reader.right(images, words).float().mean() > 0.97


@pytest.mark.parametrize("name", RECIPES)
def test_two_updates_of_the_recipe(name: str, tmp_path: Path) -> None:
    small = ["policy.rollout.prompts=3", "policy.rollout.group_size=4", "eval.problems=4", "eval.shown=1", "updates=2"]
    recipe = build(TrainRecipe, load(find_recipe(name), [*small, "log.tensorboard=false"]))
    assert train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert [line["optimizer_steps"] for line in updates] == [2, 4], "two gradient steps per rollout"
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 and line["reward_failures"] == 0 for line in updates)
    assert all(0 < line["reward"] <= 1 for line in updates)
    (last,) = [line for line in lines if line["kind"] == "eval" and line["step"] == 2]
    assert {"accuracy", "score", "measure/distance"} <= set(last)
