"""What n completions of each of P problems say of a model: pass@k, and how sure the problems make it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK = 2**22
"""Drawn problems that are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions is right, from ``correct`` right ones of ``samples``.

    1 - C(n - c, k) / C(n, k), the share of the subsets of k that hold a right one (2107.03374, equation 1).

    Raises:
        ValueError: there are fewer than k samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def bootstrap(values: Sequence[Sequence[float]], *, resamples: int, seed: int) -> list[Interval]:
    """95 % percentile intervals of the means of M measures over the same P problems.

    Problems are drawn with replacement, the same ones for all measures, since the samples of one problem depend on
    one another. Where all problems give the same value, a resample tells nothing; if that value is 0 or 1, the
    interval is then Wilson's for P independent trials.

    Args:
        values: M rows of P values.
        resamples: how often P problems are drawn.
        seed: of the draws.
    """
    table = np.asarray(values, dtype=np.float64)
    problems = table.shape[1]
    stream = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    left = resamples
    while left:
        rows = min(left, max(1, _CHUNK // problems))
        drawn = stream.integers(problems, size=(rows, problems))
        means.append(np.stack([own[drawn].mean(1) for own in table]))
        left -= rows
    ends = np.quantile(np.concatenate(means, 1), [0.025, 0.975], axis=1).T
    return [_interval(own, low, high) for own, (low, high) in zip(table, ends.tolist(), strict=True)]


def _interval(values: NDArray[np.float64], low: float, high: float) -> Interval:
    mean = float(values.mean())
    if values.min() == values.max() and mean in (0.0, 1.0):
        low, high = wilson(round(mean * len(values)), len(values))
    return Interval(mean=mean, low=low, high=high)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion."""
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
