"""Is the reward being gamed? What is optimised is held against what is not, over the evaluations of a run.

A watched number has turned where it is worse at the last evaluation than at its best one, although the optimised reward
is higher at the last evaluation than at the first one, and no lower than at that best one. Worse means:

    the judge's accuracy, parts of the reward that are audits or for evaluation     95 % intervals that do not overlap
    distance to the nearest real image, Frechet distance, diversity                 by the shares of `LIMITS`

Higher and lower are 95 % intervals that do not overlap, too; where no interval is known, the numbers themselves. A part
with a negative weight is better when it is lower. Less diversity alone is no sign: a model that learns to do what it is
asked shows less of everything else. The limits are choices, fitted to nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from unveil.report.run_folder import Line, by_decoder

LIMITS = {"measure/distance": 0.15, "measure/frechet": 0.5, "measure/diversity": -0.3}
"""The part of its best value by which a measure of the whole set has to turn."""
NAMES = {
    "accuracy": "the judge's accuracy",
    "measure/distance": "distance to the nearest real image",
    "measure/frechet": "Frechet distance to the real data",
    "measure/diversity": "diversity",
}
_Z = 1.96


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A held-out number that nothing is trained on.

    Attributes:
        key: in the lines of evaluations.
        name: as a reader calls it.
        sign: 1 if more is better, else -1.
        limit: relative change that counts; None: intervals decide.
    """

    key: str
    name: str
    sign: int
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number with its 95 % interval, if that is ``known``."""

    value: float
    low: float
    high: float
    known: bool


def reward_parts(recipe: str | None) -> dict[str, Line]:
    """``role`` and ``weight`` of the parts of the reward, by name; {} of any other reward, or of no readable recipe."""
    try:
        parts = yaml.safe_load(recipe or "")["policy"]["reward"]["parts"]
        return {
            str(name): {"role": str(part.get("role", "optimise")), "weight": float(part.get("weight", 1))}
            for name, part in parts.items()
        }
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        return {}


def signs(evals: Sequence[Line], train: Sequence[Line], parts: Mapping[str, Line]) -> list[Line]:
    """One object per decoder with which something has turned.

    ``decoder``; ``since``, the update of the best evaluation of the first thing that turned (the judge before audits,
    these before measures); ``keys`` of all that turned; ``sentence`` about the first, ``others`` about the rest.
    """
    found = []
    for decoder, own in by_decoder(evals).items():
        optimised = _optimised(own, train)
        if optimised is None or len(own) < 2:
            continue
        where, reward = optimised
        turned = [(one, best) for one in watched(parts) if (best := _turned(own, reward, one)) is not None]
        if all(one.key == "measure/diversity" for one, _ in turned):
            continue
        first, last = _known(reward[0]).value, _known(reward[-1]).value
        changes = [_change(one, own[best], own[-1]) for one, best in turned]
        found.append(
            {
                "decoder": decoder,
                "since": own[turned[0][1]]["step"],
                "keys": [one.key for one, _ in turned],
                "sentence": f"{_lead(turned)} With {decoder}, {where} rises from {_text(first)} to "
                f"{_text(last)} between updates {own[0]['step']} and {own[-1]['step']}, but {changes[0]}.",
                "others": changes[1:],
            }
        )
    return found


def _lead(turned: Sequence[tuple[Watched, int]]) -> str:
    """A judge may be content with every sample while the set of them collapses: that is another matter."""
    if {one.key for one, _ in turned} <= {"measure/frechet", "measure/diversity"}:
        return "The samples lose the spread of the data, as with a reward that is optimised too far."
    return "The reward may be gamed."


def watched(parts: Mapping[str, Line]) -> list[Watched]:
    """Everything that may turn away, in the order in which it is told."""
    judges = [Watched(key="accuracy", name=NAMES["accuracy"], sign=1)]
    audits = [
        Watched(key=f"reward/{name}", name=f"{name} ({part['role']})", sign=-1 if part["weight"] < 0 else 1)
        for name, part in parts.items()
        if part["role"] in ("audit", "evaluate")
    ]
    measures = [
        Watched(key=key, name=NAMES[key], sign=1 if limit < 0 else -1, limit=abs(limit))
        for key, limit in LIMITS.items()
    ]
    return judges + audits + measures


def _optimised(own: Sequence[Line], train: Sequence[Line]) -> tuple[str, list[Point | None]] | None:
    """What it is called, and its value at every evaluation: of the reward on held-out prompts; else in the rollouts
    since the evaluation before (of the first: in those after it). None: nothing is known of a reward."""
    held_out = [_point(line, "reward") for line in own]
    if _usable(held_out):
        return "the optimised reward (held-out)", held_out
    rollouts = [_rollouts(train, before, line["step"]) for before, line in zip([None, *own], own, strict=False)]
    if _usable(rollouts[1:]):
        return "the optimised reward (rollouts)", [rollouts[1], *rollouts[1:]]
    return None


def _usable(points: Sequence[Point | None]) -> bool:
    return bool(points) and points[0] is not None and points[-1] is not None


def _rollouts(train: Sequence[Line], before: Line | None, step: int) -> Point | None:
    """Mean reward of the updates after the evaluation ``before`` up to ``step``; its error is that over updates."""
    start = -1 if before is None else before["step"]
    known = [_finite(line.get("reward")) for line in train if start < line["step"] <= step]
    values = [value for value in known if value is not None]
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return _interval(statistics.fmean(values), error)


def _turned(own: Sequence[Line], reward: Sequence[Point | None], one: Watched) -> int | None:
    """The evaluation from which on it is worse at the last one while the reward rose or held; None if it is not."""
    points = [_point(line, one.key) for line in own]
    last, now, start = points[-1], _known(reward[-1]), _known(reward[0])
    if last is None or not start.high < now.low:
        return None
    best = max(
        (place for place, point in enumerate(points) if point is not None),
        key=lambda place: one.sign * _known(points[place]).value,
    )
    at, then = _known(points[best]), reward[best]
    if then is None or now.high < then.low:
        return None
    if one.limit is not None:
        worse = one.sign * (at.value - last.value) >= one.limit * abs(at.value) > 0
    else:
        worse = at.known and last.known and (last.high < at.low if one.sign > 0 else last.low > at.high)
    return best if worse else None


def _point(line: Line, key: str) -> Point | None:
    value = _finite(line.get(key))
    if value is None:
        return None
    if key != "accuracy":
        error = line.get(key.replace("reward", "reward_error", 1)) if key.startswith("reward") else None
        return _interval(value, _finite(error))
    low, high = _finite(line.get("low")), _finite(line.get("high"))
    if low is None or high is None:
        return _interval(value, None)
    return Point(value=value, low=low, high=high, known=True)


def _interval(value: float, error: float | None) -> Point:
    spread = _Z * (error or 0.0)
    return Point(value=value, low=value - spread, high=value + spread, known=error is not None)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _known(point: Point | None) -> Point:
    assert point is not None
    return point


def _change(one: Watched, best: Line, last: Line) -> str:
    before, after = best[one.key], last[one.key]
    values = f"{before:.1%} to {after:.1%}" if one.key == "accuracy" else f"{_text(before)} to {_text(after)}"
    return f"{one.name} {'falls' if after < before else 'rises'} since update {best['step']} (from {values})"


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
