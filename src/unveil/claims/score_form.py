"""The score-entropy half of DCoLT's claim (arXiv 2505.10446) on 4 x 4 Sudoku, a part of ``unveil reproduce dcolt``.

Task: 10 blanks of a 4 x 4 grid. Network: 2 layers, 64 wide, told the time, with a head of log-scores; trained by the
score entropy until 8 Euler (tau-leaping) steps, tokens drawn at temperature 1, fill 40 % of the validation grids. From
there, for 40 optimiser steps each, with the best checkpoint on validation grids:

    rl     DCoLT with the transition as policy: what each masked position became, or that it stayed; 8 groups of 16
    sft    more of the score entropy, on 128 new grids a step

Each has a grid of three learning rates, chosen on a seed that is not reported. All numbers are of test grids.

6. Score form, RL: >= +7 points over the base (sampled, mean over seeds), as the paper's SEDD gains over its SFT.
7. And more than training on by the score entropy for as many optimiser steps.
8. Scored anew, the log-probabilities of its rollouts equal the stored ones to 1e-4.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch

from unveil.claims.grid import Blanks, GridDenoiser
from unveil.claims.laboratory import (
    COSTS,
    TUNING_SEED,
    Measured,
    Report,
    all_runs,
    cost_cells,
    markdown_table,
    mean,
    on_seeds,
    spread,
    total_cost,
    train_policy,
    train_steps,
    train_to,
    tune,
    two_processes,
)
from unveil.denoisers.score import Scored
from unveil.learning.reverse import ReverseLikelihood
from unveil.processes.score_entropy import LogLinear
from unveil.samplers.reverse import ReverseSampler
from unveil.seeds import derive_seed, generator
from unveil.systems.dcolt import Dcolt
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import evaluate, sample_problems
from unveil.training.denoising_job import DenoisingConfig, MixedTask
from unveil.training.policy_config import PolicyConfig, RolloutConfig

BLANKS, STEPS = 10, 8
DIM = 64
BASE_GOAL = 0.40
UPDATES = 40
RATES = {"rl": (2e-4, 5e-4, 1e-3), "sft": (3e-4, 1e-3, 3e-3)}
HELD_OUT, VALIDATION = 2000, 400
GAIN, SAME = 0.07, 1e-4


class ScoreGridDenoiser(Scored, GridDenoiser):
    """The small network of the other checks, in its score form."""

    def __init__(self) -> None:
        super().__init__(blanks=BLANKS, dim=DIM)
        self.told_the_time(LogLinear(), DIM)


def score_form(seeds: int, quick: bool, out: Path, report: Report) -> dict[str, Any]:
    """Run the three checks; see the module docstring.

    Args:
        seeds: independent repetitions (networks and training).
        quick: a third of the training, the middle learning rates.
        out: folder for networks.
        report: receives progress lines.

    Returns:
        checks with demand and measured values per seed, learning_rates, cost, a Markdown table.
    """
    started = time.perf_counter()
    numbers = list(range(seeds))
    updates = UPDATES // 3 if quick else UPDATES
    with two_processes(report) as every:
        every(_base, [(out, seed) for seed in numbers + ([] if quick else [TUNING_SEED])])
        rates = {method: grid[1] for method, grid in RATES.items()}
        if not quick:
            rates = tune(every, _train, out, RATES, updates, lambda run: -run["validation"])
        base = every(_untrained, [(out, seed) for seed in numbers])
        by_method = on_seeds(every, _train, out, seeds, rates, updates)
    return {
        "learning_rates": {f"score form, {method}": rate for method, rate in rates.items()},
        "checks": _checks(base, by_method["rl"], by_method["sft"]),
        "cost": total_cost(all_runs(by_method), time.perf_counter() - started),
        "table": _table(base, by_method, rates),
    }


def _base(out: Path, seed: int) -> Measured:
    """The network of a seed, trained by the score entropy."""
    denoiser = ScoreGridDenoiser()
    denoiser.initialise(generator(seed, "score grid"))
    validation, _ = _held_out()

    def score() -> float:
        return _share(denoiser, validation, 1.0)

    return train_to(denoiser, _data(), out / f"score-{seed}", seed=seed, goal=BASE_GOAL, score=score)


def _data() -> DenoisingConfig:
    tasks = [MixedTask(task=Blanks(blanks=BLANKS))]
    return DenoisingConfig(tasks=tasks, response_length=BLANKS, batch=128, form="time")


def _train(out: Path, seed: int, method: str, lr: float, updates: int) -> Measured:
    """One training from the base of a seed; its best checkpoint by validation, on the test grids."""
    denoiser = ScoreGridDenoiser()
    denoiser.load(out / f"score-{seed}")
    validation, test = _held_out()
    best: dict[str, Any] = {"validation": -1.0}

    def measure(update: int) -> Measured:
        found = _share(denoiser, validation, 1.0)
        if found > best["validation"]:
            best.update(validation=found, weights=copy.deepcopy(denoiser.state_dict()), update=update)
        return {"validation": found}

    folder, own = out / f"score-{method}-{lr:g}-{seed}", derive_seed(seed, method)
    policy = _policy()
    if method == "rl":
        run = train_policy(
            denoiser, policy, folder, seed=own, lr=lr, updates=updates, points=8,
            measure=lambda job: measure(job.trainer.cost.optimizer_steps),
        )  # fmt: skip
    else:
        run = train_steps(denoiser, _data(), folder, seed=own, lr=lr, updates=updates, points=8, measure=measure)
    denoiser.load_state_dict(best["weights"])
    denoiser.eval()
    result: Measured = {"validation": best["validation"], "sampled": _share(denoiser, test, 1.0)}
    result["greedy"] = _share(denoiser, test, 0.0)
    if method == "rl":
        result["replay"] = _replay(denoiser, policy, seed)
    line = f"sampled {result['sampled']:.3f} greedy {result['greedy']:.3f} (checkpoint {best['update']} of {updates})"
    return run | result | {"line": line}


def _policy() -> PolicyConfig:
    rollout = RolloutConfig(sampler=_sampler(1.0), response_length=BLANKS, prompts=8, group_size=16)
    choices = vars(Dcolt()) | {"likelihood": ReverseLikelihood(method="euler")}
    return PolicyConfig(task=Blanks(blanks=BLANKS), rollout=rollout, **choices)


def _replay(denoiser: ScoreGridDenoiser, policy: PolicyConfig, seed: int) -> float:
    """The largest difference between stored log-probabilities of rollouts and those that training would compute."""
    problems = policy.task.problems("train", 32, seed)
    needs = {*policy.likelihood.needs, "log_prob"}
    trajectory = sample_problems(denoiser, problems, _sampler(1.0), response_length=BLANKS, seed=seed, needs=needs)
    views = policy.likelihood.views(trajectory, trajectory.active.float(), [0] * len(problems), denoiser.spec)
    with torch.no_grad():
        scored = policy.likelihood.score(denoiser, views, _sampler(1.0)).log_prob
    assert trajectory.log_prob is not None
    return (scored - trajectory.log_prob[views.rows, views.steps]).abs().max().item()


def _untrained(out: Path, seed: int) -> Measured:
    denoiser = ScoreGridDenoiser()
    denoiser.load(out / f"score-{seed}").eval()
    _, test = _held_out()
    found = {"sampled": _share(denoiser, test, 1.0), "greedy": _share(denoiser, test, 0.0)}
    return found | {"line": f"sampled {found['sampled']:.3f} greedy {found['greedy']:.3f}"}


def _held_out() -> tuple[list[Problem], list[Problem]]:
    """Puzzles for validation and for the test."""
    validation, test = Blanks(blanks=BLANKS).held_out(HELD_OUT, 0)
    return validation[:VALIDATION], test


def _sampler(temperature: float) -> ReverseSampler:
    return ReverseSampler(steps=STEPS, method="euler", temperature=temperature)


def _share(denoiser: ScoreGridDenoiser, problems: list[Problem], temperature: float) -> float:
    sampler = _sampler(temperature)
    return evaluate(denoiser, Blanks(blanks=BLANKS), problems, sampler, response_length=BLANKS).accuracy


def _checks(base: list[Measured], rl: list[Measured], sft: list[Measured]) -> list[Measured]:
    gain = mean(rl, "sampled") - mean(base, "sampled")
    other = mean(sft, "sampled") - mean(base, "sampled")
    per_seed = [
        {"base": before["sampled"], "rl": ours["sampled"], "sft": theirs["sampled"]}
        for before, ours, theirs in zip(base, rl, sft, strict=True)
    ]
    replay = max(result["replay"] for result in rl)
    return [
        {
            "name": "6 score form, RL",
            "demand": f">= +{100 * GAIN:g} points over the base, sampled",
            "measured": f"{100 * gain:+.1f} points",
            "holds": gain >= GAIN,
            "per_seed": per_seed,
        },
        {
            "name": "7 score form, RL against more of the score entropy",
            "demand": "a larger gain, sampled, in as many optimiser steps",
            "measured": f"{100 * gain:+.1f} against {100 * other:+.1f} points",
            "holds": gain > other,
            "per_seed": per_seed,
        },
        {
            "name": "8 score form, stored log-probabilities",
            "demand": f"scored anew, the same to {SAME:g}",
            "measured": f"largest difference {replay:.1e}",
            "holds": replay <= SAME,
            "per_seed": [{"difference": result["replay"]} for result in rl],
        },
    ]


def _table(base: list[Measured], by_method: dict[str, list[Measured]], rates: dict[str, float]) -> str:
    def accuracies(results: list[Measured]) -> list[str]:
        return [spread([result[kind] for result in results]) for kind in ("sampled", "greedy")]

    rows: list[list[object]] = [["base", "", *accuracies(base), "", "", "", ""]]
    for method, results in by_method.items():
        rows.append([method, f"{rates[method]:g}", *accuracies(results), *cost_cells(results)])
    head = ["score form", "lr", "sampled % (mean ± sd)", "greedy %"]
    head += COSTS.values()
    return markdown_table(head, rows)
