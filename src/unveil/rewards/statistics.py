"""How varied a set of samples is, and how far from real data. All on rows (N, D): pixels or features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nearest_distance(samples: Tensor, real: Tensor) -> Tensor:
    """(N,) Euclidean distance of every row of ``samples`` (N, D) to the nearest row of ``real`` (M, D)."""
    return torch.cdist(samples, real, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def group_diversity(samples: Tensor, groups: Sequence[object]) -> float:
    """Mean Euclidean distance between two different samples (N, D) of the same group; nan if no group has two.

    Every group with two members or more weighs the same.
    """
    members: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    means = [torch.pdist(samples[rows]).mean() for rows in members.values() if len(rows) > 1]
    return torch.stack(means).mean().item() if means else float("nan")


def frechet_distance(samples: Tensor, real: Tensor, dimensions: int = 16) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets, in the first principal directions of ``real``.

    A full covariance of few samples is singular, and its distance mostly noise: in the ``dimensions`` directions in
    which the real data vary most it can be estimated. nan for fewer than two samples.

    Args:
        samples: (N, D).
        real: (M, D).
        dimensions: at most min(D, M - 1) are used.
    """
    if len(samples) < 2:
        return float("nan")
    samples, real = samples.double(), real.double()
    centre = real.mean(0)
    _, _, directions = torch.linalg.svd(real - centre, full_matrices=False)
    basis = directions[: min(dimensions, len(real) - 1)].T
    first, second = (samples - centre) @ basis, (real - centre) @ basis
    a, b = first.T.cov(), second.T.cov()
    a, b = a.reshape(basis.shape[1], -1), b.reshape(basis.shape[1], -1)
    # Tr sqrt(A B) = sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return (means + a.trace() + b.trace() - 2 * shared).item()


def novelty(features: Tensor, groups: Sequence[object]) -> Tensor:
    """(N,) cosine distance of every row (N, D) to the nearest other row of its group; 0 for one that is alone."""
    unit = torch.nn.functional.normalize(features, dim=1)
    distance = 1 - unit @ unit.T
    names = list(dict.fromkeys(groups))
    index = torch.tensor([names.index(group) for group in groups])
    other = (index[:, None] == index) & ~torch.eye(len(index), dtype=torch.bool)
    nearest = distance.masked_fill(~other, float("inf")).amin(1)
    return nearest.where(other.any(1), torch.zeros(()))
