"""The embedded transformer: padding, bidirectionality, files and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unveil.denoisers.folder import load_weights
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.registry import UserError

CONFIG = TransformerConfig(dim=16, layers=2, heads=2, hidden=24, context_length=20)


def network(seed: int = 0) -> TransformerDenoiser:
    denoiser = TransformerDenoiser(CONFIG, TextTokenizer.of_words([f"w{index}" for index in range(12)]))
    denoiser.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.mul_(15)
    return denoiser.eval()


@pytest.fixture(scope="module")
def denoiser() -> TransformerDenoiser:
    return network()


@pytest.fixture
def folder(denoiser: TransformerDenoiser, tmp_path: Path) -> Path:
    denoiser.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_batch_equals_single_calls(denoiser: TransformerDenoiser, side: str) -> None:
    stream = torch.Generator().manual_seed(1)
    width, lengths = 14, [14, 1, 9, 5]
    ids = torch.full((len(lengths), width), denoiser.spec.pad_id)
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    rows = []
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        tokens = torch.randint(denoiser.spec.vocab_size, (length,), generator=stream)
        ids[row, start : start + length], valid[row, start : start + length] = tokens, True
        rows.append(tokens)
    batched = denoiser(ids, valid)
    for row, tokens in enumerate(rows):
        single = denoiser(tokens[None])[0]
        torch.testing.assert_close(batched[row][valid[row]], single, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_valid_token_reaches_every_position_and_padding_none(denoiser: TransformerDenoiser) -> None:
    ids = torch.randint(4, 16, (1, 12), generator=torch.Generator().manual_seed(2))
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[0, :3] = valid[0, 10:] = False
    before = denoiser.features(ids, valid)[valid]
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = 4 + (ids[0, place] - 3) % 12
        after = denoiser.features(changed, valid)[valid]
        if valid[0, place]:
            assert (after - before).abs().amax(-1).min() > 1e-4, f"position {place} leaves a position unmoved"
        else:
            assert torch.equal(after, before), f"padding at {place} leaks"


@torch.no_grad()
def test_order_matters(denoiser: TransformerDenoiser) -> None:
    forwards, backwards = torch.tensor([[5, 6, 7]]), torch.tensor([[7, 6, 5]])
    everywhere = torch.ones(1, 3, dtype=torch.bool)
    middle = [denoiser.features(ids, everywhere)[0, 1] for ids in (forwards, backwards)]
    assert (middle[0] - middle[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_row_without_any_valid_token_is_finite(denoiser: TransformerDenoiser) -> None:
    valid = torch.tensor([[True] * 4, [False] * 4])
    assert torch.isfinite(denoiser.features(torch.full((2, 4), 5), valid)).all()


def test_forbidden_ids_have_no_probability(denoiser: TransformerDenoiser) -> None:
    spec = denoiser.spec
    logits = denoiser(torch.tensor([[4, spec.mask_id, 5]]))
    forbidden = torch.zeros(spec.vocab_size, dtype=torch.bool)
    forbidden[list(spec.forbidden_ids)] = True
    assert spec.mask_id in spec.forbidden_ids and spec.pad_id in spec.forbidden_ids
    assert torch.equal(torch.isneginf(logits), forbidden.expand_as(logits))
    logits.logsumexp(-1).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in denoiser.parameters())


def test_a_canvas_longer_than_the_context_is_refused(denoiser: TransformerDenoiser) -> None:
    with pytest.raises(UserError, match="21 tokens, the model's context_length is 20"):
        denoiser(torch.full((1, 21), 5))


def test_initialise_depends_on_the_generator_alone() -> None:
    first, again, other = network(3), network(3), network(4)
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_saved_model_comes_back_exactly(denoiser: TransformerDenoiser, folder: Path) -> None:
    loaded = TransformerDenoiser.from_pretrained(folder)
    assert loaded.config == denoiser.config and loaded.spec == denoiser.spec
    own, found = denoiser.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)
    ids = torch.tensor([[5, 0, 7, 0]])
    assert torch.equal(denoiser(ids), loaded(ids))
    assert loaded.tokenizer.encode("w3 <mask> w11") == denoiser.tokenizer.encode("w3 <mask> w11")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def lose_end_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<end>", "<stop>"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: not valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            r"config\.json: should hold a JSON object, got list",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            r"tokenizer\.json: not a tokenizer file",
        ),
        (edit_config(layer=3), r"config\.json: unknown key 'layer' \(allowed: .*layers.*\)"),
        (edit_config(dim=0), r"config\.json: dim: should be greater than 0"),
        (edit_config(dim="16"), r"config\.json: dim: should be an integer, got '16'"),
        (edit_config(layers=True), r"config\.json: layers: should be an integer, got True"),
        (edit_config(heads=3), r"config\.json: heads: 3 must divide dim=16"),
        (
            edit_config(hidden=25),
            r"another architecture: 'blocks\.0\.down\.weight' is \(16, 24\), the model has \(16, 25\)",
        ),
        (edit_config(layers=3), r"another architecture: it lacks 'blocks\.2\.attention_norm\.weight'"),
        (edit_config(layers=1), r"it has 'blocks\.1\.attention_norm\.weight', the model does not"),
        (truncate, r"model\.safetensors: not a readable safetensors file"),
        (
            edit_weights(lambda state: state.pop("norm.weight")),
            r"another architecture: it lacks 'norm\.weight'",
        ),
        (lose_end_token, r"tokenizer\.json: the vocabulary lacks <end>"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        TransformerDenoiser.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_refused_weights_leave_the_module_as_it_was(denoiser: TransformerDenoiser, folder: Path) -> None:
    edit_weights(lambda state: state.update({"norm.weight": torch.zeros(3)}))(folder)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    with pytest.raises(UserError, match=r"'norm\.weight'"):
        load_weights(denoiser, folder / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
