"""The reverse process on a grid of times, for any process over masked tokens.

Every step every hole decides by itself whether it is revealed and as what, with the probabilities of the process' own
transition: ancestral sampling of the masked process, Tweedie or Euler (tau-leaping) steps of the score form. Nothing
ranks the positions, so the number of steps changes the cost and the error, not the distribution that is aimed at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import MaskedDenoiser
from unveil.processes.masked import MaskedTransition
from unveil.processes.score_entropy import Method
from unveil.samplers.base import TokenSampler
from unveil.samplers.canvas import Canvas
from unveil.samplers.tokens import confidence, sample_categorical
from unveil.samplers.trajectory import TokenTrajectory


@dataclass(kw_only=True)
class ReverseSampler(TokenSampler, name="reverse"):
    """How samples are drawn by simulating the reverse process."""

    steps: Annotated[int, Field(ge=1)]
    """Equal steps from time 1 to ``last_time``; holes that are then left cost one more evaluation."""
    method: Method = "tweedie"
    """How a score network's reverse rates are integrated; the same under log-linear noise. Others ignore it."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the revealed tokens; 0 takes the likeliest. When tokens appear does not depend on it."""
    last_time: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Where the grid ends."""
    clean_up: Literal["sample", "argmax"] = "sample"
    """How holes that are left at ``last_time`` are filled: drawn like any other step and part of the trajectory
    (SEDD), or by the likeliest token, after the trajectory's last step (MDLM)."""
    cache: bool = True
    """Keep the output of a row in which nothing changed, if the network is not told the time (MDLM's cached sampler).
    """

    @property
    def planned_steps(self) -> int:
        return self.steps

    def refused_fields(self) -> dict[str, str]:
        return dict.fromkeys(("block", "order", "order_log_prob"), "needs a sampler with blocks and rules ('masked')")

    def sample_batch(
        self, denoiser: MaskedDenoiser, start: Canvas, seeds: Sequence[int], needs: frozenset[str]
    ) -> TokenTrajectory:
        return _Chains(self, denoiser, start, seeds, needs).run()

    def times(self) -> Tensor:
        """(steps + 2,) float64: the grid from 1 to ``last_time``, then 0."""
        grid = torch.linspace(1, self.last_time, self.steps + 1, dtype=torch.float64)
        return torch.cat([grid, grid.new_zeros(1)])


class _Chains:
    """The rows of one batch. A row without holes is done: it costs nothing and is not active any more."""

    def __init__(
        self,
        sampler: ReverseSampler,
        denoiser: MaskedDenoiser,
        canvas: Canvas,
        seeds: Sequence[int],
        needs: frozenset[str],
    ) -> None:
        self.sampler, self.denoiser, self.needs = sampler, denoiser, needs
        self.process = denoiser.spec.process(sampler.method)
        self.mask_id = denoiser.spec.mask_id
        device = denoiser.device
        # (steps + 1, 2, B, R): who moves, and as which token.
        self.noise = self._draw_noise(seeds, canvas.response_valid.sum(1).tolist(), canvas.response.shape[1]).to(device)
        self.canvas = canvas.to(device)
        self.ids = self.canvas.ids.clone()
        self.response = self.ids[:, canvas.prompt_width :]
        self.editable = self.canvas.response_valid & ~self.canvas.frozen
        self.features: Tensor | None = None
        self.stale = torch.ones(len(canvas), dtype=torch.bool, device=device)
        self.records: dict[str, list[Tensor]] = {name: [] for name in needs}
        self.active: list[Tensor] = []
        self.step_map = torch.full(canvas.response.shape, -1, device=device)
        self.forwards = 0

    def run(self) -> TokenTrajectory:
        times = self.sampler.times()
        for step, (t, s) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
            holes = (self.response == self.mask_id) & self.editable
            if not bool(holes.any()):
                break
            self._step(step, t, s, holes)
        self.records.pop("step_map", None)
        recorded = {name: torch.stack(steps, 1).cpu() for name, steps in self.records.items() if steps}
        if not self.active:
            recorded = self._nothing_recorded()
        prompt_width = self.canvas.prompt_width
        active = torch.stack(self.active, 1) if self.active else self.stale.new_zeros(len(self.ids), 0)
        return TokenTrajectory(
            prompt_ids=self.canvas.ids[:, :prompt_width].cpu(),
            response_ids=self.response.cpu().clone(),
            valid=self.canvas.valid.cpu(),
            active=active.cpu(),
            given=((self.canvas.response != self.mask_id) | ~self.canvas.response_valid).cpu(),
            planned=torch.full((len(self.ids),), self.sampler.steps + (self.sampler.clean_up == "sample")),
            forwards=self.forwards,
            mask_id=self.mask_id,
            step_map=self.step_map.cpu() if "step_map" in self.needs else None,
            **recorded,
        )

    def _step(self, step: int, t: float, s: float, holes: Tensor) -> None:
        live = holes.any(1)
        by_argmax = s == 0 and self.sampler.clean_up == "argmax"
        logits = self.denoiser.head(self._features(t, live)[holes])
        count = len(logits)
        transition = self.process.step(
            logits, torch.full((count,), self.mask_id, device=logits.device),
            torch.full((count,), t, dtype=torch.float64, device=logits.device),
            torch.full((count,), s, dtype=torch.float64, device=logits.device),
            0.0 if by_argmax else self.sampler.temperature,
        )  # fmt: skip
        u_move, u_token = self.noise[step, 0][holes], self.noise[step, 1][holes]
        drawn = transition.sample(u_move, u_token)
        updated = self.response.masked_scatter(holes, drawn)
        filled = holes & (updated != self.mask_id)
        self.step_map = torch.where(filled, step, self.step_map)
        if not by_argmax:
            self.active.append(live)
            self._record(t, s, holes, live, logits, transition, drawn, u_token, filled)
        self.stale = filled.any(1)
        self.response.copy_(updated)

    def _features(self, t: float, live: Tensor) -> Tensor:
        """Features (B, R, D) of the responses; rows that are done hold old ones."""
        spec = self.denoiser.spec
        reuse = self.features is not None and self.sampler.cache and not spec.time_conditioned
        rows = (live & self.stale if reuse else live).nonzero().squeeze(1)
        self.forwards += len(rows)
        if len(rows):
            times = torch.full((len(rows),), t, dtype=torch.float64, device=rows.device)
            fresh = self.denoiser.features(self.ids[rows], self.canvas.valid[rows], times)
            fresh = fresh[:, self.canvas.prompt_width :]
            if self.features is None:
                self.features = fresh.new_zeros(len(live), *fresh.shape[1:])
            self.features[rows] = fresh
        assert self.features is not None
        return self.features

    def _record(
        self,
        t: float,
        s: float,
        holes: Tensor,
        live: Tensor,
        logits: Tensor,
        transition: MaskedTransition,
        drawn: Tensor,
        u_token: Tensor,
        filled: Tensor,
    ) -> None:
        if not self.needs:
            return
        guess = drawn
        if self.needs & {"guesses", "confidence"}:
            guess = sample_categorical(transition.logits, u_token)
        nothing = torch.zeros(holes.shape, device=holes.device)
        values: dict[str, Callable[[], Tensor]] = {
            "states": self.response.clone,
            "guesses": lambda: self.response.masked_scatter(holes, guess),
            "confidence": lambda: nothing.masked_scatter(holes, confidence(transition.logits, guess, "probability")),
            "entropy": lambda: nothing.masked_scatter(holes, -confidence(logits, guess, "entropy")),
            "log_prob": lambda: nothing.masked_scatter(holes, transition.log_prob(drawn)),
            "revealed": lambda: filled,
            "taken_back": lambda: torch.zeros_like(filled),
            "times": lambda: torch.tensor([t, s], dtype=torch.float64, device=live.device) * live[:, None],
        }
        for name in self.needs - {"step_map"}:
            self.records[name].append(values[name]())

    def _nothing_recorded(self) -> dict[str, Tensor]:
        """Records of no step at all: nothing was masked."""
        batch, width = self.response.shape
        kinds = {"states": torch.long, "guesses": torch.long, "revealed": torch.bool, "taken_back": torch.bool}
        empty = {name: torch.zeros(batch, 0, width, dtype=kinds.get(name, torch.float32)) for name in self.records}
        if "times" in empty:
            empty["times"] = torch.zeros(batch, 0, 2, dtype=torch.float64)
        return empty

    def _draw_noise(self, seeds: Sequence[int], lengths: list[int], width: int) -> Tensor:
        """Each row from its own seed and length alone."""
        steps = self.sampler.steps + 1
        noise = torch.zeros(steps, 2, len(lengths), width, dtype=torch.float64)
        for row, (seed, length) in enumerate(zip(seeds, lengths, strict=True)):
            stream = torch.Generator().manual_seed(seed)
            noise[:, :, row, :length] = torch.rand(steps, 2, length, dtype=torch.float64, generator=stream)
        return noise
