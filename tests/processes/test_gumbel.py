"""Truncated Gumbel noise: the closed form against Monte Carlo and against the numbers of arXiv 2409.02908."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unveil.processes.gumbel import (
    UNIFORM_BITS,
    bias,
    ceiling,
    chi_square,
    effective_temperature,
    entropy,
    gumbel_max,
    trial,
    truncated,
    zipf,
)
from unveil.processes.masked import sample_categorical
from unveil.seeds import generator

WORDS = 50257


def house(stream: torch.Generator, probs: Tensor) -> Tensor:
    return sample_categorical(probs.log(), torch.rand(len(probs), dtype=torch.float64, generator=stream))


def test_ceiling_is_the_gumbel_of_the_largest_uniform() -> None:
    assert ceiling("float32") == pytest.approx(16.6355, abs=1e-4)
    assert ceiling("float64") == pytest.approx(36.7368, abs=1e-4)
    for name, bits in UNIFORM_BITS.items():
        if name != "float64":  # where 1 - 2^-53 is the float next to 1
            assert ceiling(name) == pytest.approx(-math.log(-math.log(1 - 2.0**-bits)))
    with pytest.raises(ValueError, match="float8"):
        ceiling("float8")


@pytest.mark.parametrize("maximum", [2.0, 6.0])
def test_closed_form_agrees_with_draws_of_truncated_noise(maximum: float) -> None:
    stream = generator("gumbel")
    probs = (1.5 * torch.randn(64, generator=stream, dtype=torch.float64)).softmax(0)
    expected = truncated(probs, maximum)
    draws = 200_000
    u = torch.rand(draws, 64, generator=stream, dtype=torch.float64) * math.exp(-math.exp(-maximum))
    counts = torch.bincount((probs.log() - (-u.log()).log()).argmax(-1), minlength=64)
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * error + 1e-9).all()
    assert (expected - probs).abs().max() > 5 * error.max(), "the ceiling should show"


def test_closed_form_sums_to_one_keeps_zeros_and_ties_and_vanishes_without_a_ceiling() -> None:
    probs = torch.tensor([[0.0, 0.1, 0.1, 0.8], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    drawn = truncated(probs, 1.0)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(3, dtype=torch.float64))
    assert drawn[0, 0] == 0 and drawn[0, 1] == drawn[0, 2] < 0.1
    torch.testing.assert_close(drawn[1], probs[1].double())
    torch.testing.assert_close(drawn[2], probs[2].double())
    torch.testing.assert_close(truncated(probs, 80.0), probs.double() / probs.double().sum(-1, keepdim=True))


def test_rare_classes_lose_to_frequent_ones() -> None:
    probs = zipf(100)
    ratio = truncated(probs, 4.0) / probs
    assert (ratio.diff() <= 0).all() and ratio[0] > 1 > ratio[-1]


@pytest.mark.parametrize("steps,unmask,nats", [(1_000, 6.4e-4, 5.32), (10_000, 4.4e-5, 3.91), (50_000, 6.0e-6, 2.88)])
def test_float32_faults_of_a_fine_ancestral_step(steps: int, unmask: float, nats: float) -> None:
    found = bias("one-draw", zipf(WORDS), 1 / steps, "float32")
    assert found.unmask == pytest.approx(unmask, rel=0.01) and found.unmask_exact == 1 / steps
    assert found.entropy == pytest.approx(nats, abs=0.005) and found.entropy_exact == pytest.approx(7.57, abs=0.005)
    assert found.temperature < 0.83 and found.biased
    sound = bias("one-draw", zipf(WORDS), 1 / steps, "float64")
    assert sound.unmask == pytest.approx(1 / steps, rel=1e-6)
    assert abs(sound.entropy - found.entropy_exact) < 2e-6 and not sound.biased


def test_a_flat_position_never_opens_in_float32_but_its_token_alone_is_fair() -> None:
    flat = torch.ones(WORDS)
    assert bias("one-draw", flat, 1e-4, "float32").unmask == pytest.approx(1e-17, rel=0.05)
    alone = bias("position-first", zipf(WORDS), 1e-4, "float32")
    assert alone.unmask == 1e-4 and alone.distance < 0.003 and not alone.biased
    peaked = torch.tensor([1.0, 1e-9, 1e-10])
    assert not bias("position-first", peaked, 1e-4, "float32").biased, "lost are tokens that never come"
    assert bias("position-first", zipf(WORDS), 1e-4, "bfloat16").biased


def test_effective_temperature_inverts_the_entropy() -> None:
    probs = zipf(40)
    for temperature in (0.3, 1.0, 2.5):
        target = float(entropy((probs.log() / temperature).softmax(0)))
        assert effective_temperature(probs, target) == pytest.approx(temperature, rel=1e-6)
    assert effective_temperature(torch.ones(7), math.log(7)) == 1.0
    assert effective_temperature(probs, 10.0) == math.inf and effective_temperature(probs, 0.0) == 0.0


def test_trial_finds_coarse_noise_and_passes_exact_samplers() -> None:
    tokens, stream = zipf(64), generator("trial")
    sound = [gumbel_max("float64", stream), lambda probs: house(stream, probs)]
    for draw in sound:
        found = trial(draw, tokens, 1 / 32, 60_000)
        assert found.p_value > 1e-3 and not found.biased and found.expected == pytest.approx(60_000 / 32)
    for dtype in ("float16", "bfloat16"):
        found = trial(gumbel_max(dtype, stream), tokens, 1 / 32, 60_000)
        assert found.biased and found.unmasked < 0.8 * found.expected and found.rare < 0.8 * found.expected_rare
    assert trial(gumbel_max("bfloat16", stream), tokens, 1.0, 20_000).biased, "the token alone, 8 bits are too few"


def test_noise_on_a_lattice_keeps_a_known_share_of_a_rare_token() -> None:
    bits, move, draws = 11, 1 / 6000, 2_000_000
    stream = generator("lattice")
    token = -(torch.randint(0, 2**bits, (draws,), generator=stream).double() / 2**bits).log()
    mask = -torch.rand(draws, dtype=torch.float64, generator=stream).log()
    won = (move / token > (1 - move) / mask).sum().item()
    c = 2.0**-bits / move
    expected = draws * move * c / math.expm1(c)
    assert abs(won - expected) < 4 * math.sqrt(expected) and expected < 0.2 * draws * move


def test_chi_square_is_the_known_tail() -> None:
    # One degree of freedom: statistic 3.841 is the 5 % point.
    share = torch.tensor([0.5, 0.5])
    n = 10_000
    shift = math.sqrt(3.8415 * n / 4)
    assert chi_square(torch.tensor([n / 2 + shift, n / 2 - shift]), share) == pytest.approx(0.05, abs=1e-4)
    assert chi_square(torch.tensor([5, 0, 5]), torch.tensor([0.5, 0.0, 0.5])) == 1.0
    assert chi_square(torch.tensor([5, 1, 4]), torch.tensor([0.5, 0.0, 0.5])) == 0.0
