"""Opening a denoiser by folder, by run, or by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unveil.denoisers.load import embedded_models, load_denoiser, model_folder
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.registry import UserError


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, context_length=8)
    denoiser = TransformerDenoiser(config, TextTokenizer.of_words(["a", "b"]))
    denoiser.initialise(torch.Generator().manual_seed(0))
    denoiser.save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_a_folder_and_a_run_open_the_same_model_for_evaluation(run_folder: Path) -> None:
    ids = torch.tensor([[4, 0]])
    direct, by_run = load_denoiser(run_folder / "model"), load_denoiser(str(run_folder))
    assert torch.equal(direct(ids), by_run(ids))
    assert not direct.training


def test_embedded_models_are_found_by_name() -> None:
    for name in embedded_models():
        assert (model_folder(name) / "config.json").is_file()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="model 'no-such-model': no such folder or embedded model"):
        load_denoiser("no-such-model")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("model_type", ["lama", None])
def test_another_model_type_is_refused(run_folder: Path, model_type: str | None) -> None:
    path = run_folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
    with pytest.raises(UserError, match=rf"config\.json: model_type {model_type!r} cannot be opened"):
        load_denoiser(run_folder)
