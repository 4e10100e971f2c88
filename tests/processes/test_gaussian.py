"""Gaussian processes and their kernels against closed forms, in float64 where nothing else is said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from unveil.processes.gaussian import (
    Flow,
    Gaussian,
    GaussianProcess,
    Guess,
    Prediction,
    VarianceExploding,
    VariancePreserving,
    remembered,
    translate,
)
from unveil.processes.kernels import CoefficientsPreserving, DanceSde, Ddim, FlowSde, Kernel, Tau, deterministic
from unveil.recipe import build, dump
from unveil.registry import UserError

LINEAR = VariancePreserving()
STABLE = VariancePreserving(betas="scaled_linear", low=0.00085, high=0.012)
COSINE = VariancePreserving(betas="cosine")
ZERO = VariancePreserving(betas="scaled_linear", low=0.00085, high=0.012, zero_terminal=True)
FLOW, EDM = Flow(), VarianceExploding()
PATHS: list[GaussianProcess] = [LINEAR, STABLE, COSINE, ZERO, FLOW, EDM]
KERNELS: list[Kernel] = [Ddim(eta=1.0), Ddim(eta=0.4), CoefficientsPreserving(), FlowSde(), DanceSde(), Tau(tau=0.7)]
STOCHASTIC = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name}-{vars(kernel)}")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def predictions(path: GaussianProcess) -> list[Prediction]:
    return ["eps", "x0", "v", "u", *(["edm"] if path is EDM else [])]  # type: ignore[list-item]


# ---- paths and parameterisations


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_prediction_leads_back_to_the_sample_and_the_noise(path: GaussianProcess) -> None:
    t = times(0.02, 0.3, 0.71, 0.98)
    x_0, noise = draw(4, 3, 5), draw(4, 3, 5, seed=1)
    x = path.corrupt(x_0, t, noise)
    for kind in predictions(path):
        guess = path.guess(path.target(kind, x_0, noise, t), kind, x, t)
        # Where one share dwarfs the other, the smaller is the difference of large numbers.
        lost = torch.maximum(path.ratio(t), 1 / path.ratio(t)).reshape(-1, 1, 1)
        assert ((guess.x0 - x_0).abs() / lost).max() < 1e-12, kind
        assert ((guess.eps - noise).abs() / lost).max() < 1e-12, kind
        assert ((path.rederived(guess.x0, x, t).eps - noise).abs() / lost).max() < 1e-12, kind


def test_predictions_are_the_published_ones() -> None:
    t, x, p = times(0.4), draw(1, 6), draw(1, 6, seed=1)
    alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
    assert (alpha**2 + sigma**2 - 1).abs() < 1e-15
    torch.testing.assert_close(LINEAR.guess(p, "v", x, t).x0, alpha * x - sigma * p)
    torch.testing.assert_close(LINEAR.guess(p, "v", x, t).eps, sigma * x + alpha * p)
    torch.testing.assert_close(FLOW.guess(p, "u", x, t).x0, x - t * p)
    torch.testing.assert_close(FLOW.guess(p, "u", x, t).eps, x + (1 - t) * p)
    s, d = EDM.sigma(t), 0.5
    root = (s**2 + d**2).sqrt()
    torch.testing.assert_close(EDM.guess(p, "edm", x, t).x0, d**2 / root**2 * x + s * d / root * p)
    torch.testing.assert_close(EDM.input_scale(t), 1 / root)


def test_the_table_is_that_of_published_networks() -> None:
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cumulative = (1 - beta).cumprod(0)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(STABLE.alpha(t), cumulative.sqrt(), atol=1e-14, rtol=0)
    torch.testing.assert_close(STABLE.timestep(t), torch.arange(1000, dtype=torch.float64), atol=1e-12, rtol=0)
    assert STABLE.alpha(times(0.0)) == 1
    assert STABLE.sigma(times(0.0)) == 0
    level = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    # The last beta is cut at 0.999; before it, the product of 1 - beta is the published curve.
    torch.testing.assert_close(COSINE.alpha(t[:-1]), (times(*level[1:-1]) / level[0]).sqrt(), atol=1e-13, rtol=0)
    torch.testing.assert_close(COSINE.alpha(times(1.0)), (times(level[-2]) * 0.001 / level[0]).sqrt())


def test_a_table_that_ends_in_pure_noise() -> None:
    """alpha is shifted and stretched: its first entry stays, its last is 0. Beyond the last but one it is a straight
    line."""
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha = STABLE.alpha(t)
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    torch.testing.assert_close(ZERO.alpha(t), expected, atol=1e-14, rtol=0)
    assert ZERO.alpha(times(1.0)) == 0 and ZERO.sigma(times(1.0)) == 1 and ZERO.ratio(times(1.0)).isinf()
    torch.testing.assert_close(ZERO.alpha(times(0.99975)), 0.25 * expected[-2:-1])
    # The whole of x_1 is noise: v says what x_0 is, eps nothing.
    x, x_0 = draw(1, 5), draw(1, 5, seed=1)
    guess = ZERO.guess(ZERO.target("v", x_0, x, times(1.0)), "v", x, times(1.0))
    torch.testing.assert_close(guess.x0, x_0)
    torch.testing.assert_close(guess.eps, x)
    for kernel in KERNELS:
        step = kernel.step(ZERO, guess, x, times(1.0), times(0.9))
        assert step.mean.isfinite().all() and step.std.isfinite().all()
    noisy = Ddim(eta=1.0).step(ZERO, guess, x, times(1.0), times(0.9))
    torch.testing.assert_close(noisy.mean, ZERO.alpha(times(0.9)) * x_0)  # pure noise is drawn anew
    torch.testing.assert_close(noisy.std, ZERO.sigma(times(0.9)))
    with pytest.raises(ValueError, match="eps determines nothing at t = 1"):
        ZERO.guess(x, "eps", x, times(1.0))
    with pytest.raises(UserError, match="zero_terminal: needs a table of at least 2 steps, got 1"):
        VariancePreserving(steps=1, zero_terminal=True)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_rates_are_derivatives_and_time_is_the_inverse(path: GaussianProcess) -> None:
    t = times(0.0123, 0.25004, 0.6667, 0.99991).requires_grad_()
    alpha, sigma = path.alpha(t), path.sigma(t)
    expected = [torch.autograd.grad(share.sum() + 0 * t.sum(), t)[0] for share in (alpha, sigma)]
    for rate, derivative in zip(path.rates(t), expected, strict=True):
        torch.testing.assert_close(rate, derivative)
    torch.testing.assert_close(path.time(path.ratio(t)), t, atol=1e-12, rtol=0)
    assert path.time(times(0.0)) == 0
    assert path.time(times(math.inf)) == 1
    torch.testing.assert_close(path.half_log_snr(t), -path.ratio(t).log())


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_errors_of_predictions_over_errors_of_the_sample(path: GaussianProcess) -> None:
    t = times(0.1, 0.5, 0.9)
    x, x_0, moved = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, seed=2)
    for kind in predictions(path):
        # Two guesses that explain the same x_t.
        first, second = path.rederived(x_0, x, t), path.rederived(moved, x, t)
        difference = path.target(kind, *first, t) - path.target(kind, *second, t)
        factor = difference.square().sum(1) / (x_0 - moved).square().sum(1)
        torch.testing.assert_close(path.error_factor(kind, t), factor)
    if path is FLOW:
        torch.testing.assert_close(path.error_factor("u", t), 1 / t**2)


def test_score_and_velocity_of_gaussian_data() -> None:
    """Data N(0, 4): both are known, the velocity from the change of the marginal's width."""
    t, x, variance = times(0.2, 0.8), draw(2, 7), 4.0
    for path in PATHS:
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        total = alpha**2 * variance + sigma**2
        guess = Guess(x0=alpha * variance / total * x, eps=sigma / total * x)
        torch.testing.assert_close(path.score(guess, t), -x / total)
        rates = [rate[:, None] for rate in path.rates(t)]
        width = (alpha * rates[0] * variance + sigma * rates[1]) / total
        torch.testing.assert_close(path.velocity(guess, t), width * x)


def test_one_sample_on_all_paths() -> None:
    t, x_0, noise = times(0.05, 0.4, 0.9), draw(3, 4), draw(3, 4, seed=1)
    x = STABLE.corrupt(x_0, t, noise)
    for path in (FLOW, EDM, LINEAR, COSINE):
        moved, time = translate(x, t, STABLE, path)
        torch.testing.assert_close(moved, path.corrupt(x_0, time, noise), atol=1e-10, rtol=1e-10)
        back, again = translate(moved, time, path, STABLE)
        torch.testing.assert_close(again, t)
        torch.testing.assert_close(back, x)
    alpha, sigma = STABLE.alpha(t), STABLE.sigma(t)
    on_flow, time = translate(x, t, STABLE, FLOW)
    torch.testing.assert_close(time, sigma / (alpha + sigma))
    torch.testing.assert_close(on_flow, x / (alpha + sigma)[:, None])
    torch.testing.assert_close(translate(x, t, STABLE, EDM)[0], x / alpha[:, None])
    assert translate(x, times(1, 1, 1), FLOW, EDM)[0].isfinite().all()


def test_paths_are_recipe_data() -> None:
    for path in PATHS:
        assert build(GaussianProcess, dump(path)) == path


# ---- kernels


def state(path: GaussianProcess, t: Tensor, *shape: int) -> tuple[Tensor, Guess]:
    x, x0 = draw(len(t), *shape), draw(len(t), *shape, seed=1)
    return x, path.rederived(x0, x, t)


@pytest.mark.parametrize("path", [LINEAR, STABLE, COSINE], ids=str)
def test_eta_1_is_the_ddpm_posterior(path: VariancePreserving) -> None:
    k = torch.tensor([1, 200, 700, 999])
    t, s = (k + 1) / 1000.0, k / 1000.0
    t, s = t.double(), s.double()
    x, guess = state(path, t, 5)
    now, before = path.alpha(t) ** 2, path.alpha(s) ** 2
    beta = 1 - now / before
    mean = (before.sqrt() * beta / (1 - now))[:, None] * guess.x0 + ((now / before).sqrt() * (1 - before) / (1 - now))[
        :, None
    ] * x
    step = Ddim(eta=1.0).step(path, guess, x, t, s)
    torch.testing.assert_close(step.mean, mean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(step.std**2, beta * (1 - before) / (1 - now), atol=1e-14, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_ddim_is_the_first_order_dpm_solver(path: GaussianProcess) -> None:
    t, s = times(0.3, 0.6, 0.95), times(0.2, 0.1, 0.9)
    x, guess = state(path, t, 5)
    alpha, h = path.alpha(s)[:, None], (path.half_log_snr(s) - path.half_log_snr(t))[:, None]
    share = (path.sigma(s) / path.sigma(t))[:, None]
    ode = share * x - alpha * torch.expm1(-h) * guess.x0
    torch.testing.assert_close(Ddim(eta=0.0).step(path, guess, x, t, s).mean, ode, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(deterministic(path, guess, s), ode, atol=1e-10, rtol=1e-10)
    sde = share * (-h).exp() * x - alpha * torch.expm1(-2 * h) * guess.x0
    step = Ddim(eta=1.0).step(path, guess, x, t, s)
    torch.testing.assert_close(step.mean, sde, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(step.std, path.sigma(s) * (-torch.expm1(-2 * h[:, 0])).sqrt())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.name}-{vars(path)}")
def test_tau_is_the_sde_between_the_ode_and_twice_the_posteriors_noise(path: GaussianProcess) -> None:
    """tau 0 and 1 are DDIM with eta 0 and 1; in between the step of a constant guess is two half steps of it."""
    t, middle, s = times(0.9, 0.5), times(0.7, 0.3), times(0.4, 0.2)
    x, guess = state(path, t, 3)
    for tau in (0.0, 1.0):
        ours, known = Tau(tau=tau).step(path, guess, x, t, s), Ddim(eta=tau).step(path, guess, x, t, s)
        torch.testing.assert_close(ours.mean, known.mean)
        torch.testing.assert_close(ours.std, known.std)
    kernel = Tau(tau=1.4)
    whole, half = kernel.step(path, guess, x, t, s), kernel.step(path, guess, x, t, middle)
    z = draw(2, 3, seed=7)
    y = half.sample(z)
    rest = kernel.step(path, path.rederived(guess.x0, y, middle), y, middle, s)
    kept = (rest.mean - path.alpha(s)[:, None] * guess.x0) / (y - path.alpha(middle)[:, None] * guess.x0)
    torch.testing.assert_close(kept * (half.mean - path.alpha(middle)[:, None] * guess.x0),
                               whole.mean - path.alpha(s)[:, None] * guess.x0)  # fmt: skip
    torch.testing.assert_close(rest.std**2 + (kept[:, 0] * half.std) ** 2, whole.std**2)


def test_tau_has_noise_inside_its_interval_alone() -> None:
    x, guess = state(FLOW, times(0.9, 0.9, 0.9), 3)
    step = Tau(tau=0.5, low=0.3, high=0.8).step(FLOW, guess, x, times(0.9, 0.9, 0.9), times(0.85, 0.5, 0.2))
    assert (step.std > 0).tolist() == [False, True, False]
    torch.testing.assert_close(step.mean[2:], deterministic(FLOW, Guess(*(one[2:] for one in guess)), times(0.2)))
    with pytest.raises(UserError, match="high: should be greater than low"):
        Tau(low=0.4, high=0.2)


@pytest.mark.parametrize("kernel", [Ddim(eta=0), CoefficientsPreserving(noise=0), FlowSde(noise=0), DanceSde(noise=0)])
def test_without_noise_every_step_on_a_flow_is_eulers(kernel: Kernel) -> None:
    t, s = times(1.0, 0.6, 0.05), times(0.9, 0.1, 0.0)
    x, u = draw(3, 5), draw(3, 5, seed=1)
    step = kernel.step(FLOW, FLOW.guess(u, "u", x, t), x, t, s)
    torch.testing.assert_close(step.mean, x + (s - t)[:, None] * u)
    assert (step.std == 0).all()
    assert not kernel.stochastic
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob(x, "sum")


def test_the_published_flow_kernels() -> None:
    t, s = times(1.0, 0.7, 0.1), times(0.95, 0.5, 0.0)
    x, v = draw(3, 5), draw(3, 5, seed=1)
    column, dt = t[:, None], (s - t)[:, None]
    guess = FLOW.guess(v, "u", x, t)

    step = FlowSde(noise=0.7).step(FLOW, guess, x, t, s)
    g = 0.7 * (t / (1 - torch.where(t == 1, s, t))).sqrt()
    square = g[:, None] ** 2
    mean = x * (1 + square * dt / (2 * column)) + v * (1 + square * (1 - column) / (2 * column)) * dt
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, g * (t - s).sqrt())

    step = DanceSde(noise=0.3).step(FLOW, guess, x, t, s)
    push = 0.5 * 0.3**2 * (x - (1 - column) * guess.x0) / column**2
    torch.testing.assert_close(step.mean, x + dt * v + dt * push)
    torch.testing.assert_close(step.std, 0.3 * (t - s).sqrt())

    step = CoefficientsPreserving(noise=0.8).step(FLOW, guess, x, t, s)
    std = s * math.sin(0.8 * math.pi / 2)
    mean = (1 - s)[:, None] * guess.x0 + (s**2 - std**2).sqrt()[:, None] * guess.eps
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, std)


@STOCHASTIC
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_batch_of_times_is_a_loop_over_samples(kernel: Kernel, path: GaussianProcess) -> None:
    t, s = times(0.99, 0.5, 0.5, 0.04), times(0.9, 0.3, 0.49, 0.03)
    x, guess = state(path, t, 2, 3)
    noise = draw(4, 2, 3, seed=2)
    step = kernel.step(path, guess, x, t, s)
    after = step.sample(noise)
    scores = step.log_prob(after, "sum")
    for row in range(4):
        part = slice(row, row + 1)
        one = kernel.step(path, Guess(guess.x0[part], guess.eps[part]), x[part], t[part], s[part])
        assert torch.equal(one.sample(noise[part]), after[part])
        assert torch.equal(one.log_prob(after[part], "sum"), scores[part])


@STOCHASTIC
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_scores_are_those_of_torch_and_replay_is_exact_in_float32(kernel: Kernel, path: GaussianProcess) -> None:
    t, s = times(0.97, 0.5, 0.1), times(0.9, 0.4, 0.05)
    x, guess = state(path, t, 4, 4)
    step = kernel.step(path, guess, x, t, s)
    after = step.sample(draw(3, 4, 4, seed=2))
    normal = Independent(Normal(step.mean, step.std[:, None, None].expand_as(step.mean)), 2)
    torch.testing.assert_close(step.log_prob(after, "sum"), normal.log_prob(after))
    torch.testing.assert_close(step.log_prob(after, "mean"), normal.log_prob(after) / 16)

    single, prediction = x.float(), guess.eps.float()
    rollout = kernel.step(path, path.guess(prediction, "eps", single, t), single, t, s)
    stored = rollout.sample(draw(3, 4, 4, seed=2).float())
    replay = kernel.step(path, path.guess(prediction.clone(), "eps", single.clone(), t.clone()), single, t, s)
    assert stored.dtype == torch.float32
    assert torch.equal(rollout.log_prob(stored, "mean"), replay.log_prob(stored, "mean"))
    assert (rollout.log_ratio(replay, stored, "mean") == 0).all()


def test_ratio_and_divergence_of_two_steps() -> None:
    std = times(0.1, 2.0)
    new, old = Gaussian(draw(2, 3), std), Gaussian(draw(2, 3, seed=1), std)
    x = old.sample(draw(2, 3, seed=2))
    torch.testing.assert_close(new.log_ratio(old, x, "sum"), new.log_prob(x, "sum") - old.log_prob(x, "sum"))
    torch.testing.assert_close(new.log_ratio(old, x, "mean"), new.log_ratio(old, x, "sum") / 3)
    normals = [Independent(Normal(g.mean, std[:, None].expand(2, 3)), 1) for g in (new, old)]
    torch.testing.assert_close(new.kl(old, "sum"), kl_divergence(*normals))
    torch.testing.assert_close(new.kl(old, "mean"), kl_divergence(*normals) / 3)
    with pytest.raises(ValueError, match="different noise"):
        new.kl(Gaussian(old.mean, std * 2), "sum")


def test_the_ratio_keeps_the_digits_that_a_difference_of_scores_loses() -> None:
    """Latents of a published size: a shift of the mean by 1e-7 standard deviations."""
    std = times(0.05)
    mean = draw(1, 16, 64, 64).float()
    x = Gaussian(mean, std).sample(draw(1, 16, 64, 64, seed=1).float())
    moved = mean + 1e-5 * torch.sign(x - mean)
    new, old = Gaussian(moved, std), Gaussian(mean, std)
    wanted = Gaussian(moved.double(), std).log_ratio(Gaussian(mean.double(), std), x.double(), "mean")
    torch.testing.assert_close(new.log_ratio(old, x, "mean"), wanted, rtol=1e-4, atol=0)


def shifted(t: Tensor, shift: float = 3.0) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def published_grid(steps: int) -> Tensor:
    """Shift 3 as SD3's scheduler applies it: also to the lower end of a range that is already shifted."""
    even = torch.linspace(1, float(shifted(times(0.001))), steps, dtype=torch.float64)
    return torch.cat([shifted(even), times(0.0)])


def final_variance(kernel: Kernel, steps: int) -> float:
    """Of N(0, 1) data under the exact velocity: every step is linear in x, so the variance is propagated exactly."""
    grid, variance = published_grid(steps), 1.0
    for t, s in zip(grid[:-1, None], grid[1:, None], strict=True):
        x = torch.ones(1, 1, dtype=torch.float64)
        total = FLOW.alpha(t) ** 2 + FLOW.sigma(t) ** 2
        guess = Guess(x0=FLOW.alpha(t) / total * x, eps=FLOW.sigma(t) / total * x)
        step = kernel.step(FLOW, guess, x, t, s)
        variance = float(step.mean) ** 2 * variance + float(step.std) ** 2
    return variance


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Ddim(eta=0.0), (0.67, 0.83, 0.91, 0.99)),
        (FlowSde(noise=0.7), (0.78, 0.90, 0.95, 1.00)),
        (CoefficientsPreserving(noise=0.7), (0.50, 0.60, 0.65, 0.71)),
    ],
    ids=["ode", "flow", "cps"],
)
def test_how_much_of_the_variance_few_steps_keep(kernel: Kernel, expected: tuple[float, ...]) -> None:
    for steps, value in zip((10, 20, 40, 400), expected, strict=True):
        assert abs(final_variance(kernel, steps) - value) < 0.01


@STOCHASTIC
def test_which_kernels_keep_the_marginals(kernel: Kernel) -> None:
    assert (abs(final_variance(kernel, 800) - 1) < 0.02) == (kernel.name != "cps")


def test_noise_without_its_drift_does_not_keep_the_marginals() -> None:
    class Uncorrected(Kernel):
        def step(self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
            return Gaussian(deterministic(process, guess, s), FlowSde().step(process, guess, x, t, s).std)

    assert final_variance(Uncorrected(), 200) > 1.2


def test_log_probs_give_the_gradient_of_an_expectation() -> None:
    """REINFORCE over three steps of a flow, E[x_0] with a guess that depends on w, against autograd in closed form."""
    grid, chains = times(1.0, 0.7, 0.4, 0.1), 100_000
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kernel = FlowSde(noise=0.7)

    def guess(x: Tensor, t: Tensor) -> Guess:
        return FLOW.rederived(w * (1 + 0.2 * x), x, t)

    mean = torch.full((1, 1), 0.5, dtype=torch.float64)  # every step is affine in x: the mean is propagated exactly
    x = 0.5 + draw(chains, 1)
    score = torch.zeros(chains, dtype=torch.float64)
    for k in range(3):
        t, s = grid[k : k + 1], grid[k + 1 : k + 2]
        mean = kernel.step(FLOW, guess(mean, t), mean, t, s).mean
        rows = [time.expand(chains) for time in (t, s)]
        step = kernel.step(FLOW, guess(x, rows[0]), x, *rows)
        after = step.sample(draw(chains, 1, seed=k + 1)).detach()
        score = score + step.log_prob(after, "sum")
        x = after
    (exact,) = torch.autograd.grad(mean.sum(), w)
    reward = x[:, 0] - x.mean()
    (estimate,) = torch.autograd.grad((score * reward).mean(), w)
    # The standard error over 100,000 chains is 0.35 % (measured over 12 seeds).
    assert abs(float(estimate - exact)) < 0.015 * abs(float(exact))


@STOCHASTIC
def test_half_precision_is_cast_up_and_gradients_flow(kernel: Kernel) -> None:
    t, s = times(0.8, 0.4), times(0.6, 0.2)
    prediction = draw(2, 5).bfloat16().requires_grad_()
    x = draw(2, 5, seed=1).bfloat16()
    step = kernel.step(FLOW, FLOW.guess(prediction, "u", x, t), x, t, s)
    assert step.mean.dtype == torch.float32
    assert step.std.dtype == torch.float64
    step.log_prob(step.sample(torch.ones(2, 5)), "sum").sum().backward()
    assert prediction.grad is not None
    assert (prediction.grad != 0).all()


def test_what_is_refused() -> None:
    x, guess = state(FLOW, times(0.5), 3)
    for t, s in ((0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1)):
        for kernel in KERNELS:
            with pytest.raises(ValueError, match="0 <= s < t <= 1"):
                kernel.step(FLOW, guess, x, times(t), times(s))
    with pytest.raises(ValueError, match="eps determines nothing at t = 1"):
        FLOW.guess(x, "eps", x, times(1.0))
    with pytest.raises(ValueError, match="x0 determines nothing at t = 0"):
        FLOW.guess(x, "x0", x, times(0.0))
    with pytest.raises(ValueError, match="'edm' is not known"):
        FLOW.guess(x, "edm", x, times(0.5))
    with pytest.raises(ValueError, match="deterministic"):
        Ddim().step(FLOW, guess, x, times(0.5), times(0.0)).log_prob(x, "sum")


def test_what_is_said_of_times_is_remembered_by_their_values() -> None:
    asked: list[Tensor] = []

    @remembered
    def double(factor: int, t: Tensor) -> Tensor:
        if bool((t < 0).any()):
            raise ValueError("a time below 0")
        asked.append(t)
        return factor * t

    grid = torch.tensor([0.25, 0.5, 0.75])
    with torch.inference_mode():
        first = double(2, grid)
    assert torch.equal(first, torch.tensor([0.5, 1, 1.5], dtype=torch.float64)) and not first.is_inference()
    # The same numbers: of another dtype, another tensor, laid out in another way.
    for same in (grid.double(), torch.stack([grid, grid], 1)[:, 0], grid.clone()):
        assert double(2, same) is first
    grid[0] = 0.125  # what was asked about has changed since; the answer has not
    assert first[0] == 0.5 and double(2, grid)[0] == 0.25 and double(3, grid)[0] == 0.375
    assert len(asked) == 3
    for _ in range(2):
        with pytest.raises(ValueError, match="below 0"):
            double(2, -grid)
    with pytest.raises(RuntimeError, match="requires grad"):  # an answer would have none
        double(2, grid.requires_grad_())


def test_two_processes_or_kernels_never_share_what_is_remembered() -> None:
    x, noise, t, s = torch.ones(2, 3), torch.zeros(2, 3), times(0.5, 0.5), times(0.25, 0.25)
    paths: list[GaussianProcess] = [FLOW, VariancePreserving(), VariancePreserving(steps=100), VarianceExploding()]
    assert len({float(path.corrupt(x, t, noise)[0, 0]) for path in paths[:3]}) == 3
    assert float(paths[3].corrupt(x, t, noise)[0, 0]) == 1
    guess = Guess(x, x)
    kernels = [FlowSde(noise=0.5), FlowSde(noise=0.6), DanceSde(noise=0.4), Ddim(eta=0.5), Ddim(eta=0.6)]
    assert len({float(kernel.step(FLOW, guess, x, t, s).std[0]) for kernel in kernels}) == 5
    assert FLOW.corrupt(x, t, noise).dtype == torch.float32
    assert FLOW.corrupt(x.double(), t, noise.double()).dtype == torch.float64
