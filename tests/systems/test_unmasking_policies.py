"""Unmasking policies: the network, the mixture and the reward by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unveil.denoisers.unmask import UnmaskInputs
from unveil.registry import UserError
from unveil.seeds import generator
from unveil.systems.unmasking_policies import ConfidencePolicy


def network(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return ConfidencePolicy(**({"dim": 16, "hidden": 32} | changes)).build(0)


def moved(net: nn.Module, seed: int = 1) -> nn.Module:
    """Past the start, at which neither mask nor time have any effect."""
    stream = generator(seed, "moved")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    return net


def inputs(rows: int, width: int, seed: int = 0, **changes: Tensor) -> UnmaskInputs:
    """After 0 to ``width`` - 1 of ``width`` steps; all of the response is one block."""
    stream = generator(seed, "inputs")
    every = torch.ones(rows, width, dtype=torch.bool)
    made: dict[str, Tensor] = {
        "masked": torch.rand(rows, width, generator=stream) < 0.6,
        "block": every,
        "confidence": torch.rand(rows, width, generator=stream),
        "valid": every,
        "step": torch.randint(width, (rows,), generator=stream),
        "planned": torch.full((rows,), width),
    }
    return UnmaskInputs(**(made | changes))  # type: ignore[arg-type]


def test_at_first_about_an_eighth_is_opened_whatever_the_mask_and_the_time() -> None:
    nets = [network(seed, dim=128, hidden=512) for seed in range(20)]
    given = inputs(32, 12)
    logits = torch.stack([net(given) for net in nets])
    assert logits.mean().item() == pytest.approx(-2.0, abs=0.3)
    assert logits.sigmoid().mean().item() == pytest.approx(0.12, abs=0.02)
    masked = replace(given, masked=given.valid)
    torch.testing.assert_close(nets[0](replace(masked, step=given.step + 3)), nets[0](masked))
    assert sum(p.numel() for p in nets[0].parameters()) == pytest.approx(300_000, rel=0.15)


def test_every_input_counts_afterwards() -> None:
    net = moved(network())
    given = inputs(8, 6)
    base = net(given)
    mirrored = net(replace(given, masked=given.masked.flip(1), confidence=given.confidence.flip(1))).flip(1)
    for other in (
        net(replace(given, masked=~given.masked)),
        net(replace(given, confidence=given.confidence + 0.1 * given.masked)),
        net(replace(given, step=given.step + 1)),
        mirrored,  # the order of positions
    ):
        changed = (other - base).abs().amax(1)
        assert changed[given.masked.any(1)].min() > 1e-4
    torch.testing.assert_close(net(replace(given, step=2 * given.step, planned=2 * given.planned)), base)
    torch.testing.assert_close(net(replace(given, confidence=given.confidence * given.masked)), base)


def by_hand(net: nn.Module, masked: Tensor, confidence: Tensor, progress: float) -> Tensor:
    """The written block for one row, position by position, in float64."""
    p = {name: value.detach().double() for name, value in net.state_dict().items()}
    dim, heads = p["mask.weight"].shape[1], 2
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
        x = linear(torch.ones(1).double() if known else confidence[place : place + 1].double(), "enter")
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


def test_the_block_against_the_written_formulas() -> None:
    net = moved(network())
    given = inputs(4, 7)
    found = net(given)
    for row in range(4):
        expected = by_hand(net, given.masked[row], given.confidence[row], given.step[row].item() / 7)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_and_batches_change_nothing() -> None:
    net = moved(network())
    lengths = torch.tensor([9, 1, 4, 7, 9, 2])
    valid = torch.arange(9) < lengths[:, None]
    given = inputs(6, 9, planned=lengths, valid=valid)
    given.masked &= valid
    together = net(given)
    for row, length in enumerate(lengths.tolist()):
        alone = given.rows(slice(row, row + 1))
        for name in ("masked", "block", "confidence", "valid"):
            setattr(alone, name, getattr(alone, name)[:, :length])
        torch.testing.assert_close(together[row : row + 1, :length], net(alone), rtol=1e-5, atol=1e-5)


def test_longer_canvases_need_no_change() -> None:
    longer = moved(network())(inputs(2, 40))
    assert longer.shape == (2, 40) and longer.isfinite().all()


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="heads: 3 must divide dim=16 into even head sizes"):
        ConfidencePolicy(dim=16, heads=3)
    with pytest.raises(UserError, match="heads: 2 must divide dim=6 into even head sizes"):
        ConfidencePolicy(dim=6, heads=2)
