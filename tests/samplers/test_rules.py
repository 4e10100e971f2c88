"""Decoding rules one step at a time, on hand-made scores and against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unveil.samplers.rules import (
    Factor,
    LowConfidence,
    Rule,
    RunningConfidence,
    State,
    StepView,
    Threshold,
    certainty_rank,
)

CPU = torch.device("cpu")


def view(score: list[list[float | None]], remain: list[int] | None = None) -> StepView:
    """A step whose open holes are the numbers; None is a token."""
    table = torch.tensor([[-torch.inf if cell is None else cell for cell in row] for row in score])
    left = torch.tensor(remain or [0] * len(score))
    return StepView(open=torch.isfinite(table), score=table, remain=left, last=left == 0)


def after(rule: Rule, step: StepView, state: State | None = None) -> list[list[int]]:
    """Places of the holes after the step, row by row."""
    holes = rule.holes_after(step, rule.start(*step.open.shape, CPU) if state is None else state)
    return [row.nonzero().flatten().tolist() for row in holes]


def test_ranks_fall_with_the_score_and_ties_go_left() -> None:
    score = torch.tensor([[0.2, 0.9, -torch.inf, 0.2], [1.0, 1.0, 1.0, 0.0]])
    assert certainty_rank(score).tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]


def test_low_confidence_leaves_the_least_certain_open_holes() -> None:
    step = view([[0.5, None, 0.9, 0.7, 0.6], [0.3, 0.3, None, None, 0.3], [None, 0.1, None, None, 0.2]], [2, 1, 0])
    assert after(LowConfidence(), step) == [[0, 4], [4], []]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.none() | st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0, 1),
)
def test_low_confidence_equals_sorting(rows: list[list[float | None]], share: float) -> None:
    remain = [int(share * sum(cell is not None for cell in row)) for row in rows]
    expected = []
    for row, left in zip(rows, remain, strict=True):
        ranked = sorted((place for place, cell in enumerate(row) if cell is not None), key=lambda place: -row[place])  # type: ignore[operator]
        expected.append(sorted(ranked[len(ranked) - left :]))
    assert after(LowConfidence(), view(rows, remain)) == expected


ROWS: list[list[float | None]] = [[0.95, 0.2, 0.91, None], [0.1, 0.3, 0.2, None], [0.9, None, 0.89, 0.99]]


def test_threshold_commits_what_reaches_it_and_at_least_one() -> None:
    assert after(Threshold(threshold=0.9), view(ROWS)) == [[1], [0, 2], [2]]
    assert after(Threshold(threshold=0.0), view(ROWS)) == [[], [], []]
    assert after(Threshold(threshold=1.0), view(ROWS)) == [[1, 2], [0, 2], [0, 2]]


def test_threshold_keeps_its_cap() -> None:
    assert after(Threshold(threshold=0.0, cap=2), view(ROWS)) == [[1], [0], [2]]
    assert after(Threshold(threshold=0.9, cap=1), view(ROWS)) == [[1, 2], [0, 2], [0, 2]]


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.none() | st.floats(0.0625, 1, width=16), min_size=1, max_size=7).filter(lambda row: any(row)),
    threshold=st.floats(0, 1, width=16),
    factor=st.floats(0.0625, 4, width=16),
    cap=st.none() | st.integers(1, 4),
)
def test_parallel_rules_equal_brute_force(
    row: list[float | None], threshold: float, factor: float, cap: int | None
) -> None:
    ranked = sorted((place for place, cell in enumerate(row) if cell is not None), key=lambda place: -row[place])  # type: ignore[operator]
    sure = sum(row[place] >= threshold for place in ranked)  # type: ignore[operator]
    fitting = [n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - row[ranked[n - 1]]) < factor]  # type: ignore[operator]
    for rule, wanted in (
        (Threshold(threshold=threshold, cap=cap), sure),
        (Factor(factor=factor, cap=cap), max(fitting, default=1)),
    ):
        count = min(max(1, wanted), cap or len(ranked))
        assert after(rule, view([row])) == [sorted(ranked[count:])]


def test_running_confidence_keeps_the_last_or_the_largest_score() -> None:
    # Position 0 scored .9, then .2; position 1 scored .5 and was kept. One hole must remain.
    for running, hole in (("last", 0), ("max", 1)):
        rule = RunningConfidence(running=running)  # type: ignore[arg-type]
        state = rule.start(1, 3, CPU)
        rule.holes_after(view([[0.9, 0.5, None]], [1]), state)
        assert after(rule, view([[0.2, None, None]], [1]), state) == [[hole]]


def test_running_confidence_never_chooses_what_was_never_filled() -> None:
    # Position 2 was given, position 3 lies in a later block: neither has a score, and both stay as they are.
    rule = RunningConfidence()
    state = rule.start(1, 4, CPU)
    assert after(rule, view([[0.9, 0.8, None, None]], [2]), state) == [[0, 1]]
    assert not state["filled"][0, 2:].any()


@pytest.mark.parametrize("low", [0.0, -0.0, -3.5])
def test_running_confidence_takes_scores_of_zero_and_below_as_they_are(low: float) -> None:
    # Margin can be 0, negative entropy is never above it; the published code reads 0 as "never filled".
    rule = RunningConfidence(confidence="margin")
    state = rule.start(1, 3, CPU)
    assert after(rule, view([[low, 0.5, 0.4]], [1]), state) == [[0]]


def test_running_confidence_rows_do_not_meet() -> None:
    rows: list[list[float | None]] = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.5, None, None]]
    together = RunningConfidence()
    state = together.start(3, 3, CPU)
    assert after(together, view(rows, [1, 2, 0]), state) == [[0], [1, 2], []]
    for row, (scores, remain) in enumerate(zip(rows, [1, 2, 0], strict=True)):
        alone = RunningConfidence()
        own = alone.start(1, 3, CPU)
        alone.holes_after(view([scores], [remain]), own)
        assert torch.equal(own["running"][0], state["running"][row])


def test_running_confidence_takes_back_nothing_at_the_last_step() -> None:
    rule = RunningConfidence()
    state = rule.start(1, 2, CPU)
    rule.holes_after(view([[0.9, 0.8]], [1]), state)
    assert after(rule, view([[None, 0.1]], [0]), state) == [[]]


def test_rules_leave_the_view_alone() -> None:
    step = view([[0.5, None, 0.9]], [1])
    kept: list[Tensor] = [step.open.clone(), step.score.clone()]
    for rule in (LowConfidence(), Threshold(), Factor(), RunningConfidence()):
        after(rule, step)
        assert torch.equal(step.open, kept[0]) and torch.equal(step.score, kept[1])
