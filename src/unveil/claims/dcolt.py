"""Claim check of DCoLT (arXiv 2505.10446) on 4 x 4 Sudoku; ``unveil reproduce dcolt``.

Task: 10 blanks of a 4 x 4 grid, filled in 5 steps of 2; right if the grid is valid. Network: 2 layers, 64 wide, trained
on random masks only until greedy tokens in random order fill 55 % of the validation grids: two blanks that depend on
each other are then often filled at once, which a better order and surer tokens both help against.

Trainings, of 8 prompts in groups of 16 per update, each with its best checkpoint on validation grids:
    order           60 updates of the unmasking policy module alone, greedy tokens (it also reads log-confidences)
    tokens          120 updates of the denoiser alone, random order, tokens drawn at temperature 1
    both            `order`, then 60 updates of order and tokens together, at one learning rate
    order, longer   `order`, then 60 more of the same; reported
    order, plain    60 updates of a module without AdaLN; reported
`order` has a grid of three learning rates, `tokens` and `both` share another; each is chosen on a seed that is not
reported. Numbers are of test grids, which neither training nor validation shows. "Sampled" draws tokens (and a learned
order) as in the rollouts; "greedy" takes the likeliest.

1. Order alone, greedy: >= +10 points over random order, in the mean over seeds.
2. Tokens alone, sampled: >= +7 points over the base.
3. Both, sampled: >= +7 points over the base, and >= tokens alone - 2 points.
4. The paper's ablation, greedy: none < order < both in the mean over seeds, by 2 points or more each.
5. Scored anew, the log-probabilities of rollouts equal the stored ones to 1e-4.
6.-8. The score-entropy form: `unveil.claims.score_form`, with an experiment of its own.
Confidence order is reported, without a demand: on a network this regular it is close to the best order.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from unveil.claims.grid import Blanks, GridDenoiser
from unveil.claims.laboratory import (
    COSTS,
    TUNING_SEED,
    Every,
    Measured,
    Report,
    all_runs,
    cost_cells,
    markdown_table,
    mean,
    spread,
    total_cost,
    train_policy,
    train_to,
    two_processes,
    verdict,
)
from unveil.claims.score_form import score_form
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.samplers.actions import PlackettLuce
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, Policy, Random, Rule
from unveil.seeds import derive_seed, generator
from unveil.systems.dcolt import Dcolt, UnmaskingPolicyModule
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import evaluate, sample_problems
from unveil.training.denoising_job import DenoisingConfig, MixedTask
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import attach_unmask, choose_trained

BLANKS, STEPS = 10, 5
BASE_GOAL = 0.55
UPDATES, TUNING = 60, 40
"""Of a training (`tokens`: twice as many, as `both` has with its start), and of one that chooses a learning rate."""
RATES = {"order": (1e-3, 2e-3, 4e-3), "tokens": (5e-5, 1.5e-4, 5e-4), "both": (5e-5, 1.5e-4, 5e-4)}
HELD_OUT, VALIDATION = 2000, 400
"""Puzzles of grids that training never shows; those of half of these grids are for validation, at most so many."""
ORDER_GAIN, GAIN, SLACK, SAME = 0.10, 0.07, 0.02, 1e-4


def reproduce(seeds: int, quick: bool, out: Path, report: Report) -> dict[str, Any]:
    """Run all checks; see the module docstring.

    Args:
        seeds: independent repetitions (networks and training).
        quick: a third of the training, the middle learning rates: shows that everything runs, and how.
        out: folder for networks and curves.
        report: receives progress lines.

    Returns:
        name, verdict (holds | partly | fails), checks with demand and measured values per seed, cost, a Markdown table.
    """
    started = time.perf_counter()
    numbers = list(range(seeds))
    updates = UPDATES // 3 if quick else UPDATES
    with two_processes(report) as every:
        every(_base, [(out, seed) for seed in numbers + ([] if quick else [TUNING_SEED])])
        rates = {method: grid[1] for method, grid in RATES.items()} if quick else _tuned(every, out)
        untrained = every(_untrained, [(out, seed) for seed in numbers])
        by_method: dict[str, list[Measured]] = {}
        for methods in (("order", "tokens", "order, plain"), ("both", "order, longer")):
            jobs = [
                (out, seed, method, _rate(rates, method), updates * (1 + (method == "tokens")), rates["order"])
                for seed in numbers
                for method in methods
            ]
            for job, result in zip(jobs, every(_train, jobs), strict=True):
                by_method.setdefault(job[2], []).append(result)
    other = score_form(seeds, quick, out / "score", report)
    checks = [*_checks(untrained, by_method), *other["checks"]]
    cost = total_cost(all_runs(by_method), time.perf_counter() - started)
    return {
        "name": "dcolt",
        "verdict": verdict(checks),
        "learning_rates": rates | other["learning_rates"],
        "checks": checks,
        "cost": {key: value + (other["cost"][key] if key != "seconds" else 0) for key, value in cost.items()},
        "table": f"{_table(untrained, by_method, rates)}\n\n{other['table']}",
    }


def _tuned(every: Every, out: Path) -> dict[str, float]:
    """The best learning rate of every training on the tuning seed; `both` starts from the tuned order."""
    best: dict[str, float] = {}
    for methods in (("order", "tokens"), ("both",)):
        order = best.get("order", RATES["order"][0])
        jobs = [(out, TUNING_SEED, method, rate, TUNING, order) for method in methods for rate in RATES[method]]
        found = {job[2:4]: result["validation"] for job, result in zip(jobs, every(_train, jobs), strict=True)}
        for method in methods:
            best[method] = max(RATES[method], key=lambda rate: found[method, rate])
    return best


def _rate(rates: dict[str, float], method: str) -> float:
    return rates[method.split(",")[0]]


def _base(out: Path, seed: int) -> Measured:
    """The under-trained network of a seed."""
    denoiser, task = GridDenoiser(blanks=BLANKS), Blanks(blanks=BLANKS)
    denoiser.initialise(generator(seed, "grid"))
    validation, _ = _held_out(task)

    def score() -> float:
        return _share(denoiser, validation, Random(), 0.0)

    data = DenoisingConfig(tasks=[MixedTask(task=task)], response_length=BLANKS, batch=128)
    return train_to(denoiser, data, out / f"base-{seed}", seed=seed, goal=BASE_GOAL, score=score)


def _folder(out: Path, seed: int, method: str, lr: float) -> Path:
    return out / f"{method.replace(', ', '-')}-{lr:g}-{seed}"


def _train(out: Path, seed: int, method: str, lr: float, updates: int, order_lr: float) -> Measured:
    """One training; its best checkpoint by validation, which is written, on the test grids.

    `both` and `order, longer` continue the training `order` of learning rate ``order_lr``.
    """
    task, kind = Blanks(blanks=BLANKS), method.split(",")[0]
    denoiser = GridDenoiser(blanks=BLANKS).load(out / f"base-{seed}")
    folder = _folder(out, seed, method, lr)
    rule: Rule = Random() if kind == "tokens" else Policy()
    temperature = 0.0 if kind == "order" else 1.0
    likelihood = TrajectoryLikelihood(
        tokens="none" if kind == "order" else "revealed", order=None if kind == "tokens" else PlackettLuce()
    )
    if method in ("order", "order, plain"):
        attach_unmask(denoiser, UnmaskingPolicyModule(confidence=True, adaln=method == "order"), seed)
    elif kind != "tokens":
        denoiser.load_unmask(_folder(out, seed, "order", order_lr) / "unmask.safetensors")
    choose_trained(denoiser, "unmask" if kind == "order" else "all")
    sampler = MaskedSampler(steps=STEPS, temperature=temperature, rule=rule)
    rollout = RolloutConfig(sampler=sampler, response_length=BLANKS, prompts=8, group_size=16)
    policy = PolicyConfig(task=task, rollout=rollout, **vars(Dcolt(likelihood=likelihood)))
    validation, test = _held_out(task)
    decided = Policy(greedy=True) if kind == "order" else rule
    best: dict[str, Any] = {"validation": -1.0}

    def measure(job: PolicyJob) -> Measured:
        found = _share(denoiser, validation, decided, temperature)
        if found > best["validation"]:
            weights = copy.deepcopy(denoiser.state_dict())
            best.update(validation=found, weights=weights, update=job.trainer.cost.optimizer_steps)
        return {"validation": found}

    run = train_policy(
        denoiser, policy, folder, seed=derive_seed(seed, method), lr=lr, updates=updates, measure=measure, points=4
    )
    denoiser.load_state_dict(best["weights"])
    denoiser.eval().save_pretrained(folder)
    greedy = _share(denoiser, test, Random() if kind == "tokens" else Policy(greedy=True), 0.0)
    sampled = _share(denoiser, test, rule, 1.0)
    result = {"validation": best["validation"], "best_update": best["update"], "greedy": greedy, "sampled": sampled}
    gap = {} if kind != "both" else {"replay": _replay(denoiser, policy, seed)}
    line = f"greedy {greedy:.3f} sampled {sampled:.3f} (checkpoint {best['update']} of {updates})"
    return run | result | gap | {"line": line}


def _replay(denoiser: GridDenoiser, policy: PolicyConfig, seed: int) -> float:
    """The largest difference between stored log-probabilities of rollouts and those that training would compute."""
    problems = policy.task.problems("train", 16, seed)
    needs = {*policy.likelihood.needs, "log_prob", "order_log_prob"}
    trajectory = sample_problems(
        denoiser, problems, policy.rollout.sampler, response_length=BLANKS, seed=seed, needs=needs
    )
    views = policy.likelihood.views(trajectory, trajectory.active.float(), [0] * len(problems), denoiser.spec)
    with torch.no_grad():
        scored = policy.likelihood.score(denoiser, views, policy.rollout.sampler).log_prob
    assert trajectory.log_prob is not None and trajectory.order_log_prob is not None
    tokens = trajectory.log_prob[views.rows, views.steps] * views.scored
    stored = torch.cat([tokens, trajectory.order_log_prob[views.rows, views.steps][:, None]], 1)
    return (scored - stored).abs().max().item()


def _held_out(task: Blanks) -> tuple[list[Problem], list[Problem]]:
    """Puzzles for validation and for the test."""
    validation, test = task.held_out(HELD_OUT, 0)
    return validation[:VALIDATION], test


def _untrained(out: Path, seed: int) -> Measured:
    """The base in random and in confidence order."""
    denoiser = GridDenoiser(blanks=BLANKS).load(out / f"base-{seed}").eval()
    _, test = _held_out(Blanks(blanks=BLANKS))
    found = {
        f"{name} {kind}": _share(denoiser, test, rule, temperature)
        for name, rule in (("random", Random()), ("confidence", LowConfidence()))
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }
    return found | {"line": ", ".join(f"{name} {value:.3f}" for name, value in found.items())}


def _share(denoiser: GridDenoiser, problems: list[Problem], rule: Rule, temperature: float) -> float:
    sampler = MaskedSampler(steps=STEPS, rule=rule, temperature=temperature)
    return evaluate(denoiser, Blanks(blanks=BLANKS), problems, sampler, response_length=BLANKS).accuracy


def _checks(untrained: list[Measured], by_method: dict[str, list[Measured]]) -> list[Measured]:
    order, tokens, both = (by_method[method] for method in ("order", "tokens", "both"))
    greedy, sampled = mean(untrained, "random greedy"), mean(untrained, "random sampled")
    gains = {
        "order": mean(order, "greedy") - greedy,
        "tokens": mean(tokens, "sampled") - sampled,
        "both": mean(both, "sampled") - sampled,
    }
    chains = [
        (base["random greedy"], one["greedy"], two["greedy"])
        for base, one, two in zip(untrained, order, both, strict=True)
    ]
    means = [statistics.mean(values) for values in zip(*chains, strict=True)]
    replay = max(result["replay"] for result in both)
    return [
        {
            "name": "1 order alone, greedy tokens",
            "demand": f">= +{100 * ORDER_GAIN:g} points over random order, greedy",
            "measured": f"{100 * gains['order']:+.1f} points",
            "holds": gains["order"] >= ORDER_GAIN,
            "per_seed": [{"random": chain[0], "order": chain[1]} for chain in chains],
        },
        {
            "name": "2 tokens alone",
            "demand": f">= +{100 * GAIN:g} points over the base, sampled",
            "measured": f"{100 * gains['tokens']:+.1f} points",
            "holds": gains["tokens"] >= GAIN,
            "per_seed": [
                {"base": base["random sampled"], "tokens": result["sampled"]}
                for base, result in zip(untrained, tokens, strict=True)
            ],
        },
        {
            "name": "3 order and tokens together",
            "demand": f">= +{100 * GAIN:g} points over the base and >= tokens alone - {100 * SLACK:g}, sampled",
            "measured": f"{100 * gains['both']:+.1f} points against {100 * gains['tokens']:+.1f} of tokens alone",
            "holds": gains["both"] >= max(GAIN, gains["tokens"] - SLACK),
            "per_seed": [
                {"base": base["random sampled"], "both": result["sampled"]}
                for base, result in zip(untrained, both, strict=True)
            ],
        },
        {
            "name": "4 ablation: none < order < both",
            "demand": f"greedy, in the mean, by {100 * SLACK:g} points or more each",
            "measured": ", ".join(f"{100 * value:.1f}" for value in means) + " %",
            "holds": means[1] - means[0] >= SLACK and means[2] - means[1] >= SLACK,
            "per_seed": [{"none": none, "order": one, "both": two} for none, one, two in chains],
        },
        {
            "name": "5 stored log-probabilities",
            "demand": f"scored anew, the same to {SAME:g}",
            "measured": f"largest difference {replay:.1e}",
            "holds": replay <= SAME,
            "per_seed": [{"difference": result["replay"]} for result in both],
        },
    ]


def _table(untrained: list[Measured], by_method: dict[str, list[Measured]], rates: dict[str, float]) -> str:
    rows: list[list[object]] = []
    for name in ("random", "confidence"):
        columns = [spread([result[f"{name} {kind}"] for result in untrained]) for kind in ("greedy", "sampled")]
        rows.append([f"base, {name} order", "", *columns, "", "", "", ""])
    for method, results in by_method.items():
        columns = [spread([result[kind] for result in results]) for kind in ("greedy", "sampled")]
        rows.append([method, f"{_rate(rates, method):g}", *columns, *cost_cells(results)])
    head = ["training", "lr", "greedy % (mean ± sd)", "sampled %", *COSTS.values()]
    return markdown_table(head, rows) + "\n\nCosts of `both` and `order, longer` come on top of their start, `order`."
