"""Count schedules: exact sums for every size, published sequences, and the float traps."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.registry import UserError
from unveil.samplers.schedules import (
    Cosine,
    Doubling,
    Even,
    Exponential,
    Linear,
    Logarithmic,
    Power,
    Schedule,
)

SCHEDULES = [
    Linear(),
    Even(),
    Cosine(),
    Power(k=0.5),
    Power(k=2.0),
    Power(k=3.0),
    Logarithmic(),
    Exponential(),
    Doubling(),
]


def test_every_schedule_has_its_name_and_is_tested_here() -> None:
    names = {"linear", "even", "cosine", "power", "log", "exponential", "doubling"}
    assert names <= set(Schedule.known)
    assert {type(schedule).name for schedule in SCHEDULES} == names


@settings(max_examples=150, deadline=None)
@given(n=st.integers(0, 300), steps=st.integers(1, 300), schedule=st.sampled_from(SCHEDULES))
def test_counts_sum_exactly_and_are_never_negative(n: int, steps: int, schedule: Schedule) -> None:
    counts = schedule.counts(n, steps)
    assert len(counts) == steps
    assert all(type(count) is int and count >= 0 for count in counts)
    assert sum(counts) == n


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 300), steps=st.integers(1, 300), k=st.sampled_from([1, 2, 3]))
def test_integer_powers_equal_the_floor_of_the_exact_fraction(n: int, steps: int, k: int) -> None:
    remaining = [n * (steps**k - i**k) // steps**k for i in range(steps + 1)]
    exact = [before - after for before, after in itertools.pairwise(remaining)]
    assert Power(k=float(k)).counts(n, steps) == exact
    if k == 1:
        assert Linear().counts(n, steps) == exact


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 300), steps=st.integers(1, 300))
def test_even_is_the_layout_of_llada(n: int, steps: int) -> None:
    base, remainder = divmod(n, steps)
    assert Even().counts(n, steps) == [base + 1] * remainder + [base] * (steps - remainder)


def test_linear_does_not_fall_short_as_the_float_form_does() -> None:
    published = [math.floor(10 * (1 - i / 10)) for i in range(11)]
    assert published != list(range(10, -1, -1))
    assert Linear().counts(10, 10) == [1] * 10
    assert Linear().counts(10, 4) == [3, 2, 3, 2]
    assert Even().counts(10, 4) == [3, 3, 2, 2]


def test_cosine_at_angles_with_known_values() -> None:
    assert Cosine().counts(100, 3) == [100 - 86, 86 - 50, 50]
    assert Cosine().counts(1000, 2) == [1000 - 707, 707]
    assert Cosine().counts(5, 1) == [5]


def test_root_power_at_square_fractions() -> None:
    assert Power(k=0.5).counts(64, 4)[0] == 32  # sqrt(1/4) of 64
    assert sum(Power(k=0.5).counts(90, 9)[:4]) == 60  # sqrt(4/9) of 90


def test_log_and_exponential_at_powers_of_two() -> None:
    # n = 256, 8 steps: n^r = 2^step tokens revealed
    assert Exponential().counts(256, 8) == [2, 2, 4, 8, 16, 32, 64, 128]
    # -log2(step/8) / 8 of 256 remain after steps 1, 2, 4, 8: 96, 64, 32, 0
    log = Logarithmic().counts(256, 8)
    assert [256 - sum(log[:step]) for step in (1, 2, 4, 8)] == [96, 64, 32, 0]
    # gamma is clipped to 1: while log2(steps/step) >= log2(n) nothing is revealed
    assert Logarithmic().counts(4, 16)[:4] == [0, 0, 0, 0]
    assert sum(Logarithmic().counts(4, 16)[:5]) == 1


def test_a_single_mask_and_none_at_all() -> None:
    assert Logarithmic().counts(1, 4) == [0, 0, 0, 1]
    assert Exponential().counts(1, 4) == [1, 0, 0, 0]
    assert Doubling().counts(1, 4) == [1, 0, 0, 0]
    assert all(schedule.counts(0, 3) == [0, 0, 0] for schedule in SCHEDULES)


@pytest.mark.parametrize(
    ("n", "steps", "expected"),
    [
        (128, 7, [1, 2, 4, 8, 16, 32, 65]),  # ASS: floor(log2 128) steps
        (256, 8, [1, 2, 4, 8, 16, 32, 64, 129]),
        (7, 3, [1, 2, 4]),
        (20, 3, [1, 2, 17]),  # too few steps: the last takes the rest
        (5, 5, [1, 2, 2, 0, 0]),  # too many: zeros at the end
    ],
)
def test_doubling(n: int, steps: int, expected: list[int]) -> None:
    assert Doubling().counts(n, steps) == expected


def layout_by_the_paper(length: int, blocks: int) -> list[tuple[int, list[int]]]:
    """Sizes and counts of ASS cut from the right: 2^(S-1) + 1 + (L - 2^S) tokens at once, then 2^(S-2), ..., then the
    remaining powers as the steps of the first block."""
    power = math.floor(math.log2(length))
    if blocks == 1:
        counts = [2**i for i in range(power - 1)]
        return [(length, [*counts, length - sum(counts)])]
    last = 2 ** (power - 1) + 1 + length - 2**power
    middle = [2 ** (power - 1 - i) for i in range(1, blocks - 1)]
    rest = [2**i for i in range(power - blocks + 1)]
    sizes = [(sum(rest), rest), *((size, [size]) for size in reversed(middle)), (last, [last])]
    assert sum(size for size, _ in sizes) == length
    return sizes


@settings(max_examples=100, deadline=None)
@given(length=st.integers(2, 400), data=st.data())
def test_the_doubling_layout_in_blocks(length: int, data: st.DataObject) -> None:
    steps = math.floor(math.log2(length))
    schedule = Doubling(blocks=data.draw(st.integers(1, steps)))
    schedule.check_fits(length, None, steps)
    layout = schedule.layout(length, None, steps)
    assert [(n, schedule.counts(n, local)) for n, local in layout] == layout_by_the_paper(length, schedule.blocks)
    assert sum(local for _, local in layout) == steps


def test_the_doubling_layout_by_hand() -> None:
    assert Doubling(blocks=4).layout(128, None, 7) == [(15, 4), (16, 1), (32, 1), (65, 1)]
    assert Doubling(blocks=2).layout(130, None, 7) == [(63, 6), (67, 1)]
    assert Doubling(blocks=3).layout(8, None, 3) == [(1, 1), (2, 1), (5, 1)]
    assert Doubling().layout(8, 4, 4) == [(4, 2), (4, 2)]


@pytest.mark.parametrize(
    ("blocks", "width", "block_length", "steps", "complaint"),
    [
        (2, 128, 32, 7, "block_length: 32 does not go with schedule.blocks = 2"),
        (8, 128, None, 7, "schedule.blocks: 8 are more than a response of 128 tokens has .at most 7"),
        (2, 128, None, 32, "steps: 32 do not fit 2 doubling blocks of 128 tokens .allowed: 7"),
        (1, 128, 32, 7, "steps: 7 do not divide into 4 blocks"),
    ],
)
def test_doubling_blocks_that_do_not_fit(
    blocks: int, width: int, block_length: int | None, steps: int, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        Doubling(blocks=blocks).check_fits(width, block_length, steps)


def test_bad_input_is_refused() -> None:
    for n, steps in ((-1, 3), (3, 0)):
        with pytest.raises(ValueError, match="n >= 0 tokens and steps >= 1"):
            Linear().counts(n, steps)
    for k in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="k is"):
            Power(k=k)
