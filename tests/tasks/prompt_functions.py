"""Prompt functions as a user would write them for DDPO: they use the global generators."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def drawn() -> tuple[str, dict[str, Any]]:
    prompt = f"a {random.choice('abcdefgh')} {numpy.random.randint(9)} {int(torch.randint(9, ()))}"
    return prompt, {"length": len(prompt)}


def always_the_same() -> tuple[str, dict[str, Any]]:
    return "a cat", {}
