"""What claim checks share: two processes, training to a score, policy runs with their cost, tuning, tables.

A claim is judged on several seeds. Whatever is tuned is tuned on a seed that is not reported, over the same grid for
every method; optimiser steps, rollouts, forwards and seconds are counted for each.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from unveil.denoisers.base import Denoiser
from unveil.training.denoising_job import DenoisingConfig, DenoisingEval, DenoisingJob
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.policy_config import PolicyConfig, PolicyEval
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, OptimConfig, Trainer

Measured = dict[str, Any]
Report = Callable[[str], None]
Every = Callable[[Callable[..., Measured], Sequence[tuple]], list[Measured]]

TUNING_SEED = 1000
"""Learning rates are chosen on it; it is never among the reported seeds."""
NEVER = 10**9
COSTS = {
    "optimizer_steps": "optimiser steps", "rollouts": "rollouts", "forwards": "forwards", "seconds": "seconds",
}  # fmt: skip
"""What every run is charged with, and how tables call it."""


@contextmanager
def two_processes(report: Report) -> Iterator[Every]:
    """Yields ``every(function, jobs)``: the results of ``function(*job)`` in order, computed by up to two processes.

    ``function`` is a module-level function; its result holds a ``line`` that is reported.
    """
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:

        def every(function: Callable[..., Measured], jobs: Sequence[tuple]) -> list[Measured]:
            waiting = [pool.submit(_alone, function, job) for job in jobs]
            results = []
            for future, job in zip(waiting, jobs, strict=True):
                results.append(future.result())
                subject = " ".join(str(part) for part in job if isinstance(part, str | int | float))
                report(f"{function.__name__.strip('_')} {subject}: {results[-1]['line']}")
            return results

        yield every


def _alone(function: Callable[..., Measured], job: tuple) -> Measured:
    torch.set_num_threads(1)
    return function(*job)


def tune(
    every: Every, train: Callable[..., Measured], out: Path, grids: Mapping[str, Sequence[float]], updates: int,
    order: Callable[[Measured], Any],
) -> dict[str, float]:  # fmt: skip
    """Per method the setting of its grid whose run on the tuning seed is the least in ``order``; of equals the earlier.

    ``train(out, seed, method, setting, updates)`` is a job of `two_processes`.
    """
    jobs = [(out, TUNING_SEED, method, setting, updates) for method, grid in grids.items() for setting in grid]
    found = {job[2:4]: order(run) for job, run in zip(jobs, every(train, jobs), strict=True)}
    return {method: min(grid, key=lambda setting: found[method, setting]) for method, grid in grids.items()}


def on_seeds(
    every: Every, train: Callable[..., Measured], out: Path, seeds: int, settings: Mapping[str, float], updates: int
) -> dict[str, list[Measured]]:
    """Per method its runs with its setting on the seeds 0, 1, ...; ``train`` as of `tune`."""
    jobs = [(out, seed, method, setting, updates) for seed in range(seeds) for method, setting in settings.items()]
    runs = every(train, jobs)
    return {method: [run for job, run in zip(jobs, runs, strict=True) if job[2] == method] for method in settings}


def train_to(
    denoiser: Denoiser,
    data: DenoisingConfig,
    folder: Path,
    *,
    seed: int,
    goal: float,
    score: Callable[[], float],
    lr: float = 3e-3,
    every: int = 20,
    limit: int = 4000,
) -> Measured:
    """Train the denoiser on data until ``score()``, asked ``every`` updates, reaches ``goal``; write it to ``folder``.

    Small tasks have a phase change, so that a number of updates would give bases of very different strength.
    """
    trainer = _trainer(denoiser, lr=lr, updates=NEVER, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    job = DenoisingJob(trainer, data, DenoisingEval(), RunLog(folder, LogConfig(tensorboard=False)), seed=seed)
    reached, update = 0.0, 0
    while reached < goal and update < limit:
        for _ in range(every):
            job.update(update, trainer.optimise)
            update += 1
        reached = score()
    denoiser.eval().save_pretrained(folder)
    return {"updates": update, "accuracy": reached, "line": f"{reached:.3f} after {update} updates"}


def train_steps(
    denoiser: Denoiser,
    data: DenoisingConfig,
    folder: Path,
    *,
    seed: int,
    lr: float,
    updates: int,
    measure: Callable[[int], Measured],
    points: int = 20,
) -> Measured:
    """Train the denoiser on data for ``updates`` steps, ``measure(update)`` before, at up to ``points`` moments, after.

    Returns:
        ``curve`` as of `train_policy`, and the cost.
    """
    every = max(1, updates // points)
    trainer = _trainer(denoiser, lr=lr, updates=updates, folder=folder, every=every)
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, LogConfig(tensorboard=False))
    job = DenoisingJob(trainer, data, DenoisingEval(), log, seed=seed)
    curve: list[Measured] = []

    def follow(update: int) -> None:
        curve.append({"update": update, "optimizer_steps": trainer.cost.optimizer_steps, **measure(update)})

    job.evaluate = follow  # type: ignore[method-assign]
    trainer.fit(job, log)
    log.close()
    return {"curve": curve, **_cost(trainer)}


def train_policy(
    denoiser: Denoiser,
    policy: PolicyConfig,
    folder: Path,
    *,
    seed: int,
    lr: float,
    updates: int,
    measure: Callable[[PolicyJob], Measured],
    points: int = 20,
    microbatch: int = 512,
    weight_decay: float = 0.0,
    snapshots: SnapshotConfig | None = None,
    **optim: Any,
) -> Measured:
    """Improve a policy and follow what ``measure(job)`` finds before, at up to ``points`` moments, and after.

    ``optim`` are further fields of `OptimConfig`.

    Returns:
        ``curve``, a list of measurements with ``optimizer_steps`` and ``update``; ``metrics``, what every update
        logged; and the cost.
    """
    every = max(1, updates // points)
    trainer = _trainer(
        denoiser, lr=lr, updates=updates, folder=folder, every=every, microbatch=microbatch, weight_decay=weight_decay,
        keep_reference=policy.keeps_reference, snapshots=snapshots, **optim,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, LogConfig(tensorboard=False))
    job = PolicyJob(trainer, policy, PolicyEval(problems=1, decoders={}, shown=0), log, seed=seed)
    curve: list[Measured] = []
    logged: list[Measured] = []

    def follow(update: int) -> None:
        curve.append({"update": update, "optimizer_steps": trainer.cost.optimizer_steps, **measure(job)})

    job.evaluate = follow  # type: ignore[method-assign]
    trainer.fit(job, log, lambda _, metrics: logged.append(metrics))
    log.close()
    return {"curve": curve, "metrics": logged, **_cost(trainer)}


def _cost(trainer: Trainer) -> Measured:
    return {key: getattr(trainer.cost, key) for key in COSTS}


def _trainer(
    denoiser: Denoiser,
    *,
    lr: float,
    updates: int,
    folder: Path,
    every: int = NEVER,
    microbatch: int = 512,
    weight_decay: float = 0.0,
    keep_reference: bool = False,
    snapshots: SnapshotConfig | None = None,
    **optim: Any,
) -> Trainer:
    settings: dict[str, Any] = {"lr": lr, "max_grad_norm": 1.0, "microbatch": microbatch, "weight_decay": weight_decay}
    return Trainer(
        denoiser,
        OptimConfig(**(settings | optim)),
        CheckpointConfig(every=NEVER, keep=1),
        snapshots or SnapshotConfig(),
        updates=updates,
        eval_every=every,
        run=folder,
        ranks=Ranks(),
        keep_reference=keep_reference,
    )


def all_runs(by_method: Mapping[str, list[Measured]]) -> list[Measured]:
    return [run for runs in by_method.values() for run in runs]


def total_cost(runs: Sequence[Measured], seconds: float) -> Measured:
    """The cost of all runs together; ``seconds`` is the wall time of the whole check."""
    return {"seconds": seconds} | {key: sum(run.get(key, 0) for run in runs) for key in COSTS if key != "seconds"}


def concluded(
    name: str, checks: Sequence[Measured], runs: Sequence[Measured], started: float, table: str, **chosen: Any
) -> Measured:
    """What the ``reproduce`` of a check returns.

    Args:
        runs: that are charged; ``started``: the clock (`time.perf_counter`) when the first began.
        chosen: what was tuned.
    """
    cost = total_cost(runs, time.perf_counter() - started)
    own = {"name": name, "verdict": verdict(checks), **chosen}
    return own | {"checks": list(checks), "cost": cost, "table": table}


def cost_cells(results: Sequence[Measured]) -> list[str]:
    """Mean costs of runs, under the headings of `COSTS`."""
    return [f"{mean(results, key):.0f}" for key in COSTS]


def verdict(checks: Sequence[Measured]) -> str:
    """``holds``, ``partly`` or ``fails``."""
    held = [check["holds"] for check in checks]
    return "holds" if all(held) else "partly" if any(held) else "fails"


def mean(results: Sequence[Measured], key: str) -> float:
    return statistics.mean(result[key] for result in results)


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """``mean ± standard deviation``, in percent unless ``scale`` says otherwise."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * deviation:.{digits}f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
