"""An update of Flow-GRPO, and one of DiffusionNFT, by the general job against hand-written loops of the published
algorithms.

Both sides train copies of one network with the same settings. First the plain loop is given the chains that the job
drew, and must come to the same gradient and weights. Then they take turns (A B B A ...), each with its own chains, and
ratios are formed turn by turn. The reward (brightness) costs nothing, so that all that is measured is network and loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table

from unveil.bench import _clock as clock
from unveil.bench import _memory as memory
from unveil.bench._updates import METHODS, PROMPTS, Sides
from unveil.denoisers.dit import Dit
from unveil.denoisers.image import ImageNetwork
from unveil.denoisers.unet import UNet
from unveil.registry import UserError

DEMAND = 1.05
"""Time of an update, ours over the plain loop, at most."""
MEMORY_DEMAND = 1.05
"""Peak memory of an update with four times the steps over that with the steps, at most, less what is kept of the
further ones."""
NETWORKS: dict[str, tuple[ImageNetwork, tuple[int, int, int]]] = {
    "dit 8x8": (Dit(patch=2, dim=96, layers=4, heads=4, hidden=384), (1, 8, 8)),
    "dit 16x16": (Dit(patch=2, dim=128, layers=4, heads=4, hidden=512), (3, 16, 16)),
    "unet 16x16": (UNet(channels=24, multipliers=(1, 2)), (3, 16, 16)),
}
CPU = torch.device("cpu")


def run(
    repeats: int = 7,
    seed: int = 0,
    steps: int = 10,
    group: int = 8,
    networks: Sequence[str] = tuple(NETWORKS),
) -> dict[str, Any]:
    """Measure an update of every method on every network.

    Args:
        repeats: pairs of turns.
        steps: of a chain.
        group: chains per prompt, of which there are 4.
        networks: names in `NETWORKS`.

    Returns:
        Plain values for JSON: ``setting``, ``cases`` (one per method and network), ``ratios`` by name, and ``holds``.

    Raises:
        UserError: a number is too small.
    """
    for name, number, least in (("repeats", repeats, 1), ("steps", steps, 2), ("group", group, 2)):
        if number < least:
            raise UserError(f"{name}: should be at least {least}, got {number}")
    cases = [_case(sides, name, steps, group, repeats, seed) for sides in METHODS for name in networks]
    ratios = {f"{case['method']} {case['network']}": case["ratio"] for case in cases}
    return {
        "bench": "image",
        "setting": {
            "device": "cpu", "threads": torch.get_num_threads(), "repeats": repeats, "seed": seed, "steps": steps,
            "chains": len(PROMPTS) * group, "clock": clock.name(CPU), "memory": memory.method(CPU),
        },
        "cases": cases,
        "ratios": ratios | {f"memory {case['method']} {case['network']}": case["memory_ratio"] for case in cases},
        "holds": all(case["holds"] for case in cases),
    }  # fmt: skip


def render(result: dict[str, Any]) -> Table:
    """The result of `run` as a table."""
    table = Table(title="an update on the CPU, CPU time of the process")
    for heading in ("measure", "ours", "plain loop", "ratio (min-max)", "demand", "verdict"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    for case in result["cases"]:
        ratio = f"{case['ratio']:.3f} ({case['ratio_min']:.3f}-{case['ratio_max']:.3f})"
        times = f"{case['seconds']:.3f}", f"{case['reference_seconds']:.3f}"
        verdict = _verdict(case["ratio"] <= DEMAND) if case["identical"] else "updates differ"
        table.add_row(f"{case['title']}, {case['network']}: seconds", *times, ratio, f"<= {DEMAND:g}", verdict)
        peaks = [f"{case[key] / 2**20:.1f} MiB" for key in ("peak_bytes", "reference_peak_bytes")]
        table.add_row("  peak memory", *peaks, f"{case['peak_bytes'] / case['reference_peak_bytes']:.3f}")
        more = f"{case['peak_bytes_4x'] / 2**20:.1f} MiB"
        verdict = _verdict(case["memory_ratio"] <= MEMORY_DEMAND)
        table.add_row("  with 4 x the steps", more, "", f"{case['memory_ratio']:.3f}", f"<= {MEMORY_DEMAND:g}", verdict)
    return table


def _case(method: type[Sides], name: str, steps: int, group: int, repeats: int, seed: int) -> dict[str, Any]:
    network, shape = NETWORKS[name]
    sides = method(network, shape, steps, group, seed)
    difference = sides.difference()
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for turn in range(repeats):
        for side in sorted(seconds, reverse=turn % 2 == 1):
            seconds[side].append(clock.timed(getattr(sides, side), CPU)[0])
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["reference"], strict=True)]
    peaks = {side: _peak(sides, getattr(sides, side)) for side in seconds}
    longer = method(network, shape, 4 * steps, group, seed)
    longer.ours()  # as the other one: the optimiser's moments exist
    more = _peak(longer, longer.ours)
    memory_ratio = (more - longer.kept() + sides.kept()) / peaks["ours"]
    return {
        "method": method.method,
        "title": method.title,
        "network": name,
        "parameters": sum(parameter.numel() for parameter in sides.denoiser.parameters()),
        "difference": difference.weights,
        "gradient_difference": difference.gradient,
        "identical": difference.none,
        "seconds": median(seconds["ours"]),
        "reference_seconds": median(seconds["reference"]),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_bytes": peaks["ours"],
        "reference_peak_bytes": peaks["reference"],
        "peak_bytes_4x": more,
        "memory_ratio": memory_ratio,
        "holds": difference.none and median(ratios) <= DEMAND and memory_ratio <= MEMORY_DEMAND,
    }


def _peak(sides: Sides, call: Callable[[], None]) -> int:
    held = [*sides.denoiser.state_dict().values(), *sides.other.state_dict().values(), *sum(sides.copies(), ())]
    return memory.peak_bytes(call, CPU, held)


def _verdict(holds: bool) -> str:
    return "met" if holds else "missed"
