"""What commands print: tables and text for people, one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 200
"""Columns of a table that goes into a file or pipe, where nothing needs to fit a window."""
_SHORT = 24
"""Characters of a text that is kept on one line."""


def console(args: argparse.Namespace) -> Console:
    """Where people's output goes: stdout, or stderr with ``--json``."""
    stream = sys.stderr if args.json else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> Table:
    """A table of plain text; the columns named in ``numbers`` are set flush right."""
    made = Table(header_style="bold")
    for place, column in enumerate(columns):
        longest = max((len(row[place]) for row in rows), default=0)
        # In a narrow window long texts give way: names and numbers over two lines cannot be read.
        width = longest if column in numbers or longest <= _SHORT else None
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        made.add_column(column, justify=justify, min_width=width, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def print_json(answer: dict[str, Any]) -> None:
    """One line of JSON on stdout; nan and infinities, which JSON does not have, become null."""
    finite = json.loads(json.dumps(answer, default=str), parse_constant=lambda _: None)
    line = json.dumps(finite, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which a file's name may hold
        line = json.dumps(finite)
    print(line, flush=True)


def one_line(text: str) -> str:
    """The text with line breaks and control characters, which a terminal would obey, written as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def interval(share: float, low: float, high: float) -> str:
    """A share and its interval in percent: ``46.3 (42.0-50.6)``."""
    return f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
