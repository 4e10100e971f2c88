"""Which samples are held back by the regularisers: all of them, or only those that a gate picks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from unveil.registry import Plugin


class Gate(Plugin, family="gate"):
    """Factors of the samples of an update in the regularisers, from rewards that are optimised and others that are
    not."""

    reads_audits: ClassVar[bool] = True
    """True if it needs parts of a sum of rewards that have the role ``audit``."""

    def factors(self, rewards: Tensor, audits: Mapping[str, Tensor], group: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Factors (B,) >= 0, and numbers for the log.

        Args:
            rewards: (B,) what is optimised, of finished samples.
            audits: (B,) per audit, larger is better; nan where it has no score.
            group: (B,) integer ids of the prompts' groups.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of gates that remember earlier updates."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
