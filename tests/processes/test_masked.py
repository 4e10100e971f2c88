"""The masked process against a tiny joint table: V = 3 tokens, L = 3 positions, every canvas enumerated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from unveil.processes.masked import MaskedProcess, MaskedTransition, stratified_times

V, L, MASK = 3, 3, 3
PROCESS = MaskedProcess(mask_id=MASK)
CANVASES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
FULL = (CANVASES != MASK).all(-1)
START = int((CANVASES == MASK).all(-1).nonzero())


def index_of(canvas: Tensor) -> Tensor:
    return (canvas * torch.tensor([(V + 1) ** 2, V + 1, 1])).sum(-1)


@pytest.fixture(scope="module")
def joint() -> Tensor:
    """A random joint distribution of x_0, (V, V, V) float64, far from independent."""
    logits = 1.5 * torch.randn(V**L, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return logits.softmax(0).reshape(V, V, V)


@pytest.fixture(scope="module")
def denoiser(joint: Tensor) -> Tensor:
    """Logits of the exact conditionals at every canvas (64, L, V + 1), with a tempting mask class."""
    logits = torch.full((len(CANVASES), L, V + 1), 9.0, dtype=torch.float64)
    for row, canvas in enumerate(CANVASES.tolist()):
        known = [slice(None) if token == MASK else slice(token, token + 1) for token in canvas]
        given = joint[tuple(known)]
        for position in range(L):
            others = [axis for axis in range(L) if axis != position]
            if canvas[position] == MASK:
                logits[row, position, :V] = (given.sum(others) / given.sum()).log()
    return logits


def transition(denoiser: Tensor, t: float, s: float) -> MaskedTransition:
    times = torch.full((2, len(CANVASES)), t, dtype=torch.float64)
    times[1] = s
    return PROCESS.step(denoiser, CANVASES, times[0], times[1])


def kernel(step: MaskedTransition) -> Tensor:
    """The transition matrix between canvases (64, 64), the product of the positions' probabilities."""
    probs = step.probs()
    return math.prod(probs[:, position, CANVASES[:, position]] for position in range(L))


def test_one_token_at_a_time_in_random_order_gives_the_joint(joint: Tensor, denoiser: Tensor) -> None:
    revealed = transition(denoiser, 1.0, 0.0).probs()
    state = torch.zeros(len(CANVASES), dtype=torch.float64)
    state[START] = 1
    for _ in range(L):
        after = torch.zeros_like(state)
        for row in state.nonzero()[:, 0].tolist():
            masked = (CANVASES[row] == MASK).nonzero()[:, 0].tolist()
            for position, token in itertools.product(masked, range(V)):
                canvas = CANVASES[row].clone()
                canvas[position] = token
                after[index_of(canvas)] += state[row] / len(masked) * revealed[row, position, token]
        state = after
    torch.testing.assert_close(state[FULL], joint.flatten(), rtol=1e-12, atol=1e-14)


def test_the_reverse_process_converges_to_the_joint(joint: Tensor, denoiser: Tensor) -> None:
    distances = []
    for steps in (1, 2, 4, 8, 16, 32, 64):
        state = torch.zeros(len(CANVASES), dtype=torch.float64)
        state[START] = 1
        for i in range(steps, 0, -1):
            state = state @ kernel(transition(denoiser, i / steps, (i - 1) / steps))
        assert state[~FULL].abs().max() == 0
        distances.append(float((state[FULL] - joint.flatten()).abs().sum() / 2))
    marginals = [joint.sum([axis for axis in range(L) if axis != position]) for position in range(L)]
    product = torch.einsum("a,b,c->abc", *marginals)
    assert distances[0] == pytest.approx(float((product - joint).abs().sum() / 2), abs=1e-12)
    assert distances[0] > 0.1
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.03 * distances[0]


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.25), (0.5, 0.0), (0.7, 0.6999)])
def test_log_prob_is_the_log_of_the_distribution(joint: Tensor, denoiser: Tensor, t: float, s: float) -> None:
    step = transition(denoiser, t, s)
    matrix = kernel(step)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(len(CANVASES), dtype=torch.float64))
    for row in range(len(CANVASES)):
        scored = step.log_prob(CANVASES[row].expand(len(CANVASES), L))
        assert scored.dtype == torch.float32
        torch.testing.assert_close(scored.double().sum(-1).exp(), matrix[:, row], rtol=1e-5, atol=1e-12)
    copied = step.log_prob(CANVASES)[CANVASES != MASK]
    assert (copied == 0).all()
    # one entry by hand: position 0 revealed as 2 and position 1 kept masked, given x_2 = 1
    canvas, target = torch.tensor([MASK, MASK, 1]), torch.tensor([2, MASK, 1])
    conditional = joint[2, :, 1].sum() / joint[:, :, 1].sum()
    expected = float(conditional) * (t - s) / t * s / t
    assert float(matrix[index_of(canvas), index_of(target)]) == pytest.approx(expected, rel=1e-12)


def test_a_revealed_token_never_changes_and_a_mask_never_returns(denoiser: Tensor) -> None:
    step = transition(denoiser, 0.5, 0.25)
    row = index_of(torch.tensor([0, 1, 2]))
    for target in ([0, 1, MASK], [0, 1, 1]):
        log_prob = step.log_prob(torch.tensor(target).expand(len(CANVASES), L))[row]
        assert log_prob.tolist() == [0, 0, -math.inf]
    final = transition(denoiser, 0.5, 0.0).log_prob(CANVASES)
    assert (final[CANVASES == MASK] == -math.inf).all()


def test_scores_have_finite_gradients_and_ignore_the_mask_class(denoiser: Tensor) -> None:
    logits = denoiser.float().requires_grad_()
    times = torch.full((len(CANVASES),), 0.5)
    step = PROCESS.step(logits, CANVASES, times, times / 2)
    target = torch.where(CANVASES == MASK, torch.tensor([0, MASK, 2]), CANVASES)
    step.log_prob(target).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert (logits.grad[..., MASK] == 0).all()
    moved = (CANVASES == MASK) & (target != MASK)
    expected = torch.nn.functional.one_hot(target.clamp(max=V - 1), V) - denoiser[..., :V].softmax(-1)
    torch.testing.assert_close(logits.grad[..., :V], (expected * moved[..., None]).float())
    assert (logits[..., MASK] == 9).all()


def test_samples_follow_the_distribution_on_a_noise_grid(denoiser: Tensor) -> None:
    """Noise on a regular grid of n x n points measures each probability to 1/n, with no randomness at all."""
    n, row = 400, START
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    u_move, u_token = (u.reshape(-1, 1).expand(-1, L) for u in torch.meshgrid(grid, grid, indexing="ij"))
    t = torch.full((n * n,), 0.8, dtype=torch.float64)
    step = PROCESS.step(denoiser[row].expand(n * n, L, V + 1), CANVASES[row].expand(n * n, L), t, t - 0.3)
    drawn = torch.nn.functional.one_hot(step.sample(u_move, u_token), V + 1).double().mean(0)
    assert (drawn - step.probs()[0]).abs().max() < 2 / n


def test_samples_pass_a_chi_square_test(denoiser: Tensor) -> None:
    draws, generator = 20_000, torch.Generator().manual_seed(3)
    canvas = torch.tensor([MASK, 1, MASK])
    t = torch.full((draws,), 0.9)
    logits = denoiser[index_of(canvas)].expand(draws, L, V + 1)
    step = PROCESS.step(logits, canvas.expand(draws, L), t, torch.full((draws,), 0.4))
    u_move, u_token = torch.rand(2, draws, L, dtype=torch.float64, generator=generator)
    counts = index_of(step.sample(u_move, u_token)).bincount(minlength=len(CANVASES)).double()
    first = step.probs()[0]
    expected = draws * math.prod(first[position, CANVASES[:, position]] for position in range(L))
    possible = expected > 0
    assert int(possible.sum()) == (V + 1) ** 2
    assert (counts[~possible] == 0).all()
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert 2 < chi_square < 45  # 15 degrees of freedom: both tails below 1e-3 (the upper one below 1e-4)


def test_a_very_fine_step_is_not_quantised() -> None:
    """A move of probability 1e-12 happens for smaller noise only, and then every token can be drawn."""
    t, s = torch.tensor([[1], [1 - 1e-12]], dtype=torch.float64)
    step = PROCESS.step(torch.zeros(1, 3, V + 1), torch.full((1, 3), MASK), t, s)
    thirds = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64)
    assert step.sample(torch.full_like(thirds, 0.9e-12), thirds).tolist() == [[0, 1, 2]]
    assert step.sample(torch.full_like(thirds, 1.1e-12), thirds).tolist() == [[MASK] * 3]
    expected = math.log(1e-12) - math.log(3)
    assert step.log_prob(torch.zeros(1, 3).long())[0, 0].item() == pytest.approx(expected, abs=1e-3)


def test_a_step_refuses_bad_times_and_noise(denoiser: Tensor) -> None:
    for t, s in ((0.5, 0.5), (0.2, 0.3), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="0 <= s < t <= 1"):
            transition(denoiser, t, s)
    step = transition(denoiser, 0.5, 0.25)
    with pytest.raises(ValueError, match="float64"):
        step.sample(torch.zeros(len(CANVASES), L), torch.zeros(len(CANVASES), L))


def test_positions_with_extra_axes_broadcast_the_times() -> None:
    t, s = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.125])
    step = PROCESS.step(torch.zeros(2, 4, 5, V + 1), torch.full((2, 4, 5), MASK), t, s)
    assert step.probs()[..., MASK].flatten(1).unique(dim=1).tolist() == [[0.5], [0.25]]
    assert step.log_prob(torch.zeros(2, 4, 5).long()).shape == (2, 4, 5)


def cross_entropies(denoiser: Tensor, canvases: Tensor, x_0: Tensor) -> Tensor:
    """-log mu(x_0 | canvas) at the masked positions and 0 elsewhere, (N, L) float64."""
    log_mu = denoiser[index_of(canvases)][..., :V].log_softmax(-1)
    return -log_mu.gather(-1, x_0[..., None])[..., 0] * (canvases == MASK)


@pytest.mark.parametrize("prompt", [0, 1])
def test_both_elbos_equal_the_any_order_likelihood(joint: Tensor, denoiser: Tensor, prompt: int) -> None:
    """E_t[1/t sum CE] = E_n[L/n sum CE] = -E_order sum log p = -log p(x_0 | prompt), for every x_0.

    The expectation over t is a Gauss-Legendre rule (exact: the integrand is a polynomial), the one over masks
    goes through `corrupt` and `corrupt_exact` with enumerated noise.
    """
    x_0 = CANVASES[FULL]
    maskable = (torch.arange(L) >= prompt).expand_as(x_0)
    free = L - prompt
    exact = -joint.flatten().log() + (joint.sum((1, 2)).log()[x_0[:, 0]] if prompt else 0)

    continuous = torch.zeros(len(x_0), dtype=torch.float64)
    for node, node_weight in ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)):
        t = torch.full((len(x_0),), node, dtype=torch.float64)
        for inside in itertools.product([False, True], repeat=free):
            low = torch.tensor([False] * prompt + list(inside))
            u = torch.where(low, node - 0.01, node + 0.01).expand(len(x_0), L)
            x_t = PROCESS.corrupt(x_0, t, u=u, maskable=maskable)
            assert ((x_t == MASK) == low).all()
            chance = node ** sum(inside) * (1 - node) ** (free - sum(inside)) * node_weight
            continuous += chance * PROCESS.elbo_weight(t) * cross_entropies(denoiser, x_t, x_0).sum(-1)

    counted = torch.zeros(len(x_0), dtype=torch.float64)
    any_order = torch.zeros(len(x_0), dtype=torch.float64)
    orders = list(itertools.permutations(range(free)))
    for order, n in itertools.product(orders, range(1, free + 1)):
        u = torch.tensor([0.0] * prompt + [0.1 + 0.2 * rank for rank in order]).expand(len(x_0), L)
        x_t = PROCESS.corrupt_exact(x_0, torch.full((len(x_0),), n), u=u, maskable=maskable)
        losses = cross_entropies(denoiser, x_t, x_0)
        weight = PROCESS.elbo_weight_exact(torch.full((len(x_0),), n), maskable).double()
        counted += weight * losses.sum(-1) / free / len(orders)
        any_order += losses[:, prompt + order.index(n - 1)] / len(orders)
    torch.testing.assert_close(continuous, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(counted, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(any_order, exact, rtol=1e-12, atol=1e-12)


def test_corrupt_masks_with_probability_t_and_spares_the_prompt() -> None:
    n = 1000
    x_0 = torch.arange(8).expand(n, 8)
    u = ((torch.arange(n) + 0.5) / n)[:, None].expand(n, 8)
    maskable = (torch.arange(8) >= 3).expand(n, 8)
    for t in (0.001, 0.25, 1.0):
        masked = MaskedProcess(mask_id=99).corrupt(x_0, torch.full((n,), t), u=u, maskable=maskable) == 99
        assert masked.sum(0).tolist() == [0] * 3 + [round(t * n)] * 5
    times = torch.linspace(0.1, 1, n)
    x_t = MaskedProcess(mask_id=99).corrupt(x_0, times, u=torch.full((n, 8), 0.5), maskable=maskable)
    assert ((x_t == 99) == (maskable & (times > 0.5)[:, None])).all()
    assert (x_t == x_0)[x_t != 99].all()


def test_corrupt_exact_masks_n_positions_even_among_equal_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    n = torch.arange(6).repeat(50)
    maskable = torch.tensor([False, True, True, False, True, True, True]).expand(300, 7)
    for u in (torch.rand(300, 7, generator=generator), torch.full((300, 7), 0.5)):
        x_t = PROCESS.corrupt_exact(torch.zeros(300, 7).long(), n, u=u, maskable=maskable)
        assert (x_t == MASK).sum(-1).tolist() == n.tolist()
        assert not (x_t == MASK)[~maskable].any()
    assert x_t[2].tolist() == [0, MASK, MASK, 0, 0, 0, 0]


def test_corrupt_exact_draws_every_subset_equally_often() -> None:
    ranks = torch.tensor(list(itertools.permutations(range(5)))).float()
    rows = len(ranks)
    x_t = PROCESS.corrupt_exact(
        torch.zeros(rows, 5).long(), torch.full((rows,), 2), u=ranks / 5, maskable=torch.ones(rows, 5).bool()
    )
    _, counts = x_t.unique(dim=0, return_counts=True)
    assert counts.tolist() == [12] * 10


def test_corrupt_exact_and_its_weight_refuse_impossible_counts() -> None:
    maskable = torch.tensor([[True, True, False]] * 2)
    for n, row in (([2, 3], 1), ([-1, 0], 0)):
        with pytest.raises(ValueError, match=f"row {row}"):
            PROCESS.corrupt_exact(maskable.long(), torch.tensor(n), u=torch.zeros(2, 3), maskable=maskable)
    with pytest.raises(ValueError, match="n >= 1"):
        PROCESS.elbo_weight_exact(torch.tensor([1, 0]), maskable)


def test_stratified_times_hit_every_stratum_once_and_are_uniform_one_by_one() -> None:
    low, batch, generator = 1e-3, 64, torch.Generator().manual_seed(11)
    drawn = torch.stack([stratified_times(batch, generator=generator) for _ in range(200)])
    assert drawn.dtype == torch.float32
    assert (drawn >= low).all() and (drawn <= 1).all()
    strata = ((drawn.double() - low) / (1 - low) * batch).floor().long()
    assert (strata.sort(-1).values == torch.arange(batch)).all()
    # each place of the batch sees the whole interval: its mean is 1/2 up to 5 standard errors
    assert (drawn.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 200) ** 0.5
    again = stratified_times(batch, generator=torch.Generator().manual_seed(11))
    assert torch.equal(again, drawn[0])
    assert stratified_times(3, generator=generator, low=0.9).min() >= 0.9
