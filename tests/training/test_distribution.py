"""Two processes do what one does, with whole weights and with split ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from unveil.denoisers.transformer import TransformerConfig
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.selectors import NonZero
from unveil.registry import UserError
from unveil.samplers.masked import MaskedSampler
from unveil.systems.igpo import Inpaint
from unveil.training.checkpoints import list_checkpoints, load_state
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval, MixedTask
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig
from unveil.training.lora import LoraSettings
from unveil.training.outcome import Outcome, join
from unveil.training.runs import NewModel, PretrainRecipe, TrainRecipe, pretrain, train
from unveil.training.sharding import DistributedConfig
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig

UPDATES = 2
Recipe = TrainRecipe | PretrainRecipe


def repaired(folder: Path) -> TrainRecipe:
    """Only some ranks have groups to repair, and chains whose advantage is 0 are left out."""
    made = tiny.recipe(folder, "mdpo", UPDATES)
    hook = Inpaint(replacements=2, free_tail=1, chunk_min=1, chunk_max=1, ratio_low=0.5, ratio_high=0.9)
    made.policy = replace(made.policy, groups=hook, selector=NonZero(), advantage=GroupAdvantage())
    return made


def moved(folder: Path) -> TrainRecipe:
    """Every snapshot, and each of them moves."""
    made = tiny.recipe(folder, "mdpo", UPDATES)
    made.snapshots = SnapshotConfig(ema_decay=0.8, reference_sync=1)
    return made


def one_group(folder: Path) -> TrainRecipe:
    """Fewer prompts than ranks: the group lies on both, five chains here and four there."""
    return tiny.recipe(folder, "mdpo", UPDATES, policy={"rollout": {"prompts": 1, "group_size": 9}})


def adapters(folder: Path) -> TrainRecipe:
    made = tiny.recipe(folder, "mdpo", UPDATES)
    made.model.lora = LoraSettings(rank=2, alpha=4)
    return made


def teaching(folder: Path) -> PretrainRecipe:
    shape = TransformerConfig(dim=16, layers=2, heads=2, hidden=16, context_length=16)
    return PretrainRecipe(
        model=NewModel(transformer=shape, largest_number=1, words=tiny.WORDS),
        data=DenoisingConfig(tasks=[MixedTask(task=tiny.Echo())], response_length=5, batch=15),
        eval=DenoisingEval(every=100, problems=4, decoders={"lcr": MaskedSampler(steps=5)}),
        optim=OptimConfig(microbatch=4),
        log=LogConfig(tensorboard=False),
        updates=UPDATES,
    )


def at_full_size(name: str, folder: Path, **optim: Any) -> TrainRecipe:
    """A recipe of a published model: its layers recomputed in the backward pass, its output layer called in pieces."""
    import published
    import test_full_recipes

    if not (folder / "llada").is_dir():
        for model in ("llada", "dream"):
            size = {"llada": "max_sequence_length", "dream": "max_position_embeddings"}[model]
            published.write(folder / model, model, **{size: 512})
        for split, first in (("train", 0), ("test", 50)):
            sums = [{"question": f"what is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(first, first + 8)]
            (folder / f"gsm8k-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    made = test_full_recipes.cut_down(name, folder)
    made.policy.reward = test_full_recipes.Spread()
    made.optim = replace(made.optim, **({"precision": "fp32", "schedule": "constant", "warmup": 0} | optim))
    return made


def full_mdpo(folder: Path) -> TrainRecipe:
    return at_full_size("mdpo", folder)


def full_dcolt(folder: Path) -> TrainRecipe:
    """Beside the denoiser a network of the order learns, which no layer holds."""
    return at_full_size("dcolt", folder)


def full_igpo(folder: Path) -> TrainRecipe:
    """Adapters on frozen weights of bf16."""
    return at_full_size("igpo", folder)


def half(folder: Path) -> TrainRecipe:
    return at_full_size("dcolt", folder, precision="bf16")


KINDS: dict[str, Callable[[Path], Recipe]] = {
    kind.__name__: kind
    for kind in (repaired, moved, one_group, adapters, teaching, full_mdpo, full_dcolt, full_igpo, half)
}
DEFAULT = [("repaired", "none"), ("repaired", "full"), ("moved", "full"), ("one_group", "none"), ("teaching", "full")]
"""A kind of run, and what is split."""
SLOW = [("moved", "none"), ("one_group", "full"), ("adapters", "none"), ("adapters", "full"), ("teaching", "none")]


def make(folder: Path, kind: str, shard: Any = "none", **changes: Any) -> Recipe:
    made = KINDS[kind](folder)
    made.optim.lr, made.eval.every = 1e-4, 100
    made.checkpoint = CheckpointConfig(every=1, keep=2)
    made.distributed = DistributedConfig(shard=shard)
    if isinstance(made, TrainRecipe):
        made.policy.inner_updates = 2
        made.optim.microbatch = 8
    return replace(made, **changes)


def run(made: Recipe, folder: Path, *, resume: bool = False) -> None:
    assert (
        train(made, folder, resume=resume) if isinstance(made, TrainRecipe) else pretrain(made, folder, resume=resume)
    )


DRIVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_distribution
{}
"""


def launch(code: str, *arguments: str, world: int = 2, **environment: str) -> None:
    """Run Python code on ``world`` processes, as torchrun starts them."""
    path = os.pathsep.join([str(Path(tiny.__file__).parent), *filter(None, sys.path)])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)} | environment
    command = [sys.executable, "-c", DRIVER.format(code), str(Path(__file__).parent), *arguments]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * world
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def several(folder: str, runs: list[dict[str, Any]]) -> None:
    """What every process of `two` does: one run after the other, each with a meeting point of its own."""
    for one in runs:
        os.environ["MASTER_PORT"] = str(one["port"])
        made = make(Path(folder), one["kind"], one["shard"], updates=one["updates"])
        run(made, Path(folder) / one["name"], resume=one["resume"])


def planned(kind: str, shard: str, name: str = "", updates: int = UPDATES, *, resume: bool = False) -> dict[str, Any]:
    own = {"kind": kind, "shard": shard, "name": name or f"{kind}-{shard}", "updates": updates, "resume": resume}
    return own | {"port": free_port()}


def two(folder: Path, runs: list[dict[str, Any]], world: int = 2, **environment: str) -> None:
    """Let two processes make these runs, or more."""
    launch(f"test_distribution.several(sys.argv[2], {runs})", str(folder), world=world, **environment)


def logged_lines(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """What was logged of these kinds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Of a rank's chains with hints alone, so that their mean over ranks is weighted by groups.
    left_out = ("seconds", "inpainted_accuracy")
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines if line["kind"] in kinds]


def distance(left: Any, right: Any) -> float:
    """Largest difference between the numbers of two nested states of the same form."""
    if isinstance(left, torch.Tensor):
        assert left.shape == right.shape and left.dtype == right.dtype
        return float((left.double() - right.double()).abs().max()) if left.numel() else 0.0
    if isinstance(left, dict):
        assert left.keys() == right.keys(), left.keys() ^ right.keys()
        return max((distance(left[key], right[key]) for key in left if key != "seconds"), default=0.0)
    if isinstance(left, list | tuple):
        assert len(left) == len(right)
        return max(map(distance, left, right), default=0.0)
    if isinstance(left, float) and isinstance(right, float):
        return 0.0 if math.isnan(left) and math.isnan(right) else abs(left - right)
    assert left == right
    return 0.0


def check_equal(folder: Path, kind: str, shard: str, *, weights_within: float = 1e-5) -> None:
    one, two = folder / kind, folder / f"{kind}-{shard}"
    states = [tiny.newest(one), tiny.newest(two)]
    weights = states[0]["weights"]
    start = tiny.newest_but_one(one)["weights"]
    assert distance(start, weights) > 5e-5  # steps of 1e-4
    # Adam divides by |g|, so a difference in a gradient near zero can show; the gradients' sums agree to 1e-6.
    assert distance(*(state.pop("weights") for state in states)) < weights_within
    assert distance(*states) < 1e-5
    assert (two / "checkpoints" / f"update-{UPDATES:06d}" / "shards").is_dir() == (shard != "none")
    models = [load_file(path / "model" / "model.safetensors") for path in (one, two)]
    assert distance(*models) < weights_within
    # Of everything, not of rank 0. Later evaluations may differ: rounding turns near ties of greedy decoding.
    logged = [[one for one in logged_lines(path, "eval", "train") if one["kind"] == "train" or not one["step"]]
              for path in (one, two)]  # fmt: skip
    assert len(logged[0]) == UPDATES + 1 and distance(*logged) < 1e-4


def test_one_process_needs_no_configuration() -> None:
    ranks = Ranks()
    assert (ranks.world, ranks.rank, ranks.main) == (1, 0, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.total(2.5) == 2.5 and ranks.gather("x") == ["x"]


@pytest.mark.parametrize("world", [2, 3, 9])
def test_shares_are_a_partition(world: int) -> None:
    items = list(range(8))
    shares = []
    for rank in range(world):
        ranks = Ranks()
        ranks.world, ranks.rank = world, rank
        shares.append(ranks.share(items))
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_advantages_do_not_know_where_a_group_lies() -> None:
    """The statistics of groups that are cut anywhere, in parts of unequal length and number of steps."""
    stream = torch.Generator().manual_seed(0)
    count, steps = 12, 5
    active = torch.arange(steps) < torch.randint(1, steps + 1, (count, 1), generator=stream)
    whole = Outcome(
        group=torch.arange(3).repeat_interleave(4), prompt=torch.arange(3).repeat_interleave(4) + 7,
        rewards=torch.rand(count, steps, generator=stream) * active,
        active=active, known=torch.arange(count) != 7, correct=torch.rand(count, generator=stream) < 0.5,
        score=torch.rand(count, generator=stream).double(), unfinished=torch.zeros(count, dtype=torch.bool),
        parts={"a": torch.rand(count, steps, generator=stream) * active},
    )  # fmt: skip
    parts = []
    for rows in (slice(0, 1), slice(1, 6), slice(6, count)):
        width = int(active[rows].sum(1).max())
        names = ("group", "prompt", "known", "correct", "score", "unfinished")
        own = {name: getattr(whole, name)[rows] for name in names}
        wide = {name: getattr(whole, name)[rows, :width] for name in ("rewards", "active")}
        parts.append(Outcome(**own, **wide, parts={"a": whole.parts["a"][rows, :width]}))
    joined = join(parts)
    advantages = whole.advantages(GroupAdvantage())
    assert torch.equal(joined.advantages(GroupAdvantage()), advantages) and advantages.abs().sum() > 5
    assert joined.metrics() == whole.metrics() and torch.equal(joined.equal_groups(), whole.equal_groups())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Everything that needs two processes and is fast, in one launch of them."""
    for kind in dict.fromkeys(kind for kind, _ in DEFAULT):
        run(make(tmp_path, kind), tmp_path / kind)
    shutil.copytree(tmp_path / "moved", tmp_path / "one-to-two")
    more = UPDATES + 1
    again = [
        planned("moved", "full", "whole", more),
        planned("moved", "full", "stopped"),
        planned("moved", "full", "stopped", more, resume=True),
        planned("moved", "full", "one-to-two", more, resume=True),
    ]
    two(tmp_path, [*(planned(*one) for one in DEFAULT), *again])
    for kind, shard in DEFAULT:
        check_equal(tmp_path, kind, shard)

    # Stopped and resumed, on as many processes and on another number of them.
    shutil.copytree(tmp_path / "moved-full", tmp_path / "two-to-one")
    run(make(tmp_path, "moved", "full", updates=more), tmp_path / "two-to-one", resume=True)
    run(make(tmp_path, "moved", updates=more), tmp_path / "undisturbed")
    whole, undisturbed = tiny.newest(tmp_path / "whole"), tiny.newest(tmp_path / "undisturbed")
    assert whole["update"] == more and tiny.same(whole, tiny.newest(tmp_path / "stopped")) == []
    assert logged_lines(tmp_path / "whole", "train") == logged_lines(tmp_path / "stopped", "train")
    for name in ("one-to-two", "two-to-one"):
        assert distance(undisturbed, tiny.newest(tmp_path / name)) < 1e-5
        assert distance(*(logged_lines(tmp_path / run, "train") for run in ("undisturbed", name))) < 1e-4

    # A part that is broken or gone is noticed, by one line.
    newest = list_checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    first, second = sorted((newest / "shards").iterdir())
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    with pytest.raises(UserError, match="shards: not a readable checkpoint"):
        load_state(newest)
    second.write_bytes(content)
    first.unlink()
    with pytest.raises(UserError, match="shards: not a readable checkpoint"):
        load_state(newest)


@pytest.mark.slow
def test_two_processes_equal_one_whatever_is_trained(tmp_path: Path) -> None:
    for kind in dict.fromkeys(kind for kind, _ in SLOW):
        run(make(tmp_path, kind), tmp_path / kind)
    two(tmp_path, [planned(*one) for one in SLOW])
    for kind, shard in SLOW:
        check_equal(tmp_path, kind, shard)


@pytest.mark.slow
def test_two_processes_equal_one_with_published_models(tmp_path: Path) -> None:
    kinds = ["full_mdpo", "full_igpo", "full_dcolt"]
    for kind in kinds:
        run(make(tmp_path, kind), tmp_path / kind)
    two(tmp_path, [planned(kind, "full") for kind in [*kinds, "half"]])
    for kind in kinds:
        # Some weights of the network of the order have no gradient but rounding errors, and Adam follows those.
        check_equal(tmp_path, kind, "full", weights_within=4e-4 if kind == "full_dcolt" else 1e-5)
    # Split weights are gathered in bf16, whole ones are not: the two draw other samples.
    for line in logged_lines(tmp_path / "half-full", "train"):
        assert line["skipped"] == 0 and 0 < line["grad_norm"] < 100 and line["ratio_deviation"] < 0.3


@pytest.mark.slow
def test_two_nodes_of_two_processes_equal_one(tmp_path: Path) -> None:
    """Split within a node, the same on both; resumed by one process, and by nodes from one process's checkpoint."""
    run(make(tmp_path, "moved"), tmp_path / "moved")
    run(make(tmp_path, "moved", updates=UPDATES + 1), tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "moved", tmp_path / "one-to-four")
    again = planned("moved", "node", "one-to-four", UPDATES + 1, resume=True)
    two(tmp_path, [planned("moved", "node"), again], world=4, LOCAL_WORLD_SIZE="2")
    check_equal(tmp_path, "moved", "node")
    run(make(tmp_path, "moved", updates=UPDATES + 1), tmp_path / "moved-node", resume=True)
    for name in ("one-to-four", "moved-node"):
        assert distance(tiny.newest(tmp_path / "undisturbed"), tiny.newest(tmp_path / name)) < 1e-5
