"""The files of launch/: what they run exists and parses, with stand-ins for what starts the processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from unveil.cli.main import parse
from unveil.cli.recipes import find_recipe
from unveil.recipe import load

LAUNCH = Path(__file__).parent.parent / "launch"
SHELL = {path.name: path.read_text(encoding="utf-8") for path in sorted(LAUNCH.glob("*.s*"))}
SHELL["kubernetes.yaml"] = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8")))[1][
    "spec"]["template"]["spec"]["containers"][0]["args"][0]  # fmt: skip
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
name = os.path.basename(sys.argv[0])
if name == "scontrol":
    print("node-1"); print("node-2")
elif name == "srun":
    os.execvp(sys.argv[1], sys.argv[1:])
else:
    print(json.dumps([name, *sys.argv[1:]]))
"""


def command(tmp_path: Path, script: str, *words: str, resume: bool = False) -> list[str]:
    """What a script runs in the end."""
    for name in ("torchrun", "srun", "scontrol", "unveil"):
        (tmp_path / name).write_text(STAND_IN, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    if resume:
        (run / "checkpoints" / "update-000001").mkdir(parents=True)
    given = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RUN": str(run), "NODES": "2", "GPUS": "8"}
    if script in ("slurm.sbatch", "kubernetes.yaml"):
        given |= {"RECIPE": "mdpo/cpu"}
    slurm = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    environment = {key: value for key, value in os.environ.items() if key != "RECIPE"} | given | slurm
    done = subprocess.run(
        ["bash", "-c", SHELL[script], script, *words], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("script", SHELL)
def test_launch_files_make_commands_that_parse(tmp_path: Path, script: str, resume: bool) -> None:
    words = command(tmp_path, script, resume=resume)
    if words[0] == "torchrun":
        started = get_args_parser().parse_args(words[1:])
        nodes = "2" if script in ("slurm.sbatch", "kubernetes.yaml") else "1:1"
        assert (started.module, started.nnodes, started.nproc_per_node) == (True, nodes, "8")
        assert started.training_script == "unveil" and started.shutdown_timeout > 60
        words = ["unveil", *started.training_script_args]
    args = parse(words[1:])
    assert args.command == "train"
    if resume:
        assert args.resume == str(tmp_path / "run") and not args.words
        return
    name, *changes = args.words
    assert args.run == str(tmp_path / "run") and args.resume is None
    assert changes == ([] if script == "one-gpu.sh" else ["distributed.shard=full"])
    assert load(find_recipe(name), changes)["system"]


def test_changes_are_handed_on(tmp_path: Path) -> None:
    assert command(tmp_path, "one-gpu.sh", "seed=3", "updates=2")[-2:] == ["seed=3", "updates=2"]
    assert command(tmp_path, "one-node.sh", "seed=3")[-1] == "seed=3"


def test_the_readme_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in LAUNCH.iterdir() if path.name != "README.md"}
    assert {name for name in files if f"]({name})" in text} == files and files == set(SHELL)


@pytest.mark.slow
def test_one_node_runs_on_two_cpu_processes(tmp_path: Path) -> None:
    settings = [
        "policy.rollout.prompts=3", "policy.rollout.group_size=3", "updates=2", "log.tensorboard=false",
        "eval={problems: 4, decoders: {lcr: {steps: 4}}}",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"GPUS": "2", "RECIPE": "mdpo/cpu", "RUN": str(tmp_path / "run"), "OMP_NUM_THREADS": "1", "PATH": path}
    environment = os.environ | given | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([str(LAUNCH / "one-node.sh"), *settings], env=environment, check=True, timeout=120)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoints" / "update-000002" / "shards").is_dir()
