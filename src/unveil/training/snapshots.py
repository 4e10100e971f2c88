"""Named sets of parameters beside the trained ones: the reference policy, an exponential moving average."""

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
class SnapshotConfig:
    """Which snapshots a run keeps."""

    reference_sync: Annotated[int, Field(ge=1)] | None = None
    """Updates between two moves of the reference towards the policy; None: it stays the initial policy."""
    reference_mix: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How far the reference moves at a sync: reference = mix * policy + (1 - mix) * reference."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which then is evaluated and saved; None: no average."""


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
        if keep_reference:
            self.sets["reference"] = Snapshot(module)
        if config.ema_decay is not None:
            self.sets["ema"] = Snapshot(module)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Compute with a snapshot; with the live weights where the run keeps no such snapshot."""
        if name not in self.sets:
            yield
            return
        with self.sets[name].in_place():
            yield

    def after_update(self, update: int) -> None:
        """Apply the update rules after ``update`` finished updates."""
        if "ema" in self.sets and self.config.ema_decay is not None:
            self.sets["ema"].move(1 - self.config.ema_decay)
        sync = self.config.reference_sync
        if "reference" in self.sets and sync is not None and update % sync == 0:
            self.sets["reference"].move(self.config.reference_mix)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: snapshot.state_dict() for name, snapshot in self.sets.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, snapshot in self.sets.items():
            snapshot.load_state_dict(state[name])
