from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from unveil.recipe_keys import Key, describe
from unveil.samplers.schedules import Even, Power, Schedule


@dataclass(kw_only=True)
class Base:
    lr: Annotated[float, Field(gt=0, le=1)]
    """Learning rate,
    at its peak."""
    betas: tuple[float, ...] = (0.9, 0.99)


@dataclass(kw_only=True)
class Optim(Base):
    kind: Literal["adam", "sgd"] = "adam"
    """Which one."""
    betas: tuple[float, ...] = (0.5,)
    steps: Annotated[list[int], Field(min_length=1)] | None = None
    """Not the doc of betas."""


@dataclass(kw_only=True)
class Job:
    optim: Optim
    schedule: Schedule = field(default_factory=Power)
    """How many."""
    needed: Schedule
    maybe: Power | None = None
    many: list[Schedule] = field(default_factory=list)
    out: Path = Path("runs")
    hidden: int = field(init=False, default=3)


SCHEDULES = "cosine | doubling | even | exponential | linear | log | power"


def rows(keys: Sequence[Key]) -> list[tuple[str, str, str | None, str]]:
    return [(key.path, key.type, key.default, key.doc) for key in keys]


def test_keys_of_a_class_with_type_default_and_docstring():
    described = rows(describe(Job))
    exponent = described[5]
    assert (exponent[0], exponent[1], exponent[2]) == ("schedule.k", "float", "2.0")
    assert exponent[3].startswith("Exponent")
    del described[5]
    assert described == [
        ("optim.lr", "float > 0, <= 1", None, "Learning rate, at its peak."),
        ("optim.betas", "tuple[float, ...]", "[0.5]", ""),
        ("optim.kind", "adam | sgd", '"adam"', "Which one."),
        ("optim.steps", "list[int] length >= 1 | null", "null", "Not the doc of betas."),
        ("schedule", SCHEDULES, "power", "How many."),
        ("needed", SCHEDULES, None, ""),
        ("maybe", "power | null", "null", ""),
        ("many", f"list[{SCHEDULES}]", "[]", ""),
        ("out", "Path", '"runs"', ""),
    ]


def test_a_recipe_shows_its_own_values_and_plugins():
    recipe = Job(optim=Optim(lr=0.5), needed=Power(k=3.0), schedule=Even(), many=[Even(), Power()], maybe=Power(k=4.0))
    assert [(key.path, key.default) for key in describe(Job, recipe)] == [
        ("optim.lr", "0.5"),
        ("optim.betas", "[0.5]"),
        ("optim.kind", '"adam"'),
        ("optim.steps", "null"),
        ("schedule", "even"),
        ("needed", "power"),
        ("needed.k", "3.0"),
        ("maybe", "power"),
        ("maybe.k", "4.0"),
        ("many", "[...]"),
        ("many.0", "even"),
        ("many.1", "power"),
        ("many.1.k", "2.0"),
        ("out", '"runs"'),
    ]


def test_a_required_list_of_parts_and_a_class_without_source():
    made = make_dataclass("made", [("many", list[Schedule]), ("x", int, 3)])
    assert rows(describe(made)) == [("many", f"list[{SCHEDULES}]", None, ""), ("x", "int", "3", "")]
