"""DCoLT: its module by hand, and loss and gradient of whole updates against loops over the paper's formulas."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from unveil.claims.grid import Blanks, GridDenoiser
from unveil.denoisers.transformer import TransformerDenoiser
from unveil.denoisers.unmask import UnmaskInputs
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped
from unveil.learning.selectors import NonZero
from unveil.samplers.actions import PlackettLuce
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Policy
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems.dcolt import Dcolt, UnmaskingPolicyModule, ValidMean
from unveil.tasks.base import Problem, Verdict
from unveil.training.policy_config import PolicyConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import attach_unmask, choose_trained
from unveil.training.trainer import OptimConfig

UPM = UnmaskingPolicyModule(heads=2, confidence=True)


def carrier(network: UnmaskingPolicyModule = UPM, seed: int = 0) -> TransformerDenoiser:
    """A denoiser with a module whose scores are far from equal."""
    net = tiny.denoiser()
    attach_unmask(net, network, seed)
    assert net.unmask is not None
    with torch.no_grad():
        net.unmask.get_submodule("score").weight.mul_(40)
    return net


def inputs(rows: int = 3, width: int = 6, dim: int = 16, seed: int = 0) -> UnmaskInputs:
    stream = generator(seed, "inputs")
    masked = torch.rand(rows, width, generator=stream) < 0.6
    return UnmaskInputs(
        masked=masked,
        block=torch.arange(width).expand(rows, -1) < 4,
        confidence=torch.rand(rows, width, generator=stream) * masked,
        valid=torch.ones(rows, width, dtype=torch.bool),
        step=torch.arange(rows),
        planned=torch.full((rows,), 5),
        features=torch.randn(rows, width, dim, generator=stream),
    )


def module(network: UnmaskingPolicyModule = UPM) -> torch.nn.Module:
    built = carrier(network).unmask
    assert built is not None
    return built


def test_a_batch_equals_its_rows_and_padding_changes_nothing() -> None:
    upm, batch = module(), inputs()
    together = upm(batch)
    assert together.shape == (3, 6) and together.std() > 0.1
    for row in range(3):
        alone = batch.rows(slice(row, row + 1))
        torch.testing.assert_close(upm(alone), together[row : row + 1], atol=1e-5, rtol=1e-5)
        longer = {
            name: torch.nn.functional.pad(getattr(alone, name), (0, 2)) for name in ("masked", "confidence", "valid")
        }
        longer["block"] = torch.nn.functional.pad(alone.block, (0, 2), value=True)
        longer["features"] = torch.cat([alone.features, torch.full((1, 2, 16), 7.0)], 1)  # type: ignore[list-item]
        padded = upm(dataclasses.replace(alone, **longer))
        torch.testing.assert_close(padded[:, :6], together[row : row + 1], atol=1e-5, rtol=1e-5)


def test_scores_are_those_of_the_written_module() -> None:
    """Everything but attention, recomputed in float64; attention is the denoiser's own block."""
    upm, batch = module(), inputs()
    state = {name: value.double() for name, value in upm.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def adaln(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale, shift = linear(f"{name}.modulation", condition).chunk(2, -1)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-4).sqrt() * (1 + scale) + shift

    angles = [[n / 5 / 10_000 ** (k / 128) for k in range(128)] for n in range(3)]
    wave = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]).double()
    hidden = linear("condition.time.0", wave)
    condition = linear("condition.time.2", hidden * hidden.sigmoid())[:, None]
    condition = condition + state["condition.masked.weight"][batch.masked.long()]
    condition = condition + state["condition.block.weight"][batch.block.long()]
    assert batch.features is not None
    x = adaln("norm_in", batch.features.double())
    told = torch.where(batch.masked, batch.confidence.double().clamp(min=1e-8).log(), 0.0)
    x = x + linear("certainty", told[..., None])
    block = copy.deepcopy(upm).double()
    size = 16 // 2
    turn = torch.arange(6)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.cat([turn, turn], -1)[None, None].double()
    x = block.get_submodule("block")(x, (turn.cos(), turn.sin()), None)
    expected = linear("score", adaln("norm_out", x)).squeeze(-1)
    torch.testing.assert_close(upm(batch).double(), expected, atol=1e-4, rtol=1e-4)


def test_without_adaln_only_features_count() -> None:
    plain, told = module(UnmaskingPolicyModule(heads=2, adaln=False)), module(UnmaskingPolicyModule(heads=2))
    batch = inputs()
    other = dataclasses.replace(
        batch, step=batch.step + 1, masked=~batch.masked, block=~batch.block, confidence=1 - batch.confidence
    )
    assert torch.equal(plain(batch), plain(other))
    assert (told(batch) - told(other)).abs().max() > 1e-3
    for name in ("step", "masked", "block"):
        changed = dataclasses.replace(batch, **{name: getattr(other, name)})
        assert (told(batch) - told(changed)).abs().max() > 1e-4
    unsure = dataclasses.replace(batch, confidence=other.confidence)
    assert torch.equal(told(batch), told(unsure)) and not torch.equal(module()(batch), module()(unsure))


def config(likelihood: TrajectoryLikelihood | None = None, temperature: float = 1.0, **changes: Any) -> PolicyConfig:
    sampler = MaskedSampler(
        steps=4, temperature=temperature, rule=Policy(), block_length=changes.pop("block_length", None)
    )
    rollout = tiny.rollouts(sampler=sampler, response_length=6, **changes.pop("rollout", {}))
    own = vars(Dcolt()) | ({"likelihood": likelihood} if likelihood else {})
    return PolicyConfig(**({"task": tiny.Echo(), "rollout": rollout} | own | changes))


class Spy:
    """Keeps what an update worked with: its chains, and the networks around every gradient step."""

    def __init__(self, job: PolicyJob) -> None:
        self.rollouts: list[Any] = []
        self.before: list[TransformerDenoiser] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.results: list[dict[str, float]] = []
        self.job, self.roll = job, job._roll
        job._roll = self._keep  # type: ignore[method-assign]

    def _keep(self, *given: Any, **how: Any) -> Any:
        self.rollouts.append(self.roll(*given, **how))
        return self.rollouts[-1]

    def optimise(self, losses: Iterable[Any]) -> dict[str, float]:
        net = self.job.denoiser
        self.before.append(copy.deepcopy(net).double().eval())  # type: ignore[arg-type]
        self.results.append(self.job.trainer.optimise(losses))
        self.gradients.append(tiny.gradients(net))
        return self.results[-1]


def log_parts(
    net: TransformerDenoiser,
    sampled: TransformerDenoiser,
    trajectory: TokenTrajectory,
    row: int,
    step: int,
    block: list[int],
) -> tuple[Tensor, Tensor]:
    """Log-probability of the tokens and of the order of one step, as the paper writes them, in float64.

    The confidences that the module is told are part of the state: those of the network that ``sampled`` it.
    """
    assert trajectory.states is not None and trajectory.order is not None and trajectory.guesses is not None
    state = trajectory.states[row, step]
    canvas, valid = torch.cat([trajectory.prompt_ids[row], state])[None], trajectory.valid[row][None]
    start = trajectory.prompt_ids.shape[1]
    features = net.features(canvas, valid)[:, start:]
    logits = net.head(features)[0]
    masked = state == trajectory.mask_id
    assert net.unmask is not None
    believed = sampled(canvas, valid)[:, start:].softmax(-1).amax(-1).detach()
    told = UnmaskInputs(
        masked=masked[None],
        block=torch.tensor([[place in block for place in range(len(state))]]),
        confidence=believed * masked,
        valid=torch.ones(1, len(state), dtype=torch.bool),
        step=torch.tensor([step]),
        planned=torch.tensor([int(trajectory.active[row].sum())]),
        features=features,
    )
    upm = net.unmask
    h = upm(told)[0].double()
    drawn = {int(rank): place for place, rank in enumerate(trajectory.order[row, step].tolist()) if rank}
    left = [place for place in range(len(state)) if masked[place] and place in block]
    order = tokens = features.sum() * 0
    certain = len(drawn) == len(left)
    for rank in sorted(drawn):
        place = drawn[rank]
        tokens = tokens + logits[place].log_softmax(-1)[trajectory.guesses[row, step, place]]
        if not certain:
            order = order + h[place] - h[left].logsumexp(0)
        left.remove(place)
    return tokens, order


def expected(spy: Spy, number: int, size: int, *, clip: float, parts: bool, blocks: list[list[int]]) -> Any:
    """Loss and gradient of the written objective in float64, and how many ratios the clip stopped."""
    rollouts = spy.rollouts[0]
    trajectory = rollouts.trajectory
    new, old = spy.before[number], spy.before[0]
    rewards = rollouts.correct.double().view(-1, size)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    valid = int((advantage != 0).sum())
    total, stopped = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(trajectory)):
        steps = int(trajectory.active[row].sum())
        for step in range(steps):
            block = blocks[step * len(blocks) // steps]
            now = log_parts(new, old, trajectory, row, step, block)
            then = [value.detach() for value in log_parts(old, old, trajectory, row, step, block)]
            pairs = list(zip(now, then, strict=True))
            if not parts:
                pairs = [(now[0] + now[1], then[0] + then[1])]
            for log_new, log_old in pairs:
                rho, a = (log_new - log_old).exp(), advantage[row]
                limited = rho.clamp(1 - clip, 1 + clip)
                stopped += int((rho * a > limited * a).item())
                total = total - torch.minimum(rho * a, limited * a) / steps / valid
    new.zero_grad()
    total.backward()
    return total.item(), tiny.gradients(new), stopped


@pytest.mark.parametrize(
    ("parts", "block_length", "microbatch"), [(False, None, 7), (True, None, 1000), (False, 3, 1000)]
)
def test_loss_and_gradient_of_an_update(tmp_path: Path, parts: bool, block_length: int | None, microbatch: int) -> None:
    chosen = config(
        inner_updates=3,
        objective=Clipped(clip=0.05, level="part" if parts else "step"),
        weighting=ValidMean(parts=parts),
        block_length=block_length,
        rollout={"prompts": 8, "group_size": 2},
    )
    job = tiny.job(tmp_path, chosen, carrier(), optim=OptimConfig(lr=5e-3, max_grad_norm=1e9, microbatch=microbatch))
    spy = Spy(job)
    metrics = job.update(0, spy.optimise)
    assert 0 < metrics["zero_variance_groups"] < 1  # v is not the number of chains
    blocks = [list(range(6))] if block_length is None else [[0, 1, 2], [3, 4, 5]]
    stops = []
    for number in range(3):
        loss, gradient, stopped = expected(spy, number, 2, clip=0.05, parts=parts, blocks=blocks)
        assert spy.results[number]["loss"] == pytest.approx(loss, rel=1e-3, abs=2e-5)
        assert spy.gradients[number].keys() == gradient.keys()
        largest = max(float(value.abs().max()) for value in gradient.values())
        assert largest > 1e-2
        for name, value in gradient.items():
            torch.testing.assert_close(spy.gradients[number][name], value, rtol=2e-3, atol=2e-5 * max(1.0, largest))
        stops.append(stopped)
    assert stops[0] == 0 and max(stops[1:]) > 0  # the clip did something
    moved = {name for name, value in spy.gradients[0].items() if value.abs().max() > 0}
    assert any(name.startswith("unmask_module") for name in moved) and "embedding.weight" in moved


def test_the_order_alone_reaches_the_denoiser(tmp_path: Path) -> None:
    """Without a scored token the denoiser still learns, by the features that the module reads."""
    job = tiny.job(tmp_path, config(TrajectoryLikelihood(tokens="none", order=PlackettLuce())), carrier())
    spy = Spy(job)
    job.update(0, spy.optimise)
    assert spy.gradients[0]["embedding.weight"].abs().max() > 0
    assert not spy.gradients[0]["unembedding.weight"].any()


@pytest.mark.parametrize("block_length", [None, 3])
def test_scored_anew_log_probabilities_equal_the_stored_ones(
    tmp_path: Path, block_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.job(tmp_path, config(block_length=block_length), carrier())
    needs = {*job.policy.needs, "log_prob", "order_log_prob"}
    monkeypatch.setattr(type(job.policy), "needs", property(lambda policy: needs))
    spy = Spy(job)
    job.update(0, spy.optimise)
    assert spy.results[0]["loss"] == pytest.approx(0, abs=1e-6)  # ratio 1: minus the mean advantage
    trajectory = spy.rollouts[0].trajectory
    seeds = [0] * len(trajectory)
    job.denoiser.load_state_dict({k: v.float() for k, v in spy.before[0].state_dict().items()})
    views = job.policy.likelihood.views(trajectory, trajectory.active.float(), seeds, job.denoiser.spec)
    scored = job.policy.likelihood.score(job.denoiser, views, MaskedSampler(steps=1, temperature=1.0)).log_prob
    tokens = trajectory.log_prob[views.rows, views.steps] * trajectory.revealed[views.rows, views.steps]
    torch.testing.assert_close(scored[:, :-1], tokens, atol=1e-5, rtol=1e-5)
    order = trajectory.order_log_prob[views.rows, views.steps]
    torch.testing.assert_close(scored[:, -1], order, atol=1e-5, rtol=1e-5)
    ends = (trajectory.states_at(views.rows, views.steps) == trajectory.mask_id) & views.order.inputs.block
    last = ends.sum(1) == (views.order.ranks > 0).sum(1)
    assert last.any() and (order[last] == 0).all() and (order[~last] < 0).all()


def test_order_alone_with_greedy_tokens(tmp_path: Path) -> None:
    """All randomness of a group is in the order; the denoiser stays as it is, the module learns."""
    net = carrier()
    choose_trained(net, "unmask")
    likelihood = TrajectoryLikelihood(tokens="none", order=PlackettLuce())
    job = tiny.job(tmp_path, config(likelihood, temperature=0.0), net)
    weights = copy.deepcopy(net.state_dict())
    spy = Spy(job)
    job.update(0, spy.optimise)
    trajectory = spy.rollouts[0].trajectory
    logits = net(torch.cat([trajectory.prompt_ids, trajectory.states[:, 0]], 1), trajectory.valid)
    greedy = logits[:, trajectory.prompt_ids.shape[1] :].argmax(-1)
    opened = trajectory.order[:, 0] > 0
    assert torch.equal(trajectory.response_ids[opened], greedy[opened])
    first = trajectory.order[:4, 0]
    assert len({tuple(order.tolist()) for order in first}) > 1
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed and all(name.startswith("unmask_module") for name in changed)
    views = likelihood.views(trajectory, trajectory.active.float(), [0] * 16, net.spec)
    assert not views.scored.any() and views.items.sum() == trajectory.active.sum()


@dataclasses.dataclass(kw_only=True)
class Hopeless(tiny.Echo):
    """Nothing is right."""

    def check(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(correct=False, score=0.0)


def test_an_update_of_equal_rewards_changes_nothing(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, config(), carrier())
    job.update(0, job.trainer.optimise)  # Adam has momentum now
    job.policy.task = Hopeless()
    weights = copy.deepcopy(job.denoiser.state_dict())
    forwards = job.trainer.cost.forwards
    spy = Spy(job)
    metrics = job.update(1, spy.optimise)
    assert metrics["zero_variance_groups"] == 1
    assert all(torch.equal(value, weights[name]) for name, value in job.denoiser.state_dict().items())
    assert job.trainer.cost.forwards - forwards == spy.rollouts[0].trajectory.forwards  # no gradient pass either


def test_weights_by_hand(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, config(), carrier())
    trajectory = job._roll(0, tiny.Echo().problems("train", 4, 0), torch.arange(4)).trajectory
    advantages = torch.tensor([1.0, 0.0, -2.0, 0.5])[:, None] * trajectory.active
    chosen = NonZero().choose(advantages, trajectory, [], job.denoiser.spec)
    assert torch.equal(chosen > 0, trajectory.active & (torch.arange(4) != 1)[:, None])
    views = job.policy.likelihood.views(trajectory, chosen, [0] * 4, job.denoiser.spec)
    advantage = advantages[views.rows, views.steps]

    def total(value: float) -> float:
        return 2 * value  # as if a second rank had as many valid chains

    joint, kl = ValidMean().weights(views, advantage, trajectory, total)
    assert torch.equal(joint, kl) and not joint[~views.items].any()
    torch.testing.assert_close(joint.sum(1), torch.full((len(views),), 1 / 4 / 6))
    apart, _ = ValidMean(parts=True).weights(views, advantage, trajectory, total)
    torch.testing.assert_close(apart[:, :-1].sum(1), torch.full((len(views),), 1 / 4 / 6))
    torch.testing.assert_close(apart[:, -1], torch.full((len(views),), 1 / 4 / 6))


def test_the_claims_task_asks_for_the_blanks_alone() -> None:
    task = Blanks()
    validation, test = task.held_out(120, 0)
    assert len(validation) + len(test) == 120
    grids = [{problem.answer["solution"] for problem in part} for part in (validation, test)]
    train = {problem.answer["solution"] for problem in task.problems("train", 100, 0)}
    assert not grids[0] & grids[1] and not (grids[0] | grids[1]) & train
    problem = test[0]
    right = problem.solution.split()
    assert problem.prompt.split().count("0") == len(right) == 10
    assert task.check(problem, " ".join(right)) == Verdict(correct=True, score=1.0)
    wrong = [str(int(right[0]) % 4 + 1), *right[1:]]
    assert task.check(problem, " ".join(wrong)) == Verdict(correct=False, score=0.9)
    assert not task.check(problem, " ".join(right[:9])).correct
    assert not task.check(problem, " ".join([*right, "1"])).correct


def test_the_claims_network_sees_the_response_in_the_empty_cells() -> None:
    net = GridDenoiser()
    net.initialise(generator(0, "grid"))
    problem = Blanks().problems("train", 1, 0)[0]
    prompt, response = (net.tokenizer.encode(text) for text in (problem.prompt, problem.solution))
    ids = torch.tensor([prompt + response, prompt + [net.spec.mask_id] * 10])
    features = net.features(ids, torch.ones_like(ids, dtype=torch.bool))
    assert features.shape == (2, 26, 64) and not features[:, :16].any()
    cells = [place for place, cell in enumerate(problem.prompt.split()) if cell == "0"]
    seen = net.embedding(torch.tensor(prompt))
    seen[cells] = net.embedding(torch.tensor(response))
    x = seen + net.cell_embedding
    x = x + net.empty_embedding(torch.tensor([int(place in cells) for place in range(16)]))
    x = x[None]
    for block in net.blocks:
        x = block(x, (net.cos, net.sin), None)
    torch.testing.assert_close(features[0, 16:], net.norm(x)[0, cells], atol=1e-5, rtol=1e-5)
