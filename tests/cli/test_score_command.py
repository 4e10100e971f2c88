"""`unveil score`: files of d1's format, files of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unveil.cli.main import main

GSM = [  # text, truth, right by d1's rules, right by value
    (r"<answer>\boxed{18}</answer><|eot_id|><|endoftext|>", 18.0, True, True),
    (r"\boxed{7 pencils}", 7.0, True, False),
    (r"\boxed{43,500}", 43500.0, False, True),
    (r"\boxed{2.5}", 2.5, True, True),
    (r"\boxed{5}", None, False, False),
]


def answer(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*(str(word) for word in argv), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def write(path: Path, rows: list[tuple[str, str, Any]]) -> Path:
    generations = [{"question": q, "generations": text, "ground_truth": truth} for q, text, truth in rows]
    path.write_text(json.dumps({"generations": generations, "gen_length": 256}, indent=2))
    return path


def test_files_of_one_setup_are_one_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [(f"question {place}", text, truth) for place, (text, truth, *_) in enumerate(GSM)]
    files = [
        write(tmp_path / "gsm8k_instruct_256_128_0_generations.json", rows[:2]),
        write(tmp_path / "gsm8k_instruct_256_128_1_generations.json", rows[2:]),
        write(tmp_path / "gsm8k_instruct_512_256_0_generations.json", rows[:1]),
    ]
    out = tmp_path / "out.jsonl"
    argv = ("score", *files, "--task", "gsm8k_d1", "--against", "gsm8k")
    first, second = answer(capsys, *argv, "--out", out)["results"]
    assert (first["setup"], second["setup"]) == ("gsm8k_instruct_256_128", "gsm8k_instruct_512_256")
    assert (first["completions"], first["without_reference"], first["right"]) == (5, 1, 3)
    assert first["accuracy"] == pytest.approx(3 / 5) and first["low"] < 0.6 < first["high"]
    assert (first["against"]["right"], first["against"]["only_here"], first["against"]["only_there"]) == (3, 1, 1)
    records = [json.loads(line) for line in out.read_text().splitlines()][:5]
    assert [tuple(record["correct"].values()) for record in records] == [(own[2], own[3]) for own in GSM]
    assert answer(capsys, *argv, "--out", out, status=2)["error"].endswith("new file in a folder that exists")
    assert main([str(word) for word in argv]) == 0
    assert "no reference" in capsys.readouterr().out


def test_the_other_tasks_of_d1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    puzzle, grid = "4320004330100004", "4321124334122134"
    half = grid[:8] + puzzle[8:]
    sudoku = write(
        tmp_path / "s.json",
        [(f"Solve {puzzle}\n", f"<answer>{text}</answer>", grid) for text in (grid, half, "none")],
    )
    (line,) = answer(capsys, "score", sudoku, "--task", "sudoku_d1", "--against", "sudoku")["results"]
    assert line["completions"] == 3 and line["problems"] == 1 and line["right"] == line["against"]["right"] == 1
    assert line["score"] == pytest.approx((1 + 3 / 8 + 0) / 3)
    tree = write(tmp_path / "c.json", [("q", r"\boxed{(12+7)*3}", [[12, 7, 3], 57]), ("r", "57", [[57, 1, 1], 57])])
    assert answer(capsys, "score", tree, "--task", "countdown_d1")["results"][0]["right"] == 1
    maths = write(tmp_path / "m.json", [("q", r"\boxed{\frac{34}{100}}", r"\dfrac{17}{50}")])
    (line,) = answer(capsys, "score", maths, "--task", "math_d1", "--against", "math")["results"]
    assert (line["right"], line["against"]["right"]) == (0, 1)


def test_our_own_files_are_judged_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    told = answer(
        capsys, "eval", "countdown-base", "--task", "countdown", "--problems", 24, "--steps", "6,12", "--samples", 2,
        "--temperature", "1", "--seed", 4, "--out", out,
    )["results"]  # fmt: skip
    found = answer(capsys, "score", out, "--task", "countdown", "--seed", 4)["results"]
    assert sum(line["accuracy"] for line in told) > 0
    for line, other in zip(found, told, strict=True):
        assert (line["completions"], line["problems"]) == (48, 24)
        for key in ("accuracy", "low", "high", "score"):
            assert line[key] == pytest.approx(other[key])
    other = answer(capsys, "score", out, "--task", "countdown", "task.max_number=9", status=2)
    assert "is none of the task's (other settings?)" in other["error"]


def test_what_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refused(*argv: object) -> str:
        return str(answer(capsys, "score", *argv, status=2)["error"])

    path = tmp_path / "x.json"
    assert refused("--task", "gsm8k") == "FILE: required, but missing"
    assert "no task is called 'gsm'" in refused(path, "--task", "gsm")
    assert "--against: no task is called 'gsm'" in refused(path, "--task", "gsm8k", "--against", "gsm")
    assert "cannot be read" in refused(path, "--task", "gsm8k")
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "a list 'generations'"),
        ('{"generations": [{"question": "q"}]}', "generations[0] should have the strings"),
        ('{"generations": [{"question": "q", "generations": "t"}]}', "'ground_truth' is missing"),
    ):
        path.write_text(text)
        assert f"{path}" in refused(path, "--task", "gsm8k") and message in refused(path, "--task", "gsm8k")
    write(path, [("q", "t", "57")])
    assert f"{path}: generations[0]: ground_truth should be [[numbers], target]" in refused(path, "--task", "countdown")
    assert "should hold a puzzle of 16 cells" in refused(path, "--task", "sudoku_d1")
    assert "reads no completions of other programs" in refused(path, "--task", "humaneval")
