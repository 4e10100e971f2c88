"""Which denoising steps are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import Plugin
from unveil.seeds import generator


class Selector(Plugin, family="selector"):
    """Chooses steps of every chain by itself."""

    def choose(self, advantages: Tensor, active: Tensor, seeds: Sequence[int]) -> Tensor:
        """(B, S) True at the steps to train on, from ``advantages`` (B, S), ``active`` (B, S) and a seed per chain."""
        raise NotImplementedError


@dataclass(kw_only=True)
class AllSteps(Selector, name="all"):
    """Every step."""

    def choose(self, advantages: Tensor, active: Tensor, seeds: Sequence[int]) -> Tensor:
        return active.clone()


@dataclass(kw_only=True)
class TopAdvantage(Selector, name="top_advantage"):
    """The k steps of a chain with the largest |advantage|; ties go to the earlier step (MDPO, 2508.13148)."""

    k: Annotated[int, Field(ge=1)] = 8
    """Steps per chain."""

    def choose(self, advantages: Tensor, active: Tensor, seeds: Sequence[int]) -> Tensor:
        return _largest(advantages.abs(), active, self.k)


@dataclass(kw_only=True)
class UniformSteps(Selector, name="uniform"):
    """k uniformly drawn steps of a chain."""

    k: Annotated[int, Field(ge=1)] = 8
    """Steps per chain."""

    def choose(self, advantages: Tensor, active: Tensor, seeds: Sequence[int]) -> Tensor:
        draws = [torch.rand(active.shape[1], generator=generator(seed, "steps")) for seed in seeds]
        return _largest(torch.stack(draws), active, self.k)


def _largest(value: Tensor, active: Tensor, k: int) -> Tensor:
    order = value.masked_fill(~active, -1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(active).scatter_(1, order, True) & active
