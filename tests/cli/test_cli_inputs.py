"""Bad input is refused with one line that helps, status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unveil.cli.main import COMMANDS, main

TINY = """
model:
  transformer: {dim: 16, layers: 1, heads: 2, hidden: 16, context_length: 24}
  largest_number: 99
  words: ["+", "-", "*", "/", "=", ",", "->"]
data: {response_length: 12, batch: 4, tasks: [{task: {name: countdown}}]}
eval: {every: 1, problems: 4, decoders: {lcr: {steps: 4}}}
log: {tensorboard: false}
updates: 1
"""
POLICY = """
system: mdpo
model: {path: MODEL}
policy:
  task: {name: countdown}
  rollout: {sampler: {steps: 4, temperature: 1.0}, response_length: 12, prompts: 2, group_size: 2}
  advantage: improvement
eval: {every: 1, problems: 4, decoders: {lcr: {steps: 4}}}
log: {tensorboard: false}
updates: 1
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a pre-trained model of one layer."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tiny.yaml").write_text(TINY)
    assert main(["pretrain", str(folder / "tiny.yaml"), "--run", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY.replace("MODEL", str(base)))
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The message of a command that must end with status 2, and with nothing but that message on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if not line.startswith("run folder: ")]
    assert lines
    assert all(line.startswith("unveil: error: ") for line in lines), output.err
    return "\n".join(line.removeprefix("unveil: error: ") for line in lines)


def test_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from unveil.cli.main import main\n"
        f"for argv in [[], *([name] for name in {COMMANDS!r})]: assert main([*argv, '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("usage: unveil") == 1 + len(COMMANDS)


@pytest.mark.parametrize(
    "argv", [[], ["trian"], ["train", "--rum", "x"], ["eval", "m"], ["decode", "m", "--steps", "x"]]
)
def test_what_argparse_refuses(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "error: " in capsys.readouterr().err


def test_words_that_are_no_overrides(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert "'extra' is no override" in refused(capsys, "train", recipe, "extra", "--print")
    assert "RECIPE: required" in refused(capsys, "train", "updates=3")
    assert "'steps=3' should look like task.key=value" in refused(capsys, "eval", "m", "--task", "countdown", "steps=3")


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    before = ["train", "--run", "x", str(recipe), "updates=7", "--print", "seed=3"]
    assert main(before) == 0
    printed = capsys.readouterr().out
    assert "updates: 7\n" in printed
    assert "seed: 3\n" in printed


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'base-sudoku'?" in refused(capsys, "pretrain", "base-sudoko")
    assert refused(capsys, "train", "nowhere.yaml") == "nowhere.yaml: no such file"


def test_recipe_of_the_other_command(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert "a recipe for `unveil pretrain`" in refused(capsys, "train", "base-sudoku")
    assert "a recipe for `unveil train`" in refused(capsys, "pretrain", recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'?"]),
        ("updates=many", ["updates", "integer", "'many'"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0", "-1"]),
        ("policy.rollout.sampler.rule=rcrr", ["policy.rollout.sampler.rule", "did you mean 'rcr'?"]),
        ("model.path=nowhere", ["'nowhere'", "no such folder or embedded model"]),
        ("policy.rollout.response_length=20", ["response_length", "20", "24"]),
        ("policy.rollout.sampler.steps=13", ["steps", "13", "12 tokens"]),
        ("policy.rollout.sampler.block_length=6 policy.rollout.sampler.steps=3", ["steps", "multiples of 2"]),
        ("policy.task.train_file=BROKEN", ["bad.jsonl:2"]),
        ("log.wandb=project", ["log.wandb"]),
    ],
)
def test_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"input": "1,2,3", "output": "6"}\n{"input": "1,2\n')
    overrides = override.replace("BROKEN", str(tmp_path / "bad.jsonl")).split()
    message = refused(capsys, "train", recipe, *overrides, "--run", tmp_path / "run")
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_all_mistakes_of_a_recipe_are_told(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    message = refused(capsys, "train", recipe, "optim.lrr=1", "updates=0")
    assert len(message.splitlines()) == 2


def test_broken_training_file_of_pretrain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    overrides = ["data.tasks=[]", f"data.file={tmp_path / 'data.jsonl'}", "eval.decoders={}"]
    argv = ["pretrain", tmp_path / "tiny.yaml", *overrides, "--run", tmp_path / "run"]
    assert "data.jsonl:2: key 'completion' is missing" in refused(capsys, *argv)
    for prompt, completion, words in (("1", "1 " * 13, "13 tokens"), ("1 " * 13, "1", "at most 12 tokens")):
        lines = ({"prompt": "1", "completion": "1"}, {"prompt": prompt, "completion": completion})
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        message = refused(capsys, *argv)
        assert "data.jsonl:2: " in message
        assert words in message
    assert not (tmp_path / "run").exists()


def test_occupied_run_folder_is_left_alone(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    assert "occupied" in refused(capsys, "train", recipe, "--run", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_resume_refuses(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    assert "no run folder" in refused(capsys, "pretrain", "--resume", tmp_path)
    assert "'seed=3' cannot be changed" in refused(capsys, "pretrain", "--resume", base, "seed=3")
    assert "leave --run out" in refused(capsys, "pretrain", "--resume", base, "--run", "x")
    assert "leave 'base-sudoku' out" in refused(capsys, "pretrain", "base-sudoku", "--resume", base)


def test_checkpoint_of_another_architecture(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    path, metrics = base / "recipe.yaml", (base / "metrics.jsonl").read_bytes()
    saved = path.read_text()
    path.write_text(saved.replace("layers: 1", "layers: 2"))
    try:
        assert "another architecture" in refused(capsys, "pretrain", "--resume", base, "updates=2")
        assert (base / "metrics.jsonl").read_bytes() == metrics
    finally:
        path.write_text(saved)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rule", "rcrr"], "--rule: no rule is called 'rcrr', did you mean 'rcr'?"),
        (["--rule", "threshold:treshold=1"], "--rule.treshold: unknown key, did you mean 'threshold'?"),
        (["--rule", "threshold:threshold=7"], "--rule.threshold: should be less than or equal to 1"),
        (["--rule", "threshold:cap"], "--rule: rule 'threshold:cap' cannot be imported"),
        (["--rule", "threshold:cap=1,x"], "--rule: 'threshold:cap=1,x' should look like"),
        (["--rule", "rcr", "--stop-at-end"], "--stop-at-end: not possible"),
        (["--transform", "eosr"], "--transform: no transform is called 'eosr', did you mean 'eoser'?"),
        (["--transform", "eoser", "--rule", "threshold"], "transform eoser: rule 'threshold' sets its own pace"),
        (["--transform", "eoser:g_min=2"], "--transform.g_min: "),
        (["--schedule", "powr:k=2"], "--schedule: no schedule is called 'powr', did you mean 'power'?"),
        (["--temperature", "-1"], "--temperature: "),
        (["--length", "30"], "canvas of 24 tokens is too short for prompt 0"),
        (["--length", "0"], "--length: "),
        (["--steps", "13"], "--steps: 13 do not fit a response of 12 tokens"),
        (["--steps", "7", "--block", "4"], "--steps: 7 do not divide into 3 blocks"),
        (["--infill", "1 + 2"], "--infill: '1 + 2' has no <mask>"),
        (["--infill", "<mask>", "--length", "3"], "--length: "),
        (["--trajectory", "x.pt"], "--trajectory: "),
        (["--trajectory", "/nowhere/x.safetensors"], "--trajectory: '/nowhere': no such folder"),
        (["--samples", "0"], "--samples: "),
    ],
)
def test_decode_refuses(capsys: pytest.CaptureFixture[str], base: Path, argv: list[str], words: str) -> None:
    assert words in refused(capsys, "decode", base, "--prompt", "1 2 3 -> 6", *argv)


def test_decode_refuses_prompts(capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("1 2\n\n3\n")
    assert refused(capsys, "decode", base, "--prompts", lines).startswith(f"{lines}:2: blank line")
    lines.write_text('{"prompt": "1"}\n{"promt": "2"}\n')
    assert f"{lines}:2: key 'prompt' is missing" in refused(capsys, "decode", base, "--prompts", lines)
    assert "No such file" in refused(capsys, "decode", base, "--prompts", tmp_path / "none")
    assert "no such folder or embedded model" in refused(capsys, "decode", "nowhere", "--prompt", "1")


def test_eval_names_every_cell_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    argv = ["eval", base, "--task", "countdown", "--out", out]
    message = refused(capsys, *argv, "--lengths", "6,12", "--steps", "7,13", "--rules", "lcr;rcr")
    assert message.splitlines() == [
        "--steps: 7 do not fit a response of 6 tokens (each reveals one or more)",
        "--steps: 13 do not fit a response of 6 tokens (each reveals one or more)",
        "--steps: 13 do not fit a response of 12 tokens (each reveals one or more)",
    ]
    assert "--lengths: 22 and prompts of up to 5 tokens" in refused(capsys, *argv, "--lengths", "22")
    assert "--task: no task is called 'countdwn'" in refused(capsys, "eval", base, "--task", "countdwn")
    assert "task.number: unknown key" in refused(capsys, *argv, "task.number=3")
    assert not out.exists()
    out.write_text("precious")
    assert refused(capsys, *argv) == f"--out: {str(out)!r} exists; --resume goes on with it"
    assert "is no file of completions" in refused(capsys, *argv, "--resume")
    assert out.read_text() == "precious"


def test_other_commands_refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "did you mean 'mdpo'?" in refused(capsys, "reproduce", "mdop")
    assert "--seeds: should be at least 1" in refused(capsys, "reproduce", "mdpo", "--seeds", "0")
    assert "did you mean 'rollout'?" in refused(capsys, "bench", "rolout")
    assert "is no run folder" in refused(capsys, "view", tmp_path, "--no-open")
    assert not list(tmp_path.iterdir())


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"error": "nowhere.yaml: no such file"}


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_bytes_that_are_no_text(encoding: str) -> None:
    """A real process, for only there bytes come in: on the command line, and through a pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "unveil.cli.main", "decode", "countdown-base", "--length", "3", "--json", "--show"]
    done = subprocess.run([*command, b"--prompt=1 \xff -> 2"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode())["completions"][0]["prompt"] == "1 \ufffd -> 2"
    piped = subprocess.run(command, env=environment, capture_output=True, input=b"1 \xff -> 2\n", check=False)
    if encoding == "utf-8:strict":
        assert piped.returncode == 2 and piped.stderr == b"unveil: error: stdin: not text in UTF-8\n"
    else:
        assert piped.returncode == 0 and json.loads(piped.stdout.decode())


def test_a_line_of_prompts_ends_at_a_line_break_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_bytes("1 \u2028 2\x0c3\r\n4 \x1b[31m 5\n".encode())
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--length", "2", "--show"]
    assert main(["decode", "countdown-base", *words]) == 0
    out = capsys.readouterr().out
    shown = [line.removeprefix("prompt: ") for line in out.split("\n") if line.startswith("prompt: ")]
    assert shown == ["1 \\u2028 2\\x0c3", "4 \\x1b[31m 5"] and "\x1b" not in out
