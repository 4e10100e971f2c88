from __future__ import annotations

import re
from pathlib import Path

import pytest

from unveil.registry import UserError
from unveil.tasks.files import choose_rows, read_csv, read_json_lines


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    return path


def refusal(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message with the folder cut off; it must be one line."""
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return re.sub(r"^.*data\.txt", "data.txt", message)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n  \n"])
def test_json_lines(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"a": "x", "n": 1}\r\n{"a": "\xc3\xa9"}' + end)
    assert read_json_lines(path, ["a"]) == [(1, {"a": "x", "n": 1}), (2, {"a": "é"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.txt: the file is empty"),
        (b" \n\n", "data.txt: the file is empty"),
        (b'{"a": "x"}\n\n{"a": "y"}', "data.txt:2: blank line"),
        (b'\n{"a": "x"}', "data.txt:1: blank line"),
        (b'{"a": "x"}\n{"a": ', "data.txt:2: not valid JSON"),
        (b"[" * 100_000, "data.txt:1: not valid JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "data.txt:1: not valid JSON"),
        (b'{"a": "x"}\n["a"]', 'data.txt:2: expected a JSON object, got ["a"]'),
        (b'{"b": "x"}', "data.txt:1: key 'a' is missing (required: a, b)"),
        (b'{"a": "x", "b": 3}', "data.txt:1: 'b' must be a string, got 3"),
        (b'{"a": null, "b": "x"}', "data.txt:1: 'a' must be a string, got null"),
        (b'{"a": "x", "b": "y"}\n{"a": "\xff"}', "data.txt:2: not UTF-8 text"),
        ('{"a": "x"}'.encode("utf-16"), "data.txt:1: not UTF-8 text"),
    ],
)
def test_broken_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_json_lines(write(tmp_path, content), ["a", "b"] if b'"b"' in content else ["a"])
    assert refusal(error).startswith(message)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n"])
def test_csv(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path, b'\xef\xbb\xbfA,B,C\r\n1,"2, 3",\n"4\n\n5",6,7' + end)
    assert read_csv(path, ["B", "A"]) == [
        (2, {"A": "1", "B": "2, 3", "C": ""}),
        (5, {"A": "4\n\n5", "B": "6", "C": "7"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.txt: the file is empty"),
        (b"A,B\n", "data.txt: no rows below the header"),
        (b"A,C\n1,2", "data.txt:1: column 'B' is missing (required: A, B)"),
        (b"A,B\n1,2\n\n3,4", "data.txt:3: blank line"),
        (b"A,B\n1,2\n3", "data.txt:3: 1 fields, the header has 2"),
        (b"A,B\n1,2,3", "data.txt:2: 3 fields, the header has 2"),
        (b'A,B\n1,"2', "data.txt:2: not valid CSV"),
        (b'A,B\n1,"2"3', "data.txt:2: not valid CSV"),
        (b"A,B\n1,2\n1,\xff", "data.txt:3: not UTF-8 text"),
    ],
)
def test_broken_csv(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_csv(write(tmp_path, content), ["A", "B"])
    assert refusal(error).startswith(message)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        read_csv(tmp_path / "absent.csv", ["A"])
    with pytest.raises(UserError, match="cannot be read"):
        read_json_lines(tmp_path, ["A"])
    with pytest.raises(UserError, match="cannot be read"):
        read_json_lines("nul\0l", ["A"])


def test_choice_of_rows() -> None:
    rows = list(range(100))
    assert choose_rows(rows, "test", 10, 3, "f") == rows[:10]
    chosen = choose_rows(rows, "train", 10, 3, "f")
    assert len(set(chosen)) == 10
    assert chosen == choose_rows(rows, "train", 10, 3, "f") != choose_rows(rows, "train", 10, 4, "f")
    assert sorted(choose_rows(rows, "train", 100, 3, "f")) == rows != choose_rows(rows, "train", 100, 3, "f")
    with pytest.raises(UserError, match="f: holds 100 different test problems, 101 were asked for"):
        choose_rows(rows, "test", 101, 0, "f")


def test_half_a_surrogate_pair_of_an_escape_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "a\\uDC80b", "list": ["\\ud83d\\ude00", "\\ud83d"]}\n')
    [(_, row)] = read_json_lines(path, ["prompt"])
    assert row == {"prompt": "a\ufffdb", "list": ["\U0001f600", "\ufffd"]}
