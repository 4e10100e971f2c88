"""IGPO: where every rollout of a prompt is wrong, roll out again with parts of a known solution in the canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from unveil.registry import UserError

Chunk = tuple[int, int]
"""First position and the position after the last."""


@dataclass(kw_only=True)
class Hints:
    """How parts of a trace are placed in an empty response (paper's settings; lengths in tokens)."""

    ratio_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Least share of the trace's chunks that is shown; every sample draws its own share uniformly. Both shares 0 give
    no hint at all: plain resampling."""
    ratio_high: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Largest share. Both shares 1 show the whole trace."""
    sort: bool = True
    """The shares of a group rise with the sample's number."""
    chunk_min: Annotated[int, Field(ge=1)] = 5
    """Shortest chunk; what is left over at the end of the trace, if shorter, is not shown unless the share is 1."""
    chunk_max: Annotated[int, Field(ge=1)] = 10
    """Longest chunk."""
    stretch: Annotated[float, Field(ge=1)] = 1.5
    """A trace that is shorter than its room is spread out by up to this factor."""
    max_gap: Annotated[int, Field(ge=0)] = 100
    """Most open positions between two chunks that are shown."""
    free_tail: Annotated[int, Field(ge=0)] = 30
    """Last positions of the response that never hold a hint: the answer is always generated."""
    answer_tokens: Annotated[int, Field(ge=0)] = 0
    """Last tokens of the trace that are never shown, where the trace ends with the answer."""

    def __post_init__(self) -> None:
        if self.ratio_low > self.ratio_high:
            raise UserError(f"ratio_low: {self.ratio_low} is above ratio_high ({self.ratio_high})")
        if self.chunk_min > self.chunk_max:
            raise UserError(f"chunk_min: {self.chunk_min} is above chunk_max ({self.chunk_max})")

    def ratios(self, count: int, generator: torch.Generator) -> list[float]:
        """Shares of the ``count`` samples of a group."""
        drawn = self.ratio_low + (self.ratio_high - self.ratio_low) * torch.rand(count, generator=generator).double()
        return (drawn.sort().values if self.sort else drawn).tolist()

    def place(self, trace: list[int], width: int, ratio: float, generator: torch.Generator) -> dict[int, int]:
        """Response position -> hint token, for a response of ``width`` positions."""
        room = max(0, width - self.free_tail)
        trace = trace[: max(0, len(trace) - self.answer_tokens)]
        length = min(len(trace), room)
        if ratio <= 0 or length == 0:
            return {}
        factor = min(max(1.0, room / len(trace)), self.stretch)
        if ratio >= 1:
            shown = [(0, length)]
        else:
            chunks = cut(length, self.chunk_min, self.chunk_max, generator)
            shown = reveal(chunks, ratio, generator)
        return {
            start + offset: trace[first + offset]
            for start, (first, end) in zip(spread(shown, factor, self.max_gap), shown, strict=True)
            for offset in range(end - first)
            if start + offset < room
        }


def cut(length: int, low: int, high: int, generator: torch.Generator) -> list[Chunk]:
    """Consecutive chunks of ``length`` tokens, each ``low`` to ``high`` long; a shorter tail is left out."""
    chunks, start = [], 0
    while length - start >= low:
        size = int(torch.randint(low, high + 1, (), generator=generator))
        chunks.append((start, min(start + size, length)))
        start = chunks[-1][1]
    return chunks


def reveal(chunks: list[Chunk], ratio: float, generator: torch.Generator) -> list[Chunk]:
    """The chunks that are left in place, in order, after floor(n (1 - ratio)) random ones of n are hidden."""
    hidden = int(len(chunks) * (1 - ratio) + 1e-9)
    kept = torch.randperm(len(chunks), generator=generator)[hidden:].sort().values
    return [chunks[index] for index in kept.tolist()]


def spread(chunks: list[Chunk], factor: float, max_gap: int) -> list[int]:
    """New starts: the first chunk and every gap between two chunks are moved out by ``factor``, gaps up to a limit."""
    starts: list[int] = []
    for number, (first, _) in enumerate(chunks):
        if number == 0:
            starts.append(int(first * factor))
            continue
        before, after = chunks[number - 1]
        gap = min(int((first - after) * factor), max_gap)
        starts.append(starts[-1] + (after - before) + gap)
    return starts
