"""Claim check of GRPO-Guard (arXiv 2510.22319); ``unveil reproduce grpo_guard``.

Digits of 8 x 8 pixels, the embedded base model, Flow-GRPO's SDE with 10 steps of which 9 are trained, 10 prompts x 24
images per update, full-batch gradient steps. Reward (*proxy*): a classifier of one half of the real images.

1. Exact parts, in double precision: log rho^ is the mean of D z; the value is 1 at the first gradient step.
2. Ratio statistics at the last of 4 gradient steps per rollout, learning rate 1e-3, noise 0.7 and 0.15, over the first
   updates of a run. With Guard the mean is within 0.15 deviations at every step; the deviations of the steps are spread
   at least twice less than the baseline's; at noise 0.15 the shares of good and bad samples that are clipped at the
   cleanest step differ by at most 0.2, where the baseline's differ by at least 0.3. The clip range of each method is
   half of the deviation that its log-ratio has at the cleanest trained step after one gradient step, on the tuning
   seed: both bind, in their own units.
3. Learning with many small steps: learning rate 3e-4, 6 gradient steps per rollout, 40 updates. Each method at the best
   clip range of three, a factor of 3 apart, on a seed that is not reported (nearest to real images at equal proxy). At
   proxy 0.95 and 0.98 (interpolated) the mean distance to the nearest real image is at least 3 % lower with Guard, and
   after the last update at least 8 % lower.
Reported without a demand: accuracy of a judge of the other half of the images, diversity, Frechet distance, the ratio
without its scale (``mean only``), cost.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from unveil.claims.image_learning import BASE, SHAPE, SHOWN, Method, crossing, learn, look_cells
from unveil.claims.laboratory import (
    COSTS,
    TUNING_SEED,
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
from unveil.processes.gaussian import Gaussian
from unveil.processes.kernels import FlowSde
from unveil.samplers.latent import LatentSampler
from unveil.systems.grpo_guard import GrpoGuard, RegulatedRatio, StepWeighted
from unveil.tasks.digits import Digits
from unveil.tasks.evaluate import Evaluation
from unveil.training.policy_job import PolicyJob

RATE, INNER, UPDATES, POINTS = 3e-4, 6, 40, 20
STATISTICS_RATE, STATISTICS_INNER, STATISTICS_UPDATES = 1e-3, 4, 3
NOISES = (0.7, 0.15)
METHODS = {"flow_grpo": ("none", "one"), "mean only": ("mean_only", "one"), "guard": ("ratio_norm", "inverse_length")}
"""Ratio and step weight."""
CLIPS = {
    "flow_grpo": (3e-4, 1e-3, 3e-3),
    "mean only": (3e-4, 1e-3, 3e-3),
    "guard": (6e-5, 2e-4, 6e-4),
}
"""One factor apart; Guard's log-ratios have the steps' deviations as a further factor, 0.1 to 0.6."""
LEVELS = (0.95, 0.98)
CENTRED, NARROWED, EVEN, UNEVEN = 0.15, 2.0, 0.2, 0.3
NEARER, NEARER_AT_THE_END = 0.03, 0.08


def reproduce(seeds: int, quick: bool, out: Path, report: Report) -> Measured:
    """Run the check.

    Args:
        seeds: independent repetitions.
        quick: a quarter of the training and the middle clip range: shows that everything runs, and how.
        out: folder for curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    updates = UPDATES // 4 if quick else UPDATES
    best = {method: clips[1] for method, clips in CLIPS.items()}
    pairs = [(noise, method) for noise in NOISES for method in ("flow_grpo", "guard")]
    with two_processes(report) as every:
        exact = every(_exact, [(out, 0)])[0]
        probes = every(_ratios, [(out, TUNING_SEED, method, noise, 1.0, 2, 1) for noise, method in pairs])
        clips = {pair: probe["std"][-1] / 2 for pair, probe in zip(pairs, probes, strict=True)}
        how = (STATISTICS_INNER, STATISTICS_UPDATES)
        jobs = [(out, seed, m, noise, clips[noise, m], *how) for seed in range(seeds) for noise, m in pairs]
        measured = every(_ratios, jobs)
        ratios = {(job[1], job[3], job[2]): found for job, found in zip(jobs, measured, strict=True)}
        if not quick:
            best = tune(every, _policy, out, CLIPS, updates, _tuning_order)
        by_method = on_seeds(every, _policy, out, seeds, best, updates)
    checks = [_exact_check(exact), *_ratio_checks(ratios, seeds), *_learning_checks(by_method)]
    both = _table(by_method, best) + "\n\n" + _ratio_table(ratios, seeds)
    return concluded("grpo_guard", checks, [*all_runs(by_method), *measured], started, both, clips=best)


def _method(name: str, noise: float, clip: float, inner: int) -> Method:
    ratio, delta = METHODS[name]
    choices = GrpoGuard(
        likelihood=RegulatedRatio(ratio=ratio),  # type: ignore[arg-type]
        weighting=StepWeighted(delta=delta),  # type: ignore[arg-type]
        objective=Clipped(clip=clip, level="step"),
        minibatches=1,
    )
    sampler = LatentSampler(kernel=FlowSde(noise=noise), **SHAPE)
    return Method(sampler=sampler, choices=vars(choices) | {"inner_updates": inner})


def _ratios(out: Path, seed: int, method: str, noise: float, clip: float, inner: int, updates: int) -> Measured:
    """Per trained step, from noisy to clean, at the last gradient steps: mean and deviation of the log-ratio and shares
    of clipped samples."""
    run = train_policy(
        load_denoiser(BASE), _method(method, noise, clip, inner).policy(),
        out / f"ratios-{method}-{noise:g}-{clip:.2g}-{seed}", seed=seed, lr=STATISTICS_RATE,
        updates=updates, measure=lambda job: {}, points=1,
    )  # fmt: skip

    def over_updates(name: str) -> list[float]:
        return [statistics.mean(step) for step in zip(*(line[f"steps/{name}"] for line in run["metrics"]), strict=True)]

    found = {key: run[key] for key in COSTS}
    found |= {"mean": over_updates("log_ratio_mean"), "std": over_updates("log_ratio_std")}
    found |= {"good": over_updates("clipped_good"), "bad": over_updates("clipped_bad")}
    return found | {"line": f"deviation {found['std'][0]:.1e} .. {found['std'][-1]:.1e}, clipped at the cleanest step "
                    f"{found['good'][-1]:.2f} of the good, {found['bad'][-1]:.2f} of the bad"}  # fmt: skip


def _policy(out: Path, seed: int, method: str, clip: float, updates: int) -> Measured:
    """Train one method and follow the proxy and the distance to real images."""
    own, held_out = _method(method, NOISES[0], clip, INNER), Digits().problems("test", SHOWN, 0)
    prompts, told = [problem.prompt for problem in held_out], [problem.answer for problem in held_out]

    def proxy(job: PolicyJob, found: Evaluation) -> Measured:
        scores = job.policy.reward.scores(found.samples, prompts, told)
        return {"proxy": statistics.mean(scores)}  # type: ignore[type-var]

    folder = out / f"{method.replace(' ', '-')}-{clip:g}-{seed}"
    run = learn(own, folder, seed=seed, lr=RATE, updates=updates, points=POINTS, also=proxy)
    first, end = run["curve"][0], run["curve"][-1]
    line = (
        f"proxy {first['proxy']:.3f} -> {end['proxy']:.3f}, distance {first['distance']:.3f} -> {end['distance']:.3f}"
    )
    return run | {"end": end["distance"], "line": line}


def _at(run: Measured, level: float) -> float | None:
    """Distance to real images when the proxy first reaches ``level``; None if it does not."""
    reached = any(at["proxy"] >= level for at in run["curve"])
    return crossing(run, "proxy", level, "distance") if reached else None


def _tuning_order(run: Measured) -> tuple[int, float]:
    """Runs that reach more levels first, and of those the nearest to real images at the levels they reach."""
    reached = [value for value in (_at(run, level) for level in LEVELS) if value is not None]
    return -len(reached), statistics.mean(reached) if reached else -run["curve"][-1]["proxy"]


def _exact(out: Path, seed: int) -> Measured:
    """The identity on 1,000 random steps in double precision, and the first ratios of a run."""
    stream = torch.Generator().manual_seed(seed)
    old_mean, shift, noise = (torch.randn(1000, 64, generator=stream, dtype=torch.float64) for _ in range(3))
    std = torch.rand(1000, generator=stream, dtype=torch.float64) + 0.01
    old, new = Gaussian(old_mean, std), Gaussian(old_mean + 1e-3 * shift, std)
    after = old.sample(noise)
    difference = new.log_prob(after, "mean") - old.log_prob(after, "mean")
    longer = std * (difference + (new.mean - old.mean).square().mean(1) / (2 * std**2))
    found = RegulatedRatio().log_ratio(new, old, after)
    error = float(torch.maximum((found - (1e-3 * shift * noise).mean(1)).abs(), (found - longer).abs()).max())
    run = train_policy(
        load_denoiser(BASE), _method("guard", NOISES[0], 1e-4, 1).policy(), out / "exact", seed=seed, lr=1e-30,
        updates=1, measure=lambda job: {}, points=1,
    )  # fmt: skip
    ratio = run["metrics"][0]["ratio_deviation"]
    return {"identity": error, "ratio": ratio, "line": f"identity to {error:.0e}, |ratio - 1| {ratio:.0e}"}


def _exact_check(found: Measured) -> Measured:
    return {
        "name": "1 identity, first ratios",
        "demand": "log rho^ is the mean of D z to 1e-12; |ratio - 1| <= 1e-6 in the mean",
        "measured": f"{found['identity']:.0e}; {found['ratio']:.0e}",
        "holds": found["identity"] <= 1e-12 and found["ratio"] <= 1e-6,
        "per_seed": [{k: v for k, v in found.items() if k != "line"}],
    }


def _ratio_checks(ratios: dict[tuple[int, float, str], Measured], seeds: int) -> list[Measured]:
    """Three checks, on every seed."""
    numbers: list[Measured] = []
    for seed in range(seeds):
        own: Measured = {"seed": seed}
        for noise in NOISES:
            plain, guard = (ratios[seed, noise, method] for method in ("flow_grpo", "guard"))
            off = {
                name: max(abs(m) / s for m, s in zip(one["mean"], one["std"], strict=True))
                for name, one in (("baseline", plain), ("guard", guard))
            }
            own[f"{noise:g}"] = {
                "off": off["guard"],
                "off_baseline": off["baseline"],
                "narrowed": _width(plain["std"]) / _width(guard["std"]),
                "uneven": abs(guard["good"][-1] - guard["bad"][-1]),
                "uneven_baseline": abs(plain["good"][-1] - plain["bad"][-1]),
            }
        numbers.append(own)

    def all_of(key: str, *noises: float) -> list[float]:
        return [own[f"{noise:g}"][key] for own in numbers for noise in noises]

    shifted, before = all_of("off", *NOISES), all_of("off_baseline", *NOISES)
    narrowed = all_of("narrowed", *NOISES)
    uneven, uneven_before = all_of("uneven", NOISES[1]), all_of("uneven_baseline", NOISES[1])
    return [
        {
            "name": "2a the mean of the log-ratio",
            "demand": f"within {CENTRED:g} deviations at every step, at both noise levels, on every seed",
            "measured": f"at most {max(shifted):.2f} (Flow-GRPO {max(before):.2f})",
            "holds": max(shifted) <= CENTRED,
            "per_seed": numbers,
        },
        {
            "name": "2b the scale of the log-ratio over steps",
            "demand": f"largest over smallest deviation at least {NARROWED:g} times less than Flow-GRPO's",
            "measured": f"{min(narrowed):.1f} to {max(narrowed):.1f} times less",
            "holds": min(narrowed) >= NARROWED,
            "per_seed": numbers,
        },
        {
            "name": "2c clipping of good and bad samples, cleanest step, noise 0.15",
            "demand": f"shares differ by <= {EVEN:g} where Flow-GRPO's differ by >= {UNEVEN:g}",
            "measured": f"at most {max(uneven):.2f} (Flow-GRPO at least {min(uneven_before):.2f})",
            "holds": max(uneven) <= EVEN and min(uneven_before) >= UNEVEN,
            "per_seed": numbers,
        },
    ]


def _width(deviations: list[float]) -> float:
    return max(deviations) / min(deviations)


def _learning_checks(by_method: dict[str, list[Measured]]) -> list[Measured]:
    checks: list[Measured] = []
    for level in LEVELS:
        pairs = [
            (_at(plain, level), _at(guard, level))
            for plain, guard in zip(by_method["flow_grpo"], by_method["guard"], strict=True)
        ]
        known = [(plain, guard) for plain, guard in pairs if plain is not None and guard is not None]
        means = [statistics.mean(pair[place] for pair in known) if known else 1.0 for place in (0, 1)]
        gain = 1 - means[1] / means[0]
        checks.append(
            {
                "name": f"3 distance to real images at proxy {level:g}",
                "demand": f">= {100 * NEARER:g} % lower in the mean; both methods reach the level on every seed",
                "measured": f"{means[1]:.3f} against {means[0]:.3f}: {100 * gain:.1f} % lower, {len(known)} of "
                f"{len(pairs)} seeds",
                "holds": len(known) == len(pairs) and gain >= NEARER,
                "per_seed": [{"flow_grpo": plain, "guard": guard} for plain, guard in pairs],
            }
        )
    ends = [mean(by_method[name], "end") for name in ("flow_grpo", "guard")]
    gain = 1 - ends[1] / ends[0]
    runs = zip(*by_method.values(), strict=True)
    curves = [{name: run["curve"] for name, run in zip(by_method, own, strict=True)} for own in runs]
    checks.append(
        {
            "name": "3 distance after the last update",
            "demand": f">= {100 * NEARER_AT_THE_END:g} % lower in the mean",
            "measured": f"{ends[1]:.3f} against {ends[0]:.3f}: {100 * gain:.1f} % lower",
            "holds": gain >= NEARER_AT_THE_END,
            "per_seed": curves,
        }
    )
    return checks


def _table(by_method: dict[str, list[Measured]], best: dict[str, float]) -> str:
    rows: list[list[object]] = []
    for method, results in by_method.items():
        accuracy, proxy = spread([r["accuracy"] for r in results]), [r["curve"][-1]["proxy"] for r in results]
        at = [[value for value in (_at(r, level) for r in results) if value is not None] for level in LEVELS]
        levels = [spread(values, 1, 3) if values else "-" for values in at]
        cells = [accuracy, spread(proxy, 1, 3), *look_cells(results, 3), *levels, *cost_cells(results)]
        rows.append([method, f"{best[method]:g}", *cells])
    at_level = [f"distance at {level:g}" for level in LEVELS]
    head = ["method", "clip", "judge % (mean ± sd)", "proxy", "distance", "diversity", "Frechet", *at_level]
    return markdown_table([*head, *COSTS.values()], rows)


def _ratio_table(ratios: dict[tuple[int, float, str], Measured], seeds: int) -> str:
    """Means over seeds; log-ratios times 1,000."""
    rows: list[list[object]] = []
    for noise in NOISES:
        for method in ("flow_grpo", "guard"):
            own = [ratios[seed, noise, method] for seed in range(seeds)]

            def ends(name: str, digits: int, own: list[Measured] = own) -> str:
                scale = 1000 if name in ("mean", "std") else 1
                first, last = (statistics.mean(scale * one[name][place] for one in own) for place in (0, -1))
                return f"{first:.{digits}f} .. {last:.{digits}f}"

            rows.append([f"{noise:g}", method, ends("mean", 2), ends("std", 2), ends("good", 2), ends("bad", 2)])
    head = ["noise", "method", "mean x 1000, noisiest .. cleanest step", "deviation x 1000", "clipped good", "bad"]
    return markdown_table(head, rows)
