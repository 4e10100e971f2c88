"""`unveil reproduce`: a paper's claim, tried."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

from unveil.cli.output import console, table
from unveil.registry import UserError, did_you_mean

SUMMARY = "run a paper's method against its baseline and judge its claim"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a system, as `unveil systems` lists it")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a shorter run that shows the way, not the claim")
    parser.add_argument(
        "--publish", action="store_true", help="also store the result in this checkout, where `unveil systems` reads it"
    )
    parser.add_argument("--out", metavar="DIR", help="where runs and results go (default: runs/claims/NAME)")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from unveil import claims, systems
    from unveil.cli.models import set_threads

    # A claim bears the name of its system; other modules beside it are shared parts.
    known = {module.name for module in pkgutil.iter_modules(systems.__path__)}
    known &= {module.name for module in pkgutil.iter_modules(claims.__path__)}
    if args.name not in known:
        raise UserError(f"no claim is called {args.name!r}{did_you_mean(args.name, known)}")
    if args.seeds < 1:
        raise UserError(f"--seeds: should be at least 1, got {args.seeds}")
    if args.publish and (args.quick or args.seeds < 3):
        raise UserError("--publish: only a full run of 3 or more seeds (leave out --quick)")
    pages = Path(claims.__path__[0]).parents[2] / "docs" / "claims"
    if args.publish and not pages.is_dir():
        raise UserError(f"--publish: {str(pages)!r} is no folder (allowed: from a checkout that is installed with -e)")
    set_threads()
    out = Path(args.out or f"runs/claims/{args.name}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {str(out)!r} is no folder")
    claim = importlib.import_module(f"unveil.claims.{args.name}")
    started = time.monotonic()
    result: dict[str, Any] = claim.reproduce(seeds=args.seeds, quick=args.quick, out=out, report=_report)
    result |= {
        "seeds": args.seeds,
        "quick": args.quick,
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.monotonic() - started),
    }
    out.mkdir(parents=True, exist_ok=True)
    written = {out / "result.json": json.dumps(result, indent=2, default=str) + "\n", out / "result.md": _page(result)}
    if args.publish:
        stored = Path(claims.__path__[0]) / "results" / f"{args.name}.json"
        written |= {stored: written[out / "result.json"], pages / f"{args.name}.md": written[out / "result.md"]}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    rows = [
        [
            check["name"],
            check["demand"],
            str(check["measured"]),
            "holds" if check["holds"] else "FAILS",
        ]
        for check in result["checks"]
    ]
    people = console(args)
    people.print(table(("check", "demand", "measured", "verdict"), rows))
    people.print(f"cost: {', '.join(f'{key} {value}' for key, value in result['cost'].items())}")
    people.print(f"{args.name}: {result['verdict']}  ({out / 'result.md'})")
    return int(result["verdict"] != "holds"), result


def _page(result: dict[str, Any]) -> str:
    """The result as Markdown: verdict, checks, tables."""
    command = f"unveil reproduce {result['name']} --seeds {result['seeds']}{' --quick' if result['quick'] else ''}"
    rows = [
        f"| {check['name']} | {check['demand']} | {check['measured']} | {'holds' if check['holds'] else '**fails**'} |"
        for check in result["checks"]
    ]
    cost = ", ".join(f"{value:,.0f} {key.replace('_', ' ')}" for key, value in result["cost"].items())
    return "\n".join([
        f"# Claim check: {result['name']}",
        "",
        f"Verdict: **{result['verdict']}**. Written by `{command}` on {result['date']}; cost of all runs: {cost}.",
        "",
        "| check | demand | measured | |",
        "|---|---|---|---|",
        *rows,
        "",
        result["table"].rstrip(),
        "",
    ])  # fmt: skip


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
