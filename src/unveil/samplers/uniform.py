"""Decoding from uniform noise: canvas after canvas, every position open at every step.

A canvas starts as random tokens. Networks that read finished text into a cache denoise canvases of their own length,
one behind the other; others see the whole response as one. A canvas that holds an end token is the last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.uniform import UniformDenoiser
from unveil.processes.masked import sample_categorical
from unveil.processes.uniform import UniformProcess
from unveil.registry import UserError
from unveil.samplers.base import TokenSampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.tokens import certainty_rank, confidence
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator

_RECORDED = ("states", "guesses", "confidence", "entropy", "log_prob", "revealed", "taken_back", "times")


@dataclass
class View:
    """What a step sees of b canvases of C positions.

    Attributes:
        process: of the network.
        canvas: (b, C) the state.
        open: (b, C) positions that may change.
        raw: (b, C, V) logits of x_0.
        step: its number, from 0.
        u: (2, b, C) float64 uniforms.
        memory: (b, H, C) the likeliest answers of the last steps, -1 before there were any.
        revealed: (b, C) what the step before took from the network.
    """

    process: UniformProcess
    canvas: Tensor
    open: Tensor
    raw: Tensor
    step: int
    u: Tensor
    memory: Tensor
    revealed: Tensor


@dataclass
class Outcome:
    """What a step does: the next state, and what it is recorded as; all (b, C) but for ``done`` (b,).

    ``believed`` (b, C, V) are the logits that tokens were drawn from, for self-conditioning. ``answer`` is what the
    canvas is if it ends here.
    """

    canvas: Tensor
    answer: Tensor
    believed: Tensor
    guesses: Tensor
    log_prob: Tensor
    revealed: Tensor
    taken_back: Tensor
    done: Tensor


class UniformSampler(TokenSampler):
    """What the samplers of this module share; they differ in their step alone."""

    horizon: ClassVar[int] = 0
    """Steps whose likeliest answers are remembered."""

    @abstractmethod
    def move(self, view: View, needs: frozenset[str]) -> Outcome:
        """One step of b canvases."""

    @property
    def planned_steps(self) -> int:
        return self.steps

    def grid(self) -> list[float]:
        """The steps + 1 times of a canvas, from 1 to 0."""
        return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()

    def refused_fields(self) -> dict[str, str]:
        refused = dict.fromkeys(("block", "order", "order_log_prob"), "needs a sampler with rules ('masked')")
        return refused | {"step_map": "does not exist where every token may change at every step; ask for 'states'"}

    def check_denoiser(self, denoiser: Any) -> None:
        if not isinstance(denoiser, UniformDenoiser):
            raise UserError(f"sampler: {self.name!r} is for networks of uniform noise (allowed: masked, reverse)")

    def sample_batch(
        self, denoiser: MaskedDenoiser, start: Canvas, seeds: Sequence[int], needs: frozenset[str]
    ) -> TokenTrajectory:
        assert isinstance(denoiser, UniformDenoiser)
        return _Chains(self, denoiser, start, seeds, needs).run()


@dataclass(kw_only=True)
class Ancestral(UniformSampler, name="ancestral"):
    """The reverse process of uniform noise on a grid of times (D3PM): every position moves by its own posterior."""

    steps: Annotated[int, Field(ge=1)]
    """Equal steps from time 1 to 0, for every canvas."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the guess of x_0 in the posterior; 0 takes the likeliest."""

    def move(self, view: View, needs: frozenset[str]) -> Outcome:
        t, s = self.grid()[view.step : view.step + 2]
        x_t, logits, opened = view.canvas[view.open], view.raw[view.open], view.open
        times = [torch.full((len(x_t),), time, dtype=torch.float64, device=x_t.device) for time in (t, s, 0.0)]
        u_move, u_token = (u[opened] for u in view.u)
        transition = view.process.step(logits, x_t, times[0], times[1], self.temperature)
        x_s = transition.sample(u_move, u_token)
        updated = view.canvas.masked_scatter(opened, x_s)
        guesses = updated
        if s > 0 and "guesses" in needs:  # with the noise that decides this step, as if it were the last
            whole = view.process.step(logits, x_t, times[0], times[2], self.temperature)
            guesses = view.canvas.masked_scatter(opened, whole.sample(u_move, u_token))
        nothing = torch.zeros(view.canvas.shape, device=x_t.device)
        scored = nothing.masked_scatter(opened, transition.log_prob(x_s)) if "log_prob" in needs else nothing
        return Outcome(
            canvas=updated, answer=updated, believed=view.raw, guesses=guesses, log_prob=scored,
            revealed=updated != view.canvas, taken_back=torch.zeros_like(opened),
            done=torch.full((len(updated),), s == 0, device=x_t.device),
        )  # fmt: skip


@dataclass(kw_only=True)
class EntropyBound(UniformSampler, name="entropy_bound"):
    """DiffusionGemma's generation: keep the surest tokens of every step, draw the rest of the canvas anew.

    A token is drawn for every position; the k of lowest entropy are kept, k being the largest number whose entropies,
    the greatest left out, add up to at most ``bound`` (arXiv 2505.24857). All others become random tokens. The answer
    is the likeliest token of every position at the last step.
    """

    steps: Annotated[int, Field(ge=1)] = 48
    """At most, for every canvas."""
    bound: Annotated[float, Field(gt=0)] = 0.1
    """Joint entropy in nats that the tokens of one step may have in common."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Of the first step; falls linearly towards ``last_temperature``."""
    last_temperature: Annotated[float, Field(gt=0)] = 0.4
    """The temperature that one step after the last would have."""
    stable: Annotated[int, Field(ge=0)] = 1
    """A canvas is done once its answer is that of as many steps before ..."""
    certain: Annotated[float, Field(ge=0)] = 0.005
    """... and the mean entropy of its positions lies below this, in nats; 0: never before the last step."""

    @property
    def horizon(self) -> int:  # type: ignore[override]
        return self.stable

    @property
    def exact(self) -> bool:
        return False

    def refused_fields(self) -> dict[str, str]:
        return super().refused_fields() | {
            "times": "needs a sampler on a grid of times ('ancestral')",
            "log_prob": "does not exist where tokens are kept by their entropy ('ancestral')",
        }

    def move(self, view: View, needs: frozenset[str]) -> Outcome:
        left = (self.steps - view.step) / self.steps
        logits = view.raw / (self.last_temperature + (self.temperature - self.last_temperature) * left)
        batch, width = view.canvas.shape
        flat = logits.flatten(0, 1)
        drawn = sample_categorical(flat, view.u[0].flatten()).view(batch, width)
        answer = torch.where(view.open, flat.argmax(-1).view(batch, width), view.canvas)
        entropy = -confidence(flat, drawn.flatten(), "entropy").view(batch, width)
        entropy = torch.where(view.open, entropy, 0.0)
        kept = view.open & self.surest(entropy.masked_fill(~view.open, torch.inf))
        noise = view.process.noise(view.u[1])
        updated = torch.where(view.open, torch.where(kept, drawn, noise), view.canvas)
        settled = (view.memory == answer[:, None]).all(2).all(1)
        sure = entropy.sum(1) / view.open.sum(1).clamp(min=1) < self.certain
        last = view.step + 1 == self.steps
        return Outcome(
            canvas=updated, answer=answer, believed=logits, guesses=answer, log_prob=torch.zeros_like(entropy),
            revealed=kept, taken_back=view.revealed & ~kept, done=settled & sure | last,
        )  # fmt: skip

    def surest(self, entropy: Tensor) -> Tensor:
        """(b, C) which tokens a step keeps, given their entropies, infinite where none may be."""
        rising = entropy.sort(dim=1, stable=True).values
        before = torch.cat([torch.zeros_like(rising[:, :1]), rising.cumsum(1)[:, :-1]], 1)
        return (before <= self.bound).gather(1, certainty_rank(-entropy))


class _Chains:
    """The rows of one batch. They stay together: a row that is done waits, at no count, for the others."""

    def __init__(
        self,
        sampler: UniformSampler,
        denoiser: UniformDenoiser,
        canvas: Canvas,
        seeds: Sequence[int],
        needs: frozenset[str],
    ) -> None:
        self.sampler, self.denoiser, self.needs = sampler, denoiser, needs
        spec = denoiser.spec
        self.process, device = spec.uniform, denoiser.device
        width = canvas.response.shape[1]
        self.size = spec.canvas_length or width
        lengths = canvas.response_valid.sum(1)
        if bool((lengths % self.size).any()) and spec.canvas_length is not None:
            raise UserError(
                f"response_length: should be a multiple of the model's canvas_length ({self.size}), got "
                f"{int(lengths[lengths % self.size > 0][0])}"
            )
        self.given = (canvas.response != spec.mask_id) | ~canvas.response_valid
        self.seeds, self.lengths = seeds, lengths.tolist()
        self.canvas = canvas = canvas.to(device)
        self.response = canvas.response.clone()
        self.editable = canvas.response_valid & ~canvas.frozen
        self.records: dict[str, list[Tensor]] = {name: [] for name in _RECORDED if name in needs}
        self.active: list[Tensor] = []
        self.forwards = 0

    def run(self) -> TokenTrajectory:
        canvas, width = self.canvas, self.response.shape[1]
        rows = len(self.response)
        ends = torch.tensor(self.denoiser.spec.end_ids, device=self.response.device)
        ids, valid, prefix = canvas.ids[:, : canvas.prompt_width], canvas.valid[:, : canvas.prompt_width], None
        ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        for block, start in enumerate(range(0, width, self.size)):
            place = slice(start, start + self.size)
            open_ = self.editable[:, place] & ~ended[:, None]
            live = open_.any(1)
            if not bool(live.any()):
                break
            prefix = self.denoiser.read(ids, valid, prefix)
            if self.denoiser.spec.canvas_length is not None:
                self.forwards += int(live.sum())
            self._denoise(block, place, open_, live, prefix)
            ids, valid = self.response[:, place], canvas.response_valid[:, place]
            ended |= (torch.isin(ids, ends) & valid).any(1)
            if self.denoiser.spec.canvas_length is not None:
                rest = ended[:, None] & self.editable[:, start + self.size :]
                self.response[:, start + self.size :].masked_fill_(rest, int(ends[0]))
        return self._trajectory()

    def _denoise(self, block: int, place: slice, open_: Tensor, live: Tensor, prefix: object) -> None:
        sampler, state = self.sampler, self.response[:, place]
        noise, u = self._noise(block, place)
        state.copy_(torch.where(open_ & (state == self.denoiser.spec.mask_id), self.process.noise(noise), state))
        valid = self.canvas.response_valid[:, place]
        memory = state.new_full((len(state), sampler.horizon, state.shape[1]), -1)
        revealed = torch.zeros_like(open_)
        answer, believed = state.clone(), None
        times = sampler.grid()
        for step in range(sampler.steps):
            t = torch.full((len(state),), times[step], dtype=torch.float64, device=state.device)
            raw = self.denoiser.denoise(state, valid, prefix, t, believed)
            self.forwards += int(live.sum())
            opened = open_ & live[:, None]
            view = View(self.process, state.clone(), opened, raw, step, u[step], memory, revealed)
            outcome = sampler.move(view, self.needs)
            answer = torch.where(live[:, None], outcome.answer, answer)
            self._record(place, view, outcome, live, times[step : step + 2], answer)
            memory = torch.cat([memory, outcome.answer[:, None]], 1)[:, 1:] if sampler.horizon else memory
            revealed, believed = outcome.revealed, outcome.believed
            state.copy_(torch.where(live[:, None], outcome.canvas, state))
            live = live & ~outcome.done
            if not bool(live.any()):
                break
        state.copy_(torch.where(open_, answer, state))

    def _record(
        self, place: slice, view: View, outcome: Outcome, live: Tensor, times: list[float], answer: Tensor
    ) -> None:
        self.active.append(live)
        if not self.records:
            return
        width = self.response.shape[1]

        def whole(part: Tensor) -> Tensor:
            """(b, R) with zeros outside the canvas."""
            return torch.nn.functional.pad(part * view.open, (place.start, width - place.stop))

        def shown(part: Tensor) -> Tensor:
            """(b, R) the response with ``part`` as its canvas."""
            response = self.response.clone()
            response[:, place] = part
            return response

        rows, size = view.raw.flatten(0, 1), view.canvas.shape
        values = {
            "states": lambda: shown(view.canvas),
            "guesses": lambda: shown(outcome.guesses),
            "confidence": lambda: whole(confidence(rows, outcome.guesses.flatten(), "probability").view(size)),
            "entropy": lambda: whole(-confidence(rows, outcome.guesses.flatten(), "entropy").view(size)),
            "log_prob": lambda: whole(outcome.log_prob),
            "revealed": lambda: whole(outcome.revealed),
            "taken_back": lambda: whole(outcome.taken_back),
            "times": lambda: torch.tensor(times, dtype=torch.float64, device=live.device) * live[:, None],
        }
        for name in self.records:
            self.records[name].append(values[name]())

    def _trajectory(self) -> TokenTrajectory:
        canvas, rows = self.canvas, len(self.response)
        active = torch.stack(self.active, 1) if self.active else torch.zeros(rows, 0, dtype=torch.bool)
        # Rows end their canvases at different steps: each row's own steps move together, to the front.
        order = (~active).long().sort(dim=1, stable=True).indices[:, : int(active.sum(1).max()) if self.active else 0]
        recorded = {}
        for name, steps in self.records.items():
            value = torch.stack(steps, 1) if steps else self._nothing(name)
            index = order.reshape(*order.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
            value = value.gather(1, index)
            if name in ("states", "guesses"):
                idle = ~active.gather(1, order)
                value = torch.where(idle[..., None], self.response[:, None], value)
            recorded[name] = value.cpu()
        blocks = max(1, -(-self.response.shape[1] // self.size))
        return TokenTrajectory(
            prompt_ids=canvas.ids[:, : canvas.prompt_width].cpu(),
            response_ids=self.response.cpu(),
            valid=canvas.valid.cpu(),
            active=active.gather(1, order).cpu(),
            given=self.given,
            planned=torch.full((rows,), self.sampler.steps * blocks),
            forwards=self.forwards,
            mask_id=self.denoiser.spec.mask_id,
            **recorded,
        )

    def _nothing(self, name: str) -> Tensor:
        """The record of no step at all: nothing was open."""
        rows, width = self.response.shape
        if name == "times":
            return torch.zeros(rows, 0, 2, dtype=torch.float64)
        kinds = {"states": torch.long, "guesses": torch.long, "revealed": torch.bool, "taken_back": torch.bool}
        return torch.zeros(rows, 0, width, dtype=kinds.get(name, torch.float32))

    def _noise(self, block: int, place: slice) -> tuple[Tensor, Tensor]:
        """Uniforms (B, C) of the first state and (S, 2, B, C) of the steps: each row from its own seed and length."""
        steps = self.sampler.steps
        width = self.response[:, place].shape[1]
        table = torch.zeros(2 * steps + 1, len(self.seeds), width, dtype=torch.float64)
        for row, (seed, length) in enumerate(zip(self.seeds, self.lengths, strict=True)):
            own = max(0, min(width, length - place.start))
            stream = generator(seed, "canvas", block)
            table[:, row, :own] = torch.rand(2 * steps + 1, own, dtype=torch.float64, generator=stream)
        table = table.to(self.response.device)
        return table[0], table[1:].unflatten(0, (steps, 2))
