"""Likelihood training as a job: micro-batches, mixtures, files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import tiny
from unveil.registry import UserError
from unveil.samplers.masked import MaskedSampler
from unveil.tasks.base import Problem, Split
from unveil.tasks.running_sum import RunningSum
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval, DenoisingJob, MixedTask
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer


def make(folder: Path, data: DenoisingConfig, evaluation: DenoisingEval | None = None, **optim: float) -> DenoisingJob:
    trainer = Trainer(
        tiny.denoiser(),
        OptimConfig(**{"lr": 1e-2, "max_grad_norm": 1e9, **optim}),  # type: ignore[arg-type]
        CheckpointConfig(),
        SnapshotConfig(),
        updates=10,
        eval_every=10**6,
        run=folder,
        ranks=Ranks(),
    )
    log = RunLog(folder, LogConfig(tensorboard=False))
    return DenoisingJob(trainer, data, evaluation or DenoisingEval(), log, seed=1)


@pytest.mark.parametrize("form", ["time", "count"])
def test_gradient_does_not_depend_on_the_microbatch(tmp_path: Path, form: str) -> None:
    data = DenoisingConfig(tasks=[MixedTask(task=tiny.Echo())], response_length=5, batch=18, form=form)  # type: ignore[arg-type]
    found = []
    for microbatch in (4, 7, 1000):
        job = make(tmp_path, data, microbatch=microbatch)
        metrics = job.update(0, job.trainer.optimise)
        found.append((tiny.gradients(job.denoiser), metrics["loss"]))
    whole, loss = found[-1]
    assert max(float(grad.abs().max()) for grad in whole.values()) > 1e-2
    for grads, other in found[:-1]:
        assert other == pytest.approx(loss, rel=1e-5)
        assert max(float((grads[name] - whole[name]).abs().max()) for name in whole) <= 1e-5


def test_the_loss_falls(tmp_path: Path) -> None:
    job = make(tmp_path, DenoisingConfig(tasks=[MixedTask(task=tiny.Echo())], response_length=5, batch=64))
    losses = [job.update(update, job.trainer.optimise)["loss"] for update in range(40)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


class Marked(RunningSum):
    """Problems that say where they come from."""

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return [Problem(id=f"{place}", prompt="b", answer={}, solution="b") for place in range(count)]


def test_tasks_are_mixed_by_weight(tmp_path: Path) -> None:
    data = DenoisingConfig(
        tasks=[MixedTask(task=tiny.Echo(), weight=1.0), MixedTask(task=Marked(), weight=3.0)],
        response_length=5,
        batch=128,
    )
    job = make(tmp_path, data)
    marked = sum(prompt == completion == "b" for u in range(10) for prompt, completion in job._texts(u))
    assert marked / 1280 == pytest.approx(0.75, abs=0.06)
    assert job._texts(3) == job._texts(3) != job._texts(4)


def test_a_file_teaches_its_lines(tmp_path: Path) -> None:
    lines = [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "a a a"}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = make(tmp_path, DenoisingConfig(file=str(path), response_length=5, batch=200))
    counts = Counter(job._texts(0))
    assert counts.keys() == {("a b", "c"), ("d", "a a a")} and min(counts.values()) > 60
    assert job.update(0, job.trainer.optimise)["skipped"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "completion": "a b c d a b"}, ":2: data.response_length"),
        ({"prompt": "a " * 12, "completion": "a"}, ":2: a prompt of 12 tokens"),
        ({"prompt": "a", "completion": 3}, ":2: 'completion' (must|should) be a string"),
    ],
)
def test_examples_that_do_not_fit_are_named_by_line(tmp_path: Path, line: dict[str, object], message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        make(tmp_path, DenoisingConfig(file=str(path), response_length=5))


def test_tasks_and_file_exclude_one_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="either tasks or a file"):
        make(tmp_path, DenoisingConfig())
    with pytest.raises(UserError, match="either tasks or a file"):
        make(tmp_path, DenoisingConfig(file="x", tasks=[MixedTask(task=tiny.Echo())]))


def test_a_file_needs_a_task_to_be_evaluated_on(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    evaluation = DenoisingEval(decoders={"lcr": MaskedSampler(steps=5)})
    with pytest.raises(UserError, match=r"eval\.task"):
        make(tmp_path, DenoisingConfig(file=str(path), response_length=5), evaluation)
