"""Rewards inside an update: asked once per text, failures without a say, a broken reward ends the run."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from unveil.cli.recipes import find_recipe
from unveil.learning.advantages import GroupAdvantage, Mixed, terminal
from unveil.recipe import build, load, to_yaml
from unveil.registry import UserError
from unveil.rewards.base import Answer, Correct, Metadata, Part, Reward, Shaped, Sum
from unveil.rewards.images import JpegSize
from unveil.rewards.trl import Trl
from unveil.systems.unmasking_policies import Speed
from unveil.tasks.evaluate import evaluate
from unveil.tasks.medium import Text
from unveil.training.outcome import Outcome
from unveil.training.policy_job import PolicyJob
from unveil.training.rewarding import RewardsLost, held_out_rewards, reward_chains
from unveil.training.rollouts import Rollouts, portions
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

    def ask(self, *asked: Any, evaluating: bool = False) -> Answer:
        return Answer(total=[], parts={}) if evaluating else super().ask(*asked)

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
    advantages = Outcome.of(rollouts).advantages(job.policy.advantage, job.policy.reward.part_weights)
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
    assert not Outcome.of(rollouts).advantages(GroupAdvantage()).any()
    assert reward_chains(Correct(), rollouts.problems, rollouts.judged, rollouts.trajectory, Text()).known.all()


# ---- parts apart


def bundle() -> Sum:
    """A solved problem, the number of words, and what only watches or only evaluates."""
    return Sum(
        parts={
            "right": Part(reward=Correct(), weight=2.0),
            "words": Part(reward=Words(other="d"), weight=-0.5),
            "watched": Part(reward=Shaped(), role="audit"),
            "late": Part(reward=Shaped(), role="evaluate", weight=9.0),
        }
    )


def test_normalise_then_sum_is_the_weighted_sum_of_the_parts_own_advantages(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, tiny.policy("diffu_grpo", reward=bundle(), advantage=Mixed(of=GroupAdvantage())))
    rollouts = rolled(job)
    assert set(rollouts.parts) == {"right", "words", "watched"}
    final = terminal(rollouts.parts["words"], rollouts.trajectory.active)
    applies = ~final.isnan()
    assert 4 <= applies.sum() < 16, "some chains have no number of words"
    active, group = rollouts.trajectory.active, rollouts.group
    want = 2 * GroupAdvantage().advantages(rollouts.parts["right"], active, group)
    alone = GroupAdvantage().advantages(rollouts.parts["words"][applies], active[applies], group[applies])
    want[applies] -= 0.5 * alone
    found = Outcome.of(rollouts).advantages(job.policy.advantage, job.policy.reward.part_weights)
    assert torch.allclose(found, want, atol=1e-6) and found.any()
    summed = Outcome.of(rollouts).advantages(GroupAdvantage())
    assert not torch.allclose(found, summed, atol=1e-2), "summing first is another thing"
    assert job.update(0, job.trainer.optimise)["advantage_abs"] > 0


def test_rows_and_joined_rollouts_keep_their_parts(tmp_path: Path) -> None:
    rollouts = rolled(tiny.job(tmp_path, tiny.policy("mdpo", reward=bundle())))
    index = torch.tensor([3, 0, 9])
    again = rollouts.rows(index).extend(rollouts.rows(torch.tensor([1])))
    for name, own in rollouts.parts.items():
        assert torch.equal(again.parts[name].nan_to_num(-7), own[torch.tensor([3, 0, 9, 1])].nan_to_num(-7))


def test_mixing_needs_a_sum_of_whole_samples(tmp_path: Path) -> None:
    for changes, said in (
        ({"reward": Correct(), "advantage": Mixed()}, "advantage: 'mixed' mixes the parts of a sum of rewards, and"),
        ({"reward": bundle(), "advantage": Mixed(), "shaping": Speed(alpha=1.0)}, "shaping: it changes the sum"),
    ):
        with pytest.raises(UserError, match=said):
            tiny.policy("diffu_grpo", **changes)
    with pytest.raises(UserError, match="of: 'mixed' cannot be asked about every part"):
        Mixed(of=Mixed())


def test_a_reward_of_another_medium_is_refused() -> None:
    with pytest.raises(UserError, match="reward: 'jpeg' scores images, and the task's samples are texts"):
        tiny.policy("diffu_grpo", reward=JpegSize())


def test_evaluations_ask_a_bundle_about_everything(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "diffu_grpo", 1, policy={"reward": bundle()})
    train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evals, (update,) = [one for one in lines if one["kind"] == "eval"], [one for one in lines if one["kind"] == "train"]
    assert {"reward/right", "reward/words", "reward/watched"} <= set(update) and "reward/late" not in update
    for line in evals:
        assert line["reward/right"] == line["accuracy"] and line["reward/late"] == pytest.approx(line["score"])
        assert line["reward/watched"] == line["reward/late"] and line["reward"] is not None
        share, count = line["accuracy"], line["problems"]
        assert line["reward_error/right"] == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)
        assert line["reward_error"] >= 0 and "reward_error/late" in line


@pytest.mark.parametrize(("reward", "asked"), [(Words(other="d"), True), (Correct(), False), (Shaped(), False)])
def test_evaluations_ask_any_reward_that_is_not_the_tasks_own_verdict(
    tmp_path: Path, reward: Reward, asked: bool
) -> None:
    job = tiny.job(tmp_path, tiny.policy("diffu_grpo", reward=reward))
    problems, rollout = job.held_out, job.policy.rollout
    judged = evaluate(
        job.denoiser, job.policy.task, problems, rollout.sampler, response_length=rollout.response_length
    ).judged
    found = held_out_rewards(reward, problems, judged)
    if not asked:
        assert found == {}
        return
    scores = reward.scores(list(judged.samples), [], [{"id": problem.id} for problem in problems])
    numbers = torch.tensor([one for one in scores if one is not None], dtype=torch.float64)
    expected = {"reward": numbers.mean().item(), "reward_error": (numbers.std() / len(numbers) ** 0.5).item()}
    assert found == pytest.approx(expected)


# ---- beside the next rollout


@dataclass(kw_only=True)
class Threads(Words, name="tiny_threads"):
    """`Words`, which also notes the thread that it is asked in and how much has been drawn by then."""

    threads: list[str] = field(default_factory=list)

    def scores(self, completions: list[str], prompts: list[str], metadata: list[Metadata]) -> list[Any]:
        self.threads.append(threading.current_thread().name)
        return super().scores(completions, prompts, metadata)


@pytest.mark.parametrize("system", ["mdpo", "diffu_grpo"])
def test_scoring_beside_the_next_rollout_changes_no_number(tmp_path: Path, system: str) -> None:
    found = []
    for beside in (False, True):
        config = tiny.policy(system, reward=Threads(broken="b"))
        config.rollout.score_beside, config.rollout.batch_size = beside, 8
        job = tiny.job(tmp_path / str(beside), config, tiny.denoiser())
        found.append((rolled(job), job.update(1, job.trainer.optimise), job.denoiser.state_dict()))
        names = set(config.reward.threads)  # type: ignore[attr-defined]
        assert (threading.main_thread().name in names) is not beside
        assert len(config.reward.threads) == (4 if beside else 2)  # type: ignore[attr-defined]
    (one, said, weights), (two, also, others) = found
    assert torch.equal(one.rewards, two.rewards) and torch.equal(one.known, two.known) and one.seeds == two.seeds
    assert torch.equal(one.trajectory.response_ids, two.trajectory.response_ids)
    assert said["reward"] == also["reward"] and said["reward_failures"] == also["reward_failures"] > 0
    # Prompts are padded to the longest of their portion, so that sums run in another order.
    assert max((weights[name] - others[name]).abs().max() for name in weights) < 1e-6


def test_a_reward_that_fails_beside_is_counted(tmp_path: Path) -> None:
    config = tiny.policy("diffu_grpo", reward=Down(up=[1]))
    config.rollout.score_beside, config.rollout.batch_size = True, 8
    job = tiny.job(tmp_path, config)
    metrics = job.update(0, job.trainer.optimise)
    assert metrics["unrewarded"] == 0.5 and metrics["reward_failures"] > 0


def test_portions_are_whole_groups() -> None:
    group = torch.arange(5).repeat_interleave(4)
    assert portions(group, 8) == [slice(0, 8), slice(8, 16), slice(16, 20)]
    assert portions(group, 3) == [slice(at, at + 4) for at in range(0, 20, 4)]
    assert portions(group, 100) == [slice(0, 20)] and portions(torch.zeros(3), 2) == [slice(0, 3)]
