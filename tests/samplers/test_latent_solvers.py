"""Solvers of continuous samplers on data whose exact guess is known: order, equivalence to the published formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from unveil.processes.gaussian import Flow, GaussianProcess, Guess, VarianceExploding, VariancePreserving
from unveil.processes.kernels import CoefficientsPreserving, Ddim, Kernel, Tau, deterministic
from unveil.registry import UserError
from unveil.samplers.grids import Karras, Uniform
from unveil.samplers.latent_solvers import (
    Churn,
    DpmSolver2M,
    First,
    Heun,
    LatentSolver,
    Memory,
    SaSolver,
    adams_weights,
)

PATHS: list[GaussianProcess] = [Flow(), VariancePreserving(), VarianceExploding(sigma_max=20.0, rho=3.0)]
CENTRES, WIDTH = torch.tensor([-1.2, 0.4, 1.5], dtype=torch.float64), 0.35


def exact(process: GaussianProcess, x: Tensor, t: Tensor) -> Guess:
    """E[x_0 | x_t] and the noise that goes with it, for three bumps of equal mass in one dimension; x (B, 1)."""
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    total = alpha**2 * WIDTH**2 + sigma**2
    share = (-((x - alpha * CENTRES) ** 2) / (2 * total)).softmax(-1)
    means = CENTRES + alpha * WIDTH**2 / total * (x - alpha * CENTRES)
    return process.rederived((share * means).sum(-1, keepdim=True), x, t)


def run(
    solver: LatentSolver, process: GaussianProcess, times: Tensor, x: Tensor, calls: list[int] | None = None
) -> Tensor:
    """Deterministic steps of x (B, 1) through ``times`` (N + 1,)."""

    def network(x: Tensor, t: Tensor) -> Guess:
        if calls is not None:
            calls.append(len(x))
        return exact(process, x, t)

    memory = Memory()
    for now, after in itertools.pairwise(times):
        t, s = now.expand(len(x)), after.expand(len(x))
        guess = solver.solve(process, network(x, t), x, t, s, memory, network)
        x = deterministic(process, guess, s)
    return x


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("solver", "order"), [(First, 1), (Heun, 2), (DpmSolver2M, 2), (lambda: SaSolver(corrector=0), 2)]
)
def test_order(solver: Callable[[], LatentSolver], order: int, path: GaussianProcess) -> None:
    """The change from N to 2N steps over that from 2N to 4N, where the ODE is smooth."""
    start = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    start = start * (path.alpha(torch.tensor(0.95)) + path.sigma(torch.tensor(0.95)))
    ends = [run(solver(), path, Uniform(start=0.95, end=0.15).times(path, n), start) for n in (48, 96, 192)]
    changes = [float((fine - coarse).abs().mean()) for coarse, fine in itertools.pairwise(ends)]
    assert abs(math.log2(changes[0] / changes[1]) - order) < 0.25
    assert (ends[-1] - run(Heun(), path, Uniform(start=0.95, end=0.15).times(path, 192), start)).abs().max() < 0.02


def test_forward_passes() -> None:
    x = torch.zeros(3, 1, dtype=torch.float64)
    for solver in (First(), Heun(), DpmSolver2M(), SaSolver()):
        calls: list[int] = []
        run(solver, Flow(), Uniform(end=0.1).times(Flow(), 5), x, calls)
        assert calls == [3] * 5 * solver.evaluations


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ode", "sde"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_2m_is_the_published_formula(path: GaussianProcess, eta: float) -> None:
    grid = torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64)
    before, t, s = (time[None].expand(4) for time in grid)
    x, x0, last = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    memory: Memory = {}
    solver = DpmSolver2M()
    first = path.rederived(last, x, before)
    assert solver.solve(path, first, x, before, t, memory, exact_never) is first
    guess = solver.solve(path, path.rederived(x0, x, t), x, t, s, memory, exact_never)
    step = Ddim(eta=eta).step(path, guess, x, t, s)

    levels = [path.half_log_snr(time)[:, None] for time in (before, t, s)]
    h_before, h = levels[1] - levels[0], levels[2] - levels[1]
    r = h_before / h
    extrapolated = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
    share, alpha = (path.sigma(s) / path.sigma(t))[:, None], path.alpha(s)[:, None]
    if eta == 0:
        mean = share * x - alpha * torch.expm1(-h) * extrapolated
    else:
        mean = share * (-h).exp() * x - alpha * torch.expm1(-2 * h) * extrapolated
    torch.testing.assert_close(step.mean, mean)


def exact_never(x: Tensor, t: Tensor) -> Guess:
    raise AssertionError("the solver asked the network again")


def test_rows_at_different_times_do_not_mix() -> None:
    """Heun with one row that ends: that row takes a first-order step, the other as if it were alone."""
    path, x = Flow(), torch.tensor([[0.3], [-0.5]], dtype=torch.float64)
    t, s = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.2])

    def network(x: Tensor, t: Tensor) -> Guess:
        # At t = 0 no noise can be re-derived; what is returned there must not be used.
        return exact(path, x, t.double().clamp(min=1e-9))

    both = Heun().solve(path, network(x, t), x, t, s, {}, network)
    alone = Heun().solve(path, network(x[1:], t[1:]), x[1:], t[1:], s[1:], {}, network)
    assert torch.equal(both.x0[:1], network(x, t).x0[:1])
    assert torch.equal(both.eps[1:], alone.eps)


def test_a_flow_from_pure_noise_to_data() -> None:
    """From t = 1, where lambda is -inf, to 0, where it is inf."""
    x = torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    reference = run(Heun(), Flow(), Uniform().times(Flow(), 512), x)
    errors = [float((run(solver, Flow(), Uniform().times(Flow(), 32), x) - reference).abs().max())
              for solver in (First(), Heun(), DpmSolver2M(), SaSolver())]  # fmt: skip
    assert max(errors[1:]) < errors[0] / 3


# ---- SA-Solver

STEPS: list[Kernel] = [Tau(tau=0.6), Ddim(eta=0.7), CoefficientsPreserving(noise=0.4)]


def integral(f: Callable[[Tensor], Tensor], start: float, end: float) -> float:
    """By Gauss's rule with 60 points."""
    points, weights = (torch.from_numpy(one) for one in numpy.polynomial.legendre.leggauss(60))
    length = (end - start) / 2
    return float((weights * f(start + length * (1 + points))).sum() * length)


@pytest.mark.parametrize("z", [0.01, 0.7, 6.0, 40.0])
def test_weights_are_those_of_the_polynomial_under_the_exponential(z: float) -> None:
    """Against quadrature of each Lagrange polynomial; the places of a predictor, then those of a corrector."""
    start, end = 0.3, 1.1
    for places in ([0.3], [0.3, -0.2], [0.3, -0.2, -0.5], [0.3, -0.2, -0.5, -1.4], [1.1, 0.3, -0.2]):

        def decay(at: Tensor) -> Tensor:
            return (-z * (end - at) / (end - start)).exp()

        def own(number: int, at: Tensor, places: list[float] = places) -> Tensor:
            others = [other for place, other in enumerate(places) if place != number]
            return math.prod(((at - other) / (places[number] - other) for other in others), start=torch.ones_like(at))

        whole = integral(decay, start, end)
        wanted = [integral(lambda at, k=k: own(k, at) * decay(at), start, end) / whole for k in range(len(places))]
        time = [torch.tensor([value, value], dtype=torch.float64) for value in (start, end, z)]
        found = adams_weights(torch.tensor([places] * 2, dtype=torch.float64), *time)
        torch.testing.assert_close(found, torch.tensor([wanted] * 2, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("kernel", STEPS, ids=lambda kernel: kernel.name)
def test_sa_solver_is_the_papers_recursion(kernel: Kernel, path: GaussianProcess) -> None:
    """Predictor and corrector of order 2 with their noise, written out in lambda; each kernel is one tau per step."""
    times = torch.tensor([0.9, 0.75, 0.55, 0.4, 0.3], dtype=torch.float64)
    x = theirs = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = path.alpha(times), path.sigma(times)
    level = (alpha / sigma).log()

    def network(x: Tensor, t: Tensor) -> Guess:
        return path.rederived(torch.tanh(1.3 * x + 0.4 * t[:, None]), x, t)  # any function of both

    guesses: list[Tensor] = []
    tau2: list[float] = []
    starts: list[Tensor] = []

    def step(k: int, nodes: list[int], start: Tensor) -> Tensor:
        """From time k to k + 1 with the polynomial through the guesses at ``nodes``."""
        a, h = 1 + tau2[k], float(level[k + 1] - level[k])
        drift = torch.zeros_like(start)
        for own in nodes:
            others = [level[other] for other in nodes if other != own]

            def f(at: Tensor, own: int = own, others: list[Tensor] = others) -> Tensor:
                return (a * at).exp() * math.prod(((at - o) / (level[own] - o) for o in others), start=1.0)

            drift = drift + integral(f, float(level[k]), float(level[k + 1])) * guesses[own]
        drift = a * sigma[k + 1] * math.exp(-tau2[k] * float(level[k + 1])) * drift
        noise = sigma[k + 1] * math.sqrt(1 - math.exp(-2 * tau2[k] * h)) * z[k]
        return math.exp(-tau2[k] * h) * sigma[k + 1] / sigma[k] * start + drift + noise

    memory, solver = Memory(), SaSolver(few_steps=False)
    for k in range(4):
        t, s = times[k].expand(3), times[k + 1].expand(3)
        guess = network(x, t)
        std = kernel.step(path, guess, x, t, s).std
        better = solver.solve(path, guess, x, t, s, memory, exact_never, std)
        x = kernel.step(path, better, x, t, s).sample(z[k])

        guesses.append(network(theirs, t).x0)
        if k > 1:  # the first step is not corrected
            theirs = step(k - 1, [k, k - 1], starts[-1])
        starts.append(theirs)
        h = float(level[k + 1] - level[k])
        tau2.append(-math.log(1 - float(std[0] / sigma[k + 1]) ** 2) / (2 * h))
        theirs = step(k, [k, k - 1] if k else [0], theirs)
        torch.testing.assert_close(x, theirs, rtol=1e-9, atol=1e-9)
    if isinstance(kernel, Tau):
        torch.testing.assert_close(torch.tensor(tau2), torch.full((4,), 0.36))


def test_sa_solver_draws_from_the_data() -> None:
    """From t near 1 to data in 60 steps: mean and variance of 4,000 samples, against those of the three bumps."""
    path, times = Flow(), Uniform(start=0.999, shift=2.0).times(Flow(), 60)
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(4_000, 1, dtype=torch.float64, generator=noise)
    memory, kernel = Memory(), Tau(tau=0.8, low=0.05, high=0.95)
    for now, after in itertools.pairwise(times):
        t, s = now.expand(len(x)), after.expand(len(x))
        guess = exact(path, x, t)
        std = kernel.step(path, guess, x, t, s).std
        guess = SaSolver(order=3, corrector=3).solve(path, guess, x, t, s, memory, exact_never, std)
        x = kernel.step(path, guess, x, t, s).sample(torch.randn(x.shape, dtype=x.dtype, generator=noise))
    variance = float(CENTRES.var(correction=0)) + WIDTH**2
    assert abs(float(x.mean()) - float(CENTRES.mean())) < 0.06
    assert abs(float(x.var()) / variance - 1) < 0.06


# ---- churn


def test_churn_with_heun_is_edms_stochastic_sampler() -> None:
    """Algorithm 2 of the paper, written out in sigma, on a grid that the churned part lies inside of."""
    path, steps = VarianceExploding(sigma_max=20.0), 9
    churn = Churn(amount=3.0, low=0.05, high=4.0, inflation=1.1)
    times = Karras(ratio_min=0.01).times(path, steps)
    x = theirs = 20 * torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noises = torch.randn(steps, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def network(x: Tensor, t: Tensor) -> Guess:
        return exact(path, x, t)

    def data(x: Tensor, level: float) -> Tensor:
        return exact(path, x, path.time(torch.full((len(x),), level, dtype=torch.float64))).x0

    levels = path.sigma(times).tolist()
    raised = []
    for step, (now, after) in enumerate(itertools.pairwise(levels)):
        gamma = min(3.0 / steps, math.sqrt(2) - 1) if 0.05 <= now <= 4.0 else 0.0
        high = now * (1 + gamma)
        raised.append(gamma > 0)
        theirs = theirs + math.sqrt(high**2 - now**2) * 1.1 * noises[step]
        slope = (theirs - data(theirs, high)) / high
        there = theirs + (after - high) * slope
        if after > 0:
            slope = (slope + (there - data(there, after)) / after) / 2
        theirs = theirs + (after - high) * slope

        t, s = times[step].expand(5), times[step + 1].expand(5)
        x, t = churn.raised(path, x, t, noises[step], steps)
        assert float(path.sigma(t[:1])) == pytest.approx(high)
        x = deterministic(path, Heun().solve(path, network(x, t), x, t, s, {}, network), s)
        torch.testing.assert_close(x, theirs, rtol=1e-9, atol=1e-9)
    assert 0 < sum(raised) < steps


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_churn_moves_a_noisy_sample_to_more_noise(path: GaussianProcess) -> None:
    """x = alpha x_0 + sigma eps stays of this form: the share of x_0 and the sum of both noises' variances are those of
    the later time."""
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    one, none = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    churn = Churn(amount=2.0)
    kept, later = churn.raised(path, one, t, none, 10)
    added, _ = churn.raised(path, none, t, one, 10)
    torch.testing.assert_close(path.ratio(later), 1.2 * path.ratio(t))
    torch.testing.assert_close(kept[:, 0] * path.alpha(t), path.alpha(later))
    torch.testing.assert_close((kept[:, 0] * path.sigma(t)) ** 2 + added[:, 0] ** 2, path.sigma(later) ** 2)
    end, at = churn.raised(path, one, torch.ones(3, dtype=torch.float64), one, 10)
    assert torch.equal(end, one) and (at == 1).all()  # there is no more noise than at t = 1
    still, same = Churn(amount=0.0).raised(path, one, t, one, 10)
    assert torch.equal(still, one) and torch.equal(same, t)


def test_an_empty_range_of_churn_is_refused() -> None:
    with pytest.raises(UserError, match="high: should be greater than low, got 1 and 2"):
        Churn(amount=1.0, low=2.0, high=1.0)
