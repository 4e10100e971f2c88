"""Two processes do what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.selectors import NonZero
from unveil.systems.igpo import Inpaint
from unveil.training.distribution import Ranks
from unveil.training.runs import TrainRecipe, train

UPDATES = 2
DRIVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_distribution
from unveil.training.runs import train
train(test_distribution.recipe(Path(sys.argv[2]), sys.argv[3]), Path(sys.argv[2]) / "two")
"""


def recipe(folder: Path, kind: str) -> TrainRecipe:
    """``repaired``: only some ranks have groups to repair, and chains whose advantage is 0 are left out."""
    made = tiny.recipe(folder, "mdpo", UPDATES)
    if kind == "repaired":
        hook = Inpaint(replacements=2, free_tail=1, chunk_min=1, chunk_max=1, ratio_low=0.5, ratio_high=0.9)
        made.policy = replace(made.policy, groups=hook, selector=NonZero(), advantage=GroupAdvantage())
    made.optim.lr, made.eval.every = 1e-4, 100
    made.policy.inner_updates = 2
    return made


def test_one_process_needs_no_configuration() -> None:
    ranks = Ranks()
    assert (ranks.world, ranks.rank, ranks.main) == (1, 0, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.total(2.5) == 2.5


@pytest.mark.parametrize("world", [2, 3])
def test_shares_are_a_partition(world: int) -> None:
    items = list(range(8))
    shares = []
    for rank in range(world):
        ranks = Ranks()
        ranks.world, ranks.rank = world, rank
        shares.append(ranks.share(items))
    assert (
        sorted(item for share in shares for item in share) == items
        and max(map(len, shares)) - min(map(len, shares)) <= 1
    )


@pytest.mark.parametrize("kind", ["mdpo", "repaired"])
def test_two_processes_equal_one(tmp_path: Path, kind: str) -> None:
    assert train(recipe(tmp_path, kind), tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(tmp_path), kind],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    one, two = tiny.newest(tmp_path / "one"), tiny.newest(tmp_path / "two")
    start = tiny.denoiser().state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in one["weights"].items())
    assert moved > 3e-4  # four steps of 1e-4
    # Adam divides by |g|, so a difference in a gradient near zero can show; the gradients' sums agree to 1e-6.
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=1e-5)
    for name, moments in one["optimizer"]["state"].items():
        torch.testing.assert_close(two["optimizer"]["state"][name]["exp_avg"], moments["exp_avg"], rtol=0, atol=1e-5)
    for key in ("optimizer_steps", "rollouts", "forwards", "samples"):
        assert one["cost"][key] == two["cost"][key], key
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in text if '"train"' in line] for text in lines]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[1]) == UPDATES
