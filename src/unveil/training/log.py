"""The run folder: metrics as JSON lines and TensorBoard (and W&B if asked), samples, trajectories, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unveil.registry import UserError
from unveil.training.checkpoints import write_text


@dataclass(kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write event files to RUN/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project name (needs the extra ``wandb``); None: off."""


@dataclass(kw_only=True)
class Cost:
    """What a run has spent. Sequence-forwards: one network evaluation of one sequence; scoring passes count too."""

    optimizer_steps: int = 0
    rollouts: int = 0
    forwards: int = 0
    samples: int = 0
    seconds: float = 0.0


class RunLog:
    """Writes a run folder. Lines after a checkpoint are cut when the run resumes from it."""

    def __init__(self, folder: Path, config: LogConfig, *, resume_at: int | None = None, title: str = "") -> None:
        self.folder = folder
        if resume_at is not None:
            for name in ("metrics.jsonl", "samples.jsonl", "trajectories.jsonl"):
                _cut_after(folder / name, resume_at)
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=None if resume_at is None else resume_at + 1
            )
        if config.wandb is not None:
            try:
                import wandb
            except ImportError as error:
                raise UserError("log.wandb: the extra is not installed (pip install 'unveil[wandb]')") from error
            self.wandb = wandb.init(project=config.wandb, name=title, dir=str(folder), resume="allow")

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; scalars also go to TensorBoard under ``kind/``."""
        self.lines("metrics.jsonl", [{"kind": kind, "step": step, **values}])
        label = f"{kind}/{values['decoder']}" if "decoder" in values else kind
        scalars = {f"{label}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        if self.tensorboard is not None:
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)

    def lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records to a JSON lines file of the run."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")

    def info(self, values: Mapping[str, Any]) -> None:
        """Merge values into run.json."""
        path = self.folder / "run.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_text(path, json.dumps({**known, **values}, indent=2) + "\n")

    def cost(self, cost: Cost) -> None:
        self.info({"cost": asdict(cost)})

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _cut_after(path: Path, step: int) -> None:
    """Drop lines of later steps, and a last line that a crash cut short."""
    if not path.is_file():
        return
    kept = []
    # Not splitlines: JSON leaves line separators such as U+2028 inside strings as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    write_text(path, "".join(line + "\n" for line in kept))


def _finite(value: Any) -> Any:
    """JSON has no nan: write null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
