"""Estimators of the ELBO: quadrature, distributions of masks, and expectations against enumeration of all masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import tiny
from unveil.learning.estimators import (
    LOWEST_TIME,
    Coupled,
    DoubleMonteCarlo,
    Masks,
    PartialMask,
    Rule,
    SemiDeterministic,
    coupled_masks,
    double_mc_masks,
    partial_masks,
    partial_time,
    quadrature,
    sdmc_masks,
)
from unveil.learning.likelihoods import TokenViews
from unveil.learning.views import Inner, Likelihood
from unveil.registry import UserError
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import derive_seed, generator

SIZE = 5
MASK, PAD, END = 0, 1, 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_gauss_rules_integrate_polynomials_exactly(count: int) -> None:
    times, weights = quadrature(f"gauss-{count}")  # type: ignore[arg-type]
    nodes, node_weights = np.polynomial.legendre.leggauss(count)
    np.testing.assert_allclose(times.numpy(), (nodes + 1) / 2, atol=1e-14)
    np.testing.assert_allclose(weights.numpy(), node_weights / 2, atol=1e-14)
    for degree in range(2 * count + 1):
        error = abs(float((weights * times**degree).sum()) - 1 / (degree + 1))
        assert error < 1e-14 if degree < 2 * count else error > 1e-6


def test_published_nodes() -> None:
    assert quadrature("gauss-1")[0].tolist() == [0.5]
    assert quadrature("gauss-2")[0].tolist() == pytest.approx([0.2113, 0.7887], abs=1e-4)
    assert quadrature("gauss-3")[0].tolist() == pytest.approx([0.1127, 0.5, 0.8873], abs=1e-4)
    assert quadrature("gauss-3")[1].tolist() == pytest.approx([5 / 18, 8 / 18, 5 / 18])
    times, weights = quadrature("simpson")
    assert times.tolist() == [0.1, 0.5, 1.0] and weights.tolist() == pytest.approx([1 / 6, 4 / 6, 1 / 6])


def table(seed: int = 0) -> tuple[dict[tuple[bool, ...], float], Callable[[Masks], float]]:
    """Sum over masked tokens of log p for all 2^5 masks of one answer under a tiny network, and an estimate by it."""
    net = tiny.denoiser(seed).double().requires_grad_(False)
    prompt, answer = [4, 6, 5], [7, 4, 4, 6, 2]
    sums = {}
    for mask in itertools.product([False, True], repeat=SIZE):
        canvas = torch.tensor([prompt + [MASK if hole else t for hole, t in zip(mask, answer, strict=True)]])
        logs = net(canvas)[0, len(prompt) :].log_softmax(-1)
        sums[mask] = sum(float(logs[i, answer[i]]) for i in range(SIZE) if mask[i])

    def estimate(masks: Masks) -> float:
        holes = [tuple(row) for row in masks.holes.tolist()]
        return sum(float(c) * sums[hole] for c, hole in zip(masks.coefficient, holes, strict=True))

    return sums, estimate


def by_count(sums: dict[tuple[bool, ...], float], n: int) -> float:
    """E[sum of log p] over all subsets of n tokens."""
    return float(np.mean([value for mask, value in sums.items() if sum(mask) == n]))


def at_time(sums: dict[tuple[bool, ...], float], t: float) -> float:
    """E[1/t sum of log p] when every token is masked with probability t."""
    return sum(t ** sum(m) * (1 - t) ** (SIZE - sum(m)) * value for m, value in sums.items()) / t


def exact_elbo(sums: dict[tuple[bool, ...], float]) -> float:
    return sum(by_count(sums, n) / n for n in range(1, SIZE + 1))


def assert_mean(draw: Callable[[torch.Generator], float], expected: float, count: int = 4000) -> None:
    """The mean of many draws is ``expected`` within 4 standard errors, which are below 3 % of it."""
    stream = generator("estimates")
    values = np.array([draw(stream) for _ in range(count)])
    error = values.std(ddof=1) / math.sqrt(count)
    assert error < 0.03 * abs(expected)
    assert abs(values.mean() - expected) < max(4 * error, 1e-9 * abs(expected))


def test_the_two_forms_of_the_elbo_are_the_same_number() -> None:
    sums, _ = table()
    times, weights = quadrature("gauss-5")  # the integrand is a polynomial of degree 4
    integral = sum(float(w) * at_time(sums, float(t)) for t, w in zip(times, weights, strict=True))
    assert integral == pytest.approx(exact_elbo(sums), rel=1e-12)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("draws", [1, 4])
def test_double_monte_carlo_is_unbiased(stratified: bool, draws: int) -> None:
    sums, estimate = table()
    assert_mean(lambda s: estimate(double_mc_masks(SIZE, draws, "count", stratified, s)), exact_elbo(sums))


@pytest.mark.parametrize("stratified", [False, True])
def test_double_monte_carlo_over_times(stratified: bool) -> None:
    sums, estimate = table()
    times, weights = quadrature("gauss-5")
    times = LOWEST_TIME + (1 - LOWEST_TIME) * times
    expected = sum(float(w) * at_time(sums, float(t)) for t, w in zip(times, weights, strict=True))
    assert expected == pytest.approx(exact_elbo(sums), rel=5e-3)
    assert_mean(lambda s: estimate(double_mc_masks(SIZE, 4, "time", stratified, s)), expected)


def test_stratified_times_lie_one_in_each_part() -> None:
    for number in range(20):
        times = double_mc_masks(400, 8, "time", True, generator(number)).times
        assert ((times - LOWEST_TIME) / (1 - LOWEST_TIME) * 8).floor().tolist() == list(range(8))
        counts = double_mc_masks(400, 8, "count", True, generator(number)).holes.sum(1)
        assert ((counts - 1) // 50).tolist() == list(range(8))


@pytest.mark.parametrize("rule", ["gauss-1", "gauss-2", "gauss-3", "simpson"])
@pytest.mark.parametrize("realised", [False, True])
def test_semi_deterministic_expectation(rule: Rule, realised: bool) -> None:
    """Nothing is random but the masks at a node: the mean is the rule over exact counts."""
    sums, estimate = table()
    times, weights = quadrature(rule)
    expected = 0.0
    for t, w in zip(times.tolist(), weights.tolist(), strict=True):
        n = max(1, int(t * SIZE))
        expected += w * by_count(sums, n) / (n / SIZE if realised else t)
    assert_mean(lambda s: estimate(sdmc_masks(SIZE, rule, 2, realised, s)), expected, 2000)


@pytest.mark.parametrize(("size", "counts"), [(1, [1, 1, 1]), (4, [1, 2, 3]), (16, [1, 8, 14]), (256, [28, 128, 227])])
def test_semi_deterministic_masks_count_exactly(size: int, counts: list[int]) -> None:
    masks = sdmc_masks(size, "gauss-3", 2, True, generator(size))
    assert masks.holes.sum(1).tolist() == [n for n in counts for _ in range(2)]
    times, weights = quadrature("gauss-3")
    expected = [w * size / n / 2 for w, n in zip(weights.tolist(), counts, strict=True) for _ in range(2)]
    assert masks.coefficient.tolist() == pytest.approx(expected)
    published = sdmc_masks(size, "gauss-3", 2, False, generator(size))
    assert torch.equal(published.holes, masks.holes)
    torch.testing.assert_close(published.coefficient, (weights / times / 2).repeat_interleave(2))


def test_simpson_masks_no_fewer_for_rounding() -> None:
    """0.1 * 30 and 0.5 * 30 are 3 and 15, whatever floats make of them."""
    for size in range(10, 200, 10):
        assert sdmc_masks(size, "simpson", 1, True, generator(0)).holes.sum(1).tolist() == [size // 10, size // 2, size]


def test_coupled_masks_are_complementary() -> None:
    first_times = []
    for number in range(200):
        masks = coupled_masks(12, 0.2, 0.8, 0.5, generator(number))
        first, second, full = masks.holes
        assert torch.equal(first, ~second) and full.all()
        t = float(masks.times[0])
        first_times.append(t)
        assert masks.times.tolist() == pytest.approx([t, 1 - t, 1])
        assert masks.coefficient.tolist() == pytest.approx([1 / (2 * t), 1 / (2 * (1 - t)), 0.5])
    assert 0.2 <= min(first_times) < 0.23 and 0.77 < max(first_times) <= 0.8
    assert len(coupled_masks(12, 0.2, 0.8, 0.0, generator(0)).holes) == 2


def test_coupled_expectation() -> None:
    sums, estimate = table()
    for t in (0.3, 0.5):
        expected = 0.5 * (at_time(sums, t) + at_time(sums, 1 - t)) + 0.5 * by_count(sums, SIZE)
        assert_mean(lambda s, t=t: estimate(coupled_masks(SIZE, t, t, 0.5, s)), expected, 3000)


def test_partial_masks() -> None:
    assert [partial_time(0.4, number, 4) for number in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert partial_time(0.4, 0, 1) == 0.4
    assert partial_masks(7, 1.0, generator(0)).holes.all()
    shares = [partial_masks(50, 0.3, generator(n)).holes.double().mean().item() for n in range(400)]
    assert np.mean(shares) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 50 / 400))
    assert all(partial_masks(3, 1e-6, generator(n)).holes.sum() == 1 for n in range(20))


ESTIMATORS = {
    "sdmc": SemiDeterministic(rule="gauss-2", draws=2),
    "double_mc": DoubleMonteCarlo(draws=3),
    "double_mc time": DoubleMonteCarlo(draws=3, form="time", stratified=True),
    "coupled": Coupled(),
    "partial_mask": PartialMask(),
}


Ids = list[list[int]]


def trajectory(responses: Ids, prompts: Ids, given: Ids | None = None) -> TokenTrajectory:
    """Finished chains with left-padded prompts."""
    width = max(len(prompt) for prompt in prompts)
    count, length = len(responses), len(responses[0])
    prompt_ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    valid = torch.ones(count, width + length, dtype=torch.bool)
    valid[:, :width] = prompt_ids != PAD
    return TokenTrajectory(
        prompt_ids=prompt_ids,
        response_ids=torch.tensor(responses),
        valid=valid,
        active=torch.ones(count, 2, dtype=torch.bool),
        planned=torch.full((count,), 2),
        given=torch.zeros(count, length, dtype=torch.bool) if given is None else torch.tensor(given, dtype=torch.bool),
        forwards=0,
        mask_id=MASK,
    )


def views_of(
    estimator: Likelihood, chains: TokenTrajectory, seeds: list[int], number: int = 0, count: int = 3
) -> TokenViews:
    inner = Inner(number=number, count=count)
    return estimator.views(chains, chains.active.float(), seeds, tiny.denoiser().spec, inner)


def shares(views: TokenViews, row: int) -> float:
    """What a chain's ratio is normalised by."""
    return float(views.length[views.rows == row].sum())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_views_show_the_unmasked_tokens_and_score_the_masked_ones(name: str) -> None:
    chains = trajectory([[7, 4, 2, 2, 5, 6], [4, 5, 6, 7, 4, 5]], [[4], [5, 6, 7]])
    for seed in range(10):
        views = views_of(ESTIMATORS[name], chains, [seed, 12])
        assert views.rows.tolist() == sorted(views.rows.tolist()) and set(views.steps.tolist()) == {1}
        responses, width = chains.response_ids[views.rows], views.prompt_width
        assert torch.equal(views.ids[:, :width], chains.prompt_ids[views.rows])
        assert torch.equal(views.ids[:, width:], torch.where(views.scored, MASK, responses))
        assert torch.equal(views.targets, responses) and torch.equal(views.holes, views.scored.sum(1))
        assert (views.holes > 0).all() and (views.factors[views.scored] > 0).all()
        assert shares(views, 0) == pytest.approx(6) and shares(views, 1) == pytest.approx(6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_dropped_tokens_stay_masked_and_given_ones_can_be_shown(name: str) -> None:
    responses, given = [[7, 4, 2, 2, 5, 6], [4, 5, 6, 7, 4, 5]], [[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]]
    chains = trajectory(responses, [[4], [5, 6, 7]], given)
    dropping = type(ESTIMATORS[name])(**{**vars(ESTIMATORS[name]), "after_end": "drop"})
    found = torch.zeros(2, 6, dtype=torch.bool)
    for seed in range(30):
        views = views_of(dropping, chains, [seed, seed])
        for view in range(len(views)):
            found[views.rows[view]] |= views.scored[view]
        first = views.rows == 0
        assert (views.ids[first][:, -3:] == MASK).all() and not views.scored[first][:, 3:].any()
        assert shares(views, 0) == pytest.approx(3) and shares(views, 1) == pytest.approx(6)
    assert found.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    showing = type(dropping)(**{**vars(dropping), "given": "show"})
    for seed in range(30):
        views = views_of(showing, chains, [seed, seed])
        held = chains.given[views.rows]
        assert torch.equal(views.ids[:, views.prompt_width :][held], chains.response_ids[views.rows][held])
        assert not views.scored[held].any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masks_depend_on_the_chain_alone(name: str) -> None:
    """Another batch, another order, other padding: the same masks. Another seed or inner update: others."""
    responses = [[7, 4, 5, 2, 5, 6], [4, 5, 6, 7, 4, 5], [5, 5, 4, 2, 2, 2]]
    prompts = [[4], [5, 6, 7], [6, 6]]
    seeds = [derive_seed("chain", row) for row in range(3)]
    estimator = ESTIMATORS[name]
    together = views_of(estimator, trajectory(responses, prompts), seeds)
    for row in range(3):
        alone = views_of(estimator, trajectory([responses[row]], [prompts[row]]), [seeds[row]])
        own = together.rows == row
        assert torch.equal(alone.scored, together.scored[own])
        assert alone.coefficient is not None and together.coefficient is not None
        assert torch.equal(alone.coefficient, together.coefficient[own])
    again = views_of(estimator, trajectory(responses, prompts), seeds)
    assert torch.equal(again.scored, together.scored)
    other = views_of(estimator, trajectory(responses, prompts), [seed + 1 for seed in seeds])
    later = views_of(estimator, trajectory(responses, prompts), seeds, 1)
    assert not torch.equal(other.scored, together.scored) and not torch.equal(later.scored, together.scored)


def test_partial_mask_reaches_the_full_mask_at_the_last_inner_update() -> None:
    chains = trajectory([[4] * 200], [[4]])
    masked = [float(views_of(PartialMask(), chains, [5], number, 4).scored.double().mean()) for number in range(4)]
    first = float(views_of(PartialMask(), chains, [5], 0, 4).times[0])  # type: ignore[index]
    expected = [first + (1 - first) * number / 3 for number in range(4)]
    assert masked == pytest.approx(expected, abs=0.12) and masked[-1] == 1


def test_an_answer_that_was_given_whole_has_no_views() -> None:
    chains = trajectory([[4, 5, 6], [4, 5, 6]], [[4], [5]], [[1, 1, 1], [0, 0, 0]])
    for estimator in ESTIMATORS.values():
        views = views_of(type(estimator)(**{**vars(estimator), "given": "show"}), chains, [1, 2])
        assert set(views.rows.tolist()) == {1} and torch.isfinite(views.factors).all()


def test_coupled_refuses_an_empty_interval() -> None:
    with pytest.raises(UserError, match="low: should be at most high"):
        Coupled(low=0.9)


class Chain:
    """A first-order Markov chain as its own denoiser: p(y_i | the tokens shown) from the nearest ones on both sides."""

    def __init__(self, states: int, length: int, sharpness: float, seed: int) -> None:
        stream = generator("chain", seed)
        self.step = torch.softmax(sharpness * torch.randn(states, states, generator=stream, dtype=torch.float64), 1)
        self.start = torch.linalg.matrix_power(self.step, 500)[0]
        powers = [torch.eye(states, dtype=torch.float64)]
        for _ in range(length):
            powers.append(powers[-1] @ self.step)
        self.powers, self.length = torch.stack(powers), length

    def sample(self, stream: torch.Generator) -> torch.Tensor:
        state = torch.multinomial(self.start, 1, generator=stream)
        states = [state]
        for _ in range(self.length - 1):
            states.append(torch.multinomial(self.step[states[-1][0]], 1, generator=stream))
        return torch.cat(states)

    def log_prob(self, y: torch.Tensor) -> float:
        return float(self.start[y[0]].log() + self.step[y[:-1], y[1:]].log().sum())

    def estimate(self, y: torch.Tensor, masks: Masks) -> float:
        place = torch.arange(self.length)
        before = torch.where(masks.holes, -1, place).cummax(1).values
        after = torch.where(masks.holes, self.length, place).flip(1).cummin(1).values.flip(1)
        k, i = masks.holes.nonzero(as_tuple=True)
        a, b = before[k, i], after[k, i]
        forward = torch.where((a >= 0)[:, None], self.powers[i - a.clamp(min=0), y[a.clamp(min=0)]], self.start)
        last = y[b.clamp(max=self.length - 1)]
        backward = self.powers[b - i][torch.arange(len(i)), :, last].masked_fill((b == self.length)[:, None], 1.0)
        weight = forward * backward
        log_prob = (weight[torch.arange(len(i)), y[i]] / weight.sum(1)).log()
        return float((masks.coefficient[k] * log_prob).sum())


def test_with_the_exact_posterior_the_elbo_is_the_log_likelihood() -> None:
    chain = Chain(3, 6, 2.0, 0)
    y = chain.sample(generator("answer"))
    total = 0.0
    for n in range(1, 7):
        subsets = [list(chosen) for chosen in itertools.combinations(range(6), n)]
        holes = torch.zeros(len(subsets), 6, dtype=torch.bool)
        for row, chosen in enumerate(subsets):
            holes[row, chosen] = True
        weight = torch.full((len(subsets),), 1 / n / len(subsets), dtype=torch.float64)
        total += chain.estimate(y, Masks(holes=holes, coefficient=weight, times=weight))
    assert total == pytest.approx(chain.log_prob(y), rel=1e-12)


def test_three_nodes_are_worth_far_more_than_four_random_times() -> None:
    """On answers of 128 tokens, against the exact log-likelihood (the claim of GDPO, 2510.08554)."""
    chain = Chain(16, 128, 3.0, 0)
    stream = generator("answers")
    errors: dict[str, list[float]] = {"sdmc 3": [], "double_mc 4": [], "stratified 4": []}
    for _ in range(25):
        y = chain.sample(stream)
        truth = chain.log_prob(y)
        for _ in range(10):
            drawn = {
                "sdmc 3": sdmc_masks(128, "gauss-3", 1, True, stream),
                "double_mc 4": double_mc_masks(128, 4, "count", False, stream),
                "stratified 4": double_mc_masks(128, 4, "count", True, stream),
            }
            for name, masks in drawn.items():
                errors[name].append(chain.estimate(y, masks) - truth)
    rmse = {name: float(np.square(values).mean() ** 0.5) for name, values in errors.items()}
    assert rmse["sdmc 3"] <= 0.5 * rmse["double_mc 4"]
    assert rmse["stratified 4"] < rmse["double_mc 4"]
