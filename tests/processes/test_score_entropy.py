"""The score form of the absorbing process against matrix exponentials, brute-force ratios and the masked process."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from unveil.processes.masked import MaskedProcess
from unveil.processes.score_entropy import Geometric, LogLinear, Method, Noise, ScoreEntropyProcess

V, MASK = 4, 1
"""Four classes; the mask is not the last one, as it is not in real vocabularies."""
TOKENS = [0, 2, 3]
NOISES = [LogLinear(eps=1e-3), LogLinear(eps=0.1), Geometric(low=1e-2, high=6.0)]
METHODS: list[Method] = ["tweedie", "euler"]


def process(noise: Noise = NOISES[0], method: Method = "tweedie", floor: float = 1e-6) -> ScoreEntropyProcess:
    return ScoreEntropyProcess(mask_id=MASK, noise=noise, method=method, floor=floor)


def random_rows(n: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    """Log-scores (n, V) far from uniform, with a tempting mask class."""
    rows = spread * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, MASK] = 9.0
    return rows


def calibrated(rows: Tensor, t: Tensor, noise: Noise = NOISES[0]) -> Tensor:
    """The log-scores (n, V) r * softmax(rows) at times t (n,)."""
    free = rows.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    return free.log_softmax(-1) + process(noise).score_scale(t)[:, None]


def weighted_loss(noise: Noise, log_score: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    own = process(noise)
    return (own.elbo_weight(t) * own.loss(log_score, x_0, t)).double()


def full(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


@pytest.mark.parametrize("noise", NOISES)
def test_the_rate_is_the_derivative_of_the_total_noise(noise: Noise) -> None:
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64, requires_grad=True)
    noise.sigma(t).sum().backward()
    torch.testing.assert_close(noise.rate(t.detach()), t.grad)


def test_log_linear_noise_is_exact_where_almost_nothing_is_masked() -> None:
    eps = 1e-3
    t = torch.tensor([1e-12, 1e-5, 0.3, 1.0], dtype=torch.float64)
    shown = 1 - (1 - eps) * t
    torch.testing.assert_close(process().score_scale(t), shown.log() - ((1 - eps) * t).log(), rtol=1e-12, atol=0)
    weight = LogLinear(eps=eps).rate(t) * process().score_scale(t).exp()
    torch.testing.assert_close(weight, 1 / t, rtol=1e-12, atol=0)


def test_corrupt_masks_with_one_minus_exp_of_minus_sigma() -> None:
    n = 1000
    u = ((torch.arange(n) + 0.5) / n)[:, None].expand(n, 6)
    maskable = (torch.arange(6) >= 2).expand(n, 6)
    for noise, t in itertools.product(NOISES, (0.2, 0.9)):
        expected = round(n * (1 - math.exp(-float(noise.sigma(torch.tensor(t))))))
        x_t = process(noise).corrupt(torch.zeros(n, 6).long(), torch.full((n,), t), u=u, maskable=maskable)
        assert (x_t == MASK).sum(0).tolist() == [0, 0] + [expected] * 4


def test_the_true_score_is_r_times_the_conditional() -> None:
    """p_t(x with y)/p_t(x) of a joint table over L = 2 positions, summed up over every x_0."""
    joint = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).flatten().softmax(0)
    canvases = list(itertools.product(range(V), repeat=2))
    for noise, t in itertools.product(NOISES, (0.1, 0.7)):
        time = torch.tensor(t, dtype=torch.float64)
        hidden = float(-torch.expm1(-noise.sigma(time)))
        density = dict.fromkeys(canvases, 0.0)
        for (clean, chance), mask in itertools.product(
            zip(itertools.product(TOKENS, repeat=2), joint.tolist(), strict=True),
            itertools.product([0, 1], repeat=2),
        ):
            canvas = tuple(MASK if m else token for token, m in zip(clean, mask, strict=True))
            density[canvas] += chance * hidden ** sum(mask) * (1 - hidden) ** (2 - sum(mask))
        r = float(process(noise).score_scale(time).exp())
        for other in (*TOKENS, MASK):
            given = [density[(token, other)] for token in TOKENS]
            for token, value in zip(TOKENS, given, strict=True):
                ratio = density[(token, other)] / density[(MASK, other)]
                assert ratio == pytest.approx(r * value / sum(given), rel=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_the_loss_is_the_written_formula_and_lowest_at_the_true_score(noise: Noise) -> None:
    n = 5
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    truth = random_rows(n, 1).index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
    r, rate = 1 / (noise.sigma(t).exp() - 1), noise.rate(t)

    def expected(log_score: Tensor) -> Tensor:
        rows = [truth[:, y] * weighted_loss(noise, log_score, torch.full((n,), y), t) for y in TOKENS]
        return torch.stack(rows).sum(0)

    log_score = random_rows(n, 2)
    for y in TOKENS:
        written = rate * (log_score[:, TOKENS].exp().sum(-1) - r * log_score[:, y] + r * (r.log() - 1))
        measured = weighted_loss(noise, log_score, torch.full((n,), y), t)
        torch.testing.assert_close(measured, written, rtol=2e-5, atol=2e-5)

    best = (r[:, None] * truth).log().requires_grad_()
    lowest = expected(best)
    (gradient,) = torch.autograd.grad(lowest.sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)
    entropy = torch.special.entr(truth).sum(-1)
    torch.testing.assert_close(lowest.detach(), rate * r * entropy, rtol=1e-5, atol=1e-6)
    for seed in range(20):
        nudge = 0.1 * random_rows(n, 10 + seed)
        assert (expected(best.detach() + nudge) > lowest.detach()).all()


@pytest.mark.parametrize("noise", NOISES)
def test_the_loss_is_the_nelbo_and_what_a_wrong_sum_costs(noise: Noise) -> None:
    n = 6
    t = torch.linspace(0.01, 0.99, n, dtype=torch.float64)
    x_0 = torch.tensor([0, 2, 3, 3, 2, 0])
    log_score = calibrated(random_rows(n), t, noise)
    mu = random_rows(n).index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
    weight = noise.rate(t) / noise.sigma(t).expm1()
    nelbo = -weight * mu.gather(-1, x_0[:, None])[:, 0]
    if isinstance(noise, LogLinear):
        masked_weight = MaskedProcess(mask_id=MASK).elbo_weight(t)
        torch.testing.assert_close(weight, masked_weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted_loss(noise, log_score, x_0, t), nelbo, rtol=1e-5, atol=1e-5)
    off = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0, 5.0], dtype=torch.float64)
    measured = weighted_loss(noise, log_score + off.log()[:, None], x_0, t)
    torch.testing.assert_close(measured, nelbo + weight * (off - 1 - off.log()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.25), (0.5, 0.0), (0.7, 0.6999)])
def test_a_calibrated_score_steps_like_the_masked_process(t: float, s: float, method: Method) -> None:
    rows = random_rows(6)
    x_t = torch.tensor([MASK, MASK, 0, MASK, 2, MASK])
    times = full(6, t), full(6, s)
    ours = process(method=method).step(calibrated(rows, times[0]), x_t, *times).probs()
    torch.testing.assert_close(ours, MaskedProcess(mask_id=MASK).step(rows, x_t, *times).probs(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.sum(-1), full(6, 1.0))


def generator_matrix() -> Tensor:
    """Q with Q[z, i] the rate from i to z: everything decays into the mask."""
    q = torch.zeros(V, V, dtype=torch.float64)
    for token in TOKENS:
        q[MASK, token], q[token, token] = 1, -1
    return q


@pytest.mark.parametrize("noise", NOISES)
def test_steps_are_the_matrix_formulas_for_any_score(noise: Noise) -> None:
    """Tweedie: p(z) = (e^-dQ s)_z (e^dQ)_{mask, z}, d = sigma_t - sigma_s.

    Euler: one-hot + dt sigma' Q_{mask, z} s_z."""
    q, (t, s) = generator_matrix(), (0.6, 0.5)
    now, then = (torch.tensor(time, dtype=torch.float64) for time in (t, s))
    shift = noise.sigma(now) - noise.sigma(then)
    euler_factor = (t - s) * noise.rate(now)
    # uncalibrated sums, small enough for the written probabilities to be positive
    log_score = random_rows(8, 3, spread=0.5) - math.log(6) + process(noise).score_scale(now)
    score = log_score.exp()
    score[:, MASK] = 1
    tweedie = (score @ torch.matrix_exp(-shift * q).T) * torch.matrix_exp(shift * q)[MASK]
    euler = euler_factor * score * q[MASK]
    euler[:, MASK] = 1 - euler[:, TOKENS].sum(-1)
    x_t = torch.full((8,), MASK)
    for method, written in (("tweedie", tweedie), ("euler", euler)):
        assert (written > 0).all()
        ours = process(noise, method).step(log_score, x_t, full(8, t), full(8, s)).probs()  # type: ignore[arg-type]
        torch.testing.assert_close(ours, written, rtol=1e-9, atol=1e-12)
    same = torch.allclose(tweedie, euler, rtol=1e-9, atol=0)
    assert same == isinstance(noise, LogLinear)


def test_a_sum_that_is_too_large_keeps_the_floor_and_finite_gradients() -> None:
    for floor in (1e-6, 0.01):
        log_score = (random_rows(3) + 8).requires_grad_()
        x_t = torch.full((3,), MASK)
        step = process(floor=floor).step(log_score, x_t, full(3, 0.6), full(3, 0.5))
        probs = step.probs()
        torch.testing.assert_close(probs[:, MASK], full(3, floor), rtol=1e-6, atol=0)
        mu = log_score.detach()[:, TOKENS].softmax(-1)
        torch.testing.assert_close(probs[:, TOKENS], (1 - floor) * mu, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(step.log_prob(torch.tensor([MASK, 0, 2])).sum(), log_score)
        assert torch.isfinite(gradient).all()
        assert (gradient[0] == 0).all() and (gradient[1:, TOKENS] != 0).all()


def test_the_last_step_reveals_everything_and_has_finite_gradients() -> None:
    log_score = random_rows(3).requires_grad_()
    step = process().step(log_score, torch.full((3,), MASK), full(3, 1e-5), full(3, 0.0))
    target = torch.tensor([0, 2, 3])
    log_prob = step.log_prob(target)
    expected = log_score[:, TOKENS].log_softmax(-1)[torch.arange(3), [0, 1, 2]]
    torch.testing.assert_close(log_prob, expected.float())
    (gradient,) = torch.autograd.grad(log_prob.sum(), log_score)
    assert torch.isfinite(gradient).all()
    assert (step.log_prob(torch.full((3,), MASK)) == -math.inf).all()


@pytest.mark.parametrize("method", METHODS)
def test_log_prob_and_its_gradient_are_those_of_the_closed_form(method: Method) -> None:
    noise = NOISES[2]
    t, s = full(4, 0.6), full(4, 0.5)
    target = torch.tensor([0, MASK, 3, 2])
    x_t = torch.tensor([MASK, MASK, MASK, 2])
    log_score = (random_rows(4, 4, spread=0.5) - 1).requires_grad_()
    own = process(noise, method).step(log_score, x_t, t, s).log_prob(target)
    factor = (t - s) * noise.rate(t) if method == "euler" else (noise.sigma(t) - noise.sigma(s)).expm1()
    score = log_score[:, TOKENS].exp()
    stay = (1 - factor * score.sum(-1)).log()
    written = torch.stack([(factor[0] * score[0, 0]).log(), stay[1], (factor[2] * score[2, 2]).log(), 0 * stay[3]])
    torch.testing.assert_close(own.double(), written, rtol=1e-6, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(value.sum(), log_score, retain_graph=True) for value in (own, written))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_samples_follow_the_distribution_on_a_noise_grid() -> None:
    n = 400
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    u_move, u_token = (u.flatten() for u in torch.meshgrid(grid, grid, indexing="ij"))
    t, s = full(n * n, 0.6), full(n * n, 0.35)
    row = random_rows(1, 5) - 1
    x_t = torch.full((n * n,), MASK)
    for temperature in (1.0, 0.5, 0.0):
        step = process().step(row.expand(n * n, V), x_t, t, s, temperature)
        drawn = torch.nn.functional.one_hot(step.sample(u_move, u_token), V).double().mean(0)
        probs = step.probs()[0]
        assert (drawn - probs).abs().max() < 2 / n
        assert float(probs[MASK]) == pytest.approx(float(1 - step.move[0]), abs=1e-12)
    assert int((probs[TOKENS] > 0).sum()) == 1  # temperature 0


def test_the_entropy_is_that_of_the_distribution() -> None:
    x_t = torch.tensor([[MASK, 0], [MASK, MASK]])
    step = process().step(random_rows(4).view(2, 2, V) - 2, x_t, full(2, 0.8), full(2, 0.5))
    torch.testing.assert_close(step.entropy().double(), torch.special.entr(step.probs()).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_step_refuses_bad_times_and_temperatures() -> None:
    x_t = torch.full((1,), MASK)
    with pytest.raises(ValueError, match="0 <= s < t <= 1"):
        process().step(random_rows(1), x_t, full(1, 0.5), full(1, 0.5))
    with pytest.raises(ValueError, match="at least 0"):
        process().step(random_rows(1), x_t, full(1, 0.5), full(1, 0.1), temperature=-1.0)
