"""Named sets of parameters beside the trained ones, each with a rule by which it follows them.

reference   the initial policy, or one that is moved every so often, or as soon as the policy has gone too far
old         a slow copy, which may draw the rollouts and hold the policy back
ema         an exponential moving average, which is evaluated and saved
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(kw_only=True)
class Following:
    """How a copy follows the policy: old = d old + (1 - d) policy, where the decay d may grow with the updates."""

    every: Annotated[int, Field(ge=1)] = 1
    """Updates between two moves."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """d, at most; at 0 every move is a plain copy."""
    rate: Annotated[float, Field(gt=0)] | None = None
    """d grows by this per update, from 0 up to ``decay``; None: it is ``decay`` from the start."""
    after: Annotated[int, Field(ge=0)] = 0
    """Updates before it grows: so long d is 0."""

    def decay_at(self, update: int) -> float:
        """d after ``update`` finished updates."""
        if update <= self.after:
            return 0.0 if self.after or self.rate is not None else self.decay
        return self.decay if self.rate is None else min(self.rate * (update - self.after), self.decay)


@dataclass(kw_only=True)
class SnapshotConfig:
    """Which snapshots a run keeps."""

    reference_sync: Annotated[int, Field(ge=1)] | None = None
    """Updates between two moves of the reference towards the policy; None: it stays the initial policy."""
    reference_mix: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How far the reference moves at a sync: reference = mix * policy + (1 - mix) * reference."""
    reference_limit: Annotated[float, Field(gt=0)] | None = None
    """The reference also moves after an update whose logged ``kl`` is above this; the updates to the next regular sync
    are then counted anew."""
    old: Following | None = None
    """A copy that follows the policy slowly; None: the run keeps none."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which then is evaluated and saved; None: no average."""
    ema_every: Annotated[int, Field(ge=1)] = 1
    """Updates between two moves of the average."""
    ema_warmup: bool = False
    """After update i the decay is at most (1 + i) / (10 + i): the average soon leaves the initial policy behind."""

    @property
    def moves_reference(self) -> bool:
        return self.reference_sync is not None or self.reference_limit is not None


class Snapshot:
    """A copy of the trainable parameters of a module, at their place on demand."""

    def __init__(self, module: nn.Module) -> None:
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def move(self, amount: float) -> None:
        """values <- amount * live + (1 - amount) * values."""
        for name, value in self.values.items():
            value.lerp_(self.live[name].detach(), amount)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the module computes with the snapshot's values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.live.items():
            if not isinstance(parameter, DTensor):
                parameter.data, self.values[name] = self.values[name], parameter.data
                continue
            # Weights that are split over ranks live in one buffer: the numbers change place, and not the tensors.
            held = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.values[name].copy_(value)


class Snapshots:
    """The snapshots of one run. With LoRA the reference is the base model with its adapters off: it costs nothing,
    as long as it is not moved."""

    def __init__(self, module: nn.Module, config: SnapshotConfig, *, keep_reference: bool) -> None:
        self.config = config
        self.sets: dict[str, Snapshot] = {}
        self.moved = 0  # the update after which the reference was last moved
        if keep_reference:
            self.sets["reference"] = Snapshot(module)
        if config.ema_decay is not None:
            self.sets["ema"] = Snapshot(module)
        if config.old is not None:
            self.sets["old"] = Snapshot(module)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Compute with a snapshot; with the live weights where the run keeps no such snapshot."""
        if name not in self.sets:
            yield
            return
        with self.sets[name].in_place():
            yield

    def after_update(self, update: int, kl: float | None = None) -> dict[str, float]:
        """Apply the update rules after ``update`` finished updates; returns what to log.

        Args:
            kl: the distance of the policy from the reference that this update has measured, if it has.
        """
        config = self.config
        if "ema" in self.sets and config.ema_decay is not None and update % config.ema_every == 0:
            most = (1 + update) / (10 + update) if config.ema_warmup else 1.0
            self.sets["ema"].move(1 - min(config.ema_decay, most))
        if "old" in self.sets and config.old is not None and update % config.old.every == 0:
            self.sets["old"].move(1 - config.old.decay_at(update))
        if "reference" not in self.sets or not self.config.moves_reference:
            return {}
        due = config.reference_sync is not None and update - self.moved >= config.reference_sync
        far = config.reference_limit is not None and kl is not None and kl > config.reference_limit
        if due or far:
            self.sets["reference"].move(config.reference_mix)
            self.moved = update
        return {"reference_moved": float(due or far)}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        sets = {name: snapshot.state_dict() for name, snapshot in self.sets.items()}
        return sets | ({"rules": {"moved": torch.tensor(self.moved)}} if self.config.moves_reference else {})

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        if self.config.moves_reference:
            self.moved = int(state["rules"]["moved"])
        for name, snapshot in self.sets.items():
            snapshot.load_state_dict(state[name])
