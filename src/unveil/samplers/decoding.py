"""Recipes of systems that need no training: a sampler and a model to try it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from unveil.samplers.base import Sampler


@dataclass(kw_only=True)
class DecodeModel:
    """The denoiser to draw from."""

    path: str
    """Model folder, run folder, or name of an embedded model."""


@dataclass(kw_only=True)
class DecodeRecipe:
    """What `unveil decode --recipe` runs."""

    system: str
    """The system that this recipe belongs to, as `unveil systems` lists it."""
    model: DecodeModel
    response_length: Annotated[int, Field(ge=1)]
    """Response positions."""
    sampler: Sampler
    """How samples are drawn."""
    prompts: list[str] = field(default_factory=list)
    """Completed if the command line names no prompt."""
