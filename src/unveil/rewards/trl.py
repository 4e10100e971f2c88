"""Reward functions written for TRL's GRPO trainer."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from unveil.registry import UserError
from unveil.rewards.base import Metadata, Reward, Score, within

_ABSENT = ("completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL also passes and there is none of here."""


@dataclass(kw_only=True)
class Trl(Reward, name="trl"):
    """Calls ``fn(prompts=..., completions=..., **columns) -> list[float | None]``, which may be ``async def``.

    The columns are the fields of `Metadata`, each a list; a function without ``**kwargs`` gets those that it names.
    None means that the reward does not apply to this completion.
    """

    medium = "text"

    function: str
    """``package.module:function``; the working folder is on the import path."""
    messages: bool = False
    """Prompts and completions as lists of chat messages (``role``, ``content``), as TRL gives them for chat data."""
    timeout: Annotated[float, Field(gt=0)] | None = 60.0
    """Seconds for one call, which then runs in a thread of its own; null: no limit, and the main thread (for functions
    that set signals)."""
    called: Callable[..., Any] = field(init=False, repr=False, compare=False)
    """The function."""

    def __post_init__(self) -> None:
        module, _, attribute = self.function.partition(":")
        try:
            self.called = getattr(importlib.import_module(module), attribute)
            parameters = inspect.signature(self.called).parameters.values()
        except Exception as error:  # whatever a module does when it is imported
            raise UserError(f"function: {self.function!r} cannot be imported: {error}") from error
        for one in parameters:
            if one.name in _ABSENT and one.default is one.empty:
                raise UserError(f"function: {self.function!r} needs {one.name!r}, which there is not here")
        everything = any(one.kind is one.VAR_KEYWORD for one in parameters)
        self._named = None if everything else {one.name for one in parameters}

    def scores(self, completions: list[Any], prompts: list[str], metadata: list[Metadata]) -> Sequence[Score]:
        columns = dict.fromkeys(key for own in metadata for key in own)
        given: dict[str, Any] = {key: [own.get(key) for own in metadata] for key in columns}
        given |= {"prompts": prompts, "completions": completions}
        if self.messages:
            given["prompts"] = [[{"role": "user", "content": text}] for text in prompts]
            given["completions"] = [[{"role": "assistant", "content": text}] for text in completions]
        if self._named is not None:
            given = {key: value for key, value in given.items() if key in self._named}

        def call() -> Sequence[Score]:
            answer = self.called(**given)
            return asyncio.run(_waited(answer)) if inspect.isawaitable(answer) else answer

        return call() if self.timeout is None else within(self.timeout, call)


async def _waited(answer: Any) -> Any:
    return await answer
