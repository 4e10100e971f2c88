"""When the page speaks of a gamed reward, and when it does not."""

from __future__ import annotations

import random
from typing import Any

import pytest

from unveil.report.hacking import signs

Line = dict[str, Any]
AUDIT = {"human": {"role": "audit", "weight": 1.0}, "size": {"role": "evaluate", "weight": -1.0}}


def evaluated(step: int, reward: float | None = None, accuracy: float = 0.5, **more: float | None) -> Line:
    """An evaluation on some 400 problems."""
    line: Line = {"kind": "eval", "step": step, "decoder": "ode", "accuracy": accuracy, "low": accuracy - 0.05}
    line |= {"high": accuracy + 0.05} | more
    return line if reward is None else line | {"reward": reward, "reward_error": 0.02}


def rolled(*rewards: float) -> list[Line]:
    return [{"kind": "train", "step": step, "reward": reward} for step, reward in enumerate(rewards, start=1)]


def run_of(rewards: list[float], accuracies: list[float]) -> list[Line]:
    pairs = enumerate(zip(rewards, accuracies, strict=True))
    return [evaluated(10 * place, reward, accuracy) for place, (reward, accuracy) in pairs]


def test_the_judge_falls_while_the_reward_rises() -> None:
    (found,) = signs(run_of([0.3, 0.5, 0.7, 0.9], [0.4, 0.6, 0.5, 0.2]), [], {})
    assert found["since"] == 10 and found["keys"] == ["accuracy"] and found["others"] == []
    assert found["sentence"] == (
        "The reward may be gamed. With ode, the optimised reward (held-out) rises from 0.3 to 0.9 between updates 0 "
        "and 30, but the judge's accuracy falls since update 10 (from 60.0% to 20.0%)."
    )


@pytest.mark.parametrize(
    ("rewards", "accuracies"),
    [
        ([0.3, 0.5, 0.7, 0.9], [0.4, 0.5, 0.6, 0.7]),  # both rise
        ([0.3, 0.5, 0.7, 0.9], [0.4, 0.6, 0.58, 0.52]),  # it falls within its intervals
        ([0.3, 0.5, 0.7, 0.9], [0.4, 0.7, 0.2, 0.68]),  # it came back
        ([0.3, 0.31, 0.3, 0.33], [0.6, 0.5, 0.4, 0.2]),  # the reward did not rise beyond its intervals
        ([0.3, 0.9, 0.6, 0.5], [0.6, 0.7, 0.4, 0.2]),  # both fall: training broke, nothing was gained by it
    ],
)
def test_it_is_silent_where_nothing_diverges(rewards: list[float], accuracies: list[float]) -> None:
    assert signs(run_of(rewards, accuracies), [], {}) == []


def test_a_reward_that_is_saturated_is_still_gamed() -> None:
    (found,) = signs(run_of([0.3, 0.99, 0.985, 0.99], [0.4, 0.8, 0.6, 0.3]), [], {})
    assert found["since"] == 10


def test_audits_turn_by_their_intervals_in_the_direction_of_their_weight() -> None:
    def lines(human: float, size: float, error: float | None) -> list[Line]:
        watched = [{"reward/human": 1.0, "reward/size": 3.0}, {"reward/human": human, "reward/size": size}]
        errors = {"reward_error/human": error, "reward_error/size": error}
        return [evaluated(20 * i, 0.3 + i / 2, **own, **errors) for i, own in enumerate(watched)]

    assert signs(lines(1.5, 2.0, 0.1), [], AUDIT) == []
    assert signs(lines(0.9, 3.1, 0.1), [], AUDIT) == []
    assert signs(lines(0.1, 9.0, None), [], AUDIT) == [], "without an error nothing is known of chance"
    assert signs(lines(0.1, 9.0, 0.1), [], {}) == [], "nor without a role of what is better"
    (found,) = signs(lines(0.1, 9.0, 0.1), [], AUDIT)
    assert found["keys"] == ["reward/human", "reward/size"]
    assert "human (audit) falls since update 0 (from 1 to 0.1)" in found["sentence"]
    assert found["others"] == ["size (evaluate) rises since update 0 (from 3 to 9)"]
    assert signs(lines(0.1, 9.0, 0.1), [], {"human": {"role": "optimise", "weight": 1.0}}) == []


@pytest.mark.parametrize(
    ("key", "values", "fires"),
    [
        ("measure/distance", (1.0, 1.14), False),
        ("measure/distance", (1.0, 1.16), True),
        ("measure/distance", (1.0, 0.5), False),
        ("measure/frechet", (1.0, 1.6), True),
        ("measure/frechet", (1.0, None), False),
        ("measure/diversity", (1.0, 0.1), False),
    ],
)
def test_measures_of_the_set_turn_by_their_limits(key: str, values: tuple[float, float | None], fires: bool) -> None:
    lines = [evaluated(20 * i, 0.3 + i / 2, **{key: value}) for i, value in enumerate(values)]
    assert bool(signs(lines, [], {})) == fires
    assert signs([line | {"reward": 0.3} for line in lines], [], {}) == [], "the reward does not rise"


def test_a_set_that_collapses_is_told_apart_from_a_gamed_reward() -> None:
    lines = run_of([0.3, 0.9], [0.4, 0.9])
    spread = [{"measure/frechet": 20.0, "measure/distance": 1.0}, {"measure/frechet": 60.0, "measure/distance": 0.9}]
    (found,) = signs([line | own for line, own in zip(lines, spread, strict=True)], [], {})
    assert found["sentence"].startswith("The samples lose the spread of the data")
    spread[1]["measure/distance"] = 1.2
    (found,) = signs([line | own for line, own in zip(lines, spread, strict=True)], [], {})
    assert found["sentence"].startswith("The reward may be gamed.")


def test_without_a_held_out_reward_that_of_the_rollouts_counts() -> None:
    lines = [evaluated(step, accuracy=accuracy) for step, accuracy in ((0, 0.6), (3, 0.5), (6, 0.2))]
    (found,) = signs(lines, rolled(0.1, 0.12, 0.11, 0.5, 0.6, 0.55), {})
    assert "the optimised reward (rollouts) rises from 0.11 to 0.55" in found["sentence"]
    assert signs(lines, rolled(0.1, 0.3, 0.2, 0.25, 0.1, 0.3), {}) == [], "updates differ by more than that"
    assert signs(lines, [], {}) == [], "likelihood training optimises no reward"


def test_decoders_are_held_apart() -> None:
    fine = [line | {"decoder": "sde"} for line in run_of([0.3, 0.9], [0.4, 0.6])]
    assert [found["decoder"] for found in signs([*fine, *run_of([0.3, 0.9], [0.6, 0.2])], [], {})] == ["ode"]
    assert signs(run_of([0.3], [0.4]), [], {}) == [] and signs([], [], {}) == []


def test_false_alarms_of_chance_are_rare() -> None:
    """A reward that rises and a judge that stays: 20 evaluations on 500 problems each. Draws are independent, the worst
    case, for real evaluations share problems and noise."""
    stream, alarms, runs = random.Random(0), 0, 400
    for _ in range(runs):
        lines = []
        for place in range(20):
            share = sum(stream.random() < 0.7 for _ in range(500)) / 500
            spread = 1.96 * (share * (1 - share) / 500) ** 0.5
            lines.append(evaluated(place, 0.1 * place, share) | {"low": share - spread, "high": share + spread})
        alarms += bool(signs(lines, [], {}))
    assert alarms / runs < 0.05
