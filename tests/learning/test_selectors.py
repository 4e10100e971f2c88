"""Which steps are chosen."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from unveil.learning.selectors import AllSteps, ButLast, TopAdvantage
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator

SPEC = tiny.denoiser().spec


def chains(active: torch.Tensor) -> TokenTrajectory:
    """Chains of which only the steps matter."""
    batch = len(active)
    return TokenTrajectory(
        prompt_ids=torch.zeros(batch, 1, dtype=torch.long),
        response_ids=torch.zeros(batch, 1, dtype=torch.long),
        valid=torch.ones(batch, 2, dtype=torch.bool),
        active=active,
        given=torch.zeros(batch, 1, dtype=torch.bool),
        planned=active.sum(1),
        forwards=0,
        mask_id=0,
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), k=st.integers(1, 7))
def test_top_advantage_takes_the_largest_and_of_equals_the_earlier(seed: int, k: int) -> None:
    stream = generator(seed)
    advantages = torch.randint(-2, 3, (6, 5), generator=stream).float()
    lengths = torch.randint(1, 6, (6,), generator=stream)
    active = torch.arange(5) < lengths[:, None]
    chosen = TopAdvantage(k=k).choose(advantages * active, chains(active), [0] * 6, SPEC)
    for row in range(6):
        steps = sorted(range(int(lengths[row])), key=lambda s: (-abs(float(advantages[row, s])), s))[:k]
        assert chosen[row].nonzero().flatten().tolist() == sorted(steps)


def test_each_chain_chooses_by_itself() -> None:
    advantages = torch.tensor([[0.0, 0.1, 0.2], [9.0, -8.0, 7.0]])
    active = torch.ones(2, 3, dtype=torch.bool)
    chosen = TopAdvantage(k=1).choose(advantages, chains(active), [0, 0], SPEC)
    assert chosen.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_share_depends_on_the_chain_s_seed_alone() -> None:
    active = torch.ones(40, 6, dtype=torch.bool)
    active[3, 3:] = False
    seeds = list(range(40))
    half = ButLast(share=0.4)
    chosen = half.choose(torch.zeros(40, 6), chains(active), seeds, SPEC)
    counts = [2] * 40
    counts[3] = 1
    assert chosen.sum(1).tolist() == counts and not chosen[~active].any() and not chosen[:, 5].any()
    backwards = half.choose(torch.rand(40, 6), chains(active.flip(0)), seeds[::-1], SPEC)
    assert torch.equal(backwards.flip(0), chosen)
    assert len({tuple(row) for row in chosen.tolist()}) > 5


def test_a_share_is_uniform() -> None:
    count = 3000
    active = torch.ones(count, 6, dtype=torch.bool)
    share = ButLast(share=0.4).choose(torch.zeros(count, 6), chains(active), range(count), SPEC).mean(0)
    assert ((share[:5] - 0.4).abs() < 5 * (0.24 / count) ** 0.5).all() and share[5] == 0


def test_all_steps_are_the_active_ones() -> None:
    active = torch.tensor([[True, True], [True, False]])
    chosen = AllSteps().choose(torch.zeros(2, 2), chains(active), [0, 0], SPEC)
    assert torch.equal(chosen, active.float())
