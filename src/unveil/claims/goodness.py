"""Kolmogorov-Smirnov tests by their asymptotic distribution; for samples of some hundred values or more."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniform_p_value(values: Tensor) -> float:
    """p-value of ``values`` (N,) coming from U(0, 1)."""
    ranked = values.double().sort().values
    n = len(ranked)
    place = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((place + 1) / n - ranked, ranked - place / n).max()
    return _kolmogorov(float(distance) * math.sqrt(n))


def same_p_value(left: Tensor, right: Tensor) -> float:
    """p-value of ``left`` (N,) and ``right`` (M,) coming from one distribution."""
    both = torch.cat([left, right])
    one, other = (torch.searchsorted(part.sort().values, both, right=True) / len(part) for part in (left, right))
    size = len(left) * len(right) / (len(left) + len(right))
    return _kolmogorov(float((one - other).abs().max()) * math.sqrt(size))


def _kolmogorov(distance: float) -> float:
    """P(K > distance) of the Kolmogorov distribution."""
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 101)))
