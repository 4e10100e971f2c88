"""What every command does that opens a model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unveil.registry import UserError

if TYPE_CHECKING:
    from unveil.denoisers.base import MaskedDenoiser
    from unveil.denoisers.continuous import ContinuousDenoiser


def set_threads() -> None:
    """One torch thread on a CPU, or what OMP_NUM_THREADS says.

    Threads wait for one another by spinning: two processes with several threads each on one machine are an
    order of magnitude slower than with one, and small models gain nothing from more.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of a published model."""
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction,
        help="wrap prompts into a published model's chat template (default: as trained, else no)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="weights of a published model (default: fp32)"
    )


def open_model(name: str, *, dtype: Any = "fp32", chat: bool | None = None) -> MaskedDenoiser:
    """The denoiser of a model folder, run folder, embedded or published model, on the GPU where there is one.

    ``chat`` None: as the model was trained, where its folder or its run holds a recipe.

    Raises:
        UserError: there is no such model.
    """
    import torch

    from unveil.denoisers.load import load_masked

    set_threads()
    if chat is None:
        chat = bool(trained_recipe(name).get("model", {}).get("chat"))
    return load_masked(name, dtype=dtype, chat=chat).to("cuda" if torch.cuda.is_available() else "cpu")


def open_image_model(name: str, *, dtype: Any = "fp32", words: Sequence[str] = ()) -> ContinuousDenoiser:
    """The image denoiser of a model folder, run folder, embedded or published model, on the GPU where there is one.

    ``words`` are ``pipeline.key=value``, changes of how a published pipeline was used in training, where its run's
    recipe is at hand.

    Raises:
        UserError: there is no such model, it is of texts, or a word does not fit it.
    """
    import torch

    from unveil.denoisers.continuous import ContinuousDenoiser
    from unveil.denoisers.load import load_denoiser
    from unveil.denoisers.pipelines import PipelineOptions
    from unveil.overrides import merge
    from unveil.recipe import build

    set_threads()
    data = merge({"pipeline": trained_recipe(name).get("model", {}).get("pipeline") or {}}, words)["pipeline"]
    options = build(PipelineOptions, data, "pipeline") if data else None
    denoiser = load_denoiser(name, dtype=dtype, pipeline=options)
    if not isinstance(denoiser, ContinuousDenoiser):
        raise UserError(f"model {name!r}: is of kind {denoiser.medium!r} (allowed: models of images)")
    return denoiser.to("cuda" if torch.cuda.is_available() else "cpu")


def trained_length(name: str) -> int | None:
    """The response length that a model was trained with, where its folder or its run holds a recipe."""
    recipe = trained_recipe(name)
    part = recipe["policy"]["rollout"] if "policy" in recipe else recipe.get("data", {})
    return part.get("response_length")


def trained_recipe(name: str) -> dict[str, Any]:
    """The recipe beside a model, or of its run; empty where there is none."""
    from unveil.denoisers.load import model_folder
    from unveil.recipe import load

    folder = model_folder(name)
    candidates = [folder / "recipe.yaml"]
    if folder.name == "model":
        candidates += [folder.parent / "recipe.yaml", *_run_of_checkpoint(folder)]
    for path in candidates:
        if path.is_file():
            return load(path)
    return {}


def _run_of_checkpoint(folder: Path) -> list[Path]:
    """RUN/recipe.yaml for RUN/checkpoints/update-000025/model."""
    checkpoints = folder.parent.parent
    return [checkpoints.parent / "recipe.yaml"] if checkpoints.name == "checkpoints" else []
