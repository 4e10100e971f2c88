"""Pre-training and supervised fine-tuning: the job whose update is a step on the ELBO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.convert import Conversion
from unveil.denoisers.decoders import DecoderDenoiser
from unveil.learning.denoising import Corrupted, corrupt, elbo_loss
from unveil.learning.matching import TimeDistribution, UniformTimes
from unveil.processes.gaussian import Prediction
from unveil.registry import UserError
from unveil.samplers.base import Sampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.text import response_ids
from unveil.seeds import derive_seed, generator
from unveil.tasks.base import Task
from unveil.tasks.evaluate import Evaluation
from unveil.tasks.files import read_json_lines
from unveil.training.log import RunLog
from unveil.training.rollouts import evaluate_each
from unveil.training.trainer import Job, Optimise, Trainer

Example = tuple[str, str | list[int]]
"""A prompt and its response, as text or (cut from packed text) as tokens."""


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

    def __post_init__(self) -> None:
        if self.times.reads_grid:
            raise UserError(f"times: {self.times.name!r} are those of a sampler, and data are not sampled")


@dataclass(kw_only=True)
class DenoisingConfig:
    """What the denoiser is taught."""

    tasks: list[MixedTask] = field(default_factory=list)
    """Generated examples, mixed by weight."""
    file: str | None = None
    """JSON lines with ``prompt`` and ``completion`` instead of tasks (supervised fine-tuning on your own data)."""
    text: str | None = None
    """JSON lines with ``text`` instead: documents, an end token after each, joined and cut into full responses without
    a prompt (pre-training)."""
    response_length: Annotated[int, Field(ge=1)] = 12
    """Response positions of a model of text; shorter solutions are filled up with end tokens, learned like text."""
    batch: Annotated[int, Field(ge=1)] = 128
    """Examples per update."""
    form: Literal["time", "count"] = "count"
    """ELBO estimator of a model of text: t uniform with weight 1/t (all that networks which are told the time can use),
    or n masks uniform with the exact weight length/n."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """The loss of a model of images."""

    def shares(self, count: int, stream: torch.Generator) -> list[int]:
        """How many of ``count`` examples come from each task, drawn by weight."""
        weights = torch.tensor([mixed.weight for mixed in self.tasks])
        drawn = torch.multinomial(weights, count, replacement=True, generator=stream)
        return drawn.bincount(minlength=len(weights)).tolist()


@dataclass(kw_only=True)
class DenoisingEval:
    """How progress is measured."""

    every: Annotated[int, Field(ge=1)] = 500
    """Updates between two evaluations."""
    problems: Annotated[int, Field(ge=1)] = 256
    """Held-out problems."""
    task: Task | None = None
    """Whose problems; None: the first of ``data.tasks``."""
    loss: Annotated[int, Field(ge=0)] = 0
    """Held-out examples whose loss is logged too, in nats per token under masks that never change; 0: none."""
    file: str | None = None
    """JSON lines with ``prompt`` and ``completion`` from which they come; None: the test problems of the task."""
    decoders: dict[str, Sampler] = field(default_factory=dict)
    """Named ways to decode; none: only the loss is logged."""


class DenoisingJob(Job):
    """Mean over a batch of ELBO weight * cross-entropy of masked response tokens; prompts are never masked."""

    def __init__(
        self,
        trainer: Trainer,
        data: DenoisingConfig,
        evaluation: DenoisingEval,
        log: RunLog,
        *,
        seed: int,
        conversion: Conversion | None = None,
    ) -> None:
        """``conversion`` says over which updates the attention of a model that was autoregressive opens."""
        self.conversion = conversion or Conversion()
        self.trainer, self.data, self.evaluation, self.log, self.seed = trainer, data, evaluation, log, seed
        assert isinstance(trainer.denoiser, MaskedDenoiser)
        self.denoiser = trainer.denoiser
        if self.denoiser.spec.corruption == "uniform":
            raise UserError("model: its noise is random tokens; only networks of masks can be pre-trained")
        self.process = self.denoiser.spec.process()
        if self.denoiser.spec.time_conditioned and data.form != "time":
            raise UserError(f"data.form: should be 'time' for a network that is told the time, got {data.form!r}")
        if [bool(data.tasks), data.file is not None, data.text is not None].count(True) != 1:
            raise UserError("data: needs either tasks or a file or a text, and one of them alone")
        self.examples = _read_examples(data.file) if data.file else []
        self._check_examples(data.file, self.examples)
        self.packed = self._pack(data.text) if data.text else []
        task = evaluation.task or (data.tasks[0].task if data.tasks else None)
        if evaluation.decoders and task is None:
            raise UserError("eval.task: needed to evaluate a model that is trained on a file")
        for sampler in evaluation.decoders.values():
            sampler.check_fits(data.response_length)
            sampler.check_denoiser(self.denoiser)
        self.task = task
        self.held_out = task.problems("test", evaluation.problems, seed) if task and evaluation.decoders else []
        self.unseen = self._unseen(task) if evaluation.loss else []

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        canvas, corrupted = self._corrupted(
            self._packed(update) if self.packed else self._texts(update), "corrupt", update, 0
        )
        share, width = self.conversion.share(update), canvas.ids.shape[1]
        opened = None
        if share < 1:
            opened = torch.rand(width, width, generator=generator(self.seed, "attention", update)) < share
        # Every rank masks the whole batch and keeps its part, so that the masks do not depend on their number.
        own = self.trainer.ranks.part(len(canvas))
        canvas, corrupted = canvas.rows(own), corrupted.slice(own, torch.device("cpu"))
        batch = len(canvas)
        size = self.trainer.optim.microbatch
        losses = []
        for start in range(0, batch, size):
            part = slice(start, min(start + size, batch))
            losses.append(self._loss(canvas, corrupted, part, opened, (part.stop - start) / self.data.batch))
        metrics: dict[str, Any] = optimise(losses)
        if self.conversion.anneal:
            metrics["open"] = share
        self.trainer.cost.samples += self.data.batch
        self.trainer.cost.forwards += self.data.batch
        return metrics

    def evaluate(self, update: int) -> None:
        if self.unseen:
            with self.trainer.evaluated(), torch.no_grad(), self.trainer.autocast():
                loss = self._held_out_loss()
            if self.trainer.ranks.main:
                self.log.metrics("held_out", update, {"loss": loss, "examples": len(self.unseen)})
        if not self.held_out or self.task is None:
            return

        def tell(name: str, sampler: Sampler, found: Evaluation) -> None:
            self.log.metrics("eval", update, {"decoder": name, **found.summary()})

        evaluate_each(
            self.evaluation.decoders, self.trainer, self.task, self.held_out, tell,
            response_length=self.data.response_length, seed=self.seed,
        )  # fmt: skip

    def _corrupted(self, pairs: Sequence[Example], *parts: object) -> tuple[Canvas, Corrupted]:
        """Canvases of some examples, and their masks under the seed that the parts give."""
        prompts = [self.denoiser.encode_prompt(prompt) for prompt, _ in pairs]
        rows = []
        for _, completion in pairs:
            try:
                rows.append(self._response(completion) if isinstance(completion, str) else completion)
            except ValueError as error:
                raise UserError(f"data.response_length: {error}") from error
        canvas = Canvas.of(prompts, self.data.response_length, self.denoiser.spec, initial=rows)
        maskable = canvas.valid.clone()
        maskable[:, : canvas.prompt_width] = False
        stream = generator(self.seed, *parts)
        return canvas, corrupt(self.process, canvas.ids, maskable, form=self.data.form, generator=stream)

    def _response(self, text: str) -> list[int]:
        return response_ids(self.denoiser, text, self.data.response_length)

    def _loss(
        self, canvas: Canvas, corrupted: Corrupted, part: slice, opened: Tensor | None, share: float
    ) -> Callable[[], Tensor]:
        device = self.denoiser.device
        piece = corrupted.slice(part, device)
        x_0, valid = canvas.ids[part].to(device), canvas.valid[part].to(device)

        def loss() -> Tensor:
            if opened is None:
                return elbo_loss(self.denoiser, x_0, valid, piece) * share
            assert isinstance(self.denoiser, DecoderDenoiser)
            with self.denoiser.opening(opened):
                return elbo_loss(self.denoiser, x_0, valid, piece) * share

        return loss

    def _held_out_loss(self) -> float:
        """NELBO in nats per token of the held-out examples, attention open."""
        canvas, corrupted = self._corrupted(self.unseen, "held out")
        size, count = self.trainer.optim.microbatch, len(self.unseen)
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return sum(
            self._loss(canvas, corrupted, part, None, (part.stop - part.start) / count)().item() for part in parts
        )

    def _unseen(self, task: Task | None) -> list[Example]:
        count = self.evaluation.loss
        if self.evaluation.file is not None:
            found = _read_examples(self.evaluation.file)
        elif task is not None:
            solved = task.problems("test", count, self.seed)
            found = [(problem.prompt, problem.solution) for problem in solved if problem.solution is not None]
        else:
            raise UserError("eval.file: needed for the loss on held-out examples (or eval.task)")
        if len(found) < count:
            raise UserError(f"eval.loss: {count} held-out examples were asked for, there are {len(found)}")
        self._check_examples(self.evaluation.file or "eval.task", found[:count])
        return found[:count]

    def _pack(self, path: str) -> list[list[int]]:
        """Full responses of the documents of a file; what is left over at the end is dropped."""
        length, ids = self.data.response_length, []
        for _, record in read_json_lines(path, ("text",)):
            ids += [*self.denoiser.tokenizer.encode(record["text"]), self.denoiser.spec.end_ids[0]]
        if len(ids) < length:
            raise UserError(f"{path}: {len(ids)} tokens do not fill one response of {length} (data.response_length)")
        if (width := len(self.denoiser.encode_prompt("")) + length) > self.denoiser.spec.context_length:
            allowed = self.denoiser.spec.context_length
            raise UserError(f"data.response_length: {length}: makes canvases of {width} tokens (at most {allowed})")
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]

    def _packed(self, update: int) -> list[Example]:
        """The responses of an update that trains on text, the same on all ranks."""
        stream = torch.Generator().manual_seed(derive_seed(self.seed, "examples", update))
        index = torch.randint(len(self.packed), (self.data.batch,), generator=stream).tolist()
        return [("", self.packed[place]) for place in index]

    def _check_examples(self, path: str | None, examples: Sequence[Example]) -> None:
        """Refuse examples that do not fit before the first update, not when one happens to be drawn."""
        room = self.denoiser.spec.context_length - self.data.response_length
        for line, (prompt, completion) in enumerate(examples, start=1):
            try:
                self._response(str(completion))
            except ValueError as error:
                raise UserError(f"{path}:{line}: data.response_length: {error}") from error
            if (length := len(self.denoiser.encode_prompt(prompt))) > room:
                raise UserError(
                    f"{path}:{line}: a prompt of {length} tokens does not fit beside a response of "
                    f"{self.data.response_length} (at most {room} tokens)"
                )

    def _texts(self, update: int) -> list[Example]:
        """The (prompt, completion) pairs of an update, the same on all ranks."""
        count, seed = self.data.batch, derive_seed(self.seed, "examples", update)
        if self.examples:
            stream = torch.Generator().manual_seed(seed)
            index = torch.randint(len(self.examples), (count,), generator=stream).tolist()
            return [self.examples[place] for place in index]
        pairs: list[Example] = []
        for place, share in enumerate(self.data.shares(count, torch.Generator().manual_seed(seed))):
            for problem in self.data.tasks[place].task.problems("train", share, seed) if share else []:
                if problem.solution is None:
                    raise UserError(f"data.tasks.{place}: its problems have no solutions to learn from")
                pairs.append((problem.prompt, problem.solution))
        return pairs


def _read_examples(path: str) -> list[Example]:
    examples: list[Example] = []
    for number, record in read_json_lines(path, ("prompt", "completion")):
        for key in ("prompt", "completion"):
            if not isinstance(record[key], str):
                raise UserError(f"{path}:{number}: {key!r} should be a string, got {type(record[key]).__name__}")
        examples.append((record["prompt"], record["completion"]))
    return examples
