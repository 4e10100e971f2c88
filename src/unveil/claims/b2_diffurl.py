"""Claim check of B2-DiffuRL (arXiv 2503.11240); ``unveil reproduce b2_diffurl``.

Digits of 8 x 8 pixels; the base model is a flow that follows its prompt half of the time. Reward: the probability of
the wanted digit under a classifier that saw one half of the real images; judge: another classifier, of the other half.
12 steps of DDIM with eta 1. An update asks 250 rewards (50 stems of 5 leaves; 240 of DDPO and BPT) and makes two
gradient steps: two passes over the chosen leaves, or two halves of DDPO's chains. The suffix grows from 8 steps to 12.
Images for the judge are decoded by the ODE. Every method has its best learning rate of one grid, chosen on a seed that
is not reported (first to reach the goal, or else the best end).

1. Gradient of the suffix at the base model, from the chosen leaves of 50 stems and from 250 independent chains: the
   cosine of two independent estimates is >= 1.5 times as large, in the mean.
2. The share of the reward's variance (within a prompt) that lies within stems rises with the suffix, in the mean, and
   is 1 within 5 % for chains that share nothing.
3. At the same judge accuracy (0.95, or the highest that both reach; interpolated) the images of the full method are
   >= 5 % more diverse than DDPO's, in the mean.
4. With the training forwards that DDPO has spent after 8 updates, judge accuracy is >= 0.10 above DDPO's, in the mean.
Reported without a demand: both halves of the method, accuracy by updates, the end, distance to real images, cost.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unveil.claims.image_learning import (
    BASE,
    LEARNING_RATES,
    PROMPTS,
    Method,
    crossing,
    learn,
    look_cells,
    reached_cell,
    soonest,
)
from unveil.claims.image_learning import GROUP as DDPO_GROUP
from unveil.claims.image_learning import SHAPE as TEN_STEPS
from unveil.claims.laboratory import (
    COSTS,
    Measured,
    Report,
    all_runs,
    concluded,
    cost_cells,
    markdown_table,
    mean,
    on_seeds,
    spread,
    train_policy,
    tune,
    two_processes,
)
from unveil.denoisers.load import load_denoiser
from unveil.learning.objectives import Clipped
from unveil.processes.kernels import Ddim
from unveil.rewards.images import ClassProbability
from unveil.samplers.latent import LatentSampler
from unveil.seeds import derive_seed
from unveil.systems.b2_diffurl import Suffix, variant
from unveil.systems.ddpo import Ddpo
from unveil.tasks.digits import Digits
from unveil.tasks.evaluate import Evaluation, judge, sample_problems
from unveil.training.policy_job import PolicyJob

GOAL, UPDATES, POINTS = 0.95, 40, 20
STEPS, STEMS, LEAVES = 12, 50, 5
FIRST = 8
METHODS = ("ddpo", "bpt", "bs", "both")
COSINES, MORE_DIVERSE, MORE_ACCURATE, BUDGET_UPDATES = 1.5, 1.05, 0.10, 8
ESTIMATES, SUFFIXES, PART_STEMS = 8, (2, 4, 6, 8, 10), 200
SHAPE = TEN_STEPS | {"steps": STEPS}


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
        cosines, shares = (every(part, [(out, seed) for seed in range(seeds)]) for part in (_cosines, _shares))
        if not quick:
            best = tune(every, _policy, out, dict.fromkeys(METHODS, rates), updates, soonest)
        by_method = on_seeds(every, _policy, out, seeds, best, updates)
    checks = [_cosine_check(cosines), _share_check(shares), _diversity_check(by_method), _budget_check(by_method)]
    return concluded("b2_diffurl", checks, all_runs(by_method), started, _table(by_method, best), learning_rates=best)


def _method(name: str, suffix: Suffix, group: int = DDPO_GROUP, **changes: Any) -> Method:
    """``group``: chains of a prompt where nothing branches."""
    if name == "ddpo":
        sampler = LatentSampler(kernel=Ddim(eta=1.0), **SHAPE)
        choices = vars(Ddpo(objective=Clipped(clip=0.1, level="step")))
    else:
        sampler, own = variant(name, suffix, LEAVES, **SHAPE)
        choices = vars(own)
    branches = sampler.branches is not None
    if not branches:
        choices = choices | {"inner_updates": 1, "minibatches": 2}
    prompts, size = (STEMS, LEAVES) if branches else (PROMPTS, group)
    return Method(sampler=sampler, choices=choices | changes, prompts=prompts, group=size)


def _gradient(out: Path, seed: int, method: str) -> Tensor:
    """Of the loss of one update at the base model, for a suffix of `FIRST` steps; all parameters in a row."""
    found: list[Tensor] = []

    def measure(job: PolicyJob) -> Measured:
        gradients = [p.grad.flatten() for p in job.trainer.parameters if p.grad is not None]
        found.append(torch.cat(gradients) if gradients else torch.zeros(0))
        return {}

    whole = (STEMS * LEAVES) // PROMPTS
    own = _method(method, Suffix(first=FIRST, last=FIRST, stages=1), whole, inner_updates=1, minibatches=1)
    folder = out / f"gradient-{method}-{seed}"
    train_policy(load_denoiser(BASE), own.policy(), folder, seed=seed, lr=1e-30, updates=1, measure=measure)
    return found[-1].double()


def _cosines(out: Path, seed: int) -> Measured:
    """Mean cosine of pairs of `ESTIMATES` independent gradients, from branches and from independent chains."""
    found: Measured = {}
    for method in ("both", "bpt"):
        own = [_gradient(out, derive_seed(seed, "estimate", n) % 2**31, method) for n in range(ESTIMATES)]
        pairs = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(own, 2)]
        found[method] = statistics.mean(pairs)
    return found | {"line": f"branches {found['both']:.3f}, independent chains {found['bpt']:.3f}"}


def _shares(out: Path, seed: int) -> Measured:
    """Of the variance of the reward within a prompt, what lies within stems; unbiased, so the last may be above 1."""
    task, reward, denoiser = Digits(), ClassProbability(network="digits-reward"), load_denoiser(BASE)
    stems = task.problems("train", PART_STEMS, seed)
    rows = [problem for problem in stems for _ in range(LEAVES)]
    labels = torch.tensor([problem.answer["label"] for problem in stems])
    found: Measured = {}
    for length in (*SUFFIXES, STEPS):
        suffix = Suffix(first=length, last=length, stages=1)
        sampler, _ = variant("bpt" if length == STEPS else "both", suffix, LEAVES, **SHAPE)
        with torch.no_grad():
            chains = sample_problems(denoiser, rows, sampler, seed=seed, needs=set(), batch_size=250)
            images = judge(task, rows, denoiser, chains).samples
        told = [problem.answer for problem in rows]
        scores = torch.tensor(reward.scores(images, [problem.prompt for problem in rows], told), dtype=torch.float64)
        scores = scores.view(-1, LEAVES)
        within = scores.var(1).mean()
        between = torch.stack([scores[labels == label].mean(1).var() for label in labels.unique()]).mean()
        found[str(length)] = float(within / (within + between - within / LEAVES))
    return found | {"line": ", ".join(f"{length}: {share:.2f}" for length, share in found.items())}


def _policy(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    """Train one method, its suffix growing over all updates."""
    suffix = Suffix(first=FIRST, last=STEPS, stages=updates)
    own = _method(method, suffix)

    def training(job: PolicyJob, found: Evaluation) -> Measured:
        rolled = sum(_rolled(own, suffix.length(update)) for update in range(job.trainer.done))
        return {"training": job.trainer.cost.forwards - rolled}

    return learn(
        own, out / f"{method}-{lr:g}-{seed}", seed=seed, lr=lr, updates=updates, points=POINTS, goal=GOAL,
        decoder=LatentSampler(**SHAPE), also=training,
    )  # fmt: skip


def _rolled(method: Method, suffix: int) -> int:
    """Forwards of the rollouts of an update; before the suffix there is one chain per stem."""
    sampler = method.sampler
    prefix = STEPS - suffix if sampler.branches and isinstance(sampler.window, Suffix) else 0
    return method.prompts * (prefix + method.group * (STEPS - prefix))


def _cosine_check(results: list[Measured]) -> Measured:
    branches, chains = mean(results, "both"), mean(results, "bpt")
    return {
        "name": "1 gradient of the suffix: cosine of independent estimates",
        "demand": f"branches >= {COSINES:g} x independent chains at equal rewards asked",
        "measured": f"{branches:.3f} against {chains:.3f}: {branches / chains:.2f}",
        "holds": branches >= COSINES * chains,
        "per_seed": [{k: v for k, v in result.items() if k != "line"} for result in results],
    }


def _share_check(results: list[Measured]) -> Measured:
    shares = [mean(results, str(length)) for length in (*SUFFIXES, STEPS)]
    return {
        "name": "2 share of the reward's variance within stems",
        "demand": "rises with the suffix; 1 within 5 % where nothing is shared",
        "measured": ", ".join(f"{n}: {share:.2f}" for n, share in zip((*SUFFIXES, STEPS), shares, strict=True)),
        "holds": shares[:-1] == sorted(shares[:-1]) and abs(shares[-1] - 1) <= 0.05,
        "per_seed": [{k: v for k, v in result.items() if k != "line"} for result in results],
    }


def _diversity_check(by_method: dict[str, list[Measured]]) -> Measured:
    pairs = []
    for ours, plain in zip(by_method["both"], by_method["ddpo"], strict=True):
        level = min(GOAL, *(max(at["accuracy"] for at in run["curve"]) for run in (ours, plain)))
        own, other = (crossing(run, "accuracy", level, "diversity") for run in (ours, plain))
        pairs.append({"accuracy": level, "both": own, "ddpo": other})
    own, other = (statistics.mean(pair[name] for pair in pairs) for name in ("both", "ddpo"))
    return {
        "name": "3 diversity at equal judge accuracy",
        "demand": f"full method >= {MORE_DIVERSE:g} x DDPO",
        "measured": f"{own:.3f} against {other:.3f}: {own / other:.2f}",
        "holds": own >= MORE_DIVERSE * other,
        "per_seed": pairs,
    }


def _budget_check(by_method: dict[str, list[Measured]]) -> Measured:
    pairs = []
    for ours, plain in zip(by_method["both"], by_method["ddpo"], strict=True):
        budget = crossing(plain, "update", BUDGET_UPDATES, "training")
        own, other = (crossing(run, "training", budget, "accuracy") for run in (ours, plain))
        pairs.append({"training": budget, "both": own, "ddpo": other})
    own, other = (statistics.mean(pair[name] for pair in pairs) for name in ("both", "ddpo"))
    return {
        "name": f"4 judge accuracy with the training forwards of DDPO's first {BUDGET_UPDATES} updates",
        "demand": f"full method >= DDPO + {MORE_ACCURATE:.2f}",
        "measured": f"{own:.3f} against {other:.3f}",
        "holds": own >= other + MORE_ACCURATE,
        "per_seed": pairs,
    }


def _table(by_method: dict[str, list[Measured]], best: dict[str, float]) -> str:
    rows: list[list[object]] = []
    for method, results in by_method.items():
        at = [spread([crossing(r, "update", update, "accuracy") for r in results]) for update in (8, 16, 24)]
        end, trained = spread([r["accuracy"] for r in results]), mean([r["curve"][-1] for r in results], "training")
        cells = [*at, end, reached_cell(results), *look_cells(results), f"{trained:.0f}", *cost_cells(results)]
        rows.append([method, f"{best[method]:g}", *cells])
    head = ["method", "lr", "judge % after 8", "after 16", "after 24", "at the end", "updates to the goal", "distance"]
    head += ["diversity", "Frechet", "training forwards", *COSTS.values()]
    return markdown_table(head, rows)
