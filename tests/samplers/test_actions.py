"""Distributions over openings: every outcome enumerated, against float64 formulas written out term by term."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from unveil.registry import lookup, names
from unveil.samplers.actions import Action, Bernoulli, BernoulliArgmax, DynamicPlackettLuce, PlackettLuce

LOGITS = [0.7, -1.2, 2.1, 0.3, -0.4]
OPEN = [True, True, False, True, True]  # the largest logit is no candidate
ACTIONS = [PlackettLuce, Bernoulli, BernoulliArgmax, DynamicPlackettLuce]


def noise(action: Action, rows: int, width: int, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(rows, action.channels, width, dtype=torch.float64, generator=drawn)


def row(places: dict[int, int], width: int = 5) -> Tensor:
    """order (1, R) from {position: place}."""
    return torch.tensor([[places.get(position, 0) for position in range(width)]])


def rankings(positions: list[int], least: int, most: int) -> list[Tensor]:
    lengths = range(least, most + 1)
    return [
        row({position: place for place, position in enumerate(drawn, 1)})
        for k in lengths
        for drawn in itertools.permutations(positions, k)
    ]


def outcomes(action: Action, count: int) -> list[Tensor]:
    candidates = [position for position, is_open in enumerate(OPEN) if is_open]
    if isinstance(action, PlackettLuce):
        return rankings(candidates, count, count)
    if isinstance(action, DynamicPlackettLuce):
        return rankings(candidates, 1, len(candidates))
    subsets = itertools.product([0, 1], repeat=len(candidates))
    opened = [row(dict(zip(candidates, subset, strict=True))) for subset in subsets]
    return [order for order in opened if order.any() or not isinstance(action, BernoulliArgmax)]


def formula(action: Action, logits: Tensor, candidates: list[int], order: Tensor) -> Tensor:
    """log pi of one row in float64, by the definition."""
    h = logits.double() / action.temperature
    drawn = sorted((position for position in candidates if order[position]), key=lambda position: int(order[position]))
    if isinstance(action, Bernoulli):
        terms = [torch.sigmoid(h[place] if place in drawn else -h[place]).log() for place in candidates]
        return torch.stack(terms).sum()
    left, total = list(candidates), h.sum() * 0
    if isinstance(action, PlackettLuce):
        for position in drawn if len(drawn) < len(candidates) else []:
            total = total + (h[position].exp() / h[left].exp().sum()).log()
            left.remove(position)
        return total
    total = (h[drawn[0]].exp() / h[left].exp().sum()).log()
    left.remove(drawn[0])
    for position in drawn[1:]:
        total = total + (h[position].exp() / (h[left].exp().sum() + 1)).log()
        left.remove(position)
    return total + (1 / (h[left].exp().sum() + 1)).log()


def test_all_are_registered() -> None:
    assert [lookup(Action, name) for name in names(Action)] == [
        Bernoulli,
        BernoulliArgmax,
        DynamicPlackettLuce,
        PlackettLuce,
    ]


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_outcomes_have_total_probability_one_and_come_as_often_as_they_say(
    kind: type[Action], temperature: float
) -> None:
    action, count, draws = kind(temperature=temperature), 2, 40_000
    every = outcomes(action, count)
    logits, candidates = torch.tensor(LOGITS), torch.tensor(OPEN)
    scored = action.log_prob(
        logits.expand(len(every), -1), candidates.expand(len(every), -1), torch.cat(every)
    ).double()
    probabilities = scored.exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)

    order = action.sample(
        logits.expand(draws, -1), candidates.expand(draws, -1), torch.full((draws,), count), noise(action, draws, 5)
    )
    counts = torch.stack([(order == outcome).all(1).sum() for outcome in every]).double()
    assert counts.sum() == draws
    expected = probabilities * draws
    common = expected >= 5
    chi = ((counts - expected) ** 2 / expected)[common].sum().item()
    freedom = int(common.sum())
    assert chi < freedom + 4 * math.sqrt(2 * freedom)
    assert counts[~common].sum() <= 5 * expected[~common].sum() + 10


@pytest.mark.parametrize("kind", [PlackettLuce, Bernoulli, DynamicPlackettLuce])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_log_probability_and_gradient_are_those_of_the_formula(kind: type[Action], scale: float) -> None:
    action = kind(temperature=0.8)
    candidates = [position for position, is_open in enumerate(OPEN) if is_open]
    for count in (1, 3):
        for order in outcomes(action, count):
            logits = (torch.tensor(LOGITS) * scale).requires_grad_()
            ours = action.log_prob(logits[None], torch.tensor([OPEN]), order)
            wide = logits.detach().double().requires_grad_()
            expected = formula(action, wide, candidates, order[0])
            assert ours.item() == pytest.approx(expected.item(), rel=2e-6, abs=2e-6)
            ours.sum().backward()
            expected.backward()
            torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", [PlackettLuce, Bernoulli, DynamicPlackettLuce])
def test_gradient_equals_finite_differences(kind: type[Action]) -> None:
    action, step = kind(temperature=1.3), 1e-3
    candidates = torch.tensor([OPEN])
    order = outcomes(action, 3)[-1]
    logits = torch.tensor([LOGITS], requires_grad=True)
    action.log_prob(logits, candidates, order).sum().backward()
    for position in range(5):
        nudge = torch.zeros(1, 5, dtype=torch.float64)
        nudge[0, position] = step
        up, down = (action.log_prob(torch.tensor([LOGITS]) + sign * nudge, candidates, order) for sign in (1, -1))
        assert logits.grad[0, position].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-3)


@pytest.mark.parametrize("kind", ACTIONS)
def test_huge_logits_neither_overflow_nor_make_gradients_nan(kind: type[Action]) -> None:
    action = kind()
    logits = torch.tensor([[2e4, -2e4, 1e3, 88.0, -1e3]], requires_grad=True)
    candidates = torch.tensor([OPEN])
    for order in outcomes(action, 2):
        log_prob = action.log_prob(logits, candidates, order)
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        assert torch.isfinite(log_prob).all() and (log_prob <= 0).all()
        assert torch.isfinite(gradient).all() and (gradient[~candidates] == 0).all()
    if isinstance(action, PlackettLuce):
        certain = row({0: 1, 3: 2})  # falling logits, far apart
        assert action.log_prob(logits, candidates, certain).item() == 0
        backwards = row({4: 1, 1: 2})
        assert action.log_prob(logits, candidates, backwards).item() == pytest.approx(-(2e4 + 1e3) - 4e4)


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_candidate_has_no_say(kind: type[Action], value: float) -> None:
    action = kind()
    logits = torch.tensor([LOGITS, LOGITS])
    logits[1, 2] = value
    candidates = torch.tensor([OPEN, OPEN])
    order = action.sample(logits, candidates, torch.tensor([2, 2]), noise(action, 1, 5).expand(2, -1, -1))
    assert torch.equal(order[0], order[1]) and order[0, 2] == 0
    logits.requires_grad_()
    log_prob = action.log_prob(logits, candidates, order)
    log_prob.sum().backward()
    assert log_prob[0] == log_prob[1] and torch.equal(logits.grad[0], logits.grad[1])


@pytest.mark.parametrize("kind", ACTIONS)
def test_a_batch_equals_its_rows(kind: type[Action]) -> None:
    action, rows, width = kind(), 16, 9
    drawn = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(rows, width, generator=drawn)
    candidates = torch.rand(rows, width, generator=drawn) < torch.linspace(0, 1, rows)[:, None]
    count = torch.randint(0, 5, (rows,), generator=drawn)
    uniforms = noise(action, rows, width)
    order = action.sample(logits, candidates, count, uniforms)
    log_prob = action.log_prob(logits, candidates, order)
    assert log_prob.dtype == torch.float32 and order.dtype == torch.long
    assert not order[~candidates].any()
    for index in range(rows):
        one = slice(index, index + 1)
        assert torch.equal(action.sample(logits[one], candidates[one], count[one], uniforms[one]), order[one])
        alone = action.log_prob(logits[one], candidates[one], order[one])
        torch.testing.assert_close(alone, log_prob[one], rtol=1e-6, atol=1e-6)
        # Padding on the right changes nothing.
        wide = torch.nn.functional.pad(candidates[one], (0, 3)), torch.nn.functional.pad(order[one], (0, 3))
        padded = action.log_prob(torch.nn.functional.pad(logits[one], (0, 3), value=9.0), *wide)
        torch.testing.assert_close(padded, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIONS)
def test_without_candidates_nothing_happens_and_it_was_certain(kind: type[Action]) -> None:
    action = kind()
    logits, closed = torch.randn(2, 4, requires_grad=True), torch.zeros(2, 4, dtype=torch.bool)
    order = action.sample(logits, closed, torch.tensor([2, 0]), noise(action, 2, 4))
    log_prob = action.log_prob(logits, closed, order)
    log_prob.sum().backward()
    assert not order.any() and (log_prob == 0).all() and (logits.grad == 0).all()


def test_taking_all_candidates_is_certain_in_any_order() -> None:
    action = PlackettLuce()
    logits = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    everything = torch.ones(1, 3, dtype=torch.bool)
    for drawn in rankings([0, 1, 2], 3, 3):
        log_prob = action.log_prob(logits, everything, drawn[:, :3])
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        assert log_prob.item() == 0 and (gradient == 0).all()
    order = action.sample(logits, everything, torch.tensor([7]), noise(action, 1, 3))
    assert sorted(order[0].tolist()) == [1, 2, 3]


def test_equal_noise_gives_the_greedy_choice() -> None:
    logits, candidates = torch.tensor([LOGITS]), torch.tensor([OPEN])

    def greedy(action: Action) -> list[int]:
        flat = torch.full((1, action.channels, 5), 0.5, dtype=torch.float64)
        return action.sample(logits, candidates, torch.tensor([3]), flat)[0].tolist()

    assert greedy(PlackettLuce()) == [1, 0, 0, 2, 3]
    assert greedy(Bernoulli()) == greedy(BernoulliArgmax()) == [1, 0, 0, 1, 0]
    assert greedy(DynamicPlackettLuce()) == [1, 0, 0, 2, 0]
    flat = torch.full((1, 1, 5), 0.5, dtype=torch.float64)
    shy = logits - 9
    assert not Bernoulli().sample(shy, candidates, torch.tensor([0]), flat).any()
    assert BernoulliArgmax().sample(shy, candidates, torch.tensor([0]), flat)[0].tolist() == [1, 0, 0, 0, 0]


def test_noise_of_another_kind_is_refused() -> None:
    logits, candidates, count = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    with pytest.raises(ValueError, match="float64"):
        PlackettLuce().sample(logits, candidates, count, torch.rand(1, 1, 3))
    with pytest.raises(ValueError, match=r"dpls needs float64 noise \(b, 2, R\)"):
        DynamicPlackettLuce().sample(logits, candidates, count, torch.rand(1, 1, 3, dtype=torch.float64))


def test_the_extreme_noise_of_zero_is_harmless() -> None:
    for kind in ACTIONS:
        action = kind()
        zero = torch.zeros(1, action.channels, 5, dtype=torch.float64)
        order = action.sample(torch.tensor([LOGITS]), torch.tensor([OPEN]), torch.tensor([2]), zero)
        assert not order[0, 2] and order.any()
