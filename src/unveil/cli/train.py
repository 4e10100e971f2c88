"""`unveil train`: a better policy by its rewards."""

from __future__ import annotations

import argparse
from typing import Any

from unveil.cli import fit

SUMMARY = "improve a model by its rewards, as a system's recipe says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fit.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.training.runs import TrainRecipe, train

    return fit.run(args, TrainRecipe, train)
