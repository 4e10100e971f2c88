"""Claim check of DiffusionNFT (arXiv 2509.16117); ``unveil reproduce diffusion_nft``.

The digits of `image_learning`. Every method has its best learning rate of one grid, chosen on a seed that is not
reported: first to reach the goal (judge accuracy of 90 %), or else the best end. The judge looks after every update.

1. Identities in float64 of the plain loss, from the system's own branches: its expansion in d = v - v_old, and no
   policy gradient at r = 1/2 and d = 0; both to 1e-10.
2. Updates to the goal: Flow-GRPO / DiffusionNFT >= 1.7 in the mean.
3. Network evaluations to the goal: Flow-GRPO / DiffusionNFT >= 1.2 in the mean.
4. Distance to the nearest real image at the goal at least 8 % below Flow-GRPO's, in the mean.
5. Without the negative branch, at DiffusionNFT's learning rate: updates to the goal >= 1.6 x in the mean.
Reported without a demand: old by copies (type 0), beta 0.1, SDE rollouts; diversity, Frechet distance, cost.
A method that never reaches the goal counts as infinitely slow; if DiffusionNFT itself does not, 2 to 5 fail.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch

from unveil.claims.image_learning import (
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
    tune,
    two_processes,
)
from unveil.processes.kernels import FlowSde
from unveil.samplers.latent_solvers import DpmSolver2M
from unveil.systems.diffusion_nft import DiffusionNft, ImplicitLikelihood, Optimality, old_schedule
from unveil.training.snapshots import SnapshotConfig

UPDATES = 40
TUNED = ("diffusion_nft", "flow_grpo")
ABLATIONS = ("positive branch", "old by copies", "beta 0.1", "SDE rollouts")
FASTER, CHEAPER, NEARER, NEGATIVE = 1.7, 1.2, 0.92, 1.6


def reproduce(seeds: int, quick: bool, out: Path, report: Report) -> Measured:
    """Run the check.

    Args:
        seeds: independent repetitions.
        quick: a quarter of the training, one learning rate for all and no ablation but the negative branch's.
        out: folder for curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    updates = UPDATES // 4 if quick else UPDATES
    methods = (*TUNED, *(ABLATIONS[:1] if quick else ABLATIONS))
    with two_processes(report) as every:
        exact = every(_exact, [(0,)])[0]
        best = dict.fromkeys(TUNED, LEARNING_RATES[1])
        if not quick:
            best = tune(every, _learn, out, dict.fromkeys(TUNED, LEARNING_RATES), updates, soonest)
        rates = {method: best.get(method, best["diffusion_nft"]) for method in methods}
        by_method = on_seeds(every, _learn, out, seeds, rates, updates)
    checks = [_exact_check(exact), *_checks(by_method)]
    return concluded(
        "diffusion_nft", checks, all_runs(by_method), started, table(by_method, rates), learning_rates=rates
    )


def diffusion_nft(name: str = "diffusion_nft") -> Method:
    """The method, or one of the ablations."""
    choices, kind = DiffusionNft(), 1
    sampler = ode(solver=DpmSolver2M())
    if name == "positive branch":
        choices.weighting = Optimality(branches="positive")
    elif name == "old by copies":
        kind = 0
    elif name == "beta 0.1":
        choices.likelihood = ImplicitLikelihood(beta=0.1)
    elif name == "SDE rollouts":
        sampler = ode(kernel=FlowSde(noise=0.7))
    snapshots = SnapshotConfig(old=old_schedule(cast(Any, kind)))
    return Method(sampler=sampler, choices=vars(choices), snapshots=snapshots, drawn_by="old")


def _learn(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    own = flow_grpo() if method == "flow_grpo" else diffusion_nft(method)
    return learn(own, out / f"{method.replace(' ', '-')}-{lr:g}-{seed}", seed=seed, lr=lr, updates=updates)


def _exact(seed: int) -> Measured:
    """Largest deviations, over beta and r, of the loss from its expansion and of the gradient at r = 1/2 from 0."""
    stream, count, size = torch.Generator().manual_seed(seed), 11, 64
    target, old, new = (torch.randn(count, size, generator=stream, dtype=torch.float64) for _ in range(3))
    r = torch.linspace(0, 1, count, dtype=torch.float64)

    def loss(at: torch.Tensor, beta: float, r: torch.Tensor) -> torch.Tensor:
        found = ImplicitLikelihood(beta=beta, loss="x0").log_prob(at, old, target, torch.ones_like(r))
        return -beta * (torch.stack([r, 1 - r], 1) * found).sum(1)

    expansion = still = 0.0
    for beta in (0.1, 1.0):
        d, error = new - old, old - target
        mixed = (error * error).mean(1) + 2 * beta * (2 * r - 1) * (d * error).mean(1) + beta**2 * (d * d).mean(1)
        expansion = max(expansion, float((loss(new, beta, r) - mixed).abs().max()))
        at = old.clone().requires_grad_()
        loss(at, beta, torch.full_like(r, 0.5)).sum().backward()
        assert at.grad is not None
        still = max(still, float(at.grad.abs().max()))
    return {"expansion": expansion, "still": still, "line": f"expansion {expansion:.1e}, gradient {still:.1e}"}


def _exact_check(found: Measured) -> Measured:
    return {
        "name": "1 identities",
        "demand": "expansion and zero gradient to 1e-10",
        "measured": f"{found['expansion']:.1e}; {found['still']:.1e}",
        "holds": found["expansion"] <= 1e-10 and found["still"] <= 1e-10,
        "per_seed": [{name: found[name] for name in ("expansion", "still")}],
    }


def _checks(by_method: dict[str, list[Measured]]) -> list[Measured]:
    own, other, positive = (by_method[name] for name in ("diffusion_nft", "flow_grpo", "positive branch"))
    return [
        ratio_check("2 updates to the goal, Flow-GRPO / DiffusionNFT", other, own, FASTER),
        ratio_check("3 network evaluations to the goal, Flow-GRPO / DiffusionNFT", other, own, CHEAPER, "spent"),
        distance_check("4 distance to real images at the goal", other, own, NEARER),
        ratio_check("5 updates to the goal, without / with the negative branch", positive, own, NEGATIVE),
    ]
