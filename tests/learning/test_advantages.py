"""Group statistics against numpy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.learning.advantages import GroupAdvantage, normalise_by_group, terminal
from unveil.seeds import generator


def oracle(values: np.ndarray, known: np.ndarray, group: np.ndarray, center: str, scale: str) -> np.ndarray:
    result = np.zeros_like(values, dtype=np.float64)
    rows, columns = values.shape
    for column in range(columns):
        for row in range(rows):
            mates = [other for other in range(rows) if group[other] == group[row] and known[other, column]]
            if not known[row, column] or len(mates) < 2:
                continue
            x = np.array([values[mate, column] for mate in mates], dtype=np.float64)
            middle = x.mean()
            if center == "leave_one_out":
                middle = np.mean([values[mate, column] for mate in mates if mate != row])
            result[row, column] = values[row, column] - middle
            if scale == "std":
                result[row, column] /= x.std(ddof=1) + 1e-4
    return result


@pytest.mark.parametrize("center", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_shuffled_rows_and_unequal_groups(center: str, scale: str, seed: int) -> None:
    stream = generator(seed)
    group = torch.tensor([7, 7, 7, 7, 7, 2, 2, 2, 100, 100, 5])[torch.randperm(11, generator=stream)]
    values = torch.randint(0, 4, (11, 3), generator=stream).float() / 2
    known = torch.rand(11, 3, generator=stream) < 0.8
    found = normalise_by_group(values, known, group, center=center, scale=scale)  # type: ignore[arg-type]
    expected = oracle(values.numpy(), known.numpy(), group.numpy(), center, scale)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_statistics_are_per_column() -> None:
    """Changing one column's values never moves another column's advantages."""
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    values = torch.rand(6, 4, generator=generator(0))
    known = torch.ones(6, 4, dtype=torch.bool)
    before = normalise_by_group(values, known, group)
    values[:, 2] += torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    after = normalise_by_group(values, known, group)
    assert torch.equal(before[:, [0, 1, 3]], after[:, [0, 1, 3]]) and not torch.equal(before[:, 2], after[:, 2])


@settings(max_examples=30, deadline=None)
@given(value=st.floats(-5, 5, width=32), size=st.integers(2, 9))
def test_zero_variance_gives_exactly_zero(value: float, size: int) -> None:
    values = torch.full((size, 2), value)
    known = torch.ones(size, 2, dtype=torch.bool)
    assert not normalise_by_group(values, known, torch.zeros(size)).any()


def test_group_advantage_spreads_the_final_reward_over_active_steps() -> None:
    active = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    # What lies behind a chain's last step must not count.
    rewards = torch.tensor([[0.0, 0, 1], [0, 0, 9], [1, 9, 9], [1, 1, 0]])
    assert terminal(rewards, active).tolist() == [1, 0, 1, 0]
    group = torch.tensor([0, 1, 1, 0])
    found = GroupAdvantage(scale="none").advantages(rewards, active, group)
    assert found.tolist() == [[0.5, 0.5, 0.5], [-0.5, -0.5, 0], [0.5, 0, 0], [-0.5, -0.5, -0.5]]
    left_out = GroupAdvantage(center="leave_one_out", scale="none").advantages(rewards, active, group)
    assert torch.equal(left_out, 2 * found)
    scaled = GroupAdvantage().advantages(rewards, active, group)
    assert scaled[0, 0].item() == pytest.approx(0.5 / (np.sqrt(0.5) + 1e-4))
