"""Pre-training and supervised fine-tuning: the job whose update is a step on the ELBO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.denoising import Corrupted, corrupt, elbo_loss
from unveil.learning.matching import TimeDistribution, UniformTimes
from unveil.processes.gaussian import Prediction
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.text import response_ids
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Task
from unveil.tasks.evaluate import evaluate
from unveil.tasks.files import read_json_lines
from unveil.training.log import RunLog
from unveil.training.trainer import Optimise, Trainer


@dataclass(kw_only=True)
class MixedTask:
    """One source of training examples."""

    task: Task
    """Where problems with solutions come from."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative share of examples."""


@dataclass(kw_only=True)
class MatchingConfig:
    """How a continuous denoiser is taught."""

    times: TimeDistribution = field(default_factory=UniformTimes)
    """At which times."""
    space: Prediction | None = None
    """The parameterisation whose squared error counts; None: what the network predicts."""
    drop_prompt: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of examples that are learned without their prompt, for the unconditional model of guidance."""


@dataclass(kw_only=True)
class DenoisingConfig:
    """What the denoiser is taught."""

    tasks: list[MixedTask] = field(default_factory=list)
    """Generated examples, mixed by weight."""
    file: str | None = None
    """JSON lines with ``prompt`` and ``completion`` instead of tasks (supervised fine-tuning on your own data)."""
    response_length: Annotated[int, Field(ge=1)] = 12
    """Response positions of a model of text; shorter solutions are filled up with end tokens, learned like text."""
    batch: Annotated[int, Field(ge=1)] = 128
    """Examples per update."""
    form: Literal["time", "count"] = "count"
    """ELBO estimator of a model of text: t uniform with weight 1/t (all that networks which are told the time can use),
    or n masks uniform with the exact weight length/n."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """The loss of a model of images."""


@dataclass(kw_only=True)
class DenoisingEval:
    """How progress is measured."""

    every: Annotated[int, Field(ge=1)] = 500
    """Updates between two evaluations."""
    problems: Annotated[int, Field(ge=1)] = 256
    """Held-out problems."""
    task: Task | None = None
    """Whose problems; None: the first of ``data.tasks``."""
    decoders: dict[str, Sampler] = field(default_factory=dict)
    """Named ways to decode; none: only the loss is logged."""


class DenoisingJob:
    """Mean over a batch of ELBO weight * cross-entropy of masked response tokens; prompts are never masked."""

    def __init__(
        self, trainer: Trainer, data: DenoisingConfig, evaluation: DenoisingEval, log: RunLog, *, seed: int
    ) -> None:
        self.trainer, self.data, self.evaluation, self.log, self.seed = trainer, data, evaluation, log, seed
        assert isinstance(trainer.denoiser, MaskedDenoiser)
        self.denoiser = trainer.denoiser
        if self.denoiser.spec.corruption == "uniform":
            raise UserError("model: its noise is random tokens; only networks of masks can be pre-trained")
        self.process = self.denoiser.spec.process()
        if self.denoiser.spec.time_conditioned and data.form != "time":
            raise UserError(f"data.form: should be 'time' for a network that is told the time, got {data.form!r}")
        if bool(data.tasks) == (data.file is not None):
            raise UserError("data: needs either tasks or a file, not both")
        self.examples = _read_examples(data.file) if data.file else []
        self._check_examples()
        task = evaluation.task or (data.tasks[0].task if data.tasks else None)
        if evaluation.decoders and task is None:
            raise UserError("eval.task: needed to evaluate a model that is trained on a file")
        for sampler in evaluation.decoders.values():
            sampler.check_fits(data.response_length)
            sampler.check_denoiser(self.denoiser)
        self.task = task
        self.held_out = task.problems("test", evaluation.problems, seed) if task and evaluation.decoders else []

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        ranks = self.trainer.ranks
        texts = self._texts(update)
        spec = self.denoiser.spec
        rows = []
        for _, completion in texts:
            try:
                rows.append(response_ids(self.denoiser, completion, self.data.response_length))
            except ValueError as error:
                raise UserError(f"data.response_length: {error}") from error
        prompts = [self.denoiser.encode_prompt(prompt) for prompt, _ in texts]
        canvas = Canvas.of(prompts, self.data.response_length, spec, initial=rows)
        maskable = canvas.valid.clone()
        maskable[:, : canvas.prompt_width] = False
        # Every rank masks the whole batch and keeps its part, so that the masks do not depend on their number.
        stream, own = generator(self.seed, "corrupt", update, 0), ranks.part(len(texts))
        corrupted = corrupt(self.process, canvas.ids, maskable, form=self.data.form, generator=stream)
        canvas, corrupted = canvas.rows(own), corrupted.slice(own, torch.device("cpu"))
        batch = len(canvas)
        share = batch / self.data.batch
        size = self.trainer.optim.microbatch
        losses = [
            self._loss(
                canvas,
                corrupted,
                slice(start, min(start + size, batch)),
                share * min(size, batch - start) / batch,
            )
            for start in range(0, batch, size)
        ]
        metrics: dict[str, Any] = optimise(losses)
        self.trainer.cost.samples += self.data.batch
        self.trainer.cost.forwards += self.data.batch
        return metrics

    def evaluate(self, update: int) -> None:
        if not self.held_out or self.task is None:
            return
        for name, sampler in self.evaluation.decoders.items():
            with self.trainer.evaluated():
                result = evaluate(
                    self.denoiser,
                    self.task,
                    self.held_out,
                    sampler,
                    response_length=self.data.response_length,
                    seed=self.seed,
                )
            if self.trainer.ranks.main:
                self.log.metrics("eval", update, {"decoder": name, **result.summary()})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _loss(self, canvas: Canvas, corrupted: Corrupted, part: slice, share: float) -> Callable[[], Tensor]:
        device = self.denoiser.device
        piece = corrupted.slice(part, device)
        x_0, valid = canvas.ids[part].to(device), canvas.valid[part].to(device)
        return lambda: elbo_loss(self.denoiser, x_0, valid, piece) * share

    def _check_examples(self) -> None:
        """Refuse examples that do not fit before the first update, not when one happens to be drawn."""
        room = self.denoiser.spec.context_length - self.data.response_length
        for line, (prompt, completion) in enumerate(self.examples, start=1):
            try:
                response_ids(self.denoiser, completion, self.data.response_length)
            except ValueError as error:
                raise UserError(f"{self.data.file}:{line}: data.response_length: {error}") from error
            if (length := len(self.denoiser.encode_prompt(prompt))) > room:
                raise UserError(
                    f"{self.data.file}:{line}: a prompt of {length} tokens does not fit beside a response of "
                    f"{self.data.response_length} (at most {room} tokens)"
                )

    def _texts(self, update: int) -> list[tuple[str, str]]:
        """The (prompt, completion) pairs of an update, the same on all ranks."""
        count, seed = self.data.batch, derive_seed(self.seed, "examples", update)
        if self.examples:
            stream = torch.Generator().manual_seed(seed)
            index = torch.randint(len(self.examples), (count,), generator=stream).tolist()
            return [self.examples[place] for place in index]
        weights = torch.tensor([mixed.weight for mixed in self.data.tasks])
        drawn = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))
        pairs = []
        for place, mixed in enumerate(self.data.tasks):
            share = int((drawn == place).sum())
            for problem in mixed.task.problems("train", share, seed) if share else []:
                if problem.solution is None:
                    raise UserError(f"data.tasks.{place}: its problems have no solutions to learn from")
                pairs.append((problem.prompt, problem.solution))
        return pairs


def _read_examples(path: str) -> list[tuple[str, str]]:
    examples = []
    for number, record in read_json_lines(path, ("prompt", "completion")):
        for key in ("prompt", "completion"):
            if not isinstance(record[key], str):
                raise UserError(f"{path}:{number}: {key!r} should be a string, got {type(record[key]).__name__}")
        examples.append((record["prompt"], record["completion"]))
    return examples
