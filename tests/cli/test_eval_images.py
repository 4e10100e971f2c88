"""`unveil eval` on tasks of images: the numbers of runs, resuming, pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from unveil.cli import sample_folder
from unveil.cli.decoders import plugin, spelled
from unveil.cli.main import main
from unveil.processes.kernels import Kernel
from unveil.recipe import build
from unveil.report.sheet import sheet
from unveil.samplers.latents import LatentTrajectory

DIGITS = ("eval", "digits-base", "--task", "digits", "--resamples", 50)
RUN = ("model.path=digits-base", "policy.rollout.prompts=2", "policy.rollout.group_size=2", "eval.problems=30",
       "eval.every=1", "eval.shown=0", "log.tensorboard=false", "updates=1")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one update, which averages its weights and evaluates by two decoders."""
    folder = tmp_path_factory.mktemp("run") / "run"
    sde = "eval.decoders.sde={name: latent, steps: 3, kernel: {name: flow, noise: 0.7}}"
    assert main(["train", "diffusion_nft", *RUN, sde, "--run", str(folder), "--quiet"]) == 0
    return folder


def answer(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*(str(word) for word in argv), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_has_the_numbers_of_the_runs_own_evaluation(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    (model,) = run.glob("checkpoints/*/model")
    reward = "classifier:network=digits-reward"
    argv = ("--task", "digits", "--problems", 30, "--resamples", 50, "--rewards", reward)
    found = answer(capsys, "eval", model, *argv)["results"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = {line["decoder"]: line for line in lines if line["kind"] == "eval" and line["step"] == 1}
    assert [line["decoder"] for line in found] == list(own) == ["ode", "sde"]
    for line in found:
        told = own[line["decoder"]]
        for name in ("accuracy", "score", "forwards", "steps_per_chain", "latent_scale"):
            assert line[name] == told[name], name
        assert set(line["measures"]) == {"diversity", "distance", "frechet"}
        assert all(value["value"] == told[f"measure/{name}"] for name, value in line["measures"].items())
        assert line["rewards"]["classifier"]["value"] == told["reward"]


def test_options_change_the_recipes_decoders(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    argv = ("--task", "digits", "--problems", 4, "--resamples", 20, "sampler.clamp.limit=1.0")
    many = ("--steps", "1,2", "--guidance", "none,3; cfg:scale=2,rescale=0.5", "--solvers", "heun")
    found = answer(capsys, "eval", run, *argv, *many)["results"]
    assert [(line["decoder"], line["steps"], line["guidance"]) for line in found] == [
        (name, steps, guidance)
        for name in ("ode", "sde") for steps in (1, 2) for guidance in ("none", "3", "cfg:scale=2,rescale=0.5")
    ]  # fmt: skip
    grids = {line["decoder"]: (line["grid"], line["kernel"]) for line in found}
    assert grids == {"ode": ("uniform:shift=3", "ddim:eta=0"), "sde": ("uniform", "flow")}
    # Heun asks twice a step but at the last one; guidance doubles that; steps with noise are made by the kernel.
    assert [line["forwards_per_sample"] for line in found[:6]] == [1, 2, 2, 3, 6, 6]


def test_a_plug_in_is_spelled_as_it_is_read() -> None:
    for text in ("flow:noise=0.25", "ddim", "cps:noise=0.5"):
        kernel = build(Kernel, plugin(text, "--kernels", Kernel))
        assert build(Kernel, plugin(spelled(kernel), "--kernels", Kernel)) == kernel


WHOLE = (*DIGITS, "--problems", 7, "--samples", 3, "--k", "1,3", "--steps", "2,3", "--kernels", "ddim:eta=1",
         "--guidance", "none", "--batch", 8, "--rewards", "jpeg")  # fmt: skip


def test_stopped_anywhere_and_resumed_it_is_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    told = answer(capsys, *WHOLE, "--out", whole)
    speeds = ("decoded", "seconds", "samples_per_second")
    real, left = sample_folder.sample_problems, [4]

    def stops(*given: Any, **how: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*given, **how)

    monkeypatch.setattr(sample_folder, "sample_problems", stops)
    assert answer(capsys, *WHOLE, "--out", cut, status=130) == {"status": "interrupted", "out": str(cut)}
    assert not (cut / "samples.jsonl").exists()
    left[0] = 2
    again = answer(capsys, *WHOLE, "--out", cut, "--resume")
    assert [line["decoded"] for line in again["results"]] == [0, 13]  # of 2 x 21 in batches of 8, 8 and 5
    for line, other in zip(again["results"], told["results"], strict=True):
        assert {k: v for k, v in line.items() if k not in speeds} == {k: v for k, v in other.items() if k not in speeds}
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    for name in files:
        if name.name != "results.json":  # which tells the seconds
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name


def test_the_folder_holds_what_was_judged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (line, _) = answer(capsys, *WHOLE, "--out", out)["results"]
    settings, *records = [json.loads(text) for text in (out / "samples.jsonl").read_text().splitlines()]
    assert settings["settings"]["samples"] == 3 and len(records) == 2 * 21
    first = records[:21]
    assert [record["sample"] for record in first] == [0, 1, 2] * 7
    assert line["accuracy"] == pytest.approx(sum(record["correct"] for record in first) / 21)
    jpeg = line["rewards"]["jpeg"]
    assert jpeg["value"] == pytest.approx(sum(record["rewards"]["jpeg"] for record in first) / 21)
    assert jpeg["low"] <= jpeg["value"] <= jpeg["high"] and jpeg["failures"] == 0
    groups = [any(record["correct"] for record in first[place : place + 3]) for place in range(0, 21, 3)]
    assert line["pass_at_k"][1]["value"] == pytest.approx(sum(groups) / 7)
    latents = LatentTrajectory.load(out / "latents" / "00" / "000000.safetensors").samples
    with PIL.Image.open(out / first[0]["image"]) as image:
        pixels = torch.tensor(bytearray(image.tobytes())).view(8, 8).long()
    assert torch.equal(pixels, (((latents[0, 0] + 1) / 2).clamp(0, 1) * 255).round().long())
    assert (out / "decoders.png").is_file() and (out / "00.png").is_file()
    assert json.loads((out / "results.json").read_text())["results"][0]["accuracy"] == line["accuracy"]


def test_only_the_same_evaluation_is_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = (*DIGITS, "--problems", 3, "--out", out)
    answer(capsys, *argv)
    for change, message in (
        (("--seed", 1, "--resume"), "was written with seed 0, not 1"),
        (("--steps", 3, "--resume"), "was written with decoders ["),
        ((), "exists; --resume goes on with it"),
    ):
        assert message in answer(capsys, *argv, *change, status=2)["error"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    told = answer(capsys, *DIGITS, "--out", tmp_path / "mine", "--resume", status=2)["error"]
    assert "is no folder of samples by `unveil eval --out`" in told


def test_a_picture_has_a_tile_per_image() -> None:
    bright, dark = torch.ones(1, 8, 8), torch.zeros(1, 8, 8)
    made = sheet([[(bright, True), (dark, False)], [(dark, True)]], ["a", "b"], ["x", "y"])
    left = made.width - 2 * 72
    tiles = [made.getpixel((left + 72 * column + 30, 22 + 72 * row + 30)) for row, column in ((0, 0), (0, 1), (1, 0))]
    assert tiles == [(255,) * 3, (0,) * 3, (0,) * 3]
    edges = [made.getpixel((left + 72 * column, 22 + 72 * row)) for row, column in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert edges[0] == edges[2] != edges[1] and edges[3] == (255,) * 3
    large = sheet([[(torch.rand(3, 512, 256), False)]], ["a"])
    assert 256 < large.height < 280 and 128 < large.width < 200


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"{number}\n" for number in range(40)))
    for argv, message in (
        (
            (*DIGITS, "--rules", "lcr"),
            "--rules: 'digits' is a task of images, which have no such option (allowed: --st",
        ),
        ((*DIGITS, "--temperature", 1), "--temperature: 'digits' is a task of images"),
        ((*DIGITS, "--chat"), "--chat: 'digits' is a task of images"),
        (
            ("eval", "countdown-base", "--task", "countdown", "--kernels", "flow"),
            "--kernels: 'countdown' is a task of t",
        ),
        (
            ("eval", "countdown-base", "--task", "countdown", "sampler.steps=3"),
            "'sampler.steps=3': a task of texts has",
        ),
        (("eval", "countdown-base", "--task", "digits", "--steps", 2), "is of kind 'text' (allowed: models of images)"),
        (("eval", "digits-base", "--task", "countdown"), "is of kind 'image' (allowed: models of text)"),
        ((*DIGITS, "--kernels", "flaw"), "--kernels: no kernel is called 'flaw', did you mean 'flow'?"),
        ((*DIGITS, "--kernels", "flow:nose=1"), "--kernels.nose: unknown key, did you mean 'noise'?"),
        ((*DIGITS, "--guidance", "3,much"), "--guidance: no guidance is called '3,much'"),
        ((*DIGITS, "--grids", "karras"), "grid karras: ratio_max"),
        ((*DIGITS, "--steps", 0), "--steps: should be greater than or equal to 1"),
        ((*DIGITS, "sampler.stept=3"), "sampler.stept: unknown key, did you mean 'steps'?"),
        ((*DIGITS, "pipeline.resolution=64"), "pipeline is an option of published image pipelines only"),
        ((*DIGITS, "--rewards", "arithmetic"), "--rewards: no reward is called 'arithmetic'"),
        (
            (*DIGITS, "--rewards", "trl:function=builtins:len"),
            "--rewards: 'trl' scores texts, and the task's samples are images",
        ),
        ((*DIGITS, "--lora", tmp_path), "--lora: 'digits-base' is no published pipeline"),
        ((*DIGITS, "--out", tmp_path / "p.txt", "--resume"), "should be a folder in a folder that exists"),
        (("eval", "digits-base", "--task", "glyphs", "--problems", 5), "prompt '"),
        (("eval", "digits-base", "--task", "fashion", "colour=1"), "'colour=1'"),
    ):
        told = answer(capsys, *argv, status=2)["error"]
        assert message in told and "\n" not in told, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt"]
