"""The bench of decoding: its loops do what they say, its counts and verdicts follow; how fast it is, is not tested."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import published
import tiny
from unveil.bench import decode
from unveil.bench._cached_reference import plain_cached_decode
from unveil.bench._reference import Workload
from unveil.cli.main import main
from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.transformer import TransformerConfig
from unveil.registry import UserError
from unveil.samplers.caches import Cache, DualCache, PrefixCache
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, Rule, Threshold

SHAPE = TransformerConfig(dim=32, layers=2, heads=2, hidden=32, context_length=64)


@pytest.fixture(scope="module")
def network() -> MaskedDenoiser:
    return decode._network(SHAPE, 60, 0, torch.device("cpu"), torch.float32).eval()


@pytest.fixture(scope="module")
def result(network: MaskedDenoiser) -> dict:
    return decode.run(network, batch=3)


def case(result: dict, side: str) -> dict:
    (found,) = [case for case in result["cases"] if case["side"] == side]
    return found


def test_the_same_method_gives_the_same_tokens(result: dict) -> None:
    for side in ("exact", "prefix", "dual", "dual, threshold"):
        assert case(result, side)["twin_agreement"] == {"tokens": 1.0, "rows": 1.0}, side
    assert case(result, "exact")["agreement"] == {"tokens": 1.0, "rows": 1.0}
    assert case(result, "dual")["agreement"]["tokens"] < 1, "the network is deep enough for stale keys to matter"


@pytest.mark.parametrize("name", ["prefix", "dual"])
@pytest.mark.parametrize("rule", [LowConfidence(), Threshold(threshold=0.5)], ids=["lcr", "threshold"])
def test_the_cached_loop_is_the_sampler_with_one_row(network: MaskedDenoiser, name: str, rule: Rule) -> None:
    """Three blocks, several seeds of prompts; the number of tokens per step is uneven."""
    cache: Cache = PrefixCache() if name == "prefix" else DualCache()
    sampler = MaskedSampler(steps=15, block_length=8, rule=rule, cache=cache)
    for seed in range(4):
        prompt = decode.workload(network, 1, seed).prompts[0][:20]
        found = plain_cached_decode(
            network, prompt, 24, block_length=8, steps=15, cache=name,  # type: ignore[arg-type]
            threshold=rule.threshold if isinstance(rule, Threshold) else None,
        )  # fmt: skip
        want = sampler.sample(network, Canvas.of([prompt], 24, network.spec), [0]).response_ids[0]
        assert torch.equal(found, want)


def test_counts_are_those_of_the_schedule(result: dict, network: MaskedDenoiser) -> None:
    """Two blocks of 8 in 4 steps each; the head of ours sees the holes of the block alone: 8 + 6 + 4 + 2."""
    prompts, widest = result["setting"]["prompt_lengths"], max(result["setting"]["prompt_lengths"]) + 16
    reference, dual = case(result, "reference"), case(result, "reference dual")
    assert reference["forwards"] == dual["forwards"] == case(result, "exact")["forwards"] == 3 * 8
    assert reference["columns"] == reference["logits"] == 8 * (sum(prompts) + 3 * 16)
    assert dual["columns"] == dual["logits"] == 2 * (sum(prompts) + 3 * 16) + 3 * 2 * 3 * 8
    assert case(result, "exact")["columns"] == 8 * 3 * widest
    assert case(result, "dual")["columns"] == 2 * 3 * widest + 3 * 2 * 3 * 8
    assert case(result, "prefix")["columns"] == 2 * 3 * widest + 3 * 3 * (16 + 8)
    assert {case(result, side)["logits"] for side in ("exact", "prefix", "dual")} == {3 * 2 * 20}
    assert case(result, "threshold")["forwards"] <= 3 * 16


def test_verdicts_follow_the_demands(result: dict) -> None:
    exact, dual = case(result, "exact"), case(result, "dual")
    assert (exact["demand"], dual["demand"]) == (3.0, 8.0)
    assert exact["holds"] == (exact["ratio"] >= 3) and dual["holds"] == (dual["ratio"] >= 8)
    assert result["holds"] == (exact["holds"] and dual["holds"])
    assert result["ratios"]["reference"] == 1.0
    assert all(found["peak_bytes"] > 0 and found["ratio_min"] <= found["ratio"] for found in result["cases"])


def test_other_outputs_fail_whatever_the_speed(network: MaskedDenoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(right: decode.Decode) -> Callable[[MaskedDenoiser, Workload], list[torch.Tensor]]:
        return lambda *given: [row.flip(0) for row in right(*given)]

    exact = decode.SIDES["exact"]
    sides = {"reference": decode.SIDES["reference"], "exact": replace(exact, decode=flipped(exact.decode), demand=0.0)}
    monkeypatch.setattr(decode, "SIDES", sides)
    found = decode.run(network, batch=2)
    assert not case(found, "exact")["holds"] and not found["holds"]


def test_an_exact_cache_has_to_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention block by block: the prefix is exact, and its verdict depends on it."""
    net = load_denoiser(published.write(tmp_path / "llada2", "llada2"))
    sides = {name: replace(decode.SIDES[name], twin=None, demand=None) for name in ("reference", "prefix", "dual")}
    monkeypatch.setattr(decode, "SIDES", sides)
    found = decode.run(net, batch=2)
    assert [case["exact"] for case in found["cases"]] == [False, True, False]
    assert case(found, "prefix")["agreement"] == {"tokens": 1.0, "rows": 1.0} and found["holds"]
    right = sides["prefix"].decode
    wrong = replace(sides["prefix"], decode=lambda *given: [row.flip(0) for row in right(*given)])
    monkeypatch.setitem(decode.SIDES, "prefix", wrong)
    assert not decode.run(net, batch=2)["holds"]


def test_the_result_is_plain_json_and_prints(result: dict) -> None:
    assert json.loads(json.dumps(result)) == result
    written = io.StringIO()
    Console(file=written, width=200).print(decode.render(result))
    assert "dual, threshold" in written.getvalue() and ">= 8" in written.getvalue()


@pytest.mark.parametrize("context", [24, 40, 127, 128, 1024])
def test_the_workload_fits_short_canvases(context: int) -> None:
    net = decode._network(replace(SHAPE, context_length=context), 60, 0, torch.device("cpu"), torch.float32)
    work = decode.workload(net, 8, 0)
    assert max(map(len, work.prompts)) + work.lengths[0] <= context and min(map(len, work.prompts)) >= 1
    assert work == decode.workload(net, 8, 0) != decode.workload(net, 8, 1)
    assert (max(map(len, work.prompts)) <= 256, work.block_length) == (True, 8 if context < 128 else 32)


def test_the_command_runs_and_says_what_was_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decode.SIZES, "small", SHAPE)
    status = main(["bench", "decode", "--vocabulary", "40", "--batch", "2", "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["setting"]["vocabulary"] == 40 and len(result["setting"]["prompt_lengths"]) == 2
    assert status == int(not result["holds"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout", "--batch", "2"], "--batch: not an option of the bench 'rollout'"),
        (["decode", "--repeats", "0"], "--repeats: should be at least 1, got 0"),
        (["decode", "--size", "7b"], "size: '7b' is not known"),
        (["decode", "--device", "tpu"], "--device: 'tpu' is not there (allowed: cpu"),
        (
            ["decode", "--model", "sudoku-base", "--size", "8b"],
            "--size: of the random network; leave it or --model out",
        ),
        (["decode", "--model", "sudoku-sedd"], "model: ScoreDenoiser keeps no keys and values"),
        (["decode", "--vocabulary", "5"], "vocabulary: should be at least 16, got 5"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="Pooled keeps no keys"):
        decode.run(tiny.Pooled())
