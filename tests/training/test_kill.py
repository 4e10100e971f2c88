"""SIGKILL at any moment leaves a good last checkpoint, from which the run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import tiny
from unveil.denoisers.load import load_denoiser
from unveil.training.checkpoints import list_checkpoints, load_state
from unveil.training.runs import TrainRecipe, train
from unveil.training.trainer import CheckpointConfig

UPDATES = 24
DRIVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_kill
from unveil.training.runs import train
train(test_kill.recipe(Path(sys.argv[2])), Path(sys.argv[2]) / "killed", resume=sys.argv[3] == "resume")
"""


def recipe(folder: Path) -> TrainRecipe:
    made = tiny.recipe(folder, "mdpo", UPDATES, checkpoint=CheckpointConfig(every=1, keep=2))
    made.policy.rollout.prompts, made.eval.every = 2, 10
    return made


def test_killed_three_times_equals_undisturbed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert train(recipe(tmp_path), tmp_path / "whole")
    run, rng = tmp_path / "killed", random.Random(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
    reached = 0
    for round_ in range(3):
        goal = reached + rng.randint(2, 5)
        arguments = [str(Path(__file__).parent), str(tmp_path), "resume" if round_ else "start"]
        process = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env=environment)
        deadline = time.monotonic() + 600
        while process.poll() is None and not (run / "checkpoints" / f"update-{goal:06d}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was killed in the middle, not done
        found = list_checkpoints(run / "checkpoints")
        for path in found[-1:]:
            state = load_state(path)
            assert path.name == f"update-{state['update']:06d}"
            load_denoiser(path / "model")
        reached = load_state(found[-1])["update"]
        assert goal <= reached < UPDATES
    assert train(recipe(tmp_path), run, resume=True)
    assert tiny.same(tiny.newest(tmp_path / "whole"), tiny.newest(run)) == []
    models = [dict(load_denoiser(folder).state_dict()) for folder in (tmp_path / "whole", run)]
    assert tiny.same(*models) == []
    assert len(list_checkpoints(run / "checkpoints")) == 2
    steps = [
        line.split('"step": ')[1].split(",")[0]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"train"' in line
    ]
    assert steps == [str(step) for step in range(1, UPDATES + 1)]
