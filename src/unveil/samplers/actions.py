"""How the logits of a learned unmasking rule become a step: distributions over which candidates are opened.

Each distribution samples from given noise and scores what it sampled, so that rollout and update use one function.
With the same noise at every position (0.5) a sample is the distribution's greedy choice.

    plackett_luce     draw `count` candidates one after the other, without replacement (DCoLT, arXiv 2505.10446)
    bernoulli         open every candidate on its own (arXiv 2512.09106)
    bernoulli_argmax  the same, but never nothing: the largest logit if none was drawn
    dpls              draw a first candidate, then go on until STOP is drawn (dynamic Plackett-Luce, arXiv 2512.09106)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from unveil.registry import Plugin
from unveil.samplers.tokens import certainty_rank

_NEVER = -1e30
"""The logit of what cannot be drawn: finite, since the gradient of logcumsumexp is nan behind an infinity."""


@dataclass(kw_only=True)
class Action(Plugin, family="action"):
    """A distribution over the openings of one step, given logits (b, R). Rows are independent of each other."""

    channels: ClassVar[int] = 1
    """Rows of noise that a step needs."""
    uses_count: ClassVar[bool] = False
    """True if the schedule says how many candidates are opened, False if the logits do."""
    trains: ClassVar[bool] = True
    """False if the log-probability's gradient is not the policy gradient."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits."""

    def sample(self, logits: Tensor, candidates: Tensor, count: Tensor, noise: Tensor) -> Tensor:
        """Draw what is opened.

        Args:
            logits: (b, R), finite at the candidates.
            candidates: (b, R) bool, positions that may be opened.
            count: (b,) how many to open, if the distribution uses it.
            noise: (b, channels, R) float64 uniforms in [0, 1).

        Returns:
            order (b, R) long: 0 stays closed, 1, 2, ... the place at which it was drawn (1 for all that are drawn
            at the same time).

        Raises:
            ValueError: the noise is not float64, or has the wrong number of channels.
        """
        raise NotImplementedError

    def log_prob(self, logits: Tensor, candidates: Tensor, order: Tensor) -> Tensor:
        """(b,) float32 log-probability of ``order``; exactly 0 where the outcome was certain, e.g. no candidates."""
        raise NotImplementedError

    def for_use(self) -> Action:
        """The same distribution as it is used where nothing is trained."""
        return self

    def _scaled(self, logits: Tensor, candidates: Tensor) -> Tensor:
        """Tempered logits in float32, float64 if they come so, `_NEVER` outside the candidates."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return (wide / self.temperature).masked_fill(~candidates, _NEVER)

    def _check(self, noise: Tensor) -> None:
        if noise.dtype != torch.float64 or noise.shape[1] != self.channels:
            raise ValueError(
                f"{self.name} needs float64 noise (b, {self.channels}, R), got {noise.dtype} {tuple(noise.shape)}"
            )


@dataclass(kw_only=True)
class PlackettLuce(Action, name="plackett_luce"):
    """Draws ``count`` candidates in sequence, each from the softmax over those that are left.

    log pi = sum_k [h_u(k) - logsumexp over u(k), u(k + 1), ... and the candidates never drawn]. Where all candidates
    are taken the set is certain and the order of no consequence, so log pi = 0: DCoLT's last step of a block.
    """

    uses_count: ClassVar[bool] = True

    def sample(self, logits: Tensor, candidates: Tensor, count: Tensor, noise: Tensor) -> Tensor:
        self._check(noise)
        place = certainty_rank(self._scaled(logits.double(), candidates) + _gumbel(noise[:, 0])) + 1
        return torch.where(candidates & (place <= count[:, None]), place, 0)

    def log_prob(self, logits: Tensor, candidates: Tensor, order: Tensor) -> Tensor:
        certain = (order > 0).sum(1) == candidates.sum(1)
        return torch.where(certain, 0.0, _ranking_log_prob(self._scaled(logits, candidates), order)).float()


@dataclass(kw_only=True)
class Bernoulli(Action, name="bernoulli"):
    """Opens every candidate with probability sigmoid(logit), independently; possibly none (a wasted step).

    log pi = sum over candidates of log sigmoid(+-logit), which needs no clamp of the probabilities.
    """

    def sample(self, logits: Tensor, candidates: Tensor, count: Tensor, noise: Tensor) -> Tensor:
        self._check(noise)
        return (noise[:, 0] < self._scaled(logits.double(), candidates).sigmoid()).long()

    def log_prob(self, logits: Tensor, candidates: Tensor, order: Tensor) -> Tensor:
        signed = torch.where(order > 0, 1, -1) * self._scaled(logits, candidates)
        return functional.logsigmoid(signed).sum(1).float()

    def for_use(self) -> Action:
        return BernoulliArgmax(temperature=self.temperature)


@dataclass(kw_only=True)
class BernoulliArgmax(Bernoulli, name="bernoulli_argmax"):
    """Bernoulli that opens the candidate of largest logit where it drew none. For tests, where a step must not be lost.

    The published code scores a forced opening as if it had been drawn. Here log pi is exact: the largest logit alone
    has the probability of itself and of nothing. It jumps where another logit becomes the largest, so it cannot be
    trained.
    """

    trains: ClassVar[bool] = False

    def sample(self, logits: Tensor, candidates: Tensor, count: Tensor, noise: Tensor) -> Tensor:
        order = super().sample(logits, candidates, count, noise)
        return torch.where((order > 0).any(1, keepdim=True), order, self._largest(logits, candidates))

    def log_prob(self, logits: Tensor, candidates: Tensor, order: Tensor) -> Tensor:
        drawn = super().log_prob(logits, candidates, order)
        nothing = super().log_prob(logits, candidates, torch.zeros_like(order))
        forced = ((order > 0) == (self._largest(logits, candidates) > 0)).all(1) & candidates.any(1)
        return torch.where(forced, torch.logaddexp(drawn, nothing), drawn)

    def _largest(self, logits: Tensor, candidates: Tensor) -> Tensor:
        """(b, R) 1 at the candidate of largest logit, the left one of equals."""
        return (candidates & (certainty_rank(self._scaled(logits.double(), candidates)) == 0)).long()


@dataclass(kw_only=True)
class DynamicPlackettLuce(Action, name="dpls"):
    """Draws a first candidate in any case, then ranks the others together with STOP, whose logit is 0.

    What is ranked above STOP is opened. log pi = log softmax over candidates [first] + Plackett-Luce of (the others
    that were opened, STOP). A row without candidates opens nothing. In the ranking STOP takes the noise of the first.
    """

    channels: ClassVar[int] = 2

    def sample(self, logits: Tensor, candidates: Tensor, count: Tensor, noise: Tensor) -> Tensor:
        self._check(noise)
        scaled = self._scaled(logits.double(), candidates)
        first = candidates & (certainty_rank(scaled + _gumbel(noise[:, 0])) == 0)
        ranked = torch.where(first, 0.0, scaled) + _gumbel(noise[:, 1])
        stop = ranked.masked_fill(~first, -torch.inf).amax(1, keepdim=True)
        opened = candidates & ~first & (ranked > stop)
        place = certainty_rank(ranked.masked_fill(~opened, -torch.inf)) + 1
        return first.long() + torch.where(opened, place + 1, 0)

    def log_prob(self, logits: Tensor, candidates: Tensor, order: Tensor) -> Tensor:
        scaled = self._scaled(logits, candidates)
        first = order == 1
        opening = torch.where(first, scaled.log_softmax(1), 0.0).sum(1)
        others = functional.pad(scaled.masked_fill(first, _NEVER), (0, 1))
        place = torch.cat([(order - 1).clamp(min=0), (order > 0).sum(1, keepdim=True).clamp(min=1)], 1)
        return (opening + _ranking_log_prob(others, place)).float()


def _ranking_log_prob(scaled: Tensor, order: Tensor) -> Tensor:
    """(b,) Plackett-Luce log-probability of drawing ``order`` (b, R) from logits (b, R) that are `_NEVER` elsewhere."""
    drawn = order > 0
    sequence = torch.where(drawn, order, order.shape[1] + 1).argsort(dim=1, stable=True)
    logits = scaled.gather(1, sequence)
    logits = logits - logits.detach().amax(1, keepdim=True)
    left = logits.flip(1).logcumsumexp(1).flip(1)
    return torch.where(drawn.gather(1, sequence), logits - left, 0.0).sum(1)


def _gumbel(uniforms: Tensor) -> Tensor:
    """Gumbel noise from float64 uniforms in [0, 1); 0 is taken for the smallest positive number."""
    return -(-uniforms.clamp(min=torch.finfo(torch.float64).tiny).log()).log()
