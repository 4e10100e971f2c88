"""The time-conditioned score network: scale, time input, padding, files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unveil.denoisers.load import load_denoiser
from unveil.denoisers.score import ScoreConfig, ScoreDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.processes.score_entropy import ScoreEntropyProcess
from unveil.registry import UserError

CONFIG = ScoreConfig(dim=16, layers=2, heads=2, hidden=24, context_length=20, noise_eps=0.01)


def network(scale: float = 12.0) -> ScoreDenoiser:
    denoiser = ScoreDenoiser(CONFIG, TextTokenizer.of_words([f"w{index}" for index in range(12)]))
    denoiser.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return denoiser.eval()


@pytest.fixture(scope="module")
def denoiser() -> ScoreDenoiser:
    return network()


def tokens(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randint(4, 16, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_network_of_zeros_has_the_right_sum_of_scores_at_every_time() -> None:
    flat, t = network(scale=0.0), torch.tensor([1e-4, 0.3, 1.0], dtype=torch.float64)
    log_score = flat(tokens((3, 5)), t=t)
    shown = 1 - (1 - CONFIG.noise_eps) * t
    expected = (shown / (1 - shown)).log().float()[:, None].expand(3, 5)
    torch.testing.assert_close(log_score.logsumexp(-1), expected, rtol=1e-5, atol=1e-5)
    assert (log_score[..., list(flat.spec.forbidden_ids)] == -math.inf).all()


@torch.no_grad()
def test_the_raw_output_is_scaled_by_r_and_the_number_of_tokens(denoiser: ScoreDenoiser) -> None:
    ids, t = tokens((2, 6)), torch.tensor([0.2, 0.9])
    valid = torch.ones_like(ids, dtype=torch.bool)
    features = denoiser.features(ids, valid, t)
    raw = denoiser.unembedding(features[..., :-1])[..., 5]
    process = denoiser.spec.process()
    assert isinstance(process, ScoreEntropyProcess)
    scale = process.score_scale(t).float()[:, None] - math.log(denoiser.spec.vocab_size - 3)
    torch.testing.assert_close(denoiser(ids, t=t)[..., 5], raw + scale, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_time_changes_the_answer_beyond_its_scale_and_smoothly(denoiser: ScoreDenoiser) -> None:
    ids = tokens((1, 6))

    def distribution(t: float) -> Tensor:
        return denoiser(ids, t=torch.tensor([t])).softmax(-1)

    assert (distribution(0.2) - distribution(0.9)).abs().max() > 0.02
    assert (distribution(0.5) - distribution(0.50001)).abs().max() < 0.01
    with pytest.raises(UserError, match="conditioned on time"):
        denoiser(ids)


@torch.no_grad()
def test_padded_batch_equals_single_calls(denoiser: ScoreDenoiser) -> None:
    width, lengths = 12, [12, 3, 7]
    ids = torch.full((3, width), denoiser.spec.pad_id)
    valid = torch.zeros(3, width, dtype=torch.bool)
    t = torch.tensor([0.9, 0.1, 0.5])
    rows = [tokens((length,), length) for length in lengths]
    for row, own in enumerate(rows):
        ids[row, width - len(own) :], valid[row, width - len(own) :] = own, True
    batched = denoiser(ids, valid, t)
    for row, own in enumerate(rows):
        single = denoiser(own[None], t=t[row, None])[0]
        torch.testing.assert_close(batched[row][valid[row]], single, atol=1e-5, rtol=1e-5)


def test_every_weight_learns() -> None:
    own = network()
    ids = tokens((4, 8)).index_fill(1, torch.arange(0, 8, 2), own.spec.mask_id)
    t = torch.full((4,), 0.5)
    own(ids, t=t).masked_fill(own.forbidden_bias.isinf(), 0).square().sum().backward()
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_files_restore_the_network_and_refuse_what_does_not_fit(denoiser: ScoreDenoiser, tmp_path: Path) -> None:
    denoiser.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path)
    assert isinstance(loaded, ScoreDenoiser) and loaded.spec == denoiser.spec
    ids, t = tokens((1, 4)), torch.tensor([0.7])
    assert torch.equal(loaded(ids, t=t), denoiser(ids, t=t))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in (({"noise_eps": 1.5}, "less than 1"), ({"noise_eps": "x"}, "number"), ({"x": 1}, "unknown")):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_denoiser(tmp_path)
