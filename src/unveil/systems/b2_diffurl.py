"""B2-DiffuRL: train the last steps first and extend backwards; learn from the best and the worst branch of a stem.

Hu, Zhang, Chen, Kuang, Li, Gao, Xiao, Wang, Zhu: *Towards Better Alignment: Training Diffusion Models with
Reinforcement Learning Against Sparse Rewards*, CVPR 2025, arXiv 2503.11240. Two additions to DDPO, for a reward that
comes only at the end. With T steps, update k of S, and z the reward standardised over the prompt's last 8 updates and
this one:

    backward progressive   the last L steps are trained, L = min(L_1, L_0 + floor(k (L_1 - L_0 + 1) / S))        (BPT)
    branch sampling        one chain per stem up to step T - L, then leaves, each with noise of its own          (BS)
    selection              of a stem the best leaf if z >= 0.5, the worst leaf if z < -0.5
    loss                   mean over chosen leaves and steps of -min(rho z, clip(rho, 1 - c, 1 + c) z)

with z limited to +-5 and two passes over the chosen leaves. Within a stem rewards differ by the trained steps alone;
between stems also by the prefix, which is noise to the gradient.

The rule as released unlearns what it has learned once most samples succeed: a success then has z < 0.5, and failures
alone are chosen. By default an update whose selection holds no positive z is no gradient step (``guard``); advantages
within the stem (advantage ``group``) are the other way out. Differs from the released code besides: the step to clean
data has no noise and is not trained; a pass has a given number of gradient steps, not of samples per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.learning.advantages import Advantage, terminal
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.selectors import AllSteps, Selector
from unveil.processes.kernels import Ddim
from unveil.registry import UserError
from unveil.samplers.latent import LatentSampler
from unveil.samplers.windows import Everywhere, Window
from unveil.systems import System

SYSTEM = System(
    name="b2_diffurl",
    title="Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards",
    paper="2503.11240",
    family="image",
    claim="training from the last steps backwards on the best and worst branches beats DDPO and keeps diversity",
)


@dataclass(kw_only=True)
class Suffix(Window, name="suffix"):
    """The last steps of the chain, more and more of them (BPT)."""

    first: Annotated[int, Field(ge=1)]
    """Steps at the first update."""
    last: Annotated[int, Field(ge=1)]
    """Steps at the end; the sampler's ``steps`` for the whole chain."""
    stages: Annotated[int, Field(ge=1)]
    """Updates over which the window grows."""

    def check_fits(self, steps: int) -> None:
        if not self.first <= self.last <= steps:
            raise UserError(
                f"window: should grow from first {self.first} to last {self.last} steps within the chain's {steps}"
            )

    def length(self, update: int) -> int:
        """Steps of an update."""
        return min(self.last, self.first + update * (self.last - self.first + 1) // self.stages)

    def at(self, update: int, seed: int, steps: int) -> Window:
        length = self.length(update)
        return Suffix(first=length, last=length, stages=1)

    def inside(self, steps: int) -> Tensor:
        return torch.arange(steps) >= steps - self.first


@dataclass(kw_only=True)
class StageHistory(Advantage, name="stage_history"):
    """(r - mean) / std over the rewards of the same prompt in the last updates and this one."""

    by_prompt: ClassVar[bool] = True
    stages: Annotated[int, Field(ge=0)] = 8
    """Earlier updates that are remembered. They were drawn by older policies: fast learning shifts z upwards."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest absolute value; None: no limit."""
    good: Annotated[float, Field(ge=0)] = 1.0
    """Factor of positive ones, after that (beta1 of the released code)."""
    bad: Annotated[float, Field(ge=0)] = 1.0
    """Factor of negative ones (beta2)."""
    remembered: list[dict[int, list[float]]] = field(default_factory=list, init=False, repr=False, compare=False)

    def advantages(self, rewards: Tensor, active: Tensor, group: Tensor) -> Tensor:
        final = terminal(rewards, active).double()
        now = {prompt: final[group == prompt].tolist() for prompt in set(group.tolist())}
        values = torch.zeros_like(final)
        for prompt, own in now.items():
            earlier = [reward for stage in self.remembered for reward in stage.get(prompt, [])]
            known = torch.tensor(own + earlier, dtype=torch.float64)
            rows = group == prompt
            values[rows] = (final[rows] - known.mean()) / (known.std(correction=0) + 1e-8)
        self.remembered = [*self.remembered, now][-self.stages :] if self.stages else []
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        values = values * torch.where(values > 0, self.good, self.bad)
        return values.float()[:, None] * active

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": [dict(stage) for stage in self.remembered]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remembered = [dict(stage) for stage in state["remembered"]]


@dataclass(kw_only=True)
class BestWorst(Selector, name="best_worst"):
    """All steps with noise of the best and of the worst chain of a stem, where these are good and bad enough."""

    upper: float = 0.5
    """The best is trained if its advantage is at least this."""
    lower: float = -0.5
    """The worst is trained if its advantage is below this."""
    among: Literal["stem", "siblings"] = "stem"
    """What is compared: all leaves of a stem, or, where the sampler has ``splits``, those of one last branch."""
    pairs: bool = False
    """Only both of a stem or none: pairs of a preference with a common prefix."""
    guard: bool = True
    """No training on an update without a chosen chain of positive advantage. False: the rule as released."""

    def chains(self, advantages: Tensor, group: Tensor, sampler: Any) -> Tensor:
        chosen = torch.zeros(len(group), dtype=torch.bool)
        size, splits = getattr(sampler, "branches", None), getattr(sampler, "splits", [])
        if self.among == "siblings" and splits:
            size = splits[-1].leaves
        for own in group.unique():
            rows = (group == own).nonzero().flatten()
            for stem in rows.split(size or len(rows)):
                best, worst = stem[advantages[stem].argmax()], stem[advantages[stem].argmin()]
                good, bad = bool(advantages[best] >= self.upper), bool(advantages[worst] < self.lower)
                if self.pairs:
                    good = bad = good and bad
                chosen[best] |= good
                chosen[worst] |= bad
        return chosen & bool((advantages[chosen] > 0).any()) if self.guard else chosen

    def choose(self, advantages: Tensor, trajectory: Any, seeds: Any, spec: Any) -> Tensor:
        return trajectory.decided.float()


@dataclass(kw_only=True)
class B2Diffurl:
    """The paper's choices, as keyword arguments of a `PolicyConfig`."""

    advantage: StageHistory = field(default_factory=StageHistory)
    selector: Selector = field(default_factory=BestWorst)
    likelihood: TransitionLikelihood = field(default_factory=TransitionLikelihood)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=0.1, level="step"))
    weighting: TokenMean = field(default_factory=TokenMean)
    inner_updates: int = 2


def variant(name: str, suffix: Suffix, leaves: int, **sampler: Any) -> tuple[LatentSampler, B2Diffurl]:
    """The rollout sampler and choices of the method (``both``) or of one half of it (``bpt``, ``bs``).

    ``bs`` trains the whole chain: leaves share their initial noise. ``sampler`` are further settings, such as steps.

    Raises:
        KeyError: there is no such variant.
    """
    branching: dict[str, Any] = {"share": "prefix", "branches": leaves}
    known: dict[str, tuple[dict[str, Any], Selector]] = {
        "both": ({"window": suffix, **branching}, BestWorst()),
        "bpt": ({"window": suffix}, AllSteps()),
        "bs": ({"window": Everywhere(), **branching}, BestWorst()),
    }
    settings, selector = known[name]
    noise = Ddim(eta=1.0)
    return LatentSampler(kernel=noise, outside=noise, **(settings | sampler)), B2Diffurl(selector=selector)
