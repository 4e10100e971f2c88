"""`unveil bench`: speed and memory as ratios."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

from unveil.cli.output import console
from unveil.registry import UserError, did_you_mean

SUMMARY = "measure speed and memory against reference loops, as ratios in one run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what to measure: rollout")
    parser.add_argument("--model", metavar="MODEL", help="the network (default: a small random one)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="pairs of turns (default: 7)")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil import bench
    from unveil.cli.models import open_model, set_threads

    known = [module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_")]
    if args.name not in known:
        raise UserError(f"no bench is called {args.name!r}{did_you_mean(args.name, known)}")
    if args.repeats < 1:
        raise UserError(f"--repeats: should be at least 1, got {args.repeats}")
    set_threads()
    model = None if args.model is None else open_model(args.model)
    module = importlib.import_module(f"unveil.bench.{args.name}")
    result: dict[str, Any] = module.run(model=model, repeats=args.repeats)
    console(args).print(module.render(result))
    return int(not result["holds"]), result
