"""What `unveil eval` says of decoders whatever the medium: shares with their intervals, and the table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unveil.cli.output import interval, table
from unveil.tasks.statistics import Interval, bootstrap, pass_at_k

if TYPE_CHECKING:
    from rich.table import Table


def shares(
    args: argparse.Namespace, correct: Sequence[bool], more: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """Accuracy and pass@k of samples, problem after problem, and the means of ``more`` numbers per sample.

    All of them are over the same draws of problems.
    """
    n = args.samples
    right = [sum(group) for group in _groups(correct, n)]
    passed = [[pass_at_k(n, count, k) for count in right] for k in args.k]
    means = [[sum(group) / n for group in _groups(values, n)] for values in more.values()]
    accuracy, *rest = bootstrap(
        [[count / n for count in right], *passed, *means], resamples=args.resamples, seed=args.seed
    )
    said = {
        "accuracy": accuracy.mean, "low": accuracy.low, "high": accuracy.high,
        "pass_at_k": [
            {"k": k, "value": one.mean, "low": one.low, "high": one.high}
            for k, one in zip(args.k, rest[: len(passed)], strict=True)
        ],
    }  # fmt: skip
    return said, dict(zip(more, rest[len(passed) :], strict=True))


def _groups(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def report(
    args: argparse.Namespace,
    results: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Sequence[str]],
    numbers: Mapping[str, Sequence[str]],
) -> Table:
    """A row per decoder. Shares in percent. The title tells the settings that all decoders have in common.

    Args:
        settings: of every decoder, as columns.
        numbers: further columns, behind accuracy and pass@k.
    """
    shared = [f"{name} {values[0]}" for name, values in settings.items() if len(set(values)) == 1]
    columns: dict[str, Sequence[str]] = {"decoder": [line["decoder"] for line in results]}
    columns |= {name: values for name, values in settings.items() if len(set(values)) > 1}
    columns["accuracy %"] = [interval(*(line[key] for key in ("accuracy", "low", "high"))) for line in results]
    for place, k in enumerate(args.k):
        if k > 1:
            found = [line["pass_at_k"][place] for line in results]
            columns[f"pass@{k} %"] = [interval(one["value"], one["low"], one["high"]) for one in found]
    columns |= numbers
    made = table(tuple(columns), list(zip(*columns.values(), strict=True)), numbers=tuple(columns)[1:])
    count = f"{results[0]['problems']} problems" + (f" x {args.samples} samples" if args.samples > 1 else "")
    made.title = ", ".join([count, *shared])
    return made


def speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
