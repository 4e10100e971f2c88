"""Ranks. One process needs no configuration; ``torchrun`` starts many.

Every rank rolls out and trains on its share of the chains; weights carry global denominators, so gradients are summed.

Why gradients are summed here and not by ``DistributedDataParallel``: its hooks live in ``forward`` of a wrapper and
want the same number of backward passes on every rank, while a rank of ours calls `features` and `head` by themselves,
has as many micro-batches as its chains left to train on (none, if all of its groups are equal), and needs no average.
One sum per gradient step is exact for any share, and cheap: an update makes many backward passes and one step.
Splitting the weights is torch's ``fully_shard``: see `unveil.training.sharding`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Item = TypeVar("Item")

_BROKEN = ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl", "socket", "timed out")
"""What backends say, in a RuntimeError, when a process at the other end is gone."""


class RankLost(Exception):
    """Another process of the run is gone: nothing that needs all of them can go on."""


class Ranks:
    """The processes of this run."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        if self.world > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def main(self) -> bool:
        """True on the one rank that writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def part(self, count: int) -> slice:
        """This rank's part of ``count`` neighbouring items: the parts of all ranks in their order are the whole, and
        differ by one item at most."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part of a list that is the same on all ranks."""
        return list(items[self.part(len(items))])

    def total(self, value: float) -> float:
        """Sum of a number over all ranks."""
        return self._reduced(value, dist.ReduceOp.SUM) if self.world > 1 else value

    def largest(self, value: float) -> float:
        """The largest number of all ranks."""
        return self._reduced(value, dist.ReduceOp.MAX) if self.world > 1 else value

    def _reduced(self, value: float, how: Any) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=how)
        return tensor.item()

    def gather(self, value: Item) -> list[Item]:
        """The values of all ranks, in their order. For small things: they travel as objects."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Item) -> Item:
        """The main rank's value."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Go on when all ranks have come this far."""
        self.total(0.0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up every gradient over all ranks; a parameter without one counts as zero."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def lost(self, error: BaseException) -> bool:
        """Whether an error means that another process is gone."""
        text = str(error).lower()
        return self.world > 1 and isinstance(error, RuntimeError) and any(word in text for word in _BROKEN)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
