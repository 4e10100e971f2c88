"""IGPO: placement of hints, repair of hand-made groups, the entropy filter, and whole updates against the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.learning.estimators import PartialMask
from unveil.learning.likelihoods import OneStepLikelihood, TokenViews, TrajectoryLikelihood
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import Kl
from unveil.learning.views import TokenFilter
from unveil.registry import UserError
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems.igpo import HintEntropy, Igpo, Inpaint, cut, reveal, spread
from unveil.systems.mdpo import Mdpo
from unveil.training.policy_config import PolicyConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.rollouts import Rollouts

TAU = 0.7


def hook(**changes: Any) -> Inpaint:
    """For responses of 5 and traces of 2 tokens."""
    settings: dict[str, Any] = {"chunk_min": 1, "chunk_max": 1, "free_tail": 2, "stretch": 1.0, "replacements": 2}
    return Inpaint(**(settings | changes))


# --- chunks


@pytest.mark.parametrize(("length", "low", "high"), [(0, 1, 3), (1, 2, 3), (23, 5, 10), (10, 3, 3), (64, 2, 7)])
def test_chunks_follow_each_other_and_leave_only_a_short_tail(length: int, low: int, high: int) -> None:
    for seed in range(20):
        chunks = cut(length, low, high, generator(seed))
        borders = [0, *(end for _, end in chunks)]
        assert [start for start, _ in chunks] == borders[:-1]
        assert all(low <= end - start <= high for start, end in chunks)
        assert 0 <= length - borders[-1] < low
    sizes = {end - start for seed in range(50) for start, end in cut(200, low, high, generator(seed))[:-1]}
    assert sizes == set(range(low, high + 1))


@pytest.mark.parametrize(
    ("ratio", "shown"), [(0.0, 0), (0.05, 1), (0.1, 1), (0.19, 2), (0.2, 2), (0.6, 6), (0.9, 9), (1.0, 10)]
)
def test_floor_of_the_hidden_share(ratio: float, shown: int) -> None:
    chunks = [(2 * k, 2 * k + 2) for k in range(10)]
    seen = set()
    for seed in range(60):
        found = reveal(chunks, ratio, generator(seed))
        assert len(found) == shown and found == sorted(found) and set(found) <= set(chunks)
        seen |= set(found)
    assert seen == (set(chunks) if shown else set())


def test_spread_by_hand() -> None:
    assert spread([], 1.5, 100) == []
    assert spread([(3, 5), (8, 10), (10, 12)], 1.0, 100) == [3, 8, 10]
    # floor(3 * 1.5) = 4, ends at 6; gap floor(3 * 1.5) = 4; no gap stays none
    assert spread([(3, 5), (8, 10), (10, 12)], 1.5, 100) == [4, 10, 12]
    assert spread([(3, 5), (8, 10), (10, 12)], 1.5, 2) == [4, 8, 10]
    assert spread([(0, 2), (9, 11)], 1.0, 0) == [0, 2]


# --- placement


def test_no_hints_and_the_whole_trace() -> None:
    trace = list(range(10, 17))
    assert hook().place(trace, 12, 0.0, generator(0)) == {}
    assert hook().place([], 12, 0.5, generator(0)) == {}
    assert hook().place(trace, 12, 1.0, generator(0)) == dict(enumerate(trace))
    # a trace longer than its room is cut off; chunks that are too long for a tail do not matter at a share of 1
    assert hook(chunk_min=4, chunk_max=4).place(trace, 7, 1.0, generator(0)) == dict(enumerate(trace[:5]))
    assert hook(free_tail=9).place(trace, 7, 1.0, generator(0)) == {}


def test_hints_are_in_order_inside_their_room_and_stretched() -> None:
    trace = list(range(100, 120))
    for seed in range(50):
        found = hook(chunk_min=2, chunk_max=4, free_tail=6, stretch=1.5).place(trace, 36, 0.5, generator(seed))
        assert found and max(found) < 30
        assert list(found.values()) == sorted(found.values()) and list(found) == sorted(found)
        moved = {token - 100: position for position, token in found.items()}
        assert all(first <= position <= 1.5 * first for first, position in moved.items())
    unmoved = hook(chunk_min=2, chunk_max=4, stretch=1.0).place(trace, 36, 0.5, generator(0))
    assert all(token - 100 == position for position, token in unmoved.items())


def test_the_answer_is_never_shown() -> None:
    net = tiny.denoiser()
    problem = replace(tiny.Echo().problems("train", 1, 0)[0], solution="a b c d a")
    words = net.tokenizer.encode("a b c d a")
    assert hook().trace(problem, net) == words
    assert hook(answer_tokens=2).trace(problem, net) == words[:3]
    assert hook(answer_tokens=9).trace(problem, net) == []
    assert hook(answer_marker="d").trace(problem, net) == words[:3]
    assert hook(answer_marker="a").trace(problem, net) == words[:4]  # the last occurrence
    assert hook(answer_marker="nothing").trace(problem, net) == words
    with pytest.raises(UserError, match="needs problems with a solution"):
        hook().trace(replace(problem, solution=None), net)


def test_shares_of_a_group() -> None:
    shares = hook(ratio_low=0.2, ratio_high=0.6).ratios(1000, generator(0))
    assert shares == sorted(shares) and 0.2 <= shares[0] < 0.21 and 0.59 < shares[-1] <= 0.6
    loose = hook(ratio_low=0.2, ratio_high=0.6, sort=False).ratios(1000, generator(0))
    assert loose != shares and sorted(loose) == shares
    assert hook(ratio_low=0.0, ratio_high=0.0).ratios(3, generator(0)) == [0, 0, 0]
    assert hook(ratio_low=1.0, ratio_high=1.0).ratios(3, generator(0)) == [1, 1, 1]


def test_settings_that_cannot_work() -> None:
    with pytest.raises(UserError, match=r"ratio_low: should be at most ratio_high \(0.3\), got 0.5"):
        hook(ratio_low=0.5, ratio_high=0.3)
    with pytest.raises(UserError, match=r"chunk_min: should be at most chunk_max \(2\), got 3"):
        hook(chunk_min=3, chunk_max=2)
    sampler = MaskedSampler(steps=5, temperature=1.0)
    with pytest.raises(UserError, match=r"free_tail: should be less than rollout.response_length \(5\), got 5"):
        hook(free_tail=5).check_fits(sampler, 4, 5)
    hook(free_tail=5, ratio_low=0.0, ratio_high=0.0).check_fits(sampler, 4, 5)


# --- repair of groups


def job(folder: Path, net: Any = None, **changes: Any) -> PolicyJob:
    own: dict[str, Any] = vars(Igpo(groups=hook(), kl=Kl(beta=0.0))) | changes
    config = PolicyConfig(task=tiny.Echo(), rollout=tiny.rollouts(), **own)
    return tiny.job(folder, config, net or tiny.denoiser())


class Recorder:
    """`roll` of a job, with verdicts written by hand."""

    def __init__(self, policy_job: PolicyJob, right: Sequence[bool]) -> None:
        self.job, self.right = policy_job, right
        self.calls: list[dict[str, Any]] = []
        self.drawn: Rollouts | None = None

    def __call__(self, problems: Any, group: Tensor, **how: Any) -> Rollouts:
        self.calls.append({"problems": list(problems), "group": group, **how})
        self.drawn = judged(self.job._roll(0, list(problems), group, **how), self.right)
        return self.drawn


def judged(rollouts: Rollouts, right: Sequence[bool]) -> Rollouts:
    verdicts = [replace(v, correct=ok, score=float(ok)) for v, ok in zip(rollouts.judged.verdicts, right, strict=True)]
    rewards = torch.zeros_like(rollouts.rewards)
    rewards[torch.arange(len(right)), rollouts.trajectory.last_steps] = torch.tensor(right).float()
    return replace(rollouts, judged=replace(rollouts.judged, verdicts=verdicts), rewards=rewards)


def sampled(policy_job: PolicyJob, right: Sequence[bool]) -> Rollouts:
    problems = [problem for problem in policy_job._problems(0) for _ in range(4)]
    return judged(policy_job._roll(0, problems, torch.arange(16) // 4), right)


def test_only_all_wrong_groups_are_repaired_by_right_samples(tmp_path: Path) -> None:
    base = job(tmp_path)
    # groups 0 and 3 have a right answer, 1 and 2 have none
    before = sampled(base, [True, *[False] * 11, False, False, True, True])
    roll = Recorder(base, [False, True, True, True, *[False] * 4])  # of group 1 three are right, of group 2 none
    after, said = hook().apply(before, roll, base.denoiser)
    (call,) = roll.calls
    assert [p.id for p in call["problems"]] == [p.id for p in before.problems[4:12]]
    assert call["group"].tolist() == [1] * 4 + [2] * 4
    assert said == {
        "all_wrong_groups": 0.5, "all_wrong_left": 0.25, "inpainted_accuracy": 3 / 8, "replaced": 2 / 16,
    }  # fmt: skip
    assert torch.equal(after.group, before.group) and [p.id for p in after.problems] == [p.id for p in before.problems]
    changed = [row for row in range(16) if after.seeds[row] != before.seeds[row]]
    assert len(changed) == 2 and set(changed) <= {4, 5, 6, 7}
    assert roll.drawn is not None
    for row in changed:
        source = roll.drawn.seeds.index(after.seeds[row])
        assert source in (1, 2, 3) and after.correct[row]
        assert torch.equal(after.trajectory.response_ids[row], roll.drawn.trajectory.response_ids[source])
        assert torch.equal(after.trajectory.given[row], roll.drawn.trajectory.given[source])
    assert after.correct.sum() == 3 + 2
    hints = torch.tensor(call["initial"]) != base.denoiser.spec.mask_id
    assert torch.equal(roll.drawn.trajectory.given, hints)
    assert torch.equal(roll.drawn.trajectory.response_ids[hints], torch.tensor(call["initial"])[hints])


def test_repair_is_fixed_by_the_seed_and_none_is_needed_without_all_wrong_groups(tmp_path: Path) -> None:
    base = job(tmp_path)
    wrong, right = [False] * 16, [True] * 16
    first, _ = hook().apply(sampled(base, wrong), Recorder(base, right), base.denoiser)
    again, _ = hook().apply(sampled(base, wrong), Recorder(base, right), base.denoiser)
    assert first.seeds == again.seeds and int(first.correct.sum()) == 4 * 2
    most, _ = hook(replacements=9).apply(sampled(base, wrong), Recorder(base, right), base.denoiser)
    assert int(most.correct.sum()) == 4 * 3  # one member stays
    mixed = sampled(base, [True, False, False, False] * 4)
    roll = Recorder(base, [])
    same, said = hook().apply(mixed, roll, base.denoiser)
    assert (
        same is mixed and not roll.calls and said == {"all_wrong_groups": 0.0, "all_wrong_left": 0.0, "replaced": 0.0}
    )


def test_resampling_is_a_share_of_zero(tmp_path: Path) -> None:
    base = job(tmp_path)
    before = sampled(base, [False] * 16)
    roll = Recorder(base, [False] * 16)
    after, said = hook(ratio_low=0.0, ratio_high=0.0).apply(before, roll, base.denoiser)
    assert all(token == base.denoiser.spec.mask_id for row in roll.calls[0]["initial"] for token in row)
    assert roll.drawn is not None and not torch.equal(
        roll.drawn.trajectory.response_ids, before.trajectory.response_ids
    )
    assert said["all_wrong_left"] == 1.0 and said["replaced"] == 0.0 and after.seeds == before.seeds


def test_hints_do_not_count_in_the_budget_of_a_block(tmp_path: Path) -> None:
    """Two blocks of three, two steps each: a block with h hints reveals its 3 - h holes in min(2, 3 - h) steps."""
    net = tiny.denoiser()
    sampler = MaskedSampler(steps=4, block_length=3, temperature=1.0)
    config = PolicyConfig(
        task=tiny.Echo(), rollout=tiny.rollouts(sampler=sampler, response_length=6), **vars(Igpo(groups=hook()))
    )
    base = tiny.job(tmp_path, replace(config, likelihood=TrajectoryLikelihood()), net)
    problems = base._problems(0)[:3]
    m = net.spec.mask_id
    initial = [[5, m, m, m, m, m], [5, 6, 7, m, 4, m], [m, m, m, m, m, m]]
    chains = base._roll(0, problems, torch.arange(3), label="x", initial=initial).trajectory
    assert chains.revealed is not None and chains.states is not None
    per_step = [chains.revealed[row][chains.active[row]].sum(1).tolist() for row in range(3)]
    assert per_step == [[1, 1, 2, 1], [1, 1], [2, 1, 2, 1]]
    for row in range(3):
        fixed = torch.tensor(initial[row]) != m
        assert torch.equal(chains.given[row], fixed)
        assert (chains.states[row][:, fixed] == torch.tensor(initial[row])[fixed]).all()
        assert not chains.revealed[row][:, fixed].any()


# --- entropy filter


def test_filter_by_hand() -> None:
    scored = torch.tensor([[True] * 6, [True, True, True, True, False, False], [True] * 6])
    given = torch.tensor([[True, True, True, True, True, False], [False, True, True, False, True, True], [False] * 6])
    entropy = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.2, 9.0], [9.0, 0.2, 0.4, 9.0, 8.0, 8.0], [0.0] * 6])
    chain = torch.arange(3)
    views = TokenViews(
        ids=torch.zeros(3, 6, dtype=torch.long), valid=torch.ones(3, 6, dtype=torch.bool), prompt_width=0,
        scored=scored, targets=torch.zeros(3, 6, dtype=torch.long), rows=chain, steps=chain * 0,
        holes=scored.sum(1), length=scored.sum(1),
    )  # fmt: skip
    trajectory = TokenTrajectory(
        prompt_ids=torch.zeros(3, 0, dtype=torch.long), response_ids=torch.zeros(3, 6, dtype=torch.long),
        valid=torch.ones(3, 6, dtype=torch.bool), active=torch.ones(3, 1, dtype=torch.bool), forwards=0, mask_id=0,
        given=given, planned=torch.ones(3, dtype=torch.long),
    )  # fmt: skip

    def dropped(share: float) -> list[list[int]]:
        keep = HintEntropy(share=share).keep(views, entropy, trajectory)
        return [(scored[row] & ~keep[row]).nonzero().flatten().tolist() for row in range(3)]

    assert dropped(0.2) == [[0, 2, 3, 4], [1], []]  # at least one; of equal entropies the first stays
    assert dropped(0.4) == [[0, 2, 4], [1], []]
    assert dropped(0.6) == [[0, 4], [1], []]
    assert dropped(1.0) == [[], [], []]
    with_order = torch.cat([entropy, entropy[:, :1]], 1)
    assert HintEntropy().keep(views, with_order, trajectory)[:, 6].all()


# --- whole updates


def expected_loss(
    base: PolicyJob, rollouts: Rollouts, net: Any, old: Any, ref: Any, *, released: bool, clip: float, beta: float
) -> Tensor:
    """The written formula in float64, one response at a time."""
    trajectory, mask = rollouts.trajectory, base.denoiser.spec.mask_id
    width = trajectory.prompt_ids.shape[1]
    reward = rollouts.correct.double()
    policy: list[Tensor] = []
    divergence: list[Tensor] = []
    counted: list[int] = []
    for row in range(len(rollouts)):
        mates = rollouts.group == rollouts.group[row]
        advantage = reward[row] - reward[mates].mean()
        response = trajectory.response_ids[row]
        canvas = torch.cat([trajectory.prompt_ids[row], torch.full_like(response, mask)])[None]
        valid = trajectory.valid[row][None]
        logs = [(network(canvas, valid)[0, width:] / TAU).log_softmax(-1) for network in (net, old, ref)]
        new, before, reference = (log[torch.arange(len(response)), response] for log in logs)
        entropy = torch.special.entr(logs[1].exp()).sum(-1).detach()
        hints = trajectory.given[row].nonzero().flatten().tolist()
        best = sorted(hints, key=lambda k: -float(entropy[k]))[: max(1, len(hints) // 5)]
        kept = [k for k in range(len(response)) if k not in hints or k in best]
        ratio_over = list(range(len(response))) if released else kept
        rho = (new[ratio_over] - before[ratio_over].detach()).mean().exp()
        policy.append(-torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage))
        d = reference[kept].detach() - new[kept]
        divergence.append((d.exp() - d - 1).sum())
        counted.append(len(kept))
    total = sum(counted)
    if released:  # mean over all tokens that are left, a token's policy term being its chain's
        terms = [(n * p + beta * k) / total for n, p, k in zip(counted, policy, divergence, strict=True)]
    else:
        terms = [(p + beta * k / n) / len(counted) for n, p, k in zip(counted, policy, divergence, strict=True)]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("microbatch", [3, 512])
def test_two_inner_updates_are_the_written_formula(tmp_path: Path, released: bool, microbatch: int) -> None:
    choices: dict[str, Any] = {"inner_updates": 2, "kl": Kl(beta=0.3), "objective": Igpo().objective}
    choices["objective"] = replace(choices["objective"], clip=0.02)
    if released:
        choices |= {"token_filter": HintEntropy(keeps_ratio=True), "weighting": TokenMean()}
    # the whole trace is shown, so that every repaired chain has hints: two that count as one
    choices["groups"] = hook(ratio_low=1.0, ratio_high=1.0)
    own: dict[str, Any] = vars(Igpo()) | choices
    config = PolicyConfig(task=tiny.Echo(), rollout=tiny.rollouts(), **own)
    optim = tiny.OptimConfig(lr=3e-2, max_grad_norm=1e9, microbatch=microbatch)
    base = tiny.job(tmp_path, config, tiny.denoiser(), optim=optim)
    seen: list[Rollouts] = []
    apply = base.policy.groups.apply  # type: ignore[union-attr]
    answers = iter([[False] * 16, [True, False, True, True] * 4])
    roll_really = base._roll
    base._roll = lambda *a, **k: judged(roll_really(*a, **k), next(answers))  # type: ignore[method-assign]

    def applied(*arguments: Any) -> Any:
        after, said = apply(*arguments)
        seen.append(after)
        return after, said

    base.policy.groups.apply = applied  # type: ignore[union-attr, method-assign]
    before: list[dict[str, Tensor]] = []
    grads: list[dict[str, Tensor]] = []
    losses: list[float] = []

    def optimise(parts: Any) -> dict[str, float]:
        before.append({name: value.clone() for name, value in base.denoiser.state_dict().items()})
        found = base.trainer.optimise(parts)
        losses.append(found["loss"])
        grads.append(tiny.gradients(base.denoiser))
        return found

    base.update(0, optimise)
    (after,) = seen
    assert after.trajectory.given.any(1).sum() == 4 * 2 and after.correct.sum() == 4 * 2
    for number in range(2):
        net = tiny.float64(base.denoiser, **before[number])
        old = tiny.float64(base.denoiser, **before[0])
        loss = expected_loss(base, after, net, old, old, released=released, clip=0.02, beta=0.3)
        loss.backward()
        assert losses[number] == pytest.approx(loss.item(), abs=2e-6)
        expected = tiny.gradients(net)
        for name, found in grads[number].items():
            torch.testing.assert_close(found, expected[name], atol=2e-6, rtol=2e-4)


class Ratios(Clipped):
    """Clipped, and remembers how far ratios were from 1."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        self.__dict__.setdefault("deviations", []).append((log_prob - old).detach().abs().max().item())
        return super().terms(log_prob, old, advantage)


def others() -> dict[str, dict[str, Any]]:
    mdpo = vars(Mdpo(kl=Kl(beta=0.0)))
    revealed = TrajectoryLikelihood(tokens="revealed")
    igpo = vars(Igpo(kl=Kl(beta=0.0)))
    return {
        "mdpo": mdpo | {"objective": Ratios()},
        "trajectory": igpo | {"likelihood": revealed, "objective": Ratios(level="step"), "inner_updates": 1},
        "partial": igpo | {"likelihood": PartialMask(), "objective": igpo["objective"], "inner_updates": 2},
    }


@pytest.mark.parametrize("method", ["mdpo", "trajectory", "partial"])
def test_under_any_masked_method(tmp_path: Path, method: str) -> None:
    choices = others()[method]
    if method == "partial":
        choices["objective"] = Ratios(level="sequence", normalise=True)
    choices |= {"groups": hook(ratio_low=0.5, ratio_high=0.5), "token_filter": HintEntropy()}
    config = PolicyConfig(task=tiny.Echo(), rollout=tiny.rollouts(), **choices)
    base = tiny.job(tmp_path, config, tiny.denoiser())
    answers = iter([[False] * 16, [True, False] * 8])
    roll_really = base._roll

    def by_hand(*arguments: Any, **how: Any) -> Rollouts:
        return judged(roll_really(*arguments, **how), next(answers))

    base._roll = by_hand  # type: ignore[method-assign]
    start = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    metrics = base.update(0, base.trainer.optimise)
    assert metrics["replaced"] == 8 / 16 and metrics["all_wrong_left"] == 0
    assert base.policy.objective.deviations[0] < 1e-5  # type: ignore[attr-defined]
    assert any(not torch.equal(value, start[name]) for name, value in base.denoiser.state_dict().items())


def test_trajectory_likelihood_never_scores_a_hint(tmp_path: Path) -> None:
    base = job(tmp_path, likelihood=TrajectoryLikelihood(), objective=Clipped())
    after, _ = hook(ratio_low=1.0, ratio_high=1.0).apply(
        sampled(base, [False] * 16), Recorder(base, [True] * 16), base.denoiser
    )
    chosen = after.trajectory.active.float()
    views = TrajectoryLikelihood().views(after.trajectory, chosen, after.seeds, base.denoiser.spec)
    hints = after.trajectory.given[views.rows]
    assert hints.any() and not (views.scored & hints).any()
    one = OneStepLikelihood(prompt_mask=0.0, after_end="keep")
    assert not one.resamples and OneStepLikelihood().resamples
    views = one.views(after.trajectory, chosen, after.seeds, base.denoiser.spec)
    assert torch.equal(views.scored, after.trajectory.response_valid)


def test_first_masks_start_at_their_least_share() -> None:
    from unveil.learning.likelihoods import Inner

    shares = [float(PartialMask(low=0.6).masks(200, seed, Inner(0, 4)).holes.double().mean()) for seed in range(60)]
    assert 0.5 < min(shares) < 0.7 and max(shares) > 0.9


def test_filter_is_a_plug_in_without_side_effects() -> None:
    assert TokenFilter.known["hint_entropy"] is HintEntropy and not HintEntropy().keeps_ratio
