"""A run under ``torchrun``: Ctrl-C and the death of a process leave one line and a good checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unveil.training.checkpoints import list_checkpoints, load_state

SETTINGS = [
    "policy.rollout.prompts=3", "policy.rollout.group_size=3", "policy.rollout.response_length=8",
    "policy.rollout.sampler.steps=4", "policy.selector.k=2", "eval={problems: 4, decoders: {lcr: {steps: 4}}}",
    "checkpoint.every=1", "log.tensorboard=false", "distributed.shard=full", "updates=100000",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def workers(torchrun: int) -> list[int]:
    """Process ids by rank."""
    rows = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(torchrun)], capture_output=True, text=True).stdout
    found = [int(row.split()[0]) for row in rows.splitlines() if "unveil train" in row]

    def rank(pid: int) -> int:
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next(int(value[5:]) for value in values if value.startswith(b"RANK="))

    return sorted(found, key=rank)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["terminal", 0, 1])
def test_an_end_before_its_time(tmp_path: Path, who: str | int) -> None:
    run = tmp_path / "run"
    command = [*TORCHRUN, "unveil", "train", "mdpo", "--run", str(run), "--quiet", *SETTINGS]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / "update-000002").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        own = workers(process.pid)
        assert len(own) == 2
        if who == "terminal":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to torchrun and to its processes
        else:
            os.kill(own[int(who)], signal.SIGKILL)
        errors = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("unveil:")]
    what = "interrupted" if who == "terminal" else r"another process of the run is gone: stopped"
    assert len(said) == 1 and what in said[0] and f"continue with: unveil train --resume {run}" in said[0]
    assert not any(Path(f"/proc/{pid}").exists() for pid in own)
    newest = list_checkpoints(run / "checkpoints")[-1]
    done = load_state(newest)["update"]
    assert newest.name == f"update-{done:06d}"
    # Goes on, on one process.
    again = [sys.executable, "-m", "unveil", "train", "--resume", str(run), "--quiet", "--json", f"updates={done + 1}"]
    answer = subprocess.run(again, env=environment(), capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert json.loads(answer.splitlines()[-1])["status"] == "finished"
    assert load_state(list_checkpoints(run / "checkpoints")[-1])["update"] == done + 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, done + 2))
