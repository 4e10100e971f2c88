"""Policy and KL terms against their formulas, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import Kl

LOG_PROB = st.floats(-3, 0, width=32)


def clipped(new: float, old: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """-min(rho A, clip(rho) A) and its derivative by log p, by cases."""
    rho = math.exp(new - old)
    inside = min(max(rho, 1 - low), 1 + high)
    if rho * advantage <= inside * advantage:
        return -rho * advantage, -rho * advantage
    return -inside * advantage, 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LOG_PROB, LOG_PROB, st.floats(-3, 3, width=32)), min_size=1, max_size=5))
def test_clipped_terms_and_gradients(tokens: list[tuple[float, float, float]]) -> None:
    new, old, advantage = (torch.tensor(part, dtype=torch.float64) for part in zip(*tokens, strict=True))
    new.requires_grad_()
    terms = Clipped(clip=0.2, clip_high=0.4).terms(new, old, advantage)
    terms.sum().backward()
    for place, token in enumerate(tokens):
        value, slope = clipped(*token, 0.2, 0.4)
        rho = math.exp(token[0] - token[1])
        assert terms[place].item() == pytest.approx(value, abs=1e-12)
        if min(abs(rho - 0.8), abs(rho - 1.4)) > 1e-6:
            assert new.grad is not None and new.grad[place].item() == pytest.approx(slope, abs=1e-12)


def test_gradient_at_ratio_one_is_minus_the_advantage() -> None:
    new = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    advantage = torch.tensor([1.5, -0.5, 0.0])
    Clipped(clip=0.2).terms(new, new.detach(), advantage).sum().backward()
    assert torch.equal(new.grad, -advantage)  # type: ignore[arg-type]


def test_diagnostics_count_what_the_clip_stops() -> None:
    old = torch.zeros(4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5])
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    found = Clipped(clip=0.2).diagnostics(new, old, advantage)
    assert found["clip_high"] == found["clip_low"] == 0.25
    assert found["ratio_deviation"] == pytest.approx((math.exp(0.5) - math.exp(-0.5)) / 2)
    assert found["ratio_mean"] == pytest.approx((math.exp(0.5) + math.exp(-0.5)) / 2)
    assert found["approx_kl"] == pytest.approx(0.5 * 0.5**2)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_terms(estimator: str) -> None:
    log_prob = torch.tensor([-0.1, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.7, -0.3, -1.0], dtype=torch.float64)
    terms = Kl(beta=1.0, estimator=estimator).terms(log_prob, reference)  # type: ignore[arg-type]
    terms.sum().backward()
    for place, (p, q) in enumerate(zip(log_prob.tolist(), reference.tolist(), strict=True)):
        d = q - p
        value = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[estimator]
        slope = {"k1": 1.0, "k2": -d, "k3": 1 - math.exp(d)}[estimator]
        assert terms[place].item() == pytest.approx(value, abs=1e-12)
        assert log_prob.grad is not None and log_prob.grad[place].item() == pytest.approx(slope, abs=1e-12)


def test_k1_and_k3_are_unbiased_and_the_slope_of_k2_is_that_of_the_kl() -> None:
    """Sums over a whole small distribution instead of samples."""
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    for estimator in ("k1", "k3"):
        terms = Kl(beta=1.0, estimator=estimator).terms(log_p, log_q)  # type: ignore[arg-type]
        assert (log_p.exp() * terms).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    exact = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    sampled = (log_p.detach().exp() * Kl(beta=1.0, estimator="k2").terms(log_p, log_q)).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], exact)
