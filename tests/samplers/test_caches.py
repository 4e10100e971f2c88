"""Caches: where they are exact, what they are where they are not, and rows that know nothing of one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import published
import tiny
from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.kept import KeyValues
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.registry import UserError, lookup, names
from unveil.samplers.caches import Cache, DualCache, PrefixCache, VicinityCache
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Factor, LowConfidence, Random, Rule, RunningConfidence, Threshold
from unveil.samplers.trajectory import Trajectory

CACHES: list[Cache] = [PrefixCache(), DualCache(), VicinityCache(neighbours=2), VicinityCache(neighbours=1, refresh=3)]
RULES: list[Rule] = [
    LowConfidence(), Random(), Threshold(threshold=0.3, cap=3), Factor(factor=1.7), RunningConfidence(),
]  # fmt: skip
IDS = [rule.name for rule in RULES]
PUBLISHED = ["llada", "dream", "llada2", "qwen3"]
PROMPTS = [[6, 7, 8, 9, 10], [11], [12, 13, 14], []]
LENGTHS = [8, 12, 6, 9]
NEEDS = {"guesses", "log_prob", "confidence", "revealed", "states"}


def network(layers: int) -> TransformerDenoiser:
    config = TransformerConfig(dim=16, layers=layers, heads=2, hidden=24, context_length=24)
    net = TransformerDenoiser(config, TextTokenizer.of_words([f"w{index}" for index in range(60)]))
    net.initialise(torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return net.eval()


@pytest.fixture(scope="module")
def deep() -> TransformerDenoiser:
    return network(3)


@pytest.fixture(scope="module", params=PUBLISHED)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MaskedDenoiser]:
    yield load_denoiser(published.write(tmp_path_factory.mktemp("models") / request.param, request.param))


@pytest.fixture(scope="module")
def by_blocks(tmp_path_factory: pytest.TempPathFactory) -> MaskedDenoiser:
    return load_denoiser(published.write(tmp_path_factory.mktemp("models") / "llada2", "llada2"))


def decode(
    denoiser: MaskedDenoiser, cache: Cache | None, rule: Rule | None = None, *, only: int | None = None,
    needs: set[str] = NEEDS, **changes: Any,
) -> Trajectory:  # fmt: skip
    """All rows, or one alone, of `PROMPTS`, in blocks of 4 tokens and 3 steps, at a temperature."""
    picked = range(len(PROMPTS)) if only is None else [only]
    blocks = -(-max(LENGTHS[row] for row in picked) // 4)
    settings: dict[str, Any] = {"steps": 3 * blocks, "block_length": 4, "temperature": 0.7} | changes
    sampler = MaskedSampler(cache=cache, rule=rule or LowConfidence(), **settings)
    canvas = Canvas.of([PROMPTS[row] for row in picked], [LENGTHS[row] for row in picked], denoiser.spec)
    return sampler.sample(denoiser, canvas, [100 + row for row in picked], needs=needs)


def same(found: Trajectory, want: Trajectory) -> None:
    """The same tokens at every step, and numbers to 1e-5."""
    assert torch.equal(found.response_ids, want.response_ids) and torch.equal(found.active, want.active)
    for name in NEEDS & {"guesses", "revealed", "states"}:
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    for name in ("log_prob", "confidence"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), atol=1e-5, rtol=1e-5)


class Windows:
    """Counts the columns that are computed, and checks after every call that no key stands for another token."""

    def __init__(self, denoiser: MaskedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns, self.whole = 0, 0
        original = denoiser.window

        def window(ids: Tensor, valid: Tensor, kept: KeyValues, columns: Tensor | None = None) -> Tensor:
            found = original(ids, valid, kept, columns)
            self.columns += ids.numel() if columns is None else columns.numel()
            self.whole += len(ids) * (columns is None)
            fresh = KeyValues()
            original(ids, valid, fresh)
            keys = kept.keys[0] if kept.rows is None else kept.keys[0][kept.rows]
            # The first layer's keys depend on nothing but the token and its place.
            torch.testing.assert_close(keys[valid], fresh.keys[0][valid], atol=1e-5, rtol=1e-5)
            return found

        monkeypatch.setattr(denoiser, "window", window)


# ---- exact


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("cache", [PrefixCache(refresh=1), DualCache(refresh=1), VicinityCache(refresh=1)])
def test_computing_everything_at_every_step_is_no_cache(deep: TransformerDenoiser, cache: Cache, rule: Rule) -> None:
    assert cache.exact(deep.spec)
    same(decode(deep, cache, rule), decode(deep, None, rule))


def test_computing_everything_at_every_step_is_no_cache_in_published_networks(adapter: MaskedDenoiser) -> None:
    same(decode(adapter, DualCache(refresh=1)), decode(adapter, None))


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_network_of_one_layer_has_no_stale_key(cache: Cache, rule: Rule) -> None:
    """Its keys depend on nothing but tokens: every cache gives what the whole canvas gives, at the open holes."""
    net = network(1)
    found, want = (decode(net, kept, rule, needs={"states", "revealed"}) for kept in (cache, None))
    assert torch.equal(found.response_ids, want.response_ids) and torch.equal(found.states, want.states)


@pytest.mark.parametrize(
    ("rule", "block"),
    [*((rule, 4) for rule in RULES), (LowConfidence(), 3), (RunningConfidence(), 6), (Threshold(threshold=0.3), None)],
)
def test_a_prefix_is_exact_where_attention_goes_block_by_block(
    by_blocks: MaskedDenoiser, monkeypatch: pytest.MonkeyPatch, rule: Rule, block: int | None
) -> None:
    net = by_blocks
    assert net.spec.attention_block == 4
    assert PrefixCache().exact(net.spec) and not DualCache().exact(net.spec)
    want = decode(net, None, rule, block_length=block, steps=12)
    counted = Windows(net, monkeypatch)
    same(decode(net, PrefixCache(), rule, block_length=block, steps=12), want)
    assert counted.whole == len(PROMPTS), "only the first step computes everything"


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_nobody_computes_what_nobody_reads(
    by_blocks: MaskedDenoiser, monkeypatch: pytest.MonkeyPatch, rule: Rule
) -> None:
    """Block by block, later blocks say nothing to the current one: they are left out where only it is read."""
    net = by_blocks
    want = decode(net, None, rule, needs={"states"})
    counted = Windows(net, monkeypatch)
    found = decode(net, PrefixCache(), rule, needs={"states"})
    assert torch.equal(found.states, want.states) and torch.equal(found.response_ids, want.response_ids)
    narrow, counted.columns = counted.columns, 0
    decode(net, PrefixCache(), rule)
    assert narrow < counted.columns


# ---- approximate


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_equals_its_rows_decoded_alone(deep: TransformerDenoiser, cache: Cache, rule: Rule) -> None:
    together = decode(deep, cache, rule)
    for row, length in enumerate(LENGTHS):
        alone = decode(deep, cache, rule, only=row)
        steps = int(alone.active.sum())
        assert torch.equal(together.response_ids[row, :length], alone.response_ids[0])
        assert int(together.active[row].sum()) == steps
        for name in ("log_prob", "confidence"):
            batched, single = (getattr(part, name) for part in (together, alone))
            torch.testing.assert_close(batched[row, :steps, :length], single[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [PrefixCache(), VicinityCache(neighbours=1, refresh=3)])
def test_a_batch_equals_its_rows_decoded_alone_in_published_networks(adapter: MaskedDenoiser, cache: Cache) -> None:
    rule = Threshold(threshold=0.2, cap=2)
    together = decode(adapter, cache, rule)
    for row, length in enumerate(LENGTHS):
        alone = decode(adapter, cache, rule, only=row)
        assert torch.equal(together.response_ids[row, :length], alone.response_ids[0])


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("cache", CACHES)
def test_no_key_stands_for_a_token_that_is_gone(
    deep: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch, cache: Cache, rule: Rule
) -> None:
    uncached = decode(deep, None, rule)
    counted = Windows(deep, monkeypatch)
    decode(deep, cache, rule)
    assert 0 < counted.columns < uncached.forwards * 17


def test_the_window_is_what_the_cache_says(deep: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of 5, two blocks of 4, two steps each: all 13 columns at a block's start, then the window."""
    monkeypatch.setattr("test_caches.PROMPTS", PROMPTS[:1])
    counted = Windows(deep, monkeypatch)
    for cache, windows in (
        (PrefixCache(), (8, 4)),
        (DualCache(), (4, 4)),
        (VicinityCache(neighbours=1), (6, 5)),
        (VicinityCache(neighbours=99), (13, 13)),
        (DualCache(refresh=2), (4, 4)),
        (DualCache(refresh=1), (13, 13)),
    ):
        counted.columns = 0
        decode(deep, cache, steps=4, only=0)
        assert counted.columns == 2 * 13 + sum(windows), cache


def test_a_refresh_comes_after_so_many_steps(deep: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Windows(deep, monkeypatch)
    decode(deep, DualCache(refresh=3), steps=8, block_length=None, only=0)
    assert (counted.whole, counted.columns) == (3, 3 * 13 + 5 * 8)


def test_caches_change_what_a_deep_network_says(deep: TransformerDenoiser) -> None:
    """Else the tests above would show nothing."""
    want = decode(deep, None)
    for cache in CACHES:
        assert not torch.allclose(decode(deep, cache).log_prob, want.log_prob, atol=1e-3)  # type: ignore[arg-type]
        assert not cache.exact(deep.spec)


def test_a_row_that_stops_at_its_end_leaves_its_memory(deep: TransformerDenoiser) -> None:
    for cache in CACHES:
        together = decode(deep, cache, Threshold(threshold=0.1), stop_at_end=True, needs=set())
        for row, length in enumerate(LENGTHS):
            alone = decode(deep, cache, Threshold(threshold=0.1), stop_at_end=True, needs=set(), only=row)
            assert torch.equal(together.response_ids[row, :length], alone.response_ids[0])


# ---- bad input


@pytest.mark.parametrize("name", names(Cache))
def test_networks_that_keep_no_keys_are_refused(name: str) -> None:
    sampler = MaskedSampler(steps=5, cache=lookup(Cache, name)())
    net = tiny.Pooled()
    with pytest.raises(UserError, match=rf"^sampler\.cache: '{name}' needs a network .* Pooled cannot \(allowed: null"):
        sampler.sample(net, Canvas.of([[4]], 5, net.spec), [0])
