"""A run that was stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.transformer import TransformerConfig
from unveil.learning.regularisers import Kl
from unveil.registry import UserError
from unveil.samplers.masked import MaskedSampler
from unveil.systems.mdpo import OverDenoising
from unveil.training.checkpoints import list_checkpoints
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval, MixedTask
from unveil.training.log import LogConfig
from unveil.training.runs import NewModel, PretrainRecipe, pretrain, train
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig


def mdpo(folder: Path, updates: int) -> Any:
    choice = OverDenoising(decoder=MaskedSampler(steps=5), pool=12, every=4)
    return tiny.recipe(
        folder,
        "mdpo",
        updates,
        policy={"filter": choice, "kl": Kl(beta=0.3, estimator="k2")},
        snapshots=SnapshotConfig(ema_decay=0.8),
    )


def diffu_grpo(folder: Path, updates: int) -> Any:
    snapshots = SnapshotConfig(reference_sync=2, reference_mix=0.6)
    return tiny.recipe(folder, "diffu_grpo", updates, policy={"inner_updates": 2}, snapshots=snapshots)


def pretraining(folder: Path, updates: int) -> PretrainRecipe:
    shape = TransformerConfig(dim=16, layers=1, heads=2, hidden=16, context_length=16)
    return PretrainRecipe(
        model=NewModel(transformer=shape, largest_number=1, words=tiny.WORDS),
        data=DenoisingConfig(tasks=[MixedTask(task=tiny.Echo())], response_length=5, batch=16),
        eval=DenoisingEval(every=2, problems=4, decoders={"lcr": MaskedSampler(steps=5)}),
        optim=OptimConfig(lr=1e-2, warmup=2),
        checkpoint=CheckpointConfig(every=100, keep=2),
        snapshots=SnapshotConfig(ema_decay=0.8),
        log=LogConfig(tensorboard=False),
        updates=updates,
    )


RUNS = {"mdpo": (mdpo, train), "diffu_grpo": (diffu_grpo, train), "pretrain": (pretraining, pretrain)}


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    if not (run / name).is_file():
        return []
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def assert_same_run(left: Path, right: Path) -> None:
    assert tiny.same(tiny.newest(left), tiny.newest(right)) == []
    for name in ("metrics.jsonl", "samples.jsonl", "trajectories.jsonl"):
        assert lines(left, name) == lines(right, name)
    assert lines(left, "metrics.jsonl")
    models = [load_denoiser(run).state_dict() for run in (left, right)]
    assert tiny.same(*map(dict, models)) == []


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_equals_uninterrupted(tmp_path: Path, kind: str) -> None:
    make, program = RUNS[kind]
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert program(make(tmp_path, 6), whole)
    assert program(make(tmp_path, 3), split)
    early = tiny.newest(split)
    assert program(make(tmp_path, 6), split, resume=True)
    # A run of 3 updates evaluates at its last one; that line is no part of the longer run.
    evaluated = [line for line in lines(split, "metrics.jsonl") if (line["kind"], line["step"]) == ("eval", 3)]
    assert evaluated
    for name in ("metrics.jsonl", "samples.jsonl", "trajectories.jsonl"):
        if (split / name).is_file():
            kept = [
                line
                for line in (split / name).read_text().splitlines()
                if json.loads(line)["step"] != 3 or json.loads(line).get("kind") == "train"
            ]
            (split / name).write_text("".join(line + "\n" for line in kept))
    assert_same_run(whole, split)
    assert tiny.same(early["weights"], tiny.newest(split)["weights"])  # it went on


@pytest.mark.parametrize("kind", RUNS)
def test_ctrl_c_finishes_the_update_and_resumes(tmp_path: Path, kind: str) -> None:
    make, program = RUNS[kind]
    whole, split = tmp_path / "whole", tmp_path / "split"

    def interrupt(update: int, metrics: dict[str, Any]) -> None:
        if update == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert program(make(tmp_path, 6), whole)
    assert program(make(tmp_path, 6), split, progress=interrupt) is False
    assert [path.name for path in list_checkpoints(split / "checkpoints")] == ["update-000003"]
    assert json.loads((split / "run.json").read_text())["status"] == "interrupted"
    assert not (split / "model").exists()
    assert program(make(tmp_path, 6), split, resume=True)
    assert_same_run(whole, split)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_snapshots_are_part_of_the_comparison(tmp_path: Path) -> None:
    """The average and the reference really move, so that the tests above can notice a lost one."""
    train(mdpo(tmp_path, 3), tmp_path / "mdpo")
    train(diffu_grpo(tmp_path, 3), tmp_path / "diffu")
    for run, name in (("mdpo", "ema"), ("diffu", "reference")):
        state = tiny.newest(tmp_path / run)
        base = dict(tiny.denoiser().named_parameters())
        moved = [key for key, value in state["snapshots"][name].items() if not torch.equal(value, base[key])]
        assert moved
        assert tiny.same(state["snapshots"][name], state["weights"])
    assert tiny.newest(tmp_path / "mdpo")["job"]["pool"]


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    recipe = diffu_grpo(tmp_path, 2)
    train(recipe, tmp_path / "run")
    before, text = tiny.newest(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(recipe, tmp_path / "run", resume=True)
    assert tiny.same(before, tiny.newest(tmp_path / "run")) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == text


def test_occupied_and_missing_folders_are_refused(tmp_path: Path) -> None:
    recipe = diffu_grpo(tmp_path, 1)
    with pytest.raises(UserError, match="not a run folder"):
        train(recipe, tmp_path / "nothing", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="occupied"):
        train(recipe, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_checkpoint_of_another_architecture_is_refused_and_left_alone(tmp_path: Path) -> None:
    train(diffu_grpo(tmp_path, 1), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    recipe = diffu_grpo(tmp_path, 2)
    shape = TransformerConfig(dim=8, layers=1, heads=2, hidden=16, context_length=16)
    from unveil.denoisers.transformer import TransformerDenoiser

    TransformerDenoiser(shape, tiny.denoiser().tokenizer).save_pretrained(tmp_path / "small")
    recipe.model.path = str(tmp_path / "small")
    with pytest.raises(UserError, match="another architecture"):
        train(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
