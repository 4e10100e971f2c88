"""Claim check of AlignProp (arXiv 2310.03739), with DRaFT (2309.17400) and ReFL (2304.05977); ``unveil reproduce
alignprop``.

The digits of `image_learning`. Every method makes 80 gradient steps: direct gradients one per 40 images (10 prompts x
4), DDPO-IS four per 240 images as in the check of Flow-GRPO, and once more with four per 160, the same 40 images a
step. Rollouts are those of DDIM with eta 1, DDPO's clip range is that of 64 dimensions. AlignProp and both DDPOs have
their best learning rate of one grid, chosen on a seed that is not reported (first to reach the goal, a judge accuracy
of 90 %, or else the best end); the variants have AlignProp's. A query is an image that the reward is asked about
(direct gradients ask of each twice: to log, and to differentiate). Values at the goal are interpolated between two
looks.

1. Exact part, on the base network in float64: the gradient through all 10 steps agrees with central differences of the
   mean reward of samples drawn anew, in 4 weights, for the ODE and for DDIM with eta 1, to 1e-6 of its size.
2. Reward queries to the goal: DDPO-IS / AlignProp >= 3 in the mean. (The paper: about 25.)
3. The same with 40 images per gradient step in both: >= 2 in the mean.
4. It over-optimises sooner: after the 80 steps images are less diverse than DDPO-IS's by 10 % at least, and further
   from real ones by 10 % at least, in the mean.
5. It over-optimises harder: at the goal, where both are judged equally good, its images are less diverse than
   DDPO-IS's, in the mean.
Reported without a demand: DRaFT, DRaFT-1, DRaFT-LV, ReFL; Frechet distance, cost.
A method that never reaches the goal counts as infinitely slow; if AlignProp itself does not, 2, 3 and 5 fail.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unveil.claims.image_learning import (
    BASE,
    CLIP,
    GOAL,
    LEARNING_RATES,
    SHAPE,
    Method,
    crossing,
    learn,
    ratio_check,
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
    tune,
    two_processes,
)
from unveil.denoisers.load import load_denoiser
from unveil.learning.objectives import Clipped
from unveil.learning.views import Asked
from unveil.processes.kernels import Ddim
from unveil.rewards.images import PixelStatistic
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latents import Noise
from unveil.systems.alignprop import RolloutReward, variant
from unveil.systems.ddpo import Ddpo

STEPS, LOOKS = 80, 20
GROUPS = {"ddpo": 24, "ddpo 40": 16}
MINIBATCHES, GROUP = 4, 4
TUNED = ("alignprop", *GROUPS)
VARIANTS = ("draft", "draft_1", "draft_lv", "refl")
FEWER, FEWER_ALIKE, LESS_DIVERSE, FURTHER = 3.0, 2.0, 0.9, 1.1


def reproduce(seeds: int, quick: bool, out: Path, report: Report) -> Measured:
    """Run the check.

    Args:
        seeds: independent repetitions.
        quick: a quarter of the training, one learning rate for all and no variant.
        out: folder for curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    steps = STEPS // 4 if quick else STEPS
    with two_processes(report) as every:
        exact = every(_exact, [(0,)])[0]
        best = dict.fromkeys(TUNED, LEARNING_RATES[1])
        if not quick:
            best = tune(every, _learn, out, dict.fromkeys(TUNED, LEARNING_RATES), steps, soonest)
        rates = best | ({} if quick else dict.fromkeys(VARIANTS, best["alignprop"]))
        by_method = on_seeds(every, _learn, out, seeds, rates, steps)
    checks = [_exact_check(exact), *_checks(by_method)]
    return concluded("alignprop", checks, all_runs(by_method), started, table(by_method, rates), learning_rates=rates)


def _method(name: str) -> Method:
    sampler = LatentSampler(kernel=Ddim(eta=1.0), **SHAPE)
    if name in GROUPS:
        choices = vars(Ddpo(objective=Clipped(clip=CLIP, level="step"), minibatches=MINIBATCHES))
        return Method(sampler=sampler, choices=choices, group=GROUPS[name])
    return Method(sampler=sampler, choices=vars(variant(cast(Any, name))), group=GROUP)


def _learn(out: Path, seed: int, name: str, lr: float, steps: int) -> Measured:
    """Train one method for so many gradient steps; what it had spent and what its images were like at the goal."""
    updates = steps // MINIBATCHES if name in GROUPS else steps
    folder = out / f"{name.replace(' ', '-')}-{lr:g}-{seed}"
    run = learn(_method(name), folder, seed=seed, lr=lr, updates=updates, points=LOOKS)
    never = run["reached"] is None
    return run | {
        "queries": math.inf if never else crossing(run, "accuracy", GOAL, "queries"),
        "goal_diversity": math.nan if never else crossing(run, "accuracy", GOAL, "diversity"),
    }


def _exact(seed: int) -> Measured:
    """Largest deviation of a gradient from central differences, as a share of the largest of them."""
    found = {name: _deviation(Ddim(eta=eta), seed) for name, eta in (("ode", 0.0), ("ddim", 1.0))}
    return found | {"line": ", ".join(f"{name} {value:.1e}" for name, value in found.items())}


def _deviation(kernel: Ddim, seed: int) -> float:
    denoiser: Any = load_denoiser(BASE).double()
    network = denoiser.network
    inner = network.forward
    network.forward = lambda x, t, ids: inner(x.double(), t.double(), ids)  # chains start in float32
    sampler, reward, prompts = LatentSampler(kernel=kernel, **SHAPE), PixelStatistic(statistic="contrast"), ["3", "8"]
    seeds = [seed, seed + 1]
    start = Noise(condition=denoiser.condition(prompts), problems=seeds, copies=[0, 0])
    likelihood = RolloutReward()
    weights = [weight for weight in denoiser.parameters() if weight.dim() > 1][-4:]

    def rolled() -> Any:
        return sampler.sample(denoiser, start, seeds, needs=likelihood.needs)

    def worth(samples: Tensor) -> Tensor:
        return reward.values(denoiser.decode(samples), prompts, [{}, {}]).mean()

    chains = rolled()
    views = likelihood.views(chains, chains.active.float(), seeds, denoiser.spec)
    asked = Asked(reward=reward, prompts=prompts, metadata=[{}, {}])
    likelihood.score(denoiser, likelihood.rewarded(views, asked), sampler).log_prob.mean().backward()
    slopes, differences = [], []
    for weight in weights:
        assert weight.grad is not None
        place = int(weight.grad.abs().argmax())
        slopes.append(float(weight.grad.flatten()[place]))
        ends = []
        with torch.no_grad():
            for change in (1e-5, -2e-5):
                weight.view(-1)[place] += change
                ends.append(float(worth(rolled().samples)))
            weight.view(-1)[place] += 1e-5
        differences.append((ends[0] - ends[1]) / 2e-5)
    size = max(map(abs, differences))
    return max(abs(a - b) for a, b in zip(slopes, differences, strict=True)) / size


def _exact_check(found: Measured) -> Measured:
    worst = max(found["ode"], found["ddim"])
    return {
        "name": "1 gradient through the chain against central differences",
        "demand": "within 1e-6 of its size",
        "measured": f"{found['ode']:.1e} (ODE), {found['ddim']:.1e} (DDIM, eta 1)",
        "holds": worst <= 1e-6,
        "per_seed": [{name: found[name] for name in ("ode", "ddim")}],
    }


def _checks(by_method: dict[str, list[Measured]]) -> list[Measured]:
    own, other, alike = (by_method[name] for name in ("alignprop", "ddpo", "ddpo 40"))
    return [
        ratio_check("2 reward queries to the goal, DDPO-IS / AlignProp", other, own, FEWER, "queries"),
        ratio_check("3 the same at 40 images per gradient step", alike, own, FEWER_ALIKE, "queries"),
        _end_check(other, own),
        _goal_check(other, own),
    ]


def _end_check(other: list[Measured], own: list[Measured]) -> Measured:
    ends = [{name: (a["curve"][-1][name], b["curve"][-1][name]) for name in ("diversity", "distance")}
            for a, b in zip(other, own, strict=True)]  # fmt: skip
    theirs, ours = ({name: statistics.mean(end[name][side] for end in ends) for name in ends[0]} for side in (0, 1))
    spread, far = (ours[name] / theirs[name] for name in ("diversity", "distance"))
    return {
        "name": "4 at the end of equally many gradient steps, AlignProp / DDPO-IS",
        "demand": f"diversity <= {LESS_DIVERSE:g} and distance to real images >= {FURTHER:g}, in the mean",
        "measured": f"diversity {ours['diversity']:.2f} against {theirs['diversity']:.2f}: {spread:.2f}; "
        f"distance {ours['distance']:.2f} against {theirs['distance']:.2f}: {far:.2f}",
        "holds": spread <= LESS_DIVERSE and far >= FURTHER,
        "per_seed": [{name: {"other": pair[0], "own": pair[1]} for name, pair in end.items()} for end in ends],
    }


def _goal_check(other: list[Measured], own: list[Measured]) -> Measured:
    theirs, ours = (mean(runs, "goal_diversity") for runs in (other, own))
    return {
        "name": "5 diversity at equal judge accuracy",
        "demand": "below DDPO-IS's, in the mean",
        "measured": f"{ours:.2f} against {theirs:.2f}",
        "holds": ours < theirs,
        "per_seed": [
            {"other": a["goal_diversity"], "own": b["goal_diversity"]} for a, b in zip(other, own, strict=True)
        ],
    }
