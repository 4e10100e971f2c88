"""Builds the page of a run: one HTML file with its data, styles and scripts inside, and no use of a network.

The numbers are prepared here (thinned, summarised) and embedded as JSON; ``assets/app.js`` and ``charts.js``
draw them. The strings of a run (prompts, completions, a recipe) are untrusted: the JSON holds no ``<``, the
scripts insert text nodes and checked PNG images only, and a content security policy lets only the scripts run whose
hashes it names.
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
from unveil.report.hacking import LIMITS, reward_parts, signs
from unveil.report.run_folder import Line, RunFolder, by_decoder, read_run

POINTS = 2_000
"""Most points that a curve on the page has."""
FLAT = 0.8
"""Share of groups without reward variance above which the page warns."""
_COLUMNS = 160
"""Most columns of the map of guess accuracy."""
_BUDGET = 32_000_000
"""Most characters of samples, and of trajectories, that a page carries."""
_ASSETS = ("template.html", "style.css", "charts.js", "images.js", "app.js", "uPlot.iife.min.js", "uPlot.min.css")


def build_page(run: Path) -> str:
    """The page of the run folder ``run``, as HTML.

    Raises:
        UserError: ``run`` is no run folder, or one of its files is broken; names the file and the line.
    """
    folder = read_run(run)
    return _fill(run.resolve().name, _page_data(run.resolve().name, folder))


def write_page(run: Path) -> Path:
    """Writes the page to ``run/report.html``, the old or the new one at any time; returns its full path.

    Raises:
        UserError: as `build_page`, or the folder cannot be written to.
    """
    page = build_page(run)
    target, part = run / "report.html", run / f".report.html.{os.getpid()}"
    try:
        try:
            part.write_text(page, encoding="utf-8")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{str(target)!r} cannot be written: {error.strerror}") from error
    return target.resolve()


def _page_data(name: str, folder: RunFolder) -> Line:
    """The object that the scripts of the page read."""
    notes, parts = list(folder.notes), reward_parts(folder.recipe)
    return {
        "run": {**folder.info, "name": name},
        "recipe": folder.recipe,
        "summary": _summary(folder.table, folder.evals),
        "train": _curves(folder.train),
        "evals": _eval_curves(folder.evals),
        "groups": _flat_groups(folder.train),
        "guesses": _step_map(folder.train, "guess_accuracy"),
        "steps": _step_maps(folder.train),
        "hacking": signs(folder.evals, folder.train, parts),
        "limits": LIMITS,
        "parts": parts,
        "table": folder.table,
        "samples": _within_budget(folder.samples, "samples", notes),
        "trajectories": _within_budget(folder.trajectories, "trajectories", notes),
        "notes": notes,
    }


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


def _numeric_keys(lines: Iterable[Line]) -> list[str]:
    found = dict.fromkeys(key for line in lines for key, value in line.items() if _number(value) is not None)
    return [key for key in found if key != "step"]


def _curves(lines: Sequence[Line]) -> dict[str, Line]:
    """A curve ``{x, y}`` for every numeric key.

    Above `POINTS` points y is a mean per bin, and ``low``, ``high`` are the extremes there: no spike is lost.
    """
    curves = {}
    for key in _numeric_keys(lines):
        points = [(line["step"], _number(line[key])) for line in lines if key in line]
        parts = [[points[i] for i in part] for part in _bins(len(points), POINTS)]
        known = [[y for _, y in part if y is not None] for part in parts]
        curve: Line = {"x": [part[len(part) // 2][0] for part in parts], "y": [_mean(ys) for ys in known]}
        if len(points) > POINTS:
            curve["low"] = [min(ys, default=None) for ys in known]
            curve["high"] = [max(ys, default=None) for ys in known]
        curves[key] = curve
    return curves


def _eval_curves(lines: Sequence[Line]) -> dict[str, dict[str, list[float | None]]]:
    """Per decoder: ``x`` (updates) and a list as long as it for every numeric key."""
    curves: dict[str, dict[str, list[float | None]]] = {}
    for decoder, found in by_decoder(lines).items():
        own = [found[part[-1]] for part in _bins(len(found), POINTS)]
        curves[decoder] = {key: [_number(line.get(key)) for line in own] for key in _numeric_keys(own)}
        curves[decoder]["x"] = [line["step"] for line in own]
    return curves


def _flat_groups(lines: Sequence[Line]) -> Line:
    """How many updates had more than `FLAT` of their groups without reward variance, and the last of them."""
    shares = [(line["step"], _number(line.get("zero_variance_groups"))) for line in lines]
    known = [(step, share) for step, share in shares if share is not None]
    flat = [step for step, share in known if share > FLAT]
    return {"limit": FLAT, "updates": len(known), "flat": len(flat), "last": flat[-1] if flat else None}


def _step_maps(lines: Sequence[Line]) -> dict[str, Line]:
    """`_step_map` of every measure ``steps/NAME``, by NAME."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("steps/"))
    found = {key.removeprefix("steps/"): _step_map(lines, key) for key in keys}
    return {name: table for name, table in found.items() if table is not None}


def _step_map(lines: Sequence[Line], key: str) -> Line | None:
    """Mean of a measure with a number per denoising step: ``values[column][step]``; a column is updates ``from`` ..
    ``to``."""
    known = [line for line in lines if isinstance(line.get(key), list)]
    steps = max((len(line[key]) for line in known), default=0)
    if not steps:
        return None
    parts = [[known[i] for i in part] for part in _bins(len(known), _COLUMNS)]

    def mean(part: list[Line], step: int) -> float | None:
        rows = [line[key] for line in part]
        return _mean(_number(row[step]) for row in rows if step < len(row))

    return {
        "from": [part[0]["step"] for part in parts],
        "to": [part[-1]["step"] for part in parts],
        "values": [[mean(part, step) for step in range(steps)] for part in parts],
    }


def _within_budget(lines: list[Line], what: str, notes: list[str]) -> list[Line]:
    """As many lines as a page can carry: those of the last and the first update, then of updates evenly between."""
    rank = {step: place for place, step in enumerate(_ends_first(sorted({line["step"] for line in lines})))}
    kept, spent = [], 0
    for line in sorted(lines, key=lambda line: rank[line["step"]]):
        spent += len(json.dumps(line))
        if spent > _BUDGET:
            break
        kept.append(line)
    if len(kept) < len(lines):
        notes.append(f"{len(lines) - len(kept)} of {len(lines)} {what} are left out to keep this page small.")
    return sorted(kept, key=lambda line: line["step"])


def _ends_first(values: Sequence[int]) -> list[int]:
    """The last, the first, the middle, the middles of both halves, and so on."""
    order, spans = [*values[-1:], *values[:-1][:1]], [(0, len(values) - 1)]
    for first, last in spans:  # grows while it is read: breadth first
        if last - first > 1:
            middle = (first + last) // 2
            order.append(values[middle])
            spans += [(first, middle), (middle, last)]
    return order


def _summary(table: Line | None, evals: Sequence[Line]) -> list[str]:
    """One sentence per decoder: the last model against the base."""
    found: dict[str, list[Line]] = {}
    if table is not None:
        for column, decoder in enumerate(table["columns"]):
            for row, name in enumerate(table["rows"]):
                keys = [key for key in ("accuracy", "low", "high") if table.get(key)]
                entry = {"name": name, "problems": table.get("problems")}
                entry |= {key: table[key][row][column] for key in keys}
                found.setdefault(str(decoder), []).append(entry)
    else:
        for decoder, own in by_decoder(evals).items():
            found[decoder] = [{**line, "name": f"update {line['step']}"} for line in own]
    sentences = [_sentence(decoder, entries[0], entries[-1]) for decoder, entries in found.items()]
    return [sentence for sentence in sentences if sentence] or ["No held-out evaluation yet."]


def _sentence(decoder: str, base: Line, last: Line) -> str | None:
    start, end = _number(base.get("accuracy")), _number(last.get("accuracy"))
    if start is None or end is None:
        return None
    where = f" on {last['problems']:,} problems" if isinstance(last.get("problems"), int) else ""
    sentence = f"With {decoder}, held-out accuracy "
    if base is last:
        return f"{sentence}is {end:.1%} ({last['name']}){where}."
    sentence += f"goes from {start:.1%} ({base['name']}) to {end:.1%} ({last['name']})"
    sentence += f": {100 * (end - start):+.1f} points{where}".replace("-", "−")
    worse, better = (base, last) if start < end else (last, base)
    high, low = _number(worse.get("high")), _number(better.get("low"))
    if high is not None and low is not None:
        sentence += f"; the intervals {'do not ' if low > high else ''}overlap"
    return f"{sentence}."


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _fill(title: str, data: Line) -> str:
    """The template with its parts in place; one pass, so that no part is searched for placeholders."""
    folder = resources.files("unveil.report") / "assets"
    text = {name: (folder / name).read_text(encoding="utf-8") for name in _ASSETS}
    style = text["uPlot.min.css"] + text["style.css"]
    plot, script = text["uPlot.iife.min.js"], text["charts.js"] + text["images.js"] + text["app.js"]
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    parts = {
        "title": html.escape(title),
        "policy": f"{policy}; style-src {_hash(style)}; script-src {_hash(plot)} {_hash(script)}",
        "style": style,
        "plot": plot,
        "script": script,
        # No "<" at all: neither "</script" nor "<!--" can then end or swallow the element.
        "data": json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text["template.html"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
