"""`unveil pretrain` on an autoregressive model: annealing, resume, packed text, held-out loss, adapters, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import published
import tiny
from unveil.cli.main import main
from unveil.denoisers.convert import Conversion
from unveil.denoisers.decoders import DecoderDenoiser
from unveil.denoisers.load import load_denoiser
from unveil.registry import UserError
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval, DenoisingJob
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.lora import LoraSettings
from unveil.training.runs import NewModel, PretrainRecipe, pretrain
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer

SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
PAIRS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive toy Llama whose tokenizer has a mask."""
    path = tmp_path_factory.mktemp("autoregressive")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(path)
    published.tokenizer().save(str(path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": published.START, "eos_token": published.END}
    (path / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": published.CHAT}))
    return path


def recipe(folder: Path, file: str, updates: int = 8, **model: Any) -> PretrainRecipe:
    model = {"convert": Conversion(anneal=5), **model}
    return PretrainRecipe(
        model=NewModel(path=str(folder), **model),
        data=DenoisingConfig(file=file, response_length=4, batch=6),
        eval=DenoisingEval(every=2, loss=5, file=file),
        optim=OptimConfig(lr=1e-2, microbatch=4),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(tensorboard=False),
        updates=updates,
    )


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found if line["kind"] == kind]


def job(folder: Path, run: Path, data: DenoisingConfig, anneal: int = 0, microbatch: int = 100) -> DenoisingJob:
    from unveil.denoisers.convert import convert

    conversion = Conversion(anneal=anneal)
    trainer = Trainer(
        convert(folder, conversion), OptimConfig(max_grad_norm=1e9, microbatch=microbatch), CheckpointConfig(),
        SnapshotConfig(), updates=10, eval_every=10**6, run=run, ranks=Ranks(),
    )  # fmt: skip
    log = RunLog(run, LogConfig(tensorboard=False))
    return DenoisingJob(trainer, data, DenoisingEval(), log, seed=1, conversion=conversion)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_run_stopped_while_attention_opens_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    pretrain(recipe(folder, file, lora=lora), tmp_path / "whole")
    stopped = recipe(folder, file, lora=lora)
    seen = 0

    def stop(update: int, metrics: dict[str, Any]) -> None:
        nonlocal seen
        seen = update
        if update == 3:
            raise KeyboardInterrupt

    stopped.checkpoint = CheckpointConfig(every=2)
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopped, tmp_path / "parts", progress=stop)
    assert seen == 3
    assert pretrain(recipe(folder, file, lora=lora), tmp_path / "parts", resume=True)
    assert [line["open"] for line in lines(tmp_path / "parts", "train")] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert lines(tmp_path / "parts", "train") == lines(tmp_path / "whole", "train")
    held_out = lines(tmp_path / "whole", "held_out")
    assert held_out == lines(tmp_path / "parts", "held_out")
    assert [line["step"] for line in held_out] == [0, 2, 4, 6, 8]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    models = [load_denoiser(tmp_path / run).state_dict() for run in ("whole", "parts")]
    assert tiny.same(*map(dict, models)) == []


def test_the_gradient_does_not_depend_on_the_microbatch_while_attention_opens(folder: Path, tmp_path: Path) -> None:
    data = DenoisingConfig(file=write_lines(tmp_path / "pairs.jsonl", PAIRS), response_length=4, batch=7)
    found = []
    for anneal, microbatch in ((2, 100), (2, 3), (0, 100)):
        made = job(folder, tmp_path, data, anneal, microbatch)
        made.update(1, made.trainer.optimise)
        found.append(tiny.gradients(made.denoiser))
    whole, cut, opened = found
    assert max(float((whole[name] - cut[name]).abs().max()) for name in whole) < 1e-5
    assert max(float((whole[name] - opened[name]).abs().max()) for name in whole) > 1e-3  # half of the future is shut


def test_gradient_checkpointing_while_attention_opens(folder: Path, tmp_path: Path) -> None:
    """Layers that are recomputed in the backward pass see the same keys."""
    data = DenoisingConfig(file=write_lines(tmp_path / "pairs.jsonl", PAIRS), response_length=4, batch=7)
    found = []
    for checkpointing in (False, True):
        made = job(folder, tmp_path, data, anneal=2)
        if checkpointing:
            made.denoiser.checkpoint_gradients()
        made.update(1, made.trainer.optimise)
        found.append(tiny.gradients(made.denoiser))
    assert tiny.same(*found) == []


def test_what_is_trained_opens_in_the_library_and_decodes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    words = [
        "convert", f"model.path={folder}", f"data.file={file}", "data.response_length=4", "optim.precision=fp32",
        "model.convert.anneal=1", "model.lora.rank=2", "updates=3", "log.tensorboard=false",
    ]  # fmt: skip
    assert main(["pretrain", *words, "--run", str(tmp_path / "run"), "--quiet"]) == 0
    model = tmp_path / "run" / "model"
    denoiser = load_denoiser(model)
    assert isinstance(denoiser, DecoderDenoiser) and denoiser.spec.logit_shift == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[5, 60, 7, 60, 9]])
    found = denoiser(ids)[:, 1:]
    kept = ~torch.isneginf(found)
    torch.testing.assert_close(found[kept], theirs(ids).logits[:, :-1][kept], atol=1e-5, rtol=0)
    capsys.readouterr()
    assert main(["decode", str(tmp_path / "run"), "--prompt", "2+2=", "--length", "4", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]
    assert told["holes"] == 0 and "<|" not in told["completion"]


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_train_the_embedding_of_a_new_mask_too(folder: Path, tmp_path: Path, tied: bool) -> None:
    shutil.copytree(folder, tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    made = recipe(tmp_path / "base", write_lines(tmp_path / "pairs.jsonl", PAIRS), lora=LoraSettings(rank=2))
    pretrain(made, tmp_path / "run")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    after = load_denoiser(tmp_path / "run")
    assert isinstance(after, DecoderDenoiser) and after.spec.mask_id == 60
    moved = (after.network.model.embed_tokens.weight != before.model.embed_tokens.weight).any(1)
    assert moved.nonzero().flatten().tolist() == [60]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "held_out"  # of the adapters; the merged model must give the same
    again = recipe(tmp_path / "run" / "model", str(tmp_path / "pairs.jsonl"), convert=None, updates=1)
    pretrain(again, tmp_path / "again")
    assert lines(tmp_path / "again", "held_out")[0]["loss"] == pytest.approx(last["loss"], abs=1e-5)


def test_text_is_packed_into_full_responses(folder: Path, tmp_path: Path) -> None:
    documents = [{"text": "abc"}, {"text": "defgh"}, {"text": "ij"}]
    data = DenoisingConfig(text=write_lines(tmp_path / "text.jsonl", documents), response_length=4, batch=50)
    made = job(folder, tmp_path, data)
    end, encode = made.denoiser.spec.end_ids[0], made.denoiser.tokenizer.encode
    joined = [*encode("abc"), end, *encode("defgh"), end, *encode("ij"), end]
    assert made.packed == [joined[0:4], joined[4:8], joined[8:12]]  # one token is left over
    drawn = {tuple(ids) for _, ids in made._packed(0)}
    assert drawn == set(map(tuple, made.packed))
    canvas, corrupted = made._corrupted(made._packed(0), "corrupt", 0)
    assert canvas.prompt_width == 0 and corrupted.maskable.eq(4).all()
    assert made.update(0, made.trainer.optimise)["loss"] > 0


def test_answers_are_masked_and_prompts_are_not(folder: Path, tmp_path: Path) -> None:
    """LLaDA's rule: the end tokens that fill a response up are learned like text."""
    data = DenoisingConfig(file=write_lines(tmp_path / "pairs.jsonl", PAIRS), response_length=4, batch=200)
    made = job(folder, tmp_path, data)
    canvas, corrupted = made._corrupted(made._texts(0), "corrupt", 0)
    mask, end = made.denoiser.spec.mask_id, made.denoiser.spec.end_ids[0]
    prompt, response = corrupted.x_t[:, : canvas.prompt_width], corrupted.x_t[:, canvas.prompt_width :]
    assert (prompt != mask).all() and (response == mask).any(1).all()
    assert torch.equal(corrupted.holes[:, canvas.prompt_width :], response == mask)
    clean = canvas.ids[:, canvas.prompt_width :]
    assert (clean[:, -2:] == end).all() and (response[clean == end] == mask).float().mean() > 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convert": Conversion(anneal=8)}, r"model\.convert\.anneal: 8 updates leave none with open attention"),
        ({"convert": None}, r"an autoregressive model \(`unveil pretrain convert` makes"),
        ({"path": None}, r"model\.path: required for model\.convert, but missing"),
        ({"path": None, "convert": None, "lora": LoraSettings()}, r"model\.path: required for model\.lora"),
        ({"path": None, "convert": None, "chat": True}, r"model\.path: required for model\.chat"),
        ({"convert": Conversion(mask="<none>")}, r"model\.convert\.mask: no token is called '<none>'"),
    ],
)
def test_refused_before_any_work(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = recipe(folder, write_lines(tmp_path / "pairs.jsonl", PAIRS))
    for key, value in changes.items():
        setattr(made.model, key, value)
    with pytest.raises(UserError, match=message) as caught:
        pretrain(made, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_text_has_no_prompts_to_wrap(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "unused.jsonl", chat=True)
    made.data = DenoisingConfig(text=write_lines(tmp_path / "text.jsonl", [{"text": "abcdef"}]), response_length=4)
    with pytest.raises(UserError, match=r"model\.chat: true, but data\.text has no prompts"):
        pretrain(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": 26}, r"eval\.loss: 26 held-out examples were asked for, there are 25"),
        ({"file": None}, r"eval\.file: needed for the loss on held-out examples"),
    ],
)
def test_held_out_examples_have_to_be_there(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = recipe(folder, write_lines(tmp_path / "pairs.jsonl", PAIRS))
    made.eval = DenoisingEval(**{"loss": 5, "file": str(tmp_path / "pairs.jsonl"), **changes})
    with pytest.raises(UserError, match=message):
        pretrain(made, tmp_path / "run")


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        ([{"text": "ab"}], 4, r"3 tokens do not fill one response of 4"),
        ([{"text": "a" * 90}], 80, r"data\.response_length: 80: makes canvases of 80 tokens \(at most 64\)"),
        ([{"words": "ab"}], 4, r"text\.jsonl:1: key 'text' is missing"),
    ],
)
def test_text_that_does_not_fit(folder: Path, tmp_path: Path, rows: Any, length: int, message: str) -> None:
    data = DenoisingConfig(text=write_lines(tmp_path / "text.jsonl", rows), response_length=length)
    with pytest.raises(UserError, match=message):
        job(folder, tmp_path, data)
