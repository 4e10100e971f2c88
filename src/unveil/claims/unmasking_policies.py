"""Claim check of unmasking policies (arXiv 2512.09106) on pointer chasing; ``unveil reproduce unmasking_policies``.

Task: a table f(0..7) and a start x; response x, f(x), f(f(x)) .. 0, then end tokens up to L = 12; all of it has to be
right. Chains have 3 to 8 words. Denoiser: 2 layers, 48 wide, trained on chains of all lengths until decoding from left
to right passes 98 %, then on random tables, whose chains are short (one in fifty is not): like an instructed model it
is sure of an early end before it knows the chain. It stays frozen.

Beforehand, on the denoiser: the threshold 0.9 loses >= 5 points to left to right, or the task is too easy.
1. Full diffusion (one block of 12): some policy (alpha of 0, 0.3, 1, 3) has >= 5 points more than the best threshold
   (of 0.5 .. 0.999, by accuracy) at no more steps, or no less accuracy with <= 0.8 of its steps; means over seeds.
2. Blocks of 4: the policy (alpha 0.3) is within 2 points of the frontier of thresholds at its number of steps.
3. alpha 0 takes >= 1.5 times the steps of alpha 3.
4. The added reward (alpha 3) is hacked: < 2 steps and < 20 % right, on every seed; the multiplied one is not.
5. The policy file of alpha 0.3, trained at L = 12, opened by the rule ``policy`` on canvases of 18: >= 99 % of chains
   end without holes on every seed, and it is within 2 points of the frontier of thresholds there.
Expert steering (one threshold 0.9 in blocks of 4 per group) is reported, as are random and most certain K a step.

Steps are counted per chain: each is one evaluation of the denoiser. Policies decode with ``bernoulli_argmax``. The
learning rate was chosen of 3e-4, 1e-3 and 3e-3 by the accuracy at alpha 0.3 on seed 1000, with a denoiser of width 32;
the baselines have none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unveil.claims.chase import ChaseDenoiser
from unveil.claims.laboratory import (
    COSTS,
    Measured,
    concluded,
    cost_cells,
    markdown_table,
    mean,
    spread,
    train_policy,
    train_to,
    two_processes,
)  # fmt: skip
from unveil.denoisers.unmask import FILE
from unveil.recipe import dump
from unveil.samplers.actions import Bernoulli, BernoulliArgmax
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, Policy, Random, Rule, Threshold
from unveil.seeds import generator
from unveil.systems.unmasking_policies import ConfidencePolicy, Experts, Speed, UnmaskingPolicies
from unveil.tasks.evaluate import evaluate
from unveil.tasks.pointer_chase import PointerChase
from unveil.training.denoising_job import DenoisingConfig, MixedTask
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import attach_unmask, choose_trained

LENGTH, LONGER, BLOCK = 12, 18, 4
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
A_STEP = (1, 2, 3, 4, 6)
ALPHAS = (0.0, 0.3, 1.0, 3.0)
HELD_OUT = 400
LEARNING_RATE, PROMPTS, GROUP = 3e-3, 32, 8
TASK = PointerChase(shortest=3)
EASY, GAIN, FEWER, SLACK, RATIO = 0.05, 0.05, 0.8, 0.02, 1.5


def reproduce(seeds: int, quick: bool, out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run all checks; see the module docstring.

    Args:
        seeds: independent repetitions (denoisers and policies).
        quick: a quarter of the training: shows that everything runs, and how.
        out: folder for networks and curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    numbers = list(range(seeds))
    updates = 20 if quick else 70
    kinds = [f"alpha {alpha:g}" for alpha in ALPHAS] + ["added 3", "experts 0.3", "blocks 0.3"]
    with two_processes(report) as every:
        every(_network, [(out, seed) for seed in numbers])
        rules = every(_rules, [(out, seed) for seed in numbers])
        jobs = [(out, seed, kind, updates) for seed in numbers for kind in kinds]
        trained = every(_policy, jobs)
    by_kind = {kind: [r for j, r in zip(jobs, trained, strict=True) if j[2] == kind] for kind in kinds}
    checks = [
        _easy_check(rules),
        _full_check(by_kind, rules),
        _block_check(by_kind["blocks 0.3"], rules),
        _alpha_check(by_kind),
        _added_check(by_kind),
        _longer_check(by_kind["alpha 0.3"], rules),
    ]
    return concluded(
        "unmasking_policies", checks, trained, started, _table(by_kind, rules), learning_rate=LEARNING_RATE
    )


def _network(out: Path, seed: int) -> Measured:
    """The denoiser of a seed: all chain lengths first, then short chains."""
    denoiser = ChaseDenoiser(longest=LONGER)
    denoiser.initialise(generator(seed, "chase"))
    every, short = PointerChase(), PointerChase(chains="random")
    held_out = every.problems("test", HELD_OUT, 1)

    def left_to_right() -> float:
        sampler = MaskedSampler(steps=LENGTH, block_length=1)
        return evaluate(denoiser, every, held_out, sampler, response_length=LENGTH).accuracy

    folder = out / f"denoiser-{seed}"
    first = DenoisingConfig(tasks=[MixedTask(task=every)], response_length=LONGER)
    learned = train_to(denoiser, first, folder, seed=seed, goal=0.98, score=left_to_right)
    mixed = [MixedTask(task=short, weight=0.98), MixedTask(task=every, weight=0.02)]
    second = DenoisingConfig(tasks=mixed, response_length=LONGER)
    train_to(denoiser, second, folder, seed=seed, goal=2.0, score=left_to_right, lr=1e-3, every=250, limit=250)
    return learned


def _denoiser(out: Path, seed: int) -> ChaseDenoiser:
    return ChaseDenoiser(longest=LONGER).load(out / f"denoiser-{seed}").eval()


def _decode(denoiser: ChaseDenoiser, sampler: MaskedSampler, length: int = LENGTH) -> Measured:
    held_out = TASK.problems("test", HELD_OUT, 0)
    found = evaluate(denoiser, TASK, held_out, sampler, response_length=length)
    return {"accuracy": found.accuracy, "steps": found.steps_per_chain, "unfinished": found.unfinished}


def _rules(out: Path, seed: int) -> Measured:
    """All decoding rules without training on the denoiser of a seed."""
    denoiser = _denoiser(out, seed)

    def decode(rule: Rule, block: int, steps: int = LENGTH, length: int = LENGTH) -> Measured:
        return _decode(denoiser, MaskedSampler(steps=steps, block_length=block, rule=rule), length)

    cells = {"left to right": decode(LowConfidence(), 1)}
    for block, length in ((LENGTH, LENGTH), (BLOCK, LENGTH), (LONGER, LONGER)):
        for threshold in THRESHOLDS:
            rule = Threshold(threshold=threshold)
            cells[f"threshold {threshold:g}, block {block}"] = decode(rule, block, length, length)
    for count in A_STEP:
        cells[f"most certain {count}"] = decode(LowConfidence(), LENGTH, LENGTH // count)
        cells[f"random {count}"] = decode(Random(), LENGTH, LENGTH // count)
    right, often = cells["left to right"]["accuracy"], cells[f"threshold 0.9, block {LENGTH}"]["accuracy"]
    return {"cells": cells, "line": f"left to right {right:.3f}, threshold 0.9 {often:.3f}"}


def _policy(out: Path, seed: int, kind: str, updates: int) -> Measured:
    """Train one policy on the frozen denoiser of a seed, and decode with it."""
    what, _, alpha = kind.partition(" ")
    block = BLOCK if what == "blocks" else LENGTH
    denoiser = _denoiser(out, seed)
    attach_unmask(denoiser, ConfidencePolicy(dim=32, hidden=128, bias=-1.0), seed)
    choose_trained(denoiser, "unmask")
    choices = UnmaskingPolicies(
        shaping=Speed(alpha=float(alpha), form="additive" if what == "added" else "multiplicative")
    )
    policy = PolicyConfig(
        task=TASK,
        rollout=RolloutConfig(
            sampler=MaskedSampler(steps=LENGTH, block_length=block, rule=Policy(action=Bernoulli())),
            response_length=LENGTH, prompts=PROMPTS, group_size=GROUP,
        ),
        groups=Experts(block_length=BLOCK) if what == "experts" else None,
        **vars(choices),
    )  # fmt: skip
    use = MaskedSampler(steps=LENGTH, block_length=block, rule=Policy(action=BernoulliArgmax()))

    def measure(job: PolicyJob) -> Measured:
        return _decode(denoiser.eval(), use)

    folder = out / f"{kind.replace(' ', '-')}-{seed}"
    result = train_policy(
        denoiser, policy, folder, seed=seed, lr=LEARNING_RATE, updates=updates, measure=measure, points=4,
        microbatch=4096, schedule="cosine", final_lr=0.1, max_grad_norm=0.2,
    )  # fmt: skip
    denoiser.unmask_action = dump(Bernoulli())
    denoiser.save_unmask(folder)
    last = result["curve"][-1]
    result |= {"accuracy": last["accuracy"], "steps": last["steps"], "unfinished": last["unfinished"]}
    if what != "blocks":
        fresh = MaskedSampler(steps=LONGER, rule=Policy(path=str(folder / FILE)))
        result["longer"] = _decode(_denoiser(out, seed), fresh, LONGER)
    return result | {"line": f"{last['accuracy']:.3f} in {last['steps']:.2f} steps"}


def _easy_check(rules: Sequence[Measured]) -> Measured:
    losses = []
    for result in rules:
        cells = result["cells"]
        losses.append(cells["left to right"]["accuracy"] - cells[f"threshold 0.9, block {LENGTH}"]["accuracy"])
    return {
        "name": "0 the task: what the threshold 0.9 loses to left to right",
        "demand": f">= {100 * EASY:g} points on every seed",
        "measured": f"{spread(losses)} points",
        "holds": min(losses) >= EASY,
        "per_seed": losses,
    }


def _cell(rules: Sequence[Measured], name: str) -> Measured:
    """A rule's means over seeds."""
    cells = [result["cells"][name] for result in rules]
    return {key: mean(cells, key) for key in ("accuracy", "steps")}


def _full_check(by_kind: dict[str, list[Measured]], rules: Sequence[Measured]) -> Measured:
    names = [f"threshold {threshold:g}, block {LENGTH}" for threshold in THRESHOLDS]
    name = max(names, key=lambda name: (_cell(rules, name)["accuracy"], -_cell(rules, name)["steps"]))
    best = _cell(rules, name)
    points = {
        kind: {key: mean(results, key) for key in ("accuracy", "steps")}
        for kind, results in by_kind.items()
        if kind.startswith("alpha")
    }
    better = [
        kind
        for kind, point in points.items()
        if (point["accuracy"] >= best["accuracy"] + GAIN and point["steps"] <= best["steps"])
        or (point["accuracy"] >= best["accuracy"] and point["steps"] <= FEWER * best["steps"])
    ]
    listed = "; ".join(f"{kind}: {_point(point)}" for kind, point in points.items())
    return {
        "name": "1 full diffusion against the best threshold",
        "demand": f">= {100 * GAIN:+g} points at its steps, or its accuracy in <= {FEWER:g} of them, for some alpha",
        "measured": f"{name}: {_point(best)}; {listed}",
        "holds": bool(better),
        "per_seed": [
            {kind: {key: by_kind[kind][seed][key] for key in ("accuracy", "steps")} for kind in points}
            | {name: result["cells"][name]}
            for seed, result in enumerate(rules)
        ],
    }


def _block_check(results: Sequence[Measured], rules: Sequence[Measured]) -> Measured:
    accuracy, steps = mean(results, "accuracy"), mean(results, "steps")
    reached = _threshold_frontier(rules, BLOCK, steps)
    return {
        "name": f"2 blocks of {BLOCK}: the frontier of thresholds",
        "demand": f"accuracy within {100 * SLACK:g} points of it at the same steps",
        "measured": f"{_point({'accuracy': accuracy, 'steps': steps})}; frontier there {100 * reached:.1f} %",
        "holds": accuracy >= reached - SLACK,
        "per_seed": [{key: result[key] for key in ("accuracy", "steps")} for result in results],
    }


def _threshold_frontier(rules: Sequence[Measured], block: int, steps: float) -> float:
    return frontier([_cell(rules, f"threshold {threshold:g}, block {block}") for threshold in THRESHOLDS], steps)


def frontier(points: Sequence[Measured], steps: float) -> float:
    """The highest accuracy at ``steps`` on a line between two of the points, 0 where all of them take more."""
    known = sorted((point["steps"], point["accuracy"]) for point in points)
    heights = [accuracy for taken, accuracy in known if taken <= steps]
    for place, (left, low) in enumerate(known):
        for right, high in known[place + 1 :]:
            if left <= steps <= right and right > left:
                heights.append(low + (high - low) * (steps - left) / (right - left))
    return max(heights, default=0.0)


def _alpha_check(by_kind: dict[str, list[Measured]]) -> Measured:
    slow, fast = by_kind["alpha 0"], by_kind["alpha 3"]
    ratio = mean(slow, "steps") / mean(fast, "steps")
    return {
        "name": "3 steps at alpha 0 against alpha 3",
        "demand": f">= {RATIO:g} times as many, in the mean",
        "measured": f"{mean(slow, 'steps'):.2f} against {mean(fast, 'steps'):.2f}: {ratio:.2f} times",
        "holds": ratio >= RATIO,
        "per_seed": [{"alpha 0": s["steps"], "alpha 3": f["steps"]} for s, f in zip(slow, fast, strict=True)],
    }


def _added_check(by_kind: dict[str, list[Measured]]) -> Measured:
    def hacked(result: Measured) -> bool:
        return result["steps"] < 2 and result["accuracy"] < 0.2

    added, multiplied = by_kind["added 3"], by_kind["alpha 3"]
    return {
        "name": "4 added against multiplied reward, alpha 3",
        "demand": "added: < 2 steps and < 20 % right on every seed; multiplied: on none",
        "measured": f"added {_mean_point(added)}; multiplied {_mean_point(multiplied)}",
        "holds": all(hacked(result) for result in added) and not any(hacked(result) for result in multiplied),
        "per_seed": [
            {"added": {key: a[key] for key in ("accuracy", "steps")}} | {"multiplied": m["accuracy"]}
            for a, m in zip(added, multiplied, strict=True)
        ],
    }


def _longer_check(results: Sequence[Measured], rules: Sequence[Measured]) -> Measured:
    longer = [result["longer"] for result in results]
    unfinished = max(result["unfinished"] for result in longer)
    reached = _threshold_frontier(rules, LONGER, mean(longer, "steps"))
    return {
        "name": f"5 the policy of {LENGTH} positions on {LONGER}",
        "demand": f"<= 1 % of chains with holes on every seed; accuracy within {100 * SLACK:g} points of the frontier",
        "measured": f"{_mean_point(longer)}, holes in {100 * unfinished:.1f} %; frontier there {100 * reached:.1f} %",
        "holds": unfinished <= 0.01 and mean(longer, "accuracy") >= reached - SLACK,
        "per_seed": longer,
    }


def _point(point: Measured) -> str:
    return f"{100 * point['accuracy']:.1f} % in {point['steps']:.2f} steps"


def _mean_point(results: Sequence[Measured]) -> str:
    return _point({key: mean(results, key) for key in ("accuracy", "steps")})


def _table(by_kind: dict[str, list[Measured]], rules: Sequence[Measured]) -> str:
    def row(name: str, cells: Sequence[Measured]) -> list[str]:
        return [name, spread([cell["accuracy"] for cell in cells]), spread([cell["steps"] for cell in cells], 1, 2)]

    names = {"added": "policy, added reward, alpha", "experts": "policy, expert steering, alpha"}
    names |= {"alpha": "policy, alpha", "blocks": f"policy, blocks of {BLOCK}, alpha"}
    trained = []
    for kind, results in by_kind.items():
        what, _, alpha = kind.partition(" ")
        cells = row(f"{names[what]} {alpha}", results)
        cells.append(spread([result["unfinished"] for result in results]))
        cells.append("" if what == "blocks" else row("", [result["longer"] for result in results])[1])
        cells += cost_cells(results)
        trained.append(cells)
    head = ["policy", "accuracy %", "steps", "with holes %", f"accuracy % at {LONGER}"]
    head += COSTS.values()
    plain = [row(name, [result["cells"][name] for result in rules]) for name in rules[0]["cells"]]
    rule_head = ["decoding without training", "accuracy %", "steps"]
    return markdown_table(head, trained) + "\n\n" + markdown_table(rule_head, plain)
