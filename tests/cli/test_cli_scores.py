"""A network of scores through the commands: pretrain, train, decode, eval, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unveil.cli.main import main
from unveil.denoisers.load import load_denoiser
from unveil.samplers.trajectory import TokenTrajectory

PRETRAIN = """
model:
  prediction: log_score
  transformer: {dim: 16, layers: 1, heads: 2, hidden: 16, context_length: 36}
  largest_number: 4
data: {response_length: 17, batch: 4, form: time, tasks: [{task: {name: sudoku, size: 4, blanks: 6}}]}
eval: {every: 1, problems: 4, decoders: {euler: {name: reverse, steps: 4, method: euler}}}
log: {tensorboard: false}
updates: 2
"""
POLICY = """
system: dcolt
model: {path: MODEL}
policy:
  task: {name: sudoku, size: 4, blanks: 6}
  reward: score
  rollout: {sampler: {name: reverse, steps: 4, method: euler}, response_length: 17, prompts: 2, group_size: 3}
  likelihood: {name: reverse, method: euler}
  selector: nonzero
  objective: {name: clipped, level: step}
  weighting: dcolt
eval: {every: 1, problems: 4, shown: 1, decoders: {euler: {name: reverse, steps: 4}}}
log: {tensorboard: false}
updates: 2
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "base.yaml").write_text(PRETRAIN)
    (folder / "policy.yaml").write_text(POLICY.replace("MODEL", str(folder / "base")))
    for command, recipe, run in (("pretrain", "base", "base"), ("train", "policy", "tuned")):
        assert main([command, str(folder / f"{recipe}.yaml"), "--run", str(folder / run), "--quiet"]) == 0
    return folder


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([*map(str, argv)]) == 2
    return capsys.readouterr().err


def test_training_is_on_policy_and_leaves_a_network_of_scores(runs: Path) -> None:
    assert load_denoiser(runs / "tuned").spec.prediction == "log_score"
    lines = [json.loads(line) for line in (runs / "tuned" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert len(updates) == 2 and all(line["ratio_deviation"] == 0 and line["grad_norm"] > 0 for line in updates)


PROMPT = "2 0 1 0 0 0 2 4 4 0 0 1 1 3 0 0"


def test_decode_and_eval_name_the_sampler_as_a_rule(
    capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "chain.safetensors"
    how = ("--prompt", PROMPT, "--rule", "reverse:method=euler,last_time=0.2", "--steps", 5, "--temperature", 1)
    found = answer(capsys, "decode", runs / "tuned", *how, "--trajectory", saved)
    assert found["steps"] == 5 and len(found["completions"]) == 1
    trajectory = TokenTrajectory.load(saved)
    assert trajectory.step_map is not None and trajectory.forwards == int(trajectory.active.sum())
    task = ("--task", "sudoku", "task.size=4", "task.blanks=6")
    grid = answer(capsys, "eval", runs / "base", *task, "--problems", 4, "--rules", "reverse", "--steps", "2,3")
    assert [line["steps"] for line in grid["results"]] == [2, 3]


def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], runs: Path, tmp_path: Path) -> None:
    decode = ("decode", runs / "base", "--prompt", PROMPT)
    assert "'masked' cannot time a network of scores" in refused(capsys, *decode)
    assert "--block: " in refused(capsys, *decode, "--rule", "reverse", "--block", 4)
    assert "method" in refused(capsys, *decode, "--rule", "reverse:method=exact")
    recipe = runs / "base.yaml"
    message = refused(capsys, "pretrain", recipe, "data.form=count", "--run", tmp_path / "x")
    assert "data.form: should be 'time' for a network that is told the time, got 'count'" in message
    other = "policy.likelihood.method=tweedie"
    message = refused(capsys, "train", runs / "policy.yaml", other, "--run", tmp_path / "x")
    assert "policy.likelihood.method: should be 'euler' as in rollout.sampler" in message
    assert not (tmp_path / "x").exists()
