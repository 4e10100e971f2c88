"""One denoising loop for masked tokens: full diffusion, blocks, infill, external starts, any rule, any schedule.

Rows are independent chains. Each has its own length, block, count plan and noise, so a batch equals its rows decoded
one
by one; a row that is done leaves the batch, and padding that only it needed leaves with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.registry import UserError
from unveil.samplers.canvas import Canvas
from unveil.samplers.rules import LowConfidence, Rule, State, StepView
from unveil.samplers.schedules import Even, Schedule
from unveil.samplers.timetable import Timetable
from unveil.samplers.tokens import confidence, filter_logits, sample_categorical, token_log_prob
from unveil.samplers.trajectory import Trajectory, check_needs, concatenate


@dataclass(kw_only=True)
class MaskedSampler:
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

    def check_fits(self, response_length: int) -> None:
        """Refuse step counts that do not divide into the blocks of a response.

        Raises:
            UserError: naming the key and what is allowed.
        """
        if self.block_length is not None and self.block_length > response_length:
            raise UserError(f"block_length: {self.block_length} is longer than the response ({response_length} tokens)")
        if not self.rule.follows_schedule:
            return
        blocks = math.ceil(response_length / (self.block_length or response_length))
        if self.steps % blocks:
            raise UserError(f"steps: {self.steps} do not divide into {blocks} blocks (allowed: multiples of {blocks})")
        if self.steps > response_length:
            raise UserError(
                f"steps: {self.steps} do not fit a response of {response_length} tokens (each reveals one or more)"
            )

    @torch.no_grad()
    def sample(
        self,
        denoiser: MaskedDenoiser,
        canvas: Canvas,
        seeds: Sequence[int],
        *,
        needs: Iterable[str] = (),
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """Denoise every row of the canvas.

        Args:
            denoiser: the network; put it into evaluation mode first.
            canvas: where to start (B rows).
            seeds: one per row; a row's randomness depends on nothing else.
            needs: optional fields of the Trajectory that somebody will read.
            batch_size: rows per network call; all at once if None.
            on_batch: called with the number of finished rows after every batch.

        Raises:
            UserError: steps do not fit the response, or a field cannot be recorded.
        """
        wanted = check_needs(needs, not self.rule.takes_back)
        width = canvas.response.shape[1]
        self.check_fits(width)
        if len(seeds) != len(canvas):
            raise ValueError(f"{len(canvas)} rows need as many seeds, got {len(seeds)}")
        size = batch_size or len(canvas)
        parts = []
        for start in range(0, len(canvas), size):
            rows = slice(start, start + size)
            parts.append(_Chains(self, denoiser, canvas.rows(rows), seeds[rows], wanted).run())
            if on_batch is not None:
                on_batch(min(start + size, len(canvas)))
        return concatenate(parts) if len(parts) > 1 else parts[0]

    def steps_per_block(self, width: int) -> int:
        """Local steps of a full block when responses are at most ``width`` tokens."""
        blocks = math.ceil(width / (self.block_length or width))
        return max(1, self.steps // blocks)

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
        batch, width = canvas.response.shape
        block = sampler.block_length or width
        self.blocks = math.ceil(width / block)
        self.block_of = torch.arange(width, device=device) // block
        self.timetable: Timetable | None = None
        if sampler.rule.follows_schedule:
            holes = (canvas.response == self.mask_id) & canvas.response_valid & ~canvas.frozen
            local_steps = sampler.steps_per_block(width)
            self.timetable = Timetable.of(holes, block, sampler.schedule, local_steps, device)
        lengths = canvas.response_valid.sum(1).tolist()
        max_steps = max(self.timetable.ends) if self.timetable else width
        self.token_noise, self.order_noise = self._draw_noise(seeds, lengths, max_steps, width)

        self.canvas = canvas = canvas.to(device)
        self.rows = torch.arange(batch, device=device)
        self.ids, self.valid = canvas.ids.clone(), canvas.valid
        self.editable = canvas.response_valid & ~canvas.frozen
        self.start = canvas.prompt_width
        self.state: State = sampler.rule.start(batch, width, device)

        self.final = canvas.response.clone()
        self.records: dict[str, list[Tensor]] = {name: [] for name in needs}
        self.step_map = torch.full((batch, width), -1, device=device)
        self.taken = torch.zeros(batch, dtype=torch.long, device=device)
        self.forwards = 0

    def run(self) -> Trajectory:
        step = 0
        while len(holes := self._retire(step)):
            self._step(step, holes)
            step += 1
        prompt_width = self.canvas.prompt_width
        recorded: dict[str, Tensor] = {}
        for name, steps in self.records.items():
            if name != "step_map":
                recorded[name] = torch.stack(steps, 1) if steps else self._empty_record(name)
        return Trajectory(
            prompt_ids=self.canvas.ids[:, :prompt_width].cpu(),
            response_ids=self.final.cpu(),
            valid=self.canvas.valid.cpu(),
            active=torch.arange(step) < self.taken.cpu()[:, None],
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
        block, remain, last = self._progress(step, holes)
        open_holes = holes if self.blocks == 1 else holes & (self.block_of <= block[:, None])
        # A reader of guesses wants the whole x_0, holes of later blocks included; a rule only ever sees the open ones.
        read = holes if self.needs & {"guesses", "log_prob", "confidence"} else open_holes
        features = self.denoiser.features(self.ids, self.valid)
        self.forwards += len(self.rows)
        width = holes.shape[1]
        logits = self.denoiser.head(features[:, self.start : self.start + width][read])
        uniforms = None if self.token_noise is None else self.token_noise[self.rows, step, :width][read]
        tokens, ranking = sampler.propose(logits, uniforms)
        if self.order_noise is not None:
            scores = self.order_noise[self.rows, step, :width][read].float()
        else:
            scores = confidence(ranking, tokens, sampler.rule.confidence)  # type: ignore[arg-type]

        guess = updated = response.masked_scatter(read, tokens)
        score = seen = torch.full(holes.shape, -torch.inf, device=holes.device).masked_scatter_(read, scores)
        if read is not open_holes:
            seen = score.masked_fill(~open_holes, -torch.inf)
            updated = torch.where(open_holes, guess, response)
        view = StepView(open=open_holes, score=seen, remain=remain, last=last)
        updated = updated.masked_fill(sampler.rule.holes_after(view, self.state), self.mask_id)
        if self.needs:
            self._record(step, response, holes, read, guess, score, logits, tokens, updated)
        response.copy_(updated)

    def _progress(self, step: int, holes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b,) each: the current block, the holes to leave in the open blocks, and whether it is the block's last
        step."""
        if self.timetable is not None:
            return self.timetable.columns[step]
        nothing = torch.zeros_like(self.rows)
        return torch.where(holes, self.block_of, self.blocks).amin(1), nothing, nothing.bool()

    def _retire(self, step: int) -> Tensor:
        """Let the rows leave that are finished before ``step``; returns the holes (b, R) of the others."""
        response = self.response
        holes = (response == self.mask_id) & self.editable
        if self.sampler.stop_at_end:
            holes = self._stop_rows(response, holes, step)
        elif self.timetable is not None and min(self.timetable.ends, default=0) > step:
            # The timetable is known on the host: asking the device whether a row is done would wait for it.
            return holes
        done = ~holes.any(1)
        if self.timetable is not None:
            self._check_rule(done, step)
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
        for name in ("ids", "valid", "editable"):
            setattr(self, name, getattr(self, name)[keep])
        self.state = {name: value[keep] for name, value in self.state.items()}
        if self.timetable is not None:
            self.timetable = self.timetable.rows(keep)
        used = self.valid.any(0).nonzero()
        low, high = min(int(used[0]), self.start), int(used[-1]) + 1
        width = high - self.start
        self.ids, self.valid = self.ids[:, low:high].contiguous(), self.valid[:, low:high].contiguous()
        self.start -= low
        self.editable, self.block_of = self.editable[:, :width], self.block_of[:width]
        self.state = {name: value[:, :width].contiguous() for name, value in self.state.items()}

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
    ) -> None:
        filled = holes & (updated != self.mask_id)
        values: dict[str, Callable[[], Tensor]] = {
            "states": response.clone,
            "guesses": guess.clone,
            "confidence": lambda: score.masked_fill(~read, 0),
            "log_prob": lambda: torch.zeros_like(score).masked_scatter_(
                read, token_log_prob(logits, tokens, self.sampler.temperature or 1.0)
            ),
            "revealed": lambda: filled,
            "taken_back": lambda: ~holes & self.editable & (updated == self.mask_id),
        }
        for name in self.needs:
            if name == "step_map":
                came = self.step_map[self.rows, : filled.shape[1]]
                self.step_map[self.rows, : filled.shape[1]] = torch.where(filled, step, came)
            else:
                self.records[name].append(self._spread(name, values[name]()))

    def _spread(self, name: str, value: Tensor) -> Tensor:
        """Live rows (b, r) of a record laid out over the whole batch (B, R); finished rows keep their final state."""
        full = self.final.clone() if name in ("states", "guesses") else value.new_zeros(self.final.shape)
        full[self.rows, : value.shape[1]] = value
        return full

    def _empty_record(self, name: str) -> Tensor:
        batch, width = self.final.shape
        kind = {
            "states": torch.long,
            "guesses": torch.long,
            "confidence": torch.float32,
            "log_prob": torch.float32,
        }
        return torch.zeros(batch, 0, width, dtype=kind.get(name, torch.bool))

    def _draw_noise(
        self, seeds: Sequence[int], lengths: list[int], steps: int, width: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Uniforms (B, S, R) for tokens and for a random order, each row from its own seed and length alone."""
        wants_tokens = self.sampler.temperature > 0
        wants_order = self.sampler.rule.confidence == "random"
        if not (wants_tokens or wants_order):
            return None, None
        noise = torch.zeros(2, len(lengths), steps, width, dtype=torch.float64)
        for row, (seed, length) in enumerate(zip(seeds, lengths, strict=True)):
            stream = torch.Generator().manual_seed(seed)
            drawn = torch.rand(steps, 2, length, dtype=torch.float64, generator=stream)
            noise[:, row, :, :length] = drawn.transpose(0, 1)
        device = self.denoiser.device
        return (noise[0].to(device) if wants_tokens else None), (noise[1].to(device) if wants_order else None)
