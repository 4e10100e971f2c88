"""`unveil diagnose` and decoding by a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unveil.cli.main import main

SMALL = ("--vocab", "32", "--steps", "64")


def answer(capsys: pytest.CaptureFixture[str], *argv: str, status: int) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*argv, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def coarse(probs: Tensor) -> Tensor:
    """A sampler as users write them: Gumbel noise of 10 bits, from the global generator."""
    u = torch.randint(1, 2**10, probs.shape) / 2**10
    return (probs / -u.log()).argmax(-1)


def exponential_race(probs: Tensor) -> Tensor:
    return torch.multinomial(probs, 1)[:, 0]


def broken(probs: Tensor) -> Tensor:
    raise RuntimeError("no luck")


def test_float32_is_biased_float64_and_position_first_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "diagnose", "--vocab", "2000", status=1)
    assert found["biased"] and found["chosen"]["method"] == "one-draw" and found["chosen"]["dtype"] == "float32"
    assert found["chosen"]["unmask"] < 0.9e-4 and found["chosen"]["entropy"] < found["chosen"]["entropy_exact"] - 0.1
    assert not answer(capsys, "diagnose", "--vocab", "2000", "--dtype", "float64", status=0)["biased"]
    assert not answer(capsys, "diagnose", "--vocab", "2000", "--method", "position-first", status=0)["biased"]
    immune = {(line["method"], line["dtype"]) for line in found["samplers"] if not line["biased"]}
    assert immune == {("one-draw", "float64"), ("position-first", "float64"), ("position-first", "float32")}


def test_people_read_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--vocab", "100", "--steps", "100000"]) == 1
    shown = capsys.readouterr().out
    assert "one-draw float32: BIASED" in shown and "immune: one-draw float64" in shown


def test_the_tokens_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("diagnose", "countdown-base", "--prompt", "3 4 5 -> 12", "--steps", "1000000")
    found = answer(capsys, *argv, status=1)
    assert found["positions"] == 12 and found["vocabulary"] == 213
    assert found["chosen"]["unmask_lowest"] < 0.7 * found["chosen"]["unmask_highest"], "flat positions open later"
    assert answer(capsys, *argv, "--length", "3", "--method", "position-first", status=0)["positions"] == 3


@pytest.mark.parametrize("name,status", [
    ("gumbel", 1), ("unveil", 0), (f"{__name__}:coarse", 1), (f"{__name__}:exponential_race", 0),
])  # fmt: skip
def test_a_sampler_is_tried(capsys: pytest.CaptureFixture[str], name: str, status: int) -> None:
    dtype = "bfloat16" if name == "gumbel" else "float32"
    found = answer(capsys, "diagnose", "--sampler", name, "--dtype", dtype, *SMALL, "--draws", "60000", status=status)
    assert found["draws"] == 60_000 and found["expected"] == pytest.approx(60_000 / 64)
    assert found["biased"] == (status == 1) and (found["p_value"] < 1e-3) == found["biased"]


@pytest.mark.parametrize("argv,words", [
    (("--steps", "0"), "--steps: should be at least 1"),
    (("--draws", "10"), "--draws: only for a trial"),
    (("--sampler", "gumbel", *SMALL, "--draws", "10"), "--draws: 10 are too few"),
    (("--sampler", "nowhere"), "allowed: gumbel, unveil"),
    (("--sampler", "nowhere:at_all"), "cannot be imported"),
    (("--sampler", f"{__name__}:broken", *SMALL), "failed: RuntimeError: no luck"),
    (("countdown-base", "--vocab", "9"), "--vocab: the tokens come from MODEL"),
    (("countdown-base", "--temperature", "0"), "--temperature: should be above 0"),
    (("countdown-base", "--sampler", "gumbel"), "takes no MODEL"),
])  # fmt: skip
def test_bad_input_is_named(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str) -> None:
    assert main(["diagnose", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_recipe_without_training_decodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = answer(capsys, "decode", "--recipe", "first_hitting_sampler", status=0)
    assert whole["steps"] == whole["length"] == 12 and len(whole["completions"]) == 2
    assert whole["forwards"] == 24 and whole["sample_entropy"] > 0
    changes = ("sampler.steps=4", "sampler.solver=extrapolation")
    named = ("decode", "countdown-base", *changes, "--recipe", "first_hitting_sampler", "--prompt", "1 2 3 -> 6")
    assert answer(capsys, *named, status=0)["forwards"] == 4
    plain = ("decode", "countdown-base", "--rule", "random", "--steps", "4", "--temperature", "1", *named[-2:])
    solver = answer(capsys, *plain, "--length", "12", "--solver", "extrapolation", status=0)
    assert solver["completions"] == answer(capsys, *named, status=0)["completions"]
    revised = (*plain, "--solver", "predictor_corrector", "--trajectory", str(tmp_path / "t.safetensors"))
    answer(capsys, *revised, status=0)


@pytest.mark.parametrize("argv,words", [
    (("decode", "--recipe", "first_hitting_sampler", "--steps", "3"), "write sampler.steps=VALUE"),
    (("decode", "--recipe", "mdpo"), "for `unveil train`"),
    (("decode", "sampler.steps=3", "--prompt", "1"), "there is none"),
    (("decode", "--prompt", "1"), "MODEL: required"),
    (("train", "first_hitting_sampler"), "for `unveil decode --recipe`"),
])  # fmt: skip
def test_wrong_recipes_are_named(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str) -> None:
    assert main(list(argv)) == 2
    assert words in capsys.readouterr().err
