"""Claim check of Flow-GRPO (arXiv 2505.05470) and DDPO (arXiv 2305.13301); ``unveil reproduce flow_grpo``.

Digits of 8 x 8 pixels; the base model is a flow that follows its prompt half of the time. Reward: the probability of
the wanted digit under a classifier that saw one half of the real images; judge: another classifier, of the other half.
10 prompts x 24 images per update, 10 steps; images for the judge are decoded by the ODE. Every method has its best
learning rate of one grid, chosen on a seed that is not reported (first to reach the goal, or else the best end).

1. Exact parts. Data N(1, 0.5^2) with the exact velocity: after 200 steps the SDE's deviation is within 3 % of the
   data's, without the drift's correction it is not; and the first ratios of every relative are 1 to 1e-6 in float32.
2. Flow-GRPO: judge accuracy >= 90 % within 40 updates, on every seed.
3. A window of 2 of 10 steps (Fast): the same goal with <= 60 % of the forwards of training of Flow-GRPO, in the mean.
4. KL in mean space: at equal reward (interpolated, at the highest that both reach) nearer to real images than without,
   in the mean.
5. DDPO: importance sampling reaches the goal with <= 0.7 of the reward queries of reward-weighted regression, in the
   mean; the score function lies between the two or is as good as the first. Reward-weighted regression has four forms,
   each with its own learning rate: softmax weights on DDPO's own rollouts, and, on images of the ODE, softmax weights
   with temperature 1 and 0.3, and the best quarter. That which needs the fewest queries counts.
Reported without a demand: diversity within a prompt, distance to real images, Frechet distance, cost.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.claims.image_learning import (
    BASE,
    CLIP,
    GOAL,
    GROUP,
    LEARNING_RATES,
    PROMPTS,
    SHAPE,
    STEPS,
    Method,
    crossing,
    learn,
    ode,
    soonest,
    table,
)
from unveil.claims.laboratory import (
    Measured,
    Report,
    all_runs,
    concluded,
    mean,
    on_seeds,
    train_policy,
    tune,
    two_processes,
)
from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.denoisers.load import load_denoiser
from unveil.learning.advantages import RewardWeights
from unveil.learning.objectives import Clipped
from unveil.learning.regularisers import MeanSpace
from unveil.processes.gaussian import Flow, Gaussian, GaussianProcess, Guess
from unveil.processes.kernels import Ddim, FlowSde, Kernel
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import Noise
from unveil.systems.ddpo import Ddpo, DdpoSf, Rwr
from unveil.systems.flow_grpo import variant
from unveil.tasks.digits import Digits
from unveil.training.policy_config import PolicyConfig, RolloutConfig

UPDATES, POINTS = 40, 20
BETA = 0.3
RWR = {
    "RWR": RewardWeights(),
    "RWR ODE": RewardWeights(),
    "RWR ODE 0.3": RewardWeights(temperature=0.3),
    "RWR ODE best": RewardWeights(form="top"),
}
"""Its forms; the first on DDPO's rollouts, the others on the ODE's."""
METHODS = ("flow_grpo", "flow_grpo fast", "flow_grpo KL", "ddpo IS", "ddpo SF", *RWR)
WINDOW_SHARE, QUERY_SHARE = 0.6, 0.7


def reproduce(seeds: int, quick: bool, out: Path, report: Report) -> Measured:
    """Run the check.

    Args:
        seeds: independent repetitions.
        quick: a quarter of the training and one learning rate for all methods: shows that everything runs, and how.
        out: folder for curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    updates = UPDATES // 4 if quick else UPDATES
    rates = LEARNING_RATES[1:2] if quick else LEARNING_RATES
    best = dict.fromkeys(METHODS, rates[0])
    with two_processes(report) as every:
        if not quick:
            best = tune(every, _policy, out, dict.fromkeys(METHODS, rates), updates, soonest)
        by_method = on_seeds(every, _policy, out, seeds, best, updates)
        exact = every(_exact, [(out, 0)])[0]
    checks = [
        _exact_check(exact), _goal_check(by_method["flow_grpo"], updates), _window_check(by_method),
        _kl_check(by_method), _ddpo_check(by_method),
    ]  # fmt: skip
    return concluded("flow_grpo", checks, all_runs(by_method), started, table(by_method, best), learning_rates=best)


def _method(name: str) -> Method:
    """Clip ranges are those of 64 dimensions."""
    clipped = Clipped(clip=CLIP, level="step")
    if name.startswith("flow_grpo"):
        sampler, choices = variant("fast" if name.endswith("fast") else "full", **SHAPE)
        kl = MeanSpace(beta=BETA if name.endswith("KL") else 0.0, rate=True)
        return Method(sampler=sampler, choices=vars(choices) | {"objective": clipped, "kl": kl})
    ddpo = {"ddpo IS": vars(Ddpo()) | {"objective": clipped}, "ddpo SF": vars(DdpoSf())}
    known = ddpo | {form: vars(Rwr(advantage=weights)) for form, weights in RWR.items()}
    return Method(sampler=ode() if "ODE" in name else ode(kernel=Ddim(eta=1.0)), choices=known[name])


def _policy(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    """Train one method; what it spent up to the goal on training alone."""
    folder = out / f"{method.replace(' ', '-')}-{lr:g}-{seed}"
    run = learn(_method(method), folder, seed=seed, lr=lr, updates=updates, points=POINTS)
    rolled = PROMPTS * GROUP * STEPS  # forwards of the rollouts of an update
    never = run["reached"] is None
    return run | {"training_forwards": math.inf if never else run["spent"] - rolled * run["reached"]}


class _Bell(ContinuousDenoiser):
    """The exact velocity of data from N(1, 0.5^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = ContinuousSpec(shape=(16,), process=Flow(), prediction="u")
        self.place = torch.nn.Parameter(torch.zeros(1))

    def condition(self, prompts: Any) -> Condition:
        return Condition({"none": torch.zeros(len(prompts))})

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = t[:, None].to(x)
        alpha = 1 - time
        x_0 = 1 + alpha * 0.25 / (alpha**2 * 0.25 + time**2) * (x - alpha)
        return (x - alpha * x_0) / time - x_0

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0

    def save_pretrained(self, folder: str | Path) -> None:
        """There is nothing to save."""


class _Uncorrected(Kernel):
    """The noise of Flow-GRPO's SDE on the drift of the ODE."""

    stochastic = True

    def step(self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        plain = Ddim(eta=0.0).step(process, guess, x, t, s)
        return plain._replace(std=FlowSde(noise=0.7).step(process, guess, x, t, s).std)


def _exact(out: Path, seed: int) -> Measured:
    """Deviations of 2,000 chains of 16 dimensions, and the first ratios of Flow-GRPO and its relatives."""
    bell, count = _Bell(), 2000
    found: Measured = {}
    for name, kernel in (("ode", Ddim(eta=0.0)), ("sde", FlowSde(noise=0.7)), ("uncorrected", _Uncorrected())):
        start = Noise(condition=bell.condition([""] * count), problems=list(range(count)), copies=[0] * count)
        samples = LatentSampler(steps=200, kernel=kernel).sample(bell, start, list(range(count))).samples
        found[name] = float(samples.std())
    found["ratio"] = 0.0
    for name in ("full", "fast", "cps", "mix", "dance"):
        sampler, choices = variant(name, **SHAPE)
        task, denoiser = Digits(), load_denoiser(BASE)
        policy = PolicyConfig(task=task, rollout=RolloutConfig(sampler=sampler, group_size=4), **vars(choices))
        run = train_policy(
            denoiser, policy, out / f"exact-{name}", seed=seed, lr=1e-30, updates=1, measure=lambda job: {}, points=1
        )
        found["ratio"] = max(found["ratio"], run["metrics"][0]["ratio_deviation"])
    line = f"deviation {found['sde']:.3f} (uncorrected {found['uncorrected']:.3f}), ratio - 1 {found['ratio']:.1e}"
    return found | {"line": line}


def _exact_check(found: Measured) -> Measured:
    near, far = abs(found["sde"] / 0.5 - 1), abs(found["uncorrected"] / 0.5 - 1)
    return {
        "name": "1 marginals of the SDE, first ratios",
        "demand": "deviation within 3 % of the data's, without the correction not; |ratio - 1| <= 1e-6 in the mean",
        "measured": f"{100 * near:.1f} % (uncorrected {100 * far:.0f} %); {found['ratio']:.1e}",
        "holds": near <= 0.03 < far and found["ratio"] <= 1e-6,
        "per_seed": [{k: v for k, v in found.items() if k != "line"}],
    }


def _goal_check(results: list[Measured], updates: int) -> Measured:
    listed = ", ".join("never" if r["reached"] is None else str(r["reached"]) for r in results)
    return {
        "name": "2 Flow-GRPO learns",
        "demand": f"judge accuracy >= {100 * GOAL:g} % within {updates} updates on every seed",
        "measured": f"after {listed} updates",
        "holds": all(r["reached"] is not None for r in results),
        "per_seed": [{"curve": r["curve"]} for r in results],
    }


def _window_check(by_method: dict[str, list[Measured]]) -> Measured:
    fast, full = (mean(by_method[name], "training_forwards") for name in ("flow_grpo fast", "flow_grpo"))
    share = fast / full if full < float("inf") else float("inf")
    return {
        "name": "3 a window of 2 of 10 steps",
        "demand": f"the goal with <= {WINDOW_SHARE:g} of Flow-GRPO's forwards of training",
        "measured": f"{fast:.0f} against {full:.0f}: {share:.2f}",
        "holds": share <= WINDOW_SHARE,
        "per_seed": [{"fast": f["curve"]} for f in by_method["flow_grpo fast"]],
    }


def _kl_check(by_method: dict[str, list[Measured]]) -> Measured:
    pairs = []
    for held, free in zip(by_method["flow_grpo KL"], by_method["flow_grpo"], strict=True):
        level = min(max(at["reward"] for at in run["curve"]) for run in (held, free))
        own, other = (crossing(run, "reward", level, "distance") for run in (held, free))
        pairs.append({"reward": level, "held": own, "free": other})
    held, free = (statistics.mean(pair[name] for pair in pairs) for name in ("held", "free"))
    return {
        "name": "4 KL in mean space",
        "demand": "nearer to real images at equal reward, in the mean",
        "measured": f"distance {held:.3f} against {free:.3f}",
        "holds": held < free,
        "per_seed": pairs,
    }


def _ddpo_check(by_method: dict[str, list[Measured]]) -> Measured:
    sampled, score = (mean(by_method[name], "queries") for name in ("ddpo IS", "ddpo SF"))
    weighted = min(mean(by_method[name], "queries") for name in RWR)
    peak = max(statistics.mean(max(at["accuracy"] for at in run["curve"]) for run in by_method[name]) for name in RWR)
    names = ("ddpo IS", "ddpo SF", *RWR)
    return {
        "name": "5 DDPO against reward-weighted regression, reward queries to the goal",
        "demand": f"IS <= {QUERY_SHARE:g} x the best RWR; SF no more than it",
        "measured": f"IS {sampled:.0f}, SF {score:.0f}, RWR {weighted:.0f} (judge at most {100 * peak:.1f} %)",
        "holds": sampled < float("inf") and sampled <= QUERY_SHARE * weighted and score <= weighted,
        "per_seed": [
            {name: run["reached"] for name, run in zip(names, runs, strict=True)}
            for runs in zip(*(by_method[name] for name in names), strict=True)
        ],
    }
