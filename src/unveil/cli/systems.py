"""`unveil systems`: what there is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from unveil.cli.output import console, duration, table

SUMMARY = "list all systems with paper, family, recipes, claim and the last verdict"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only ``--json``, which every command has."""


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil import claims
    from unveil.cli.recipes import recipe_names
    from unveil.systems import catalogue

    folder = Path(claims.__path__[0])
    systems = []
    for system in catalogue():
        systems.append({
            "name": system.name,
            "title": system.title,
            "paper": f"arXiv {system.paper}",
            "family": system.family,
            "recipe": recipe_names(system.name),
            "claim": system.claim,
            "checked_in": system.checked_in or None,
            "reproducible": (folder / f"{system.name}.py").is_file(),
            **_last_result(folder / "results" / f"{system.name}.json"),
        })  # fmt: skip
    rows = [
        [
            entry["name"],
            entry["paper"].removeprefix("arXiv "),
            entry["family"],
            ", ".join(name.partition("/")[2] for name in entry["recipe"]) or "-",
            _verdict(entry),
            entry["claim"],
        ]
        for entry in systems
    ]
    columns = ("system", "arXiv", "family", "recipes", "verdict", "claim")
    console(args).print(table(columns, rows))
    return 0, {"systems": systems}


def _last_result(path: Path) -> dict[str, Any]:
    """Verdict, date, seconds and counted cost of the stored run of a claim; None each where there is none."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: stored.get(key) for key in ("verdict", "date", "seconds", "cost")}


def _verdict(entry: dict[str, Any]) -> str:
    if entry["checked_in"]:
        return f"baseline, measured in {entry['checked_in']}"
    if entry["verdict"] is None:
        return "not yet judged"
    counted = [f"{entry['cost'][key]:,.0f} {key}" for key in ("rollouts", "forwards") if entry["cost"].get(key)]
    return ", ".join([entry["verdict"], entry["date"], duration(entry["seconds"]), *counted])
