"""Accuracy against cost: the picture of an evaluation, and its numbers."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unveil.registry import UserError

_MARKERS = "osD^vPX*"


def check_target(path: Path) -> None:
    """Refuse what `draw` and `write_numbers` could not write.

    Raises:
        UserError: no PNG, no such folder, or the extra is not installed.
    """
    if path.suffix != ".png":
        raise UserError(f"--plot: {str(path)!r} should end in .png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot: {str(path.parent)!r}: no such folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: drawing needs an extra (pip install 'unveil[plot]')")


def draw(results: Sequence[Mapping[str, Any]], path: Path, *, title: str, along: Sequence[str]) -> None:
    """Write a PNG: accuracy in percent with its interval against forwards per sample, a line per decoder.

    ``along`` are the keys of ``results`` that are the same on one line, the decoder's name first. Forwards, not steps,
    since rules that set their own pace have no steps and every decoder has a cost.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        lines.setdefault(tuple(result[key] for key in along), []).append(result)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (own, points) in enumerate(lines.items()):
        ordered = sorted(points, key=_cost)
        y = [100 * point["accuracy"] for point in ordered]
        below = [max(0.0, at - 100 * point["low"]) for at, point in zip(y, ordered, strict=True)]
        above = [max(0.0, 100 * point["high"] - at) for at, point in zip(y, ordered, strict=True)]
        axes.errorbar(
            [_cost(point) for point in ordered], y, [below, above],
            color=f"C{place % 10}", marker=_MARKERS[place // 10 % len(_MARKERS)], capsize=3, linewidth=1.5,
            label=_label(own, list(lines), along),
        )  # fmt: skip
    costs = {_cost(result) for result in results}
    if max(costs) > 4 * min(costs):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("network evaluations per sample")
    axes.set_ylabel("accuracy, %, with 95 % interval")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _cost(result: Mapping[str, Any]) -> float:
    """Network evaluations of a completion, or of an image."""
    return result["forwards_per_completion"] if "forwards_per_completion" in result else result["forwards_per_sample"]


def _label(own: tuple[Any, ...], every: Sequence[tuple[Any, ...]], along: Sequence[str]) -> str:
    """The decoder, and those of its settings that are not the same in all lines."""
    words = [str(own[0])]
    for place, key in enumerate(along[1:], start=1):
        if len({other[place] for other in every}) > 1:
            words.append(f"{key} {'full' if own[place] is None else own[place]}")
    return ", ".join(words)


def write_numbers(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file: one row per decoder, one column per number; pass@k in columns of their own."""
    rows = []
    for result in results:
        row: dict[str, Any] = {}
        for key, value in result.items():
            if isinstance(value, Mapping):  # named numbers: of images their measures and rewards
                row |= {f"{key}/{name}": one["value"] for name, one in value.items()}
            elif key != "pass_at_k":
                row[key] = value
        for one in result["pass_at_k"]:
            row |= {f"pass@{one['k']}": one["value"], f"pass@{one['k']} low": one["low"]}
            row |= {f"pass@{one['k']} high": one["high"]}
        rows.append(row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
