"""Guidance by a network that judges: samples are led to what it takes for the class that was asked for.

It stands on this floor, above the other guidances, because the judge does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition, ContinuousDenoiser
from unveil.processes.gaussian import Guess, full, spread
from unveil.registry import UserError, did_you_mean
from unveil.rewards.networks import Classifier
from unveil.samplers.guidance import Guidance


@dataclass(kw_only=True)
class ClassifierGuidance(Guidance, name="classifier"):
    """Classifier guidance (arXiv 2105.05233): eps - scale sigma (gradient of log p(class | x_t) in x_t).

    x_0 is what then explains x_t. Pure noise tells no class: where alpha is 0 the guess stays as it is.
    """

    network: str
    """Name of an embedded classifier, or path of a safetensors file; prompts are the names of its classes."""
    scale: float = 1.0
    """At 1, with a classifier that knows the noise, the conditional distribution; above 1 a sharper one."""
    sees: Literal["guess", "state"] = "guess"
    """``guess``: the image of the expected x_0, through the denoiser (reconstruction guidance), for any classifier.
    ``state``: that of x_t itself, for one that was taught on noisy images."""
    blank: bool = False
    """Tell the denoiser no prompt: the classifier alone says what to draw."""
    through: bool = True
    """Whether gradients of training flow through the classifier's gradient as well: they are of second order."""

    def __post_init__(self) -> None:
        _ = self.judge  # a file that is not there is refused before any work

    @cached_property
    def judge(self) -> Classifier:
        return Classifier.open(self.network)

    def told(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        known = self.judge.names
        for prompt in prompts:
            if prompt not in known:
                raise UserError(f"guidance 'classifier': it knows no class {prompt!r}{did_you_mean(prompt, known)}")
        return {"class": torch.tensor([known.index(prompt) for prompt in prompts])}

    def guess(self, denoiser: ContinuousDenoiser, x: Tensor, t: Tensor, condition: Condition) -> Guess:
        process, learning, x = denoiser.spec.process, torch.is_grad_enabled(), full(x)
        if "class" not in condition.tensors:
            raise ValueError("the start does not say which classes to lead to (see Sampler.told)")
        told = condition
        if self.blank:
            told = denoiser.condition([""]).to(x.device).rows(torch.zeros(len(x), dtype=torch.long))
        with torch.enable_grad():
            own = x if x.requires_grad else x.detach().requires_grad_()
            guess = denoiser.guess(own, t, told)
            images = denoiser.decode(guess.x0 if self.sees == "guess" else own)
            chosen = self._log_probability(images, condition["class"])
            second = learning and self.through
            (slope,) = torch.autograd.grad(chosen.sum(), own, retain_graph=learning, create_graph=second)
        alpha, sigma = process.alpha(t), process.sigma(t)
        push = torch.where(alpha > 0, self.scale * sigma, 0.0)
        moved = torch.where(alpha > 0, push * sigma / alpha, 0.0)
        guided = Guess(x0=guess.x0 + spread(moved, x) * slope, eps=guess.eps - spread(push, x) * slope)
        return guided if learning else Guess(*(one.detach() for one in guided))

    def _log_probability(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B,) of each image's class, where the judge is."""
        logits = self.judge(images.float().cpu())
        return logits.log_softmax(-1).gather(1, labels.cpu()[:, None])
