"""Reads the files of a run folder and checks them; what is broken is named by file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unveil.registry import UserError

_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")

Line = dict[str, Any]
"""One JSON object, such as a line of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What a run has written so far.

    Attributes:
        info: run.json.
        recipe: the text of recipe.yaml, None where there is none.
        train, evals: the two kinds of lines of metrics.jsonl, by step, each step once.
        table: table.json, None where there is none.
        samples, trajectories: the lines of samples.jsonl and trajectories.jsonl, by step.
        notes: sentences about what had to be left out.
    """

    info: Line
    recipe: str | None
    train: list[Line]
    evals: list[Line]
    table: Line | None
    samples: list[Line]
    trajectories: list[Line]
    notes: list[str] = field(default_factory=list)


def read_run(run: Path) -> RunFolder:
    """Everything that the page shows of the run folder ``run``; only run.json has to be there.

    Raises:
        UserError: ``run`` is no run folder, or one of its files is broken; names the file and the line.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{str(run)!r} is no run folder: it has no run.json, which `unveil train` writes")
    notes: list[str] = []
    metrics = _read_lines(run / "metrics.jsonl", {"kind": str, "step": int}, notes)
    samples = _read_lines(run / "samples.jsonl", {"step": int, "problem": str}, notes, _check_images)
    needs = {"step": int, "problem": str, "decoder": str, "steps": list}
    trajectories = _read_lines(run / "trajectories.jsonl", needs, notes, _check_steps)
    recipe = run / "recipe.yaml"
    return RunFolder(
        info=_read_json(run / "run.json"),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        train=_latest([line for line in metrics if line["kind"] == "train"], "step"),
        evals=_latest([line for line in metrics if line["kind"] == "eval"], "step", "decoder"),
        table=_read_table(run / "table.json") if (run / "table.json").is_file() else None,
        samples=_latest(samples, "problem", "decoder", "step"),
        trajectories=_latest(trajectories, "problem", "decoder", "step"),
        notes=notes,
    )


def by_decoder(evals: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of evaluations, of every decoder by itself."""
    found: dict[str, list[Line]] = {}
    for line in evals:
        found.setdefault(str(line.get("decoder", "default")), []).append(line)
    return found


def _read_json(path: Path) -> Line:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object, not {type(found).__name__}")
    return found


def _read_lines(
    path: Path, needs: dict[str, type], notes: list[str], check: Callable[[Line, str], None] | None = None
) -> list[Line]:
    """The objects of a .jsonl file, [] where there is none. A last line that is cut short becomes a note."""
    rows = path.read_bytes().split(b"\n") if path.is_file() else []
    filled = [(number, row) for number, row in enumerate(rows, start=1) if row.strip()]
    lines = []
    for number, row in filled:
        where = f"{str(path)!r} line {number}"
        try:
            line = json.loads(row.decode("utf-8"))
        except ValueError as error:
            if number == filled[-1][0]:
                notes.append(f"The last line of {path.name} is cut short and left out.")
                break
            raise UserError(f"{where} is no valid JSON: {error}") from error
        if not isinstance(line, dict):
            raise UserError(f"{where} must hold a JSON object, not {type(line).__name__}")
        for key, kind in needs.items():
            value = line.get(key)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{where}: {key!r} must be of type {kind.__name__}, not {str(value)[:60]!r}")
        if check is not None:
            check(line, where)
        lines.append(line)
    return lines


def _check_images(line: Line, where: str) -> None:
    """Images are PNG, given whole: a page shows nothing from elsewhere."""
    for key in ("image", "guess_image"):
        value = line.get(key)
        if value is not None and not (isinstance(value, str) and _PNG.fullmatch(value)):
            raise UserError(f"{where}: {key!r} must be a data: address of a PNG, not {str(value)[:60]!r}")


def _check_steps(line: Line, where: str) -> None:
    """Steps are images, or canvases whose tokens, guesses and confidences have one length."""
    length = None
    for index, step in enumerate(line["steps"]):
        if isinstance(step, dict) and "image" in step:
            _check_images(step, f"{where}: 'steps[{index}]'")
            continue
        if not isinstance(step, dict) or not isinstance(step.get("tokens"), list):
            raise UserError(f"{where}: 'steps[{index}].tokens' must be a list")
        length = len(step["tokens"]) if length is None else length
        for key in ("tokens", "guess", "confidence"):
            values = step.get(key)
            if values is not None and (not isinstance(values, list) or len(values) != length):
                raise UserError(f"{where}: 'steps[{index}].{key}' must be a list of {length}, one per place")


def _read_table(path: Path) -> Line:
    table = _read_json(path)
    for key in ("rows", "columns", "accuracy"):
        if not isinstance(table.get(key), list) or not table[key]:
            raise UserError(f"{str(path)!r}: {key!r} must be a list with entries")
    rows, columns = len(table["rows"]), len(table["columns"])
    for key in ("accuracy", "low", "high"):
        values = table.get(key) or table["accuracy"]
        if [len(row) if isinstance(row, list) else -1 for row in values] != [columns] * rows:
            raise UserError(f"{str(path)!r}: {key!r} must have {rows} rows of {columns} numbers")
    return table


def _latest(lines: list[Line], *keys: str) -> list[Line]:
    """The last line for every value of ``keys``, by step: a resumed run writes some updates a second time."""
    by_key = {tuple(str(line.get(key)) for key in keys): line for line in lines}
    return sorted(by_key.values(), key=lambda line: line["step"])
