"""Blocks and counts of every step of a batch, worked out on the host before the first network call."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from unveil.samplers.schedules import Schedule


class Timetable:
    """What a schedule says about every step of b rows, known before the first.

    Attributes:
        ends: the number of steps of every row, on the host.
        columns: of every step, (b,) each: the block, the holes left in the open blocks, whether it is the block's last.
    """

    def __init__(self, table: Tensor, ends: list[int]) -> None:
        """From ``table`` (3, b, S), the block, what remains, and 1 at the last step of a block."""
        self.table, self.ends = table, ends
        block, remain, last = table
        self.columns = list(zip(block.unbind(1), remain.unbind(1), last.bool().unbind(1), strict=True))

    @classmethod
    def of(cls, holes: Tensor, block_length: int, schedule: Schedule, steps: int, device: torch.device) -> Timetable:
        """For rows that start with ``holes`` (b, R), decoded in ``steps`` steps a block.

        Steps that would reveal nothing are left out: they would cost a forward pass and decide nothing.
        """
        remains: list[list[int]] = []
        for n in range(min(block_length, holes.shape[1]) + 1):
            counts = schedule.counts(n, steps)
            left = (n - done for done in itertools.accumulate(counts))
            remains.append([after for after, count in zip(left, counts, strict=True) if count])
        rows = []
        for row in holes.tolist():
            sizes = [sum(row[start : start + block_length]) for start in range(0, len(row), block_length)]
            rows.append([(block, left, left == 0) for block, n in enumerate(sizes) for left in remains[n]])
        ends = [len(row) for row in rows]
        padded = [row + [(0, 0, True)] * (max(ends) - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.long).reshape(len(rows), -1, 3)
        return cls(table.permute(2, 0, 1).to(device), ends)

    def rows(self, keep: Tensor) -> Timetable:
        return Timetable(self.table[:, keep], [end for end, kept in zip(self.ends, keep.tolist(), strict=True) if kept])
