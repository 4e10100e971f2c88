"""The denoising loop against written-out references, hand-worked states and itself decoded row by row."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.processes.masked import token_log_prob
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import (
    Entropy,
    Factor,
    LowConfidence,
    Margin,
    Random,
    Rule,
    RunningConfidence,
    Threshold,
)
from unveil.samplers.schedules import Cosine, Even, Linear, Schedule
from unveil.samplers.text import response_texts
from unveil.samplers.trajectory import TokenTrajectory

MASK, PAD, END, WORD = 0, 1, 2, 4
RECORDED = set(TokenTrajectory.optional) - MaskedSampler(steps=1).refused_fields().keys()
"""What every rule that never takes back can record."""
NEVER_TAKES_BACK: list[Rule] = [
    LowConfidence(),
    Random(),
    Margin(),
    Entropy(),
    Threshold(threshold=0.3, cap=3),
    Factor(factor=1.7),
]
RULES: list[Rule] = [
    *NEVER_TAKES_BACK,
    RunningConfidence(),
    RunningConfidence(running="max", confidence="margin"),
]
RULE_IDS = ["lcr", "random", "margin", "entropy", "threshold", "factor", "rcr-last", "rcr-max-margin"]


@pytest.fixture(scope="module")
def denoiser() -> TransformerDenoiser:
    config = TransformerConfig(dim=16, layers=2, heads=2, hidden=24, context_length=24)
    network = TransformerDenoiser(config, TextTokenizer.of_words([f"w{index}" for index in range(10)]))
    network.initialise(torch.Generator().manual_seed(5))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return network.eval()


class Scripted(MaskedDenoiser):
    """One row, whose n-th call answers with ``script[n]`` (R, V) on the response."""

    def __init__(self, script: Tensor, prompt_width: int = 0) -> None:
        super().__init__()
        self.script, self.prompt_width, self.calls = script, prompt_width, 0
        self.spec = DenoiserSpec(
            vocab_size=script.shape[-1],
            mask_id=MASK,
            pad_id=PAD,
            end_ids=(END,),
            forbidden_ids=(MASK, PAD),
            context_length=64,
        )
        self.anchor = nn.Parameter(torch.zeros(()))

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        answer = self.script[self.calls]
        self.calls += 1
        return torch.cat([answer.new_zeros(self.prompt_width, answer.shape[1]), answer])[None]

    def head(self, features: Tensor) -> Tensor:
        return features


def words_with(certain: Sequence[Sequence[float]]) -> Tensor:
    """Logits (S, R, 8): at step s every position proposes word s, with the given probability."""
    logits = torch.full((len(certain), len(certain[0]), WORD + 4), -torch.inf)
    for step, row in enumerate(certain):
        for place, p in enumerate(row):
            logits[step, place, WORD:] = torch.tensor((1 - p) / 3).log()
            logits[step, place, WORD + step] = torch.tensor(p).log()
    return logits


def sample(
    sampler: MaskedSampler, denoiser: MaskedDenoiser, prompt: list[int], length: int, **more: object
) -> TokenTrajectory:
    return sampler.sample(denoiser, Canvas.of([prompt], length, denoiser.spec), [0], **more)  # type: ignore[arg-type]


# --- one row at a time, written out ---


@torch.no_grad()
def llada(denoiser: MaskedDenoiser, prompt: list[int], length: int, block: int, steps: int) -> Tensor:
    """Low-confidence remasking at temperature 0, one canvas, as LLaDA's paper says it."""
    canvas = torch.tensor([prompt + [MASK] * length])
    for start in range(len(prompt), len(prompt) + length, block):
        for step in range(steps):
            probs = denoiser(canvas)[0].softmax(-1)
            holes = [i for i in range(start, min(start + block, canvas.shape[1])) if canvas[0, i] == MASK]
            size = min(block, canvas.shape[1] - start)
            count = size // steps + (step < size % steps)
            best = sorted(holes, key=lambda i: -float(probs[i].max()))[:count]
            for place in best:
                canvas[0, place] = probs[place].argmax()
    return canvas[0, len(prompt) :]


@pytest.mark.parametrize(("length", "block", "steps"), [(12, 12, 5), (12, 4, 3), (10, 4, 2), (9, 9, 9), (8, 8, 1)])
def test_low_confidence_equals_the_written_out_loop(
    denoiser: TransformerDenoiser, length: int, block: int, steps: int
) -> None:
    blocks = -(-length // block)
    sampler = MaskedSampler(steps=steps * blocks, block_length=block)
    for prompt in ([4, 5, 6], [13, 7, 9, 9, 4], [8]):
        done = sample(sampler, denoiser, prompt, length)
        assert torch.equal(done.response_ids[0], llada(denoiser, prompt, length, block, steps))
        assert done.forwards == blocks * steps == done.steps


def rcr(script: Tensor, length: int, block: int, steps: int, running: str) -> list[list[int]]:
    """Running Confidence Remasking in plain Python: the states before every step, and the final one."""
    state, kept, states, call = [MASK] * length, {}, [], 0
    for start in range(0, length, block):
        size = min(block, length - start)
        counts = [size // steps + (step < size % steps) for step in range(steps)]
        counts = [count for count in counts if count]
        for step in range(len(counts)):
            states.append(list(state))
            probs = script[call].softmax(-1)
            call += 1
            for i in range(start + size):
                if state[i] == MASK:
                    state[i] = int(probs[i].argmax())
                    score = float(probs[i].max())
                    kept[i] = max(score, kept[i]) if running == "max" and i in kept else score
            left = sum(counts[step + 1 :])
            for i in sorted(kept, key=lambda i: (kept[i], i))[:left]:
                state[i] = MASK
    return [*states, state]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    block=st.integers(1, 9),
    steps=st.integers(1, 4),
    running=st.sampled_from(["last", "max"]),
    prompt=st.integers(0, 2),
)
def test_running_confidence_equals_plain_python(
    seed: int, length: int, block: int, steps: int, running: str, prompt: int
) -> None:
    block, blocks = min(block, length), -(-length // min(block, length))
    steps = max(1, min(steps, length // blocks))
    script = 2 * torch.randn(blocks * steps, length, 8, generator=torch.Generator().manual_seed(seed))
    script[..., [MASK, PAD]] = -torch.inf
    sampler = MaskedSampler(
        steps=blocks * steps,
        block_length=block,
        rule=RunningConfidence(running=running),  # type: ignore[arg-type]
    )
    done = sample(sampler, Scripted(script, prompt), [5] * prompt, length, needs={"states", "taken_back"})
    expected = rcr(script, length, block, steps, running)
    assert done.states is not None
    assert [*done.states[0].tolist(), done.response_ids[0].tolist()] == expected


# Confidences of four steps over four positions; step s proposes word s everywhere; one more token stands after each.
# last: step 0 keeps position 3 (.90)                               -> [_ _ _ 0]
#       step 1 runs (.80 .75 .65 .90): the two lowest are 2 and 1   -> [1 _ _ 0]
#       step 2 runs (.80 .95 .92 .90): position 0 goes back         -> [_ 2 2 0]
#       step 3 fills it                                             -> [3 2 2 0]
# max:  step 1 runs (.80 .75 .85 .90), position 2 still scoring .85 from step 0: the two lowest are 1 and 0 -> [_ _ 1 0]
#       step 2 runs (.88 .95 .85 .90): position 2 goes back         -> [2 2 _ 0]
#       step 3 fills it                                             -> [2 2 3 0]
HAND = [
    [0.60, 0.70, 0.85, 0.90],
    [0.80, 0.75, 0.65, 0.99],
    [0.88, 0.95, 0.92, 0.99],
    [0.70, 0.70, 0.70, 0.70],
]
W = [WORD, WORD + 1, WORD + 2, WORD + 3]
STATES = {
    "last": [[0, 0, 0, W[0]], [W[1], 0, 0, W[0]], [0, W[2], W[2], W[0]], [W[3], W[2], W[2], W[0]]],
    "max": [[0, 0, 0, W[0]], [0, 0, W[1], W[0]], [W[2], W[2], 0, W[0]], [W[2], W[2], W[3], W[0]]],
}


@pytest.mark.parametrize("running", ["last", "max"])
@pytest.mark.parametrize("schedule", [Even(), Linear()])
def test_running_confidence_by_hand(running: str, schedule: Schedule) -> None:
    rule = RunningConfidence(running=running)  # type: ignore[arg-type]
    denoiser = Scripted(words_with(HAND))
    done = sample(MaskedSampler(steps=4, rule=rule, schedule=schedule), denoiser, [], 4, needs={"states", "taken_back"})
    assert done.states is not None and done.taken_back is not None
    assert [*done.states[0, 1:].tolist(), done.response_ids[0].tolist()] == STATES[running]
    place = 0 if running == "last" else 2
    assert done.taken_back[0].nonzero().tolist() == [[2, place]]


def test_running_confidence_reaches_into_earlier_blocks_and_takes_back_nothing_last() -> None:
    # Two blocks of two, two steps each. Block 0: step 0 keeps position 0 (.90); step 1, the last, fills position 1.
    # Block 1: step 2 proposes both (.80 .70), one hole must remain: the least certain of all is position 1 of block 0.
    # Step 3, the last, fills position 1 (.30) and takes back nothing, though .30 is the lowest of all.
    certain = [[0.9, 0.5, 0.99, 0.99], [0.9, 0.4, 0.99, 0.99], [0.9, 0.9, 0.8, 0.7], [0.3, 0.3, 0.3, 0.3]]
    sampler = MaskedSampler(steps=4, block_length=2, rule=RunningConfidence())
    done = sample(sampler, Scripted(words_with(certain)), [], 4, needs={"states"})
    assert done.states is not None
    assert [*done.states[0].tolist(), done.response_ids[0].tolist()] == [
        [0, 0, 0, 0],
        [W[0], 0, 0, 0],
        [W[0], W[1], 0, 0],
        [W[0], 0, W[2], W[2]],
        [W[0], W[3], W[2], W[2]],
    ]


def test_a_running_confidence_of_exactly_zero_can_be_taken_back() -> None:
    # Margins: position 0 has two equal best tokens (0), position 1 a clear one. Step 0 must leave one hole: position 0.
    logits = torch.full((2, 2, 8), -torch.inf)
    logits[:, 0, WORD] = logits[:, 0, WORD + 1] = 0.0
    logits[:, 1, WORD], logits[:, 1, WORD + 1] = 2.0, 0.0
    sampler = MaskedSampler(steps=2, rule=RunningConfidence(confidence="margin"))
    done = sample(sampler, Scripted(logits), [], 2, needs={"states", "confidence"})
    assert done.states is not None and done.confidence is not None
    assert done.confidence[0, 0, 0] == 0
    assert done.states[0, 1].tolist() == [MASK, WORD]


# --- batches ---


# No prompt is empty: a canvas of masks alone gives every position the same logits but for rounding, so the order of
# revealing is decided by the last bit.
PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [6, 4], [13, 4, 9, 9]]


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_a_batch_equals_its_rows(
    denoiser: TransformerDenoiser, rule: Rule, temperature: float, block: int | None
) -> None:
    lengths, local = [12, 5, 8, 9, 4], 2
    seeds = [31, 32, 33, 34, 35]

    def sampler(length: int) -> MaskedSampler:
        blocks = -(-length // (block or length))
        return MaskedSampler(steps=local * blocks, block_length=block, rule=rule, temperature=temperature)

    needs = set(TokenTrajectory.optional) - sampler(12).refused_fields().keys()

    batch = sampler(12).sample(denoiser, Canvas.of(PROMPTS, lengths, denoiser.spec), seeds, needs=needs)
    for row, (prompt, length, seed) in enumerate(zip(PROMPTS, lengths, seeds, strict=True)):
        alone = sampler(length).sample(denoiser, Canvas.of([prompt], length, denoiser.spec), [seed], needs=needs)
        steps = alone.steps
        assert torch.equal(batch.response_ids[row, :length], alone.response_ids[0])
        assert batch.active[row].sum() == steps and batch.active[row, :steps].all()
        for name in needs - {"step_map"}:
            got, wanted = getattr(batch, name)[row, :steps, :length], getattr(alone, name)[0]
            if got.is_floating_point():
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
            else:
                assert torch.equal(got, wanted), name
        if "step_map" in needs:
            assert batch.step_map is not None and alone.step_map is not None
            assert torch.equal(batch.step_map[row, :length], alone.step_map[0])
    assert batch.forwards == int(batch.active.sum())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_result_does_not_depend_on_the_batch_size(denoiser: TransformerDenoiser, size: int) -> None:
    sampler = MaskedSampler(steps=6, block_length=4, rule=Random(), temperature=1.0)
    canvas = Canvas.of(PROMPTS, [12, 5, 8, 9, 4], denoiser.spec)
    finished: list[int] = []
    whole = sampler.sample(denoiser, canvas, range(5), needs=RECORDED)
    parts = sampler.sample(denoiser, canvas, range(5), needs=RECORDED, batch_size=size, on_batch=finished.append)
    assert finished == [*range(size, 5, size), 5]
    for name in ("prompt_ids", "response_ids", "valid", "active", "given", "planned", *RECORDED):
        one, other = getattr(whole, name), getattr(parts, name)
        if one.is_floating_point():
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(one, other), name
    assert whole.forwards == parts.forwards


def test_the_seed_decides_and_the_canvas_is_left_alone(denoiser: TransformerDenoiser) -> None:
    sampler, canvas = MaskedSampler(steps=4, temperature=1.0), Canvas.of([[4], [4], [4]], 12, denoiser.spec)
    before = canvas.ids.clone()
    first = sampler.sample(denoiser, canvas, [1, 1, 2]).response_ids
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert torch.equal(canvas.ids, before)
    assert not torch.isin(first, torch.tensor(denoiser.spec.forbidden_ids)).any()


# --- schedules and records ---


@pytest.mark.parametrize("schedule", [Even(), Linear(), Cosine()])
@pytest.mark.parametrize("rule", [LowConfidence(), Random(), RunningConfidence()])
def test_steps_reveal_what_the_schedule_says(denoiser: TransformerDenoiser, schedule: Schedule, rule: Rule) -> None:
    sampler = MaskedSampler(steps=9, block_length=4, schedule=schedule, rule=rule)
    done = sample(sampler, denoiser, [4, 5], 11, needs={"revealed", "taken_back"})
    assert done.revealed is not None and done.taken_back is not None
    gained = done.revealed.sum(-1) - done.taken_back.sum(-1)
    expected = [count for size in (4, 4, 3) for count in schedule.counts(size, 3) if count]
    assert gained[0].tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_records_agree_with_one_another(denoiser: TransformerDenoiser, rule: Rule, temperature: float) -> None:
    sampler = MaskedSampler(steps=6, block_length=4, rule=rule, temperature=temperature)
    needs = set(TokenTrajectory.optional) - sampler.refused_fields().keys()
    canvas = Canvas.of(PROMPTS, [12, 5, 8, 9, 4], denoiser.spec)
    done = sampler.sample(denoiser, canvas, range(5), needs=needs)
    assert done.states is not None and done.guesses is not None and done.log_prob is not None
    assert done.revealed is not None and done.taken_back is not None and done.confidence is not None
    following = torch.cat([done.states[:, 1:], done.response_ids[:, None]], 1)
    derived = torch.where(done.revealed, done.guesses, done.states).masked_fill(done.taken_back, MASK)
    assert torch.equal(derived, following)
    holes = (done.states == MASK) & done.response_valid[:, None]
    assert not (done.revealed & ~holes).any() and not (done.taken_back & holes).any()
    assert torch.equal(done.guesses == done.states, ~holes)
    assert not (done.guesses == MASK).any() and not (done.response_ids == MASK).any()
    assert (done.log_prob[~holes] == 0).all() and (done.confidence[~holes] == 0).all()
    assert (done.log_prob[holes] < 0).all()
    assert done.forwards == int(done.active.sum())
    rows, steps = done.active.nonzero(as_tuple=True)
    assert torch.equal(done.holes_at(rows, steps), holes[rows, steps])
    if not rule.takes_back:
        assert not done.taken_back.any()


@pytest.mark.parametrize("rule", NEVER_TAKES_BACK, ids=RULE_IDS[:6])
@pytest.mark.parametrize("stop_at_end", [False, True])
def test_a_step_map_replaces_the_states(denoiser: TransformerDenoiser, rule: Rule, stop_at_end: bool) -> None:
    sampler = MaskedSampler(steps=12, rule=rule, temperature=1.0, stop_at_end=stop_at_end)
    canvas = Canvas.of(PROMPTS, [12, 5, 8, 9, 4], denoiser.spec)
    full = sampler.sample(denoiser, canvas, range(5), needs={"states", "revealed"})
    small = sampler.sample(denoiser, canvas, range(5), needs={"step_map"})
    rows, steps = full.active.nonzero(as_tuple=True)
    assert small.states is None and small.step_map is not None and full.revealed is not None
    assert torch.equal(small.states_at(rows, steps), full.states_at(rows, steps))
    assert torch.equal(small.step_map[rows] == steps[:, None], full.revealed[rows, steps])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_recorded_log_probs_equal_a_forward_pass_on_the_recorded_state(
    denoiser: TransformerDenoiser, temperature: float
) -> None:
    sampler = MaskedSampler(steps=6, block_length=4, rule=RunningConfidence(), temperature=temperature, top_p=0.9)
    done = sampler.sample(
        denoiser,
        Canvas.of(PROMPTS, [12, 5, 8, 9, 4], denoiser.spec),
        range(5),
        needs={"states", "guesses", "log_prob"},
    )
    assert done.states is not None and done.guesses is not None and done.log_prob is not None
    for row, step in done.active.nonzero().tolist():
        ids = torch.cat([done.prompt_ids[row], done.states[row, step]])
        logits = denoiser(ids[None], done.valid[row][None])[0, done.prompt_ids.shape[1] :]
        holes = (done.states[row, step] == MASK) & done.response_valid[row]
        scored = token_log_prob(logits[holes], done.guesses[row, step][holes], temperature or 1.0)
        torch.testing.assert_close(done.log_prob[row, step][holes], scored, atol=1e-4, rtol=1e-4)


def test_asking_for_records_changes_nothing_but_reads_later_blocks(denoiser: TransformerDenoiser) -> None:
    sampler = MaskedSampler(steps=6, block_length=4, rule=RunningConfidence(), temperature=1.0)
    canvas = Canvas.of([[4, 5]], 12, denoiser.spec)
    plain = sampler.sample(denoiser, canvas, [3])
    recorded = sampler.sample(denoiser, canvas, [3], needs={"guesses"})
    assert torch.equal(plain.response_ids, recorded.response_ids)
    assert recorded.guesses is not None and not (recorded.guesses[0, 0] == MASK).any()


# --- infill and external starts ---


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_infill_keeps_what_was_given(denoiser: TransformerDenoiser, rule: Rule, block: int | None) -> None:
    initial = [[MASK, 9, MASK, MASK, 7, 7, MASK, MASK], [MASK, MASK, MASK, MASK, 5, MASK, MASK, 6]]
    sampler = MaskedSampler(steps=4, block_length=block, rule=rule, temperature=1.0)
    needs = {"states", "revealed", "taken_back"}
    for frozen in (None, [[False, True, *[False] * 6], [False] * 8]):
        canvas = Canvas.of([[4], [5, 6]], 8, denoiser.spec, initial=initial, frozen=frozen)
        done = sampler.sample(denoiser, canvas, [1, 2], needs=needs)
        assert done.states is not None and done.taken_back is not None
        given_tokens = torch.tensor(initial) != MASK
        # A given token that nobody froze was never filled by the rule either, so it has no confidence to lose.
        assert torch.equal(done.response_ids[given_tokens], torch.tensor(initial)[given_tokens])
        assert (done.states == torch.tensor(initial)[:, None])[given_tokens[:, None].expand_as(done.states)].all()
        assert not (done.taken_back & given_tokens[:, None]).any()
        assert not (done.response_ids == MASK).any()


def test_a_canvas_without_holes_costs_nothing(denoiser: TransformerDenoiser) -> None:
    canvas = Canvas.of([[4], [5]], 3, denoiser.spec, initial=[[5, 6, 7], [7, 7, 7]])
    done = MaskedSampler(steps=3).sample(denoiser, canvas, [1, 2], needs=RECORDED)
    assert done.forwards == done.steps == 0
    assert done.response_ids.tolist() == [[5, 6, 7], [7, 7, 7]]
    assert done.states is not None and done.states.shape == (2, 0, 3)


@pytest.mark.parametrize("at", [0, 2, 4, 5])
def test_continuing_from_a_recorded_state_equals_the_whole_run(denoiser: TransformerDenoiser, at: int) -> None:
    sampler = MaskedSampler(steps=6, block_length=4)
    whole = sample(sampler, denoiser, [4, 5], 12, needs={"states"})
    assert whole.states is not None
    state = whole.states[0, at].tolist()
    canvas = Canvas.of([[4, 5]], 12, denoiser.spec, initial=[state])
    resumed = sampler.sample(denoiser, canvas, [0], needs={"states"})
    assert resumed.states is not None
    if at == 5:  # inside a block: its two holes are spread over the block's two steps anew
        assert resumed.steps == 2
    else:
        assert torch.equal(resumed.states[0], whole.states[0, at:])
        assert torch.equal(resumed.response_ids, whole.response_ids)


@pytest.mark.parametrize("at", [1, 3])
def test_continuing_inside_a_block_with_the_steps_that_are_left(denoiser: TransformerDenoiser, at: int) -> None:
    whole = sample(MaskedSampler(steps=4), denoiser, [4, 5], 12, needs={"states"})
    assert whole.states is not None
    canvas = Canvas.of([[4, 5]], 12, denoiser.spec, initial=[whole.states[0, at].tolist()])
    resumed = MaskedSampler(steps=4 - at).sample(denoiser, canvas, [0])
    assert torch.equal(resumed.response_ids, whole.response_ids)


# --- stopping early ---


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("rule", NEVER_TAKES_BACK, ids=RULE_IDS[:6])
def test_stopping_at_the_end_token_gives_the_text_of_the_full_run(
    denoiser: TransformerDenoiser, rule: Rule, block: int | None
) -> None:
    prompts, lengths = [*PROMPTS, [5], [6], [9, 9]], [12, 5, 8, 9, 4, 12, 12, 12]
    # In one block the end token tends to come late; several draws make sure that some row stops.
    prompts, lengths = 3 * prompts, 3 * lengths
    canvas, seeds = Canvas.of(prompts, lengths, denoiser.spec), range(len(prompts))
    full, early = (
        MaskedSampler(steps=12, block_length=block, rule=rule, temperature=1.5, stop_at_end=stop).sample(
            denoiser, canvas, seeds
        )
        for stop in (False, True)
    )
    assert response_texts(denoiser, early.response_ids) == response_texts(denoiser, full.response_ids)
    assert not (early.response_ids == MASK).any()
    assert early.forwards < full.forwards


def test_a_row_stops_only_behind_text_without_holes() -> None:
    # Step 0 writes the end token at position 2 while 0 and 1 are open; they are filled by steps 1 and 2; 3 never is.
    script = words_with([[0.5, 0.4, 0.9, 0.3]] * 4)
    script[0, 2, END], script[0, 2, WORD:] = 0.0, -torch.inf
    done = sample(MaskedSampler(steps=4, stop_at_end=True), Scripted(script), [], 4, needs={"step_map", "states"})
    assert done.steps == 3 and done.forwards == 3
    assert done.response_ids[0].tolist() == [W[1], W[2], END, END]
    assert done.step_map is not None and done.step_map[0].tolist() == [1, 2, 0, 3]


# --- refusals ---


@pytest.mark.parametrize(
    ("sampler", "length", "message"),
    [
        (
            MaskedSampler(steps=5, block_length=4),
            8,
            r"steps: 5 do not divide into 2 blocks \(allowed: multiples of 2\)",
        ),
        (MaskedSampler(steps=9), 8, r"steps: 9 do not fit a response of 8 tokens"),
        (
            MaskedSampler(steps=2, block_length=9),
            8,
            r"block_length: 9 is longer than the response \(8 tokens\)",
        ),
    ],
)
def test_steps_that_do_not_fit_are_refused_before_any_work(
    denoiser: TransformerDenoiser, sampler: MaskedSampler, length: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sample(sampler, denoiser, [4], length)


def test_rules_without_a_schedule_ignore_steps(denoiser: TransformerDenoiser) -> None:
    for steps in (1, 5, 999):
        done = sample(MaskedSampler(steps=steps, block_length=4, rule=Threshold(threshold=1.0)), denoiser, [4], 8)
        assert done.steps == 8


@pytest.mark.parametrize(
    ("needs", "message"),
    [({"step_map"}, "'step_map' is not exact"), ({"state"}, "'state' does not exist, did you mean 'states'")],
)
def test_records_that_cannot_be_kept_are_refused(denoiser: TransformerDenoiser, needs: set[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(MaskedSampler(steps=2, rule=RunningConfidence()), denoiser, [4], 4, needs=needs)


def test_stopping_early_with_a_rule_that_takes_back_is_refused() -> None:
    with pytest.raises(UserError, match="stop_at_end"):
        MaskedSampler(steps=2, rule=RunningConfidence(), stop_at_end=True)


def test_seeds_must_match_rows(denoiser: TransformerDenoiser) -> None:
    with pytest.raises(ValueError, match="2 rows need as many seeds, got 1"):
        MaskedSampler(steps=2).sample(denoiser, Canvas.of([[4], [5]], 4, denoiser.spec), [1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "at least one prompt"),
        (([[4]], 0), "response_length: should be at least 1, got 0"),
        (
            ([[4], [4] * 21], 4),
            r"canvas of 24 tokens is too short for prompt 1 \(21 tokens\) and its response \(4 tokens\)",
        ),
    ],
)
def test_impossible_canvases_are_refused(denoiser: TransformerDenoiser, arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Canvas.of(*arguments, denoiser.spec)


def test_impossible_starts_are_refused(denoiser: TransformerDenoiser) -> None:
    with pytest.raises(UserError, match="initial: row 0 has 2 tokens, its response has 3"):
        Canvas.of([[4]], 3, denoiser.spec, initial=[[MASK, 5]])
    with pytest.raises(UserError, match="frozen: row 0 freezes a mask"):
        Canvas.of([[4]], 2, denoiser.spec, initial=[[MASK, 5]], frozen=[[True, True]])
