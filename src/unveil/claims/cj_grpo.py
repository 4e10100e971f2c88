"""Claim check of CJ-GRPO, EOSER and ASS (arXiv 2509.23924); ``unveil reproduce cj_grpo``.

1. The end trap and EOSER, no training. Task: the sum of 8 digits mod 3 on a canvas of 24 slots; of the solutions that a
   2-layer network learns, half work the sum out (8 running sums and up to 3 words), half say it straight (2 to 4
   words), and end tokens fill up the rest. It cannot add 8 digits at one go. Decoders: one token a step, most confident
   first; blocks of 4; the whole canvas at once; the whole canvas with EOSER (0.4 to 1).
   Demand, mean over seeds: of what the first half of the steps reveals on the whole canvas, > 60 % are end tokens; its
   accuracy is >= 15 points below that of blocks; EOSER recovers >= half of that; and on questions whose right answer is
   short (the first digit) EOSER loses <= 1 point.
2. ASS, no training, floor(log2 L) steps, against a uniform schedule of as many steps, both on the whole canvas with
   EOSER at the paper's factors (0.4 uniform pace; 0.01 doubling pace for ASS).
   (a) The worked sum of check 1. Demand: ASS >= uniform + 5 points.
   (b) A response of 16 that one choice settles (the prompt with any one number added to all its digits). Demand: the
   same. Not a case of the paper: it shows when few tokens at first should pay.
   Reported besides: both schedules without EOSER, and the embedded Sudoku and Countdown models.
3. CJ-GRPO against one-step GRPO and diffu-GRPO, AGRPO beside them; task and network of the MDPO check (8 running sums
   mod 3, greedy accuracy 58 % in 4 steps), no KL, one gradient step per batch of 16 groups of 8. Equal rollouts and
   optimiser steps; the same grid of three learning rates, each chosen on a seed that is not reported.
   Demand: mean gain of CJ-GRPO > 0 and >= 2x that of the better one-step baseline. CJ-GRPO with other reductions and
   without the deviation: reported, no demand.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    train_to,
    tune,
    two_processes,
)
from unveil.claims.slots import SlotDenoiser, train_sums
from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.load import load_masked
from unveil.learning.advantages import GroupAdvantage
from unveil.learning.likelihoods import OneStepLikelihood
from unveil.learning.objectives import TokenMean, TokenSum
from unveil.learning.regularisers import Kl
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.schedules import Doubling
from unveil.seeds import generator
from unveil.systems.agrpo import Agrpo, DrawnSteps
from unveil.systems.cj_grpo import CjGrpo, Eoser
from unveil.systems.diffu_grpo import DiffuGrpo
from unveil.tasks.base import Problem, Split, Task, Verdict
from unveil.tasks.countdown import Countdown
from unveil.tasks.digit_sum import DigitSum
from unveil.tasks.evaluate import evaluate, judge, sample_problems
from unveil.tasks.running_sum import RunningSum
from unveil.tasks.sudoku import Sudoku
from unveil.training.denoising_job import DenoisingConfig, MixedTask
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob

DIGITS, CANVAS, BLOCK = 8, 24, 4
SHIFTED = 16
ASKED = 300
"""Held-out problems of checks 1 and 2."""
END_SHARE, TRAP, RECOVERED, SHORT_LOSS, ASS_GAIN, GAIN_RATIO = 0.6, 0.15, 0.5, 0.01, 0.05, 2.0
CHAIN, STEPS, HELD_OUT = 8, 4, 600
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
METHODS = ("cj_grpo", "one-step grpo", "diffu_grpo", "agrpo")
VARIANTS = ("cj_grpo token mean", "cj_grpo token sum", "cj_grpo without std")


def reproduce(seeds: int, quick: bool, out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run the three checks; see the module docstring.

    Args:
        seeds: independent repetitions (networks and training).
        quick: a third of the policy training, one learning rate for all, no variants: shows that everything runs.
        out: folder for networks and curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    numbers = list(range(seeds))
    rates, updates, tuning = (LEARNING_RATES, 100, [TUNING_SEED]) if not quick else (LEARNING_RATES[1:2], 30, [])
    variants = () if quick else VARIANTS
    with two_processes(report) as every:
        digits = every(_digits, [(out, seed) for seed in numbers])
        shifts = every(_shifted, [(out, seed) for seed in numbers])
        embedded = every(_embedded, [("sudoku-base",), ("countdown-base",)])
        every(_chain, [(out, seed) for seed in [*numbers, *tuning]])
        best = dict.fromkeys(METHODS, rates[0])
        if not quick:
            best = tune(every, _policy, out, dict.fromkeys(METHODS, rates), updates, lambda run: -run["accuracy"])
        settings = best | dict.fromkeys(variants, best["cj_grpo"])
        by_method = on_seeds(every, _policy, out, seeds, settings, updates)
    checks = [
        *_trap_checks(digits),
        _ass_check("2a ASS against uniform, worked sums", digits),
        _ass_check("2b ASS against uniform, one choice settles the rest", shifts),
        _policy_check(by_method),
    ]
    return concluded(
        "cj_grpo", checks, all_runs(by_method), started, _table(digits, shifts, embedded, by_method, settings),
        learning_rates=best,
    )  # fmt: skip


# 1 and 2: decoders


def _digits(out: Path, seed: int) -> Measured:
    """Train the network that may answer at once or work the sum out, and decode it in every way."""
    words = [*"012", "sum", "first", "the", "answer", "is", "now", "all", "done"]
    denoiser = SlotDenoiser(words=words, prompt=DIGITS + 1, response=CANVAS, lead=0, ends=True)
    denoiser.initialise(generator(seed, "slots"))
    work, straight = DigitSum(length=DIGITS), DigitSum(length=DIGITS, solve="direct")
    short = DigitSum(length=DIGITS, ask="first")
    check = work.problems("test", 100, 1)

    def in_blocks() -> float:
        sampler = MaskedSampler(steps=CANVAS, block_length=BLOCK)
        return evaluate(denoiser, work, check, sampler, response_length=CANVAS).accuracy

    def learn(shares: Sequence[float], **how: Any) -> Measured:
        tasks = [MixedTask(task=task, weight=w) for task, w in zip((work, straight, short), shares, strict=True)]
        data = DenoisingConfig(tasks=tasks, response_length=CANVAS, batch=64)
        return train_to(denoiser, data, out / f"digits-{seed}", seed=seed, score=in_blocks, **how)

    # The working is learned first, at once and late; then the network comes to know both ways equally well.
    first = learn((0.8, 0.1, 0.1), goal=0.97, every=50)
    then = learn((0.45, 0.45, 0.1), goal=2.0, every=600, limit=600, lr=1e-3)
    questions = work.problems("test", ASKED, 0), short.problems("test", ASKED, 0)
    result: Measured = {"updates": first["updates"] + then["updates"]}
    for name, sampler in _decoders().items():
        for subject, task, problems in zip(("sum", "short"), (work, short), questions, strict=True):
            result[f"{subject} {name}"] = _decoded(denoiser, task, problems, sampler)
    result |= _schedules(denoiser, work, questions[0], CANVAS)
    shown = {name: result[f"sum {name}"]["accuracy"] for name in ("blocks", "canvas", "canvas, EOSER 0.4")}
    result["line"] = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
    return result


def _decoders() -> dict[str, MaskedSampler]:
    """Ways to decode, one token and two tokens a step."""
    found: dict[str, MaskedSampler] = {}
    for steps, mark in ((CANVAS, ""), (CANVAS // 2, ", half the steps")):
        found |= {
            f"blocks{mark}": MaskedSampler(steps=steps, block_length=BLOCK),
            f"canvas{mark}": MaskedSampler(steps=steps),
            f"canvas, EOSER 0.4{mark}": MaskedSampler(steps=steps, transform=Eoser(g_min=0.4)),
            f"canvas, EOSER 0.01{mark}": MaskedSampler(steps=steps, transform=Eoser(g_min=0.01)),
        }
    return found


def _decoded(denoiser: MaskedDenoiser, task: Task, problems: list[Problem], sampler: MaskedSampler) -> Measured:
    """Accuracy, words of a response, and the share of end tokens among what the first half of the steps reveals."""
    trajectory = sample_problems(
        denoiser, problems, sampler, response_length=CANVAS, seed=0, needs={"guesses", "revealed"}
    )
    assert trajectory.guesses is not None and trajectory.revealed is not None
    verdicts = judge(task, problems, denoiser, trajectory).verdicts
    early = trajectory.revealed[:, : trajectory.steps // 2]
    ends = early & (trajectory.guesses[:, : trajectory.steps // 2] == denoiser.spec.end_ids[0])
    return {
        "accuracy": sum(v.correct for v in verdicts) / len(verdicts),
        "words": sum(v.metrics["words"] for v in verdicts) / len(verdicts),
        "early ends": float(ends.sum() / early.sum()),
    }


def _schedules(denoiser: MaskedDenoiser, task: Task, problems: list[Problem], length: int) -> Measured:
    """Accuracy of a uniform schedule and of ASS in floor(log2 length) steps, with EOSER and without."""
    steps = length.bit_length() - 1
    uniform, doubling = Eoser(g_min=0.4), Eoser(g_min=0.01, pace="doubling")
    samplers = {
        "uniform": MaskedSampler(steps=steps),
        "ass": MaskedSampler(steps=steps, schedule=Doubling()),
        "uniform eoser": MaskedSampler(steps=steps, transform=uniform),
        "ass eoser": MaskedSampler(steps=steps, schedule=Doubling(), transform=doubling),
        "uniform half": MaskedSampler(steps=length // 2, transform=uniform),
    }
    return {
        name: evaluate(denoiser, task, problems, sampler, response_length=length).accuracy
        for name, sampler in samplers.items()
    }


@dataclass(kw_only=True)
class Shifted(Task):
    """Prompt: digits mod 3. Right is the prompt with one number, whichever, added to all its digits (mod 3)."""

    length: int = SHIFTED

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        rng = random.Random(f"shifted/{split}/{seed}")
        found = []
        for chain in RunningSum(length=self.length).problems(split, count, seed):
            key = rng.randrange(3)
            solution = " ".join(str((int(digit) + key) % 3) for digit in chain.prompt.split())
            found.append(Problem(id=chain.id, prompt=chain.prompt, answer={}, solution=solution))
        return found

    def check(self, problem: Problem, completion: str) -> Verdict:
        pairs = list(zip(completion.split(), problem.prompt.split(), strict=False))
        keys = {(int(said) - int(digit)) % 3 for said, digit in pairs if said in ("0", "1", "2")}
        correct = len(pairs) == self.length and len(keys) == 1 and len(completion.split()) == self.length
        return Verdict(correct=correct, score=float(correct))


def _shifted(out: Path, seed: int) -> Measured:
    task = Shifted()
    denoiser = SlotDenoiser(words=3, prompt=SHIFTED, response=SHIFTED)
    denoiser.initialise(generator(seed, "slots"))
    data = DenoisingConfig(tasks=[MixedTask(task=task)], response_length=SHIFTED, batch=64)
    check = task.problems("test", 100, 1)

    def one_by_one() -> float:
        return evaluate(denoiser, task, check, MaskedSampler(steps=SHIFTED), response_length=SHIFTED).accuracy

    trained = train_to(denoiser, data, out / f"shifted-{seed}", seed=seed, goal=0.97, score=one_by_one)
    result = _schedules(denoiser, task, task.problems("test", ASKED, 0), SHIFTED)
    return result | {"line": f"{trained['line']}; uniform {result['uniform']:.3f}, ASS {result['ass']:.3f}"}


def _embedded(name: str) -> Measured:
    """Both schedules on a model that ships with the package."""
    task, length = (Sudoku(blanks=8), 17) if name == "sudoku-base" else (Countdown(numbers=3, max_number=20), 12)
    result = _schedules(load_masked(name), task, task.problems("test", ASKED, 0), length)
    return result | {"name": name, "line": f"uniform {result['uniform']:.3f}, ASS {result['ass']:.3f}"}


def _trap_checks(results: list[Measured]) -> list[Measured]:
    def values(key: str, what: str = "accuracy") -> list[float]:
        return [result[key][what] for result in results]

    ends = values("sum canvas", "early ends")
    gap = [blocks - whole for blocks, whole in zip(values("sum blocks"), values("sum canvas"), strict=True)]
    saved = [ours - whole for ours, whole in zip(values("sum canvas, EOSER 0.4"), values("sum canvas"), strict=True)]
    lost = [whole - ours for ours, whole in zip(values("short canvas, EOSER 0.4"), values("short canvas"), strict=True)]
    early, deep, back, loss = (sum(x) / len(x) for x in (ends, gap, saved, lost))
    return [
        {
            "name": "1a end trap: full canvas against blocks",
            "demand": f"> {100 * END_SHARE:g} % end tokens in the first half; >= {100 * TRAP:g} points below blocks",
            "measured": f"{100 * early:.0f} % end tokens; {spread(gap)} points below",
            "holds": early > END_SHARE and deep >= TRAP,
            "per_seed": [{"early_ends": a, "gap": b} for a, b in zip(ends, gap, strict=True)],
        },
        {
            "name": "1b EOSER on the full canvas",
            "demand": f"recovers >= {RECOVERED:g} of the gap",
            "measured": f"{spread(saved)} of {spread(gap)} points",
            "holds": deep > 0 and back >= RECOVERED * deep,
            "per_seed": [{"recovered": value} for value in saved],
        },
        {
            "name": "1c EOSER where the right answer is short",
            "demand": f"loses <= {100 * SHORT_LOSS:g} point against the full canvas without it",
            "measured": f"loses {spread(lost)} points of {spread(values('short canvas'))} %",
            "holds": loss <= SHORT_LOSS,
            "per_seed": [{"lost": value} for value in lost],
        },
    ]


def _ass_check(name: str, results: list[Measured]) -> Measured:
    gains = [result["ass eoser"] - result["uniform eoser"] for result in results]
    return {
        "name": name,
        "demand": f">= {100 * ASS_GAIN:+g} points at the same number of steps, in the mean",
        "measured": f"{spread(gains)} points",
        "holds": sum(gains) / len(gains) >= ASS_GAIN,
        "per_seed": [{"uniform": r["uniform eoser"], "ass": r["ass eoser"]} for r in results],
    }


# 3: objectives


def _chain(out: Path, seed: int) -> Measured:
    """Train the network of running sums until it passes 58 % greedy in 4 steps."""
    return train_sums(out / f"chain-{seed}", RunningSum(length=CHAIN), CHAIN, CHAIN, seed, goal=0.58, steps=STEPS)


def _policy(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    """Train one method from the network of a seed and follow its held-out accuracy."""
    task = RunningSum(length=CHAIN)
    denoiser = SlotDenoiser(words=3, prompt=CHAIN, response=CHAIN).load(out / f"chain-{seed}")
    rollout = RolloutConfig(
        sampler=MaskedSampler(steps=STEPS, temperature=1.0), response_length=CHAIN, prompts=16, group_size=8
    )
    held_out = task.problems("test", HELD_OUT, 0)
    choices = {**_choices(method), "kl": Kl(beta=0.0), "inner_updates": 1}
    policy = PolicyConfig(task=task, rollout=rollout, **choices)

    def measure(job: PolicyJob) -> Measured:
        result = evaluate(denoiser, task, held_out, MaskedSampler(steps=STEPS), response_length=CHAIN)
        return {"accuracy": result.accuracy}

    folder = out / f"{method.replace(' ', '-')}-{lr:g}-{seed}"
    run = train_policy(denoiser, policy, folder, seed=seed, lr=lr, updates=updates, measure=measure, points=10)
    before, after = run["curve"][0]["accuracy"], run["curve"][-1]["accuracy"]
    return run | {"accuracy": after, "base": before, "gain": after - before, "line": f"{before:.3f} -> {after:.3f}"}


def _choices(method: str) -> dict[str, Any]:
    ours = vars(CjGrpo())
    return {
        "cj_grpo": ours,
        "one-step grpo": ours | {"likelihood": OneStepLikelihood(prompt_mask=0.0), "weighting": TokenMean()},
        "diffu_grpo": vars(DiffuGrpo()),
        "agrpo": vars(Agrpo(selector=DrawnSteps(draws=STEPS))),
        "cj_grpo token mean": ours | {"weighting": TokenMean()},
        "cj_grpo token sum": ours | {"weighting": TokenSum()},
        "cj_grpo without std": ours | {"advantage": GroupAdvantage(scale="none")},
    }[method]


def _policy_check(by_method: dict[str, list[Measured]]) -> Measured:
    gains = {method: mean(by_method[method], "gain") for method in METHODS}
    ours, other = gains["cj_grpo"], max(gains["one-step grpo"], gains["diffu_grpo"])
    listed = ", ".join(f"{method} {100 * gain:+.1f}" for method, gain in gains.items())
    return {
        "name": "3 CJ-GRPO against one-step objectives, equal rollouts and steps",
        "demand": f"gain > 0 and >= {GAIN_RATIO:g}x that of the better of one-step GRPO and diffu-GRPO",
        "measured": f"{listed} points",
        "holds": ours > 0 and ours >= GAIN_RATIO * max(other, 0.0),
        "per_seed": [
            {"base": row[0]["base"]} | {m: run["accuracy"] for m, run in zip(METHODS, row, strict=True)}
            for row in zip(*(by_method[method] for method in METHODS), strict=True)
        ],
    }


def _table(
    digits: list[Measured],
    shifts: list[Measured],
    embedded: list[Measured],
    by_method: dict[str, list[Measured]],
    rates: dict[str, float],
) -> str:
    rows: list[Sequence[object]] = []
    for name in _decoders():
        cells = [spread([r[f"sum {name}"]["accuracy"] for r in digits])]
        cells += [spread([r[f"sum {name}"]["early ends"] for r in digits])]
        cells += [spread([r[f"sum {name}"]["words"] for r in digits], scale=1)]
        rows.append([name, *cells, spread([r[f"short {name}"]["accuracy"] for r in digits])])
    head: Sequence[str] = ("decoder, no training", "sum %", "end tokens in the first half %", "words", "first digit %")
    tables = [markdown_table(head, rows)]
    kinds = ("uniform", "ass", "uniform eoser", "ass eoser", "uniform half")
    cases = [("worked sums, 4 steps", digits), ("one choice, 4 steps", shifts)]
    cases += [(result["name"], [result]) for result in embedded]
    rows = [[name, *(spread([r[kind] for r in results]) for kind in kinds)] for name, results in cases]
    head = ("log2 L steps, no training", "uniform %", "ASS %", "uniform, EOSER %", "ASS, EOSER %", "L/2 steps, EOSER %")
    tables.append(markdown_table(head, rows))
    rows = [["base", "", spread([r["base"] for r in by_method["cj_grpo"]]), "", "", "", "", ""]]
    for method, results in by_method.items():
        accuracy, gain = spread([r["accuracy"] for r in results]), f"{100 * mean(results, 'gain'):+.1f}"
        rows.append([method, f"{rates[method]:g}", accuracy, gain, *cost_cells(results)])
    head = ("method", "lr", "accuracy % (mean ± sd)", "gain", *COSTS.values())
    tables.append(markdown_table(head, rows))
    return "\n\n".join(tables)
