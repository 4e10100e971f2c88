"""First-hitting sampler: exact against a joint table; times and solvers against their formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from unveil.claims.goodness import same_p_value, uniform_p_value
from unveil.claims.oracles import FIRST, JointTable, MarkovChain, Oracle
from unveil.denoisers.base import DenoiserSpec
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.processes.gumbel import chi_square
from unveil.processes.masked import hitting_times
from unveil.recipe import build
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import LowConfidence, RunningConfidence, Threshold
from unveil.samplers.solvers import Solver, SolverView
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator
from unveil.systems.first_hitting_sampler import Extrapolation, FirstHitting, PredictorCorrector
from unveil.tasks.evaluate import generative_perplexity, unigram_entropy

SOLVERS = [
    Extrapolation(), Extrapolation(of="log_probability"), PredictorCorrector(), PredictorCorrector(redraw="fresh"),
]  # fmt: skip
IDS = ["extrapolation", "extrapolation-log", "corrector", "corrector-fresh"]


def draw(
    oracle: Oracle, count: int, steps: int, *, seed: int = 0, needs: Sequence[str] = (), **own: object
) -> TokenTrajectory:
    sampler = MaskedSampler(steps=steps, **(vars(FirstHitting()) | own))  # type: ignore[arg-type]
    canvas = Canvas.of([[]] * count, oracle.length, oracle.spec)
    return sampler.sample(oracle, canvas, range(seed * count, (seed + 1) * count), needs=needs)


def table_p_value(oracle: JointTable, trajectory: TokenTrajectory) -> float:
    counts = torch.bincount(oracle.index(trajectory.response_ids - FIRST, oracle.words), minlength=len(oracle.table))
    return chi_square(counts, oracle.table)


@pytest.fixture(scope="module")
def table() -> JointTable:
    return JointTable(4, 4, generator("table"))


@pytest.fixture(scope="module")
def chain() -> MarkovChain:
    return MarkovChain(5, 8, generator("chain"))


def test_the_oracles_know_their_own_distribution(table: JointTable, chain: MarkovChain) -> None:
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    torch.testing.assert_close(table.log_prob(every).exp(), table.table)
    # A chain's posteriors by enumeration: all 5^4 continuations of a short one.
    short = MarkovChain(3, 4, generator("short"))
    words = torch.cartesian_prod(*[torch.arange(3)] * 4)
    joint = short.log_prob(words).exp()
    assert joint.sum() == pytest.approx(1)
    seen = torch.tensor([[2, 0, 1, 0]])
    for masked in ([True, False, True, True], [False] * 4, [True] * 4):
        hidden = torch.tensor([masked])
        answer = short.posterior(seen, hidden)[0]
        for place in range(4):
            fits = torch.ones(len(words), dtype=torch.bool)
            for other in range(4):
                if other != place and not masked[other]:
                    fits &= words[:, other] == seen[0, other]
            exact = torch.zeros(3, dtype=torch.float64).index_add_(0, words[fits, place], joint[fits])
            torch.testing.assert_close(answer[place], exact / exact.sum())
    assert chain.pairs.sum() == pytest.approx(1)
    torch.testing.assert_close(chain.start @ chain.transition, chain.start)


def test_one_token_a_step_samples_the_joint_and_parallel_steps_do_not(table: JointTable) -> None:
    exact = draw(table, 20_000, 4)
    assert table_p_value(table, exact) > 1e-3
    assert exact.forwards == 4 * 20_000
    assert table_p_value(table, draw(table, 20_000, 1)) < 1e-12


def test_hitting_times_are_the_falling_order_statistics_of_uniforms() -> None:
    stream = generator("times")
    draws, n = 4000, 50
    times = hitting_times(torch.rand(draws, n, generator=stream, dtype=torch.float64), torch.full((draws,), n))
    sorted_uniforms = torch.rand(draws, n, generator=stream, dtype=torch.float64).sort(1, descending=True).values
    for place in (0, 7, 49):
        assert same_p_value(times[:, place], sorted_uniforms[:, place]) > 1e-3
    ratio = torch.cat([times[:, :1], times[:, 1:] / times[:, :-1]], 1)
    for left in (1, 5, 50):
        # (tau_{n-1} / tau_n)^n is uniform.
        assert uniform_p_value(ratio[:, n - left] ** left) > 1e-3
        assert uniform_p_value(ratio[:, n - left] ** (1.2 * left)) < 1e-3, "the test can fail"


def test_hitting_times_in_closed_form_for_rows_of_their_own() -> None:
    u = torch.tensor([[0.5, 0.25, 0.9], [0.8, 0.1, 0.3]], dtype=torch.float64)
    times = hitting_times(u, torch.tensor([3, 1]), torch.tensor([1.0, 0.5]))
    first = 0.5 ** (1 / 3)
    assert times[0].tolist() == pytest.approx([first, first * 0.25**0.5, first * 0.25**0.5 * 0.9])
    assert times[1].tolist() == pytest.approx([0.5 * 0.8, 0.0, 0.0])
    with pytest.raises(ValueError, match="float64"):
        hitting_times(u.float(), torch.tensor([3, 1]))


class Timed(MarkovChain):
    """Notes the times that it is told."""

    def __init__(self) -> None:
        super().__init__(3, 6, generator("timed"))
        self.spec = DenoiserSpec(**(vars(self.spec) | {"time_conditioned": True}))
        self.told: list[Tensor] = []

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is not None
        self.told.append(t)
        return super().features(ids, valid, t)


def test_a_time_conditioned_network_is_told_hitting_times() -> None:
    oracle = Timed()
    canvas = Canvas.of([[]], 6, oracle.spec)
    MaskedSampler(steps=6, **vars(FirstHitting())).sample(oracle, canvas, [3])
    whole = torch.cat(oracle.told)
    u = torch.rand(6, dtype=torch.float64, generator=generator(3, "clock"))
    torch.testing.assert_close(whole, hitting_times(u[None], torch.tensor([6]))[0])
    assert (whole.diff() < 0).all() and whole[0] < 1

    oracle.told.clear()  # two tokens a step pass two of the times
    MaskedSampler(steps=3, **vars(FirstHitting())).sample(oracle, canvas, [3])
    torch.testing.assert_close(torch.cat(oracle.told), whole[::2])

    oracle.told.clear()  # every block is a process of its own; given tokens are no holes
    mask, given = oracle.spec.mask_id, FIRST
    partly = Canvas.of([[]], 6, oracle.spec, initial=[[mask, given, mask, mask, mask, mask]])
    MaskedSampler(steps=6, block_length=3, **vars(FirstHitting())).sample(oracle, partly, [3])
    blocks = [hitting_times(part[None], torch.tensor([n]))[0, :n] for part, n in ((u[:3], 2), (u[3:], 3))]
    torch.testing.assert_close(torch.cat(oracle.told), torch.cat(blocks))


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
def test_solvers_change_nothing_where_a_step_has_one_token_and_no_successor(chain: MarkovChain, solver: Solver) -> None:
    plain, solved = draw(chain, 64, 1), draw(chain, 64, 1, solver=solver)
    assert torch.equal(plain.response_ids, solved.response_ids)
    if isinstance(solver, Extrapolation):  # the first token of a step needs no extrapolation
        assert torch.equal(draw(chain, 64, 8).response_ids, draw(chain, 64, 8, solver=solver).response_ids)
    assert draw(chain, 64, 4, solver=solver).forwards == 4 * 64
    assert not torch.equal(draw(chain, 64, 4).response_ids, draw(chain, 64, 4, solver=solver).response_ids)


@pytest.mark.parametrize("of", ["probability", "log_probability"])
def test_extrapolation_is_the_line_through_two_outputs(of: str) -> None:
    stream = generator("line")
    outputs = torch.randn(2, 3, 4, dtype=torch.float64, generator=stream).float()
    outputs[:, :, 0] = -torch.inf  # a forbidden token
    solver, state = Extrapolation(of=of), {}  # type: ignore[arg-type]
    read = torch.ones(1, 3, dtype=torch.bool)

    def view(now: float, at: list[float]) -> SolverView:
        return SolverView(
            read=read, again=~read, response=torch.zeros(1, 3, dtype=torch.long), now=torch.tensor([now]),
            at=torch.tensor([at]), temperature=1.0,
        )  # fmt: skip

    first = solver.solve(outputs[0], view(6.0, [6.0, 5.0, 4.0]), state)
    assert torch.equal(first, outputs[0])
    second = solver.solve(outputs[1], view(4.0, [4.0, 3.0, 2.5]), state)
    before, now = outputs.double().softmax(-1)
    for place, weight in enumerate((0.0, 0.5, 0.75)):
        if of == "probability":
            line = (now[place] + weight * (now[place] - before[place])).clamp(min=0)
        else:
            line = now[place] ** (1 + weight) / before[place] ** weight
            line[0] = 0
        torch.testing.assert_close(second[place].double().softmax(-1), line / line.sum(), rtol=1e-5, atol=1e-6)
    assert torch.equal(second[0], outputs[1, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("redraw", ["keep", "fresh"])
def test_a_corrected_token_has_the_averaged_law_and_changes_rarely(redraw: str, temperature: float) -> None:
    stream = generator("corrector")
    old, new = torch.randn(2, 5, generator=stream)
    wanted = ((old / temperature).softmax(-1) + (new / temperature).softmax(-1)) / 2
    chance = (old / temperature).softmax(-1)
    kernel = torch.zeros(5, 5)
    for token in range(5):
        solver, state = PredictorCorrector(redraw=redraw), {}  # type: ignore[arg-type]
        place = torch.ones(1, 1, dtype=torch.bool)
        common = {"now": torch.tensor([1.0]), "at": torch.tensor([[1.0]]), "temperature": temperature}
        masked = torch.tensor([[9]])
        assert torch.equal(solver.solve(old[None], SolverView(place, ~place, masked, **common), state), old[None])
        solved = solver.solve(new[None], SolverView(place, place, torch.tensor([[token]]), **common), state)
        kernel[token] = (solved[0] / temperature).softmax(-1)
    torch.testing.assert_close(chance @ kernel, wanted)
    changed = (chance * (1 - kernel.diagonal())).sum()
    distance = (wanted - chance).abs().sum() / 2
    if redraw == "keep":
        assert changed == pytest.approx(distance.item(), abs=1e-6)
    else:
        assert changed > 1.5 * distance


def test_the_corrector_decides_every_step_but_the_last_again(chain: MarkovChain) -> None:
    needs = ("states", "revealed")
    moved = 0
    for seed in range(2):
        trajectory = draw(chain, 200, 4, seed=seed, needs=needs, solver=PredictorCorrector())
        states, revealed, end = trajectory.states, trajectory.revealed, trajectory.response_ids
        assert states is not None and revealed is not None
        assert revealed.sum(1).eq(1).all() and (end >= FIRST).all()
        for step in range(1, 4):
            after = states[:, step + 1] if step < 3 else end
            changed = (states[:, step] != after) & (states[:, step] >= FIRST)
            assert not (changed & ~revealed[:, step - 1]).any(), "only tokens of the step before change"
            moved += int(changed.sum())
    assert moved > 0


def test_a_network_that_copies_visible_tokens_makes_the_corrector_do_nothing() -> None:
    copies = MarkovChain(5, 8, generator("chain"), carry_over=True)
    plain, corrected = draw(copies, 100, 4), draw(copies, 100, 4, solver=PredictorCorrector())
    assert torch.equal(plain.response_ids, corrected.response_ids)


@pytest.mark.parametrize("solver", SOLVERS, ids=IDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_solvers_treat_a_batch_like_its_rows(solver: Solver, temperature: float) -> None:
    oracle = MarkovChain(4, 8, generator("rows"))
    mask = oracle.spec.mask_id
    initial = [[mask] * 8, [FIRST, *[mask] * 7], [FIRST, mask, mask, *[FIRST + 1] * 5], [mask, *[FIRST] * 7]]
    sampler = MaskedSampler(steps=4, block_length=4, **vars(FirstHitting(solver=solver, temperature=temperature)))
    batch = sampler.sample(oracle, Canvas.of([[]] * 4, 8, oracle.spec, initial=initial), range(4), needs={"states"})
    for row in range(4):
        canvas = Canvas.of([[]], 8, oracle.spec, initial=initial[row : row + 1])
        alone = sampler.sample(oracle, canvas, [row], needs={"states"})
        assert torch.equal(batch.response_ids[row], alone.response_ids[0])


def test_a_rule_that_ranks_after_drawing_is_extrapolated_to_the_middle_of_its_step() -> None:
    seen: list[SolverView] = []

    class Spy(Extrapolation):
        def solve(self, logits: Tensor, view: SolverView, state: dict[str, Tensor]) -> Tensor:
            seen.append(view)
            return super().solve(logits, view, state)

    oracle = MarkovChain(4, 6, generator("middle"))
    sampler = MaskedSampler(steps=2, rule=LowConfidence(), solver=Spy())
    sampler.sample(oracle, Canvas.of([[]], 6, oracle.spec), [0])
    assert [view.now.item() for view in seen] == [6, 3]
    assert (seen[1].at == 2).all()


def test_what_does_not_go_together_is_refused() -> None:
    for settings, words in (
        ({"solver": "predictor_corrector", "rule": "rcr"}, "takes tokens back"),
        ({"solver": "extrapolation", "rule": "threshold"}, "schedule"),
        ({"solver": "predictor_corrector", "rule": "random", "stop_at_end": True}, "stop_at_end"),
        ({"solver": "predictor_corrector", "rule": "random", "top_k": 3}, "top_k"),
    ):
        with pytest.raises(UserError, match=words):
            build(MaskedSampler, {"steps": 4, **settings})
    for rule in (RunningConfidence(), Threshold()):
        MaskedSampler(steps=4, rule=rule)
    oracle = MarkovChain(4, 4, generator("refused"))
    sampler = MaskedSampler(steps=2, **vars(FirstHitting(solver=PredictorCorrector())))
    canvas = Canvas.of([[]], 4, oracle.spec)
    for name in ("log_prob", "step_map", "times"):
        with pytest.raises(UserError, match=name):
            sampler.sample(oracle, canvas, [0], needs={name})
    with pytest.raises(UserError, match=r"rollout\.sampler\.solver"):
        TrajectoryLikelihood().check_fits(sampler, oracle)
    with pytest.raises(UserError, match="time-conditioned"):
        TrajectoryLikelihood().check_fits(MaskedSampler(steps=2), Timed())


def test_perplexity_comes_with_the_entropy_of_the_samples(chain: MarkovChain) -> None:
    words = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 3], [4] * 8])
    counted = torch.ones_like(words, dtype=torch.bool)
    counted[1, 4:] = False
    quarter = -(2 / 8 * math.log(2 / 8) + 4 / 8 * math.log(4 / 8) + 2 * 1 / 8 * math.log(1 / 8))
    assert unigram_entropy(words, counted).tolist() == pytest.approx([quarter, 0.0])
    assert unigram_entropy(words, torch.zeros_like(counted)).tolist() == [0.0, 0.0]
    whole = torch.ones_like(counted)
    quality = generative_perplexity(chain.log_prob, words, whole)
    assert quality.perplexity == pytest.approx(math.exp(-chain.log_prob(words).sum().item() / 16))
    assert quality.sample_entropy == pytest.approx(quarter / 2)
