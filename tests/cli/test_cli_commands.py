"""The commands at work on a model of one layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from unveil.cli.main import main
from unveil.samplers.trajectory import TokenTrajectory

PRETRAIN = """
model:
  transformer: {dim: 16, layers: 1, heads: 2, hidden: 16, context_length: 24}
  largest_number: 99
  words: ["+", "-", "*", "/", "=", ",", "->"]
data: {response_length: 12, batch: 4, tasks: [{task: {name: countdown}}]}
eval: {every: 1, problems: 4, decoders: {lcr: {steps: 4}}}
log: {tensorboard: false}
updates: 2
"""
POLICY = """
system: mdpo
model: {path: MODEL}
policy:
  task: {name: countdown}
  rollout: {sampler: {steps: 4, temperature: 1.0}, response_length: 12, prompts: 2, group_size: 2}
  advantage: improvement
  selector: {name: top_advantage, k: 2}
  weighting: mdpo
  kl: {beta: 0.02, estimator: k2}
eval: {every: 1, problems: 4, shown: 2, decoders: {lcr: {steps: 4}, rcr: {steps: 4, rule: rcr}}}
log: {tensorboard: false}
updates: 2
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` (pre-trained) and ``tuned`` (by MDPO), two updates each."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "base.yaml").write_text(PRETRAIN)
    (folder / "policy.yaml").write_text(POLICY.replace("MODEL", str(folder / "base")))
    for command, recipe, run in (("pretrain", "base", "base"), ("train", "policy", "tuned")):
        assert main([command, str(folder / f"{recipe}.yaml"), "--run", str(folder / run), "--quiet"]) == 0
    return folder


def answer(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> dict[str, Any]:
    """The one JSON object on stdout."""
    capsys.readouterr()
    assert main([*(str(word) for word in argv), "--json"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_systems(capsys: pytest.CaptureFixture[str]) -> None:
    systems = {system["name"]: system for system in answer(capsys, "systems")["systems"]}
    assert {"name", "paper", "family", "recipe", "claim", "verdict"} <= systems["mdpo"].keys()
    assert "mdpo/cpu" in systems["mdpo"]["recipe"]
    assert main(["systems"]) == 0
    assert "2508.13148" in capsys.readouterr().out


def test_train_leaves_table_report_and_model(runs: Path) -> None:
    run = runs / "tuned"
    table = json.loads((run / "table.json").read_text())
    evals = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in evals if line["kind"] == "eval"]
    assert table["rows"] == ["base", "tuned"]
    assert table["columns"] == ["lcr", "rcr"]
    assert table["problems"] == 4
    for key in ("accuracy", "low", "high"):
        for row, step in enumerate((0, 2)):
            by_decoder = {line["decoder"]: line[key] for line in evals if line["step"] == step}
            assert table[key][row] == [by_decoder["lcr"], by_decoder["rcr"]]
    assert "<html" in (run / "report.html").read_text().lower()
    assert (run / "model" / "model.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_train_tells_progress_on_stderr_and_results_on_stdout(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path
) -> None:
    capsys.readouterr()
    assert main(["train", str(runs / "policy.yaml"), "--run", str(tmp_path / "run"), "updates=1"]) == 0
    output = capsys.readouterr()
    assert "update 1/1  reward" in output.err
    for words in ("base", "tuned", "rcr", "rollouts", "report.html"):
        assert words in output.out
    assert "reward" not in output.out


def test_resume_goes_on_where_the_run_ended(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = str(runs / "policy.yaml")
    first = answer(capsys, "train", recipe, "--run", run, "updates=1", "--quiet")
    assert first["status"] == "finished"
    second = answer(capsys, "train", "--resume", run, "updates=2", "--quiet")
    assert second["cost"]["optimizer_steps"] == 2
    assert (run / "model/model.safetensors").read_bytes() == (runs / "tuned/model/model.safetensors").read_bytes()
    assert "updates: 2\n" in (run / "recipe.yaml").read_text()


def test_default_run_folder(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = answer(capsys, "pretrain", runs / "base.yaml", "updates=1", "--quiet")["run"]
    assert made.startswith("runs/base-20")
    assert (tmp_path / made / "model").is_dir()


def test_print_and_keys(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    capsys.readouterr()
    assert main(["train", str(runs / "policy.yaml"), "optim.lr=0.5", "--print"]) == 0
    (tmp_path / "merged.yaml").write_text(capsys.readouterr().out)
    assert main(["train", str(tmp_path / "merged.yaml"), "--print"]) == 0
    assert capsys.readouterr().out == (tmp_path / "merged.yaml").read_text()
    for given in ([], [runs / "policy.yaml"]):
        keys = {key["path"]: key for key in answer(capsys, "train", *given, "--keys")["keys"]}
        assert keys["optim.lr"]["default"] == "0.0001"
        assert keys["updates"]["doc"]
    assert main(["pretrain", "--keys"]) == 0
    assert "data.response_length" in capsys.readouterr().out


def test_decode_plain_and_json(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    model = runs / "tuned"
    capsys.readouterr()
    assert main(["decode", str(model), "--prompt", "1 2 3 -> 6", "--prompt", "4 5 6 -> 15"]) == 0
    plain = capsys.readouterr().out.splitlines()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 2 3 -> 6"}\n{"prompt": "4 5 6 -> 15"}\n')
    told = answer(capsys, "decode", model, "--prompts", tmp_path / "prompts.jsonl")
    assert [entry["completion"] for entry in told["completions"]] == plain
    assert told["length"] == told["steps"] == 12
    assert told["forwards"] == 24


def test_decode_reads_stdin(capsys: pytest.CaptureFixture[str], runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"1 2 3 -> 6\n4 5 6 -> 15\n")
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert len(answer(capsys, "decode", runs / "base")["completions"]) == 2


def test_decode_samples_differ_and_repeat(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    argv = [
        "decode",
        runs / "base",
        "--prompt",
        "1 2 3 -> 6",
        "--temperature",
        "1",
        "--samples",
        "3",
        "--rule",
    ]
    first = answer(capsys, *argv, "random")["completions"]
    assert len({entry["completion"] for entry in first}) == 3
    assert answer(capsys, *argv, "random")["completions"] == first
    assert answer(capsys, *argv, "random", "--seed", "1")["completions"] != first


def test_decode_infill_keeps_the_words(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    told = answer(
        capsys, "decode", runs / "base", "--prompt", "1 2 3 -> 6", "--infill", "1 + <mask> = <mask><mask> 3",
        "--trajectory", path, "--rule", "rcr:running=max",
    )  # fmt: skip
    assert told["length"] == 7
    trajectory = TokenTrajectory.load(path)
    assert trajectory.states is not None
    assert (trajectory.states[0, 0] == trajectory.mask_id).tolist() == [
        False,
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    held = [0, 1, 3, 6]
    assert trajectory.response_ids[0, held].equal(trajectory.states[0, 0, held])
    assert trajectory.step_map is None


def test_decode_saves_every_field(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    answer(capsys, "decode", runs / "base", "--prompt", "1 2 3 -> 6", "--steps", "4", "--trajectory", path)
    trajectory = TokenTrajectory.load(path)
    assert trajectory.steps == 4
    for name in ("states", "guesses", "confidence", "log_prob", "revealed", "taken_back", "step_map"):
        assert getattr(trajectory, name) is not None


def test_decode_shows_every_step(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    capsys.readouterr()
    assert main(["decode", str(runs / "base"), "--prompt", "1 2 3 -> 6", "--steps", "4", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.count("·") for line in steps] == [9, 6, 3, 0]
    assert [line.count("[") for line in steps] == [3, 3, 3, 3]


def test_decode_warns_of_unknown_words(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["decode", str(runs / "base"), "--prompt", "one 2"]) == 0
    assert "1 word(s) that the model does not know: 'one 2'" in capsys.readouterr().err


def test_eval_grid(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    told = answer(
        capsys, "eval", runs / "tuned", "--task", "countdown", "task.max_number=10", "--problems", "6",
        "--steps", "4,12",
        "--rules", "lcr;threshold:threshold=0.5", "--rules", "rcr", "--blocks", "none,6", "--out", out,
    )  # fmt: skip
    results = told["results"]
    assert [(line["decoder"], line["steps"], line["block"]) for line in results] == [
        ("lcr", 4, None), ("lcr", 4, 6), ("lcr", 12, None), ("lcr", 12, 6),
        ("threshold:threshold=0.5", None, None), ("threshold:threshold=0.5", None, 6),
        ("rcr", 4, None), ("rcr", 4, 6), ("rcr", 12, None), ("rcr", 12, 6),
    ]  # fmt: skip
    assert results[0]["forwards_per_completion"] == 4
    assert all(line["length"] == 12 and line["problems"] == 6 for line in results)
    settings, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(settings) == ["settings"] and len(records) == 6 * len(results)
    first = [
        record for record in records if record["decoder"] == "lcr" and record["steps"] == 4 and not record["block"]
    ]
    assert sum(record["correct"] for record in first) / 6 == results[0]["accuracy"]
    assert all(record["completion"] is not None and record["prompt"] for record in records)
    assert main(["eval", str(runs / "tuned"), "--task", "countdown", "--problems", "4"]) == 0
    assert "over denoised" in capsys.readouterr().out


def test_view_writes_the_page(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    (runs / "tuned" / "report.html").unlink()
    told = answer(capsys, "view", runs / "tuned", "--no-open")
    assert Path(told["report"]).is_file()


def test_reproduce_writes_result_and_judges(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unveil.claims
    import unveil.systems

    # A system of the user's own beside ours: found by its files' names, like any other.
    for package in (unveil.claims, unveil.systems):
        folder = tmp_path / package.__name__
        folder.mkdir()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    (tmp_path / "unveil.systems" / "toy_claim.py").write_text("")
    (tmp_path / "unveil.claims" / "toy_claim.py").write_text(
        "def reproduce(seeds, quick, out, report):\n"
        "    report(f'seeds {seeds}')\n"
        "    check = {'name': 'c', 'demand': '>= 1', 'measured': '2', 'holds': True}\n"
        "    check['per_seed'] = [float('nan')]\n"
        "    return {'name': 'toy_claim', 'verdict': 'fails' if quick else 'holds', 'checks': [check],\n"
        "            'cost': {'seconds': 1}, 'table': '| a |'}\n"
    )
    out = tmp_path / "out"
    told = answer(capsys, "reproduce", "toy_claim", "--out", out)
    assert told["verdict"] == "holds"
    assert told["checks"][0]["per_seed"] == [None]
    assert json.loads((out / "result.json").read_text())["date"]
    page = (out / "result.md").read_text()
    assert "Verdict: **holds**. Written by `unveil reproduce toy_claim --seeds 3`" in page
    assert "| c | >= 1 | 2 | holds |" in page
    assert page.endswith("\n| a |\n")
    assert answer(capsys, "reproduce", "toy_claim", "--quick", "--out", out, status=1)["verdict"] == "fails"
    told = answer(capsys, "reproduce", "toy_claim", "--quick", "--publish", status=2)
    assert "--publish: only a full run" in told["error"]
    checkout = tmp_path / "checkout"
    for folder in (checkout / "src" / "unveil" / "claims" / "results", checkout / "docs" / "claims"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(unveil.claims, "__path__", [str(checkout / "src/unveil/claims"), *unveil.claims.__path__])
    answer(capsys, "reproduce", "toy_claim", "--publish", "--out", out)
    assert (checkout / "docs" / "claims" / "toy_claim.md").read_text() == page
    assert json.loads((checkout / "src/unveil/claims/results/toy_claim.json").read_text())["verdict"] == "holds"


def started(*argv: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "unveil.cli.main", *(str(word) for word in argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_until(ready: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupted_run_resumes(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started("train", runs / "policy.yaml", "updates=100000", "eval.every=100000", "--run", run, "--json")
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"train"' in metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["status"] == "interrupted"
    assert f"continue with: unveil train --resume {run}" in err
    assert "Traceback" not in err
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (run / "checkpoints" / f"update-{done:06d}" / "state.pt").is_file()
    told = answer(capsys, "train", "--resume", run, f"updates={done + 1}", "--quiet")
    assert told["status"] == "finished"
    assert told["cost"]["optimizer_steps"] == done + 1


def test_view_serves_only_the_page(runs: Path) -> None:
    process = started("view", runs / "base", "--no-open", "--serve", "0")
    assert process.stderr is not None
    line = process.stderr.readline()
    address = line.split()[1]
    try:
        assert address.startswith("http://127.0.0.1:")
        assert b"<html" in urllib.request.urlopen(address, timeout=20).read().lower()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}recipe.yaml", timeout=20)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
