"""Lines of a run, and which of them survive a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unveil.training.log import Cost, LogConfig, RunLog

QUIET = LogConfig(tensorboard=False)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_resume_drops_later_lines_and_a_broken_last_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET)
    for step in range(1, 7):
        log.metrics("train", step, {"loss": step / 2})
        log.lines("samples.jsonl", [{"step": step, "text": "ü"}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write('{"step": 2, "text": "ü'.encode()[:-1])  # killed in the middle of a letter
    log = RunLog(tmp_path, QUIET, resume_at=4)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["text"] for line in read(tmp_path / "samples.jsonl")] == ["ü"] * 4
    log.metrics("train", 5, {"loss": 0.0})
    assert read(tmp_path / "metrics.jsonl")[-1] == {"kind": "train", "step": 5, "loss": 0.0}


def test_unusual_line_separators_survive_a_resume(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET)
    text = "a\u2028b\u0085c\nd\x0c"
    log.lines("samples.jsonl", [{"step": 1, "text": text}, {"step": 2, "text": text}])
    RunLog(tmp_path, QUIET, resume_at=1)
    assert read(tmp_path / "samples.jsonl") == [{"step": 1, "text": text}]


def test_nan_becomes_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET)
    log.metrics("train", 1, {"loss": math.nan, "curve": [1.0, math.inf], "inner": {"x": -math.inf}})
    assert read(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 1, "loss": None, "curve": [1.0, None], "inner": {"x": None}}
    ]


def test_run_json_is_merged(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET)
    log.info({"a": 1, "b": 2})
    log.info({"b": 3})
    log.cost(Cost(rollouts=7))
    found = json.loads((tmp_path / "run.json").read_text())
    assert (found["a"], found["b"], found["cost"]["rollouts"]) == (1, 3, 7)


def test_tensorboard_keeps_what_came_before_the_resume(tmp_path: Path) -> None:
    log = RunLog(tmp_path, LogConfig())
    for step in (1, 2, 3):
        log.metrics("train", step, {"loss": float(step)})
    log.close()
    log = RunLog(tmp_path, LogConfig(), resume_at=2)
    log.metrics("train", 3, {"loss": 30.0})
    log.metrics("eval", 3, {"decoder": "lcr", "accuracy": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events.Scalars("eval/lcr/accuracy")[0].value == 0.5
