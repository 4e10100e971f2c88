"""Categorical sampling, scoring, filters and confidences against brute force and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unveil.processes import masked
from unveil.samplers.tokens import confidence, filter_logits, sample_categorical, token_log_prob

NEXT_TO_ONE = 1 - 2.0**-53


def noise(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logits(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_the_cumulative_distribution_is_inverted() -> None:
    probs = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.125])
    u = noise(0.0, 0.124, 0.126, 0.624, 0.626, 0.874, 0.876, NEXT_TO_ONE)
    drawn = sample_categorical(probs.log().expand(len(u), 5), u)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]


def test_a_noise_grid_measures_every_probability() -> None:
    n = 20_000
    logits = random_logits(1, 7, seed=1)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = sample_categorical(logits.expand(n, 7), u).bincount(minlength=7)
    assert (counts / n - logits.double().softmax(-1)[0]).abs().max() <= 1 / n


def test_the_borders_between_tokens_are_those_of_float64() -> None:
    logits = random_logits(1, 12, seed=2)
    borders = logits.double().softmax(-1).cumsum(-1)[0, :-1]
    rows = logits.expand(11, 12)
    assert torch.equal(sample_categorical(rows, borders - 1e-14), torch.arange(11))
    assert torch.equal(sample_categorical(rows, borders + 1e-14), torch.arange(1, 12))


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-1000, 1000) | st.just(-math.inf), min_size=1, max_size=12),
    u=st.floats(0, NEXT_TO_ONE) | st.sampled_from([0.0, 5e-324, NEXT_TO_ONE]),
)
def test_a_token_of_probability_zero_is_never_drawn(logits: list[float], u: float) -> None:
    if max(logits) == -math.inf:
        logits[0] = 0.0
    row = torch.tensor([logits], dtype=torch.float64)
    token = int(sample_categorical(row, noise(u)))
    assert 0 <= token < len(logits)
    assert float(row.softmax(-1)[0, token]) > 1e-19


def test_one_hot_rows_and_the_ends_of_the_noise() -> None:
    for token in range(5):
        logits = torch.full((3, 5), -math.inf)
        logits[:, token] = -1000.0
        assert sample_categorical(logits, noise(0.0, 0.5, NEXT_TO_ONE)).tolist() == [token] * 3


def test_rare_tokens_are_drawn_where_float32_noise_could_not() -> None:
    """Probability 1e-10 sits far below 2^-24, at the low end and at the high end of the noise."""
    logits = torch.tensor([[math.log(1e-10), 0.0, math.log(1e-10)]] * 4)
    u = noise(0.9e-10, 1.1e-10, 1 - 1.1e-10, 1 - 0.9e-10)
    assert sample_categorical(logits, u).tolist() == [0, 1, 1, 2]


def test_the_vocabulary_of_llada() -> None:
    vocabulary = 126_464
    logits = random_logits(4, vocabulary, seed=5, scale=2.0)
    logits[:, 0] = logits[:, -1] = -math.inf
    u = noise(0.0, 0.3, 0.9, NEXT_TO_ONE)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    drawn = sample_categorical(logits, u)
    assert drawn[0] == 1 and drawn[3] == vocabulary - 2
    for row in (1, 2):
        token = int(drawn[row])
        assert cumulative[row, token - 1] - 1e-9 <= u[row] < cumulative[row, token] + 1e-9


def test_rows_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(50, 33, seed=6)
    generator = torch.Generator().manual_seed(7)
    u = torch.rand(50, dtype=torch.float64, generator=generator)
    tokens, scores = sample_categorical(logits, u), token_log_prob(logits, torch.arange(50) % 33, 0.7)
    filtered = filter_logits(logits, 20, 0.8)
    single = [sample_categorical(logits[row : row + 1], u[row : row + 1]) for row in range(50)]
    assert torch.equal(torch.cat(single), tokens)
    monkeypatch.setattr(masked, "_CHUNK_ELEMENTS", 3 * 33)  # chunks of three rows, and a last one of two
    assert torch.equal(sample_categorical(logits, u), tokens)
    assert torch.equal(token_log_prob(logits, torch.arange(50) % 33, 0.7), scores)
    assert torch.equal(filter_logits(logits, 20, 0.8), filtered)


def test_no_rows_at_all() -> None:
    empty, none = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    assert sample_categorical(empty, noise()).shape == (0,)
    assert token_log_prob(empty, none, 1.0).shape == (0,)
    assert filter_logits(empty, 2, 0.5).shape == (0, 5)
    assert confidence(empty, none, "margin").shape == (0,)
    assert confidence(empty, none, "entropy").shape == (0,)


@pytest.mark.parametrize("bad", [[-math.inf, -math.inf], [0.0, math.nan], [math.inf, 0.0]])
def test_a_row_that_is_no_distribution_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="row 1 of the logits"):
        sample_categorical(torch.tensor([[0.0, 1.0], bad]), noise(0.5, 0.5))


def test_bad_noise_is_refused() -> None:
    for u in (noise(1.0), noise(-0.1), noise(math.nan), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="noise must be float64"):
            sample_categorical(torch.zeros(1, 2), u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_log_prob_is_the_float32_of_the_float64_value(dtype: torch.dtype) -> None:
    logits = random_logits(20, 300, seed=8).to(dtype)
    tokens = torch.arange(20)
    for temperature in (0.4, 1.0, 2.5):
        scored = token_log_prob(logits, tokens, temperature)
        exact = (logits.double() / temperature).log_softmax(-1)[torch.arange(20), tokens]
        assert scored.dtype == torch.float32
        torch.testing.assert_close(scored.double(), exact, rtol=1e-6, atol=1e-5)


def test_log_prob_of_extreme_logits() -> None:
    logits = torch.tensor([[1000.0, -1000.0, 999.0], [-math.inf, -1000.0, -1000.0]])
    expected = [-2000 - math.log1p(math.exp(-1)), -math.log(2)]
    assert token_log_prob(logits, torch.tensor([1, 2]), 1.0).tolist() == pytest.approx(expected)
    assert token_log_prob(logits, torch.tensor([0, 0]), 1.0)[1] == -math.inf


def test_chunks_recomputed_backward_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, weights = torch.arange(10), torch.linspace(-1, 1, 10)
    gradients = []
    for elements in (2**24, 4 * 40):
        monkeypatch.setattr(masked, "_CHUNK_ELEMENTS", elements)
        logits = random_logits(10, 40, seed=9).requires_grad_()
        (token_log_prob(logits, tokens, 0.5) * weights).sum().backward()
        gradients.append(logits.grad)
    assert torch.equal(gradients[0], gradients[1])
    one_hot = torch.nn.functional.one_hot(tokens, 40)
    exact = (one_hot - (random_logits(10, 40, seed=9) / 0.5).softmax(-1)) / 0.5 * weights[:, None]
    torch.testing.assert_close(gradients[0], exact)


def test_log_prob_refuses_a_temperature_that_is_not_positive() -> None:
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_log_prob(torch.zeros(1, 2), torch.tensor([0]), temperature)


def brute_force_filter(row: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """Token ids that remain, by sorting (descending logit, ascending id) and adding up in float64."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))[:top_k]
    if top_p is None:
        return set(order)
    weights = [math.exp(row[token] - row[order[0]]) for token in order]
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.add(token)
        mass += weight
        if mass >= top_p * math.fsum(weights):
            break
    return kept


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(1, 20),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.none() | st.floats(0.01, 0.99),
)
def test_filters_equal_brute_force(seed: int, vocabulary: int, top_k: int | None, top_p: float | None) -> None:
    logits = random_logits(3, vocabulary, seed).mul(2).round().div(2)  # rounding makes ties
    logits = logits + torch.tensor([[0.0], [500.0], [-500.0]])
    filtered = filter_logits(logits, top_k, top_p)
    for row in range(3):
        kept = set((filtered[row] > -math.inf).nonzero()[:, 0].tolist())
        assert kept == brute_force_filter(logits[row].tolist(), top_k, top_p)
        assert all(filtered[row, token] == logits[row, token] for token in kept)


def test_filters_at_their_borders() -> None:
    logits = torch.zeros(1, 4)
    assert (filter_logits(logits, 2)[0] == 0).tolist() == [True, True, False, False]
    assert (filter_logits(logits, None, 0.5)[0] == 0).tolist() == [True, True, False, False]
    assert (filter_logits(logits, None, 1e-9)[0] == 0).tolist() == [True, False, False, False]
    assert (filter_logits(logits, 2, 0.6)[0] == 0).tolist() == [True, True, False, False]
    tail = torch.tensor([[0.0, -50.0, -math.inf]])
    assert torch.equal(filter_logits(tail, None, 1.0), tail)
    assert torch.equal(filter_logits(tail, 3), tail)
    for top_k, top_p in ((0, None), (None, 0.0), (None, 1.1), (None, math.nan)):
        with pytest.raises(ValueError, match="must"):
            filter_logits(logits, top_k, top_p)


def test_what_the_filter_removes_is_neither_drawn_nor_scored() -> None:
    logits = filter_logits(random_logits(200, 30, seed=12), 8, 0.7)
    u = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(13))
    tokens = sample_categorical(logits, u)
    assert torch.isfinite(token_log_prob(logits, tokens, 1.0)).all()
    removed = (logits == -math.inf).int().argmax(-1)
    assert (token_log_prob(logits, removed, 1.0) == -math.inf).all()


def test_confidences() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    tokens = torch.tensor([1, 0, 2])
    logits = probs.log() + torch.tensor([[5.0], [-700.0], [0.0]])
    assert confidence(logits, tokens, "probability").tolist() == pytest.approx([0.3, 1.0, 1 / 3], rel=1e-5)
    assert confidence(logits, tokens, "margin").tolist() == pytest.approx([0.2, 1.0, 0.0], abs=1e-6)
    entropy = 0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)
    expected = [entropy, 0.0, -math.log(3)]
    assert confidence(logits, tokens, "entropy").tolist() == pytest.approx(expected, abs=1e-6)
    assert confidence(logits.bfloat16(), tokens, "entropy").dtype == torch.float32
    with pytest.raises(ValueError, match="allowed: entropy, margin, peak, probability"):
        confidence(logits, tokens, "random")  # type: ignore[arg-type]


def test_the_reverse_step_of_the_process_draws_and_scores_with_these_functions() -> None:
    logits = random_logits(1, 9, seed=20)
    step = masked.MaskedProcess(mask_id=8).step(
        logits[None], torch.tensor([[8]]), torch.tensor([1.0]), torch.tensor([0.0])
    )
    plain = torch.cat([logits[:, :8], torch.tensor([[-math.inf]])], dim=-1)
    for value in (0.1, 0.5, 0.9):
        u = torch.tensor([[value]], dtype=torch.float64)
        token = step.sample(torch.zeros_like(u), u)[0]
        assert torch.equal(token, sample_categorical(plain, u[0]))
        assert torch.equal(step.log_prob(token[None])[0], token_log_prob(plain, token, 1.0))
