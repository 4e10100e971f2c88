"""The bench measures what it says; how fast this machine is, is not tested."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from unveil.bench import _memory as memory
from unveil.bench import rollout
from unveil.bench._reference import Workload, plain_decode, random_network
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.registry import UserError


def tiny(context: int = 80) -> TransformerDenoiser:
    config = TransformerConfig(dim=16, layers=1, heads=2, hidden=16, context_length=context)
    denoiser = TransformerDenoiser(config, TextTokenizer.of_words([f"w{index}" for index in range(30)]))
    denoiser.initialise(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return denoiser


@pytest.fixture(scope="module")
def result() -> dict:
    return rollout.run(tiny(), batch_sizes=(1, 3, 8), repeats=1, positions=64)


def test_outputs_are_identical_and_forwards_are_counted(result: dict) -> None:
    single, triple, mixed = result["cases"]
    for case in (single, triple, mixed):
        assert case["identical"] and case["vocabulary"] == 34
        steps = sum(length // 8 * 4 for length in case["response_lengths"])
        assert case["ours"]["sequences"] == case["reference"]["sequences"] == case["reference"]["calls"] == steps
        assert case["ours"]["calls"] == max(case["response_lengths"]) // 8 * 4
        assert case["ratio_min"] <= case["ratio"] <= case["ratio_max"]
        assert case["ours"]["peak_bytes"] > 0 and case["network_ratio"] > 0
    assert len(set(mixed["prompt_lengths"])) > 1 and len(set(mixed["response_lengths"])) > 1


def test_verdicts_follow_the_demands(result: dict) -> None:
    single, triple, mixed = result["cases"]
    assert [case["demand"] for case in (single, triple, mixed)] == [0.95, None, 3.0]
    assert triple["holds"] and single["holds"] == (single["ratio"] >= 0.95) and mixed["holds"] == (mixed["ratio"] >= 3)
    assert result["log_prob_memory"]["demand"] == 0.25
    assert result["holds"] == (single["holds"] and mixed["holds"] and result["log_prob_memory"]["holds"])


def test_the_result_is_plain_json_and_prints(result: dict) -> None:
    assert json.loads(json.dumps(result)) == result
    assert set(result["ratios"]) == {
        *(f"decode_vocabulary_34_batch_{batch}" for batch in (1, 3, 8)), "log_prob_memory"
    }  # fmt: skip
    written = io.StringIO()
    Console(file=written, width=160).print(rollout.render(result))
    assert "34 tokens, batch 8: samples/s" in written.getvalue() and "scoring 64 of 126,464" in written.getvalue()


def test_different_outputs_fail_whatever_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rollout.our_decode
    monkeypatch.setattr(rollout, "our_decode", lambda *given: [row.flip(0) for row in right(*given)])
    monkeypatch.setattr(rollout, "DEMAND_SINGLE", 0.0)
    case = rollout.run(tiny(), batch_sizes=(1,), repeats=1, positions=8)["cases"][0]
    assert not case["identical"] and not case["holds"]


def test_scoring_in_chunks_takes_at_most_a_quarter() -> None:
    assert memory.log_prob_memory(positions=256, width=16)["holds"]


def test_peak_counts_what_lives_at_once() -> None:
    def work() -> None:
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + 1  # old and new live together, never more
        del kept
        torch.zeros(500)

    assert memory.peak_bytes(work, torch.device("cpu")) in (8000, 8004)
    held = torch.zeros(100)
    assert memory.peak_bytes(lambda: held.view(10, 10), torch.device("cpu"), [held]) == 400


def test_plain_decode_draws_at_a_temperature() -> None:
    denoiser = tiny()
    drawn = [
        plain_decode(
            denoiser, [4, 5], 16, block_length=8, steps=8, temperature=1.0, noise=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.isin(drawn[0], torch.tensor(denoiser.spec.forbidden_ids)).any()


def test_the_workload_is_the_same_every_time_and_holds_no_controls() -> None:
    denoiser = random_network(204, 0)
    one, other = Workload.of(denoiser, 8, 0), Workload.of(denoiser, 8, 0)
    assert one == other != Workload.of(denoiser, 8, 1)
    assert min(token for prompt in one.prompts for token in prompt) >= 4
    assert all(length % one.block_length == 0 for length in one.lengths)


@pytest.mark.parametrize("context", [24, 32, 48, 64])
def test_the_workload_fits_short_canvases(context: int) -> None:
    work = Workload.of(tiny(context), 8, 0)
    longest = [len(prompt) + length for prompt, length in zip(work.prompts, work.lengths, strict=True)]
    assert max(longest) <= context and all(length % work.block_length == 0 for length in work.lengths)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repeats": 0}, "repeats: should be at least 1, got 0"),
        ({"batch_sizes": (1, 0)}, "batch: should be at least 1, got 0"),
        ({"positions": -1}, "positions: should be at least 1"),
        ({"model": tiny(23)}, "needs a canvas of 24 tokens, the model has 23"),
    ],
)
def test_bad_settings_are_refused(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rollout.run(**{"model": tiny(), **given})
