"""Chunked log-probabilities against the full log-softmax, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unveil.bench._memory import peak_bytes
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.learning import scoring
from unveil.learning.scoring import score_tokens

N, D, WORDS = 23, 12, 40


@pytest.fixture
def denoiser() -> TransformerDenoiser:
    config = TransformerConfig(dim=D, layers=1, heads=2, hidden=8, context_length=4)
    network = TransformerDenoiser(config, TextTokenizer.of_words([f"w{index}" for index in range(WORDS)]))
    network.initialise(torch.Generator().manual_seed(0))
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(1)
    features = 20 * torch.randn(N, D, generator=stream)
    tokens = torch.randint(4, WORDS, (N,), generator=stream)
    return features.requires_grad_(), tokens, torch.randn(N, generator=stream)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, N, 100])
def test_values_and_gradients_equal_the_full_log_softmax(
    denoiser: TransformerDenoiser, chunk_rows: int | None, temperature: float
) -> None:
    features, tokens, weights = inputs()
    full = (denoiser.head(features).double() / temperature).log_softmax(-1)
    wanted = full.gather(-1, tokens[:, None])[:, 0]
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), [features, denoiser.unembedding.weight])
    got = score_tokens(denoiser, features, tokens, temperature, chunk_rows=chunk_rows)
    grads = torch.autograd.grad((got * weights).sum(), [features, denoiser.unembedding.weight])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    for own, reference in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(own, reference, atol=1e-6 * float(reference.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_entropy_is_exact_and_carries_no_gradient(denoiser: TransformerDenoiser, chunk_rows: int | None) -> None:
    features, tokens, _ = inputs()
    got, entropy = score_tokens(denoiser, features, tokens, 0.7, chunk_rows=chunk_rows, entropy=True)
    probs = (denoiser.head(features).double() / 0.7).softmax(-1)
    torch.testing.assert_close(entropy.double(), torch.special.entr(probs).sum(-1), atol=1e-6, rtol=1e-6)
    assert torch.equal(got, score_tokens(denoiser, features, tokens, 0.7, chunk_rows=chunk_rows))
    assert got.requires_grad and not entropy.requires_grad
    got.sum().backward()


def test_without_gradients_nothing_is_kept(denoiser: TransformerDenoiser) -> None:
    features, tokens, _ = inputs()
    with torch.no_grad():
        got = score_tokens(denoiser, features, tokens, chunk_rows=3)
    assert not got.requires_grad
    torch.testing.assert_close(got, score_tokens(denoiser, features, tokens).detach())


def test_half_precision_features_give_float32_scores(denoiser: TransformerDenoiser) -> None:
    features, tokens, _ = inputs()
    half = denoiser.bfloat16()
    got = score_tokens(half, features.detach().bfloat16(), tokens, chunk_rows=6)
    logits = half.head(features.detach().bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0], atol=2e-2, rtol=0)


def test_no_positions_give_no_scores(denoiser: TransformerDenoiser) -> None:
    features = torch.zeros(0, D, requires_grad=True)
    got, entropy = score_tokens(denoiser, features, torch.zeros(0, dtype=torch.long), entropy=True)
    assert got.shape == entropy.shape == (0,)
    got.sum().backward()


def test_the_default_chunk_follows_the_vocabulary(
    denoiser: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    head = denoiser.head
    monkeypatch.setattr(denoiser, "head", lambda part: rows.append(len(part)) or head(part))
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 10 * (WORDS + 4))
    features, tokens, _ = inputs()
    score_tokens(denoiser, features, tokens).sum().backward()
    # Forward in chunks of ten rows, and every chunk once more in the backward pass.
    assert sorted(rows) == [3, 3, 10, 10, 10, 10]


def test_the_peak_follows_the_chunk_and_not_the_number_of_positions() -> None:
    config = TransformerConfig(dim=D, layers=1, heads=2, hidden=8, context_length=4)
    network = TransformerDenoiser(config, TextTokenizer.of_words([f"w{index}" for index in range(4000)]))
    network.initialise(torch.Generator().manual_seed(0))

    def peak(positions: int) -> int:
        features, tokens = torch.randn(positions, D, requires_grad=True), torch.full((positions,), 7)
        network.zero_grad()
        return peak_bytes(
            lambda: score_tokens(network, features, tokens, chunk_rows=16).sum().backward(), torch.device("cpu")
        )

    assert peak(512) < 1.2 * peak(64)


@pytest.mark.parametrize(
    ("more", "message"), [({"chunk_rows": 0}, "chunk_rows"), ({"temperature": 0.0}, "temperature")]
)
def test_bad_numbers_are_refused(denoiser: TransformerDenoiser, more: dict, message: str) -> None:
    features, tokens, _ = inputs()
    with pytest.raises(ValueError, match=message):
        score_tokens(denoiser, features, tokens, **more)
