"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def name(device: torch.device) -> str:
    """What `timed` reads on this device, in words."""
    return "wall clock" if device.type == "cuda" else "CPU time of the process"


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds and result of ``call``."""
    if device.type != "cuda":
        start = time.process_time()
        result = call()
        return time.process_time() - start, result
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
