"""Transforms of scores: a stage between *score* and *decide* that changes which proposals look certain.

The first one, EOSER, is in ``systems/cj_grpo.py``.
"""

from __future__ import annotations

from torch import Tensor

from unveil.denoisers.base import DenoiserSpec
from unveil.registry import Plugin
from unveil.samplers.rules import Rule, StepView


class Transform(Plugin, family="transform"):
    """Changes the scores that a rule ranks by; tokens stay."""

    def check_fits(self, rule: Rule) -> None:
        """Refuse a rule whose scores this transform makes no sense for.

        Raises:
            UserError: naming what is allowed.
        """

    def apply(self, score: Tensor, guess: Tensor, view: StepView, spec: DenoiserSpec) -> Tensor:
        """New scores (b, R) from ``score`` (b, R), -inf where nothing was read, and the guessed tokens (b, R)."""
        raise NotImplementedError
