"""Reward functions as a user would write them for TRL."""

from __future__ import annotations

import asyncio
import time
from typing import Any

calls: list[dict[str, Any]] = []


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    calls.append({"prompts": prompts, "completions": completions, **columns})
    return [float(len(text)) for text in completions]


def only_named(completions: list[str], word: list[str]) -> list[float]:
    return [float(text == own) for text, own in zip(completions, word, strict=True)]


async def waits(completions: list[str], **columns: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if text == "b" else 1.0 for text in completions]


def chat(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(c[0]["content"] + p[-1]["role"])) for p, c in zip(prompts, completions, strict=True)]


def crashes(completions: list[str], **columns: Any) -> list[float]:
    raise ZeroDivisionError("oh")


def leaves(completions: list[str], **columns: Any) -> list[float]:
    raise SystemExit(3)


def sleeps(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(0.5)
    return [1.0] * len(completions)


def too_few(completions: list[str], **columns: Any) -> list[float]:
    return [1.0]


def odd(completions: list[str], **columns: Any) -> list[Any]:
    return ["1", float("nan"), float("inf"), 10**400, [1.0], None, True][: len(completions)]


def no_list(completions: list[str], **columns: Any) -> Any:
    return 1.0


def text(completions: list[str], **columns: Any) -> str:
    return "1" * len(completions)


def needs_ids(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def refuses_b(completions: list[str], **columns: Any) -> list[float]:
    """No number for what begins with the word b."""
    return [float("nan") if text.startswith("b") else float(len(text.split())) for text in completions]
