"""Keys and values of a canvas that are kept between network calls."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValues:
    """Keys and values of every layer at all L columns of B canvases, as the last call that computed them left them.

    Empty until the first call, which has to compute every column of every canvas.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        """(B, L, heads, head_dim) per layer."""
        self.values: list[Tensor] = []
        self.rows: Tensor | None = None

    def of(self, rows: Tensor | None) -> KeyValues:
        """The same memory for a call on canvases ``rows`` (n,) only; None: on all."""
        part = KeyValues()
        part.keys, part.values, part.rows = self.keys, self.values, rows
        return part

    def update(self, layer: int, columns: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a layer computed, and give it what it attends to.

        Args:
            layer: from 0, in order.
            columns: (n, W) the columns that were computed; one that stands twice has the same numbers twice. None: all.
            key, value: (n, heads, W, head_dim).

        Returns:
            keys and values (n, heads, L, head_dim) of all columns.
        """
        if layer == len(self.keys):
            assert columns is None and self.rows is None
            self.keys.append(key.transpose(1, 2))
            self.values.append(value.transpose(1, 2))
            return key, value
        return self._write(self.keys, layer, columns, key), self._write(self.values, layer, columns, value)

    def select(self, keep: Tensor, low: int, high: int) -> None:
        """Forget the canvases where ``keep`` (B,) is False, and the columns outside [low, high)."""
        for kept in (self.keys, self.values):
            kept[:] = [layer[keep, low:high] for layer in kept]

    def _write(self, kept: list[Tensor], layer: int, columns: Tensor | None, new: Tensor) -> Tensor:
        rows = self.rows
        if columns is None:
            if rows is None:
                kept[layer] = new.transpose(1, 2)
            else:
                kept[layer][rows] = new.transpose(1, 2)
            return new
        own = torch.arange(len(columns), device=columns.device) if rows is None else rows
        kept[layer][own[:, None], columns] = new.transpose(1, 2)
        return (kept[layer] if rows is None else kept[layer][rows]).transpose(1, 2)
