"""Unmasking policies: network and reward by hand, and whole updates against loops over the paper's formulas."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tiny
from unveil.cli.main import main
from unveil.denoisers.unmask import UnmaskInputs
from unveil.learning.likelihoods import TokenViews, TrajectoryLikelihood
from unveil.registry import UserError
from unveil.samplers.actions import Action, Bernoulli, DynamicPlackettLuce, PlackettLuce
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, Policy
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems.unmasking_policies import ConfidencePolicy, Experts, Speed, UnmaskingPolicies
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import evaluate, judge, sample_problems
from unveil.training.policy_config import PolicyConfig
from unveil.training.policy_job import PolicyJob
from unveil.training.runs import BaseModel, choose_trained, train
from unveil.training.trainer import OptimConfig


def network(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return ConfidencePolicy(**({"dim": 16, "hidden": 32} | changes)).build(0)


def moved(net: nn.Module, seed: int = 1) -> nn.Module:
    """Past the start, at which neither mask nor time have any effect."""
    stream = generator(seed, "moved")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    return net


def inputs(rows: int, width: int, seed: int = 0, **changes: Tensor) -> UnmaskInputs:
    """After 0 to ``width`` - 1 of ``width`` steps; all of the response is one block."""
    stream = generator(seed, "inputs")
    every = torch.ones(rows, width, dtype=torch.bool)
    made: dict[str, Tensor] = {
        "masked": torch.rand(rows, width, generator=stream) < 0.6,
        "block": every,
        "confidence": torch.rand(rows, width, generator=stream),
        "valid": every,
        "step": torch.randint(width, (rows,), generator=stream),
        "planned": torch.full((rows,), width),
    }
    return UnmaskInputs(**(made | changes))  # type: ignore[arg-type]


def test_at_first_about_an_eighth_is_opened_whatever_the_mask_and_the_time() -> None:
    nets = [network(seed, dim=128, hidden=512) for seed in range(12)]
    given = inputs(32, 12)
    logits = torch.stack([net(given) for net in nets])
    assert logits.mean().item() == pytest.approx(-2.0, abs=0.3)
    assert logits.sigmoid().mean().item() == pytest.approx(0.12, abs=0.02)
    masked = replace(given, masked=given.valid)
    torch.testing.assert_close(nets[0](replace(masked, step=given.step + 3)), nets[0](masked))
    assert sum(p.numel() for p in nets[0].parameters()) == pytest.approx(300_000, rel=0.15)


def test_every_input_counts_afterwards() -> None:
    net = moved(network())
    given = inputs(8, 6)
    base = net(given)
    mirrored = net(replace(given, masked=given.masked.flip(1), confidence=given.confidence.flip(1))).flip(1)
    for other in (
        net(replace(given, masked=~given.masked)),
        net(replace(given, confidence=given.confidence + 0.1 * given.masked)),
        net(replace(given, step=given.step + 1)),
        mirrored,  # the order of positions
    ):
        changed = (other - base).abs().amax(1)
        assert changed[given.masked.any(1)].min() > 1e-4
    torch.testing.assert_close(net(replace(given, step=2 * given.step, planned=2 * given.planned)), base)
    torch.testing.assert_close(net(replace(given, confidence=given.confidence * given.masked)), base)


def by_hand(net: nn.Module, masked: Tensor, confidence: Tensor, progress: float) -> Tensor:
    """The written block for one row, position by position, in float64."""
    p = {name: value.detach().double() for name, value in net.state_dict().items()}
    dim, heads = p["mask.weight"].shape[1], 2
    size = dim // heads

    def linear(x: Tensor, name: str) -> Tensor:
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        unit = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return unit * p[f"{name}.weight"] + p[f"{name}.bias"]

    def turned(x: Tensor, place: int) -> Tensor:
        out = torch.empty_like(x)
        for pair in range(size // 2):
            angle = place * 10_000 ** (-2 * pair / size)
            even, odd = x[2 * pair], x[2 * pair + 1]
            out[pair] = even * math.cos(angle) - odd * math.sin(angle)
            out[size // 2 + pair] = even * math.sin(angle) + odd * math.cos(angle)
        return out

    time = torch.tensor([math.cos(progress)] * 64 + [math.sin(progress)] * 64, dtype=torch.float64)
    hidden = linear(time, "time.0")
    moment = linear(hidden * torch.sigmoid(hidden), "time.2")
    rows = []
    for place, known in enumerate((~masked).tolist()):
        x = linear(torch.ones(1).double() if known else confidence[place : place + 1].double(), "enter")
        parts = linear(p["mask.weight"][0 if known else 1] + moment, "blocks.0.modulation").chunk(6)
        q, k, v = linear(norm(x, "blocks.0.attention_norm") * (1 + parts[0]) + parts[1], "blocks.0.qkv").chunk(3)
        rows.append((x, parts, q.split(size), k.split(size), v.split(size), place))
    result = []
    for x, parts, q, _, _, place in rows:
        mixed = []
        for head in range(heads):
            query = turned(q[head], place)
            scores = torch.stack([query @ turned(k[head], other) / math.sqrt(size) for _, _, _, k, _, other in rows])
            mixed.append(sum(w * row[4][head] for w, row in zip(scores.softmax(0), rows, strict=True)))
        x = x + linear(torch.cat(mixed), "blocks.0.attention_out") * (1 + parts[2])
        inner = linear(norm(x, "blocks.0.mlp_norm") * (1 + parts[3]) + parts[4], "blocks.0.up")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, "blocks.0.down") * (1 + parts[5])
        result.append(linear(norm(x, "norm"), "leave")[0])
    return torch.stack(result)


def test_the_block_against_the_written_formulas() -> None:
    net = moved(network())
    given = inputs(4, 7)
    found = net(given)
    for row in range(4):
        expected = by_hand(net, given.masked[row], given.confidence[row], given.step[row].item() / 7)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_and_batches_change_nothing() -> None:
    net = moved(network())
    lengths = torch.tensor([9, 1, 4, 7, 9, 2])
    valid = torch.arange(9) < lengths[:, None]
    given = inputs(6, 9, planned=lengths, valid=valid)
    given.masked &= valid
    together = net(given)
    for row, length in enumerate(lengths.tolist()):
        alone = given.rows(slice(row, row + 1))
        for name in ("masked", "block", "confidence", "valid"):
            setattr(alone, name, getattr(alone, name)[:, :length])
        torch.testing.assert_close(together[row : row + 1, :length], net(alone), rtol=1e-5, atol=1e-5)


def test_longer_canvases_need_no_change() -> None:
    longer = moved(network())(inputs(2, 40))
    assert longer.shape == (2, 40) and longer.isfinite().all()


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="heads: 3 must divide dim=16 into even head sizes"):
        ConfidencePolicy(dim=16, heads=3)
    with pytest.raises(UserError, match="heads: 2 must divide dim=6 into even head sizes"):
        ConfidencePolicy(dim=6, heads=2)


def chains(steps: list[int], lengths: list[int]) -> TokenTrajectory:
    """Chains of ``steps`` steps on responses of ``lengths`` tokens."""
    width, most = max(lengths), max(steps)
    valid = torch.cat([torch.ones(len(steps), 2), torch.arange(width) < torch.tensor(lengths)[:, None]], 1).bool()
    return TokenTrajectory(
        prompt_ids=torch.zeros(len(steps), 2, dtype=torch.long),
        response_ids=torch.ones(len(steps), width, dtype=torch.long),
        valid=valid,
        active=torch.arange(most) < torch.tensor(steps)[:, None],
        given=torch.zeros(len(steps), width, dtype=torch.bool),
        planned=torch.tensor(lengths),
        forwards=sum(steps),
        mask_id=0,
    )


def test_rewards_of_speed_by_hand() -> None:
    trajectory = chains([1, 3, 4, 2], [4, 4, 4, 8])
    right = torch.zeros(4, 4)
    right[[0, 1, 2], [0, 2, 3]] = 1  # at their last steps; the fourth chain is wrong
    for alpha in (0.0, 0.5, 3.0):
        shaped = Speed(alpha=alpha).shape(right, trajectory)
        expected = torch.zeros(4, 4)
        expected[0, 0], expected[1, 2], expected[2, 3] = 1, 0.5**alpha, 0.25**alpha
        torch.testing.assert_close(shaped, expected)
    added = Speed(alpha=2.0, form="additive").shape(right, trajectory)
    last = [added[0, 0], added[1, 2], added[2, 3], added[3, 1]]
    assert [value.item() for value in last] == pytest.approx([1 - 2 / 4, 1 - 2 * 3 / 4, 1 - 2, -2 * 2 / 8])
    assert not added[~trajectory.active].any()
    # Being wrong in one step pays more than being right in four: what the multiplied reward forbids.
    assert Speed(alpha=2.0, form="additive").shape(right * 0, trajectory)[0, 0] > last[2]


def carrying(**changes: Any) -> tiny.TransformerDenoiser:
    """The tiny denoiser, frozen, with a small policy of its own."""
    net = tiny.denoiser()
    network = ConfidencePolicy(**({"dim": 8, "hidden": 8, "bias": -1.0} | changes))
    torch.manual_seed(0)
    net.attach(network, moved(network.build(net.spec.feature_dim)))
    choose_trained(net, "unmask")
    return net


def config(
    action: Action, *, groups: Experts | None = None, rollout: dict[str, Any] | None = None, **changes: Any
) -> PolicyConfig:
    choices = vars(UnmaskingPolicies(likelihood=TrajectoryLikelihood(tokens="none", order=action)))
    own = {"sampler": MaskedSampler(steps=5, rule=Policy(action=action))} | (rollout or {})
    settings = {"task": tiny.Echo(), "rollout": tiny.rollouts(**own), "groups": groups}
    return PolicyConfig(**(choices | settings | changes))


class Spy:
    """What an update worked with: the chains, the problems of the groups, the policy around every gradient step."""

    def __init__(self, job: PolicyJob) -> None:
        self.job = job
        self.problems: list[Problem] = []
        self.policies: list[nn.Module] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.forwards = 0
        self.forwards_in_update = 0
        likelihood, choose, look = job.policy.likelihood, job._problems, job.denoiser.features
        make = likelihood.views

        def views(trajectory: TokenTrajectory, *rest: Any) -> TokenViews:
            self.trajectory, self.rolled = trajectory, self.forwards
            return make(trajectory, *rest)

        def problems(update: int) -> list[Problem]:
            self.problems = choose(update)
            return self.problems

        def features(*inputs: Tensor | None) -> Tensor:
            self.forwards += 1
            return look(*inputs)  # type: ignore[arg-type]

        likelihood.views = views  # type: ignore[method-assign]
        job._problems = problems  # type: ignore[method-assign]
        job.denoiser.features = features  # type: ignore[method-assign]

    def optimise(self, losses: Iterable[Callable[[], Tensor]]) -> dict[str, float]:
        assert self.job.denoiser.unmask is not None
        self.policies.append(copy.deepcopy(self.job.denoiser.unmask).double())
        result = self.job.trainer.optimise(losses)
        self.losses.append(result["loss"])
        self.gradients.append(tiny.gradients(self.job.denoiser.unmask))
        return result


def text(ids: list[int]) -> str:
    words = []
    for token in ids:
        if token == 2:  # <end>
            break
        if token >= 4:
            words.append(tiny.WORDS[token - 4])
    return " ".join(words)


def log_likelihood(action: Action, logits: Tensor, candidates: list[int], chosen: dict[int, int]) -> Tensor:
    """log pi of one step from the written products; ``chosen`` has the rank of every opened position."""
    if isinstance(action, Bernoulli):
        return sum(
            (logits[place].sigmoid() if place in chosen else 1 - logits[place].sigmoid()).log() for place in candidates
        )  # type: ignore[return-value]
    ranked = sorted(chosen, key=lambda place: chosen[place])
    left = list(candidates)
    total = logits[ranked[0]] - logits[left].logsumexp(0)
    left.remove(ranked[0])
    stop = torch.zeros(1, dtype=logits.dtype)
    for place in ranked[1:]:
        total = total + logits[place] - torch.cat([logits[left], stop]).logsumexp(0)
        left.remove(place)
    return total - torch.cat([logits[left], stop]).logsumexp(0)


def expected(
    spy: Spy, number: int, action: Action, alpha: float, experts: int
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Loss and gradient of gradient step ``number`` in float64, chain by chain; and the share of steps that was cut."""
    trajectory, group = spy.trajectory, 4
    width, count = tiny.RESPONSE, len(spy.problems)
    new, old = spy.policies[number], spy.policies[0]
    owner = [row // group for row in range(count * group)] + [*range(count)] * experts
    assert len(trajectory) == len(owner)
    rewards = []
    for row, problem in enumerate(owner):
        right = tiny.Echo().check(spy.problems[problem], text(trajectory.response_ids[row].tolist())).correct
        steps = int(trajectory.active[row].sum())
        rewards.append(float(right) * ((width - min(steps, width) + 1) / width) ** alpha)
    total, cut, seen = torch.zeros((), dtype=torch.float64), 0, 0
    for row, problem in enumerate(owner):
        mates = [rewards[other] for other, its in enumerate(owner) if its == problem]
        advantage = rewards[row] - sum(mates) / len(mates)
        steps = int(trajectory.active[row].sum())
        masked = trajectory.states[row, :steps] == trajectory.mask_id  # type: ignore[index]
        given = UnmaskInputs(
            masked=masked,
            block=masked,
            confidence=trajectory.confidence[row, :steps].double(),  # type: ignore[index]
            valid=torch.ones_like(masked),
            step=torch.arange(steps),
            planned=torch.full((steps,), width),
        )
        with in_float64():
            logits, old_logits = new(given), old(given).detach()
        for step in range(steps):
            candidates = masked[step].nonzero().flatten().tolist()
            ranks = trajectory.order[row, step].tolist()  # type: ignore[index]
            chosen = {place: rank for place, rank in enumerate(ranks) if rank}
            values = [log_likelihood(action, each[step], candidates, chosen) for each in (logits, old_logits)]
            if row >= count * group:
                share = 1 / (group + experts)
                values = [((1 - share) * value.exp() + share).log() for value in values]
            ratio = (values[0] - values[1]).exp()
            limited = ratio.clamp(0.5, 1.5)
            cut, seen = cut + int((ratio * advantage > limited * advantage).item()), seen + 1
            total = total - torch.minimum(ratio * advantage, limited * advantage) / steps / len(owner)
    total.backward()
    return total, tiny.gradients(new), cut / seen


@contextmanager
def in_float64() -> Iterator[None]:
    """`ConfidencePolicy` casts what it reads to float32; the oracle must not."""
    kept = Tensor.float
    Tensor.float = lambda value: value.double()  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.float = kept  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("action", "experts", "microbatch"),
    [(Bernoulli(), 0, 4096), (Bernoulli(), 2, 3), (Bernoulli(), 2, 4096), (DynamicPlackettLuce(), 1, 7)],
    ids=["bernoulli", "experts in small parts", "experts", "dpls"],
)
def test_loss_and_gradient_of_an_update(tmp_path: Path, action: Action, experts: int, microbatch: int) -> None:
    groups = Experts(thresholds=[0.9, 0.5][:experts], block_length=2) if experts else None
    method = config(action, groups=groups, shaping=Speed(alpha=0.7), inner_updates=2)
    net = carrying()
    before = {name: value.clone() for name, value in net.own_state().items()}
    job = tiny.job(tmp_path, method, net, optim=OptimConfig(lr=0.1, max_grad_norm=1e9, microbatch=microbatch))
    spy = Spy(job)
    metrics = job.update(0, spy.optimise)
    shares = []
    for number in range(2):
        loss, gradients, share = expected(spy, number, action, 0.7, experts)
        assert spy.losses[number] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert max(float(value.abs().max()) for value in gradients.values()) > 2e-4
        for name, value in gradients.items():
            torch.testing.assert_close(spy.gradients[number][name], value, rtol=2e-3, atol=2e-6)
        shares.append(share)
    assert shares[0] == 0 and max(shares) > 0.02  # the clip did something
    # The denoiser is the environment: never asked in the update, never changed.
    assert spy.forwards == spy.rolled > 0
    assert job.trainer.cost.forwards == spy.trajectory.forwards == spy.trajectory.active.sum()
    assert all(torch.equal(value, before[name]) for name, value in net.own_state().items())
    assert {name.split(".")[0] for name in tiny.gradients(net)} == {"unmask_module"}
    assert job.trainer.cost.rollouts == 16 + 4 * experts
    assert ("expert_accuracy" in metrics) == bool(experts)


def test_old_log_probabilities_are_those_of_the_rollout(tmp_path: Path) -> None:
    job = tiny.job(tmp_path, config(Bernoulli()), carrying())
    problems = tiny.Echo().problems("train", 12, 0)
    needs = job.policy.needs | {"order_log_prob"}
    sampler = job.policy.rollout.sampler
    trajectory = sample_problems(job.denoiser, problems, sampler, response_length=5, seed=1, needs=needs)
    likelihood = job.policy.likelihood
    views = likelihood.views(trajectory, trajectory.active.float(), [0] * 12, job.denoiser.spec)
    with torch.no_grad():
        scores = likelihood.score(job.denoiser, views, MaskedSampler(steps=1, temperature=0.0))
    assert scores.forwards == 0
    stored = trajectory.order_log_prob[views.rows, views.steps]  # type: ignore[index]
    torch.testing.assert_close(scores.log_prob[:, -1], stored, rtol=1e-5, atol=1e-5)
    assert not scores.log_prob[:, :-1].any() and stored.abs().min() > 0


def test_experts_may_open_what_no_policy_would_and_ratios_stay_bounded(tmp_path: Path) -> None:
    method = config(Bernoulli(), groups=Experts(thresholds=[0.0], block_length=5))
    job = tiny.job(tmp_path, method, carrying(bias=-60.0), optim=OptimConfig(lr=1.0, max_grad_norm=1e9))
    spy = Spy(job)
    job.update(0, spy.optimise)
    trajectory = spy.trajectory
    assert trajectory.expert_share is not None and trajectory.block is not None
    assert trajectory.expert_share.tolist() == pytest.approx([0.0] * 16 + [0.2] * 4)
    assert trajectory.block[16:][trajectory.active[16:]].all()
    assert (trajectory.active.sum(1)[16:] == 1).all() and (trajectory.active.sum(1)[:16] == 5).all()
    views = job.policy.likelihood.views(trajectory, trajectory.active.float(), [0] * 20, job.denoiser.spec)
    for change in (0.0, 50.0, 120.0):
        with torch.no_grad():
            job.denoiser.unmask.leave.bias.fill_(-60.0 + change)  # type: ignore[union-attr]
            log_prob = job.policy.likelihood.score(
                job.denoiser, views, MaskedSampler(steps=1, temperature=0.0)
            ).log_prob[views.rows >= 16, -1]
        assert ((log_prob > math.log(0.2) - 1e-6) & (log_prob < 1e-6)).all()


def test_a_batch_of_equal_groups_is_no_gradient_step(tmp_path: Path) -> None:
    method = config(DynamicPlackettLuce(), rollout={"response_length": 1})
    net = carrying()
    job = tiny.job(tmp_path, method, net)
    assert net.unmask is not None
    before = copy.deepcopy(net.unmask.state_dict())
    metrics = job.update(0, job.trainer.optimise)  # one position: every chain of a group is the same
    assert metrics["zero_variance_groups"] == 1.0 and metrics["grad_norm"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in net.unmask.state_dict().items())


def test_chains_that_open_nothing_keep_their_holes_and_are_paid_for_nothing(tmp_path: Path) -> None:
    net = carrying(bias=-60.0)
    sampler = MaskedSampler(steps=1, rule=Policy(action=Bernoulli()))
    problems = tiny.Echo().problems("test", 20, 0)
    trajectory = sample_problems(net, problems, sampler, response_length=5, seed=0, needs={"guesses", "revealed"})
    assert (trajectory.active.sum(1) == 5).all() and trajectory.unfinished.all()
    judged = judge(tiny.Echo(), problems, net, trajectory)
    assert judged.guess_correct is not None and judged.guess_score is not None
    assert judged.guess_correct[:, :4].any()  # some guess was right, and never committed
    assert not judged.guess_correct[:, 4].any() and judged.guess_score[:, 4].tolist() == [0.0] * 20
    found = evaluate(net, tiny.Echo(), problems, sampler, response_length=5)
    assert (found.accuracy, found.unfinished, found.steps_per_chain) == (0.0, 1.0, 5.0)
    assert found.ever_correct > 0
    left = evaluate(net, tiny.Echo(), problems, MaskedSampler(steps=5, rule=LowConfidence()), response_length=5)
    assert (left.unfinished, left.steps_per_chain) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("sampler", "groups", "message"),
    [
        (MaskedSampler(steps=5), Experts(block_length=5), "'experts' steers a rule 'policy' that sets its own pace"),
        (
            MaskedSampler(steps=5, rule=Policy(action=PlackettLuce())),
            Experts(block_length=5),
            "'experts' steers a rule 'policy' that sets its own pace",
        ),
        (
            MaskedSampler(steps=5, rule=Policy(action=Bernoulli())),
            Experts(),
            "block_length: 32 is longer than the response",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(sampler: MaskedSampler, groups: Experts, message: str) -> None:
    with pytest.raises(UserError, match=message):
        groups.check_fits(sampler, 4, 5)


def test_a_trained_policy_goes_to_another_model_and_a_longer_canvas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action = Bernoulli(temperature=0.5)
    method = config(action, shaping=Speed(alpha=0.3))
    rollout = {"sampler": method.rollout.sampler}
    recipe = tiny.recipe(tmp_path, "unmasking_policies", 2, policy=vars(method) | {"rollout": rollout})
    recipe.model = BaseModel(
        path=str(tmp_path / "base"), unmask=ConfidencePolicy(dim=8, hidden=8, bias=-1.0), train="unmask"
    )
    assert train(recipe, tmp_path / "run")
    base, trained = (tmp_path / folder / "model.safetensors" for folder in ("base", "run/model"))
    assert base.read_bytes() == trained.read_bytes()
    path = tmp_path / "run" / "model" / "unmask.safetensors"
    with safe_open(path, framework="pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert path.stat().st_size < 4 * weights + 4096
    other = tiny.Pooled().eval()
    rule = Policy(path=str(path))
    canvas = Canvas.of([[4, 5], [6]], [9, 7], other.spec)
    decoded = MaskedSampler(steps=1, rule=rule).sample(other, canvas, [1, 2], needs={"order"})
    assert not decoded.unfinished.any()  # in use nothing is wasted
    assert (decoded.active.sum(1) <= torch.tensor([9, 7])).all() and decoded.forwards == decoded.active.sum()
    before = rule.network(other)[1].state_dict()
    assert not torch.equal(before["leave.bias"], torch.tensor([-1.0]))
    other_folder = tmp_path / "wide"
    wide = tiny.denoiser(seed=5)
    wide.save_pretrained(other_folder)
    command = ["decode", str(other_folder), "--prompt", "a b", "--length", "10", "--rule", f"policy:{path}", "--json"]
    assert main(command) == 0
    (completion,) = json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]
    assert completion["holes"] == 0 and 1 <= completion["steps"] <= 10
