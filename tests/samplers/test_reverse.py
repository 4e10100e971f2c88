"""Simulation of the reverse process against the enumerated chain of a tiny joint table, and its records."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tiny import denoiser as tiny_denoiser
from tiny import score_denoiser
from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.processes.score_entropy import Geometric, LogLinear, Noise, ScoreEntropyProcess
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.reverse import ReverseSampler

V, L, MASK = 3, 2, 3
CANVASES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
START = len(CANVASES) - 1


class Table(MaskedDenoiser):
    """The exact conditionals of a random joint table; as scores (sum off by ``excess``) if there is noise."""

    def __init__(self, noise: Noise | None = None, excess: float = 1.0) -> None:
        super().__init__()
        logits = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        self.joint = logits.flatten().softmax(0).view(V, V)
        table = torch.full((len(CANVASES), L, V + 1), -math.inf, dtype=torch.float64)
        for row, (first, second) in enumerate(CANVASES.tolist()):
            table[row, 0, :V] = (self.joint.sum(1) if second == MASK else self.joint[:, second]).log().log_softmax(-1)
            table[row, 1, :V] = (self.joint.sum(0) if first == MASK else self.joint[first]).log().log_softmax(-1)
        self.table, self.excess = nn.Parameter(table), excess
        self.spec = DenoiserSpec(
            vocab_size=V + 1, mask_id=MASK, pad_id=0, end_ids=(), forbidden_ids=(MASK,), context_length=L,
            time_conditioned=noise is not None, prediction="logits" if noise is None else "log_score", noise=noise,
        )  # fmt: skip
        self.calls: list[int] = []

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        self.calls.append(len(ids))
        rows = self.table[(ids * torch.tensor([V + 1, 1])).sum(-1)]
        if self.spec.noise is None:
            return rows
        process = self.spec.process()
        assert isinstance(process, ScoreEntropyProcess) and t is not None
        return rows + (process.score_scale(t) + math.log(self.excess))[:, None, None]

    def head(self, features: Tensor) -> Tensor:
        return features

    def chain(self, sampler: ReverseSampler) -> Tensor:
        """Exact distribution (V, V) of what the sampler ends with."""
        state = torch.zeros(len(CANVASES), dtype=torch.float64)
        state[START] = 1
        times = sampler.times()
        process = self.spec.process(sampler.method)
        for t, s in itertools.pairwise(times.tolist()):
            every = torch.full((len(CANVASES),), t, dtype=torch.float64)
            rows = self.features(CANVASES, torch.ones_like(CANVASES).bool(), every)
            probs = process.step(rows, CANVASES, every, torch.full_like(every, s), sampler.temperature).probs()
            state = state @ math.prod(probs[:, place, CANVASES[:, place]] for place in range(L))
        state = state.detach()
        assert float(state[(CANVASES == MASK).any(1)].sum()) == 0
        return state[(CANVASES != MASK).all(1)].view(V, V)


def canvas(rows: int, width: int = L, mask: int = MASK) -> Canvas:
    return Canvas(
        ids=torch.full((rows, width), mask),
        valid=torch.ones(rows, width, dtype=torch.bool),
        frozen=torch.zeros(rows, width, dtype=torch.bool),
        prompt_width=0,
    )


@pytest.mark.parametrize(
    ("net", "sampler"),
    [
        (Table(), ReverseSampler(steps=3)),
        (Table(), ReverseSampler(steps=2, temperature=0.6)),
        (Table(LogLinear()), ReverseSampler(steps=3)),
        (Table(LogLinear(), excess=0.6), ReverseSampler(steps=4, last_time=0.05)),
        (Table(Geometric(low=0.01, high=6.0), excess=1.2), ReverseSampler(steps=4, method="euler")),
    ],
    ids=["ancestral", "tempered", "score", "score with a wrong sum", "euler"],
)
def test_samples_follow_the_enumerated_chain(net: Table, sampler: ReverseSampler) -> None:
    draws = 8000
    expected = draws * net.chain(sampler).flatten()
    response = sampler.sample(net, canvas(draws), range(draws)).response_ids
    counts = (response * torch.tensor([V, 1])).sum(1).bincount(minlength=V * V).double()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 0.8 < chi_square < 26  # 8 degrees of freedom: both tails about 1e-3


def test_many_steps_of_the_exact_model_give_the_joint() -> None:
    for net in (Table(), Table(LogLinear())):
        distance = [float((net.chain(ReverseSampler(steps=n)) - net.joint).abs().sum() / 2) for n in (1, 8, 64)]
        assert distance[0] > 0.1 > 0.05 > distance[1] > 5 * distance[2]


def test_euler_and_tweedie_agree_under_log_linear_noise_and_meet_under_others() -> None:
    def apart(noise: Noise, steps: int) -> float:
        net = Table(noise, excess=0.8)
        ends = [net.chain(ReverseSampler(steps=steps, method=method)) for method in ("tweedie", "euler")]
        return float((ends[0] - ends[1]).abs().max())

    assert apart(LogLinear(), 4) < 1e-12
    coarse, fine = (apart(Geometric(low=0.01, high=6.0), steps) for steps in (8, 64))
    assert coarse > 1e-4 and fine < coarse / 4


NEEDS = {"states", "guesses", "confidence", "entropy", "log_prob", "revealed", "taken_back", "step_map", "times"}


@pytest.mark.parametrize("kind", ["masked", "score"])
def test_records_tell_what_happened_and_a_batch_equals_its_rows(kind: str) -> None:
    net: MaskedDenoiser = tiny_denoiser() if kind == "masked" else score_denoiser()
    sampler = ReverseSampler(steps=4, last_time=0.2)
    prompts, lengths = [[4, 5], [6], [], [7, 4, 4]], [5, 3, 6, 4]
    rows = Canvas.of(prompts, lengths, net.spec)
    rows.response[1, 1], rows.frozen[1, 1] = 5, True
    together = sampler.sample(net, rows, range(4), needs=NEEDS)
    split = sampler.sample(net, rows, range(4), needs=NEEDS, batch_size=1)
    for name in (*sorted(NEEDS), "response_ids", "active", "given"):
        torch.testing.assert_close(getattr(together, name), getattr(split, name), atol=1e-5, rtol=1e-5)
    assert together.forwards == split.forwards <= int(together.active.sum())

    t = together
    assert t.states is not None and t.guesses is not None and t.revealed is not None and t.times is not None
    assert t.step_map is not None and t.log_prob is not None and t.confidence is not None and t.taken_back is not None
    assert t.entropy is not None and (t.planned == 5).all()
    assert not (t.response_ids == t.mask_id).any() and not t.taken_back.any()
    assert int(t.response_ids[1, 1]) == 5 and int(t.step_map[1, 1]) == -1
    grid = sampler.times()
    for row, step in itertools.product(range(4), range(t.steps)):
        state = t.states[row, step]
        holes = (state == t.mask_id) & t.response_valid[row]
        assert bool(t.active[row, step]) == bool(holes.any())
        after = torch.where(t.revealed[row, step], t.guesses[row, step], state)
        following = t.states[row, step + 1] if step + 1 < t.steps else t.response_ids[row]
        assert torch.equal(after, following)
        assert torch.equal(t.revealed[row, step], t.step_map[row] == step)
        assert (t.guesses[row, step][holes] != t.mask_id).all()
        assert ((t.confidence[row, step] > 0) == holes).all() and ((t.entropy[row, step] > 0) == holes).all()
        if not holes.any():
            assert not t.times[row, step].any() and not t.log_prob[row, step].any()
            continue
        assert torch.equal(t.times[row, step], grid[step : step + 2])
        ids = torch.cat([t.prompt_ids[row], state])[None]
        logits = net(ids, t.valid[row, None], t.times[row, step, :1])[:, t.prompt_ids.shape[1] :].detach()
        transition = net.spec.process().step(logits, state[None], *t.times[row, step, :, None])
        expected = transition.log_prob(following[None])[0]
        torch.testing.assert_close(t.log_prob[row, step], expected, atol=1e-5, rtol=1e-4)


def test_moves_do_not_depend_on_who_asks_for_records() -> None:
    net, sampler = tiny_denoiser(), ReverseSampler(steps=4, temperature=0.8)
    rows = Canvas.of([[4], [5, 6]], 6, net.spec)
    bare, full = sampler.sample(net, rows, [1, 2]), sampler.sample(net, rows, [1, 2], needs=NEEDS)
    assert torch.equal(bare.response_ids, full.response_ids) and bare.guesses is None


def test_the_cache_saves_evaluations_and_nothing_else() -> None:
    net, steps, draws = Table(), 40, 500
    cached = ReverseSampler(steps=steps).sample(net, canvas(draws), range(draws))
    assert sum(net.calls) == cached.forwards
    plain = ReverseSampler(steps=steps, cache=False).sample(net, canvas(draws), range(draws))
    assert torch.equal(cached.response_ids, plain.response_ids)
    assert plain.forwards == int(plain.active.sum())
    # The first step, and each later one before which something was revealed, of the steps that still have holes.
    trajectory = ReverseSampler(steps=steps).sample(net, canvas(draws), range(draws), needs={"revealed"})
    assert trajectory.revealed is not None
    changed = trajectory.revealed.any(2)[:, :-1] & trajectory.active[:, 1:]
    assert cached.forwards == draws + int(changed.sum()) <= 2 * draws < plain.forwards / 4
    timed = Table(LogLinear())
    score = ReverseSampler(steps=steps).sample(timed, canvas(draws), range(draws))
    assert score.forwards == int(score.active.sum())


@pytest.mark.parametrize("clean_up", ["sample", "argmax"])
def test_what_is_left_at_the_last_time_is_cleaned_up(clean_up: str) -> None:
    net = Table()
    sampler = ReverseSampler(steps=1, last_time=0.999, clean_up=clean_up)  # type: ignore[arg-type]
    drawn = sampler.sample(net, canvas(200), range(200), needs={"step_map"})
    assert drawn.step_map is not None and drawn.step_map.max() == 1
    left = (drawn.step_map == 1).all(1)
    assert int(left.sum()) > 190 and not (drawn.response_ids == MASK).any()
    assert drawn.steps == (2 if clean_up == "sample" else 1)
    variety = len(drawn.response_ids[left].unique(dim=0))
    best = net.table[START].argmax(-1)
    if clean_up == "argmax":
        assert variety == 1 and torch.equal(drawn.response_ids[left][0], best)
    else:
        assert variety > 4


def test_temperature_zero_reveals_the_likeliest_tokens_at_random_times() -> None:
    net = Table()
    sampler = ReverseSampler(steps=3, temperature=0.0)
    drawn = sampler.sample(net, canvas(100), range(100), needs={"log_prob", "step_map"})
    assert len(drawn.step_map.unique(dim=0)) == 9  # type: ignore[union-attr]
    for row in drawn.response_ids:
        first = net.table[START].argmax(-1)
        assert int(row[0]) == int(first[0]) or int(row[1]) == int(first[1])
    assert torch.isfinite(drawn.log_prob).all()  # type: ignore[arg-type]


def test_what_it_has_no_notion_of_is_refused() -> None:
    net = tiny_denoiser()
    for name in ("block", "order", "order_log_prob"):
        with pytest.raises(UserError, match=f"{name}.*needs a sampler with blocks"):
            ReverseSampler(steps=3).sample(net, Canvas.of([[4]], 2, net.spec), [0], needs={name})
    with pytest.raises(UserError, match="'masked' cannot time a network of scores"):
        MaskedSampler(steps=2).check_denoiser(score_denoiser())


def test_a_full_canvas_takes_no_step() -> None:
    net = tiny_denoiser()
    rows = Canvas.of([[4]], 2, net.spec, initial=[[5, 6]])
    drawn = ReverseSampler(steps=3).sample(net, rows, [0], needs=NEEDS)
    assert drawn.forwards == drawn.steps == 0 and drawn.response_ids.tolist() == [[5, 6]]
    assert drawn.times is not None and drawn.times.shape == (1, 0, 2)
