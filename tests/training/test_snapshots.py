"""Reference and moving average: values, swaps, formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from unveil.training.snapshots import Following, Snapshot, SnapshotConfig, Snapshots


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_in_place_computes_with_the_snapshot_and_restores() -> None:
    net = tiny.denoiser()
    ids = torch.tensor([[4, 5, 0, 0]])
    start, first = values(net), net(ids)
    snapshot = Snapshot(net)
    tiny.shifted(net)
    live, second = values(net), net(ids)
    with snapshot.in_place():
        assert torch.equal(net(ids), first)
        assert tiny.same(values(net), start) == []
    assert torch.equal(net(ids), second) and not torch.equal(first, second)
    assert tiny.same(values(net), live) == []
    assert tiny.same(snapshot.state_dict(), start) == []


def test_an_exception_inside_restores_too() -> None:
    net = tiny.denoiser()
    snapshots = Snapshots(net, SnapshotConfig(ema_decay=0.5), keep_reference=True)
    tiny.shifted(net)
    live, kept = values(net), {name: dict(s) for name, s in snapshots.state_dict().items()}
    kept = {name: {key: v.clone() for key, v in s.items()} for name, s in kept.items()}
    for name in ("reference", "ema"):
        with pytest.raises(RuntimeError, match="inside"), snapshots.use(name):
            raise RuntimeError("inside")
    assert tiny.same(values(net), live) == [] and tiny.same(snapshots.state_dict(), kept) == []


def test_identity_of_parameters_survives_so_that_the_optimiser_keeps_them() -> None:
    net = tiny.denoiser()
    before = list(net.parameters())
    with Snapshot(net).in_place():
        pass
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))


def test_a_snapshot_that_is_not_kept_is_the_live_network() -> None:
    net = tiny.denoiser()
    snapshots = Snapshots(net, SnapshotConfig(), keep_reference=False)
    tiny.shifted(net)
    live = values(net)
    with snapshots.use("ema"), snapshots.use("reference"):
        assert tiny.same(values(net), live) == []
    assert snapshots.state_dict() == {}


def test_average_and_reference_follow_their_formulas() -> None:
    net = tiny.denoiser()
    config = SnapshotConfig(ema_decay=0.9, reference_sync=2, reference_mix=0.6)
    snapshots = Snapshots(net, config, keep_reference=True)
    average, reference = values(net), values(net)
    for update in range(1, 6):
        tiny.shifted(net, seed=update)
        live = values(net)
        snapshots.after_update(update)
        average = {name: 0.9 * average[name] + 0.1 * live[name] for name in live}
        if update % 2 == 0:
            reference = {name: 0.6 * live[name] + 0.4 * reference[name] for name in live}
        for name in live:
            torch.testing.assert_close(snapshots.sets["ema"].values[name], average[name])
            torch.testing.assert_close(snapshots.sets["reference"].values[name], reference[name])


def test_an_average_that_moves_every_third_update() -> None:
    net = tiny.denoiser()
    snapshots = Snapshots(net, SnapshotConfig(ema_decay=0.9, ema_every=3), keep_reference=False)
    average = values(net)
    for update in range(1, 8):
        tiny.shifted(net, seed=update)
        live = values(net)
        snapshots.after_update(update)
        if update in (3, 6):
            average = {name: 0.9 * average[name] + 0.1 * live[name] for name in live}
        for name in live:
            torch.testing.assert_close(snapshots.sets["ema"].values[name], average[name])


@pytest.mark.parametrize(
    ("following", "decays"),
    [
        (Following(), [0.0] * 6),
        (Following(decay=0.9), [0.9] * 6),
        (Following(decay=0.5, rate=0.2), [0.2, 0.4, 0.5, 0.5, 0.5, 0.5]),
        (Following(decay=0.999, rate=0.3, after=2), [0.0, 0.0, 0.3, 0.6, 0.9, 0.999]),
        (Following(decay=0.7, after=1), [0.0, 0.7, 0.7, 0.7, 0.7, 0.7]),
    ],
)
def test_a_copy_follows_by_its_schedule(following: Following, decays: list[float]) -> None:
    assert [following.decay_at(update) for update in range(1, 7)] == pytest.approx(decays)
    net = tiny.denoiser()
    snapshots, old = Snapshots(net, SnapshotConfig(old=following), keep_reference=False), values(net)
    for update, decay in enumerate(decays, start=1):
        tiny.shifted(net, seed=update)
        snapshots.after_update(update)
        old = {name: decay * old[name] + (1 - decay) * value for name, value in values(net).items()}
        for name, value in snapshots.sets["old"].values.items():
            torch.testing.assert_close(value, old[name])


def test_a_copy_of_every_third_update() -> None:
    net = tiny.denoiser()
    snapshots = Snapshots(net, SnapshotConfig(old=Following(every=3)), keep_reference=False)
    kept = values(net)
    for update in range(1, 8):
        tiny.shifted(net, seed=update)
        snapshots.after_update(update)
        kept = values(net) if update in (3, 6) else kept
        assert tiny.same(snapshots.sets["old"].state_dict(), kept) == []


def test_the_reference_moves_when_the_policy_has_gone_too_far_and_counts_anew() -> None:
    net = tiny.denoiser()
    config = SnapshotConfig(reference_sync=4, reference_mix=1.0, reference_limit=0.1)
    snapshots = Snapshots(net, config, keep_reference=True)
    moved = []
    for update, kl in enumerate([0.0, 0.2, 0.1, None, 0.0, 0.0, 0.0, 0.0, 0.3], start=1):
        tiny.shifted(net, seed=update)
        said = snapshots.after_update(update, kl)
        moved.append(update) if said["reference_moved"] else None
        assert (tiny.same(snapshots.sets["reference"].state_dict(), values(net)) == []) == (update in moved)
    assert moved == [2, 6, 9]
    other = Snapshots(net, config, keep_reference=True)
    other.load_state_dict(snapshots.state_dict())
    assert other.moved == 9


def test_without_sync_the_reference_is_the_initial_policy() -> None:
    net = tiny.denoiser()
    start = values(net)
    snapshots = Snapshots(net, SnapshotConfig(), keep_reference=True)
    for update in range(1, 4):
        tiny.shifted(net, seed=update)
        snapshots.after_update(update)
    assert tiny.same(snapshots.sets["reference"].state_dict(), start) == []


def test_the_average_is_what_is_saved_and_evaluated(tmp_path: Path) -> None:
    from unveil.denoisers.load import load_denoiser

    job = tiny.job(tmp_path, tiny.policy("mdpo"), snapshots=SnapshotConfig(ema_decay=0.5))
    job.update(0, job.trainer.optimise)
    job.trainer.snapshots.after_update(1)
    live = values(job.denoiser)
    job.trainer.save_model(tmp_path / "model")
    average = job.trainer.snapshots.sets["ema"].state_dict()
    saved = dict(load_denoiser(tmp_path / "model").named_parameters())
    assert tiny.same({name: p.detach() for name, p in saved.items()}, average) == []
    with job.trainer.evaluated():
        assert tiny.same(values(job.denoiser), average) == []
    assert tiny.same(values(job.denoiser), live) == [] and tiny.same(live, average)


def test_the_reference_of_a_job_is_its_snapshot(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.policy("mdpo"))
    start = values(job.denoiser)
    tiny.shifted(job.denoiser)
    with job.trainer.reference():
        assert tiny.same(values(job.denoiser), start) == []
