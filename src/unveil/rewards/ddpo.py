"""Reward functions written for TRL's DDPO trainer and its relatives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, Score, within
from unveil.rewards.images import image_batch, pil_image


@dataclass(kw_only=True)
class Ddpo(Reward, name="ddpo"):
    """Calls ``fn(images, prompts, metadata) -> (scores, info)``; scores alone are taken too.

    ``metadata`` is a tuple of dictionaries, one per image; ``info`` is not used. Scores may be any sequence, array or
    tensor of N numbers.
    """

    medium = "image"

    function: str
    """``package.module:function``; the working folder is on the import path."""
    arguments: dict[str, Any] | None = None
    """If given, ``function`` makes the reward function: it is called once with these keyword arguments ({}: none)."""
    pil: bool = False
    """Images as a list of PIL images instead of one float tensor (N, C, H, W) in [0, 1]."""
    timeout: Annotated[float, Field(gt=0)] | None = 60.0
    """Seconds for one call, which then runs in a thread of its own; null: no limit, and the main thread."""
    called: Callable[..., Any] = field(init=False, repr=False, compare=False)
    """The function."""

    def __post_init__(self) -> None:
        module, _, attribute = self.function.partition(":")
        try:
            self.called = getattr(importlib.import_module(module), attribute)
            if self.arguments is not None:
                self.called = self.called(**self.arguments)
        except Exception as error:  # whatever a module does when it is imported
            raise UserError(f"function: {self.function!r} cannot be imported: {error}") from error
        if not callable(self.called):
            raise UserError(f"function: {self.function!r} is no function, but {type(self.called).__name__}")

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        images: Any = [pil_image(image) for image in completions] if self.pil else image_batch(completions)

        def call() -> Any:
            return self.called(images, tuple(prompts), tuple(dict(own) for own in metadata))

        answer = call() if self.timeout is None else within(self.timeout, call)
        scores = answer[0] if isinstance(answer, tuple) and len(answer) == 2 and _is_info(answer[1]) else answer
        return scores.tolist() if hasattr(scores, "tolist") else scores


def _is_info(value: Any) -> bool:
    """Whether it is what stands beside the scores: {} or None, and in some code a list of them."""
    return value is None or isinstance(value, Mapping | list | tuple)
