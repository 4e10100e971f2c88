"""Flow-GRPO: a flow model's ODE sampler as an SDE with the same marginals, and GRPO on its few steps.

Liu, Liu, Liang, Li, Liu, Wang, Wan, Zhang, Ouyang: *Flow-GRPO: Training Flow Matching Models via Online RL*, 2025,
arXiv 2505.05470. With u the predicted velocity, t falling from 1 (noise) to 0 and g^2 = a^2 t / (1 - t):

    x_s  = x_t + [u + g^2 / (2 t) (x_t + (1 - t) u)] (s - t) + g sqrt(t - s) noise            kernel ``flow``
    A    = clip((r - mean over the group) / (std over the update + 1e-4), -5, 5)
    rho  = exp(l(x_s | x_t) - l_old(x_s | x_t))                                               l averaged over dimensions
    loss = mean over images and steps but the last of -min(rho A, clip(rho, 1 - c, 1 + c) A)
           + beta |mean - mean_ref|^2 / (2 g^2)                                               averaged over dimensions

two gradient steps per rollout, each on half of the images. Its relatives differ in which steps are drawn and how:

    full       all steps by ``flow``, a = 0.7
    fast       a window of 2 steps, drawn anew per update in the noisy half, by ``cps``; no KL, c = 1e-5
    cps        all steps by ``cps`` (2509.05952), which leaves no residual noise; -|x_s - mean|^2 stands for log p
    mix        a window of 4 steps that moves on every 25 updates (MixGRPO, 2507.21802); one initial noise per group
    flash      the same, and of the steps behind the window only 0.4 (MixGRPO-Flash)
    dance      g constant (DanceGRPO, 2505.07818), 60 % of the steps per image; one initial noise per group; no KL

Differs from the released code: at t = 1, where g has a pole, the rate is that of the step's end, as in the code, but no
other step is touched; groups of equal rewards are not dropped, they have advantage 0; c is for 65,536 dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unveil.learning.advantages import GroupAdvantage
from unveil.learning.latents import TransitionLikelihood
from unveil.learning.objectives import Clipped, TokenMean
from unveil.learning.regularisers import MeanSpace
from unveil.learning.selectors import ButLast, Selector
from unveil.processes.kernels import CoefficientsPreserving, DanceSde, FlowSde
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latent_solvers import DpmSolver2M
from unveil.samplers.windows import Progressive, RandomSpan
from unveil.systems import System

SYSTEM = System(
    name="flow_grpo",
    title="Flow-GRPO: Training Flow Matching Models via Online RL",
    paper="2505.05470",
    family="image",
    claim="GRPO on a stochastic sampler with few steps improves a flow model; a window of two steps is enough",
)


@dataclass(kw_only=True)
class FlowGrpo:
    """The paper's choices, as keyword arguments of a `PolicyConfig`; `variant` gives those of its relatives."""

    advantage: GroupAdvantage = field(default_factory=lambda: GroupAdvantage(scale="batch_std", clip=5.0))
    selector: Selector = field(default_factory=ButLast)
    likelihood: TransitionLikelihood = field(default_factory=TransitionLikelihood)
    objective: Clipped = field(default_factory=lambda: Clipped(clip=1e-4, level="step"))
    weighting: TokenMean = field(default_factory=TokenMean)
    kl: MeanSpace = field(default_factory=lambda: MeanSpace(beta=0.04, rate=True))
    minibatches: int = 2


def variant(name: str, **sampler: Any) -> tuple[LatentSampler, FlowGrpo]:
    """The rollout sampler and the choices of a relative; ``sampler`` are further settings of the first, such as steps.

    Raises:
        KeyError: there is no such relative.
    """
    none = MeanSpace(beta=0.0)
    fast = {"objective": Clipped(clip=1e-5, level="step"), "kl": none}
    mix = {
        "kernel": FlowSde(noise=0.7), "window": Progressive(length=4, every=25), "share": "noise",
        "solver": DpmSolver2M(),
    }  # fmt: skip
    known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "full": ({"kernel": FlowSde(noise=0.7)}, {}),
        "fast": ({"kernel": CoefficientsPreserving(noise=0.8), "window": RandomSpan(length=2)}, fast),
        "cps": ({"kernel": CoefficientsPreserving(noise=0.8)}, {"likelihood": TransitionLikelihood(form="squares")}),
        "mix": (mix, {"kl": none}),
        "flash": (mix | {"compress": 0.4}, {"kl": none}),
        "dance": (
            {"kernel": DanceSde(noise=0.3), "share": "noise"},
            {"kl": none, "selector": ButLast(share=0.6), "advantage": GroupAdvantage()},
        ),
    }  # fmt: skip
    settings, choices = known[name]
    return LatentSampler(**(settings | sampler)), FlowGrpo(**choices)
