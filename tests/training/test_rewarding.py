"""Rewards inside an update: asked once per text, failures without a say, a broken reward ends the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from unveil.cli.recipes import find_recipe
from unveil.learning.advantages import GroupAdvantage
from unveil.recipe import build, load, to_yaml
from unveil.rewards.base import Correct, Metadata, Part, Reward, Shaped, Sum
from unveil.rewards.trl import Trl
from unveil.tasks.medium import Text
from unveil.training.policy_job import PolicyJob, _advantages
from unveil.training.rewarding import RewardsLost, reward_chains
from unveil.training.rollouts import Rollouts
from unveil.training.runs import TrainRecipe, train


@dataclass(kw_only=True)
class Words(Reward, name="tiny_words"):
    """Number of words; it fails on completions that begin with ``broken`` and does not apply to ``other``."""

    broken: str = "-"
    other: str = "-"
    seen: list[tuple[str, str]] = field(default_factory=list)

    def scores(self, completions: list[str], prompts: list[str], metadata: list[Metadata]) -> list[Any]:
        self.seen += zip([own["id"] for own in metadata], completions, strict=True)

        def score(words: list[str]) -> Any:
            return float("nan") if [self.broken] == words[:1] else None if [self.other] == words[:1] else len(words)

        return [score(text.split()) for text in completions]


@dataclass(kw_only=True)
class Down(Reward, name="tiny_down"):
    """Answers only in the updates ``up``, counted from 0."""

    up: list[int] = field(default_factory=list)
    calls: int = field(init=False, default=-1)

    def scores(self, completions: list[str], prompts: list[str], metadata: list[Metadata]) -> list[Any]:
        self.calls += 1
        if self.calls not in self.up:
            raise ConnectionError("nobody there")
        return [float(own["correct"]) for own in metadata]


def rolled(job: PolicyJob) -> Rollouts:
    problems = [problem for problem in job._problems(0) for _ in range(4)]
    return job._roll(0, problems, torch.arange(16) // 4)


@pytest.mark.parametrize("system", ["mdpo", "diffu_grpo"])
def test_the_task_s_rewards_are_the_verdicts_of_its_verifier(tmp_path: Path, system: str) -> None:
    for reward, key in ((Correct(), "correct"), (Shaped(), "score")):
        rollouts = rolled(tiny.job(tmp_path, tiny.policy(system, reward=reward)))
        judged, trajectory = rollouts.judged, rollouts.trajectory
        want = torch.zeros(trajectory.active.shape)
        if system == "mdpo":
            found = judged.guess_correct if key == "correct" else judged.guess_score
            want = found.float()  # type: ignore[union-attr]
        for row, verdict in enumerate(judged.verdicts):
            want[row, trajectory.last_steps[row]] = float(getattr(verdict, key))
        assert torch.equal(rollouts.rewards, want) and rollouts.known.all() and want.any()


def test_every_problem_and_text_is_asked_about_once(tmp_path: Path) -> None:
    reward = Words()
    rollouts = rolled(tiny.job(tmp_path, tiny.policy("mdpo", reward=reward)))
    active = int(rollouts.trajectory.active.sum())
    assert len(reward.seen) == len(set(reward.seen)) < active == 16 * 5
    texts = rollouts.judged.guess_samples
    assert texts is not None
    for row, step in rollouts.trajectory.active.nonzero().tolist():
        assert rollouts.rewards[row, step] == len(texts[row][step].split())


@pytest.mark.parametrize("system", ["mdpo", "diffu_grpo"])
def test_a_chain_without_a_score_is_no_member_of_its_group(tmp_path: Path, system: str) -> None:
    job = tiny.job(tmp_path, tiny.policy(system, reward=Words(broken="b", other="d")))
    rollouts = rolled(job)
    known = rollouts.known
    assert 2 <= known.sum() < 16
    advantages = _advantages(job.policy.advantage, rollouts)
    assert not advantages[~known].any()
    rows = known.nonzero().flatten()
    alone = job.policy.advantage.advantages(
        rollouts.rewards[rows], rollouts.trajectory.active[rows], rollouts.group[rows]
    )
    assert torch.equal(advantages[known], alone)


def test_failures_are_counted_logged_and_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"main": Part(reward=Words(broken="b", other="d")), "watched": Part(reward=Down(), role="audit")}
    job = tiny.job(tmp_path, tiny.policy("diffu_grpo", reward=Sum(parts=parts)))
    for update in range(4):  # an audit that is down for ever stops nothing
        metrics = job.update(update, job.trainer.optimise)
        (rewarded,) = job.rewarded
        broken = sum(failure.kind == "not_a_number" for _, failure in rewarded.failures)
        assert metrics["reward_failures"] == broken + rewarded.asked and rewarded.lost == broken > 0
        assert metrics["unrewarded"] == pytest.approx(1 - rewarded.known.float().mean().item())
        final = rewarded.values.sum(1)[rewarded.known]
        assert metrics["reward"] == pytest.approx(metrics["reward/main"]) == pytest.approx(final.mean().item())
        assert metrics["reward/watched"] != metrics["reward/watched"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert warnings[1].startswith("warning: update 1: policy.reward.parts.watched: exception: ConnectionError: nobody")


def test_an_update_without_any_score_changes_no_weight(tmp_path: Path) -> None:
    net = tiny.denoiser()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    job = tiny.job(tmp_path, tiny.policy("mdpo", reward=Down(up=[2])), net)
    tiny.shifted(net)  # away from the reference: the KL alone would move it
    shifted = {name: value.clone() for name, value in net.state_dict().items()}
    for update in range(2):
        metrics = job.update(update, job.trainer.optimise)
        assert metrics["reward"] != metrics["reward"] and metrics["unrewarded"] == 1
        assert metrics["group_reward_std"] == metrics["advantage_abs"] == 0 and metrics["zero_variance_groups"] == 1
        assert tiny.same(net.state_dict(), shifted) == []
    assert job.update(2, job.trainer.optimise)["reward_failures"] == 0
    assert tiny.same(net.state_dict(), shifted) != [] != tiny.same(shifted, before)


def test_a_reward_that_stays_down_ends_the_run_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "mdpo", 9, policy={"reward": Down(up=[0, 3])})
    recipe.checkpoint.every = 2
    with pytest.raises(RewardsLost, match=r"^update 7: policy\.reward gave no score at all \(exception\), 3 updates"):
        train(recipe, tmp_path / "run")
    assert tiny.newest(tmp_path / "run")["update"] == 6
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lost = [line["reward"] is None for line in lines if line["kind"] == "train"]
    assert lost == [False, True, True, False, True, True]


def test_the_trained_reward_need_not_be_the_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "rewards"))
    job = tiny.job(tmp_path, tiny.policy("mdpo", reward=Trl(function="functions:refuses_b")))
    metrics = job.update(0, job.trainer.optimise)
    assert metrics["reward_failures"] > 0 and metrics["reward"] > 1 >= metrics["accuracy"]
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0


def test_recipes_take_a_reward_by_name_and_by_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "rewards"))
    path = find_recipe("mdpo")
    assert build(TrainRecipe, load(path)).policy.reward == Correct()
    assert build(TrainRecipe, load(path, ["policy.reward=score"])).policy.reward == Shaped()
    changed = load(path, ["policy.reward=trl", "policy.reward.function=functions:length", "policy.reward.timeout=2"])
    recipe = build(TrainRecipe, changed)
    assert recipe.policy.reward == Trl(function="functions:length", timeout=2.0)
    assert "function: functions:length" in to_yaml(recipe)


def test_group_advantages_of_one_known_chain_are_zero(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.policy("diffu_grpo"))
    rollouts = rolled(job)
    rollouts.known[:] = False
    rollouts.known[5] = True
    assert not _advantages(GroupAdvantage(), rollouts).any()
    assert reward_chains(Correct(), rollouts.problems, rollouts.judged, rollouts.trajectory, Text()).known.all()
