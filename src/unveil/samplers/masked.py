"""One denoising loop for masked tokens: full diffusion, blocks, infill, external starts, any rule, any schedule.

Rows are independent chains. Each has its own length, block, count plan and noise, so a batch equals its rows decoded
one by one; a row that is done leaves the batch, and padding that only it needed leaves with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.unmask import UnmaskInputs
from unveil.registry import UserError
from unveil.samplers.actions import Action
from unveil.samplers.base import TokenSampler
from unveil.samplers.caches import Cache, Kept
from unveil.samplers.canvas import Canvas
from unveil.samplers.rules import LowConfidence, Policy, Rule, State, StepView
from unveil.samplers.schedules import Even, Schedule
from unveil.samplers.solvers import First, Solver, SolverView
from unveil.samplers.timetable import Clock, Slot, Timetable
from unveil.samplers.tokens import certainty_rank, confidence, filter_logits, sample_categorical, token_log_prob
from unveil.samplers.trajectory import TokenTrajectory
from unveil.samplers.transforms import Transform


@dataclass(kw_only=True)
class MaskedSampler(TokenSampler, name="masked"):
    """How samples are drawn from a masked-token denoiser."""

    steps: Annotated[int, Field(ge=1)]
    """Denoising steps for a response of full length; split evenly over the blocks. Rules that do not follow a schedule
    ignore it."""
    block_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a block; blocks are decoded left to right. None: one block, full diffusion."""
    schedule: Schedule = field(default_factory=Even)
    """How many tokens each step of a block reveals."""
    rule: Rule = field(default_factory=LowConfidence)
    """Which positions a step commits or takes back."""
    transform: Transform | None = None
    """Changes the scores that the rule ranks by; None: they stay."""
    solver: Solver = field(default_factory=First)
    """What tokens are drawn from, given the network's outputs at this step and the last."""
    cache: Cache | None = None
    """Which keys and values a step takes over from earlier ones; None: none, every step computes the whole canvas."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature)."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus filter of the drawn token."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Top-k filter of the drawn token."""
    rank_by: Literal["model", "sampling"] = "model"
    """The distribution that confidence is read from: the model's own, or the tempered and filtered one that is sampled
    (MDPO's released code). At temperature 0 both are the model's."""
    stop_at_end: bool = False
    """Finish a row once an end token stands behind text without holes; the rest becomes end tokens. Not for rules that
    take back."""

    def __post_init__(self) -> None:
        if self.stop_at_end and self.rule.takes_back:
            raise UserError("stop_at_end: not possible with a rule that takes tokens back")
        self.solver.check_fits(self.rule)
        if self.solver.revises and (self.stop_at_end or self.top_p is not None or self.top_k is not None):
            raise UserError(f"solver {self.solver.name}: not possible with stop_at_end, top_p or top_k")
        if self.transform is not None:
            self.transform.check_fits(self.rule)

    @property
    def action(self) -> Action | None:
        return self.rule.action if isinstance(self.rule, Policy) else None

    @property
    def exact(self) -> bool:
        return self.solver.exact

    def check_fits(self, response_length: int) -> None:
        if self.block_length is not None and self.block_length > response_length:
            raise UserError(f"block_length: {self.block_length} is longer than the response ({response_length} tokens)")
        if self.rule.follows_schedule:
            self.schedule.check_fits(response_length, self.block_length, self.steps)

    @property
    def planned_steps(self) -> int | None:
        return self.steps if self.rule.follows_schedule else None

    def refused_fields(self) -> dict[str, str]:
        refused = {"times": "needs a sampler on a grid of times ('reverse')"}
        if self.rule.takes_back:
            refused["step_map"] = "is not exact for a rule that takes tokens back; ask for 'states'"
        if self.solver.revises:
            refused["step_map"] = f"is not exact for the solver {self.solver.name!r}; ask for 'states'"
        if not self.solver.exact:
            refused |= dict.fromkeys(("log_prob", "entropy"), "needs the network's own distribution (solver 'first')")
        if self.action is None:
            refused["order_log_prob"] = "needs a learned rule (rule 'policy')"
        return refused

    def check_denoiser(self, denoiser: MaskedDenoiser) -> None:
        super().check_denoiser(denoiser)
        if denoiser.spec.prediction == "log_score":
            raise UserError("sampler: 'masked' cannot time a network of scores (allowed: reverse)")
        self.rule.network(denoiser)
        if self.cache is not None and not denoiser.spec.keeps_keys:
            raise UserError(
                f"sampler.cache: {self.cache.name!r} needs a network that can keep keys and values, which "
                f"{type(denoiser).__name__} cannot (allowed: null)"
            )

    def sample_batch(
        self, denoiser: MaskedDenoiser, start: Canvas, seeds: Sequence[int], needs: frozenset[str]
    ) -> TokenTrajectory:
        return _Chains(self, denoiser, start, seeds, needs).run()

    def propose(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw a token for every hole.

        Args:
            logits: (N, V).
            uniforms: (N,) float64 noise, None at temperature 0.

        Returns:
            tokens (N,) and the logits (N, V) that confidence is read from.
        """
        if uniforms is None:
            return logits.argmax(-1), logits
        tempered = logits if self.temperature == 1 else logits.float() / self.temperature
        filtered = filter_logits(tempered, self.top_k, self.top_p)
        return sample_categorical(filtered, uniforms), filtered if self.rank_by == "sampling" else logits


class _Chains:
    """The live rows of one batch. Everything with a leading axis b shrinks as rows finish."""

    def __init__(
        self,
        sampler: MaskedSampler,
        denoiser: MaskedDenoiser,
        canvas: Canvas,
        seeds: Sequence[int],
        needs: frozenset[str],
    ) -> None:
        self.sampler, self.denoiser, self.needs = sampler, denoiser, needs
        device = denoiser.device
        self.mask_id = denoiser.spec.mask_id
        self.network = sampler.rule.network(denoiser)
        batch, width = canvas.response.shape
        layout = sampler.schedule.layout(width, sampler.block_length, sampler.steps)
        self.blocks = len(layout)
        self.block_of = torch.tensor([place for place, (size, _) in enumerate(layout) for _ in range(size)])
        self.block_of = self.block_of.to(device)
        lengths = canvas.response_valid.sum(1)
        self.timetable: Timetable | None = None
        self.planned = lengths
        holes = (canvas.response == self.mask_id) & canvas.response_valid & ~canvas.frozen
        self.clock = Clock.of(holes, layout, seeds, device) if denoiser.spec.time_conditioned else None
        if sampler.rule.follows_schedule:
            self.timetable = Timetable.of(holes, layout, sampler.schedule, device)
            self.planned = torch.tensor(self.timetable.ends)
        self.reads_all = self.network is not None or bool(needs & {"guesses", "log_prob", "confidence", "entropy"})
        self.kept: Kept | None = None
        if sampler.cache is not None:
            self.kept = Kept(sampler.cache, denoiser, [size for size, _ in layout], open_only=not self.reads_all)
        self.token_noise, self.order_noise = self._draw_noise(seeds, lengths.tolist(), int(self.planned.max()), width)

        self.canvas = canvas = canvas.to(device)
        self.given = (canvas.response != self.mask_id) | ~canvas.response_valid
        self.planned = self.planned.to(device)
        self.rows = torch.arange(batch, device=device)
        self.ids, self.valid = canvas.ids.clone(), canvas.valid
        self.editable = canvas.response_valid & ~canvas.frozen
        self.start = canvas.prompt_width
        self.state: State = sampler.rule.start(batch, width, device)
        self.memory: State = {}
        self.again = torch.zeros_like(self.editable)

        self.final = canvas.response.clone()
        self.records: dict[str, list[Tensor]] = {name: [] for name in needs}
        self.step_map = torch.full((batch, width), -1, device=device)
        self.taken = torch.zeros(batch, dtype=torch.long, device=device)
        self.forwards = 0

    def run(self) -> TokenTrajectory:
        step = 0
        while len(holes := self._retire(step)):
            self._step(step, holes)
            step += 1
        prompt_width = self.canvas.prompt_width
        recorded: dict[str, Tensor] = {}
        for name, steps in self.records.items():
            if name not in TokenTrajectory.per_chain:
                recorded[name] = torch.stack(steps, 1) if steps else self._empty_record(name)
        return TokenTrajectory(
            prompt_ids=self.canvas.ids[:, :prompt_width].cpu(),
            response_ids=self.final.cpu(),
            valid=self.canvas.valid.cpu(),
            active=torch.arange(step) < self.taken.cpu()[:, None],
            given=self.given.cpu(),
            planned=self.planned.cpu(),
            forwards=self.forwards,
            mask_id=self.mask_id,
            step_map=self.step_map.cpu() if "step_map" in self.needs else None,
            **{name: value.cpu() for name, value in recorded.items()},
        )

    @property
    def response(self) -> Tensor:
        """(b, R) response part of the live canvases (a view)."""
        return self.ids[:, self.start : self.start + self.editable.shape[1]]

    def _step(self, step: int, holes: Tensor) -> None:
        sampler, response = self.sampler, self.response
        slot = self._slot(step, holes)
        open_holes = holes if self.blocks == 1 else holes & (self.block_of <= slot.block[:, None])
        # A reader of guesses wants the whole x_0, holes of later blocks included; a network reads what is believed of
        # them all; another rule only ever sees the open ones.
        read = holes if self.reads_all else open_holes
        if sampler.solver.revises:
            read = read | self.again
        width = holes.shape[1]
        if self.kept is None:
            times = None if self.clock is None else self.clock.at(slot.block, open_holes.sum(1))
            features = self.denoiser.features(self.ids, self.valid, times)
        else:
            features = self.kept.step(self.ids, self.valid, open_holes, self.start, slot.block)
        features = features[:, self.start : self.start + width]
        self.forwards += len(self.rows)
        logits = self.denoiser.head(features[read])
        noise = None if self.order_noise is None else self.order_noise[self.rows, step, :, :width]
        if not sampler.solver.exact:
            logits = sampler.solver.solve(logits, self._solver_view(read, open_holes, slot, noise), self.memory)
        uniforms = None if self.token_noise is None else self.token_noise[self.rows, step, :width][read]
        tokens, ranking = sampler.propose(logits, uniforms)
        if sampler.rule.confidence == "random":
            assert noise is not None
            scores = noise[:, 0][read].float()
        else:
            scores = confidence(ranking, tokens, sampler.rule.confidence)

        guess = updated = response.masked_scatter(read, tokens)
        score = seen = torch.full(holes.shape, -torch.inf, device=holes.device).masked_scatter_(read, scores)
        if read is not open_holes:
            updated = torch.where(open_holes | self.again, guess, response)
        view = StepView(
            open=open_holes, score=score, remain=slot.remain, last=slot.last, step=slot.step, steps=slot.steps,
            noise=noise,
        )  # fmt: skip
        if sampler.transform is not None or self.network is not None:  # nobody else asks where the chain is
            view.done, view.planned = torch.full_like(self.rows, step), self.planned[self.rows]
        if sampler.transform is not None:
            score = seen = sampler.transform.apply(score, guess, view, self.denoiser.spec)
        if read is not open_holes:
            seen = score.masked_fill(~open_holes, -torch.inf)
        view.score = seen
        if self.network is not None:
            shown = score.masked_fill(~holes, 0)
            view.preference = self._preference(holes, slot, shown, view, features)
        updated = updated.masked_fill(sampler.rule.holes_after(view, self.state), self.mask_id)
        if self.needs:
            self._record(step, response, holes, read, guess, score, logits, tokens, updated, slot, view)
        if sampler.solver.revises:
            self.again = holes & (updated != self.mask_id)
        response.copy_(updated)

    def _solver_view(self, read: Tensor, open_holes: Tensor, slot: Slot, noise: Tensor | None) -> SolverView:
        rule, left = self.sampler.rule, open_holes.sum(1)
        if rule.confidence == "random":
            assert noise is not None
            ahead = certainty_rank(noise[:, 0].float().masked_fill(~open_holes, -torch.inf)).double()
        else:  # the order is not known yet: the middle of the step
            ahead = ((left - slot.remain - 1) / 2)[:, None].expand(open_holes.shape).double()
        if self.clock is None:
            now, at = left.double(), left[:, None] - ahead
        else:
            now, at = self.clock.at(slot.block, left), self.clock.at(slot.block, left, ahead.long())
        return SolverView(
            read=read, again=self.again, response=self.response, now=now, at=at, temperature=self.sampler.temperature
        )

    def _preference(self, holes: Tensor, slot: Slot, confidence: Tensor, view: StepView, features: Tensor) -> Tensor:
        """(b, R) logits of the rule's network."""
        assert self.network is not None and view.done is not None and view.planned is not None
        network, module = self.network
        inputs = UnmaskInputs(
            masked=holes,
            block=self._in_block(slot),
            confidence=confidence,
            valid=self._inside,
            step=view.done,
            planned=view.planned,
            features=features if network.reads_features else None,
        )
        return module(inputs)

    @property
    def _inside(self) -> Tensor:
        """(b, R) True inside each live row's response."""
        return self.valid[:, self.start : self.start + self.editable.shape[1]]

    def _in_block(self, slot: Slot) -> Tensor:
        """(b, R) the positions of the current block."""
        return self._inside & (self.block_of == slot.block[:, None])

    def _slot(self, step: int, holes: Tensor) -> Slot:
        """What the schedule says of this step; rules that set their own pace only have the current block."""
        if self.timetable is not None:
            return self.timetable.slots[step]
        block = torch.where(holes, self.block_of, self.blocks).amin(1)
        nothing = torch.zeros_like(self.rows)
        return Slot(block, nothing, nothing.bool(), torch.full_like(self.rows, step), self.planned[self.rows])

    def _retire(self, step: int) -> Tensor:
        """Let the rows leave that are finished before ``step``; returns the holes (b, R) of the others."""
        response = self.response
        holes = (response == self.mask_id) & self.editable
        if self.sampler.stop_at_end:
            holes = self._stop_rows(response, holes, step)
        elif self.timetable is not None and min(self.timetable.ends, default=0) > step:
            # The timetable is known on the host: asking the device whether a row is done would wait for it.
            return holes
        # A rule that sets its own pace may waste steps; a chain that has none left keeps its holes.
        done = ~holes.any(1)
        if self.timetable is not None:
            self._check_rule(done, step)
        else:
            done |= self.planned[self.rows] <= step
        if bool(done.any()):
            self._leave(done, response, step)
            holes = holes[~done, : self.editable.shape[1]]
        return holes

    def _check_rule(self, done: Tensor, step: int) -> None:
        assert self.timetable is not None
        for finished, end in zip(done.tolist(), self.timetable.ends, strict=True):
            if end <= step and not finished:
                raise ValueError(
                    f"rule {self.sampler.rule.name!r} follows the schedule but left holes at its last step"
                )

    def _stop_rows(self, response: Tensor, holes: Tensor, step: int) -> Tensor:
        """Fill the rest of rows in which an end token stands behind text without holes; returns the holes left."""
        ends = torch.isin(response, torch.tensor(self.denoiser.spec.end_ids, device=response.device)) & ~holes
        ends &= self.editable | self.canvas.response_valid[self.rows][:, : ends.shape[1]]
        first_end = torch.where(ends, torch.arange(ends.shape[1], device=ends.device), ends.shape[1]).amin(1)
        first_hole = torch.where(holes, torch.arange(ends.shape[1], device=ends.device), ends.shape[1]).amin(1)
        stopped = (first_end < first_hole)[:, None] & holes
        response.masked_fill_(stopped, self.denoiser.spec.end_ids[0])
        came = self.step_map[self.rows, : ends.shape[1]]
        self.step_map[self.rows, : ends.shape[1]] = torch.where(stopped, step, came)
        return holes & ~stopped

    def _leave(self, done: Tensor, response: Tensor, step: int) -> None:
        gone, keep = self.rows[done], ~done
        self.final[gone, : response.shape[1]] = response[done]
        self.taken[gone] = step
        self.rows = self.rows[keep]
        if not len(self.rows):
            return
        for name in ("ids", "valid", "editable", "again"):
            setattr(self, name, getattr(self, name)[keep])
        self.state = {name: value[keep] for name, value in self.state.items()}
        self.memory = {name: value[keep] for name, value in self.memory.items()}
        if self.clock is not None:
            self.clock = self.clock.rows(keep)
        if self.timetable is not None:
            self.timetable = self.timetable.rows(keep)
        used = self.valid.any(0).nonzero()
        low, high = min(int(used[0]), self.start), int(used[-1]) + 1
        width = high - self.start
        if self.kept is not None:
            self.kept.select(keep, low, high)
        self.ids, self.valid = self.ids[:, low:high].contiguous(), self.valid[:, low:high].contiguous()
        self.start -= low
        self.editable, self.block_of = self.editable[:, :width], self.block_of[:width]
        self.again = self.again[:, :width]
        self.state = {name: value[:, :width].contiguous() for name, value in self.state.items()}
        self.memory = {name: value[:, :width].contiguous() for name, value in self.memory.items()}

    def _record(
        self,
        step: int,
        response: Tensor,
        holes: Tensor,
        read: Tensor,
        guess: Tensor,
        score: Tensor,
        logits: Tensor,
        tokens: Tensor,
        updated: Tensor,
        slot: Slot,
        view: StepView,
    ) -> None:
        filled = holes & (updated != self.mask_id)
        values: dict[str, Callable[[], Tensor | None]] = {
            "states": response.clone,
            "guesses": guess.clone,
            "confidence": lambda: score.masked_fill(~(read & holes), 0),
            "log_prob": lambda: torch.zeros_like(score).masked_scatter_(
                read, token_log_prob(logits, tokens, self.sampler.temperature or 1.0)
            ),
            "entropy": lambda: torch.zeros_like(score).masked_scatter_(read, -confidence(logits, tokens, "entropy")),
            "revealed": lambda: filled,
            "block": lambda: self._in_block(slot),
            "order": lambda: filled.long() if view.order is None else view.order,
            "order_log_prob": lambda: view.order_log_prob,
            "taken_back": lambda: ~holes & self.editable & (updated == self.mask_id),
        }
        for name in self.needs:
            if name == "step_map":
                came = self.step_map[self.rows, : filled.shape[1]]
                self.step_map[self.rows, : filled.shape[1]] = torch.where(filled, step, came)
            else:
                value = values[name]()
                assert value is not None  # `refused_fields` let no reader ask for what the rule does not set
                self.records[name].append(self._spread(name, value))

    def _spread(self, name: str, value: Tensor) -> Tensor:
        """Live rows (b, r) of a record laid out over the whole batch (B, R); finished rows keep their final state."""
        if value.dim() == 1:
            return value.new_zeros(len(self.final)).index_copy_(0, self.rows, value)
        full = self.final.clone() if name in ("states", "guesses") else value.new_zeros(self.final.shape)
        full[self.rows, : value.shape[1]] = value
        return full

    def _empty_record(self, name: str) -> Tensor:
        batch, width = self.final.shape
        if name == "order_log_prob":
            return torch.zeros(batch, 0)
        whole = dict.fromkeys(("states", "guesses", "order"), torch.long)
        kind = whole | dict.fromkeys(("confidence", "log_prob", "entropy"), torch.float32)
        return torch.zeros(batch, 0, width, dtype=kind.get(name, torch.bool))

    def _draw_noise(
        self, seeds: Sequence[int], lengths: list[int], steps: int, width: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Uniforms (B, S, R) for tokens and (B, S, channels, R) for the rule, each row from its own seed and length."""
        wants_tokens = self.sampler.temperature > 0
        channels = self.sampler.rule.channels
        if not (wants_tokens or channels):
            return None, None
        # One channel is drawn for a rule that wants none, so that the tokens' noise is the same under most rules.
        noise = torch.zeros(1 + max(1, channels), len(lengths), steps, width, dtype=torch.float64)
        for row, (seed, length) in enumerate(zip(seeds, lengths, strict=True)):
            stream = torch.Generator().manual_seed(seed)
            drawn = torch.rand(steps, len(noise), length, dtype=torch.float64, generator=stream)
            noise[:, row, :, :length] = drawn.transpose(0, 1)
        device = self.denoiser.device
        order = noise[1:].permute(1, 2, 0, 3).to(device) if channels else None
        return (noise[0].to(device) if wants_tokens else None), order
