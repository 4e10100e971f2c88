"""What `unveil pretrain` and `unveil train` share: recipe, progress, interruption, the table at the end."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unveil.cli.output import console, duration, interval, table
from unveil.cli.recipes import find_recipe
from unveil.registry import UserError

RESUMABLE = ("updates", "eval", "checkpoint", "log", "distributed")
"""Keys that a resumed run may change: how long it goes on, how closely it is watched, where it runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both commands."""
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE [key=value ...]",
        help="name (mdpo is mdpo/cpu; mdpo/sudoku) or path of a recipe, and changes such as optim.lr=3e-4",
    )  # fmt: skip
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/RECIPE-DATE-TIME)")
    parser.add_argument(
        "--resume", metavar="RUN",
        help=f"continue a run by its own recipe; only {', '.join(RESUMABLE)} may be changed",
    )  # fmt: skip
    parser.add_argument("--print", action="store_true", dest="show", help="print the merged recipe and stop")
    parser.add_argument("--keys", action="store_true", help="print every key with type, default and meaning, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace, cls: type, program: Callable[..., bool]) -> tuple[int, dict[str, Any]]:
    """Carry out one of the two commands.

    Args:
        cls: the recipe's class.
        program: what runs it, see `unveil.training.runs`.
    """
    from unveil.cli.models import set_threads

    if args.keys and not args.words and not args.resume:
        return _print_keys(args, cls, None)
    name, recipe = _recipe(args, cls)
    if args.keys:
        return _print_keys(args, cls, recipe)
    if args.show:
        return _print_recipe(recipe)
    set_threads()
    if args.resume:
        folder = Path(args.resume)
    else:
        folder = Path(args.run or _agreed(f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"))
    status, answer = _fit(args, recipe, program, folder)
    if status == 0 and _is_main():
        answer |= _finish(args, folder)
    return status, answer


def has_key(args: argparse.Namespace, key: str) -> bool:
    """Whether the recipe has a part of that name; False where no recipe can be read: `run` then says what is wrong."""
    from unveil.recipe import load

    names = [word for word in args.words if "=" not in word]
    try:
        path = Path(args.resume) / "recipe.yaml" if args.resume else find_recipe(names[0]) if names else None
        return path is not None and key in load(path)
    except UserError:
        return False


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _agreed(name: str) -> str:
    """The main process's name: the clock may strike between two of them."""
    from unveil.training.distribution import Ranks

    return Ranks().agree(name)


def _recipe(args: argparse.Namespace, cls: type) -> tuple[str, Any]:
    """A name for the run folder, and the recipe."""
    from unveil.recipe import build, load

    names = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]
    if len(names) > 1 or (names and args.words[0] != names[0]):
        raise UserError(f"{names[-1]!r} is no override (RECIPE comes first, then key=value)")
    if args.resume:
        path, name = Path(args.resume) / "recipe.yaml", ""
        if args.run or names:
            extra = "--run" if args.run else repr(names[0])
            raise UserError(f"--resume: {args.resume!r} brings its own recipe and folder, leave {extra} out")
        if not path.is_file():
            raise UserError(f"--resume: {args.resume!r} is no run folder (it has no recipe.yaml)")
        for override in overrides:
            if override.partition("=")[0].split(".")[0] not in RESUMABLE:
                raise UserError(f"{override!r} cannot be changed in a resumed run (allowed: {', '.join(RESUMABLE)})")
    elif names:
        path, name = find_recipe(names[0]), names[0].removesuffix("/cpu").replace("/", "-")
        name = path.stem if path == Path(names[0]) else name
    else:
        raise UserError("RECIPE: required, but missing (or --resume RUN)")
    data = load(path, overrides)
    kinds = {"policy": "train", "data": "pretrain", "sampler": "decode --recipe"}
    found = [command for key, command in kinds.items() if key in data]
    if len(found) == 1 and (other := found[0]) != args.command:
        raise UserError(f"{path}: a recipe for `unveil {other}`, not for `unveil {args.command}`")
    return name, build(cls, data)


def _print_recipe(recipe: Any) -> tuple[int, dict[str, Any]]:
    from unveil.recipe import dump, to_yaml

    print(to_yaml(recipe), end="")
    return 0, {"recipe": dump(recipe)}


def _print_keys(args: argparse.Namespace, cls: type, recipe: Any) -> tuple[int, dict[str, Any]]:
    from unveil.recipe_keys import describe

    keys = describe(cls, recipe)
    out = console(args)
    for key in keys:
        out.print(f"{key.path} ({key.type}): {'required' if key.default is None else key.default}")
        if key.doc:
            out.print(f"    {key.doc}")
    return 0, {"keys": [dataclasses.asdict(key) for key in keys]}


def _fit(
    args: argparse.Namespace, recipe: Any, program: Callable[..., bool], folder: Path
) -> tuple[int, dict[str, Any]]:
    """Run the program; a new folder that is left without a checkpoint is removed."""
    from unveil.cli.progress import Progress
    from unveil.training.checkpoints import list_checkpoints
    from unveil.training.distribution import RankLost
    from unveil.training.rewarding import RewardsLost
    from unveil.training.trainer import NumericalError

    fresh = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    bar = Progress("update", recipe.updates, quiet=args.quiet or not _is_main())

    def show(update: int, metrics: dict[str, Any]) -> None:
        names = ("reward", "accuracy") if "reward" in metrics else ("loss",)
        bar.show(update, "  ".join(f"{name} {metrics[name]:.3f}" for name in names))

    def tidy() -> bool:
        """Whether there is something to resume from."""
        if list_checkpoints(folder / "checkpoints"):
            return True
        if fresh and _is_main():
            shutil.rmtree(folder, ignore_errors=True)
        return False

    if not args.quiet and _is_main():
        print(f"run folder: {folder}", file=sys.stderr)
    try:
        with bar:
            finished = program(recipe, folder, resume=bool(args.resume), progress=show)
    except (NumericalError, RewardsLost) as error:
        print(f"unveil: error: {error}", file=sys.stderr)
        return 1, {"run": str(folder), "status": "failed", "error": str(error)}
    except RankLost as error:
        command = f"unveil {args.command} --resume {folder}" if tidy() else None
        after = f"continue with: {command}" if command else "there is no checkpoint yet, nothing to resume"
        print(f"unveil: error: {error}; {after}", file=sys.stderr)
        return 1, {"run": str(folder), "status": "failed", "error": str(error), "resume": command}
    except UserError:
        tidy()
        raise
    except KeyboardInterrupt:
        finished = False
    if finished:
        return 0, {"run": str(folder), "status": "finished", "model": str(folder / "model")}
    if not tidy():
        _say("unveil: interrupted before the first checkpoint, nothing to resume")
        return 130, {"run": None, "status": "interrupted", "resume": None}
    command = f"unveil {args.command} --resume {folder}"
    _say(f"unveil: interrupted; continue with: {command}")
    return 130, {"run": str(folder), "status": "interrupted", "resume": command}


def _say(line: str) -> None:
    if _is_main():
        print(line, file=sys.stderr)


def _finish(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Table, report page and cost of a finished run."""
    from unveil.report.page import write_page
    from unveil.training.checkpoints import write_text

    out = console(args)
    results = evaluation_table(folder / "metrics.jsonl")
    if results is not None:
        write_text(folder / "table.json", json.dumps(results, indent=2) + "\n")
        numbers = zip(*(results[key] for key in ("rows", "accuracy", "low", "high")), strict=True)
        cells = [[name, *map(interval, *values)] for name, *values in numbers]
        out.print(f"accuracy in % on {results['problems']} held-out problems, with 95 % intervals")
        out.print(table(("", *results["columns"]), cells, numbers=results["columns"]))
    cost = json.loads((folder / "run.json").read_text(encoding="utf-8"))["cost"]
    out.print(
        f"cost: {cost['optimizer_steps']:,} optimiser steps, {cost['rollouts']:,} rollouts, "
        f"{cost['forwards']:,} sequence forwards, {duration(cost['seconds'])}"
    )
    report = write_page(folder)
    out.print(f"model:  {folder / 'model'}")
    out.print(f"report: {report}")
    return {"table": results, "cost": cost, "report": str(report)}


def evaluation_table(metrics: Path) -> dict[str, Any] | None:
    """First against last evaluation per decoder, as the report page reads it; None without evaluations."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "eval" and "accuracy" in line:  # a held-out loss has none
            found.setdefault(line["decoder"], {})[line["step"]] = line
    if not found:
        return None
    ends = [
        [by_step[min(by_step)] for by_step in found.values()],
        [by_step[max(by_step)] for by_step in found.values()],
    ]
    values = {key: [[line[key] for line in row] for row in ends] for key in ("accuracy", "low", "high")}
    return {"rows": ["base", "tuned"], "columns": list(found), **values, "problems": ends[1][0]["problems"]}
