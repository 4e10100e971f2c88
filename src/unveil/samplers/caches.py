"""Caches: which columns of the canvas a step computes anew, and which keep the keys and values of an earlier step.

Where every position attends to every other, a kept key is stale as soon as any token has changed, so that tokens are
drawn from something near the network's output. A step always computes the open holes and every column whose token has
changed since its key was made: a kept key never stands for another token than the one that is there. Where positions
see only their block and what lies before it, keys before the first change are what they would be now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.kept import KeyValues
from unveil.registry import Plugin


class Span(NamedTuple):
    """Columns [low, high) of each of n rows, both (n,)."""

    low: Tensor
    high: Tensor


@dataclass(kw_only=True)
class Cache(Plugin, family="cache"):
    """Chooses a window around the current block; everything is computed at the start of each block."""

    looks_ahead: ClassVar[bool] = False
    """True if the holes of later blocks are computed at every step too; else their guesses are of earlier states."""
    refresh: Annotated[int, Field(ge=1)] | None = None
    """Compute everything also after so many steps; 1 is no cache at all. None: only at the start of each block."""

    def exact(self, spec: DenoiserSpec) -> bool:
        """True if tokens are drawn from the very output that the network has for their state."""
        return self.refresh == 1

    def window(self, block: Span, row: Span) -> Span:
        """The columns to compute, of rows with the current ``block`` that reach over the columns ``row``."""
        raise NotImplementedError


@dataclass(kw_only=True)
class PrefixCache(Cache, name="prefix"):
    """Keep what lies before the block (Fast-dLLM, 2505.22618). Exact for networks that attend block by block."""

    looks_ahead = True

    def exact(self, spec: DenoiserSpec) -> bool:
        return super().exact(spec) or spec.attention_block is not None

    def window(self, block: Span, row: Span) -> Span:
        return Span(block.low, row.high)


@dataclass(kw_only=True)
class DualCache(Cache, name="dual"):
    """Keep what lies before and behind the block (Fast-dLLM's DualCache)."""

    def window(self, block: Span, row: Span) -> Span:
        return block


@dataclass(kw_only=True)
class VicinityCache(Cache, name="vicinity"):
    """Keep all but the block and its neighbours (dInfer, 2510.08666)."""

    neighbours: Annotated[int, Field(ge=0)] = 16
    """Columns on either side of the block."""

    def window(self, block: Span, row: Span) -> Span:
        return Span(block.low - self.neighbours, block.high + self.neighbours)


class Kept:
    """The last features, keys and values of the live rows of a batch. A row is computed as if it were alone."""

    def __init__(self, cache: Cache, denoiser: MaskedDenoiser, sizes: Sequence[int], *, open_only: bool) -> None:
        """
        Args:
            sizes: of the blocks of the response.
            open_only: nobody reads what the network says of holes behind the current block.
        """
        self.cache, self.denoiser, self.open_only = cache, denoiser, open_only
        self.attention_block = denoiser.spec.attention_block
        self.borders = torch.tensor([0, *sizes], device=denoiser.device).cumsum(0)
        self.store = KeyValues()
        self.features: Tensor | None = None
        self.seen: Tensor | None = None
        self.block: Tensor | None = None
        self.age: Tensor | None = None

    def step(self, ids: Tensor, valid: Tensor, open_holes: Tensor, start: int, block: Tensor) -> Tensor:
        """Features (b, L, D) of the canvases ``ids`` (b, L): of this step in the window, of an earlier one outside.

        Args:
            open_holes: (b, R) holes that may be filled in this step.
            start: the column of the first response position.
            block: (b,) the current block of each row.
        """
        if self.features is None or self.seen is None or self.block is None or self.age is None:
            self.features = self.denoiser.window(ids, valid, self.store)
            self.seen, self.block, self.age = ids.clone(), block.clone(), torch.ones_like(block)
            return self.features
        due = torch.zeros_like(block, dtype=torch.bool)
        if self.attention_block is None:
            due = block != self.block
        if self.cache.refresh is not None:
            due |= self.age >= self.cache.refresh
        touched = ids != self.seen
        touched[:, start : start + open_holes.shape[1]] |= open_holes
        self.block, self.age = block, torch.where(due, 1, self.age + 1)
        fresh, others = due.nonzero()[:, 0], (~due).nonzero()[:, 0]
        if len(fresh):
            self._compute(ids, valid, fresh, None)
        if len(others):
            columns = self._columns(valid[others], touched[others], start, block[others])
            self._compute(ids, valid, others, columns)
        return self.features

    def select(self, keep: Tensor, low: int, high: int) -> None:
        """Let the rows go where ``keep`` (b,) is False, and the columns outside [low, high)."""
        if self.features is None or self.seen is None or self.block is None or self.age is None:
            return
        self.store.select(keep, low, high)
        self.features, self.seen = self.features[keep, low:high], self.seen[keep, low:high]
        self.block, self.age = self.block[keep], self.age[keep]

    def _columns(self, valid: Tensor, touched: Tensor, start: int, block: Tensor) -> Tensor:
        """(n, W) the columns that n rows compute; where a row has fewer than W, its last one stands several times."""
        place = torch.arange(valid.shape[1], device=valid.device)
        first, last = _hull(valid, place)
        own = Span(start + self.borders[block], torch.minimum(start + self.borders[block + 1], last))
        within = Span(first, own.high if self.open_only and self.attention_block is not None else last)
        low, high = self.cache.window(own, within)
        least, most = _hull(touched, place)
        low, high = torch.minimum(torch.maximum(low, first), least), torch.maximum(torch.minimum(high, last), most)
        if (size := self.attention_block) is not None:
            low = first + (low - first) // size * size
            high = torch.minimum(first - (first - high) // size * size, last)
        steps = torch.arange(int((high - low).max()), device=valid.device)
        return torch.minimum(low[:, None] + steps, high[:, None] - 1)

    def _compute(self, ids: Tensor, valid: Tensor, rows: Tensor, columns: Tensor | None) -> None:
        assert self.features is not None and self.seen is not None
        some: Tensor | slice = slice(None) if len(rows) == len(ids) else rows
        store = self.store.of(None if len(rows) == len(ids) else rows)
        features = self.denoiser.window(ids[some], valid[some], store, columns)
        if columns is None:
            self.features[some], self.seen[some] = features, ids[some]
        else:
            at = rows[:, None], columns
            self.features[at], self.seen[at] = features, ids[at]


def _hull(marked: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The first marked column of each row of (n, L), and the one behind the last; L and 0 where none is."""
    return torch.where(marked, place, len(place)).amin(1), torch.where(marked, place + 1, 0).amax(1)
