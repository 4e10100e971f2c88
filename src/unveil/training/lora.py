"""Low-rank adapters by ``peft``: injected in place, switched off for the reference, saved in the standard format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unveil.denoisers.base import Denoiser
from unveil.registry import UserError


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adaptation."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale: adapters are multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input. RL wants 0: a ratio compares equal networks."""
    targets: list[str] | str = "all-linear"
    """Module names that get an adapter, or ``all-linear``: all but a published network's output layer."""


class Adapter:
    """LoRA layers inside a denoiser, which stays the object that everybody holds."""

    def __init__(
        self, denoiser: Denoiser, settings: LoraSettings, *, rows: Mapping[str, list[int]] | None = None
    ) -> None:
        """``rows`` of embeddings, by the layer's name, are trained beside the adapters."""
        try:
            import peft
        except ImportError as error:
            raise UserError("model.lora: the extra is not installed (pip install 'unveil[lora]')") from error
        kinds = {name: type(module).__name__ for name, module in denoiser.named_modules()}
        paths = [name for name, kind in kinds.items() if kind in ("Linear", "Conv1D")]
        # A place in a list ("to_out.0") is named with its list.
        names = {re.search(r"[^.]+(\.\d+)*$", path).group() for path in paths}  # type: ignore[union-attr]
        inner = sorted(names - set(denoiser.output_layers))
        targets = inner if settings.targets == "all-linear" else settings.targets
        known = {".".join(path.split(".")[place:]) for path in paths for place in range(path.count(".") + 1)}
        missing = sorted(set(targets) - known) if isinstance(targets, list) else []
        if missing:
            raise UserError(
                f"model.lora.targets: no linear layer is called {missing[0]!r} (allowed: {', '.join(sorted(names))})"
            )
        config = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets,
            fan_in_fan_out="Conv1D" in kinds.values(),  # GPT-2's linear layers
            trainable_token_indices=None if rows is None else dict(rows),
        )  # fmt: skip
        self.denoiser = denoiser
        self.wrapped: Any = peft.get_peft_model(denoiser, config)

    def off(self) -> AbstractContextManager[None]:
        """Context in which the denoiser is the base model."""
        return self.wrapped.disable_adapter()

    def save(self, folder: Path) -> None:
        """In the standard format: that of peft, or for published image pipelines that of diffusers."""
        self.denoiser.save_adapter(self.wrapped, folder)

    def merge(self) -> Denoiser:
        """Fold the adapters into the weights; the denoiser is then an ordinary one again."""
        self.wrapped.merge_and_unload()
        return self.denoiser
