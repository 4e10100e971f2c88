"""The command line.

Every command is a module of this package with ``SUMMARY``, ``add_arguments(parser)`` and ``run(args)``, which
returns the exit status and what ``--json`` prints. Only ``run`` imports torch, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from unveil import __version__
from unveil.cli.output import print_json
from unveil.registry import UserError

COMMANDS = ("systems", "plan", "pretrain", "train", "decode", "eval", "score", "diagnose", "reproduce", "bench", "view")
DONE, FELL_SHORT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, 0, 1, 2 or 130 (see `parse`)."""
    try:
        args = parse(argv)
    except SystemExit as stop:  # argparse has printed help (0) or what is wrong (2)
        return int(stop.code or DONE)
    # The working folder, where a user's `package.module:Class` lives, is not on a console script's path.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        status, answer = args.carry_out(args)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"unveil: error: {line}", file=sys.stderr)
        status, answer = BAD_INPUT, {"error": str(error)}
    except KeyboardInterrupt:
        print("unveil: interrupted", file=sys.stderr)
        status, answer = INTERRUPTED, {"error": "interrupted"}
    except BrokenPipeError:  # `unveil decode ... | head`: nobody reads on, and the flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FELL_SHORT
    if args.json and os.environ.get("RANK", "0") == "0":
        print_json(answer)
    return status


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one command, with ``carry_out`` set to its function."""
    parser = argparse.ArgumentParser(
        prog="unveil", description="Policy optimisation of diffusion models.", allow_abbrev=False,
        epilog="exit status: 0 done, 1 a claim or check fell short, 2 bad input, 130 interrupted",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"unveil {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"unveil.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        command.set_defaults(carry_out=module.run, parser=command)
    args, rest = parser.parse_known_args(argv)
    # argparse hands key=value words that stand behind an option back as unknown.
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args


if __name__ == "__main__":
    sys.exit(main())
