from __future__ import annotations

from itertools import combinations
from math import comb

import pytest

from unveil.tasks.statistics import bootstrap, pass_at_k, wilson


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hits = [min(subset) < c for subset in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    for k in (0, 5):
        with pytest.raises(ValueError):
            pass_at_k(4, 2, k)


def test_the_bootstrap_has_the_quantiles_of_its_exact_distribution() -> None:
    # Means of 9 draws from 4 ones and 5 zeros are binomial; no cumulative probability lies near a quantile.
    values, p = [1.0] * 4 + [0.0] * 5, 4 / 9
    below = [sum(comb(9, j) * p**j * (1 - p) ** (9 - j) for j in range(i + 1)) for i in range(10)]
    exact = [next(i / 9 for i in range(10) if below[i] >= q) for q in (0.025, 0.975)]
    assert min(abs(share - q) for share in below for q in (0.025, 0.975)) > 0.004
    (found,) = bootstrap([values], resamples=20_000, seed=3)
    assert [found.low, found.high] == pytest.approx(exact) and found.mean == pytest.approx(p)


def test_the_bootstrap_draws_the_same_problems_for_all_measures() -> None:
    values = [0.0, 0.5, 1.0, 0.25, 1.0]
    first, second = bootstrap([values, [1 - value for value in values]], resamples=501, seed=0)
    assert first.low == pytest.approx(1 - second.high) and first.high == pytest.approx(1 - second.low)
    assert bootstrap([values], resamples=501, seed=0) == [first]
    assert bootstrap([values], resamples=501, seed=1) != [first]


def test_where_all_problems_agree_the_interval_is_not_a_point() -> None:
    none, all_, half = bootstrap([[0.0] * 20, [1.0] * 20, [0.5] * 20], resamples=100, seed=0)
    assert (none.low, none.high) == wilson(0, 20) and none.high > 0.1
    assert (all_.low, all_.high) == wilson(20, 20)
    assert (half.low, half.high) == (0.5, 0.5)
