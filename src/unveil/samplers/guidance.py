"""What a denoiser says once guidance has had its say: one call for drawing a step and for scoring it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser
from unveil.processes.gaussian import GaussianProcess, Guess, full, spread
from unveil.registry import Plugin


class Guidance(Plugin, family="guidance"):
    """Turns a denoiser's predictions into the guess that a step is made with.

    The policy is what was sampled from: a likelihood scores steps with the guidance that drew them.
    """

    evaluations: ClassVar[int] = 1
    """Network evaluations per sample and call."""

    def told(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What it has to know of B prompts besides what the network reads of them, (B, ...) each by a name.

        Raises:
            UserError: a prompt that it cannot lead to.
        """
        return {}

    def guess(self, denoiser: ContinuousDenoiser, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        """The guess at x (B, *D), times t (B,) float64."""
        raise NotImplementedError


@dataclass(kw_only=True)
class NoGuidance(Guidance, name="none"):
    """The conditional prediction alone."""

    def guess(self, denoiser: ContinuousDenoiser, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        return denoiser.guess(x, t, condition)


@dataclass(kw_only=True)
class ClassifierFree(Guidance, name="cfg"):
    """Classifier-free guidance (arXiv 2207.12598): p = u + scale (c - u), in the network's own parameterisation; c is
    the prediction for the prompt, u that for none, or for a negative prompt.

    All parameterisations are linear in one another at a given x_t, so the result is the same in each.
    """

    evaluations: ClassVar[int] = 2
    scale: float = 4.5
    """1 is the conditional prediction (at twice the cost). Some papers write w = scale - 1."""
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a prediction whose spread per sample is brought back to that of c (arXiv 2305.08891)."""
    negative: str = ""
    """What samples are led away from; empty: the prediction without a prompt."""
    through: bool = True
    """Whether gradients flow through the unconditional prediction as well."""

    def guess(self, denoiser: ContinuousDenoiser, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        spec = denoiser.spec
        blank = denoiser.condition([self.negative]).to(x.device).rows(torch.zeros(len(x), dtype=torch.long))
        both = Condition.cat([condition, blank])
        with_prompt, without = full(denoiser.predict(torch.cat([x, x]), torch.cat([t, t]), both)).chunk(2)
        if not self.through:
            without = without.detach()
        prediction = without + self.scale * (with_prompt - without)
        if self.rescale > 0:
            ratio = with_prompt.flatten(1).std(1) / prediction.flatten(1).std(1)
            prediction = prediction * spread(self.rescale * ratio + 1 - self.rescale, x)
        return spec.process.guess(prediction, spec.prediction, x, t)


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """Cuts the expected x_0 to an interval where samples can only lie in it (pixels, actions), guidance included."""

    limit: Annotated[float, Field(gt=0)] = 1.0
    """Largest absolute value."""
    rederive: bool = False
    """Replace eps by what explains x_t together with the cut x_0, as DDPM's own step does. False: eps stays as it was
    said, as in the DDIM schedulers of published pipelines (``clip_sample``); the mean of a step then differs."""

    def cut(self, process: GaussianProcess, guess: Guess, x: Tensor, t: Tensor) -> Guess:
        """The guess at x (B, *D), times t (B,); no gradient flows where x_0 was cut."""
        x0 = guess.x0.clamp(-self.limit, self.limit)
        return process.rederived(x0, full(x), t) if self.rederive else Guess(x0=x0, eps=guess.eps)
