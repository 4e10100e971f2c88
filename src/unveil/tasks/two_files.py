"""Tasks whose problems are the rows of two JSON-lines files, or of a data set of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from unveil.tasks.base import Problem, Split, Task
from unveil.tasks.files import choose_rows, read_hub, read_json_lines


@dataclass(kw_only=True)
class TwoFiles(Task):
    """A file to train on, and one to test on whose problems are kept out of the other."""

    keys: ClassVar[tuple[str, ...]]
    """Strings that every row has."""
    hub_path: ClassVar[str]
    hub_config: ClassVar[str | None] = None

    train_file: str | None = None
    """JSON lines (also .gz) to train on; without it the hub's data set (package ``datasets``)."""
    test_file: str | None = None
    """JSON lines (also .gz) to test on; without it the hub's data set. Its problems are kept out of train."""

    def made(self, rows: list[tuple[int, dict[str, Any]]], path: str, split: Split) -> list[Problem]:
        """The problems of numbered rows of ``path``.

        Raises:
            UserError: a row is wrong.
        """
        raise NotImplementedError

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        rows = self._train if split == "train" else self._test
        return choose_rows(rows, split, count, seed, self._path(split) or self.hub_path)

    def _path(self, split: Split) -> str | None:
        return self.train_file if split == "train" else self.test_file

    def _read(self, split: Split) -> list[Problem]:
        path, hub = self._path(split), (self.hub_path, self.hub_config, split, self.keys)
        rows = read_hub(*hub) if path is None else read_json_lines(path, self.keys)
        return self.made(rows, path or self.hub_path, split)

    @cached_property
    def _test(self) -> list[Problem]:
        return self._read("test")

    @cached_property
    def _train(self) -> list[Problem]:
        rows = self._read("train")
        held_out = {problem.prompt for problem in self._test} if self.test_file is not None else set()
        return [problem for problem in rows if problem.prompt not in held_out]
