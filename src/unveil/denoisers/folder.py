"""The files of a model folder: config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unveil.registry import UserError


def write_model(folder: Path, config: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Write both files into ``folder``, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors")


def read_config(folder: Path) -> dict:
    """config.json of a model folder.

    Raises:
        UserError: the folder or file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file (a model folder holds config.json, model.safetensors, tokenizer.json)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: should hold a JSON object, got {type(config).__name__}")
    return config


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``module``, every key and shape matching.

    Raises:
        UserError: the file is missing, truncated, or of another architecture (the first difference is named).
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        loaded = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error
    own = module.state_dict()
    for name in sorted(own.keys() | loaded.keys()):
        if name not in loaded:
            raise UserError(f"{path}: a checkpoint of another architecture: it lacks {name!r}")
        if name not in own:
            raise UserError(f"{path}: a checkpoint of another architecture: it has {name!r}, the model does not")
        if own[name].shape != loaded[name].shape:
            got, wanted = tuple(loaded[name].shape), tuple(own[name].shape)
            raise UserError(f"{path}: a checkpoint of another architecture: {name!r} is {got}, the model has {wanted}")
    module.load_state_dict(loaded)
