"""The folder that `unveil eval --out` fills on tasks of images.

Finished latents are written batch by batch and are all that a resumed evaluation needs: it decodes and judges them
again, all of a decoder together, as an undisturbed one does. Everything else is written when a decoder, or all is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unveil.cli.completion_file import SETTINGS, compare
from unveil.denoisers.continuous import Condition
from unveil.registry import UserError
from unveil.report.sheet import Tile, sheet
from unveil.rewards.images import pil_image
from unveil.samplers.latents import LatentTrajectory
from unveil.samplers.trajectory import concatenate
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import chain_copies, sample_problems
from unveil.training.checkpoints import write_file, write_folder, write_text

LATENTS, IMAGES, SAMPLES, RESULTS = "latents", "images", "samples.jsonl", "results.json"
_ROWS, _COLUMNS = 16, 12
"""Prompts and samples in a picture, at most."""


class SampleFolder:
    """A new folder, or one that an evaluation with the same settings has begun.

    Raises:
        UserError: the folder belongs to an evaluation with other settings, is none of ours, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        file = path / "settings.json"
        try:
            if file.is_file():
                held = json.loads(file.read_text(encoding="utf-8"))
                compare(path, held if isinstance(held, dict) else {}, settings)
            elif path.exists() and any(one.name != ".draft-settings.json" for one in path.iterdir()):
                raise UserError(f"--resume: {path} is no folder of samples by `unveil eval --out`")
            else:
                path.mkdir(exist_ok=True)
                write_text(file, json.dumps(settings, indent=2) + "\n")
        except ValueError as error:
            raise UserError(f"--resume: {file}: not valid JSON: {error}") from error
        except OSError as error:
            raise UserError(f"--out: {path}: {error.strerror}") from error

    def drawn(self, decoder: int, clock: Any, shown: Callable[[int], None]) -> Callable[..., LatentTrajectory]:
        """Draws as `sample_problems` does, but takes from the folder what is there, and adds what is not.

        ``clock`` counts what is drawn now, and its seconds; ``shown`` is told how much there is.
        """
        folder = self.path / LATENTS / f"{decoder:02d}"

        def draw(
            denoiser: Any, problems: Sequence[Problem], sampler: Any, *, batch_size: int, **how: Any
        ) -> LatentTrajectory:
            folder.mkdir(parents=True, exist_ok=True)
            copies, parts, how = chain_copies(problems), [], how | {"on_batch": None}
            for first in range(0, len(problems), batch_size):
                rows, path = slice(first, first + batch_size), folder / f"{first:06d}.safetensors"
                if path.is_file():
                    parts.append(LatentTrajectory.load(path))
                    shown(sum(map(len, parts)))
                    continue
                began = time.perf_counter()
                part = sample_problems(
                    denoiser, problems[rows], sampler, batch_size=batch_size, copies=copies[rows], **how
                )
                # What the network read of the prompts is large, and no judge asks for it.
                parts.append(replace(part, condition=Condition({})))
                write_file(path, parts[-1].save)
                clock.drawn += len(part)
                clock.drawing += time.perf_counter() - began
                shown(sum(map(len, parts)))
            return concatenate(parts) if len(parts) > 1 else parts[0]

        return draw

    def write_images(self, decoder: int, images: Sequence[Tensor]) -> list[str]:
        """A PNG per image, all of a decoder or none; their places in the folder."""
        folder = self.path / IMAGES / f"{decoder:02d}"
        names = [f"{place:06d}.png" for place in range(len(images))]

        def fill(draft: Path) -> None:
            for name, image in zip(names, images, strict=True):
                pil_image(image.nan_to_num(0.0, 1.0, 0.0)).save(draft / name)

        if not folder.is_dir():
            write_folder(folder, fill)
        return [f"{IMAGES}/{folder.name}/{name}" for name in names]

    def write_sheet(self, name: str, rows: dict[str, list[Tile]], heads: Sequence[str] = ()) -> str:
        """A picture of images by rows; its place."""
        path = self.path / f"{name}.png"
        shown = [tiles[:_COLUMNS] for tiles in rows.values()][:_ROWS]
        clean = [[(image.nan_to_num(0.0, 1.0, 0.0), right) for image, right in row] for row in shown]
        write_file(path, sheet(clean, list(rows)[:_ROWS], list(heads)[:_COLUMNS]).save)
        return str(path)

    def write_samples(self, records: Sequence[dict[str, Any]]) -> None:
        """All samples as JSON lines, below a line of settings."""
        lines = [json.dumps(record, ensure_ascii=False) for record in ({SETTINGS: self.settings}, *records)]
        write_text(self.path / SAMPLES, "\n".join(lines) + "\n")


def write_results(path: Path, answer: dict[str, Any]) -> None:
    """What ``--json`` prints, for later."""
    finite = json.loads(json.dumps(answer, default=str), parse_constant=lambda _: None)
    write_text(path / RESULTS, json.dumps(finite, indent=2, ensure_ascii=False) + "\n")
