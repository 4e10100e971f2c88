"""Solvers of continuous samplers on data whose exact guess is known: order, equivalence to the published formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unveil.processes.gaussian import Flow, GaussianProcess, Guess, VarianceExploding, VariancePreserving
from unveil.processes.kernels import Ddim, deterministic
from unveil.samplers.grids import Uniform
from unveil.samplers.latent_solvers import DpmSolver2M, First, Heun, LatentSolver, Memory

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
@pytest.mark.parametrize(("solver", "order"), [(First, 1), (Heun, 2), (DpmSolver2M, 2)])
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
    for solver in (First(), Heun(), DpmSolver2M()):
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
              for solver in (First(), Heun(), DpmSolver2M())]  # fmt: skip
    assert max(errors[1:]) < errors[0] / 3
