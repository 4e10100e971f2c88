"""Units of a ratio, and the shared reductions, against sums written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unveil.learning.likelihoods import TokenViews, without
from unveil.learning.objectives import SequenceMean, StepMean, TokenMean, TokenSum, unit_of
from unveil.samplers.trajectory import TokenTrajectory


def views() -> TokenViews:
    """Chain 0 has steps 0 and 2; chain 1 two views of one estimator (step 3), which share position 1."""
    scored = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    nothing = torch.zeros(4, 5, dtype=torch.long)
    return TokenViews(
        ids=nothing,
        valid=nothing.bool(),
        prompt_width=2,
        scored=scored,
        targets=nothing[:, :3],
        rows=torch.tensor([0, 0, 1, 1]),
        steps=torch.tensor([0, 2, 3, 3]),
        holes=scored.sum(1),
        length=torch.tensor([2.0, 1.0, 1.5, 1.5]),
        coefficient=torch.full((4, 3), 0.5),
    )


def chains() -> TokenTrajectory:
    ids = torch.zeros(2, 3, dtype=torch.long)
    return TokenTrajectory(
        prompt_ids=ids[:, :2], response_ids=ids, valid=torch.ones(2, 5, dtype=torch.bool),
        active=torch.ones(2, 4, dtype=torch.bool), given=ids.bool(), planned=torch.tensor([4, 4]),
        forwards=0, mask_id=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("level", "members"),
    [
        ("token", [[0], [1], [2], [3], [4, 5], [6]]),  # position 1 of chain 1 is scored twice
        ("step", [[0, 1], [2], [3, 4, 5, 6]]),
        ("sequence", [[0, 1, 2], [3, 4, 5, 6]]),
    ],
)
def test_units(level: str, members: list[list[int]]) -> None:
    unit, count = unit_of(views(), level)
    assert count == len(members)
    assert sorted((unit == number).nonzero().flatten().tolist() for number in range(count)) == members


def test_no_items_no_units() -> None:
    nothing = without(views(), torch.zeros(4, 3, dtype=torch.bool))
    assert unit_of(nothing, "token")[1] == 0
    assert nothing.length.tolist() == [2.0, 1.0, 1.5, 1.5]  # an estimator's
    plain = without(replace(views(), coefficient=None), torch.tensor([[1, 0, 1]]).expand(4, 3).bool())
    assert plain.length.tolist() == [1.0, 1.0, 0.5, 0.5]


def test_factors_are_coefficients_at_items() -> None:
    assert torch.equal(views().factors, 0.5 * views().scored)


def test_weights_by_hand() -> None:
    def total(value: float) -> float:
        return 2 * value  # as if a second rank had as much

    scored = views().scored.float()
    for weighting, expected in (
        (TokenMean(), scored / 14),
        (TokenSum(), scored / 4),
        (StepMean(), scored / torch.tensor([2.0, 1.0, 2.0, 2.0])[:, None] / 2 / 4),
    ):
        policy, kl = weighting.weights(views(), torch.ones(4), chains(), total)
        torch.testing.assert_close(policy, expected)
        assert torch.equal(policy, kl)


def test_a_step_without_items_is_no_step_of_the_mean() -> None:
    empty = without(views(), torch.tensor([[1], [0], [1], [1]]).expand(4, 3).bool())
    policy, _ = StepMean().weights(empty, torch.ones(4), chains(), float)
    assert policy.sum(1).tolist() == pytest.approx([1 / 2, 0, 1 / 4, 1 / 4])


@pytest.mark.parametrize("by_length", [False, True])
def test_sequence_mean_by_hand(by_length: bool) -> None:
    """Two chains on each of two ranks, of length 3 each; of chain 1 two views show position 1."""
    policy, kl = SequenceMean(by_length=by_length).weights(views(), torch.ones(4), chains(), lambda value: 2 * value)
    per_chain = 1 / 4 / (3 if by_length else 1)
    expected = views().scored / torch.tensor([3.0, 3.0, 4.0, 4.0])[:, None] * per_chain
    torch.testing.assert_close(policy, expected)
    token = 1 / 4 / 3
    torch.testing.assert_close(
        kl, token * torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0.5, 0], [0, 0.5, 1]], dtype=torch.float32)
    )
