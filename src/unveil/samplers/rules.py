"""Decoding rules: which holes a step fills, and which tokens it takes back.

A step goes *propose -> score -> transform -> decide -> commit*. The loop proposes a token for every hole that is open
(in the current block or an earlier one) and scores it; a transform may change scores; the rule decides which positions
are holes afterwards; the loop commits. A rule that remembers something across steps keeps it in ``state``, a dict of
tensors (b, R, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unveil.denoisers.base import MaskedDenoiser
from unveil.denoisers.unmask import UnmaskNetwork, load_unmask, read_unmask_header
from unveil.recipe import build
from unveil.registry import Plugin, UserError
from unveil.samplers.actions import Action, PlackettLuce
from unveil.samplers.tokens import Confidence, certainty_rank

State = dict[str, Tensor]


@dataclass
class StepView:
    """What a rule sees of one step of b live chains over R response positions.

    Attributes:
        open: (b, R) holes of the current and earlier blocks; a token is proposed for each.
        score: (b, R) how certain the proposal is, -inf where ``open`` is False.
        remain: (b,) how many of the open blocks' positions the schedule wants to be holes after this step.
        last: (b,) True at the last step that the schedule has for this block.
        step, steps: (b,) the step's place within its block, from 0, and the block's number of steps.
        done, planned: (b,) the same for the whole chain; None where neither a transform nor a network asks.
        noise: (b, channels, R) float64 uniforms of this step; None where the rule asks for none.
        preference: (b, R) logits of a learned rule's network; None for other rules.
        order: (b, R) set by a learned rule: 0 where a position stays, else its rank from 1.
        order_log_prob: (b,) set with it.
    """

    open: Tensor
    score: Tensor
    remain: Tensor
    last: Tensor
    step: Tensor | None = None
    steps: Tensor | None = None
    done: Tensor | None = None
    planned: Tensor | None = None
    noise: Tensor | None = None
    preference: Tensor | None = None
    order: Tensor | None = None
    order_log_prob: Tensor | None = None


class Rule(Plugin, family="rule"):
    """Decides what one step commits."""

    takes_back: ClassVar[bool] = False
    """True if a token may become a hole again (then step maps are not exact)."""
    follows_schedule: bool = True
    """False for rules whose number of steps depends on the model: a block then ends when it has no holes."""
    channels: int = 0
    """Uniforms per position and step that the rule draws from besides the tokens'."""
    confidence: Confidence | Literal["random"]
    """How proposals are scored; ``random`` draws uniform scores from the chain's own seed."""

    def network(self, denoiser: MaskedDenoiser) -> tuple[UnmaskNetwork, nn.Module] | None:
        """The network whose logits the rule reads; None: it has none.

        Raises:
            UserError: the rule needs one, and the denoiser carries none.
        """
        return None

    def start(self, chains: int, width: int, device: torch.device) -> State:
        """Fresh state for ``chains`` chains of ``width`` response positions: tensors (chains, width, ...)."""
        return {}

    def holes_after(self, view: StepView, state: State) -> Tensor:
        """(b, R) positions that are holes after the step. May update ``state`` in place."""
        raise NotImplementedError


@dataclass(kw_only=True)
class LowConfidence(Rule, name="lcr"):
    """LLaDA's low-confidence remasking: commit the most probable proposals, never touch them again."""

    confidence: Literal["probability"] = "probability"

    def holes_after(self, view: StepView, state: State) -> Tensor:
        return least_certain(view)


@dataclass(kw_only=True)
class Random(Rule, name="random"):
    """Commit uniformly drawn positions: the order of the true reverse process."""

    channels = 1
    confidence: Literal["random"] = "random"

    def holes_after(self, view: StepView, state: State) -> Tensor:
        return least_certain(view)


@dataclass(kw_only=True)
class Margin(Rule, name="margin"):
    """Commit where the best token leads the second best by most."""

    confidence: Literal["margin"] = "margin"

    def holes_after(self, view: StepView, state: State) -> Tensor:
        return least_certain(view)


@dataclass(kw_only=True)
class Entropy(Rule, name="entropy"):
    """Commit where the distribution has the least entropy."""

    confidence: Literal["entropy"] = "entropy"

    def holes_after(self, view: StepView, state: State) -> Tensor:
        return least_certain(view)


@dataclass(kw_only=True)
class Threshold(Rule, name="threshold"):
    """Commit every proposal at least as probable as ``threshold``, the best one in any case (Fast-dLLM, 2505.22618)."""

    follows_schedule = False
    confidence: Literal["probability"] = "probability"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Least probability that commits on its own."""
    cap: Annotated[int, Field(ge=1)] | None = None
    """Most tokens that one step may commit in a row: a guard for rollouts, where training makes logits over-
    confident."""

    def holes_after(self, view: StepView, state: State) -> Tensor:
        rank = certainty_rank(view.score)
        commit = (view.score >= self.threshold) | (rank == 0)
        if self.cap is not None:
            commit &= rank < self.cap
        return view.open & ~commit


@dataclass(kw_only=True)
class Factor(Rule, name="factor"):
    """Commit the n most certain, n the largest with (n + 1)(1 - p_n) < factor, p_n the n-th probability; at least one.

    Fast-dLLM, 2505.22618.
    """

    follows_schedule = False
    confidence: Literal["probability"] = "probability"
    factor: Annotated[float, Field(gt=0)] = 1.0
    """Larger commits more tokens a step."""
    cap: Annotated[int, Field(ge=1)] | None = None
    """Most tokens that one step may commit in a row."""

    def holes_after(self, view: StepView, state: State) -> Tensor:
        ranked, order = view.score.sort(dim=1, descending=True, stable=True)
        place = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        fits = (place + 1) * (1 - ranked) < self.factor
        largest = (fits * place).amax(1).clamp(min=1)
        if self.cap is not None:
            largest = largest.clamp(max=self.cap)
        commit = torch.zeros_like(view.open).scatter_(1, order, place <= largest[:, None])
        return view.open & ~commit


@dataclass(kw_only=True)
class RunningConfidence(Rule, name="rcr"):
    """Running Confidence Remasking of MDPO (2508.13148): tokens of low confidence go back when better ones appear.

    Every open hole takes its proposal; then the ``remain`` positions with the lowest running confidence among all that
    were ever filled become holes, those of earlier steps and blocks included. The last step of a block takes back
    nothing.
    """

    takes_back: ClassVar[bool] = True
    confidence: Confidence = "probability"
    running: Literal["last", "max"] = "last"
    """``last`` keeps the confidence last written (the authors' code), ``max`` the largest so far (the paper)."""

    def start(self, chains: int, width: int, device: torch.device) -> State:
        # "Ever filled" is a mask of its own: the published code reads a running value of exactly 0 as never filled,
        # which makes a margin or an underflown probability of 0 untouchable.
        return {
            "running": torch.full((chains, width), -torch.inf, device=device),
            "filled": torch.zeros(chains, width, dtype=torch.bool, device=device),
        }

    def holes_after(self, view: StepView, state: State) -> Tensor:
        running, filled = state["running"], state["filled"]
        fresh = view.score if self.running == "last" else torch.maximum(running, view.score)
        running.copy_(torch.where(view.open, fresh, running))
        filled |= view.open
        uncertainty = torch.where(filled, -running, -torch.inf)
        holes = certainty_rank(uncertainty) < view.remain[:, None]
        return holes & filled & ~view.last[:, None]


@dataclass(kw_only=True)
class Policy(Rule, name="policy"):
    """A network decides which positions are committed (DCoLT, 2505.10446; unmasking policies, 2512.09106).

    The network is the one that the denoiser carries, or that of a file (``unveil decode --rule policy:PATH``).
    """

    shorthand = "path"
    path: str | None = None
    """A file written by a training run (unmask.safetensors); None: what the denoiser carries."""
    action: Action | None = None
    """How its logits become a choice. Those that use the schedule's counts follow the schedule, others set the pace.
    None: the one that the policy of ``path`` was trained with, in its form for use; else plackett_luce."""
    greedy: bool = False
    """Take the likeliest choice instead of drawing one."""
    confidence: Confidence = "peak"
    """What the network is told of every hole."""

    def __post_init__(self) -> None:
        if self.action is None:
            trained = None if self.path is None else read_unmask_header(self.path)["action"]
            self.action = PlackettLuce() if trained is None else build(Action, trained).for_use()
        self.follows_schedule = self.action.uses_count
        self.channels = 0 if self.greedy else self.action.channels
        self._loaded: dict[int, tuple[UnmaskNetwork, nn.Module]] = {}

    def network(self, denoiser: MaskedDenoiser) -> tuple[UnmaskNetwork, nn.Module]:
        if self.path is None:
            if denoiser.unmask is None or denoiser.unmask_network is None:
                raise UserError("rule policy: the model carries no unmasking policy (give rule.path)")
            return denoiser.unmask_network, denoiser.unmask
        dim = denoiser.spec.feature_dim
        if dim not in self._loaded:
            network, module = load_unmask(self.path, dim)
            self._loaded[dim] = network, module.to(denoiser.device).eval()
        return self._loaded[dim]

    def holes_after(self, view: StepView, state: State) -> Tensor:
        assert view.preference is not None and self.action is not None
        noise = view.noise
        if noise is None:  # the same at every position: the likeliest choice
            shape = (len(view.open), self.action.channels, view.open.shape[1])
            noise = torch.full(shape, 0.5, dtype=torch.float64, device=view.open.device)
        count = view.open.sum(1) - view.remain
        view.order = self.action.sample(view.preference, view.open, count, noise)
        view.order_log_prob = self.action.log_prob(view.preference, view.open, view.order)
        return view.open & (view.order == 0)


def least_certain(view: StepView) -> Tensor:
    """(b, R) the ``remain`` open holes of lowest score: what a rule that never takes back leaves masked."""
    fill = view.open.sum(1, keepdim=True) - view.remain[:, None]
    order = view.score.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device)
    return view.open & torch.empty_like(view.open).scatter_(1, order, places >= fill)
