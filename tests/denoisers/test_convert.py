"""Autoregressive models made masked ones: exact at both ends of the annealing, mask tokens, files, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import published
from unveil.denoisers.convert import NEW_MASK, Conversion, convert
from unveil.denoisers.decoders import DecoderDenoiser
from unveil.denoisers.kept import KeyValues
from unveil.denoisers.load import load_denoiser
from unveil.registry import UserError
from unveil.training.lora import Adapter, LoraSettings

RESERVED = "<|reserved|>"
WINDOW = 4
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"tie_word_embeddings": True}, "gemma": {}, "smollm3": {}, "olmo2": {},
    "phi3": {"sliding_window": None}, "gpt2": GPT2, "gpt_neox": {}, "starcoder2": {"sliding_window": None},
    "mistral": {"sliding_window": WINDOW}, "gemma3_text": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3},
}  # fmt: skip
SINGLE = ("llama", "qwen3", "gemma2", "gpt2")
"""Architectures for what does not depend much on the architecture."""


def autoregressive(folder: Path, architecture: str, *, full: bool = False, **changes: Any) -> Path:
    """A toy model of the library with a tokenizer that has no mask; ids 53 to 59 and 61 on are no tokens, unless
    ``full`` gives a name to those below 61."""
    settings = {**SHAPE, **ARCHITECTURES.get(architecture, {}), **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(architecture, **settings)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path = folder / "tokenizer.json"
    published.tokenizer().save(str(path))
    path.write_text(path.read_text().replace(published.MASK, RESERVED))
    if full:
        named = json.loads(path.read_text())
        named["model"]["vocab"] |= {f"filler{index}": index for index in range(53, 60)}
        path.write_text(json.dumps(named))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": published.START, "eos_token": published.END,
        "pad_token": published.END, "chat_template": published.CHAT,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("autoregressive")

    def folder(architecture: str) -> Path:
        path = root / architecture
        return path if path.is_dir() else autoregressive(path, architecture)

    return folder


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 53, (1, length), generator=torch.Generator().manual_seed(seed))


def closed(length: int) -> Tensor:
    return torch.zeros(length, length, dtype=torch.bool)


def library(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_same(found: Tensor, want: Tensor) -> None:
    """Where both can produce a token at all."""
    found = found[..., : want.shape[-1]]
    kept = ~torch.isneginf(found)
    assert kept.float().mean() > 0.7 and want.std() > 0.1
    torch.testing.assert_close(found[kept], want[kept], atol=1e-5, rtol=1e-5)


# ---- both ends of the annealing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_closed_attention_is_the_autoregressive_model(folders: Any, architecture: str) -> None:
    """With the shift kept, logits at position i are its prediction of token i from the tokens before."""
    folder, ids = folders(architecture), tokens(12)
    theirs = library(folder)(ids).logits
    kept, moved = (convert(folder, Conversion(shift=shift)) for shift in (True, False))
    assert (kept.spec.logit_shift, moved.spec.logit_shift) == (1, 0)
    with kept.opening(closed(12)), moved.opening(closed(12)):
        assert_same(kept(ids)[:, 1:], theirs[:, :-1])
        assert_same(moved(ids), theirs)
    assert (kept(ids)[:, 1:-1] - moved(ids)[:, :-2]).nan_to_num(0).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_open_attention_sees_the_future_and_what_is_saved_does_too(
    folders: Any, tmp_path: Path, architecture: str
) -> None:
    denoiser = convert(folders(architecture), Conversion(shift=False))
    ids = tokens(12)
    before = denoiser(ids)
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = 5 + (ids[0, place] - 4) % 48
        moved = (denoiser.features(changed, changed > 0) - denoiser.features(ids, ids > 0)).abs().amax(-1)[0]
        reach = moved > 1e-6
        near = (torch.arange(12) - place).abs() <= WINDOW
        assert reach[near].all(), f"{place} does not reach {(~reach[near]).nonzero().flatten().tolist()}"
    if not ARCHITECTURES[architecture].get("sliding_window"):
        with denoiser.opening(~closed(12)):
            torch.testing.assert_close(denoiser(ids), before, atol=1e-5, rtol=1e-5)
    denoiser.save_pretrained(tmp_path / "saved")
    again = load_denoiser(tmp_path / "saved")
    assert isinstance(again, DecoderDenoiser) and again.spec == denoiser.spec
    assert torch.equal(again(ids), before)
    assert_same(before, library(tmp_path / "saved")(ids).logits)  # the library itself opens it, attention open


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_padded_batch_equals_single_calls(folders: Any, architecture: str, share: float) -> None:
    denoiser, width = convert(folders(architecture), Conversion()), 12
    opened = torch.rand(width, width, generator=torch.Generator().manual_seed(3)) < share
    ids = torch.full((3, width), denoiser.spec.pad_id)
    valid = torch.zeros(3, width, dtype=torch.bool)
    places = [slice(0, 12), slice(5, 12), slice(2, 9)]
    for row, place in enumerate(places):
        ids[row, place], valid[row, place] = tokens(place.stop - place.start, row), True
    with denoiser.opening(opened):
        batched = denoiser(ids, valid)
    for row, place in enumerate(places):
        with denoiser.opening(opened[place, place]):
            single = denoiser(ids[row : row + 1, place])
        torch.testing.assert_close(batched[row, place], single[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "cohere"])
@torch.no_grad()
def test_kept_keys_give_the_same_features(folders: Any, architecture: str, shift: bool) -> None:
    denoiser = convert(folders(architecture), Conversion(shift=shift))
    ids, valid = tokens(10).repeat(2, 1), torch.ones(2, 10, dtype=torch.bool)
    valid[1, :3] = False
    kept, columns = KeyValues(), torch.tensor([[5, 6, 7], [6, 7, 8]])
    full = denoiser.features(ids, valid)
    torch.testing.assert_close(denoiser.window(ids, valid, kept)[valid], full[valid], atol=1e-5, rtol=0)
    part = denoiser.window(ids, valid, kept, columns)
    want = full.gather(1, columns[..., None].expand(-1, -1, full.shape[-1]))
    torch.testing.assert_close(part, want, atol=1e-5, rtol=0)


def test_layers_that_look_back_only_so_far_keep_no_keys(folders: Any) -> None:
    kept = {name: convert(folders(name), Conversion()).spec.keeps_keys for name in ("llama", "mistral", "gemma2")}
    assert kept == {"llama": True, "mistral": False, "gemma2": False}


@torch.no_grad()
def test_partly_open_attention_sees_what_is_open(folders: Any) -> None:
    """One layer, so that nothing comes by way of a third position."""
    folder = autoregressive(folders("llama").parent / "one-layer", "llama", num_hidden_layers=1)
    denoiser = convert(folder, Conversion(shift=False))
    opened = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    ids, valid = tokens(8), torch.ones(1, 8, dtype=torch.bool)
    with denoiser.opening(opened):
        before = denoiser.features(ids, valid)
        for key in range(8):
            changed = ids.clone()
            changed[0, key] = 5 + (ids[0, key] - 4) % 48
            moved = (denoiser.features(changed, valid) - before).abs().amax(-1)[0] > 1e-7
            want = opened[:, key] | (torch.arange(8) >= key)
            assert torch.equal(moved, want), key
    assert torch.equal(denoiser.features(ids, valid), denoiser.features(ids, valid))
    assert not torch.equal(denoiser.features(ids, valid), before)  # the context is over


def test_share_of_the_future() -> None:
    assert [Conversion(anneal=4).share(update) for update in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert Conversion().share(0) == 1


# ---- mask tokens


@pytest.mark.parametrize("architecture", SINGLE)
def test_a_new_mask_is_the_mean_of_all_tokens_and_never_produced(folders: Any, architecture: str) -> None:
    denoiser = convert(folders(architecture), Conversion())
    spec, before = denoiser.spec, library(folders(architecture)).get_input_embeddings().weight
    assert spec.vocab_size == 64 and spec.mask_id in range(53, 64)  # a row that no token has
    used = [*range(53), 60]
    rows = denoiser.network.get_input_embeddings().weight
    torch.testing.assert_close(rows[spec.mask_id], before[used].mean(0), atol=1e-6, rtol=0)
    assert torch.equal(rows[used], before[used])
    assert torch.isneginf(denoiser(tokens(4))[..., [spec.mask_id, 0, 53]]).all()
    assert spec.mask_id not in denoiser.encode_prompt(f"a {NEW_MASK} b")
    assert NEW_MASK in denoiser.tokenizer.decode(denoiser.encode_prompt(f"a {NEW_MASK} b"))


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows_where_no_row_is_free(tmp_path: Path, tied: bool) -> None:
    folder = autoregressive(tmp_path / "tight", "llama", full=True, vocab_size=61, tie_word_embeddings=tied)
    before = torch.random.get_rng_state()
    denoiser = convert(folder, Conversion())
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is drawn
    assert (denoiser.spec.mask_id, denoiser.spec.vocab_size) == (61, 62)
    denoiser.save_pretrained(tmp_path / "saved")
    opened, again = library(tmp_path / "saved"), load_denoiser(tmp_path / "saved")
    assert opened.config.vocab_size == 62 and again.spec == denoiser.spec
    assert_same(again(tokens(6))[:, 1:], opened(tokens(6)).logits[:, :-1])
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (text.mask_token, text.mask_token_id) == (NEW_MASK, 61)
    assert text.chat_template == published.CHAT


def test_a_reserved_token_can_be_the_mask(folders: Any, tmp_path: Path) -> None:
    denoiser = convert(folders("llama"), Conversion(mask=RESERVED))
    assert denoiser.spec.mask_id == 60
    rows, before = (net.get_input_embeddings().weight for net in (denoiser.network, library(folders("llama"))))
    torch.testing.assert_close(rows[60], before[:53].mean(0), atol=1e-6, rtol=0)
    denoiser.save_pretrained(tmp_path / "saved")
    assert load_denoiser(tmp_path / "saved").spec.mask_id == 60


def test_a_mask_that_there_is_keeps_its_embedding(folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "masked"))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(RESERVED, published.MASK))
    denoiser = convert(folder, Conversion())
    assert denoiser.spec.mask_id == 60
    rows, before = (net.get_input_embeddings().weight for net in (denoiser.network, library(folder)))
    assert torch.equal(rows, before)


def test_old_files_of_gpt2_are_read(folders: Any, tmp_path: Path) -> None:
    """Names without the network's prefix, and the triangle that was once stored as a buffer."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders("gpt2"), tmp_path / "gpt2"))
    weights = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    denoiser, ids = convert(folder, Conversion()), tokens(6)
    assert torch.equal(denoiser(ids), convert(folders("gpt2"), Conversion())(ids))
    denoiser.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_denoiser(tmp_path / "saved")(ids), denoiser(ids))


# ---- training


def gradient(denoiser: DecoderDenoiser) -> dict[str, Tensor]:
    denoiser.train()
    denoiser(torch.tensor([[5, denoiser.spec.mask_id, 7, 9]])).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", SINGLE)
def test_checkpointed_gradients_are_the_same(folders: Any, architecture: str) -> None:
    plain, saving = (convert(folders(architecture), Conversion(), gradient_checkpointing=on) for on in (False, True))
    want, found = gradient(plain), gradient(saving)
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


@pytest.mark.parametrize("architecture", SINGLE)
@torch.no_grad()
def test_merged_adapters_are_the_adapted_model(folders: Any, tmp_path: Path, architecture: str) -> None:
    denoiser, ids = convert(folders(architecture), Conversion()), tokens(6)
    base = denoiser(ids)
    adapter = Adapter(denoiser, LoraSettings(rank=2, alpha=4))
    for parameter in (p for p in denoiser.parameters() if p.requires_grad):
        parameter.add_(0.05)
    moved = denoiser(ids)
    with adapter.off():
        assert torch.equal(denoiser(ids), base)
    assert (moved - base).nan_to_num(0).abs().max() > 1e-3
    adapter.merge().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_denoiser(tmp_path / "merged")(ids), moved, atol=1e-5, rtol=1e-5)


# ---- what is refused


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "mask", "message"),
    [
        (edit(model_type="t5", is_encoder_decoder=True), None, r"model_type 't5': has an encoder, only decoders"),
        (edit(model_type="bert"), None, r"model_type 'bert': no autoregressive model"),
        (edit(model_type="lama"), None, r"model_type 'lama': no autoregressive model.*did you mean 'llama'\?"),
        (edit(text_config={}), None, r"takes more than text"),
        (edit(is_causal=False), None, r"a masked model already, nothing to convert"),
        (edit(model_type="a2d-llama"), None, r"a masked model already, nothing to convert"),
        (nothing, "<|reservd|>", r"model\.convert\.mask: no token is called '<\|reservd\|>', did you mean"),
        (nothing, "a", r"model\.convert\.mask: 'a' is a word of the vocabulary \(allowed: .*<\|reserved\|>"),
        (nothing, published.END, r"model\.convert\.mask: '<\|endoftext\|>' has another use"),
        (edit(num_hidden_layers=3), None, r"the weights lack what the model of"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(
    folders: Any, tmp_path: Path, change: Callable[[Path], None], mask: str | None, message: str
) -> None:
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "copy"))
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        convert(folder, Conversion(mask=mask))
    assert "\n" not in str(caught.value)


def test_a_token_of_the_chat_template_is_no_mask(folders: Any) -> None:
    with pytest.raises(UserError, match=r"a part of the model's prompts"):
        convert(folders("llama"), Conversion(mask=published.HEADER), chat=True)


def test_attention_that_stays_causal_is_noticed(tmp_path: Path) -> None:
    """Two architectures of the library do not heed the flag; should they learn to, others take their place here."""
    folder = autoregressive(tmp_path / "stablelm", "stablelm")
    with pytest.raises(UserError, match=r"'stablelm': cannot be converted: its attention stays causal"):
        convert(folder, Conversion())


def test_an_autoregressive_model_is_no_denoiser_yet(folders: Any) -> None:
    with pytest.raises(UserError, match=r"'llama': an autoregressive model \(`unveil pretrain convert`"):
        load_denoiser(folders("llama"))


def test_a_wrong_shift_is_refused(folders: Any, tmp_path: Path) -> None:
    convert(folders("llama"), Conversion()).save_pretrained(tmp_path / "saved")
    edit(logit_shift=2)(tmp_path / "saved")
    with pytest.raises(UserError, match=r"logit_shift: should be 0 or 1, got 2"):
        load_denoiser(tmp_path / "saved")
