"""GARDO: win rates, gate, novelty and k by hand; what the regulariser averages; events that move the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny_images as tiny
import unveil
from unveil.learning.objectives import Reinforce
from unveil.learning.regularisers import MeanSpace, Velocity
from unveil.learning.selectors import AllSteps
from unveil.learning.views import FIRST
from unveil.recipe import build, load
from unveil.registry import UserError
from unveil.rewards.base import Metadata, Metric, Part, Reward, Score, Shaped, Sum
from unveil.rewards.features import JudgeFeatures, Pixels
from unveil.rewards.networks import Classifier
from unveil.systems.gardo import Gardo, NoveltyAdvantage, UncertaintyGate, resets, win_rates
from unveil.training.outcome import Outcome, join
from unveil.training.policy_config import PolicyConfig, RolloutConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import TrainRecipe

NO_GROUPS = torch.zeros(6, dtype=torch.long)


def reward() -> Sum:
    light = Part(reward=Metric(key="light"), role="audit")
    return Sum(
        parts={"proxy": Part(reward=Shaped()), "light": light, "dark": Part(reward=Metric(key="light"), weight=-1)}
    )


@dataclass(kw_only=True)
class Crooked(Reward):
    """An audit that has nothing to do with the reward, and no ties."""

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        return [float(image.mean()) * 1e3 % 1 for image in completions]


def audited() -> Sum:
    return Sum(parts={"proxy": Part(reward=Shaped()), "other": Part(reward=Crooked(), role="audit")})


def job(folder: Path, snapshots: Any = None, **changes: Any) -> PolicyJob:
    rollout = RolloutConfig(sampler=tiny.sampler(share="noise"), prompts=2, group_size=4)
    config = {"task": tiny.Bright(), "reward": audited(), "rollout": rollout, **vars(Gardo())} | changes
    return tiny.job(folder, PolicyConfig(**config), snapshots=snapshots)


def test_win_rates_by_hand() -> None:
    values = torch.tensor([3.0, 1.0, 3.0, torch.nan, 0.0])
    found = win_rates(values, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(found, torch.tensor([0.4, 0.2, 0.4, torch.nan, 0.0]).double(), equal_nan=True)
    assert win_rates(torch.ones(4), torch.zeros(4, dtype=torch.long)).tolist() == [0, 0, 0, 0]
    in_groups = win_rates(torch.tensor([3.0, 1.0, 7.0, 9.0]), torch.tensor([0, 0, 1, 1]))
    assert in_groups.tolist() == [0.5, 0.0, 0.0, 0.5]


REWARD = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
AUDITS = {"a": torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]), "b": torch.tensor([0.0, 0.0, 2.0, 3.0, 4.0, torch.nan])}
"""w(R) = 0 .. 5 sixths; w(a) = 5, 1, 2, 3, 4, 0 and w(b) = 0, 0, 2, 3, 4, none. The last sample is suspicious."""
UNCERTAINTY = torch.tensor([0 - 2.5, 1 - 0.5, 2 - 2.0, 3 - 3.0, 4 - 4.0, 5 - 0.0], dtype=torch.float64) / 6


def test_uncertainty_and_gate_by_hand() -> None:
    gate = UncertaintyGate(share=0.2)
    torch.testing.assert_close(gate.uncertainty(REWARD, AUDITS, NO_GROUPS), UNCERTAINTY)
    factors, said = gate.factors(REWARD, AUDITS, NO_GROUPS)
    # 0.8 quantile of six values: at place 4, the second largest, 1 / 12. Above it lies the last alone.
    assert factors.tolist() == [0, 0, 0, 0, 0, 6]
    assert said["share"] == 0.2 and said["held"] == pytest.approx(1 / 6)
    assert said["uncertainty"] == pytest.approx((0.5 + 5) / 6 / 5)  # of the five that are not negative
    assert UncertaintyGate(share=0.45).factors(REWARD, AUDITS, NO_GROUPS)[0].tolist() == [0, 3, 0, 0, 0, 3]


def test_the_flipped_gate_holds_the_opposite() -> None:
    flipped = UncertaintyGate(share=0.2, flipped=True)
    torch.testing.assert_close(flipped.uncertainty(REWARD, AUDITS, NO_GROUPS), -UNCERTAINTY)
    assert flipped.factors(REWARD, AUDITS, NO_GROUPS)[0].tolist() == [6, 0, 0, 0, 0, 0]


def test_the_quantile_of_positive_ones() -> None:
    """Of 0, 0, 0, 1/12, 5/6 the 0.7 quantile is at place 2.8: between 0 and 1/12."""
    gate = UncertaintyGate(share=0.3, over="positive")
    assert gate.factors(REWARD, AUDITS, NO_GROUPS)[0].tolist() == [0, 3, 0, 0, 0, 3]


def test_ties_hold_nobody_back() -> None:
    factors, said = UncertaintyGate().factors(torch.ones(6), {"a": torch.ones(6)}, NO_GROUPS)
    assert factors.tolist() == [0] * 6 and said["held"] == 0


def test_ranks_within_prompts() -> None:
    """An easy prompt wins everything in the batch, and nothing more than the other within itself."""
    rewards, groups = torch.tensor([1.0, 2.0, 11.0, 12.0]), torch.tensor([0, 0, 1, 1])
    audits = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    whole = UncertaintyGate().uncertainty(rewards, audits, groups)
    own = UncertaintyGate(ranks="prompt").uncertainty(rewards, audits, groups)
    assert whole.tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])
    assert own.tolist() == [-0.5, 0.5, -0.5, 0.5]


def test_k_follows_the_uncertainty() -> None:
    gate = UncertaintyGate(share=0.1, window=2)
    moved = []
    for level in (0.3, 0.4, 0.35, 0.2, 0.39, 0.25):
        gate._move(level, gate.share if gate.present is None else gate.present)
        moved.append(gate.present)
    # first; above 0.3; within; below 0.35 of (0.4, 0.35); above (0.35, 0.2); within (0.2, 0.39)
    assert moved == pytest.approx([0.1, 0.11, 0.11, 0.099, 0.1089, 0.1089])
    assert gate.past == [0.39, 0.25]
    other = UncertaintyGate(window=2)
    other.load_state_dict(gate.state_dict())
    assert (other.present, other.past) == (gate.present, gate.past)
    for level in range(30):
        gate._move(float(level + 1), gate.present or 0)
    assert gate.present == 0.2
    for level in range(30):
        gate._move(-float(level), gate.present or 0)
    assert gate.present == 0.02
    still = UncertaintyGate(share=0.5, rate=0.0)
    still.factors(REWARD, AUDITS, NO_GROUPS)
    assert still.present == 0.5


def test_novelty_by_hand() -> None:
    """Duplicates have none; cosine distances 1 and 0.5 of the others; a group of duplicates stays at 0."""
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.5, -(0.75**0.5)], [3.0, 3.0], [1.0, 1.0]])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    plain = NoveltyAdvantage(relative=False).novelty(features, group)
    torch.testing.assert_close(plain.float(), torch.tensor([0.0, 0.0, 1.0, 0.5, 0.0, 0.0]), atol=1e-6, rtol=0)
    scaled = NoveltyAdvantage().novelty(features, group)
    torch.testing.assert_close(scaled[:4].float(), torch.tensor([0.0, 0.0, 8 / 3, 4 / 3]), atol=1e-5, rtol=0)
    assert float(scaled[:4].mean()) == pytest.approx(1)
    values = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0])[:, None].expand(-1, 2)
    found = NoveltyAdvantage(relative=False).shaped(values, features, group)[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, -1.0, 2.0, -2.0, 0.0, -3.0]), atol=1e-6, rtol=0)


def test_the_advantage_of_a_batch(tmp_path: Path) -> None:
    policy_job = job(tmp_path)
    rollouts = policy_job._sampled(0)
    outcome = Outcome.of(rollouts, Pixels())
    advantage = policy_job.policy.advantage
    assert isinstance(advantage, NoveltyAdvantage) and outcome.features is not None
    found = outcome.advantages(advantage)
    final, d = outcome.final, advantage.novelty(outcome.features, rollouts.group)
    for row, group in enumerate(rollouts.group.tolist()):
        centred = float(final[row] - final[rollouts.group == group].mean())
        expected = centred * (float(d[row]) if centred > 0 else 1)
        assert found[row].tolist() == pytest.approx([expected] * 5, abs=1e-6)
    whole = join([outcome, outcome])
    assert whole.features is not None and torch.equal(whole.features, torch.cat([outcome.features] * 2))


def test_audits_have_signs_and_are_not_optimised() -> None:
    both = reward()
    assert both.audit_weights == {"light": 1.0} and both.part_weights == {"proxy": 1.0, "dark": -1}
    assert Shaped().audit_weights == {}


def kl_gradient(policy_job: PolicyJob, gate: Tensor | None) -> dict[str, Tensor]:
    """Of the KL term alone, towards a reference that was moved away."""
    rollouts = policy_job._sampled(0)
    rollouts.gate = gate
    for value in policy_job.trainer.snapshots.sets["reference"].values.values():
        value += 0.05
    chosen = torch.ones(8, 5)
    batch = policy_job.steps.batch(rollouts, torch.zeros(8, 5), chosen, keep_old=False, inner=FIRST)
    policy_job.steps.compare([batch])
    policy_job.denoiser.zero_grad()
    for loss in policy_job.steps.losses(batch):
        loss().backward()
    return {name: p.grad.clone() for name, p in policy_job.denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kl", [MeanSpace(beta=2.0, rate=True), Velocity(beta=2.0)])
def test_kl_is_the_mean_over_the_samples_that_are_held(tmp_path: Path, kl: Any) -> None:
    """Gate {1, 6}: the gradient is the mean of those of the two alone, whatever the rest."""
    own = {"kl": kl, "selector": AllSteps(), "objective": Reinforce()}

    def gradient(number: int, rows: list[int]) -> dict[str, Tensor]:
        gate = torch.zeros(8)
        gate[rows] = 8 / len(rows)
        return kl_gradient(job(tmp_path / str(number), **own), gate)

    both, one, two = gradient(0, [1, 6]), gradient(1, [1]), gradient(2, [6])
    every, none = gradient(3, list(range(8))), kl_gradient(job(tmp_path / "4", **own), None)
    for name, value in both.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(every[name], none[name], rtol=1e-4, atol=1e-6)
    assert any((value - none[name]).abs().max() > 1e-3 for name, value in both.items())


def test_an_update_logs_the_gate_and_the_gated_kl(tmp_path: Path) -> None:
    policy_job = job(tmp_path, gate=UncertaintyGate(share=0.2, rate=0.0))
    seen: list[Tensor] = []
    batch = policy_job.steps.batch
    policy_job.steps.batch = lambda rollouts, *rest, **how: seen.append(rollouts.gate) or batch(rollouts, *rest, **how)  # type: ignore
    metrics = policy_job.update(0, policy_job.trainer.optimise)
    gate = torch.cat(seen)
    assert metrics["gate/share"] == 0.2 and metrics["gate/held"] == pytest.approx(float((gate > 0).float().mean()))
    assert 0 < (gate > 0).sum() <= 2 and float(gate.sum()) == pytest.approx(8)


def test_a_gate_that_holds_nobody_has_no_kl(tmp_path: Path) -> None:
    same = Sum(parts={"proxy": Part(reward=Shaped()), "same": Part(reward=Shaped(), role="audit")})
    metrics = job(tmp_path, reward=same).update(0, lambda losses: [loss() for loss in losses] and {})
    assert metrics["gate/held"] == 0 and "kl" not in metrics


@pytest.mark.parametrize(("limit", "every", "expected"), [(1e-12, 100, [1, 1]), (1e9, 2, [0, 1]), (1e9, 100, [0, 0])])
def test_resets(tmp_path: Path, limit: float, every: int, expected: list[int]) -> None:
    """By distance: after the first update with a KL above the limit; by count: every second; else never."""
    policy_job = job(tmp_path, snapshots=resets(limit, every), minibatches=2, gate=None)
    trainer = policy_job.trainer
    moved = []
    for update in range(2):
        metrics = policy_job.update(update, trainer.optimise)
        moved.append(trainer.snapshots.after_update(update + 1, metrics.get("kl"))["reference_moved"])
    assert moved == expected
    reference, live = trainer.snapshots.sets["reference"].values, dict(policy_job.denoiser.named_parameters())
    equal = all(torch.equal(value, live[name]) for name, value in reference.items())
    assert equal == bool(expected[-1])


def on_nft(folder: Path, **changes: Any) -> PolicyJob:
    """The three parts beside DiffusionNFT's loss, as the recipe composes them."""
    recipe = build(TrainRecipe, load(Path(unveil.__file__).parent / "recipes" / "gardo" / "nft.yaml"))
    policy, share = recipe.policy, changes.pop("share", recipe.policy.rollout.sampler.share)
    sampler = replace(policy.rollout.sampler, steps=5, share=share)
    rollout = replace(policy.rollout, sampler=sampler, prompts=2, group_size=4)
    own = {"task": tiny.Bright(), "reward": audited(), "rollout": rollout} | changes
    policy = replace(policy, advantage=NoveltyAdvantage(), **own)
    return tiny.job(folder, policy, snapshots=recipe.snapshots)


def test_on_diffusion_nft_the_gate_holds_velocities(tmp_path: Path) -> None:
    """The recipe's update: the gradient is DiffusionNFT's alone plus beta times the mean over held samples and copies
    of |v - v_ref|^2 by autograd; the logged distance, which resets read, is this mean."""
    policy_job = on_nft(tmp_path, gate=UncertaintyGate(share=0.4))
    net, trainer, policy = policy_job.denoiser, policy_job.trainer, policy_job.policy
    for name in ("reference", "old"):
        for value in trainer.snapshots.sets[name].values.values():
            value += 0.05
    batches: list[Any] = []
    make = policy_job.steps.batch
    policy_job.steps.batch = lambda *rest, **how: batches.append((rest[0], make(*rest, **how))) or batches[-1][1]  # type: ignore

    def gradient(job: PolicyJob) -> tuple[dict[str, Any], dict[str, Tensor]]:
        def optimise(losses: Any) -> dict[str, float]:
            job.denoiser.zero_grad()
            for loss in losses:
                loss().backward()
            return {}

        metrics = job.update(0, optimise)
        return metrics, {name: p.grad.clone() for name, p in job.denoiser.named_parameters() if p.grad is not None}

    metrics, found = gradient(policy_job)
    ((rollouts, batch),) = batches
    held = rollouts.gate > 0
    assert 0 < held.sum() < 8
    views = batch.views
    rows = held[views.rows].nonzero().flatten()
    process = net.spec.process

    def velocity() -> Tensor:
        x = process.corrupt(views.clean[rows], views.times[rows], views.noise[rows])
        return net.predict(x, views.times[rows], views.condition.rows(rows))

    with torch.no_grad(), trainer.using("reference"):
        reference = velocity()
    distance = (velocity() - reference).square().flatten(1).mean(1).mean()
    assert metrics["kl"] == pytest.approx(distance.item(), rel=1e-4)
    net.zero_grad()
    (policy.kl.beta * distance).backward()
    own = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    policy.kl.beta = 0.0
    _, rest = gradient(policy_job)
    for name, value in found.items():
        torch.testing.assert_close(value, rest[name] + own[name], rtol=1e-3, atol=1e-5)
    assert any(value.abs().max() > 1e-3 for value in own.values())


def test_one_noise_for_a_group_of_an_ode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="share: 'noise' with chains that draw no noise makes all samples of a"):
        on_nft(tmp_path, share="noise")


def test_its_memory_is_saved(tmp_path: Path) -> None:
    policy_job = job(tmp_path)
    policy_job.update(0, policy_job.trainer.optimise)
    state = policy_job.state_dict()
    other = job(tmp_path / "other")
    other.load_state_dict(state)
    assert other.state_dict()["gate"] == state["gate"] and state["gate"]["past"]


def test_features() -> None:
    stream = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 8, 8, generator=stream) for _ in range(3)]
    images[1][0, 0, 0] = torch.nan
    found = Pixels().of(images)
    assert found.shape == (3, 64) and found[1, 0] == 0 and torch.equal(found[0], images[0].flatten())
    judge = JudgeFeatures(network="digits-reward").of(images[:1])
    network = Classifier.open("digits-reward")
    torch.testing.assert_close(network.head(judge), network(images[0][None]))


def test_a_published_vision_network(tmp_path: Path) -> None:
    from unveil.rewards.features import VisionFeatures

    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    images = list(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    features = VisionFeatures(path=str(tmp_path), size=28, batch_size=2)
    found = features.of(images)
    assert found.shape == (5, 16)
    torch.testing.assert_close(found[3:4], features.of(images[3:4]), rtol=1e-4, atol=1e-5)


def test_refused() -> None:
    rollout = RolloutConfig(sampler=tiny.sampler(), prompts=2, group_size=4)
    with pytest.raises(UserError, match=r"gate: 'uncertainty' .* no part with the role 'audit' \(allowed: a sum"):
        PolicyConfig(task=tiny.Bright(), reward=Shaped(), rollout=rollout, **vars(Gardo()))
    with pytest.raises(UserError, match="judge-of-nothing"):
        JudgeFeatures(network="judge-of-nothing")
