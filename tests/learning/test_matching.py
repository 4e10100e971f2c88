"""The matching loss: its optimum, its parameterisations, its times."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.learning.matching import (
    LogitNormalTimes,
    LogNormalNoise,
    UniformTimes,
    matching_errors,
    stratified,
)
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction, VarianceExploding, VariancePreserving

PATHS: list[GaussianProcess] = [Flow(), VariancePreserving(), VarianceExploding()]


class Shrinks(ContinuousDenoiser):
    """Guesses x_0 = factor * x_t, in any parameterisation."""

    def __init__(self, process: GaussianProcess, prediction: Prediction, factor: float) -> None:
        super().__init__()
        self.spec = ContinuousSpec(shape=(3,), process=process, prediction=prediction)
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        guess = self.spec.process.rederived(self.factor * x, x, t)
        return self.spec.process.target(self.spec.prediction, guess.x0, guess.eps, t)


def batch(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, count, 3, generator=stream, dtype=torch.float64)
    return x_0, torch.linspace(0.1, 0.9, count, dtype=torch.float64), noise


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_all_parameterisations_are_one_loss_up_to_a_weight(path: GaussianProcess) -> None:
    x_0, t, noise = batch()
    empty = Condition({})
    kinds: list[Prediction] = ["eps", "x0", "v", "u"]
    for space in kinds:
        errors = [matching_errors(Shrinks(path, kind, 0.7), x_0, t, noise, empty, space) for kind in kinds]
        own = matching_errors(Shrinks(path, space, 0.7), x_0, t, noise, empty)
        for error in errors:
            torch.testing.assert_close(error, own, rtol=1e-8, atol=0)
    guess = 0.7 * path.corrupt(x_0, t, noise)
    by_hand = (guess - x_0).square().mean(1)
    torch.testing.assert_close(matching_errors(Shrinks(path, "x0", 0.7), x_0, t, noise, empty), by_hand)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_the_best_shrinkage_is_that_of_the_posterior_mean(path: GaussianProcess) -> None:
    """Data N(0, 1): E[x_0 | x_t] = alpha x_t / (alpha^2 + sigma^2), the minimum of the quadratic loss."""
    count = 100_000
    stream = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, count, 3, generator=stream, dtype=torch.float64)
    t = torch.full((count,), 0.3, dtype=torch.float64)
    shrinking = [Shrinks(path, "u", factor) for factor in (0.0, 0.5, 1.0)]
    losses = [matching_errors(model, x_0, t, noise, Condition({})).mean().item() for model in shrinking]
    # The parabola through three points.
    best = (3 * losses[0] - 4 * losses[1] + losses[2]) / (4 * (losses[0] - 2 * losses[1] + losses[2]))
    alpha, sigma = (float(share(t[:1])) for share in (path.alpha, path.sigma))
    assert best == pytest.approx(alpha / (alpha**2 + sigma**2), abs=0.01)


def test_times_follow_their_distributions() -> None:
    stream = torch.Generator().manual_seed(0)
    u = stratified(torch.rand(4000, generator=stream, dtype=torch.float64), stream)
    middle = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert (u.sort().values - middle).abs().max() <= 0.5 / 4000 + 1e-12
    assert not torch.equal(u, u.sort().values)
    assert torch.equal(UniformTimes().times(u, Flow()), u)
    logit = LogitNormalTimes(mean=0.5, std=2.0).times(u, Flow()).logit()
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(logit.std()) == pytest.approx(2.0, abs=0.01)
    for path in (VarianceExploding(), Flow(), VariancePreserving()):
        level = path.ratio(LogNormalNoise().times(u, path)).log()
        assert float(level.mean()) == pytest.approx(-1.2, abs=0.01)
        assert float(level.std()) == pytest.approx(1.2, abs=0.01)


def test_edms_weight_is_the_error_of_its_own_prediction() -> None:
    sigma, d = 0.8, 0.5
    process = VarianceExploding()
    t = process.time(torch.tensor([sigma], dtype=torch.float64))
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    assert float(process.error_factor("edm", t)) == pytest.approx(weight)
    assert math.isclose(float(process.sigma(t)), sigma)
