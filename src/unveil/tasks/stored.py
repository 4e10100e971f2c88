"""Completions that lie in files: those of `unveil eval --out`, and the generations of d1's evaluation.

d1's files, which many repositories have copied, hold one JSON object with a list ``generations`` of ``question``,
``generations`` (the text, end tokens included) and ``ground_truth``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unveil.registry import UserError
from unveil.tasks.base import Problem, Task
from unveil.tasks.files import read_json_lines

_RANK = re.compile(r"_\d+_generations$")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One completion.

    Attributes:
        setup: what it belongs to: the decoder's settings, or the file's name without the number of the process.
        problem: None where the file has no reference answer.
        name: of the problem.
        text: as stored.
    """

    setup: str
    problem: Problem | None
    name: str
    text: str


def read_completions(path: Path, task: Task) -> list[Stored]:
    """All completions of one file, in its order.

    Raises:
        UserError: the file is in neither format, or does not belong to the task.
    """
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if first.startswith('{"settings"'):
        return _ours(path, task)
    return _theirs(path, task)


def _ours(path: Path, task: Task) -> list[Stored]:
    (_, header), *rows = read_json_lines(path, ())
    settings = header["settings"]
    problems = {one.id: one for one in task.problems(settings["split"], settings["problems"], settings["seed"])}
    keys = list(settings["decoders"][0])
    found = []
    for line, row in rows:
        if row.get("problem") not in problems:
            raise UserError(f"{path}:{line}: problem {row.get('problem')!r} is none of the task's (other settings?)")
        setup = " ".join(f"{key} {row[key]}" for key in keys if row[key] is not None)
        found.append(Stored(setup=setup, problem=problems[row["problem"]], name=row["problem"], text=row["completion"]))
    return found


def _theirs(path: Path, task: Task) -> list[Stored]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    rows = data.get("generations") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: should be a file of `unveil eval --out`, or an object with a list 'generations'")
    setup = _RANK.sub("", path.stem)
    return [_generation(path, task, setup, place, row) for place, row in enumerate(rows)]


def _generation(path: Path, task: Task, setup: str, place: int, row: Any) -> Stored:
    where = f"{path}: generations[{place}]"
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "generations")):
        raise UserError(f"{where} should have the strings 'question' and 'generations'")
    if "ground_truth" not in row:
        raise UserError(f"{where}: 'ground_truth' is missing")
    try:
        problem = task.recorded(row["question"], row["ground_truth"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Stored(setup=setup, problem=problem, name=row["question"], text=row["generations"])
