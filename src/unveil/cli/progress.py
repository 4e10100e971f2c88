"""How far a long command is: a bar in a terminal, a line now and then anywhere else. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from unveil.cli.output import duration

EVERY = 5.0
"""Seconds between two lines where stderr is no terminal."""


class Progress:
    """``with Progress("update", 300) as progress: progress.show(12, "reward 0.41")``."""

    def __init__(self, unit: str, total: int, *, quiet: bool = False) -> None:
        self.unit, self.total, self.quiet = unit, total, quiet
        self.bar: Bar | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (
                TextColumn(unit),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self.task = self.bar.add_task(unit, total=total, text="")
        self.first: tuple[int, float] | None = None
        self.printed = -EVERY

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, text: str = "") -> None:
        """Say that ``done`` units are finished; ``text`` tells how they went."""
        if self.quiet:
            return
        now = time.monotonic()
        if self.first is None:
            # What came before (updates before a resume, the first evaluation) says nothing about speed.
            self.first = done, now
        begun, since = self.first
        if begun < done:
            left = (now - since) / (done - begun) * (self.total - done)
            text = f"{text}  {duration(left)} left".strip()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
        elif now - self.printed >= EVERY or done == self.total:
            self.printed = now
            print(f"{self.unit} {done}/{self.total}  {text}".rstrip(), file=sys.stderr, flush=True)
