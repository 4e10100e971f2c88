"""SIGKILL at any moment leaves a good last checkpoint, from which the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny
from unveil.denoisers.load import load_denoiser
from unveil.learning.regularisers import Kl
from unveil.samplers.masked import MaskedSampler
from unveil.systems.mdpo import OverDenoising
from unveil.training.checkpoints import list_checkpoints, load_state
from unveil.training.runs import TrainRecipe, train
from unveil.training.snapshots import SnapshotConfig
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


LONG = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_kill
from unveil.training.runs import train
finished = train(test_kill.long(Path(sys.argv[2])), Path(sys.argv[2]) / "disturbed", resume=sys.argv[3] == "resume")
sys.exit(0 if finished else 3)
"""


def long(folder: Path) -> TrainRecipe:
    """200 updates with all that a run can carry: a filter, a reference, an average, inner updates, evaluations."""
    made = tiny.recipe(
        folder, "mdpo", 200,
        policy={
            "filter": OverDenoising(decoder=MaskedSampler(steps=5), pool=12, every=8),
            "kl": Kl(beta=0.3, estimator="k2"),
            "inner_updates": 2,
        },
        snapshots=SnapshotConfig(reference_sync=9, ema_decay=0.8),
        checkpoint=CheckpointConfig(every=7, keep=2),
    )  # fmt: skip
    made.eval.every = 20
    return made


def written(run: Path) -> int:
    """Lines of the metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def records(run: Path, name: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.mark.slow
def test_ten_interruptions_of_two_hundred_updates(tmp_path: Path) -> None:
    """Ctrl-C or SIGKILL at ten random moments, the start-up of a resumed run among them."""
    torch.set_num_threads(1)
    assert train(long(tmp_path), tmp_path / "whole")
    run, rng = tmp_path / "disturbed", random.Random(7)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
    story, resume = [], False
    for moment in sorted(rng.sample(range(1, 205), 10)):  # lines of metrics, of which there will be 211
        arguments = [str(Path(__file__).parent), str(tmp_path), "resume" if resume else "start"]
        process = subprocess.Popen([sys.executable, "-c", LONG, *arguments], env=environment)
        passed = written(run) >= moment  # by the run before: then somewhere in the start-up
        while process.poll() is None and not passed and written(run) < moment:
            time.sleep(0.002)
        time.sleep(rng.random() * (3.0 if passed else 0.05))
        number = rng.choice([signal.SIGINT, signal.SIGKILL])
        process.send_signal(number)
        status = process.wait(timeout=120)
        assert status in (-number, 3, 1), "it was stopped in the middle"
        found = list_checkpoints(run / "checkpoints")
        reached = load_state(found[-1])["update"] if found else 0
        resume = bool(found)
        story.append((signal.Signals(number).name, written(run), reached, status))
        if not resume:  # before the first checkpoint there is nothing to go on from
            shutil.rmtree(run, ignore_errors=True)
    assert train(long(tmp_path), run, resume=True)
    print("\n", *story, sep="\n")
    assert tiny.same(tiny.newest(tmp_path / "whole"), tiny.newest(run)) == []
    models = [dict(load_denoiser(folder).state_dict()) for folder in (tmp_path / "whole", run)]
    assert tiny.same(*models) == []
    for name in ("metrics.jsonl", "samples.jsonl", "trajectories.jsonl"):
        assert records(tmp_path / "whole", name) == records(run, name)
    steps = [line["step"] for line in records(run, "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 201))
    assert {name for name, *_ in story} == {"SIGINT", "SIGKILL"} and max(at for _, _, at, _ in story) >= 100
