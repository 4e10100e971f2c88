"""What the checks of online learning on images share: one learning run on the digits, followed by a judge; tables.

Digits of 8 x 8 pixels; the base model is a flow that follows its prompt half of the time. Reward: the probability of
the wanted digit under a classifier that saw one half of the real images; judge: another classifier, of the other half.
10 prompts x 24 images per update, 10 steps; images for the judge are decoded by the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unveil.claims.laboratory import COSTS, Measured, cost_cells, markdown_table, mean, spread, train_policy
from unveil.denoisers.load import load_denoiser
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import MeanSpace
from unveil.rewards.images import ClassProbability
from unveil.samplers.grids import Uniform
from unveil.samplers.latent import LatentSampler
from unveil.systems.flow_grpo import variant
from unveil.tasks.digits import Digits
from unveil.tasks.evaluate import Evaluation, evaluate
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
GOAL = 0.90
PROMPTS, GROUP, STEPS, SHOWN = 10, 24, 10, 500
BASE = "digits-base"
CLIP = 3e-3
"""1e-4 for 65,536 dimensions is as much for 64: ratios of means over dimensions spread as 1 / sqrt(dimensions)."""
SHAPE: dict[str, Any] = {"steps": STEPS, "grid": Uniform(shift=3.0)}
"""Of rollouts and of the images that the judge sees."""
LOOKS = ("distance", "diversity", "frechet")
"""What is measured of images besides the judge's accuracy: `unveil.tasks.images`."""


@dataclass(kw_only=True)
class Method:
    """One way to learn: the rollout's sampler, the choices of a `PolicyConfig`, and the snapshots that these need."""

    sampler: LatentSampler
    choices: dict[str, Any]
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    drawn_by: Any = "policy"
    prompts: int = PROMPTS
    group: int = GROUP

    def policy(self) -> PolicyConfig:
        rollout = RolloutConfig(
            sampler=self.sampler, prompts=self.prompts, group_size=self.group, drawn_by=self.drawn_by
        )
        reward = ClassProbability(network="digits-reward")
        return PolicyConfig(task=Digits(), reward=reward, rollout=rollout, **self.choices)


def flow_grpo() -> Method:
    """The baseline: no KL, and a clip range for 64 dimensions."""
    sampler, choices = variant("full", **SHAPE)
    own = {"objective": Clipped(clip=CLIP, level="step"), "kl": MeanSpace(beta=0.0)}
    return Method(sampler=sampler, choices=vars(choices) | own)


def ode(**changes: Any) -> LatentSampler:
    """The sampler that the judge's images are decoded with."""
    return LatentSampler(**(SHAPE | changes))


def learn(
    method: Method,
    folder: Path,
    *,
    seed: int,
    lr: float,
    updates: int,
    points: int | None = None,
    goal: float = GOAL,
    decoder: LatentSampler | None = None,
    also: Callable[[PolicyJob, Evaluation], Measured] = lambda job, found: {},
) -> Measured:
    """A run whose trained parameters (no average of them) the judge looks at, at up to ``points`` moments.

    Args:
        points: None looks after every update.
        goal: of the judge's accuracy.
        decoder: of the judge's images; None is `ode`.
        also: what else is measured of each look.

    Returns:
        what `train_policy` does, with the end's ``accuracy``, the update at which the goal was ``reached`` (None:
        never), as ``epochs`` (infinite: never), the forwards ``spent`` and reward ``queries`` up to there (likewise),
        and the ``distance`` there (never: at the end). The curve also has the ``reward`` of the rollouts before a look.
    """
    denoiser, task = load_denoiser(BASE), Digits()
    held_out, shown_by = task.problems("test", SHOWN, 0), decoder or ode()

    def measure(job: PolicyJob) -> Measured:
        found = evaluate(denoiser, task, held_out, shown_by, seed=seed)
        own = {name: found.numbers[f"measure/{name}"] for name in LOOKS}
        counted = {"queries": job.trainer.cost.rollouts, "forwards": job.trainer.cost.forwards}
        return {"accuracy": found.accuracy, **own, **counted, **also(job, found)}

    run = train_policy(
        denoiser, method.policy(), folder, seed=seed, lr=lr, updates=updates, measure=measure,
        points=min(points or updates, updates), snapshots=method.snapshots,
    )  # fmt: skip
    rewards = [line["reward"] for line in run["metrics"]]
    for at in run["curve"]:
        at["reward"] = rewards[max(0, at["update"] - 1)]
    reached = next((at for at in run["curve"] if at["accuracy"] >= goal), None)
    start, end = run["curve"][0], run["curve"][-1]
    return run | {
        "accuracy": end["accuracy"],
        "reached": None if reached is None else reached["update"],
        "epochs": math.inf if reached is None else reached["update"],
        "spent": math.inf if reached is None else reached["forwards"],
        "queries": math.inf if reached is None else reached["queries"],
        "distance": end["distance"] if reached is None else reached["distance"],
        "line": f"{start['accuracy']:.3f} -> {end['accuracy']:.3f}, goal after {_told(reached)} updates",
    }


def _told(reached: Measured | None) -> str:
    return "-" if reached is None else str(reached["update"])


def soonest(run: Measured) -> tuple[float, float]:
    """Order of tuning: first at the goal, or else the best end."""
    return run["epochs"], -run["accuracy"]


def crossing(run: Measured, by: str, level: float, of: str) -> float:
    """``of`` when ``by`` first reaches ``level``, by linear interpolation; at the end if it never does."""
    before = run["curve"][0]
    for after in run["curve"]:
        if after[by] >= level:
            width = after[by] - before[by]
            share = (level - before[by]) / width if width > 0 else 1.0
            return before[of] + share * (after[of] - before[of])
        before = after
    return before[of]


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


def look_cells(results: list[Measured], digits: int = 2) -> list[str]:
    """What was measured of the images at the ends."""
    return [spread([run["curve"][-1][name] for run in results], 1, digits) for name in LOOKS]


def reached_cell(results: list[Measured]) -> str:
    """Updates to the goal, of every seed."""
    return ", ".join("-" if run["reached"] is None else str(run["reached"]) for run in results)


def table(by_method: Mapping[str, list[Measured]], best: Mapping[str, float]) -> str:
    """A row per method: the ends of its runs, and their mean cost."""
    rows: list[list[object]] = []
    for method, results in by_method.items():
        at = spread([result["distance"] for result in results], 1, 2)
        accuracy = spread([run["accuracy"] for run in results])
        reward = spread([run["curve"][-1]["reward"] for run in results], 1, 3)
        cells = [accuracy, reward, reached_cell(results), at, *look_cells(results), *cost_cells(results)]
        rows.append([method, f"{best[method]:g}", *cells])
    head = ["method", "lr", "judge % (mean ± sd)", "reward", "updates to the goal", "distance at the goal"]
    return markdown_table([*head, "distance at the end", "diversity", "Frechet", *COSTS.values()], rows)
