"""Features of a window: nothing changed gives the whole canvas's features, anything else what the formula says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import published
import tiny
from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.kept import KeyValues
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser, _rotate

PUBLISHED = ["llada", "dream", "llada2", "qwen3"]
VALID = torch.tensor([[1] * 12, [0] * 3 + [1] * 9, [0] * 5 + [1] * 5 + [0] * 2]).bool()


def own() -> TransformerDenoiser:
    config = TransformerConfig(dim=16, layers=3, heads=2, hidden=24, context_length=24)
    network = TransformerDenoiser(config, TextTokenizer.of_words([f"w{index}" for index in range(60)]))
    network.initialise(torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return network.eval()


@pytest.fixture(scope="module", params=["own", *PUBLISHED])
def denoiser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MaskedDenoiser]:
    if request.param == "own":
        yield own()
    else:
        yield load_denoiser(published.write(tmp_path_factory.mktemp("models") / request.param, request.param))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(5, 50, VALID.shape, generator=torch.Generator().manual_seed(seed))


def columns(spans: list[tuple[int, int]]) -> Tensor:
    width = max(high - low for low, high in spans)
    return torch.tensor([[min(low + place, high - 1) for place in range(width)] for low, high in spans])


SPANS = [[(4, 8), (4, 8), (5, 9)], [(0, 3), (3, 9), (5, 10)], [(2, 12), (11, 12), (6, 7)], [(9, 10), (3, 4), (5, 6)]]
"""The windows of three rows: in the middle, at the beginning of each text, of other widths, of one column."""


@torch.no_grad()
def test_the_first_call_gives_the_features(denoiser: MaskedDenoiser) -> None:
    assert denoiser.spec.keeps_keys
    ids = tokens()
    torch.testing.assert_close(
        denoiser.window(ids, VALID, KeyValues())[VALID], denoiser.features(ids, VALID)[VALID], atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("spans", SPANS)
def test_where_nothing_changed_a_window_gives_the_features(
    denoiser: MaskedDenoiser, spans: list[tuple[int, int]]
) -> None:
    ids, kept, at = tokens(), KeyValues(), columns(spans)
    whole = denoiser.window(ids, VALID, kept)
    want = whole.gather(1, at[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(denoiser.window(ids, VALID, kept, at), want, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([2, 0])
    some = denoiser.window(ids[rows], VALID[rows], kept.of(rows), at[rows])
    torch.testing.assert_close(some, want[rows], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_padded_batch_equals_single_calls_on_old_keys(denoiser: MaskedDenoiser) -> None:
    before, after = tokens(0), tokens(1)
    spans = SPANS[1]
    inside = torch.zeros_like(VALID)
    for row, (low, high) in enumerate(spans):
        inside[row, low:high] = True
    ids, kept, at = torch.where(inside, after, before), KeyValues(), columns(spans)
    denoiser.window(before, VALID, kept)
    found = denoiser.window(ids, VALID, kept, at)
    for row, (low, high) in enumerate(spans):
        real = VALID[row]
        first, alone, ones = int(real.int().argmax()), KeyValues(), torch.ones(1, int(real.sum()), dtype=torch.bool)
        denoiser.window(before[row : row + 1, real], ones, alone)
        own_columns = torch.arange(low - first, high - first)[None]
        single = denoiser.window(ids[row : row + 1, real], ones, alone, own_columns)
        torch.testing.assert_close(found[row, : high - low], single[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", ["own", *PUBLISHED])
def test_a_window_of_everything_forgets_the_old_tokens(model: str, tmp_path: Path) -> None:
    """Nothing of what was there before is left in the memory, in no layer."""
    denoiser = own() if model == "own" else load_denoiser(published.write(tmp_path / model, model))
    before, after = tokens(0), tokens(1)
    kept, fresh = KeyValues(), KeyValues()
    denoiser.window(before, VALID, kept)
    every = columns([(0, 12), (3, 12), (5, 10)])
    found = denoiser.window(after, VALID, kept, every)
    whole = denoiser.window(after, VALID, fresh)
    want = whole.gather(1, every[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    for old, new in zip(kept.keys + kept.values, fresh.keys + fresh.values, strict=True):
        torch.testing.assert_close(old[VALID], new[VALID], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_attends_to_the_old_keys_outside_and_the_new_ones_inside() -> None:
    """The blocks of the embedded transformer, written out in float64 with a list of keys."""
    net = own()
    ids, at = tokens()[:1], torch.arange(4, 8)[None]
    changed = ids.clone()
    changed[0, 4:8] = tokens(1)[0, 4:8]
    ones, kept = VALID[:1], KeyValues()
    net.window(ids, ones, kept)
    found = net.window(changed, ones, kept, at)
    net = tiny.float64(net)
    cos, sin = net.rope_cos.double(), net.rope_sin.double()

    def layer(block: torch.nn.Module, x: Tensor, place: slice, old: tuple[Tensor, Tensor] | None) -> tuple:
        qkv = block.qkv(block.attention_norm(x)).view(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        query, key = (_rotate(part, (cos[place], sin[place])) for part in qkv[:2])
        value = qkv[2]
        if old is not None:
            key, value = (torch.cat([o[:, :, :4], n, o[:, :, 8:]], 2) for o, n in zip(old, (key, value), strict=True))
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        x = x + block.attention_out((weights @ value).transpose(1, 2).reshape(1, -1, 16))
        gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, -1)
        return x + block.down(F.silu(gate) * up), (key, value)

    x, y = net.embedding(ids), net.embedding(changed[:, 4:8])
    for block in net.blocks:
        x, memory = layer(block, x, slice(0, 12), None)
        y, _ = layer(block, y, slice(4, 8), memory)
    torch.testing.assert_close(found.double(), net.norm(y), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found.double(), net.double().features(changed, ones)[:, 4:8], atol=1e-3)


def test_networks_that_keep_no_keys_say_so() -> None:
    for denoiser in (tiny.score_denoiser(), tiny.Pooled()):
        assert not denoiser.spec.keeps_keys
    with pytest.raises(NotImplementedError, match="Pooled keeps no keys"):
        tiny.Pooled().window(tokens(), VALID, KeyValues())
