"""Statistics of sets of samples against closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch

from unveil.rewards.statistics import frechet_distance, group_diversity, nearest_distance, novelty


def gaussian(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return shift + scale * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_nearest_row_is_found_and_its_distance_is_exact() -> None:
    real = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = nearest_distance(torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]), real)
    assert found.tolist() == [0.0, 1.0, 5.0], "a real image is at distance 0, not at rounding's root"


def test_diversity_is_the_mean_distance_within_groups_which_weigh_the_same() -> None:
    samples = torch.tensor([[0.0], [1.0], [10.0], [14.0], [10.0], [99.0]])
    groups = ["a", "a", "b", "b", "b", "alone"]
    assert group_diversity(samples, groups) == pytest.approx((1 + (4 + 0 + 4) / 3) / 2)
    assert math.isnan(group_diversity(samples[:2], ["a", "b"]))


def test_frechet_distance_of_a_set_to_itself_is_zero_and_a_shift_is_its_square() -> None:
    real = gaussian(500, 0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(real + torch.tensor([2.0, 0.0, 1.0]), real) == pytest.approx(5.0, rel=1e-6)


def test_frechet_distance_of_scaled_data_has_its_closed_form() -> None:
    real = gaussian(2000, 1)
    want = (real.T.cov().trace() * (3 - 1) ** 2 + (2 * real.mean(0)).square().sum()).item()
    assert frechet_distance(3 * real, real) == pytest.approx(want, rel=1e-6)


def test_frechet_distance_looks_in_the_directions_in_which_the_data_vary() -> None:
    real = torch.randn(400, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([9.0, 5.0, 1e-3, 1e-3, 1e-3])
    moved = real + torch.tensor([0.0, 0.0, 7.0, 0.0, 0.0])
    assert frechet_distance(moved, real, dimensions=2) < 1e-3
    assert frechet_distance(moved, real, dimensions=5) == pytest.approx(49, rel=1e-3)
    assert math.isnan(frechet_distance(real[:1], real))


def test_novelty_is_the_cosine_distance_to_the_nearest_of_the_group() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 1.0]])
    found = novelty(features, ["a", "a", "a", "b", "alone"])
    assert found.tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-6)
