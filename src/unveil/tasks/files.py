"""Readers of data files. Whatever is wrong with a file is a `UserError` with path and line number."""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from unveil.denoisers.tokenizer import whole
from unveil.registry import UserError
from unveil.tasks.base import Split

Row = TypeVar("Row")


def read_json_lines(path: str | Path, required_keys: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every line of a JSON-lines file.

    Raises:
        UserError: the file is missing, empty or not UTF-8; a line is blank (but at the end), broken JSON or
            no object; a required key is missing or its value is not a string.
    """
    rows = []
    required = ", ".join(required_keys)
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            raise UserError(f"{path}:{number}: blank line (allowed only at the end of the file)")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        if "\\ud" in line.lower():  # maybe half a pair, which could not be written to any log
            row = json.loads(whole(json.dumps(row, ensure_ascii=False)))
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {_short(json.dumps(row))}")
        for key in required_keys:
            if key not in row:
                raise UserError(f"{path}:{number}: key {key!r} is missing (required: {required})")
            if not isinstance(row[key], str):
                value = _short(json.dumps(row[key]))
                raise UserError(f"{path}:{number}: {key!r} must be a string, got {value}")
        rows.append((number, row))
    return rows


def read_text_lines(path: str | Path) -> list[tuple[int, str]]:
    """Line number (from 1) and text of every line that is not blank, without the spaces around it.

    Raises:
        UserError: the file is missing, empty or not UTF-8.
    """
    return [(number, line.strip()) for number, line in enumerate(_read_lines(path), start=1) if line.strip()]


def read_json_list(path: str | Path) -> list[Any]:
    """The entries of a file that is one JSON list.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or holds no JSON list.
    """
    try:
        rows = json.loads("\n".join(_read_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list, got {_short(json.dumps(rows))}")
    return rows


def read_csv(path: str | Path, required_columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number (from 1, the header's) and fields by column name of every row of a CSV file with a header.

    Raises:
        UserError: the file is missing, empty or not UTF-8; it has a header only; a column is missing; a row
            is blank (but at the end), has broken quotes or another number of fields than the header.
    """
    required = ", ".join(required_columns)
    reader = csv.reader((line + "\n" for line in _read_lines(path)), strict=True)
    rows = []
    try:
        header = next(reader)
        for column in required_columns:
            if column not in header:
                raise UserError(f"{path}:1: column {column!r} is missing (required: {required})")
        for fields in reader:
            if not "".join(fields).strip():
                raise UserError(f"{path}:{reader.line_num}: blank line (allowed only at the end of the file)")
            if len(fields) != len(header):
                got = f"{len(fields)} fields, the header has {len(header)}"
                raise UserError(f"{path}:{reader.line_num}: {got}")
            rows.append((reader.line_num, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    return rows


def read_hub(
    path: str, config: str | None, split: Split, required_keys: Sequence[str]
) -> list[tuple[int, dict[str, Any]]]:
    """Row number (from 1) and row of a data set of the Hugging Face hub.

    Raises:
        UserError: ``datasets`` is not installed, the data set cannot be read, or a required string is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        message = "name a local file (train_file, test_file) or pip install 'unveil[hub]'"
        raise UserError(f"{path}: the extra is not installed; {message}") from error
    try:
        rows = [(number, dict(row)) for number, row in enumerate(load_dataset(path, config, split=split), start=1)]
    except Exception as error:
        raise UserError(f"{path}: the {split} split cannot be read: {_short(str(error).strip())}") from error
    for number, row in rows:
        for key in required_keys:
            if not isinstance(row.get(key), str):
                raise UserError(f"{path}:{number}: {key!r} must be a string")
    return rows


def choose_rows(rows: Sequence[Row], split: Split, count: int, seed: int, path: str | Path) -> list[Row]:
    """``count`` rows of a data file: a random choice seeded by ``seed`` for train, the first ones for test.

    Raises:
        UserError: there are fewer rows.
    """
    if count > len(rows):
        raise UserError(f"{path}: holds {len(rows)} different {split} problems, {count} were asked for")
    if split == "test":
        return list(rows[:count])
    return random.Random(f"rows/{seed}").sample(rows, count)


def _read_lines(path: str | Path) -> list[str]:
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason}") from error
    if lines == [""]:
        raise UserError(f"{path}: the file is empty")
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
