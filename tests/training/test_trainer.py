"""Gradient steps: schedule, clipping of norms, nan and inf, precision, checkpoints of good weights only."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.regularisers import Kl
from unveil.training.checkpoints import list_checkpoints
from unveil.training.distribution import Ranks
from unveil.training.log import LogConfig, RunLog
from unveil.training.policy_job import PolicyJob
from unveil.training.snapshots import SnapshotConfig
from unveil.training.trainer import CheckpointConfig, NumericalError, OptimConfig, Trainer


class PullJob:
    """Draws all weights to zero; ``bad`` says at which updates the loss is multiplied by what."""

    def __init__(self, trainer: Trainer, bad: dict[int, float]) -> None:
        self.trainer, self.bad = trainer, bad
        self.kept = 0

    def update(self, update: int, optimise: Callable[..., dict[str, float]]) -> dict[str, Any]:
        factor = self.bad.get(update, 1.0)

        def loss() -> Tensor:
            return factor * torch.stack([p.square().sum() for p in self.trainer.parameters]).sum()

        return dict(optimise([loss]))

    def evaluate(self, update: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make(folder: Path, bad: dict[int, float] | None = None, *, updates: int = 10, every: int = 1, **optim: Any) -> Any:
    trainer = Trainer(
        tiny.denoiser(),
        OptimConfig(**{"lr": 1e-3, **optim}),
        CheckpointConfig(every=every, keep=2),
        SnapshotConfig(),
        updates=updates,
        eval_every=10**6,
        run=folder,
        ranks=Ranks(),
    )
    return trainer, PullJob(trainer, bad or {}), RunLog(folder, LogConfig(tensorboard=False))


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.parameters]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_reported(tmp_path: Path, value: float, capsys: Any) -> None:
    trainer, job, log = make(tmp_path, {2: value, 4: value})
    seen, results = [weights(trainer)], []

    def watch(update: int, metrics: dict[str, Any]) -> None:
        seen.append(weights(trainer))
        results.append(metrics)

    assert trainer.fit(job, log, watch)
    still = [all(map(torch.equal, seen[u], seen[u + 1])) for u in range(10)]
    assert [u for u in range(10) if still[u]] == [2, 4]
    assert [metrics["skipped"] for metrics in results] == [float(u in (2, 4)) for u in range(10)]
    assert trainer.cost.optimizer_steps == 8
    errors = capsys.readouterr().err
    assert "update 3: loss" in errors and "update 5: loss" in errors and errors.count("warning") == 2
    # One good step in between starts the count anew.
    assert trainer.bad_steps == 0


def test_too_many_in_a_row_stop_the_run_with_its_number(tmp_path: Path, capsys: Any) -> None:
    trainer, job, log = make(tmp_path, dict.fromkeys(range(4, 10), math.nan))
    seen: list[list[Tensor]] = []
    with pytest.raises(NumericalError, match=r"update 7: loss nan, .*3 in a row: stopped"):
        trainer.fit(job, log, lambda update, metrics: seen.append(weights(trainer)))
    assert capsys.readouterr().err.count("warning") == 3
    assert all(map(torch.equal, seen[3], weights(trainer)))
    # The newest checkpoint is the one from before the bad row, and it is good.
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "update-000004"
    state = tiny.newest(tmp_path)
    assert all(map(torch.equal, seen[3], state["weights"].values())) and state["bad_steps"] == 0


def test_nan_in_a_parameter_is_never_trained_on_nor_saved(tmp_path: Path) -> None:
    trainer, job, log = make(tmp_path, max_bad_steps=2)

    def poison(update: int, metrics: dict[str, Any]) -> None:
        if update == 3:
            trainer.denoiser.norm.weight.data[5] = math.nan

    with pytest.raises(NumericalError):
        trainer.fit(job, log, poison)
    for path in list_checkpoints(tmp_path / "checkpoints"):
        assert path.name in ("update-000001", "update-000002")
    state = tiny.newest(tmp_path)
    assert all(bool(value.isfinite().all()) for value in state["weights"].values())
    assert math.isnan(trainer.denoiser.norm.weight[5].item())  # not zeroed in silence either


def test_nan_parameter_of_a_denoising_job_names_the_update(tmp_path: Path, capsys: Any) -> None:
    from test_denoising_job import make as make_denoising

    from unveil.training.denoising_job import DenoisingConfig, MixedTask

    job = make_denoising(tmp_path, DenoisingConfig(tasks=[MixedTask(task=tiny.Echo())], response_length=5, batch=8))
    net, trainer = job.denoiser, job.trainer
    job.update(0, trainer.optimise)
    net.blocks[0].qkv.weight.data[0, 0] = math.nan  # type: ignore[index, union-attr]
    before = weights(trainer)
    trainer.done = 1
    for _ in range(2):
        assert job.update(1, trainer.optimise)["skipped"] == 1
    with pytest.raises(NumericalError, match="update 2"):
        job.update(1, trainer.optimise)
    assert "update 2: loss nan" in capsys.readouterr().err
    assert all(
        torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, weights(trainer), strict=True)
    )


@pytest.mark.parametrize("system", ["mdpo", "diffu_grpo"])
def test_nan_in_the_reference_skips_policy_steps(tmp_path: Path, system: str) -> None:
    job: PolicyJob = tiny.job(tmp_path, tiny.policy(system, kl=Kl(beta=0.1), inner_updates=2))
    trainer = job.trainer
    trainer.snapshots.sets["reference"].values["norm.weight"][0] = math.nan
    before = weights(trainer)
    assert job.update(0, trainer.optimise)["skipped"] == 1
    assert trainer.bad_steps == 2 and trainer.cost.optimizer_steps == 0
    with pytest.raises(NumericalError):
        job.update(1, trainer.optimise)
    assert all(map(torch.equal, before, weights(trainer)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("system", ["mdpo", "diffu_grpo"])
def test_an_update_in_either_precision(tmp_path: Path, system: str, precision: str) -> None:
    job = tiny.job(
        tmp_path,
        tiny.policy(system, inner_updates=1),
        optim=OptimConfig(lr=1e-3, precision=precision, max_grad_norm=1e9),  # type: ignore[arg-type]
    )
    seen: list[torch.dtype] = []
    job.denoiser.unembedding.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    metrics = job.update(0, job.trainer.optimise)
    trained = seen[-1]  # rollouts come first
    assert trained == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert metrics["skipped"] == 0 and metrics["ratio_deviation"] == 0
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in job.trainer.parameters)  # type: ignore[union-attr]


def test_bf16_gradients_are_near_those_of_fp32(tmp_path: Path) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        job = tiny.job(
            tmp_path,
            tiny.policy("mdpo", kl=Kl()),
            optim=OptimConfig(lr=1e-3, precision=precision, max_grad_norm=1e9),  # type: ignore[arg-type]
        )
        draw, own = job._sampled, job.trainer.optim

        def sampled(update: int, draw: Any = draw, own: Any = own, precision: str = precision) -> Any:
            own.precision = "fp32"  # the same chains for both
            rollouts = draw(update)
            own.precision = precision
            return rollouts

        job._sampled = sampled  # type: ignore[method-assign]
        job.update(0, job.trainer.optimise)
        found.append(torch.cat([grad.flatten() for grad in tiny.gradients(job.denoiser).values()]))
    assert torch.cosine_similarity(*found, dim=0).item() > 0.99
    assert not torch.equal(*found)


def test_gradient_norm_is_limited_and_reported_before(tmp_path: Path) -> None:
    trainer, job, _ = make(tmp_path, max_grad_norm=0.5)
    whole = torch.cat([2 * p.detach().flatten() for p in trainer.parameters])
    metrics = job.update(0, trainer.optimise)
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    limited = torch.cat([p.grad.flatten() for p in trainer.parameters])
    torch.testing.assert_close(limited, whole * (0.5 / whole.norm()), rtol=1e-4, atol=1e-7)


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    trainer, _, _ = make(tmp_path, weight_decay=0.1)
    decayed, other = (group["params"] for group in trainer.optimizer.param_groups)
    assert all(p.dim() > 1 for p in decayed) and all(p.dim() == 1 for p in other)
    assert len(decayed) + len(other) == len(list(trainer.denoiser.parameters()))
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]


def test_learning_rates() -> None:
    flat = OptimConfig(lr=1.0, warmup=3)
    assert [flat.lr_at(u, 10) for u in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    line = OptimConfig(lr=2.0, schedule="linear", final_lr=0.5)
    assert [line.lr_at(u, 4) for u in range(5)] == pytest.approx([2, 1.75, 1.5, 1.25, 1.0])
    late = OptimConfig(lr=1.0, schedule="linear", decay_from=0.5)
    assert [late.lr_at(u, 8) for u in range(8)] == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert [cosine.lr_at(u, 4) for u in range(4)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * u / 4)) for u in range(4)]
    )


def test_the_optimiser_uses_them(tmp_path: Path) -> None:
    trainer, job, log = make(tmp_path, updates=4, warmup=2, schedule="linear")
    used, reported = [], []

    def watch(update: int, metrics: dict[str, Any]) -> None:
        used.append(trainer.optimizer.param_groups[0]["lr"])
        reported.append(metrics["lr"])

    trainer.fit(job, log, watch)
    assert used == reported == [trainer.optim.lr_at(u, 4) for u in range(4)]


def test_checkpoints_come_at_their_updates_and_at_the_end(tmp_path: Path) -> None:
    trainer, job, log = make(tmp_path, updates=8, every=3)
    written: list[list[str]] = []
    trainer.fit(job, log, lambda u, m: written.append([p.name for p in list_checkpoints(tmp_path / "checkpoints")]))
    assert written[5] == ["update-000003"]
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["update-000006", "update-000008"]


def test_an_unmasking_rule_may_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    net = tiny.with_policy(tiny.denoiser())
    optim = OptimConfig(lr=1e-3, unmask_lr=5e-2, schedule="linear", weight_decay=0.1)
    job = tiny.job(tmp_path, tiny.policy("mdpo"), net, optim=optim, updates=2)
    trainer = job.trainer
    own = set(net.unmask.parameters())  # type: ignore[union-attr]
    groups = trainer.optimizer.param_groups
    assert [bool(own & set(group["params"])) for group in groups] == [False, False, True, True]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    used: list[list[float]] = []
    job.evaluate = lambda update: None  # type: ignore[method-assign]
    trainer.fit(job, job.log, lambda *_: used.append([group["lr"] for group in groups]))
    for row, update in zip(used, range(2), strict=True):
        lr = optim.lr_at(update, 2)
        assert row == pytest.approx([lr, lr, 50 * lr, 50 * lr])
