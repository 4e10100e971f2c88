"""What claim checks share: tuning, repetition, the place where a curve reaches a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from unveil.claims.image_learning import crossing, soonest
from unveil.claims.laboratory import TUNING_SEED, Measured, all_runs, cost_cells, on_seeds, total_cost, tune

COST = {"optimizer_steps": 1, "rollouts": 2, "forwards": 3, "seconds": 4.0}


def train(out: Path, seed: int, method: str, setting: float, updates: int) -> Measured:
    return {**COST, "loss": abs(setting - {"a": 1.0, "b": 3.0}[method]), "job": (seed, method, setting, updates)}


def every(function: Callable[..., Measured], jobs: Sequence[tuple]) -> list[Measured]:
    return [function(*job) for job in jobs]


def test_every_method_has_the_best_setting_of_its_own_grid_on_the_tuning_seed() -> None:
    asked: list[tuple] = []

    def noted(function: Callable[..., Measured], jobs: Sequence[tuple]) -> list[Measured]:
        asked.extend(job[1:4] for job in jobs)
        return every(function, jobs)

    best = tune(noted, train, Path(), {"a": (0.5, 1.5, 4.0), "b": (1.0, 4.0)}, 7, lambda run: run["loss"])
    assert best == {"a": 0.5, "b": 4.0}  # 0.5 and 1.5 are as good: the earlier
    assert asked == [(TUNING_SEED, "a", x) for x in (0.5, 1.5, 4.0)] + [(TUNING_SEED, "b", x) for x in (1.0, 4.0)]


def test_runs_are_by_method_in_the_order_of_seeds() -> None:
    runs = on_seeds(every, train, Path(), 2, {"b": 0.1, "a": 0.2}, 5)
    assert {name: [run["job"] for run in own] for name, own in runs.items()} == {
        "b": [(0, "b", 0.1, 5), (1, "b", 0.1, 5)],
        "a": [(0, "a", 0.2, 5), (1, "a", 0.2, 5)],
    }
    assert total_cost(all_runs(runs), 9.0) == {"seconds": 9.0, "optimizer_steps": 4, "rollouts": 8, "forwards": 12}
    assert cost_cells(runs["a"]) == ["1", "2", "3", "4"]


def test_the_first_at_the_goal_is_best_and_of_those_that_never_are_the_best_end() -> None:
    runs = [(10, 0.91), (6, 0.9), (math.inf, 0.7), (math.inf, 0.8)]
    ordered = sorted(runs, key=lambda run: soonest({"epochs": run[0], "accuracy": run[1]}))
    assert ordered == [(6, 0.9), (10, 0.91), (math.inf, 0.8), (math.inf, 0.7)]


@pytest.mark.parametrize(
    ("level", "found"),
    [(0.0, 10.0), (0.2, 10.0), (0.3, 15.0), (0.4, 20.0), (0.45, 35.0), (0.6, 40.0), (0.7, 30.0)],
)
def test_a_level_is_reached_between_two_points_for_the_first_time(level: float, found: float) -> None:
    # Between 0.3 and 0.6 lies 0.45 in the middle; 0.7 is never reached: the end.
    curve = [{"x": x, "y": y} for x, y in ((0.2, 10.0), (0.4, 20.0), (0.3, 30.0), (0.6, 40.0), (0.1, 30.0))]
    assert crossing({"curve": curve}, "x", level, "y") == pytest.approx(found)
