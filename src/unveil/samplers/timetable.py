"""Blocks, counts and times of every step of a batch, worked out before the first network call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unveil.processes.masked import hitting_times
from unveil.samplers.schedules import Schedule
from unveil.seeds import generator


class Slot(NamedTuple):
    """What the schedule says of one step of b rows; all (b,).

    Attributes:
        block: the current block.
        remain: holes to leave in the open blocks.
        last: whether it is the block's last step.
        step, steps: its place among the steps of the block, from 0, and how many the block has.
    """

    block: Tensor
    remain: Tensor
    last: Tensor
    step: Tensor
    steps: Tensor


class Timetable:
    """What a schedule says about every step of b rows, known before the first.

    Attributes:
        ends: the number of steps of every row, on the host.
        slots: one per step.
    """

    def __init__(self, table: Tensor, ends: list[int]) -> None:
        """From ``table`` (5, b, S), the fields of `Slot`."""
        self.table, self.ends = table, ends
        block, remain, last, step, steps = (part.unbind(1) for part in table)
        self.slots = [Slot(*row) for row in zip(block, remain, [x.bool() for x in last], step, steps, strict=True)]

    @classmethod
    def of(
        cls, holes: Tensor, layout: Sequence[tuple[int, int]], schedule: Schedule, device: torch.device
    ) -> Timetable:
        """For rows that start with ``holes`` (b, R), decoded in blocks of the sizes and local steps of ``layout``.

        Steps that would reveal nothing are left out: they would cost a forward pass and decide nothing.
        """
        remains: dict[tuple[int, int], list[tuple[int, int]]] = {}

        def after(n: int, steps: int) -> list[tuple[int, int]]:
            """(local step, holes left) of the steps that reveal something."""
            if (n, steps) not in remains:
                counts = schedule.counts(n, steps)
                left = (n - done for done in itertools.accumulate(counts))
                pairs = enumerate(zip(left, counts, strict=True))
                remains[n, steps] = [(step, rest) for step, (rest, count) in pairs if count]
            return remains[n, steps]

        starts = [0, *itertools.accumulate(size for size, _ in layout)]
        rows = []
        for row in holes.tolist():
            rows.append([
                (block, rest, rest == 0, step, steps)
                for block, (start, (size, steps)) in enumerate(zip(starts, layout, strict=False))
                for step, rest in after(sum(row[start : start + size]), steps)
            ])  # fmt: skip
        ends = [len(row) for row in rows]
        longest = max(ends)
        padded = [row + [(0, 0, True, 0, 1)] * (longest - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.long).reshape(len(rows), -1, 5)
        return cls(table.permute(2, 0, 1).to(device), ends)

    def rows(self, keep: Tensor) -> Timetable:
        return Timetable(self.table[:, keep], [end for end, kept in zip(self.ends, keep.tolist(), strict=True) if kept])


class Clock:
    """The first-hitting times of b rows (arXiv 2409.02908): when each token of a block comes, one by one.

    Every block is a reverse process of its own that starts at time 1 with the holes that it has. Several tokens of one
    step pass as many of its times.
    """

    def __init__(self, times: Tensor, starts: Tensor, holes: Tensor) -> None:
        """From ``times`` (b, R), those of each block falling from its first column, the blocks' ``starts`` (blocks,)
        and their ``holes`` (b, blocks)."""
        self.times, self.starts, self.holes = times, starts, holes

    @classmethod
    def of(cls, holes: Tensor, layout: Sequence[tuple[int, int]], seeds: Sequence[int], device: torch.device) -> Clock:
        """For rows that start with ``holes`` (b, R); a row's times depend on its seed and holes alone."""
        sizes = [size for size, _ in layout]
        starts = [0, *itertools.accumulate(sizes)][:-1]
        u = torch.stack([torch.rand(sum(sizes), dtype=torch.float64, generator=generator(s, "clock")) for s in seeds])
        counts = [part.sum(1) for part in holes.split(sizes, 1)]
        times = [hitting_times(part, count) for part, count in zip(u.split(sizes, 1), counts, strict=True)]
        table, total = torch.cat(times, 1), torch.stack(counts, 1)
        return cls(table.to(device), torch.tensor(starts, device=device), total.to(device))

    def at(self, block: Tensor, left: Tensor, ahead: Tensor | None = None) -> Tensor:
        """When the next token of ``block`` (b,) comes, ``left`` (b,) open holes being there: (b,).

        With ``ahead`` (b, R) that many tokens later, at most the block's last: (b, R).
        """
        first, total = self.starts[block], self.holes.gather(1, block[:, None])[:, 0]
        place = (total - left).clamp(min=0)[:, None]
        if ahead is not None:
            place = place + ahead
        place = torch.minimum(place, (total - 1).clamp(min=0)[:, None]) + first[:, None]
        times = self.times.gather(1, place)
        return times[:, 0] if ahead is None else times

    def rows(self, keep: Tensor) -> Clock:
        return Clock(self.times[keep], self.starts, self.holes[keep])
