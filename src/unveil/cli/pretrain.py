"""`unveil pretrain`: a denoiser from data."""

from __future__ import annotations

import argparse
from typing import Any

from unveil.cli import fit

SUMMARY = "train a denoiser on data, from scratch or from a model (supervised fine-tuning)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fit.add_arguments(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil.training.runs import JudgeRecipe, PretrainRecipe, pretrain, teach

    if fit.has_key(args, "judge"):
        return fit.run(args, JudgeRecipe, teach)
    return fit.run(args, PretrainRecipe, pretrain)
