"""The one training loop: updates, gradient steps, checkpoints, interruption, resume.

A *job* says what an update is (a policy update, a likelihood update); the trainer knows nothing of rewards or canvases.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import Denoiser
from unveil.registry import UserError
from unveil.training.checkpoints import list_checkpoints, load_state, save_checkpoint, write_folder
from unveil.training.distribution import Ranks
from unveil.training.log import Cost, RunLog
from unveil.training.lora import Adapter
from unveil.training.sharding import Shards, own_part, whole
from unveil.training.snapshots import SnapshotConfig, Snapshots


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    unmask_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak of the learned unmasking rule, on the same schedule; None: that of everything else."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or falling to ``final_lr`` times the peak at the last update."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """End of a falling schedule, as a share of the peak."""
    decay_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the updates after which the learning rate begins to fall (warm-up, stable, decay)."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Updates of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    microbatch: Annotated[int, Field(ge=1)] = 128
    """Canvases per backward pass; the gradient does not depend on it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the network under autocast; log-probabilities are fp32 in any case."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 3
    """Gradient steps in a row with a nan or inf in loss or gradient after which the run stops; each is skipped and
    reported."""

    def lr_at(self, update: int, updates: int) -> float:
        """Learning rate of an update, 0-based."""
        if update < self.warmup:
            return self.lr * (update + 1) / (self.warmup + 1)
        start = max(self.warmup, round(self.decay_from * updates))
        if self.schedule == "constant" or update <= start:
            return self.lr
        done = (update - start) / max(1, updates - start)
        shape = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final_lr + (1 - self.final_lr) * shape)


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to write checkpoints."""

    every: Annotated[int, Field(ge=1)] = 25
    """Updates between two checkpoints; the last update always writes one."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many to keep."""


class NumericalError(Exception):
    """Loss or gradient were nan or inf too often in a row."""


Loss = Callable[[], Tensor]
Optimise = Callable[[Iterable[Loss]], dict[str, float]]


class Job(Protocol):
    """What the loop repeats."""

    def update(self, update: int, optimise: Optimise) -> dict[str, Any]:
        """Do update number ``update`` (0-based): call ``optimise`` once per gradient step with the losses whose sum
        is to be minimised, each a closure that runs one micro-batch. Returns metrics."""
        ...

    def evaluate(self, update: int) -> None:
        """Measure and log after ``update`` finished updates; 0 is before training."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond weights, optimiser and snapshots."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        return


class Trainer:
    """Runs a job on a denoiser."""

    def __init__(
        self,
        denoiser: Denoiser,
        optim: OptimConfig,
        checkpoints: CheckpointConfig,
        snapshots: SnapshotConfig,
        *,
        updates: int,
        eval_every: int,
        run: Path,
        ranks: Ranks,
        adapter: Adapter | None = None,
        keep_reference: bool = False,
        shards: Shards | None = None,
    ) -> None:
        self.denoiser, self.optim, self.checkpoints = denoiser, optim, checkpoints
        self.updates, self.eval_every, self.run, self.ranks = updates, eval_every, run, ranks
        self.adapter, self.shards = adapter, shards
        kept = keep_reference and (adapter is None or snapshots.moves_reference)
        self.snapshots = Snapshots(denoiser, snapshots, keep_reference=kept)
        # Taken while the weights are split: the network's own parameters are others when they are whole.
        self.named = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=optim.lr, betas=optim.betas)
        self.cost = Cost()
        self.done = 0
        self.bad_steps = 0
        self.interrupted = False
        if shards is not None:
            shards.join()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not; a learned unmasking rule may have a learning rate of its own."""
        own = set() if self.denoiser.unmask is None else set(self.denoiser.unmask.parameters())
        scale = (self.optim.unmask_lr or self.optim.lr) / self.optim.lr
        groups: list[dict[str, Any]] = []
        parts = [(1.0, [p for p in self.parameters if p not in own])]
        if own:
            parts.append((scale, [p for p in self.parameters if p in own]))
        for factor, parameters in parts:
            decayed, other = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
            groups += [
                {"params": decayed, "weight_decay": self.optim.weight_decay, "scale": factor},
                {"params": other, "weight_decay": 0.0, "scale": factor},
            ]
        return groups

    def reference(self) -> Any:
        """Context in which the denoiser is the reference policy."""
        if self.adapter is not None and "reference" not in self.snapshots.sets:
            return self.adapter.off()
        return self._using("reference")

    def using(self, name: str) -> Any:
        """Context in which the denoiser is a snapshot, or the ``policy`` as it is."""
        return self.reference() if name == "reference" else self._using(name)

    def evaluated(self) -> Any:
        """Context in which the denoiser is what gets evaluated and saved (the average where one is kept)."""
        return self._using("ema")

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        if self.shards is None or name not in self.snapshots.sets:
            with self.snapshots.use(name):
                yield
            return
        self.shards.split()
        with self.snapshots.use(name):
            self.shards.join()
            yield
            self.shards.split()
        self.shards.join()

    def fit(self, job: Job, log: RunLog, on_update: Callable[[int, dict[str, Any]], None] | None = None) -> bool:
        """Run the remaining updates. Returns False if interrupted (a checkpoint is then written).

        Raises:
            NumericalError: after ``max_bad_steps`` bad gradient steps in a row.
        """
        with _Interruption(self):
            if self.done == 0:
                job.evaluate(0)
            stop = self._asked_to_stop()
            while self.done < self.updates and not stop:
                started = time.perf_counter()
                lr = self.optim.lr_at(self.done, self.updates)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
                metrics = job.update(self.done, self.optimise)
                self.done += 1
                metrics |= self.snapshots.after_update(self.done, metrics.get("kl"))
                self.cost.seconds += time.perf_counter() - started
                metrics |= {"lr": lr, "forwards": self.cost.forwards, "seconds": self.cost.seconds}
                if self.ranks.main:
                    log.metrics("train", self.done, metrics)
                if on_update is not None:
                    on_update(self.done, metrics)
                last = self.done == self.updates
                if last or self.done % self.eval_every == 0:
                    job.evaluate(self.done)
                stop = self._asked_to_stop()
                # In a row of bad steps nothing is saved, so that the newest checkpoint is one from before them.
                if last or stop or (self.done % self.checkpoints.every == 0 and self.bad_steps == 0):
                    self._check_weights()
                    self.save(job)
                    if self.ranks.main:
                        log.cost(self.cost)
        return self.done == self.updates

    def optimise(self, losses: Iterable[Loss]) -> dict[str, float]:
        """One gradient step on the sum of the losses, each backpropagated by itself; none if nothing has a gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        self.denoiser.train()
        if self.shards is None:
            return self._step(*self._backward(losses))
        self.shards.split()
        result = self._step(*self._backward_in_step(self.shards, list(losses)))
        self.shards.join()
        return result

    def _backward(self, losses: Iterable[Loss]) -> tuple[float, bool]:
        """The sum of the losses on this rank, and whether there was a gradient."""
        total, taught = 0.0, False
        for loss in losses:
            with self.autocast():
                value = loss()
            if value.requires_grad:
                value.backward()
                taught = True
            total += value.item()
        self.ranks.sum_gradients(self.parameters)
        return total, taught

    def _backward_in_step(self, shards: Shards, losses: list[Loss]) -> tuple[float, bool]:
        """The same of split weights: as many backward passes as on the rank with most losses."""
        total = 0.0
        for number in range(round(self.ranks.largest(len(losses)))):
            with self.autocast():
                value = shards.in_step(losses[number] if number < len(losses) else None)
            value.backward()
            total += value.item()
        return total, bool(losses)

    def _step(self, total: float, taught: bool) -> dict[str, float]:
        if not self.ranks.total(float(taught)):  # momentum alone must not move weights
            return {"loss": total, "grad_norm": 0.0, "skipped": 0.0}
        total = self.ranks.total(total)
        limited = torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.max_grad_norm)
        norm = whole(limited).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._bad_step(total, norm)
            return {"loss": total, "grad_norm": norm, "skipped": 1.0}
        self.bad_steps = 0
        self.optimizer.step()
        self.cost.optimizer_steps += 1
        return {"loss": total, "grad_norm": norm, "skipped": 0.0}

    def autocast(self) -> Any:
        """The precision in which the network runs, when scoring as when training."""
        if self.optim.precision == "bf16":
            return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _asked_to_stop(self) -> bool:
        """Whether any rank was interrupted: all have to leave the loop after the same update."""
        return self.ranks.total(float(self.interrupted)) > 0

    def _check_weights(self) -> None:
        bad = not all(bool(own_part(parameter).isfinite().all()) for parameter in self.parameters)
        if self.ranks.total(float(bad)):
            raise NumericalError(f"update {self.done}: weights are nan or inf: stopped (the last checkpoint is good)")

    def _bad_step(self, loss: float, norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        message = f"update {self.done + 1}: loss {loss}, gradient norm {norm}; gradient step skipped"
        if self.ranks.main:
            print(f"warning: {message}", file=sys.stderr, flush=True)
        if self.bad_steps >= self.optim.max_bad_steps:
            raise NumericalError(f"{message}, {self.bad_steps} in a row: stopped (the last checkpoint is good)")

    def save_model(self, folder: Path) -> None:
        """Write the evaluated weights: a model folder, or an adapter folder for LoRA. All ranks call it."""
        with self.evaluated(), self._writable(trained=self.adapter is not None):
            if not self.ranks.main:
                return
            if self.adapter is not None:
                self.adapter.save(folder)
                self.denoiser.save_unmask(folder)
            else:
                self.denoiser.save_pretrained(folder)

    def save_final(self) -> None:
        """Write RUN/model, which every command opens; with LoRA also RUN/adapter, and the model then has it merged in.
        All ranks call it.

        The last act of a run: merged adapters cannot be trained on.
        """
        if self.adapter is not None:
            write_folder(self.run / "adapter", self.save_model, self.ranks)
        with self.evaluated(), self._writable(trained=False):
            if self.ranks.main:
                final = self.denoiser if self.adapter is None else self.adapter.merge()
                write_folder(self.run / "model", final.save_pretrained)

    def _writable(self, *, trained: bool) -> Any:
        """Context in which the main rank's denoiser can be saved."""
        return nullcontext() if self.shards is None else self.shards.whole_on_main(trained=trained)

    def save(self, job: Job) -> None:
        """Write a checkpoint. All ranks call it."""
        state = {
            "update": self.done,
            "weights": {name: parameter.detach() for name, parameter in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
            "snapshots": self.snapshots.state_dict(),
            "cost": vars(self.cost).copy(),
            "bad_steps": self.bad_steps,
            "job": job.state_dict(),
        }
        folder = self.run / "checkpoints"
        save_checkpoint(folder, self.done, self.save_model, state, keep=self.checkpoints.keep, ranks=self.ranks)

    def resume(self, job: Job) -> int:
        """Continue from the newest checkpoint of the run; returns the number of finished updates.

        Raises:
            UserError: there is no checkpoint, or it is of another architecture.
        """
        found = list_checkpoints(self.run / "checkpoints")
        if not found:
            raise UserError(f"{self.run}: no complete checkpoint to resume from")
        state = load_state(found[-1], self.shards)
        loaded = state["weights"]
        for name in sorted(self.named.keys() | loaded.keys()):
            if name not in self.named or name not in loaded or self.named[name].shape != loaded[name].shape:
                raise UserError(f"{found[-1]}: a checkpoint of another architecture: {name!r} does not match the model")
        if self.shards is not None:
            self.shards.split()
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(loaded[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.snapshots.load_state_dict(state["snapshots"])
        if self.shards is not None:
            self.shards.join()
        self.cost = Cost(**state["cost"])
        self.done, self.bad_steps = state["update"], state["bad_steps"]
        job.load_state_dict(state["job"])
        return self.done


ECHO = 3.0
"""Seconds within which torchrun's signal is the terminal's."""


class _Interruption:
    """Ctrl-C (or SIGTERM) finishes the update under way, so that the checkpoint is whole; a second Ctrl-C stops at
    once. ``torchrun`` hands on to its processes what a terminal has sent them already: that is no second one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.previous: dict[int, Any] = {}
        self.asked = 0.0

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever runs the trainer there handles signals
                return

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.trainer.interrupted:
            if "TORCHELASTIC_RUN_ID" in os.environ and now - self.asked < ECHO:
                return
            raise KeyboardInterrupt
        self.trainer.interrupted, self.asked = True, now
        if self.trainer.ranks.main:
            print("\nstopping after this update (again to stop at once)", file=sys.stderr, flush=True)
