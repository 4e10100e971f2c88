"""`unveil pretrain`: a denoiser from data."""

from __future__ import annotations

import argparse
from typing import Any

from unveil.cli import fit

SUMMARY = "train a denoiser on data, from scratch or from a model (supervised fine-tuning)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fit.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.training.runs import PretrainRecipe, pretrain

    return fit.run(args, PretrainRecipe, pretrain)
