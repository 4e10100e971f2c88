"""The file of completions that `unveil eval` writes: JSON lines, the first one the settings, then one completion each.

Completions are written batch by batch. Whatever a killed run leaves behind, cut back to its last whole batch, is the
beginning of the file that an undisturbed run writes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from unveil.registry import UserError
from unveil.tasks.completions import Completion

SETTINGS = "settings"
"""The only key of the first line."""
_SHOWN = 60
"""Characters of a setting that a message shows."""
_NAMES = [field.name for field in fields(Completion)]


class CompletionFile:
    """A new file, or one that a run with the same settings has begun.

    Args:
        path: of the file.
        settings: what tells this evaluation from others; JSON-serialisable.
        plan: per decoder its settings, which go into every line, and the (problem, sample) of all its completions.
        batch_size: completions in a batch; a decoder's last one may be smaller.
        resume: go on with the file if there is one.

    Raises:
        UserError: the file belongs to an evaluation with other settings, or is none of ours.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        plan: Sequence[tuple[dict[str, Any], Sequence[tuple[str, int]]]],
        batch_size: int,
        *,
        resume: bool,
    ) -> None:
        self.path, self.plan, self.batch_size = path, plan, batch_size
        self.done: list[list[Completion]] = [[] for _ in plan]
        """What the file held at the start, by decoder."""
        first = _line({SETTINGS: settings})
        try:
            held = path.read_bytes() if resume and path.exists() else b""
            end = 0 if first.startswith(held) else self._read(held, first, settings)
            with path.open("r+b" if resume and path.exists() else "xb") as file:
                file.truncate(end)
                if end == 0:
                    file.write(first)
                    _flush(file)
        except OSError as error:
            raise UserError(f"--out: {path}: {error.strerror}") from error
        self.broken = False

    def append(self, decoder: int, batch: Sequence[Completion]) -> None:
        """Write a batch in one go. A full disk does not end the evaluation: it goes on without the file."""
        if self.broken:
            return
        lines = b"".join(_line(asdict(one) | self.plan[decoder][0]) for one in batch)
        try:
            with self.path.open("ab") as file:
                file.write(lines)
                _flush(file)
        except OSError as error:
            self.broken = True
            print(f"unveil: warning: {self.path}: {error.strerror}; no more completions are written", file=sys.stderr)

    def _read(self, held: bytes, first: bytes, settings: dict[str, Any]) -> int:
        """Fill ``done``; the byte at which the whole batches end."""
        lines = held.split(b"\n")[:-1]  # the last piece is empty, or a line that was being written
        self._compare(lines[0] if lines else b"", settings)
        end, place = len(first), 1
        for decoder, (own, expected) in enumerate(self.plan):
            for start in range(0, len(expected), self.batch_size):
                wanted = expected[start : start + self.batch_size]
                batch = lines[place : place + len(wanted)]
                if len(batch) < len(wanted):
                    return end
                self.done[decoder] += self._parse(batch, place + 1, wanted, own)
                end, place = end + sum(len(line) + 1 for line in batch), place + len(batch)
        if len(lines) > place:
            raise UserError(f"--resume: {self.path}:{place + 1}: more completions than this evaluation makes")
        return end

    def _compare(self, line: bytes, settings: dict[str, Any]) -> None:
        held = _object(line).get(SETTINGS)
        if not isinstance(held, dict):
            raise UserError(f"--resume: {self.path} is no file of completions by `unveil eval --out`")
        compare(self.path, held, settings)

    def _parse(
        self, batch: Sequence[bytes], number: int, wanted: Sequence[tuple[str, int]], own: dict[str, Any]
    ) -> Iterator[Completion]:
        for line, (problem, sample) in zip(batch, wanted, strict=True):
            record = _object(line)
            expected = {"problem": problem, "sample": sample, **own}
            if not (expected.items() <= record.items() and set(_NAMES) <= set(record)):
                raise UserError(f"--resume: {self.path}:{number}: should be sample {sample} of {problem}")
            number += 1
            yield Completion(**{name: record[name] for name in _NAMES})


def compare(path: Path, held: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on at ``path``, written with the settings ``held``, with other ones.

    Raises:
        UserError: naming the first that differs.
    """
    for key, value in json.loads(json.dumps(settings)).items():
        if held.get(key) != value:
            raise UserError(f"--resume: {path} was written with {key} {_short(held.get(key))}, not {_short(value)}")


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
