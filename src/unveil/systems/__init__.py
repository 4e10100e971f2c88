"""One file per paper: only what is that paper's own, then its composition of shared parts.

The modules of this package are the table of contents: each holds a ``SYSTEM`` that says what it is, and is found under
the same name in ``claims/`` and ``recipes/``.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class System:
    """What `unveil systems` tells of a system.

    Attributes:
        name: the file's name.
        title: of the paper.
        paper: arXiv id.
        family: ``masked``, ``image``, ``control`` ...
        claim: what the paper says it does, in one line.
        checked_in: for a baseline, the system whose claim check measures it; "" for systems with a check of their own.
    """

    name: str
    title: str
    paper: str
    family: str
    claim: str
    checked_in: str = ""


def catalogue() -> list[System]:
    """All systems, by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return sorted((module.SYSTEM for module in modules), key=lambda system: system.name)
