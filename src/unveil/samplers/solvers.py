"""Solvers: which distribution a step draws its tokens from, given what the network said at this step and the last ones.

The network's output at a state is right for the next token only. A step that reveals several of them uses it beyond the
state that it was computed at; a solver makes up for that with outputs of other steps, at no further network call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unveil.registry import Plugin, UserError
from unveil.samplers.rules import Rule, State


@dataclass
class SolverView:
    """What a solver sees of one step of b live chains over R response positions.

    Attributes:
        read: (b, R) positions whose logits it is given: the holes that are read, and ``again``.
        again: (b, R) positions that the step before revealed, for a solver that `revises`; no holes any more.
        response: (b, R) the state that the network saw.
        now: (b,) the clock at this state, running down: the time of a time-conditioned network, else the open holes.
        at: (b, R) the clock at which each open hole would be revealed, as far as the rule's order is known beforehand.
        temperature: of the sampler, 0 for the likeliest token.
    """

    read: Tensor
    again: Tensor
    response: Tensor
    now: Tensor
    at: Tensor
    temperature: float


class Solver(Plugin, family="solver"):
    """Turns the network's logits into those that are sampled."""

    exact: ClassVar[bool] = False
    """True if tokens come from the network's own output at their step: only then can its log-probability score them."""
    revises: ClassVar[bool] = False
    """True if the tokens of the step before are drawn once more."""

    def check_fits(self, rule: Rule) -> None:
        """Refuse a rule that this solver does not go with.

        Raises:
            UserError: saying why.
        """
        if self.exact:
            return
        if rule.takes_back:
            raise UserError(f"solver {self.name}: not possible with a rule that takes tokens back")
        if not rule.follows_schedule:
            raise UserError(f"solver {self.name}: needs a rule that follows a schedule, not {rule.name!r}")

    def solve(self, logits: Tensor, view: SolverView, state: State) -> Tensor:
        """Logits (N, V) to draw from, of the network's logits (N, V) at ``view.read``, in row-major order.

        ``state`` is the solver's memory, empty at first: tensors (b, R, ...), from which finished rows are removed.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class First(Solver, name="first"):
    """The network's output as it is."""

    exact: ClassVar[bool] = True

    def solve(self, logits: Tensor, view: SolverView, state: State) -> Tensor:
        return logits
