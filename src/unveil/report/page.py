"""Builds the page of a run: one HTML file that holds its data, styles and scripts, and reaches for no network.

The numbers are prepared here (checked, thinned, summarised) and embedded as JSON; ``assets/app.js`` draws them. Strings of
a run (prompts, completions, a recipe) are untrusted text: the JSON holds no ``<``, the script inserts text nodes only, and
a content security policy lets nothing run but the two scripts whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from unveil.registry import UserError

POINTS = 2_000
"""Most points that a curve on the page has."""
FLAT = 0.8
"""Share of groups without reward variance above which the page warns."""
_COLUMNS = 160
"""Most columns of the heat map."""
_BUDGET = 32_000_000
"""Most characters of samples, and of trajectories, that a page carries."""

Line = dict[str, Any]


def build_page(run: Path) -> str:
    """The page of the run folder ``run``, as HTML.

    Raises:
        UserError: ``run`` is no run folder, or one of its files is broken; names the file and the line.
    """
    info = _read_json(run / "run.json", f"{str(run)!r} is no run folder: it has no run.json, which `unveil train` writes")
    notes: list[str] = []
    metrics = _read_lines(run / "metrics.jsonl", {"kind": str, "step": int}, notes)
    train = _latest((line for line in metrics if line["kind"] == "train"), "step")
    evals = _latest((line for line in metrics if line["kind"] == "eval"), "step", "decoder")
    table = _read_table(run / "table.json")
    samples = _read_lines(run / "samples.jsonl", {"step": int, "problem": str}, notes)
    trajectories = _read_lines(
        run / "trajectories.jsonl", {"step": int, "problem": str, "decoder": str, "steps": list}, notes, _check_steps
    )
    data = {
        "run": {"name": run.resolve().name, **info},
        "recipe": _read_text(run / "recipe.yaml"),
        "summary": _summary(table, evals),
        "notes": notes,
        "train": _curves(train),
        "evals": _eval_curves(evals),
        "groups": _flat_groups(train),
        "guesses": _guess_map(train),
        "table": table,
        "samples": _within_budget(_latest(samples, "problem", "decoder", "step"), "samples", notes),
        "trajectories": _within_budget(_latest(trajectories, "problem", "decoder", "step"), "trajectories", notes),
    }
    return _fill(str(data["run"]["name"]), data)


def write_page(run: Path) -> Path:
    """Writes the page to ``run/report.html`` and returns that path; readers see the old page or the new one, no mixture.

    Raises:
        UserError: as `build_page`, or the folder cannot be written to.
    """
    page = build_page(run)
    target, part = run / "report.html", run / f".report.html.{os.getpid()}"
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{str(target)!r} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


# Reading a run folder


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _read_json(path: Path, missing: str) -> Line:
    if not path.is_file():
        raise UserError(missing)
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object, not {type(found).__name__}")
    return found


def _read_lines(path: Path, needs: dict[str, type], notes: list[str], check: Any = None) -> list[Line]:
    """The objects of a .jsonl file, [] where there is none. A last line that a crash cut short becomes a note."""
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
            if not isinstance(line.get(key), kind) or isinstance(line[key], bool):
                raise UserError(f"{where}: {key!r} must be of type {kind.__name__}, not {line.get(key)!r:.60}")
        if check is not None:
            check(line, where)
        lines.append(line)
    return lines


def _check_steps(line: Line, where: str) -> None:
    """Every step has a canvas, and its guess and confidence, where given, are as long as that canvas."""
    for index, step in enumerate(line["steps"]):
        if not isinstance(step, dict) or not isinstance(step.get("tokens"), list):
            raise UserError(f"{where}: 'steps[{index}].tokens' must be a list")
        for key in ("guess", "confidence"):
            values = step.get(key)
            if values is not None and (not isinstance(values, list) or len(values) != len(step["tokens"])):
                raise UserError(f"{where}: 'steps[{index}].{key}' must be a list of {len(step['tokens'])}, as 'tokens' is")


def _read_table(path: Path) -> Line | None:
    if not path.is_file():
        return None
    table = _read_json(path, "")
    for key in ("rows", "columns", "accuracy"):
        if not isinstance(table.get(key), list) or not table[key]:
            raise UserError(f"{str(path)!r}: {key!r} must be a list with entries")
    for key in ("accuracy", "low", "high"):
        shape = [len(row) if isinstance(row, list) else -1 for row in table.get(key) or table["accuracy"]]
        if shape != [len(table["columns"])] * len(table["rows"]):
            raise UserError(f"{str(path)!r}: {key!r} must have {len(table['rows'])} rows of {len(table['columns'])} numbers")
    return table


def _latest(lines: Iterable[Line], *keys: str) -> list[Line]:
    """The last line for every value of ``keys``, by step: a resumed run writes some updates a second time."""
    by_key = {tuple(str(line.get(key)) for key in keys): line for line in lines}
    return sorted(by_key.values(), key=lambda line: line["step"])


def _within_budget(lines: list[Line], what: str, notes: list[str]) -> list[Line]:
    """As many lines as a page can carry, those of the last and first update first: they are what is compared."""
    steps = sorted({line["step"] for line in lines}, reverse=True)
    rank = {step: place for place, step in enumerate([*steps[:1], *steps[-1:], *steps[1:-1]])}
    kept, spent = [], 0
    for line in sorted(lines, key=lambda line: rank[line["step"]]):
        spent += len(json.dumps(line))
        if spent > _BUDGET:
            break
        kept.append(line)
    if len(kept) < len(lines):
        notes.append(f"{len(lines) - len(kept)} of {len(lines)} {what} are left out to keep this page small.")
    return sorted(kept, key=lambda line: line["step"])


# Preparing the numbers


def _number(value: object) -> float | None:
    """The value if it is a finite number, to 6 digits; else None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _number(sum(known) / len(known)) if known else None


def _bins(length: int, limit: int) -> list[range]:
    """``min(length, limit)`` consecutive index ranges of nearly equal size that cover 0 .. length - 1."""
    count = min(length, limit)
    return [range(i * length // count, (i + 1) * length // count) for i in range(count)]


def _curves(lines: Sequence[Line]) -> dict[str, Line]:
    """One curve ``{x, y}`` for every numeric key; above `POINTS` points means per bin, with the extremes as low, high."""
    keys = dict.fromkeys(key for line in lines for key, value in line.items() if _number(value) is not None)
    curves = {}
    for key in keys:
        if key == "step":
            continue
        points = [(line["step"], _number(line[key])) for line in lines if key in line]
        parts = [[points[i] for i in part] for part in _bins(len(points), POINTS)]
        curve: Line = {"x": [part[len(part) // 2][0] for part in parts], "y": [_mean(y for _, y in part) for part in parts]}
        if len(points) > POINTS:
            known = [[y for _, y in part if y is not None] for part in parts]
            curve |= {"low": [min(ys, default=None) for ys in known], "high": [max(ys, default=None) for ys in known]}
        curves[key] = curve
    return curves


def _eval_curves(lines: Sequence[Line]) -> dict[str, dict[str, list[float | None]]]:
    """Per decoder: ``x`` (updates) and a list as long as it for every numeric key."""
    curves = {}
    for decoder in dict.fromkeys(str(line.get("decoder", "default")) for line in lines):
        own = [line for line in lines if str(line.get("decoder", "default")) == decoder]
        own = [own[part[-1]] for part in _bins(len(own), POINTS)]
        keys = dict.fromkeys(key for line in own for key, value in line.items() if _number(value) is not None)
        curves[decoder] = {key: [_number(line.get(key)) for line in own] for key in keys if key != "step"}
        curves[decoder]["x"] = [line["step"] for line in own]
    return curves


def _flat_groups(lines: Sequence[Line]) -> Line:
    """How many updates had more than `FLAT` of their groups without reward variance, and which was the last of them."""
    known = [(line["step"], share) for line in lines if (share := _number(line.get("zero_variance_groups"))) is not None]
    flat = [step for step, share in known if share > FLAT]
    return {"limit": FLAT, "updates": len(known), "flat": len(flat), "last": flat[-1] if flat else None}


def _guess_map(lines: Sequence[Line]) -> Line | None:
    """Mean guess accuracy, ``accuracy[column][denoising step]``; a column covers the updates ``from`` .. ``to``."""
    known = [(line["step"], line["guess_accuracy"]) for line in lines if isinstance(line.get("guess_accuracy"), list)]
    steps = max((len(values) for _, values in known), default=0)
    if not steps:
        return None
    parts = [[known[i] for i in part] for part in _bins(len(known), _COLUMNS)]
    return {
        "from": [part[0][0] for part in parts],
        "to": [part[-1][0] for part in parts],
        "accuracy": [
            [_mean(_number(values[s]) for _, values in part if s < len(values)) for s in range(steps)] for part in parts
        ],
    }


def _summary(table: Line | None, evals: Sequence[Line]) -> list[str]:
    """One sentence per decoder: the last model against the base."""
    if table is not None:
        count = f" of {table['problems']:,} held-out problems" if isinstance(table.get("problems"), int) else ""
        ends = [(0, str(table["rows"][0])), (-1, str(table["rows"][-1]))]
        found = {
            str(decoder): [
                (name, *(_number(table[key][row][column]) if table.get(key) else None for key in ("accuracy", "low", "high")))
                for row, name in ends
            ]
            for column, decoder in enumerate(table["columns"])
        }
    else:
        count, found = " of the held-out problems", {}
        for line in evals:
            entry = (f"update {line['step']}", *(_number(line.get(key)) for key in ("accuracy", "low", "high")))
            found.setdefault(str(line.get("decoder", "default")), []).append(entry)
    sentences = [_sentence(decoder, count, entries[0], entries[-1]) for decoder, entries in found.items()]
    return [sentence for sentence in sentences if sentence] or ["No held-out evaluation yet."]


def _sentence(decoder: str, count: str, base: Sequence[Any], last: Sequence[Any]) -> str | None:
    if base[1] is None or last[1] is None:
        return None
    sentence = f"With {decoder}, {last[0]} solves {last[1]:.1%}{count}"
    if base == last:
        return f"{sentence}."
    change = f"{100 * (last[1] - base[1]):+.1f} points"
    if None not in (*base, *last):
        change += "; the intervals " + ("overlap" if base[2] <= last[3] and last[2] <= base[3] else "do not overlap")
    return f"{sentence}, {base[0]} {base[1]:.1%} ({change})."


# Filling the template


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _fill(title: str, data: Line) -> str:
    folder = resources.files("unveil.report") / "assets"
    text = {name: (folder / name).read_text(encoding="utf-8") for name in _ASSETS}
    style = text["uPlot.min.css"] + text["style.css"]
    plot, script = text["uPlot.iife.min.js"], text["charts.js"] + text["app.js"]
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; "
        f"script-src {_hash(plot)} {_hash(script)}",
        "style": style,
        "plot": plot,
        "script": script,
        # No "<" at all: neither "</script" nor "<!--" can then end or swallow the element.
        "data": json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text["template.html"])


_ASSETS = ("template.html", "style.css", "charts.js", "app.js", "uPlot.iife.min.js", "uPlot.min.css")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
