"""An update of Flow-GRPO by the general job against a hand-written loop of the published algorithm.

Both sides train copies of one network with the same settings: chains with noise, rewards, advantages of groups, clipped
ratios over all steps but the last, one optimiser step. First the plain loop is given the chains that the job drew, and
must end at the same weights. Then they take turns (A B B A ...), each with its own chains, and ratios are formed turn
by turn. The reward (brightness) costs nothing, so that all that is measured is network and loop.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from unveil.bench import _clock as clock
from unveil.bench import _memory as memory
from unveil.bench._flow_grpo import Plain
from unveil.denoisers.dit import Dit
from unveil.denoisers.image import Classes, ImageDenoiser, ImageModel, ImageNetwork
from unveil.denoisers.unet import UNet
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.objectives import Clipped, StepMean
from unveil.learning.selectors import ButLast
from unveil.processes.kernels import FlowSde
from unveil.registry import UserError
from unveil.rewards.base import Shaped
from unveil.samplers.latent import LatentSampler
from unveil.seeds import generator
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.policy_config import PolicyConfig, PolicyEval, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer

DEMAND = 1.05
"""Time of an update, ours over the plain loop, at most."""
MEMORY_DEMAND = 1.05
"""Peak memory of an update with four times the steps over that with the steps, less the further states, at most."""
NETWORKS: dict[str, tuple[ImageNetwork, tuple[int, int, int]]] = {
    "dit 8x8": (Dit(patch=2, dim=96, layers=4, heads=4, hidden=384), (1, 8, 8)),
    "dit 16x16": (Dit(patch=2, dim=128, layers=4, heads=4, hidden=512), (3, 16, 16)),
    "unet 16x16": (UNet(channels=24, multipliers=(1, 2)), (3, 16, 16)),
}
CPU = torch.device("cpu")
PROMPTS = ("a", "b", "c", "d")
LR, NOISE, CLIP = 1e-4, 0.7, 1e-4


@dataclass(kw_only=True)
class Brightness(Task):
    """As many problems as prompts; a sample's score is its mean brightness."""

    medium = "image"

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        return [Problem(id=f"{split}-{n}", prompt=PROMPTS[n % len(PROMPTS)], answer={}) for n in range(count)]

    def check(self, problem: Problem, completion: Any) -> Verdict:
        return self.check_all([problem], [completion])[0]

    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        scores = torch.stack(list(samples)).flatten(1).mean(1).tolist()
        return [Verdict(correct=False, score=score) for score in scores]


class Sides:
    """The job and the plain loop, on copies of one network."""

    def __init__(self, network: ImageNetwork, shape: tuple[int, int, int], steps: int, group: int, seed: int) -> None:
        config = ImageModel(shape=shape, prompts=Classes(names=PROMPTS), network=network)
        denoiser = ImageDenoiser(config)
        denoiser.initialise(generator(seed, "bench image"))
        with torch.no_grad():  # a new network says 0, and its gradient reaches the last layer only
            for parameter in denoiser.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(seed, "alive")))
        self.count, self.group = len(PROMPTS) * group, group
        other = copy.deepcopy(denoiser)
        optim = OptimConfig(lr=LR, betas=(0.9, 0.999), microbatch=self.count)
        self.plain = Plain(
            network=other.network, optimizer=torch.optim.AdamW(other.network.parameters(), lr=LR, weight_decay=0.0),
            steps=steps, noise=NOISE, clip=CLIP, group=group,
        )  # fmt: skip
        policy = PolicyConfig(
            task=Brightness(), reward=Shaped(), selector=ButLast(), objective=Clipped(clip=CLIP, level="step"),
            likelihood=TransitionLikelihood(), weighting=StepMean(),
            rollout=RolloutConfig(
                sampler=LatentSampler(steps=steps, kernel=FlowSde(noise=NOISE)), prompts=len(PROMPTS),
                group_size=group, batch_size=self.count,
            ),
        )  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        trainer = Trainer(
            denoiser, optim, CheckpointConfig(), SnapshotConfig(), updates=10**6, eval_every=10**6,
            run=Path(self.folder.name), ranks=Ranks(),
        )  # fmt: skip
        evaluation = PolicyEval(every=10**6, problems=1, decoders={})
        log = RunLog(Path(self.folder.name), LogConfig(tensorboard=False))
        self.job = PolicyJob(trainer, policy, evaluation, log, seed=seed)
        self.denoiser, self.trainer, self.other = denoiser, trainer, other
        self.ids = other.condition([prompt for prompt in PROMPTS for _ in range(group)])["ids"]
        self.stream = generator(seed, "plain")
        self.done = 0

    def ours(self) -> None:
        self.job.update(self.done, self.trainer.optimise)
        self.done += 1

    def reference(self) -> None:
        start = torch.randn(self.count, *self.denoiser.spec.shape, generator=self.stream)
        latents, scores = self.plain.rollout(start, self.ids, self.stream)
        self.plain.update(latents, scores, self.ids, self._rewards(latents[-1]))

    def difference(self) -> float:
        """The largest difference of the weights after one update of the job and of the plain loop on its chains, in
        learning rates: AdamW's first step moves every weight by about one."""
        drawn: list[Any] = []
        roll = self.job._roll
        self.job._roll = lambda *args, **how: drawn.append(roll(*args, **how)) or drawn[-1]  # type: ignore[method-assign,func-returns-value]
        self.ours()
        self.job._roll = roll  # type: ignore[method-assign]
        chains = drawn[0].trajectory
        latents, scores = chains.scored.transpose(0, 1), chains.log_prob.T / chains.samples[0].numel()
        ids = chains.condition["ids"]
        self.plain.update(latents, scores.float(), ids, self._rewards(latents[-1]))
        pairs = zip(self.denoiser.parameters(), self.other.parameters(), strict=True)
        return max((one - other).abs().max().item() for one, other in pairs) / LR

    def _rewards(self, latents: Tensor) -> Tensor:
        return self.denoiser.decode(latents).flatten(1).mean(1)


def run(
    repeats: int = 7,
    seed: int = 0,
    steps: int = 10,
    group: int = 8,
    networks: Sequence[str] = tuple(NETWORKS),
) -> dict[str, Any]:
    """Measure an update on every network.

    Args:
        repeats: pairs of turns.
        steps: of a chain.
        group: chains per prompt, of which there are 4.
        networks: names in `NETWORKS`.

    Returns:
        Plain values for JSON: ``setting``, ``cases`` (one per network), ``ratios`` by name, and ``holds``.

    Raises:
        UserError: a number is too small.
    """
    for name, number, least in (("repeats", repeats, 1), ("steps", steps, 2), ("group", group, 2)):
        if number < least:
            raise UserError(f"{name}: should be at least {least}, got {number}")
    cases = [_case(name, steps, group, repeats, seed) for name in networks]
    ratios = {f"update {case['network']}": case["ratio"] for case in cases}
    return {
        "bench": "image",
        "setting": {
            "device": "cpu", "threads": torch.get_num_threads(), "repeats": repeats, "seed": seed, "steps": steps,
            "chains": len(PROMPTS) * group, "clock": clock.name(CPU), "memory": memory.method(CPU),
        },
        "cases": cases,
        "ratios": ratios | {f"memory {case['network']}": case["memory_ratio"] for case in cases},
        "holds": all(case["holds"] for case in cases),
    }  # fmt: skip


def render(result: dict[str, Any]) -> Table:
    """The result of `run` as a table."""
    table = Table(title="an update of Flow-GRPO on the CPU, CPU time of the process")
    for heading in ("measure", "ours", "plain loop", "ratio (min-max)", "demand", "verdict"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    for case in result["cases"]:
        ratio = f"{case['ratio']:.3f} ({case['ratio_min']:.3f}-{case['ratio_max']:.3f})"
        times = f"{case['seconds']:.3f}", f"{case['reference_seconds']:.3f}"
        verdict = _verdict(case["ratio"] <= DEMAND) if case["identical"] else "weights differ"
        table.add_row(f"{case['network']}: seconds", *times, ratio, f"<= {DEMAND:g}", verdict)
        peaks = [f"{case[key] / 2**20:.1f} MiB" for key in ("peak_bytes", "reference_peak_bytes")]
        table.add_row("  peak memory", *peaks, f"{case['peak_bytes'] / case['reference_peak_bytes']:.3f}")
        more = f"{case['peak_bytes_4x'] / 2**20:.1f} MiB"
        verdict = _verdict(case["memory_ratio"] <= MEMORY_DEMAND)
        table.add_row("  with 4 x the steps", more, "", f"{case['memory_ratio']:.3f}", f"<= {MEMORY_DEMAND:g}", verdict)
    return table


def _case(name: str, steps: int, group: int, repeats: int, seed: int) -> dict[str, Any]:
    network, shape = NETWORKS[name]
    sides = Sides(network, shape, steps, group, seed)
    difference = sides.difference()
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for turn in range(repeats):
        for side in sorted(seconds, reverse=turn % 2 == 1):
            seconds[side].append(clock.timed(getattr(sides, side), CPU)[0])
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["reference"], strict=True)]
    peaks = {side: _peak(sides, getattr(sides, side)) for side in seconds}
    longer = Sides(network, shape, 4 * steps, group, seed)
    longer.ours()  # as the other one: the optimiser's moments exist
    more = _peak(longer, longer.ours)
    stored = 4 * len(PROMPTS) * group * 3 * steps * shape[0] * shape[1] * shape[2]  # the further states, fp32
    memory_ratio = (more - stored) / peaks["ours"]
    return {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in sides.denoiser.parameters()),
        "difference": difference,
        "identical": difference < 0.05,
        "seconds": median(seconds["ours"]),
        "reference_seconds": median(seconds["reference"]),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_bytes": peaks["ours"],
        "reference_peak_bytes": peaks["reference"],
        "peak_bytes_4x": more,
        "memory_ratio": memory_ratio,
        "holds": difference < 0.05 and median(ratios) <= DEMAND and memory_ratio <= MEMORY_DEMAND,
    }


def _peak(sides: Sides, call: Callable[[], None]) -> int:
    held = [*sides.denoiser.state_dict().values(), *sides.other.state_dict().values()]
    return memory.peak_bytes(call, CPU, held)


def _verdict(holds: bool) -> str:
    return "met" if holds else "missed"
