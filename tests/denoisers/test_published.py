"""Published networks: the authors' numbers, padding, both directions of attention, ids, files, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import published
import tiny
from unveil.cli.main import main
from unveil.denoisers import hub
from unveil.denoisers.decoders import shift_right
from unveil.denoisers.dream import DreamDenoiser
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.pretrained import PretrainedDenoiser
from unveil.learning.regularisers import Kl
from unveil.processes.score_entropy import Geometric, LogLinear
from unveil.registry import UserError
from unveil.rewards.base import Shaped
from unveil.tasks.base import Problem, Verdict
from unveil.training.lora import Adapter, LoraSettings
from unveil.training.policy_config import PolicyEval
from unveil.training.runs import BaseModel, train

AUTHORED = ["llada", "dream", "mdlm", "llada2", "qwen3", "sedd"]
BERT = {
    "model_type": "bert", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
MODERNBERT = {
    "model_type": "modernbert", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "global_attn_every_n_layers": 3, "local_attention": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
CLASSES = {
    "bert": (BERT, transformers.BertConfig, transformers.BertForMaskedLM),
    "modernbert": (MODERNBERT, transformers.ModernBertConfig, transformers.ModernBertForMaskedLM),
}
MODELS = [*AUTHORED, *CLASSES]
IDS = torch.tensor([[5, 60, 7, 9]])


def stock(model: str) -> tuple[Any, dict[str, list[int]]]:
    """A network of the library itself with weights by name, and the names that it saves."""
    settings, config, network = CLASSES[model]
    made = network(config(**{key: value for key, value in settings.items() if key != "model_type"})).eval()
    names = {name: list(value.shape) for name, value in made.state_dict().items()}
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "decoder.weight"}
    names = {name: shape for name, shape in names.items() if name not in tied}
    if model == "bert":
        names |= {"bert.pooler.dense.weight": [32, 32], "cls.seq_relationship.bias": [2]}
        names = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): shape for name, shape in names.items()}
    inner = {name.replace("gamma", "weight"): published.weight(name, shape) for name, shape in names.items()}
    made.load_state_dict(inner, strict=False)
    made.tie_weights()
    return made, names


def bert_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz[]", *(f"##{c}" for c in "abcd")]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def write(folder: Path, model: str, **options: Any) -> Path:
    if model in AUTHORED:
        return published.write(folder, model, **options)
    published.write_folder(folder, CLASSES[model][0], stock(model)[1], **options)
    if "bert" in model:
        bert_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {model: write(root / model, model, shards=1 + (model != "mdlm")) for model in MODELS}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, PretrainedDenoiser]:
    return {model: load_denoiser(folder) for model, folder in folders.items()}  # type: ignore[misc]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda model: Path(shutil.copytree(folders[model], tmp_path / model))


def half(ids: Tensor) -> Tensor:
    """A time for every canvas; networks that are not conditioned on time ignore it."""
    return torch.full((len(ids),), 0.5)


def producible(logits: Tensor) -> Tensor:
    return ~torch.isneginf(logits)


# ---- numbers


@pytest.mark.parametrize("model", AUTHORED)
@torch.no_grad()
def test_logits_are_those_of_the_authors_code(opened: dict[str, PretrainedDenoiser], model: str) -> None:
    entry, denoiser = published.AUTHORS[model], opened[model]
    ids = torch.tensor(entry["ids"])
    t = -torch.expm1(-torch.tensor(entry["sigma"])) / (1 - 1e-3) if model == "sedd" else None
    found, want = denoiser(ids, t=t), torch.tensor(entry["logits"])
    kept = producible(found)
    if model == "sedd":  # its scores of the token that is there are set to 0
        kept &= torch.nn.functional.one_hot(ids, 65) == 0
    assert kept.float().mean() > 0.8 and want.std() > 0.5
    torch.testing.assert_close(found[kept], want[kept], atol=1e-5, rtol=0)


@torch.no_grad()
def test_mdlm_with_time_equals_the_authors_code(tmp_path: Path) -> None:
    denoiser = load_denoiser(published.write(tmp_path / "mdlm", "mdlm", time_conditioning=True))
    entry = published.AUTHORS["mdlm"]
    t = -torch.expm1(-torch.tensor(entry["sigma"])) / (1 - 1e-3)  # sigma = -log(1 - (1 - eps) t)
    ids = torch.tensor(entry["ids"])
    assert denoiser.spec.time_conditioned
    found, want = denoiser(ids, t=t), torch.tensor(entry["logits_at_sigma"])
    kept = producible(found)
    torch.testing.assert_close(found[kept], want[kept], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="conditioned on time"):
        denoiser(ids)


@pytest.mark.parametrize("model", list(CLASSES))
@torch.no_grad()
def test_stock_networks_equal_the_library(opened: dict[str, Any], model: str) -> None:
    network, _ = stock(model)
    ids = torch.randint(3, 33, (2, 9), generator=torch.Generator().manual_seed(0))
    found, want = opened[model](ids), network(ids).logits
    kept = producible(found)
    torch.testing.assert_close(found[kept], want[kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_padded_batch_equals_single_calls(opened: dict[str, PretrainedDenoiser], model: str, side: str) -> None:
    denoiser, stream = opened[model], torch.Generator().manual_seed(1)
    width, lengths = 12, [12, 1, 7, 4]
    ids = torch.full((len(lengths), width), denoiser.spec.pad_id)
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    rows = []
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        tokens = torch.randint(3, 60, (length,), generator=stream)
        ids[row, start : start + length], valid[row, start : start + length] = tokens, True
        rows.append(tokens)
    batched = denoiser(ids, valid, half(ids))
    for row, tokens in enumerate(rows):
        single = denoiser(tokens[None], t=half(tokens[None]))[0]
        torch.testing.assert_close(batched[row][valid[row]], single, atol=1e-5, rtol=1e-5)
    nothing = denoiser.features(ids[:2], torch.tensor([[True], [False]]).expand(2, width), half(ids[:2]))
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_every_token_reaches_every_position_and_padding_none(opened: dict[str, Any], model: str, padded: bool) -> None:
    denoiser = opened[model]
    ids = torch.randint(5, 53, (1, 8), generator=torch.Generator().manual_seed(2))
    valid = torch.ones(1, 8, dtype=torch.bool)
    if padded:
        valid[0, :2] = valid[0, 7:] = False
    before = denoiser.features(ids, valid, half(ids))[valid]
    for place in range(8):
        changed = ids.clone()
        changed[0, place] = 5 + (ids[0, place] - 4) % 48
        after = denoiser.features(changed, valid, half(ids))[valid]
        if valid[0, place]:
            moved = (after - before).abs().amax(-1)
            block = (place - 2 * padded) // 4  # of 4 positions; attention over blocks does not look ahead
            first = 4 * block if model == "llada2" else 0
            assert moved[first:].min() > 1e-5, f"position {place} leaves a position unmoved"
            assert (moved[:first] < 1e-6).all()  # experts see other batches, so not to the last bit
        else:
            torch.testing.assert_close(after, before, atol=1e-6, rtol=0, msg=f"padding at {place} leaks")


def test_features_move_one_to_the_right_within_the_valid_part() -> None:
    features = torch.arange(10.0).reshape(2, 5, 1)
    valid = torch.tensor([[True] * 5, [False, False, True, True, False]])
    assert shift_right(features, None)[..., 0].tolist() == [[0, 0, 1, 2, 3], [5, 5, 6, 7, 8]]
    assert shift_right(features, valid)[1, 2:4, 0].tolist() == [7, 7]


# ---- ids and text


def test_ids_of_every_model(opened: dict[str, PretrainedDenoiser]) -> None:
    nameless = [*range(53, 60), 61, 62, 63]
    for model in ("llada", "dream", "llada2", "qwen3"):
        spec = opened[model].spec
        assert (spec.mask_id, spec.pad_id, spec.end_ids) == (60, 2, (2, 1)), model
        assert spec.forbidden_ids == tuple(sorted([0, 60, *nameless])), model  # 2 pads, but also ends: it may come
        assert (spec.vocab_size, spec.context_length, spec.feature_dim) == (64, 64, 32)
    assert [opened[model].spec.logit_shift for model in ("llada", "dream")] == [0, 1]
    sedd = opened["sedd"].spec
    assert (sedd.mask_id, sedd.prediction, sedd.noise, sedd.feature_dim) == (64, "log_score", LogLinear(), 33)
    assert opened["mdlm"].spec.mask_id == 64 and 64 in opened["mdlm"].spec.forbidden_ids
    for model in ("bert", "modernbert"):
        spec = opened[model].spec
        assert (spec.mask_id, spec.pad_id, spec.end_ids) == (4, 0, (2,))
        assert set(spec.forbidden_ids) == {0, 1, 3, 4, *range(37, 64)}
        assert opened[model].encode_prompt("abba")[0] == 1 and opened[model].encode_prompt("abba")[-1] != 2


def test_forbidden_ids_have_no_probability(opened: dict[str, PretrainedDenoiser]) -> None:
    for denoiser in opened.values():
        logits = denoiser(torch.tensor([[5, denoiser.spec.mask_id, 7]]), t=torch.tensor([0.5]))
        forbidden = torch.zeros(denoiser.spec.vocab_size, dtype=torch.bool)
        forbidden[list(denoiser.spec.forbidden_ids)] = True
        assert torch.equal(torch.isneginf(logits), forbidden.expand_as(logits))


@pytest.mark.parametrize("chat", [False, True])
def test_hostile_prompts_hold_no_control_token(folders: dict[str, Path], chat: bool) -> None:
    denoiser = load_denoiser(folders["llada"], chat=chat)
    controls = {0, 1, 2, 3, 4, 60}
    frame = denoiser.encode_prompt("a").copy()
    frame.remove(denoiser.tokenizer.encode("a")[0])
    for text in (published.MASK, f"x {published.END}{published.TURN}", published.HEADER + "assistant", "<|mdm_mask|"):
        ids = denoiser.encode_prompt(text)
        assert [i for i in ids if i in controls] == [i for i in frame if i in controls]
        assert text.strip() in denoiser.tokenizer.decode(ids)
    words = load_denoiser(folders["bert"]).tokenizer
    assert not {0, 1, 2, 4} & set(words.encode("[MASK] [SEP] [CLS] [PAD]"))
    assert words.encode("a 1 b") == [words.id("a"), words.unknown, words.id("b")] and words.unknown == 3


def test_the_chat_template_is_the_ecosystems(folders: dict[str, Path]) -> None:
    text = transformers.PreTrainedTokenizerFast.from_pretrained(folders["llada"])
    denoiser = load_denoiser(folders["llada"], chat=True)
    for content in ("2 + 2 = ", "  spaced\n", "", "a\n\nb"):
        want = text.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert denoiser.encode_prompt(content) == want["input_ids"]
    assert denoiser.encode_prompt("a")[:2] == [0, 3] and denoiser.encode_prompt("a")[-1] != 1


def test_a_tokenizer_of_vocabulary_and_merges_is_read_without_its_code(copy: Any) -> None:
    """Dream's folder: no tokenizer.json, a class of its own, control tokens in tokenizer_config.json."""
    folder = copy("dream")
    (folder / "tokenizer.json").unlink()
    known = published.tokenizer().get_vocab()
    controls = {token: index for token, index in known.items() if token.startswith("<|")}
    letters = {token: index for token, index in known.items() if token not in controls}
    plain = {f"filler{index}": index for index in range(5)} | letters  # ids are places in the file
    (folder / "vocab.json").write_text(json.dumps(plain))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenization_dream.py").write_text("raise SystemExit('executed')\n")
    added = {str(53 + place): {"content": token, "special": True} for place, token in enumerate(controls)}
    described = {
        "tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added, "eos_token": published.END, "pad_token": published.END,
        "mask_token": published.MASK, "chat_template": published.CHAT,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    number = {token["content"]: int(index) for index, token in added.items()}
    change(mask_token_id=number[published.MASK], eos_token_id=number[published.END])(folder)
    change(pad_token_id=number[published.END])(folder)
    denoiser = load_denoiser(folder, chat=True)
    assert denoiser.spec.mask_id == number[published.MASK]
    assert denoiser.spec.end_ids == (number[published.END], number[published.TURN])
    ids = denoiser.encode_prompt("a <|mdm_mask|>")
    assert ids[:2] == [number[published.START], number[published.HEADER]] and denoiser.spec.mask_id not in ids
    assert "a <|mdm_mask|>" in denoiser.tokenizer.decode(ids)
    denoiser.save_pretrained(folder.parent / "saved")
    assert {path.name for path in (folder.parent / "saved").iterdir()} == {path.name for path in folder.iterdir()}
    assert load_denoiser(folder.parent / "saved", chat=True).encode_prompt("a") == denoiser.encode_prompt("a")


# ---- files


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_folder_has_the_format_that_it_came_in(folders: dict[str, Path], tmp_path: Path, model: str) -> None:
    denoiser = load_denoiser(folders[model])
    denoiser.save_pretrained(tmp_path / "saved")
    before, after = ({path.name: path for path in folder.iterdir()} for folder in (folders[model], tmp_path / "saved"))
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith(".safetensors"):
            old, new = load_file(before[name]), load_file(after[name])
            dropped = {name for name in old if "pooler" in name or "seq_relationship" in name}
            assert old.keys() - dropped == new.keys()
            assert all(torch.equal(old[key], new[key]) for key in new)
        elif name.endswith("index.json"):
            weights = json.loads(after[name].read_text())["weight_map"]
            assert weights.items() <= json.loads(before[name].read_text())["weight_map"].items()
        else:
            assert (
                json.loads(before[name].read_text()) == json.loads(after[name].read_text())
                if ".json" in name
                else (before[name].read_bytes() == after[name].read_bytes())
            )
    ids = torch.tensor([[5, denoiser.spec.mask_id, 7]])
    assert torch.equal(load_denoiser(tmp_path / "saved")(ids, t=half(ids)), denoiser(ids, t=half(ids)))


def test_a_saved_bert_opens_in_the_library(folders: dict[str, Path], tmp_path: Path) -> None:
    denoiser = load_denoiser(folders["bert"])
    with torch.no_grad():
        denoiser.network.bert.embeddings.word_embeddings.weight.mul_(1.1)
    denoiser.save_pretrained(tmp_path / "bert")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    ids = torch.tensor([[1, 5, 4, 7]])
    found = denoiser(ids)
    torch.testing.assert_close(theirs(ids).logits[producible(found)], found[producible(found)], atol=1e-5, rtol=0)


def test_bf16_weights_are_half_the_size_and_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    for model in ("llada", "mdlm"):
        denoiser = load_denoiser(folders[model], dtype="bf16")
        assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}
        ids = torch.tensor([[5, denoiser.spec.mask_id, 7]])
        full, half = load_denoiser(folders[model])(ids), denoiser(ids).float()
        assert (full - half)[producible(full)].abs().max() < 0.1
        denoiser.save_pretrained(tmp_path / model)
        assert json.loads((tmp_path / model / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert torch.equal(load_denoiser(tmp_path / model, dtype="bf16")(ids).float(), half)


def test_the_hub_is_asked_for_owner_and_name(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, **_: object) -> str:
        asked.append(name)
        return str(folders["llada"])

    hub.download.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", snapshot)
        assert load_denoiser("GSAI-ML/toy").spec.mask_id == 60
    assert asked == ["GSAI-ML/toy"] * 2  # the small files say what it is, then the weights
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.download.cache_clear()
    with pytest.raises(UserError, match=r"model 'GSAI-ML/none': no such folder, and the hub did not give it") as caught:
        load_denoiser("GSAI-ML/none")
    assert "\n" not in str(caught.value)


def test_mdlm_without_a_tokenizer_says_what_is_missing(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("mdlm")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.download.cache_clear()
    with pytest.raises(UserError, match=r"no tokenizer \(allowed: tokenizer\.json of GPT-2 in the folder\)"):
        load_denoiser(folder)


# ---- what is refused


def change(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def lose(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def reshape(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    weights = load_file(path)
    weights["model.transformer.wte.weight"] = torch.zeros(65, 32)
    save_file(weights, path)


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_mask(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mask_token_id"}))
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(published.MASK, "<|hole|>"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(model_type="lladda"), r"config\.json: model_type 'lladda' cannot be opened, did you mean 'llada'\?"),
        (change(block_type="sequential"), r"json: block_type: 'sequential' is not supported \(allowed: 'llama'\)"),
        (change(n_heads=5), r"config\.json: "),
        (change(d_model="wide"), r"config\.json: "),
        (change(n_layers=3), r"the weights lack what the model of .*config\.json calls 'model\.layers\.2\."),
        (change(n_layers=1), r"safetensors: has 'model\.transformer\.blocks\.1\.\w+\.weight', which the model of"),
        (change(mlp_hidden_size=40), r"weight' is \((32, 48|48, 32)\), the model of .*\.json has"),
        (change(mask_token_id=64), r"the mask token 64 is outside the 64 ids of the model"),
        (without_mask, r"no mask token"),
        (reshape, r"'model\.transformer\.wte\.weight' is \(65, 32\), the model of .*config\.json has \(64, 32\)"),
        (truncate, r"model-00002-of-00002\.safetensors: not a readable safetensors file"),
        (lose("model-00002-of-00002.safetensors"), r"model-00002-of-00002\.safetensors: no such file"),
        (lose("model.safetensors.index.json"), r"holds neither model\.safetensors nor model\.safetensors\.index\.json"),
        (lose("tokenizer.json"), r"no tokenizer \(allowed: tokenizer\.json, or vocab\.json and merges\.txt\)"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"not a readable tokenizer"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), r"not an index of safetensors"),
    ],
)
def test_broken_folders_are_refused_in_one_line(copy: Any, damage: Callable[[Path], object], message: str) -> None:
    folder = copy("llada")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_denoiser(folder)
    assert "\n" not in str(caught.value)


def test_another_number_of_experts_is_refused(copy: Any) -> None:
    folder = copy("llada2")
    for number, message in ((4, r"has 'model\.layers\.1\.mlp\.experts\.[4-7]\."), (12, r"gate\.weight' is \(8, 32\)")):
        change(num_experts=number, n_group=2)(folder)
        with pytest.raises(UserError, match=message):
            load_denoiser(folder)
    change(num_experts=8, use_bias=True)(folder)
    with pytest.raises(UserError, match="use_bias: True is not supported"):
        load_denoiser(folder)


def test_score_networks_of_other_processes_are_refused(copy: Any) -> None:
    folder = copy("sedd")
    config = json.loads((folder / "config.json").read_text())
    change(noise=config["noise"] | {"type": "geometric", "sigma_max": 9.0})(folder)
    assert load_denoiser(folder).spec.noise == Geometric(low=1e-4, high=9.0)
    change(noise={"type": "cosine"})(folder)
    with pytest.raises(UserError, match=r"noise\.type: 'cosine' is not known \(allowed: geometric, loglinear\)"):
        load_denoiser(folder)
    change(graph={"type": "uniform"})(folder)
    with pytest.raises(UserError, match=r"graph\.type: 'uniform' is not supported \(allowed: 'absorb'\)"):
        load_denoiser(folder)
    change(graph={"type": "absorb"}, model={}, noise=config["noise"])(folder)
    with pytest.raises(UserError, match=r"model\.scale_by_sigma: None is not supported"):
        load_denoiser(folder)


def test_options_that_do_not_fit_are_refused(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="chat is an option of published models only"):
        load_denoiser("countdown-base", chat=True)
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing: TransformerDenoiser has none"):
        load_denoiser("countdown-base", gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"dtype: 'fp8' is not known \(allowed: fp32, bf16\)"):
        load_denoiser(copy("llada"), dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the chat template cannot be used"):
        load_denoiser(copy("bert"), chat=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'mdlm' needs an extra \(pip install 'unveil\[hf\]'\)"):
        load_denoiser(copy("mdlm"))


def test_a_canvas_longer_than_the_context_is_refused(opened: dict[str, PretrainedDenoiser]) -> None:
    with pytest.raises(UserError, match="65 tokens, the model's context_length is 64"):
        opened["dream"](torch.full((1, 65), 5))


# ---- training


def gradient(denoiser: PretrainedDenoiser) -> dict[str, Tensor]:
    denoiser.train()
    denoiser.zero_grad()
    logits = denoiser(torch.tensor([[5, denoiser.spec.mask_id, 7, 9]]), t=torch.tensor([0.5]))
    logits.logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", MODELS)
def test_checkpointed_gradients_are_the_same_and_dropout_is_off(
    folders: dict[str, Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, saving = load_denoiser(folders[model]), load_denoiser(folders[model], gradient_checkpointing=True)
    calls = []

    def spy(kept: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(1), kept(*args, **kwargs))[1]

    for module in saving.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = spy(module._gradient_checkpointing_func)
    monkeypatch.setattr("unveil.denoisers.mdlm.checkpoint", spy(torch.utils.checkpoint.checkpoint))
    want, found = gradient(plain), gradient(saving)  # type: ignore[arg-type]
    assert len(calls) == (3 if model == "modernbert" else 2)
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)
    ids = torch.tensor([[5, plain.spec.mask_id, 7, 9]])
    assert torch.equal(plain.train()(ids, t=half(ids)), plain.eval()(ids, t=half(ids)))


@pytest.mark.parametrize("model", MODELS)
def test_adapters_off_is_the_base_and_merged_is_an_ordinary_folder(
    folders: dict[str, Path], tmp_path: Path, model: str
) -> None:
    denoiser = load_denoiser(folders[model])
    ids = torch.tensor([[5, denoiser.spec.mask_id, 7, 9]])
    base = denoiser(ids, t=half(ids))
    adapter = Adapter(denoiser, LoraSettings(rank=2, alpha=4))
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert trained and not any(layer in name for name in trained for layer in (*denoiser.output_layers, "embed"))
    assert torch.equal(denoiser(ids, t=half(ids)), base)
    with torch.no_grad():
        for name in trained:
            denoiser.get_parameter(name).add_(0.1)
    moved = denoiser(ids, t=half(ids))
    with adapter.off():
        assert torch.equal(denoiser(ids, t=half(ids)), base)
    assert not torch.equal(moved, base)
    adapter.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trained) and all("lora_" in name for name in saved)
    adapter.merge().save_pretrained(tmp_path / "merged")
    opened = load_denoiser(tmp_path / "merged")
    torch.testing.assert_close(opened(ids, t=half(ids)), moved, atol=1e-5, rtol=1e-5)


# ---- commands


@dataclass(kw_only=True)
class Early(tiny.Echo, name="tiny_early"):
    """Good is a response with many letters of the first half of the alphabet."""

    def check(self, problem: Problem, completion: str) -> Verdict:
        score = sum(letter in "abcdefghijklm" for letter in completion) / tiny.RESPONSE
        return Verdict(correct=score > 0.5, score=score, metrics={})


def test_decode_draws_from_a_score_network(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rule", "reverse", "--length", "4", "--steps", "8", "--temperature", "1", "--json"]
    assert main(["decode", str(folders["sedd"]), "--prompt", "a", *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 8


def test_decode_reads_a_published_folder(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--chat", "--dtype", "bf16"]):
        arguments = [str(folders["llada"]), "--prompt", "a <|mdm_mask|>", "--length", "4", "--json", *options]
        assert main(["decode", *arguments]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(said["completions"]) == 1 and said["forwards"] == 4
        assert "mdm_mask" not in said["completions"][0]["completion"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_published_folder_learns_by_mdpo_and_is_saved_in_its_format(
    folders: dict[str, Path], tmp_path: Path, lora: bool
) -> None:
    base = BaseModel(path=str(folders["llada"]), chat=True, gradient_checkpointing=True)
    if lora:
        base.lora, base.dtype = LoraSettings(rank=2, alpha=4), "bf16"
    config = {"task": Early(), "reward": Shaped()}
    evaluation = PolicyEval(every=2, problems=2, decoders={})
    recipe = tiny.recipe(tmp_path, "mdpo", 2, policy=config, eval=evaluation, model=base)
    assert train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert len(updates) == 2 and all(line["skipped"] == 0 for line in updates)
    assert abs(updates[0]["ratio_mean"] - 1) < 1e-4  # on policy, with checkpointing and adapters
    final = tmp_path / "run" / "model"
    assert {path.name for path in folders["llada"].iterdir()} <= {path.name for path in final.iterdir()}
    assert json.loads((final / "config.json").read_text())["model_type"] == "llada"
    before, after = (load_denoiser(folder, dtype=base.dtype) for folder in (folders["llada"], final))
    assert not torch.equal(before(IDS), after(IDS))


def test_a_resumed_run_equals_an_uninterrupted_one_with_tied_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    def recipe(updates: int) -> Any:
        evaluation = PolicyEval(every=9, problems=2, decoders={})
        config = {"task": Early(), "reward": Shaped(), "kl": Kl(beta=0.1)}
        model = BaseModel(path=str(folders["qwen3"]))
        return tiny.recipe(tmp_path, "mdpo", updates, policy=config, eval=evaluation, model=model)

    assert train(recipe(4), tmp_path / "whole")
    assert train(recipe(2), tmp_path / "split")
    assert train(recipe(4), tmp_path / "split", resume=True)
    assert tiny.same(tiny.newest(tmp_path / "whole"), tiny.newest(tmp_path / "split")) == []
    models = (tmp_path / "whole" / "model", tmp_path / "split" / "model", folders["qwen3"])
    whole, split, base = (load_file(folder / "model-00001-of-00002.safetensors") for folder in models)
    assert tiny.same(whole, split) == [] and tiny.same(whole, base) != []


def test_the_command_line_trains_a_published_folder(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["updates=1", "policy.rollout.prompts=1", "policy.rollout.group_size=2", "eval.problems=1"]
    model = [f"model.path={folders['dream']}", "model.chat=true", "policy.rollout.response_length=4"]
    small += ["policy.rollout.sampler.steps=2", "policy.filter=null", "eval.decoders={lcr: {steps: 2}}"]
    run = str(tmp_path / "run")
    asked: list[bool] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DreamDenoiser, "encode_prompt", lambda self, text: asked.append(bool(self.frame.after)) or [5])
        assert main(["train", "mdpo", *model, *small, "--run", run, "--quiet"]) == 0
        assert main(["eval", run, "--task", "countdown", "--problems", "1", "--steps", "2", "--json"]) == 0
        assert main(["eval", run, "--no-chat", "--task", "countdown", "--problems", "1", "--steps", "2"]) == 0
    assert asked[:-2] == [True] * (len(asked) - 2) and not any(asked[-2:])  # as trained, unless told otherwise
    assert load_denoiser(run).spec.logit_shift == 1
