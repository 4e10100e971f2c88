"""Judges are taught by the common trainer: what they learn, resuming, files, recipes that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unveil.cli.main import main
from unveil.recipe import RecipeError, build
from unveil.registry import UserError
from unveil.rewards.networks import Classifier, ClassifierShape, Reader, ReaderShape
from unveil.tasks.digits import Digits
from unveil.training.runs import JudgeRecipe, teach

TINY = {
    "judge": {"name": "classifier", "channels": [4], "hidden": 16},
    "data": {"task": "digits", "half": "train", "batch": 32},
    "eval": {"every": 30, "images": 200},
    "optim": {"lr": 0.01, "betas": [0.9, 0.999], "microbatch": 16},
    "checkpoint": {"every": 15},
    "log": {"tensorboard": False},
    "updates": 60,
}


def accuracies(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["accuracy"] for line in lines if line["kind"] == "eval"]


def test_a_judge_learns_and_is_saved_as_one_file(tmp_path: Path) -> None:
    assert teach(build(JudgeRecipe, TINY), tmp_path / "run")
    before, *_, after = accuracies(tmp_path / "run")
    assert before < 0.3 < 0.8 < after
    judge = Classifier.open(tmp_path / "run" / "model" / "judge.safetensors")
    prompts, images = Digits().examples("test", 300, 5)
    assert judge.right(images, prompts).float().mean() > 0.8
    assert judge.names == Digits().vocabulary and not any(p.requires_grad for p in judge.parameters())


def test_a_resumed_lesson_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    teach(build(JudgeRecipe, TINY | {"updates": 30}), whole)
    teach(build(JudgeRecipe, TINY | {"updates": 15}), part)
    teach(build(JudgeRecipe, TINY | {"updates": 30}), part, resume=True)
    one, two = (Classifier.open(run / "model" / "judge.safetensors").state_dict() for run in (whole, part))
    assert all(one[name].equal(two[name]) for name in one)


def test_the_gradient_does_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    settings = TINY | {"updates": 3}
    for size in (32, 5):
        optim = {**TINY["optim"], "microbatch": size}  # type: ignore[dict-item]
        teach(build(JudgeRecipe, settings | {"optim": optim}), tmp_path / str(size))
    one, two = (Classifier.open(tmp_path / name / "model" / "judge.safetensors").state_dict() for name in ("32", "5"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 2e-3


def test_the_command_teaches_by_the_recipe_s_own_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["updates=2", "eval.images=20", "data.batch=4", "log.tensorboard=false"]
    assert main(["pretrain", "judge-digits", *small, "--run", str(tmp_path / "r"), "--quiet", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["status"] == "finished" and answer["table"]["problems"] == 20
    assert main(["pretrain", "judge-digits", "judge.chanels=[4]", "--print"]) == 2
    assert "did you mean 'channels'?" in capsys.readouterr().err


def test_a_judge_of_texts_is_refused() -> None:
    with pytest.raises(UserError, match="'countdown' has texts, needed are images"):
        teach(build(JudgeRecipe, TINY | {"data": {"task": "countdown"}}), Path("nowhere"))
    with pytest.raises(RecipeError, match=r"judge\.name: .*'reder', did you mean 'reader'"):
        build(JudgeRecipe, TINY | {"judge": "reder"})


def test_losses_are_mean_negative_log_probabilities() -> None:
    torch.manual_seed(0)
    classifier = ClassifierShape(channels=[2], hidden=3).build([1, 4, 4], ["x", "y"])
    images = torch.rand(5, 1, 4, 4)
    labels = [0, 1, 1, 0, 1]
    want = -classifier(images).log_softmax(-1)[range(5), labels].mean()
    assert classifier.loss(images, ["xy"[label] for label in labels]).item() == pytest.approx(want.item(), rel=1e-5)
    reader: Reader = ReaderShape(channels=[2], hidden=4, alphabet="AB").build([1, 4, 3], [])
    columns = reader(images[:1, :, :, :3]).exp()[0]
    a, b, gap = columns.unbind(-1)
    # All ways of writing A, then B, into three columns.
    ways = [(a, b, gap), (a, gap, b), (gap, a, b), (a, a, b), (a, b, b)]
    chance = sum(one[0] * two[1] * three[2] for one, two, three in ways)
    # CTC's mean is over texts, each divided by its length.
    assert reader.loss(images[:1, :, :, :3], ["AB"]).item() == pytest.approx(-chance.log().item() / 2, rel=1e-4)
