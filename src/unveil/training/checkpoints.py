"""Checkpoints that are whole or absent: written beside, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unveil.registry import UserError

PREFIX = "update-"


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Create the folder ``path`` with whatever ``fill`` writes, atomically: a kill at any moment leaves no half
    folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".draft-{path.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    fill(draft)
    for file in draft.rglob("*"):
        if file.is_file():
            _flush(file)
    _flush(draft)
    if path.exists():  # replaced by the same content, or by a later state of it
        old = path.with_name(f".old-{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(draft, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(draft, path)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    draft = path.with_name(f".draft-{path.name}")
    draft.write_text(text, encoding="utf-8")
    _flush(draft)
    os.replace(draft, path)


def save_checkpoint(
    folder: Path, update: int, save_model: Callable[[Path], None], state: dict[str, Any], *, keep: int
) -> Path:
    """Write ``folder/update-000012`` (model files and training state) and drop all but the newest ``keep``."""

    def fill(draft: Path) -> None:
        save_model(draft / "model")
        torch.save(state, draft / "state.pt")

    path = folder / f"{PREFIX}{update:06d}"
    write_folder(path, fill)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.pt").is_file())


def load_state(path: Path) -> dict[str, Any]:
    """The training state of a checkpoint (tensors and plain values only; no pickled code is ever run).

    Raises:
        UserError: the file is missing or broken.
    """
    file = path / "state.pt"
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except Exception as error:  # torch raises many kinds for a broken archive
        raise UserError(f"{file}: not a readable checkpoint: {type(error).__name__}") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
