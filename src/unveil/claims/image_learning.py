"""What the checks of online learning on images share: one learning run on the digits, followed by a judge, and tables.

Digits of 8 x 8 pixels; the base model is a flow that follows its prompt half of the time. Reward: the probability of
the wanted digit under a classifier that saw one half of the real images; judge: another classifier, of the other half.
10 prompts x 24 images per update, 10 steps; images for the judge are decoded by the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unveil.claims.laboratory import Measured, markdown_table, mean, spread, train_policy
from unveil.denoisers.load import load_denoiser
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import MeanSpace
from unveil.rewards.images import ClassProbability
from unveil.samplers.grids import Uniform
from unveil.samplers.latent import LatentSampler
from unveil.systems.flow_grpo import variant
from unveil.tasks.digits import Digits
from unveil.tasks.evaluate import evaluate
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
GOAL = 0.90
PROMPTS, GROUP, STEPS, SHOWN = 10, 24, 10, 500
BASE = "digits-base"
CLIP = 3e-3
"""Of Flow-GRPO: 1e-4 for 65,536 dimensions is as much for 64."""


@dataclass(kw_only=True)
class Method:
    """One way to learn: the rollout's sampler, the choices of a `PolicyConfig`, and the snapshots that these need."""

    sampler: LatentSampler
    choices: dict[str, Any]
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    drawn_by: Any = "policy"

    def policy(self) -> PolicyConfig:
        rollout = RolloutConfig(sampler=self.sampler, prompts=PROMPTS, group_size=GROUP, drawn_by=self.drawn_by)
        reward = ClassProbability(network="digits-reward")
        return PolicyConfig(task=Digits(), reward=reward, rollout=rollout, **self.choices)


def flow_grpo() -> Method:
    """The baseline: no KL, and a clip range for 64 dimensions."""
    sampler, choices = variant("full", steps=STEPS, grid=Uniform(shift=3.0))
    own = {"objective": Clipped(clip=CLIP, level="step"), "kl": MeanSpace(beta=0.0)}
    return Method(sampler=sampler, choices=vars(choices) | own)


def ode(**changes: Any) -> LatentSampler:
    """The sampler that the judge's images are decoded with."""
    settings: dict[str, Any] = {"steps": STEPS, "grid": Uniform(shift=3.0)} | changes
    return LatentSampler(**settings)


def learn(method: Method, folder: Path, *, seed: int, lr: float, updates: int, every: int = 1) -> Measured:
    """A run whose trained parameters (no average of them) the judge looks at every ``every`` updates.

    Returns:
        what `train_policy` does, with the end's ``accuracy``, the update at which the goal was ``reached`` (None:
        never), and the forwards and reward queries up to there (infinite: never).
    """
    denoiser, task = load_denoiser(BASE), Digits()
    held_out, decoder = task.problems("test", SHOWN, 0), ode()

    def measure(job: PolicyJob) -> Measured:
        found = evaluate(denoiser, task, held_out, decoder, seed=seed)
        own = {name: found.numbers[f"measure/{name}"] for name in ("distance", "diversity", "frechet")}
        cost = job.trainer.cost
        return {"accuracy": found.accuracy, **own, "queries": cost.rollouts, "forwards": cost.forwards}

    run = train_policy(
        denoiser, method.policy(), folder, seed=seed, lr=lr, updates=updates, measure=measure,
        points=max(1, updates // every), snapshots=method.snapshots,
    )  # fmt: skip
    rewards = [line["reward"] for line in run["metrics"]]
    for at in run["curve"]:  # of the rollouts that led here
        at["reward"] = rewards[max(0, at["update"] - 1)]
    reached = next((at for at in run["curve"] if at["accuracy"] >= GOAL), None)
    end = run["curve"][-1]
    return run | {
        "accuracy": end["accuracy"],
        "reached": None if reached is None else reached["update"],
        "epochs": math.inf if reached is None else reached["update"],
        "spent": math.inf if reached is None else reached["forwards"],
        "distance": end["distance"] if reached is None else reached["distance"],
        "line": f"{run['curve'][0]['accuracy']:.3f} -> {end['accuracy']:.3f}, goal after "
        f"{'-' if reached is None else reached['update']} updates",
    }


def best_rates(tuned: Mapping[tuple[str, float], Measured]) -> dict[str, float]:
    """Per method the learning rate that was first at the goal, or else ended best; of equals the smaller."""
    found: dict[str, float] = {}
    for method in dict.fromkeys(name for name, _ in tuned):
        own = {rate: run for (name, rate), run in tuned.items() if name == method}
        found[method] = min(own, key=lambda rate: (own[rate]["epochs"], -own[rate]["accuracy"], rate))
    return found


def ratio_check(name: str, slow: list[Measured], own: list[Measured], least: float, key: str = "epochs") -> Measured:
    """Whether ``slow`` needs so many times what the method itself does."""
    found = times_faster(slow, own, key)
    return {
        "name": name,
        "demand": f">= {least:g}, in the mean",
        "measured": f"{mean(slow, key):.0f} against {mean(own, key):.0f}: {found:.2f}",
        "holds": found >= least,
        "per_seed": [{"other": a[key], "own": b[key]} for a, b in zip(slow, own, strict=True)],
    }


def distance_check(name: str, other: list[Measured], own: list[Measured], most: float) -> Measured:
    """Whether the distance to real images at the goal (where it is never reached: at the end) is small enough."""
    near, far = mean(own, "distance"), mean(other, "distance")
    return {
        "name": name,
        "demand": f"<= {most:g} of Flow-GRPO's, in the mean",
        "measured": f"{near:.3f} against {far:.3f}: {near / far:.2f}",
        "holds": all(run["reached"] is not None for run in own) and near <= most * far,
        "per_seed": [{"other": a["distance"], "own": b["distance"]} for a, b in zip(other, own, strict=True)],
    }


def times_faster(slow: list[Measured], fast: list[Measured], key: str = "epochs") -> float:
    """Ratio of the means of what both needed to reach the goal; nan if the fast one did not, on some seed."""
    if mean(fast, key) == math.inf:
        return math.nan
    return mean(slow, key) / mean(fast, key)


def table(by_method: Mapping[str, list[Measured]], best: Mapping[str, float]) -> str:
    """A row per method: the ends of its runs, and their mean cost."""
    rows: list[list[object]] = []
    for method, results in by_method.items():
        ends = [result["curve"][-1] for result in results]
        cells = [spread([end[name] for end in ends], 1, 2) for name in ("distance", "diversity", "frechet")]
        reached = ", ".join("-" if r["reached"] is None else str(r["reached"]) for r in results)
        cost = [f"{mean(results, key):.0f}" for key in ("optimizer_steps", "rollouts", "forwards", "seconds")]
        at = spread([result["distance"] for result in results], 1, 2)
        accuracy, reward = spread([end["accuracy"] for end in ends]), spread([end["reward"] for end in ends], 1, 3)
        rows.append([method, f"{best[method]:g}", accuracy, reward, reached, at, *cells, *cost])
    head = ["method", "lr", "judge % (mean ± sd)", "reward", "updates to the goal", "distance at the goal"]
    tail = ["distance at the end", "diversity", "Frechet", "optimiser steps", "rollouts", "forwards", "seconds"]
    return markdown_table([*head, *tail], rows)
