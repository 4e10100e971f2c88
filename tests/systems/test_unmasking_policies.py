"""Unmasking policies: the network, the mixture and the reward by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unveil.seeds import generator
from unveil.systems.unmasking_policies import ConfidencePolicy, mixture


def network(seed: int = 0, **changes: float) -> ConfidencePolicy:
    settings = {"dim": 16, "heads": 2, "hidden": 32, "layers": 1, "confidences": 1, "bias": -2.0, "time_period": 1.0}
    net = ConfidencePolicy(**(settings | changes))  # type: ignore[arg-type]
    net.initialise(generator(seed, "policy"))
    return net


def moved(net: ConfidencePolicy, seed: int = 1) -> ConfidencePolicy:
    """Past the start, at which neither mask nor time have any effect."""
    stream = generator(seed, "moved")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    return net


def inputs(rows: int, width: int, confidences: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = generator(seed, "inputs")
    masked = torch.rand(rows, width, generator=stream) < 0.6
    confidence = torch.rand(rows, width, confidences, generator=stream).sort(-1, descending=True).values
    return masked, confidence, torch.rand(rows, generator=stream), torch.ones(rows, width, dtype=torch.bool)


def test_at_first_about_an_eighth_is_opened_whatever_the_mask_and_the_time() -> None:
    nets = [network(seed, dim=128, hidden=512) for seed in range(20)]
    masked, confidence, progress, valid = inputs(32, 12)
    logits = torch.stack([net(masked, confidence, progress, valid) for net in nets])
    assert logits.mean().item() == pytest.approx(-2.0, abs=0.3)
    assert logits.sigmoid().mean().item() == pytest.approx(0.12, abs=0.02)
    all_masked = torch.ones_like(masked)
    late = nets[0](all_masked, confidence, progress + 0.3, valid)
    torch.testing.assert_close(late, nets[0](all_masked, confidence, progress, valid))
    assert sum(p.numel() for p in nets[0].parameters()) == pytest.approx(300_000, rel=0.15)


def test_every_input_counts_afterwards() -> None:
    net = moved(network())
    masked, confidence, progress, valid = inputs(8, 6)
    base = net(masked, confidence, progress, valid)
    for other in (
        net(~masked, confidence, progress, valid),
        net(masked, confidence + 0.1, progress, valid),
        net(masked, confidence, progress + 0.1, valid),
        net(masked.flip(1), confidence.flip(1), progress, valid).flip(1),  # the order of positions
    ):
        assert (other - base).abs().amax(1).min() > 1e-3


def by_hand(net: ConfidencePolicy, masked: Tensor, confidence: Tensor, progress: float) -> Tensor:
    """The written block for one row, position by position, in float64."""
    p = {name: value.detach().double() for name, value in net.state_dict().items()}
    dim, heads = p["mask.weight"].shape[1], net.blocks[0].heads
    size = dim // heads

    def linear(x: Tensor, name: str) -> Tensor:
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        unit = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return unit * p[f"{name}.weight"] + p[f"{name}.bias"]

    def turned(x: Tensor, place: int) -> Tensor:
        out = torch.empty_like(x)
        for pair in range(size // 2):
            angle = place * 10_000 ** (-2 * pair / size)
            even, odd = x[2 * pair], x[2 * pair + 1]
            out[pair] = even * math.cos(angle) - odd * math.sin(angle)
            out[size // 2 + pair] = even * math.sin(angle) + odd * math.cos(angle)
        return out

    time = torch.tensor([math.cos(progress)] * 64 + [math.sin(progress)] * 64, dtype=torch.float64)
    hidden = linear(time, "time.0")
    moment = linear(hidden * torch.sigmoid(hidden), "time.2")
    rows = []
    for place, known in enumerate((~masked).tolist()):
        c = torch.tensor([1.0] + [0.0] * (confidence.shape[-1] - 1)) if known else confidence[place]
        x = linear(c.double(), "enter")
        parts = linear(p["mask.weight"][0 if known else 1] + moment, "blocks.0.modulation").chunk(6)
        q, k, v = linear(norm(x, "blocks.0.attention_norm") * (1 + parts[0]) + parts[1], "blocks.0.qkv").chunk(3)
        rows.append((x, parts, q.split(size), k.split(size), v.split(size), place))
    result = []
    for x, parts, q, _, _, place in rows:
        mixed = []
        for head in range(heads):
            query = turned(q[head], place)
            scores = torch.stack([query @ turned(k[head], other) / math.sqrt(size) for _, _, _, k, _, other in rows])
            mixed.append(sum(w * row[4][head] for w, row in zip(scores.softmax(0), rows, strict=True)))
        x = x + linear(torch.cat(mixed), "blocks.0.attention_out") * (1 + parts[2])
        inner = linear(norm(x, "blocks.0.mlp_norm") * (1 + parts[3]) + parts[4], "blocks.0.up")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, "blocks.0.down") * (1 + parts[5])
        result.append(linear(norm(x, "norm"), "leave")[0])
    return torch.stack(result)


@pytest.mark.parametrize("confidences", [1, 3])
def test_the_block_against_the_written_formulas(confidences: int) -> None:
    net = moved(network(confidences=confidences))
    masked, confidence, progress, valid = inputs(4, 7, confidences)
    found = net(masked, confidence, progress, valid)
    for row in range(4):
        expected = by_hand(net, masked[row], confidence[row], progress[row].item())
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_and_batches_change_nothing() -> None:
    net = moved(network())
    masked, confidence, progress, valid = inputs(6, 9)
    lengths = torch.tensor([9, 1, 4, 7, 9, 2])
    valid = torch.arange(9) < lengths[:, None]
    masked &= valid
    together = net(masked, confidence, progress, valid)
    for row, length in enumerate(lengths.tolist()):
        own = (slice(row, row + 1), slice(0, length))
        alone = net(masked[own], confidence[own], progress[row : row + 1], valid[own])
        torch.testing.assert_close(together[own], alone, rtol=1e-5, atol=1e-5)
    noise = torch.where(valid[..., None], confidence, torch.rand_like(confidence))
    torch.testing.assert_close(net(masked, noise, progress, valid)[valid], together[valid])


def test_longer_canvases_need_no_change() -> None:
    net = moved(network())
    masked, confidence, progress, valid = inputs(2, 40)
    longer = net(masked, confidence, progress, valid)
    assert longer.shape == (2, 40) and longer.isfinite().all()


@pytest.mark.parametrize(("rollouts", "experts"), [(8, 1), (4, 2)])
def test_mixture_by_hand(rollouts: int, experts: int) -> None:
    log_prob = torch.tensor([0.0, -1.3, -30.0, -1e4], dtype=torch.float64, requires_grad=True)
    mixed = mixture(log_prob, rollouts, experts)
    total = rollouts + experts
    expected = torch.tensor([math.log(rollouts / total * math.exp(p) + 1 / total) for p in log_prob.tolist()])
    torch.testing.assert_close(mixed.detach(), expected.double())
    (gradient,) = torch.autograd.grad(mixed.sum(), log_prob)
    share = [rollouts * math.exp(p) / (rollouts * math.exp(p) + 1) for p in log_prob.tolist()]
    torch.testing.assert_close(gradient, torch.tensor(share, dtype=torch.float64))
    # However the policy moves, the ratio of an expert's step stays within 1 / (G + 1) and G + 1.
    assert (mixed.max() - mixed.min()).exp().item() == pytest.approx(rollouts + 1)
