"""Folders that are whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unveil.registry import UserError
from unveil.training.checkpoints import list_checkpoints, load_state, save_checkpoint, write_folder, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(text: str, crash: bool = False) -> Callable[[Path], None]:
    def fill(draft: Path) -> None:
        (draft / "inner").mkdir()
        (draft / "inner" / "file").write_text(text)
        if crash:
            raise OSError("disk full")

    return fill


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "model", write("one"))
    assert (tmp_path / "deep" / "model" / "inner" / "file").read_text() == "one"
    assert names(tmp_path / "deep") == {"model"}


def test_a_crash_while_filling_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", write("half", crash=True))
    assert not (tmp_path / "model").exists()
    write_folder(tmp_path / "model", write("one"))  # what the crash left behind is in nobody's way
    assert names(tmp_path) == {"model"}


def test_a_crash_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", write("one"))
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", write("two", crash=True))
    assert (tmp_path / "model" / "inner" / "file").read_text() == "one"
    write_folder(tmp_path / "model", write("three"))
    assert (tmp_path / "model" / "inner" / "file").read_text() == "three"
    assert names(tmp_path) == {"model"}


def save(folder: Path, update: int, keep: int = 2) -> None:
    def model(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text(str(update))

    save_checkpoint(folder, update, model, {"update": update, "w": torch.full((2,), update)}, keep=keep)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for update in (5, 10, 999, 1000, 12345):
        save(tmp_path, update, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-000999", "update-001000", "update-012345"]
    assert names(tmp_path) == {"update-000999", "update-001000", "update-012345"}
    assert (tmp_path / "update-001000" / "model" / "weights").read_text() == "1000"
    assert load_state(tmp_path / "update-001000")["w"].tolist() == [1000, 1000]


def test_a_crash_while_saving_deletes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def fail(path: Path) -> None:
        path.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 3, fail, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-000001", "update-000002"]


def test_drafts_and_folders_without_state_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".draft-update-000009").mkdir()
    (tmp_path / ".draft-update-000009" / "state.pt").write_bytes(b"half")
    (tmp_path / "update-000008" / "model").mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-000001"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_broken_state_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_state(tmp_path)
    save(tmp_path, 1)
    file = tmp_path / "update-000001" / "state.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"state\.pt: not a readable checkpoint") as caught:
        load_state(tmp_path / "update-000001")
    assert "\n" not in str(caught.value)


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("touched"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    torch.save({"update": 1, "evil": Payload()}, tmp_path / "update-000001" / "state.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_state(tmp_path / "update-000001")
    assert not (tmp_path / "touched").exists()


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "ä")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "ä" and names(tmp_path) == {"a.json"}
