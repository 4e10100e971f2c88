"""Pre-training of continuous denoisers: the job whose update is a step on the matching loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unveil.denoisers.continuous import ContinuousDenoiser
from unveil.learning.matching import matching_errors, stratified
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Split
from unveil.tasks.evaluate import Evaluation
from unveil.tasks.images import image_task
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval
from unveil.training.log import RunLog
from unveil.training.rollouts import evaluate_each
from unveil.training.trainer import Job, Optimise, Trainer

_BATCH = 256
"""Held-out examples per network call."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesson:
    """N examples with the noise that is put on them: prompts, images (N, C, H, W), times and noise of each."""

    prompts: list[str]
    images: Tensor
    t: Tensor
    noise: Tensor

    def rows(self, index: Iterable[int]) -> Lesson:
        where = list(index)
        return Lesson(
            prompts=[self.prompts[place] for place in where], images=self.images[where], t=self.t[where],
            noise=self.noise[where],
        )  # fmt: skip


class MatchingJob(Job):
    """Mean over a batch of the squared error of the prediction at stratified random times."""

    def __init__(
        self, trainer: Trainer, data: DenoisingConfig, evaluation: DenoisingEval, log: RunLog, *, seed: int
    ) -> None:
        self.trainer, self.data, self.evaluation, self.log, self.seed = trainer, data, evaluation, log, seed
        assert isinstance(trainer.denoiser, ContinuousDenoiser)
        self.denoiser = trainer.denoiser
        if not data.tasks or data.file is not None or data.text is not None:
            raise UserError("data.tasks: needed for a model of images (a file of texts does not teach it)")
        if evaluation.loss:
            raise UserError(f"eval.loss: of models of text alone, got {evaluation.loss}")
        self.sources = [image_task(mixed.task, f"data.tasks.{place}") for place, mixed in enumerate(data.tasks)]
        self.task = self.sources[0] if evaluation.task is None else image_task(evaluation.task, "eval.task")
        for sampler in evaluation.decoders.values():
            sampler.check_denoiser(self.denoiser)
            sampler.check_fits(None)
        self.held_out = self.task.problems("test", evaluation.problems, seed) if evaluation.decoders else []

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        whole = self._lesson("train", self.data.batch, "update", update)
        ranks, size = self.trainer.ranks, self.trainer.optim.microbatch
        own = whole.rows(ranks.share(range(self.data.batch)))
        losses = [
            self._loss(own.rows(range(start, min(start + size, len(own.prompts)))), self.data.batch)
            for start in range(0, len(own.prompts), size)
        ]
        metrics: dict[str, Any] = optimise(losses)
        self.trainer.cost.samples += self.data.batch
        self.trainer.cost.forwards += self.data.batch
        return metrics

    def evaluate(self, update: int) -> None:
        """The loss on held-out examples, always the same ones with the same noise, and what every decoder reaches."""
        with self.trainer.evaluated(), torch.no_grad():
            self.denoiser.eval()
            lesson = self._lesson("test", self.evaluation.problems, "held out")
            parts = [range(start, min(start + _BATCH, len(lesson.prompts)))
                     for start in range(0, len(lesson.prompts), _BATCH)]  # fmt: skip
            loss = sum(float(self._loss(lesson.rows(part), len(lesson.prompts))()) for part in parts)
        if self.trainer.ranks.main:
            self.log.metrics("eval", update, {"loss": loss})

        def tell(name: str, sampler: Sampler, found: Evaluation) -> None:
            self.log.metrics("eval", update, {"decoder": name, **found.summary()})

        evaluate_each(self.evaluation.decoders, self.trainer, self.task, self.held_out, tell, seed=self.seed)

    def _lesson(self, split: Split, count: int, *name: object) -> Lesson:
        """Examples and their noise, the same on all ranks."""
        stream = generator(self.seed, "lesson", *name)
        prompts: list[str] = []
        images: list[Tensor] = []
        for place, share in enumerate(self.data.shares(count, stream)):
            if share:
                said, seen = self.sources[place].examples(
                    split, share, derive_seed(self.seed, "examples", *name, place)
                )
                prompts += said
                images.append(seen)
        matching = self.data.matching
        dropped = torch.rand(count, generator=stream) < matching.drop_prompt
        u = stratified(torch.rand(count, generator=stream, dtype=torch.float64), stream)
        return Lesson(
            prompts=["" if without else prompt for prompt, without in zip(prompts, dropped.tolist(), strict=True)],
            images=torch.cat(images),
            t=matching.times.times(u, self.denoiser.spec.process),
            noise=torch.randn(count, *self.denoiser.spec.shape, generator=stream),
        )

    def _loss(self, lesson: Lesson, batch: int) -> Callable[[], Tensor]:
        """A share of the mean over ``batch`` examples."""
        device = self.denoiser.device

        def loss() -> Tensor:
            x_0 = self.denoiser.encode(lesson.images.to(device))
            condition = self.denoiser.condition(lesson.prompts)
            errors = matching_errors(
                self.denoiser, x_0, lesson.t, lesson.noise.to(device), condition, self.data.matching.space
            )
            return errors.sum() / batch

        return loss
