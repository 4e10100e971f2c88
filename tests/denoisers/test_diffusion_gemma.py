"""DiffusionGemma at toy size: the adapter against the class of the library, decoding against its generate()."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, LogitsProcessor
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

import published
from unveil.cli.main import main
from unveil.denoisers.diffusion_gemma import DiffusionGemmaDenoiser
from unveil.denoisers.load import load_denoiser
from unveil.processes.masked import sample_categorical
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.reverse import ReverseSampler
from unveil.samplers.uniform import Ancestral, EntropyBound
from unveil.seeds import generator

CANVAS = 8
PROMPT = [0, 5, 9, 30, 12, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.write_diffusion_gemma(tmp_path_factory.mktemp("gemma") / "model", canvas_length=CANVAS)


@pytest.fixture(scope="module")
def ours(folder: Path) -> DiffusionGemmaDenoiser:
    denoiser = load_denoiser(folder)
    assert isinstance(denoiser, DiffusionGemmaDenoiser)
    return denoiser


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()


def everything(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def canvases(rows: int = 1) -> Tensor:
    return torch.randint(64, (rows, CANVAS), generator=generator("canvas"))


@torch.no_grad()
def test_logits_are_those_of_the_library(ours: DiffusionGemmaDenoiser, theirs: Any) -> None:
    ids, canvas = torch.tensor([PROMPT]), canvases()
    believed = torch.randn(1, CANVAS, 64, generator=generator("believed"))
    allowed = ours.forbidden_bias == 0
    assert int((~allowed).sum()) == 11 and not allowed[[0, 53, 61, 62, 63]].any() and allowed[2]
    for signal in (None, believed):
        expected = theirs(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=signal).logits
        prefix = ours.read(ids, everything(ids))
        found = ours.denoise(canvas, everything(canvas), prefix, torch.ones(1), signal)
        assert (found - expected)[..., allowed].abs().max() < 1e-5
        assert (found[..., ~allowed] == -torch.inf).all()
    assert not torch.equal(found, ours.denoise(canvas, everything(canvas), prefix, torch.ones(1), None))


@torch.no_grad()
def test_blocks_are_read_into_the_cache(ours: DiffusionGemmaDenoiser) -> None:
    """Prompt and block one after the other are one long prompt, also beyond the sliding window."""
    ids, canvas = torch.tensor([PROMPT * 3 + list(range(5, 21))]), canvases()
    whole = ours.denoise(canvas, everything(canvas), ours.read(ids, everything(ids)), torch.ones(1), None)
    prefix = ours.read(ids[:, :18], everything(ids[:, :18]))
    for start in (18, 26):
        prefix = ours.read(ids[:, start : start + 8], everything(ids[:, :8]), prefix)
    parts = ours.denoise(canvas, everything(canvas), prefix, torch.ones(1), None)
    assert torch.allclose(whole, parts, atol=1e-5)


@torch.no_grad()
def test_a_padded_batch_equals_single_calls(ours: DiffusionGemmaDenoiser) -> None:
    rows = [PROMPT, PROMPT * 4, [0]]
    width, canvas = max(map(len, rows)), canvases(3)
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    batch = ours.denoise(canvas, everything(canvas), ours.read(ids, valid), torch.ones(3), None)
    for place, row in enumerate(rows):
        own, part = torch.tensor([row]), canvas[place : place + 1]
        single = ours.denoise(part, everything(part), ours.read(own, everything(own)), torch.ones(1), None)
        assert torch.allclose(batch[place], single[0], atol=1e-5)


@torch.no_grad()
def test_the_canvas_sees_itself_in_both_directions_and_the_prompt_only_what_is_before(
    ours: DiffusionGemmaDenoiser,
) -> None:
    ids, canvas = torch.tensor([PROMPT]), canvases()
    base = ours.denoise(canvas, everything(canvas), ours.read(ids, everything(ids)), torch.ones(1), None)
    other = canvas.clone()
    other[0, -1] = (other[0, -1] + 1) % 64
    moved = ours.denoise(other, everything(canvas), ours.read(ids, everything(ids)), torch.ones(1), None)
    assert ((base - moved)[0, :, 10].abs() > 1e-7).all()


class Forbid(LogitsProcessor):
    """What our head never says."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Any = None) -> Tensor:
        return scores + self.bias


@pytest.mark.parametrize(("stop", "bound"), [(0.0, 0.1), (1.0, 0.1), (1.0, 4.0)])
def test_decoding_is_that_of_generate_on_the_same_noise(
    ours: DiffusionGemmaDenoiser, theirs: Any, monkeypatch: pytest.MonkeyPatch, stop: float, bound: float
) -> None:
    """Three canvases; where ``stop`` is not 0 they end early, at different steps."""
    steps, seed, blocks = 12, 5, 3
    process = ours.spec.uniform
    noise, draws = [], []
    for block in range(blocks):
        table = torch.rand(2 * steps + 1, CANVAS, dtype=torch.float64, generator=generator(seed, "canvas", block))
        noise.append([process.noise(table[place]) for place in (0, *range(2, 2 * steps + 1, 2))])
        draws.append([table[place] for place in range(1, 2 * steps + 1, 2)])
    now = {"block": -1, "step": 0}

    def fill(self: Any, batch_size: int, device: Any) -> Tensor:
        if now["step"] == 0 or fill.fresh:  # type: ignore[attr-defined]
            now["block"], now["step"], fill.fresh = now["block"] + 1, 0, False  # type: ignore[attr-defined]
        return noise[now["block"]][now["step"]][None]

    def draw(probs: Tensor, num_samples: int) -> Tensor:
        found = sample_categorical(probs.log(), draws[now["block"]][now["step"]])
        now["step"] += 1
        return found[:, None]

    fill.fresh = False  # type: ignore[attr-defined]
    finalize = theirs._finalize_canvas

    def done(*args: Any, **kwargs: Any) -> Any:
        fill.fresh = True  # type: ignore[attr-defined]
        return finalize(*args, **kwargs)

    monkeypatch.setattr(generation.EntropyBoundSampler, "initialize_canvas", fill)
    monkeypatch.setattr(torch, "multinomial", draw)
    monkeypatch.setattr(theirs, "_finalize_canvas", done)
    config = generation.DiffusionGemmaGenerationConfig(
        max_new_tokens=blocks * CANVAS, max_denoising_steps=steps, t_min=0.4, t_max=0.8, stability_threshold=1,
        sampler_config=generation.EntropyBoundSamplerConfig(entropy_bound=bound), confidence_threshold=stop or 1e-9,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    expected = theirs.generate(
        torch.tensor([PROMPT]), generation_config=config,
        logits_processor=transformers.LogitsProcessorList([Forbid(ours.forbidden_bias)]),
    )  # fmt: skip
    monkeypatch.undo()
    sampler = EntropyBound(steps=steps, bound=bound, certain=stop)
    canvas = Canvas.of([PROMPT], blocks * CANVAS, ours.spec)
    found = sampler.sample(ours, canvas, [seed], needs={"revealed"})
    answer = expected.sequences[0, len(PROMPT) :].tolist()
    said = found.response_ids[0].tolist()
    end = said.index(2) + 1 if 2 in said else len(said)
    assert said[:end] == answer[:end] and set(said[end:] + answer[end:]) <= {2, *said[: -(-end // CANVAS) * CANVAS]}
    taken = int(found.active.sum())
    assert taken < steps * blocks if stop else taken == steps * blocks
    tokens_per_forward = sum(token != 2 for token in answer) / taken
    assert expected.tokens_per_forward.item() == pytest.approx(tokens_per_forward, abs=1e-6)
    assert found.revealed is not None and 0 < found.revealed.float().mean() < 1


@pytest.mark.parametrize("sampler", [EntropyBound(steps=5, certain=2.0), Ancestral(steps=4)], ids=lambda s: s.name)
def test_rows_do_not_depend_on_their_batch(ours: DiffusionGemmaDenoiser, sampler: Any) -> None:
    prompts, lengths, seeds = [PROMPT, PROMPT * 4, [0]], [16, 8, 24], [3, 4, 5]
    needs = {"states", "guesses", "revealed", "taken_back", "confidence"}
    batch = sampler.sample(ours, Canvas.of(prompts, lengths, ours.spec), seeds, needs=needs)
    assert not torch.isin(batch.response_ids[batch.response_valid], torch.tensor(ours.spec.forbidden_ids)).any()
    assert bool((batch.active.long().diff(dim=1) <= 0).all()), "a row's own steps stand together"
    forwards = 0
    for row, (prompt, length, seed) in enumerate(zip(prompts, lengths, seeds, strict=True)):
        single = sampler.sample(ours, Canvas.of([prompt], length, ours.spec), [seed], needs=needs)
        assert torch.equal(single.response_ids[0], batch.response_ids[row, :length])
        assert int(single.active.sum()) == int(batch.active[row].sum())
        assert torch.equal(single.states[0], batch.states[row, : single.steps, :length])
        forwards += single.forwards
    assert batch.forwards == forwards


def test_what_cannot_be_is_refused_in_one_line(ours: DiffusionGemmaDenoiser, folder: Path, tmp_path: Path) -> None:
    canvas = Canvas.of([PROMPT], CANVAS, ours.spec)
    for sampler in (MaskedSampler(steps=2), ReverseSampler(steps=2)):
        with pytest.raises(UserError, match=r"fills masks, the model's noise is random tokens \(allowed: entropy_b"):
            sampler.sample(ours, canvas, [0])
    with pytest.raises(UserError, match=r"multiple of the model's canvas_length \(8\), got 12"):
        EntropyBound().sample(ours, Canvas.of([PROMPT], 12, ours.spec), [0])
    with pytest.raises(UserError, match="prompt: is empty"):
        EntropyBound().sample(ours, Canvas.of([PROMPT, []], CANVAS, ours.spec), [0, 1])
    with pytest.raises(UserError, match="'entropy_bound' is for networks of uniform noise"):
        EntropyBound().sample(load_denoiser("countdown-base"), canvas, [0])
    with pytest.raises(UserError, match="reads a canvas behind a cache"):
        ours.features(canvas.ids, canvas.valid)


def test_it_is_saved_in_the_format_that_it_came_in(ours: DiffusionGemmaDenoiser, theirs: Any, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path / "copy")
    again = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "copy")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("more", [[], ["--rule", "ancestral", "--steps", "4"], ["--rule", "entropy_bound:bound=2.0"]])
def test_decode_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, more: list[str]) -> None:
    path = tmp_path / "steps.safetensors"
    words = ["decode", str(folder), "--prompt", "ab <|endoftext|>", "--samples", "2", "--length", "24", *more]
    words += ["--trajectory", str(path)]
    assert main([*words, "--json", "--show"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["length"] == 24 and len(result["completions"]) == 2 and path.is_file()
    assert all(0 < completion["steps"] <= 3 * 48 and completion["holes"] == 0 for completion in result["completions"])
    for wrong, message in (
        (["--length", "9"], "--length: should be a multiple of the model's canvas_length (8), got 9"),
        (["--rule", "lcr"], "'masked' fills masks"),
        (["--block", "4"], "--block: unknown key"),
    ):
        assert main([*words, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
