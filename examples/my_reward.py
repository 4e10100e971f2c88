"""Reward functions with the signature of TRL's GRPO trainer; `policy.reward=trl` calls them as they are."""

from __future__ import annotations

from typing import Any


def short_and_right(completions: list[str], correct: list[bool], **columns: Any) -> list[float]:
    """1 for a right answer, less 0.01 per word."""
    return [float(good) - 0.01 * len(text.split()) for text, good in zip(completions, correct, strict=True)]


def equals_sign(completions: list[str], **columns: Any) -> list[float | None]:
    """Whether there is one equals sign; an empty completion is not judged."""
    return [float(text.count("=") == 1) if text.strip() else None for text in completions]
