"""`unveil eval`: samples, intervals, the file of completions and the picture, on networks of one layer."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from unveil.cli.completion_file import CompletionFile
from unveil.cli.main import main
from unveil.registry import UserError
from unveil.samplers.masked import MaskedSampler
from unveil.tasks.completions import Completion
from unveil.tasks.evaluate import evaluate
from unveil.tasks.statistics import pass_at_k

TASK = ("--task", "tiny:Echo", "--lengths", "5", "--temperature", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.denoiser(scale=4.0).save_pretrained(folder)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*(str(word) for word in argv), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_pass_at_k_and_accuracy_are_those_of_the_completions(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    argv = ("eval", model, *TASK, "--problems", 7, "--samples", 4, "--k", "1,2,4", "--batch", 5, "--steps", "5")
    (line,) = answer(capsys, *argv, "--out", out, "--resamples", 200, "--seed", 2)["results"]
    records = [json.loads(text) for text in out.read_text().splitlines()[1:]]
    assert [record["sample"] for record in records] == [0, 1, 2, 3] * 7
    right = [sum(record["correct"] for record in records[start : start + 4]) for start in range(0, 28, 4)]
    assert 0 < sum(right) < 28 and len({record["completion"] for record in records}) > 7
    assert line["accuracy"] == pytest.approx(sum(right) / 28)
    for found, k in zip(line["pass_at_k"], (1, 2, 4), strict=True):
        assert found["value"] == pytest.approx(sum(pass_at_k(4, count, k) for count in right) / 7)
        assert found["low"] <= found["value"] <= found["high"]
    assert line["accuracy"] == pytest.approx(line["pass_at_k"][0]["value"])
    assert line["forwards"] == 140 and line["tokens_per_completion"] > 0


def test_one_sample_gives_what_training_evaluates(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    (line,) = answer(capsys, "eval", model, *TASK, "--problems", 40, "--batch", 7, "--steps", "3")["results"]
    sampler = MaskedSampler(steps=3, temperature=1.0)
    told = evaluate(
        tiny.denoiser(scale=4.0), tiny.Echo(), tiny.Echo().problems("test", 40, 0), sampler, response_length=5
    )
    assert told.over_denoising > 0
    for name in ("accuracy", "over_denoising", "ever_correct", "score", "sample_entropy", "forwards", "unfinished"):
        assert line[name] == pytest.approx(told.summary()[name], abs=1e-6), name


GRID = (*TASK, "--steps", "3,5", "--problems", "9", "--samples", "2", "--batch", "4", "--seed", "1")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an undisturbed run: two decoders, 18 completions each in batches of 4."""
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(["eval", str(model), *GRID, "--out", str(path)]) == 0
    return path.read_bytes()


def test_cut_anywhere_and_resumed_it_is_the_same_file(
    capsys: pytest.CaptureFixture[str], model: Path, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    first = whole.index(b"\n")
    told = answer(capsys, "eval", model, *GRID, "--out", path)
    assert path.read_bytes() == whole
    for cut in (0, 5, first, first + 1, first + 300, len(whole) // 2, len(whole) - 300, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        again = answer(capsys, "eval", model, *GRID, "--out", path, "--resume")
        assert path.read_bytes() == whole
        speed = ("seconds", "samples_per_second", "tokens_per_second", "decoded")
        for line, other in zip(again["results"], told["results"], strict=True):
            assert {k: v for k, v in line.items() if k not in speed} == {
                k: v for k, v in other.items() if k not in speed
            }
    assert [line["decoded"] for line in again["results"]] == [0, 0]
    assert again["results"][0]["tokens_per_second"] is None


def test_killed_and_resumed_it_is_the_same_file(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    argv = ["eval", str(model), *TASK, "--problems", "60", "--samples", "2", "--batch", "1", "--out"]
    path, other = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-m", "unveil.cli.main", *argv, str(path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 9):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and path.read_bytes().count(b"\n") < 121
    assert main([*argv, str(path), "--resume"]) == main([*argv, str(other)]) == 0
    assert path.read_bytes() == other.read_bytes()


def test_only_the_same_evaluation_is_resumed(
    capsys: pytest.CaptureFixture[str], model: Path, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"

    def refused(*changes: str) -> str:
        capsys.readouterr()
        assert main(["eval", str(model), *GRID, *changes, "--out", str(path), "--resume"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert path.read_bytes() == held
        return line.removeprefix("unveil: error: --resume: ")

    held = whole[:-700]
    path.write_bytes(held)
    assert refused("--seed", "2") == f"{path} was written with seed 1, not 2"
    assert refused("--samples", "3") == f"{path} was written with samples 2, not 3"
    assert refused("--batch", "3") == f"{path} was written with batch 4, not 3"
    assert "was written with decoders [" in refused("--steps", "5")
    assert "was written with task {" in refused("--task", "countdown")
    lines = whole.splitlines(keepends=True)
    for held, message in (
        (b"".join([lines[0], *lines[2:]]), ":2: should be sample 0 of "),
        (whole.replace(b'"correct"', b'"korrect"'), ":2: should be sample 0 of "),
        (whole + lines[-1], f":{len(lines) + 1}: more completions than this evaluation makes"),
        (b"notes of mine\n", " is no file of completions"),
        (b"notes of mine", " is no file of completions"),
    ):
        path.write_bytes(held)
        assert message in refused()
    other = tmp_path / "other"
    tiny.shifted(tiny.denoiser(scale=4.0)).save_pretrained(other)
    held = whole.replace(str(model).encode(), str(other).encode())
    path.write_bytes(held)
    assert main(["eval", str(other), *GRID, "--out", str(path), "--resume"]) == 2
    assert "was written with weights " in capsys.readouterr().err and path.read_bytes() == held


def completion(problem: str, sample: int) -> Completion:
    return Completion(
        problem=problem, sample=sample, prompt="a — b", completion="\u2028x", correct=True, score=1.0,
        over_denoised=False, tokens=1, chain_steps=2, forwards=2.0, entropy=0.0, unfinished=False,
    )  # fmt: skip


def test_every_cut_leaves_whole_batches(tmp_path: Path) -> None:
    names = [(problem, sample) for problem in "pqr" for sample in (0, 1)]
    plan = [({"decoder": rule}, names) for rule in ("lcr", "rcr")]
    path = tmp_path / "x"
    file = CompletionFile(path, {"seed": 0}, plan, 4, resume=False)
    ends = [path.stat().st_size]
    for decoder in (0, 1):
        for batch in (names[:4], names[4:]):
            file.append(decoder, [completion(*name) for name in batch])
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in {*range(0, len(whole), 41), *(end + by for end in ends for by in (-1, 0, 1))} - {len(whole) + 1}:
        path.write_bytes(whole[:cut])
        again = CompletionFile(path, {"seed": 0}, plan, 4, resume=True)
        kept = max([end for end in ends if end <= cut], default=ends[0])
        assert path.read_bytes() == whole[:kept]
        made = [0, 4, 6, 10, 12][ends.index(kept)]
        assert [len(own) for own in again.done] == [min(made, 6), max(0, made - 6)]
    with pytest.raises(UserError, match="File exists"):
        CompletionFile(path, {"seed": 0}, plan, 4, resume=False)


def test_a_full_disk_does_not_end_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    file = CompletionFile(path, {}, [({}, [("p", 0), ("q", 0)])], 1, resume=False)
    path.unlink()
    path.mkdir()
    file.append(0, [completion("p", 0)])
    assert "no more completions are written" in capsys.readouterr().err
    path.rmdir()
    file.append(0, [completion("q", 0)])  # a file with a hole could not be resumed
    assert not path.exists()


def test_picture_and_numbers(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    argv = ("eval", model, *TASK, "--steps", "1,5", "--rules", "lcr;threshold:threshold=0.9", "--problems", 5)
    told = answer(capsys, *argv, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "plot.csv").open()))
    assert [(row["decoder"], row["steps"]) for row in rows] == [
        ("lcr", "1"), ("lcr", "5"), ("threshold:threshold=0.9", ""),
    ]  # fmt: skip
    assert [float(row["accuracy"]) for row in rows] == [line["accuracy"] for line in told["results"]]
    assert [float(row["pass@1 high"]) for row in rows] == [line["high"] for line in told["results"]]


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for argv, message in (
        (["--samples", "2", "--k", "1,3"], "--k: should be 1 to 2 (--samples), got 3"),
        (["--samples", "0"], "--samples: should be at least 1, got 0"),
        (["--batch", "0"], "--batch: should be at least 1, got 0"),
        (["--resume"], "--resume: goes on with what was written; name it with --out"),
        (["--plot", "x.pdf"], "--plot: 'x.pdf' should end in .png"),
        (["--plot", str(tmp_path / "no" / "x.png")], "no such folder"),
    ):
        assert main(["eval", str(model), *TASK, *argv]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", str(model), *TASK, "--plot", str(tmp_path / "x.png")]) == 2
    assert "unveil[plot]" in capsys.readouterr().err


def test_equal_samples_are_pointed_out(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    argv = ["eval", str(model), *TASK, "--problems", "3", "--samples", "2"]
    assert main([*argv, "--temperature", "0"]) == 0
    assert "this decoder draws nothing" in capsys.readouterr().err
    assert main(argv) == 0
    assert "draws nothing" not in capsys.readouterr().err


def test_guesses_need_not_be_judged(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("eval", model, *TASK, "--problems", 9)
    (told,) = answer(capsys, *argv)["results"]
    judged: list[str] = []
    check = tiny.Echo.check
    monkeypatch.setattr(tiny.Echo, "check", lambda *given: judged.append(given[2]) or check(*given))
    (line,) = answer(capsys, *argv, "--final-only", "--out", tmp_path / "x")["results"]
    assert len(judged) == 9 and line["accuracy"] == told["accuracy"]
    assert line["over_denoising"] is None and line["ever_correct"] is None and told["over_denoising"] is not None
    assert '"over_denoised": null' in (tmp_path / "x").read_text()
    assert main([*map(str, argv), "--final-only"]) == 0
    assert "over denoised" not in capsys.readouterr().out


def test_programs_are_run_and_counted(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    # Whatever the model writes stands in a comment of the first program and breaks the second one.
    rows = [
        {
            "prompt": f"def one(x): return 1{end}", "canonical_solution": "", "entry_point": "one",
            "test": "def check(one):\n    assert one(2) == 1",
        }
        for end in (" # ", "\n+ ")
    ]  # fmt: skip
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("eval", model, "--task", "humaneval", f"task.test_file={tmp_path}/h.jsonl", "--final-only")
    how = ("--lengths", 4, "--temperature", 1, "--problems", 2, "--samples", 3, "--k", "1,3")
    (line,) = answer(capsys, *argv, *how)["results"]
    assert [one["value"] for one in line["pass_at_k"]] == [0.5, 0.5] and line["accuracy"] == 0.5
    row = {"text": "two", "code": "two = 2", "test_list": ["assert two == 2"]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    argv = ("--task", "mbpp", f"task.test_file={tmp_path}/m.jsonl", "--lengths", 4, "--problems", 1)
    (line,) = answer(capsys, "eval", "countdown-base", *argv)["results"]
    assert line["accuracy"] == 0 and line["ever_correct"] == 0 and line["high"] > 0.5
    told = answer(capsys, "eval", model, *argv, status=2)
    assert "do not fit the model's canvas (at most 16 tokens)" in told["error"]
