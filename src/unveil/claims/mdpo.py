"""Claim check of MDPO and RCR (arXiv 2508.13148) on running sums; ``unveil reproduce mdpo``.

Task: 8 digits mod 3, response = their 8 running sums, right if the last one is. Network: 2 layers, 64 wide, trained on
random masks until greedy decoding in 4 steps passes 58 % (the task has a phase change, so it stops by score).

1. MDPO against diffu-GRPO, greedy LCR in 4 steps on held-out prompts: at equal optimiser steps and at equal rollouts.
   Both get the same grid of three learning rates, each chosen on a seed that is not reported.
   Demand: MDPO's gain >= 2x diffu-GRPO's, and MDPO reaches diffu-GRPO's final accuracy in <= 1/5 of the optimiser
   steps.
2. RCR against LCR without training. (a) the chain, lengths x steps: RCR >= LCR - 1.5 points everywhere in the mean.
   (b) answer first (the last sum, then all sums; blocks of 3): RCR >= LCR + 8 points on every seed whose network is
   good enough (LCR >= 80 % with one block of 5 steps, measured beforehand).
3. The over-denoising rate falls with MDPO.
4. Ablation of the advantage and of the step selection: reported, no demand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unveil.claims.laboratory import (
    COSTS,
    TUNING_SEED,
    Measured,
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
from unveil.claims.slots import SlotDenoiser, train_sums
from unveil.learning.regularisers import Kl
from unveil.learning.selectors import AllSteps, TopAdvantage
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, RunningConfidence
from unveil.systems.diffu_grpo import DiffuGrpo
from unveil.systems.mdpo import Mdpo, StepImprovement
from unveil.tasks.evaluate import evaluate
from unveil.tasks.running_sum import RunningSum
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob

LENGTH, STEPS = 8, 4
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
HELD_OUT = 600
"""Of the 656 prompts of 8 digits that no training ever sees."""
SHORTER, SHORTER_HELD_OUT = 7, 200
"""The other chain on which decoding rules are compared. Chains of 10 are not learned within 4,000 updates."""
GAIN_RATIO, UPDATE_SHARE = 2.0, 0.2
CHAIN_SLACK, ANSWER_FIRST_GAIN, GOOD_ENOUGH = 0.015, 0.08, 0.80


def reproduce(seeds: int, quick: bool, out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run all four checks; see the module docstring.

    Args:
        seeds: independent repetitions (networks and training).
        quick: a third of the training and one learning rate for both methods: shows that everything runs, and how.
        out: folder for networks and curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    numbers = list(range(seeds))
    rates = LEARNING_RATES[1:2] if quick else LEARNING_RATES
    updates = 30 if quick else 100
    tuning = [] if quick else [TUNING_SEED]
    with two_processes(report) as every:
        every(_chain_network, [(out, seed, LENGTH) for seed in [*numbers, *tuning]])
        methods = ("mdpo", "diffu_grpo equal steps", "diffu_grpo equal rollouts")
        best = dict.fromkeys(methods, rates[0])
        if not quick:
            best = tune(every, _policy, out, dict.fromkeys(methods, rates), updates, lambda run: -run["accuracy"])
        variants = ("mdpo terminal", "mdpo difference", "mdpo future", "mdpo all steps")
        settings = best | dict.fromkeys(variants, best["mdpo"])
        by_method = on_seeds(every, _policy, out, seeds, settings, updates)
        chain = every(_chain_decoding, [(out, seed) for seed in numbers])
        answer = every(_answer_first, [(out, seed) for seed in numbers])
    checks = [
        _against(by_method, "diffu_grpo equal steps", "1a MDPO against diffu-GRPO, equal optimiser steps"),
        _against(by_method, "diffu_grpo equal rollouts", "1b MDPO against diffu-GRPO, equal rollouts"),
        _chain_check(chain),
        _answer_check(answer),
        _over_denoising_check(by_method["mdpo"]),
    ]
    return concluded(
        "mdpo", checks, all_runs(by_method), started, _table(by_method, settings, chain, answer), learning_rates=best
    )


def _chain_network(out: Path, seed: int, length: int) -> Measured:
    """Train the chain network of a seed until it passes 58 % greedy in 4 steps."""
    problems = SHORTER_HELD_OUT if length == SHORTER else 400
    folder, task = out / f"chain-{length}-{seed}", RunningSum(length=length)
    return train_sums(folder, task, length, length, seed, goal=0.58, steps=length // 2, problems=problems)


def _policy(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    """Train one method from the network of a seed and follow its held-out accuracy."""
    task = RunningSum(length=LENGTH)
    denoiser = SlotDenoiser(words=3, prompt=LENGTH, response=LENGTH).load(out / f"chain-{LENGTH}-{seed}")
    inner = 4 if method.startswith("diffu_grpo") else 1
    batches = updates // inner if method.endswith("equal steps") else updates
    folder = out / f"{method.replace(' ', '-')}-{lr:g}-{seed}"
    rollout = RolloutConfig(
        sampler=MaskedSampler(steps=STEPS, temperature=1.0), response_length=LENGTH, prompts=16, group_size=8
    )
    policy = PolicyConfig(task=task, rollout=rollout, **_choices(method, inner))
    held_out = task.problems("test", HELD_OUT, 0)

    def measure(job: PolicyJob) -> Measured:
        result = evaluate(denoiser, task, held_out, MaskedSampler(steps=STEPS), response_length=LENGTH)
        return {"accuracy": result.accuracy, "over_denoising": result.over_denoising}

    run = train_policy(denoiser, policy, folder, seed=seed, lr=lr, updates=batches, measure=measure)
    before, after = run["curve"][0], run["curve"][-1]
    return run | {
        "accuracy": after["accuracy"],
        "base": before["accuracy"],
        "gain": after["accuracy"] - before["accuracy"],
        "over_denoising": (before["over_denoising"], after["over_denoising"]),
        "line": f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}",
    }


def _choices(method: str, inner: int) -> dict[str, Any]:
    if method.startswith("diffu_grpo"):
        return vars(DiffuGrpo(inner_updates=inner, kl=Kl(beta=0.0)))
    chosen = Mdpo(selector=TopAdvantage(k=2), kl=Kl(beta=0.0))
    ablated = {"mdpo terminal": "terminal", "mdpo difference": "difference", "mdpo future": "future"}
    if method in ablated:
        chosen.advantage = StepImprovement(terms=ablated[method])  # type: ignore[arg-type]
    choices = dict(vars(chosen))
    if method == "mdpo all steps":
        choices["selector"] = AllSteps()
    return choices


def _chain_decoding(out: Path, seed: int) -> Measured:
    """LCR and RCR on chains of two lengths at several step counts, no training."""
    cells = []
    for length, count in ((SHORTER, SHORTER_HELD_OUT), (LENGTH, HELD_OUT)):
        if length != LENGTH:
            _chain_network(out, seed, length)
        task = RunningSum(length=length)
        denoiser = SlotDenoiser(words=3, prompt=length, response=length).load(out / f"chain-{length}-{seed}")
        held_out = task.problems("test", count, 0)
        for steps in (2, 3, length // 2) if length == LENGTH else (2, 3):
            cell: Measured = {"length": length, "steps": steps}
            for name, rule in _rules().items():
                sampler = MaskedSampler(steps=steps, rule=rule)
                cell[name] = evaluate(denoiser, task, held_out, sampler, response_length=length).accuracy
            cells.append(cell)
    gain = statistics.mean(cell["rcr"] - cell["lcr"] for cell in cells)
    return {"cells": cells, "gain": gain, "line": f"RCR - LCR {gain:+.3f} in the mean"}


def _answer_first(out: Path, seed: int) -> Measured:
    """LCR and RCR where the answer has to be written before the sums that it follows from."""
    task = RunningSum(length=LENGTH, answer_first=True)
    response = LENGTH + 1
    folder = out / f"answer-first-{seed}"
    network = train_sums(folder, task, LENGTH, response, seed, goal=0.90, steps=5)
    denoiser = SlotDenoiser(words=3, prompt=LENGTH, response=response).load(folder)
    held_out = task.problems("test", HELD_OUT, 0)
    result: Measured = {"updates": network["updates"]}

    def accuracy(sampler: MaskedSampler) -> float:
        return evaluate(denoiser, task, held_out, sampler, response_length=response).accuracy

    result["one block"] = accuracy(MaskedSampler(steps=5))
    for name, rule in _rules().items():
        result[name] = accuracy(MaskedSampler(steps=9, block_length=3, rule=rule))
    result["line"] = f"LCR {result['lcr']:.3f} RCR {result['rcr']:.3f} (one block {result['one block']:.3f})"
    return result


def _rules() -> dict[str, Any]:
    return {"lcr": LowConfidence(), "rcr": RunningConfidence(), "rcr max": RunningConfidence(running="max")}


def _against(by_method: dict[str, list[Measured]], baseline: str, name: str) -> Measured:
    ours, theirs = by_method["mdpo"], by_method[baseline]
    gain, other = mean(ours, "gain"), mean(theirs, "gain")
    shares = [_share_of_steps(mine, other_run) for mine, other_run in zip(ours, theirs, strict=True)]
    typical = statistics.median(shares)
    return {
        "name": name,
        "demand": f"gain > 0 and >= {GAIN_RATIO:g}x the baseline; its final accuracy in {UPDATE_SHARE:g} of its steps",
        "measured": f"gain {100 * gain:+.1f} against {100 * other:+.1f} points; median share of steps {typical:.2f}",
        "holds": gain > 0 and gain >= GAIN_RATIO * max(other, 0.0) and typical <= UPDATE_SHARE,
        "per_seed": [
            {
                "base": mine["base"],
                "mdpo": mine["accuracy"],
                "diffu_grpo": other_run["accuracy"],
                "share_of_steps": share if share < float("inf") else None,
            }
            for mine, other_run, share in zip(ours, theirs, shares, strict=True)
        ],
    }


def _share_of_steps(ours: Measured, theirs: Measured) -> float:
    """Optimiser steps after which MDPO first has the baseline's final accuracy, as a share of the baseline's steps."""
    reached = [at["optimizer_steps"] for at in ours["curve"] if at["accuracy"] >= theirs["accuracy"]]
    return min(reached) / theirs["optimizer_steps"] if reached else float("inf")


def _chain_check(results: list[Measured]) -> Measured:
    cells: dict[tuple[int, int], list[float]] = {}
    for result in results:
        for cell in result["cells"]:
            cells.setdefault((cell["length"], cell["steps"]), []).append(cell["rcr"] - cell["lcr"])
    worst = min(cells, key=lambda key: statistics.mean(cells[key]))
    value = statistics.mean(cells[worst])
    return {
        "name": "2a RCR against LCR, chain in one block, lengths x steps",
        "demand": f"mean difference >= {-100 * CHAIN_SLACK:g} points in every cell",
        "measured": f"worst cell (length {worst[0]}, {worst[1]} steps): {100 * value:+.1f} points",
        "holds": value >= -CHAIN_SLACK,
        "per_seed": [result["cells"] for result in results],
    }


def _answer_check(results: list[Measured]) -> Measured:
    good = [result for result in results if result["one block"] >= GOOD_ENOUGH]
    gains = [result["rcr"] - result["lcr"] for result in good]
    listed = ", ".join(f"{100 * gain:+.1f}" for gain in gains) or "no network was good enough"
    return {
        "name": "2b RCR against LCR, answer before its derivation",
        "demand": f">= {100 * ANSWER_FIRST_GAIN:+g} points on every network of >= {100 * GOOD_ENOUGH:g} % in one block",
        "measured": f"{listed} points ({len(good)} of {len(results)} networks)",
        "holds": bool(gains) and min(gains) >= ANSWER_FIRST_GAIN,
        "per_seed": [{k: v for k, v in result.items() if k != "line"} for result in results],
    }


def _over_denoising_check(results: list[Measured]) -> Measured:
    pairs = [result["over_denoising"] for result in results]
    before, after = (statistics.mean(pair[side] for pair in pairs) for side in (0, 1))
    return {
        "name": "3 over-denoising rate",
        "demand": "lower after MDPO, in the mean over seeds",
        "measured": f"{100 * before:.1f} % -> {100 * after:.1f} %",
        "holds": after < before,
        "per_seed": [{"before": pair[0], "after": pair[1]} for pair in pairs],
    }


def _table(
    by_method: dict[str, list[Measured]],
    rates: dict[str, float],
    chain: list[Measured],
    answer: list[Measured],
) -> str:
    base = [result["base"] for result in by_method["mdpo"]]
    rate = 100 * statistics.mean(r["over_denoising"][0] for r in by_method["mdpo"])
    rows: list[list[object]] = [["base", "", spread(base), "", f"{rate:.1f}", "", "", "", ""]]
    for method, results in by_method.items():
        end = 100 * statistics.mean(r["over_denoising"][1] for r in results)
        accuracy, gain = spread([r["accuracy"] for r in results]), f"{100 * mean(results, 'gain'):+.1f}"
        rows.append([method, f"{rates[method]:g}", accuracy, gain, f"{end:.1f}", *cost_cells(results)])
    head = ["method", "lr", "accuracy % (mean ± sd)", "gain", "over-denoising %"]
    trained = markdown_table([*head, *COSTS.values()], rows)
    rows = []
    for place, cell in enumerate(chain[0]["cells"]):
        columns = [spread([result["cells"][place][rule] for result in chain]) for rule in _rules()]
        rows.append([f"chain of {cell['length']}, {cell['steps']} steps", *columns])
    columns = [spread([result[rule] for result in answer]) for rule in _rules()]
    rows.append(["answer first, 3 blocks of 3", *columns])
    decoded = markdown_table(["decoding without training", "LCR %", "RCR (last) %", "RCR (max) %"], rows)
    return f"{trained}\n\n{decoded}"
