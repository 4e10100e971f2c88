"""Teaching a network that judges images: the job whose update is a step on what a task's images show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import Denoiser
from unveil.rewards.networks import JudgeNetwork, JudgeShape
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Split, Task
from unveil.tasks.evaluate import wilson
from unveil.tasks.images import image_task
from unveil.training.log import RunLog
from unveil.training.trainer import Job, Optimise, Trainer


@dataclass(kw_only=True)
class JudgeData:
    """What a judge learns from."""

    task: Task
    """Whose images, with the prompts that they are examples of."""
    half: Split = "test"
    """Of these images: a judge learns from ``test``, the network of a reward from ``train``."""
    batch: Annotated[int, Field(ge=1)] = 128
    """Images per update."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Every image gets Gaussian noise whose deviation is drawn between 0 and this: samples are never quite clean."""


@dataclass(kw_only=True)
class JudgeEval:
    """How progress is measured: on images of the other half."""

    every: Annotated[int, Field(ge=1)] = 200
    """Updates between two evaluations."""
    images: Annotated[int, Field(ge=1)] = 1000
    """How many, drawn once, without noise."""


class Pupil(Denoiser):
    """A judge in the place of the denoiser: all that the trainer asks of either."""

    medium = "image"

    def __init__(self, network: JudgeNetwork) -> None:
        super().__init__()
        self.network = network

    def save_pretrained(self, folder: str | Path) -> None:
        self.network.save(Path(folder) / "judge.safetensors")


class JudgeJob(Job):
    """Cross-entropy of the class, or CTC of the text."""

    def __init__(self, trainer: Trainer, data: JudgeData, evaluation: JudgeEval, log: RunLog, *, seed: int) -> None:
        self.trainer, self.data, self.evaluation, self.log, self.seed = trainer, data, evaluation, log, seed
        self.task = image_task(data.task, "data.task")
        self.network: Any = trainer.denoiser.network
        other: Split = "train" if data.half == "test" else "test"
        self.held_out = self.task.examples(other, evaluation.images, derive_seed(seed, "held out"))

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        ranks = self.trainer.ranks
        prompts, images = self.task.examples(self.data.half, self.data.batch, derive_seed(self.seed, "lesson", update))
        stream = generator(self.seed, "noise", update)
        deviation = self.data.noise * torch.rand(len(images), 1, 1, 1, generator=stream)
        images = (images + deviation * torch.randn(images.shape, generator=stream)).clamp(0, 1)
        rows = ranks.share(list(range(len(prompts))))
        size = self.trainer.optim.microbatch
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        metrics: dict[str, Any] = optimise([self._loss(images, prompts, part) for part in parts])
        self.trainer.cost.samples += len(prompts)
        self.trainer.cost.forwards += len(prompts)
        return metrics

    @torch.no_grad()
    def evaluate(self, update: int) -> None:
        prompts, images = self.held_out
        self.network.eval()
        with self.trainer.evaluated():
            parts = range(0, len(prompts), 256)
            right = torch.cat([self._right(images[at : at + 256], prompts[at : at + 256]) for at in parts])
        low, high = wilson(int(right.sum()), len(right))
        accuracy = right.float().mean().item()
        if self.trainer.ranks.main:
            values = {"accuracy": accuracy, "low": low, "high": high, "problems": len(right)}
            self.log.metrics("eval", update, {"decoder": "other half", **values})

    def _right(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.network.right(images.to(self.trainer.ranks.device), prompts)

    def _loss(self, images: Tensor, prompts: list[str], rows: list[int]) -> Callable[[], Tensor]:
        share = len(rows) / self.data.batch
        own = images[rows].to(self.trainer.ranks.device)
        return lambda: self.network.loss(own, [prompts[row] for row in rows]) * share


def fresh_judge(shape: JudgeShape, task: Task, seed: int) -> Pupil:
    """An untaught judge whose weights depend on the seed alone."""
    found = image_task(task, "data.task")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return Pupil(shape.build(found.shape, found.vocabulary))
