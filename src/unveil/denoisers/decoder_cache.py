"""Kept keys and values in the form that the decoders of ``transformers`` ask for."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from unveil.denoisers.kept import KeyValues


def cache_argument(kept: KeyValues, columns: Tensor | None) -> dict[str, Any]:
    """The keyword argument that makes a decoder compute ``columns`` (n, W) and attend to ``kept`` at the others."""
    return {_name(): _class()(kept, columns)}


@functools.cache
def _class() -> type:
    from transformers import Cache

    class Kept(Cache):
        """Has no layers of the library's own: those grow at their end, while a window lies anywhere in the canvas."""

        def __init__(self, kept: KeyValues, columns: Tensor | None) -> None:
            super().__init__(layers=[])
            self.kept, self.columns = kept, columns

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return self.kept.update(layer_idx, self.columns, key_states, value_states)

    return Kept


@functools.cache
def _name() -> str:
    """It was another one before 5.24."""
    from transformers import LlamaModel

    return "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
