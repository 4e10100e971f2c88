"""Claim check of AWM (arXiv 2509.25050); ``unveil reproduce awm``.

The digits of `image_learning`. Every method has its best learning rate of one grid, chosen on a seed that is not
reported: first to reach the goal (judge accuracy of 90 %), or else the best end. The judge looks after every update.

1. The theorem: on Gaussian data the variance of the score target given a noisy neighbour exceeds that given clean data
   by kappa; sampled, at three pairs of times, within 2 %.
2. Gradients at the base model from the same 24 batches of rollouts, drawn by Flow-GRPO's SDE, 9 times each: the signal
   to noise ratio (product of the means of both halves over the total variance) of AWM >= 5 x Flow-GRPO's; the mean
   cosine of two batches' gradients >= 0.2 for AWM and <= 0.1 for Flow-GRPO.
3. Updates to the goal: Flow-GRPO / AWM >= 1.7 in the mean.
4. Distance to the nearest real image at the goal not above Flow-GRPO's, in the mean.
Reported without a demand: the uniform weights; network evaluations, diversity, Frechet distance.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.claims.image_learning import (
    BASE,
    LEARNING_RATES,
    Method,
    distance_check,
    flow_grpo,
    learn,
    ode,
    ratio_check,
    soonest,
    table,
)
from unveil.claims.laboratory import (
    Measured,
    Report,
    all_runs,
    concluded,
    on_seeds,
    train_policy,
    tune,
    two_processes,
)
from unveil.denoisers.load import load_denoiser
from unveil.learning.noised import SamplerGrid
from unveil.processes.gaussian import Flow
from unveil.systems.awm import Awm, WeightedMatching, excess_variance, trust_region
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig

UPDATES, BATCHES = 40, 24
METHODS = ("awm", "awm uniform", "flow_grpo")
PAIRS = ((0.4, 0.5), (0.25, 0.5), (0.8, 0.9))
VARIANCE, SNR, COSINES, FASTER = 0.02, 5.0, (0.2, 0.1), 1.7


def reproduce(seeds: int, quick: bool, out: Path, report: Report) -> Measured:
    """Run the check.

    Args:
        seeds: independent repetitions.
        quick: a quarter of the training and one learning rate for all methods.
        out: folder for curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    updates = UPDATES // 4 if quick else UPDATES
    with two_processes(report) as every:
        exact = every(_variance, [(0,)])[0]
        own, other = every(_gradients, [(out, 0, "awm", BATCHES), (out, 0, "flow_grpo", BATCHES)])
        best = dict.fromkeys(METHODS, LEARNING_RATES[1])
        if not quick:
            best = tune(every, _learn, out, dict.fromkeys(METHODS, LEARNING_RATES), updates, soonest)
        by_method = on_seeds(every, _learn, out, seeds, best, updates)
    awm, base = by_method["awm"], by_method["flow_grpo"]
    checks = [
        _variance_check(exact),
        _gradient_check(own, other),
        ratio_check("3 updates to the goal, Flow-GRPO / AWM", base, awm, FASTER),
        distance_check("4 distance to real images at the goal", base, awm, 1.0),
    ]
    return concluded("awm", checks, all_runs(by_method), started, table(by_method, best), learning_rates=best)


def awm(**likelihood: Any) -> Method:
    """The released choices with the ODE's images."""
    choices = Awm(likelihood=WeightedMatching(**likelihood))
    return Method(sampler=ode(), choices=vars(choices), snapshots=SnapshotConfig(old=trust_region()))


def _learn(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    known = {"awm": awm, "awm uniform": lambda: awm(weights="uniform"), "flow_grpo": flow_grpo}
    folder = out / f"{method.replace(' ', '-')}-{lr:g}-{seed}"
    return learn(known[method](), folder, seed=seed, lr=lr, updates=updates)


def _gradients(out: Path, seed: int, method: str, batches: int) -> Measured:
    """Signal to noise of the gradients of independent batches at the base model, and their mean cosine.

    Both methods see the same images: those of Flow-GRPO's SDE. Penalties have no gradient there.
    """
    own = flow_grpo()
    own.choices["minibatches"] = 1
    if method == "awm":
        grid = SamplerGrid(share=0.9)  # all times but the last, as Flow-GRPO's steps
        own = replace(awm(weights="uniform", draws=None, times=grid), sampler=own.sampler)
    denoiser, found = load_denoiser(BASE), []

    def optimise(losses: Any) -> dict[str, float]:
        denoiser.zero_grad()
        for loss in losses:
            loss().backward()
        found.append(torch.cat([p.grad.double().flatten() for p in denoiser.parameters() if p.grad is not None]))
        denoiser.zero_grad()
        return {}

    def measure(job: PolicyJob) -> Measured:
        if not found:
            for batch in range(batches):
                job.update(batch, optimise)
        return {}

    folder = out / f"gradients-{method}-{seed}"
    train_policy(
        denoiser, own.policy(), folder, seed=seed, lr=1e-30, updates=1, measure=measure, snapshots=own.snapshots
    )
    said = signal(torch.stack(found))
    return said | {"line": f"cosine {said['cosine']:.3f}, signal to noise {said['snr']:.3f}"}


def signal(gradients: Tensor) -> Measured:
    """Of independent estimates (K, P) of one gradient: mean cosine of two of them, and the product of the means of both
    halves over the total variance."""
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    count, half = len(gradients), len(gradients) // 2
    cosine = (float((unit @ unit.T).sum()) - count) / (count * (count - 1))
    noise = float(gradients.var(dim=0).sum())
    return {"cosine": cosine, "snr": float(gradients[:half].mean(0) @ gradients[half:].mean(0)) / noise}


def _variance(seed: int) -> Measured:
    """Sampled excess variance over kappa, of a flow at every pair s < t."""
    worst, rows = 0.0, []
    for s, t in PAIRS:
        sampled = sampled_excess(s, t, seed)
        kappa = float(excess_variance(Flow(), torch.tensor([s]).double(), torch.tensor([t]).double()))
        worst = max(worst, abs(sampled / kappa - 1))
        rows.append({"s": s, "t": t, "sampled": sampled, "kappa": kappa})
    return {"worst": worst, "rows": rows, "line": f"within {100 * worst:.2f} % of kappa"}


def sampled_excess(s: float, t: float, seed: int, count: int = 4_000_000) -> float:
    """Variance given x_t of the score target given x_s, minus that given x_0, on data N(0, 1) and a flow's path."""
    stream = torch.Generator().manual_seed(seed)
    x_0, first, second = (torch.randn(count, generator=stream) for _ in range(3))
    ratio = (1 - t) / (1 - s)
    spread = (t**2 - (ratio * s) ** 2) ** 0.5
    x_s = (1 - s) * x_0 + s * first
    x_t = ratio * x_s + spread * second
    clean, noisy = -(x_t - (1 - t) * x_0) / t**2, -(x_t - ratio * x_s) / spread**2

    def left(target: Tensor) -> float:
        """Variance that x_t does not explain; all is Gaussian, so that a line does."""
        slope = (target * x_t).mean() / x_t.square().mean()
        return float((target - slope * x_t).var())

    return left(noisy) - left(clean)


def _variance_check(found: Measured) -> Measured:
    return {
        "name": "1 variance of the targets",
        "demand": f"excess within {100 * VARIANCE:g} % of kappa at {len(PAIRS)} pairs of times",
        "measured": f"{100 * found['worst']:.2f} %",
        "holds": found["worst"] <= VARIANCE,
        "per_seed": found["rows"],
    }


def _gradient_check(own: Measured, other: Measured) -> Measured:
    ratio = own["snr"] / max(other["snr"], 1e-12)
    return {
        "name": f"2 gradients of {BATCHES} batches",
        "demand": f"signal to noise >= {SNR:g} x Flow-GRPO's; cosine >= {COSINES[0]:g}, Flow-GRPO's <= {COSINES[1]:g}",
        "measured": f"{own['snr']:.3f} against {other['snr']:.3f}; {own['cosine']:.3f} against {other['cosine']:.3f}",
        "holds": ratio >= SNR and own["cosine"] >= COSINES[0] and other["cosine"] <= COSINES[1],
        "per_seed": [{"awm": own, "flow_grpo": other}],
    }
