"""Checkpoints that are whole or absent: written beside, flushed, then renamed.

What one process holds goes to state.pt, which is read with ``weights_only``. What is split over ranks goes through
``torch.distributed.checkpoint``, whose own format keeps its index in a pickle that is read unguarded; so its writer of
safetensors is used instead: the index is then JSON in the files' headers, and any number of ranks can read them.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from unveil.registry import UserError
from unveil.training.distribution import Ranks

if TYPE_CHECKING:
    from unveil.training.sharding import Shards

PREFIX = "update-"
SHARDS = "shards"
"""Folder of a checkpoint that holds what is split over ranks."""


def write_folder(path: Path, fill: Callable[[Path], None], ranks: Ranks | None = None) -> None:
    """Create the folder ``path`` with whatever ``fill`` writes, atomically: a kill at any moment leaves no half
    folder.

    Args:
        ranks: of a run whose processes all call this and fill the folder together; None: one process does it alone.
    """
    draft = path.with_name(f".draft-{path.name}")
    alone = ranks is None or ranks.main
    if alone:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    if ranks is not None:
        ranks.wait()
    fill(draft)
    if ranks is not None:
        ranks.wait()
    if alone:
        _publish(draft, path)


def _publish(draft: Path, path: Path) -> None:
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


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Replace a file by what ``fill`` writes, atomically. The draft has the same ending."""
    draft = path.with_name(f".draft-{path.name}")
    fill(draft)
    _flush(draft)
    os.replace(draft, path)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    write_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def save_checkpoint(
    folder: Path,
    update: int,
    save_model: Callable[[Path], None],
    state: dict[str, Any],
    *,
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write ``folder/update-000012`` (model files and training state) and drop all but the newest ``keep``.

    Tensors that are split over ranks go to ``shards/``, every rank writing its own, and everything else to state.pt,
    in which an empty tensor stands for each of them. All ranks call this.
    """
    main = ranks is None or ranks.main
    split: dict[str, Tensor] = {}

    def place(name: str, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        split[name] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    outline = _mapped(state, place)

    def fill(draft: Path) -> None:
        save_model(draft / "model")
        if split:
            import torch.distributed.checkpoint as dcp

            writer = dcp.HuggingFaceStorageWriter(str(draft / SHARDS), save_distributed=True)
            dcp.save(dict(split), storage_writer=writer)
        if main:
            torch.save(outline, draft / "state.pt")

    path = folder / f"{PREFIX}{update:06d}"
    write_folder(path, fill, ranks)
    if main:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.pt").is_file())


def load_state(path: Path, shards: Shards | None = None) -> dict[str, Any]:
    """The training state of a checkpoint (tensors and plain values only; no pickled code is ever run).

    Args:
        shards: of a run whose weights are split: what was or shall be split comes in this rank's part, whatever the
            number of ranks that wrote it. All ranks call this. None: everything comes whole.

    Raises:
        UserError: the file is missing or broken.
    """
    file = path / "state.pt"
    try:
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=shards is not None)
        split: dict[str, Tensor] = {}

        def place(name: str, value: Tensor) -> Tensor:
            if not value.is_meta:
                return value if shards is None or name.startswith("job/") else shards.part_of(value)
            split[name] = torch.empty_like(value, device="cpu") if shards is None else shards.empty(value)
            return split[name]

        state = _mapped(state, place)
        if split:
            import torch.distributed.checkpoint as dcp

            file = path / SHARDS
            reader = dcp.HuggingFaceStorageReader(str(file))
            _check_complete(reader, split)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by one process, as it should be
                dcp.load(split, storage_reader=reader, no_dist=shards is None)
        return state
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except Exception as error:  # torch raises many kinds for a broken archive
        raise UserError(f"{file}: not a readable checkpoint: {type(error).__name__}") from error


def _check_complete(reader: Any, wanted: Mapping[str, Tensor]) -> None:
    """A file that is missing would leave numbers as they were.

    Raises:
        ValueError: the first tensor of which a part is missing.
    """
    found = reader.read_metadata().state_dict_metadata
    for name, value in wanted.items():
        if name not in found or sum(chunk.sizes.numel() for chunk in found[name].chunks) != value.numel():
            raise ValueError(f"a part of {name} is missing")


def _mapped(state: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """Nested dictionaries and lists with every tensor changed; its name is the path to it."""
    if isinstance(state, Tensor):
        return change(name, state)
    if isinstance(state, dict):
        return {key: _mapped(value, change, f"{name}/{key}".lstrip("/")) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_mapped(value, change, f"{name}/{number}") for number, value in enumerate(state))
    return state


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
