"""First-hitting sampler (FHS): masked diffusion sampled exactly, token by token, without a time grid.

Zheng, Chen, Mao, Liu, Zhu, Zhang: *Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit
Inaccurate Categorical Sampling*, ICLR 2025, arXiv 2409.02908. While n tokens are masked, the reverse process does
nothing until it reveals one of them, and that moment needs no network. With tau_n the time at which n masks are left,

    tau_{n-1} = tau_n u^(1/n)          u ~ U(0, 1); alpha_t = 1 - t, tau_L = 1
    position  uniform among the n masks,   token ~ mu(x_n, tau_{n-1})          one network call, then n <- n - 1

is equal in distribution to the continuous-time process (Algorithm 1); a network without a time input needs no tau, and
this is decoding in random order. Several tokens per call are a first-order approximation (Algorithm 2): rule ``random``
with fewer steps than tokens. The two solvers here are of second order, at no further call:

    extrapolation         mu(tau) = mu_k + (tau_k - tau) / (tau_{k-1} - tau_k) * (mu_k - mu_{k-1})         Algorithm 3
    predictor_corrector   the tokens drawn from mu_k are decided again by (mu_k + mu_{k+1}) / 2            Algorithm 4

tau is the token's own hitting time; for a network without a time input the number of masks stands for it. The j-th
token of a step is thus extrapolated by (j - 1) / (tokens of the step before), the first not at all.

Inferred, since no code and no readable listing of Algorithms 3 and 4 is public: that probabilities are extrapolated, mu
being a probability vector in the paper (``of: log_probability`` extrapolates logarithms); the two weights 1/2 of the
corrector; how it decides again. Drawing the token afresh (``redraw: fresh``) loses whatever the tokens of one step had
to do with each other's view of them, and measures far worse than no corrector. The default keeps the token with
probability min(1, new/old) and otherwise draws from the positive part of new - old: it has the averaged law and changes
as rarely as that law allows. The corrector reads mu_{k+1} at positions that are visible by then: a network that copies
visible tokens makes it do nothing.

The command `unveil diagnose` is the paper's other half: ``processes/gumbel.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unveil.samplers.rules import Random, State
from unveil.samplers.solvers import First, Solver, SolverView
from unveil.systems import System

SYSTEM = System(
    name="first_hitting_sampler",
    title="Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical "
    "Sampling",
    paper="2409.02908",
    family="masked",
    claim="token-by-token sampling is exact and needs L calls; float32 Gumbel noise silently lowers the temperature",
)


@dataclass(kw_only=True)
class Extrapolation(Solver, name="extrapolation"):
    """Linear in the clock through the outputs of this step and the last; the first step of a block has only its own."""

    of: Literal["probability", "log_probability"] = "probability"
    """What is extrapolated. Probabilities below zero become zero; both are normalised again."""

    def solve(self, logits: Tensor, view: SolverView, state: State) -> Tensor:
        latest = logits.float().log_softmax(-1)
        solved = logits
        if state:
            gap = (state["clock"] - view.now[:, None]).expand_as(view.at)
            weight = ((view.now[:, None] - view.at) / gap)[view.read, None]
            usable = (state["known"] & (gap > 0))[view.read, None] & (weight > 0)
            before = state["output"][view.read]
            if self.of == "probability":
                ahead = (latest.exp() + weight * (latest.exp() - before.exp())).clamp(min=0).log()
            else:
                ahead = torch.where(latest > -torch.inf, latest + weight * (latest - before), -torch.inf)
            solved = torch.where(usable, ahead.to(logits.dtype), logits)
        _remember(latest, view, state)
        state["clock"] = view.now[:, None].clone()
        return solved


@dataclass(kw_only=True)
class PredictorCorrector(Solver, name="predictor_corrector"):
    """The tokens of a step are decided again once the next output is there; those of the last step stay."""

    revises: ClassVar[bool] = True
    redraw: Literal["keep", "fresh"] = "keep"
    """``keep`` changes a token only as far as the averaged law demands; ``fresh`` draws it anew from that law."""

    def solve(self, logits: Tensor, view: SolverView, state: State) -> Tensor:
        temperature = view.temperature or 1.0
        latest = (logits.float() / temperature).log_softmax(-1)
        solved, again = logits, view.again[view.read]
        if state and again.any():
            old, new = state["output"][view.again].exp(), latest[again].exp()
            law = (old + new) / 2
            if self.redraw == "keep" and view.temperature > 0:
                law = _kept(law, old, view.response[view.again])
            # The sampler divides by the temperature once more.
            solved = logits.masked_scatter(again[:, None], (temperature * law.log()).to(logits.dtype))
        _remember(latest, view, state)
        return solved


def _remember(output: Tensor, view: SolverView, state: State) -> None:
    """Keep the log-probabilities (N, V) of this step at ``view.read``, and where there are any."""
    if not state:
        state["output"] = output.new_zeros(*view.read.shape, output.shape[-1])
    state["output"][view.read] = output
    state["known"] = view.read.clone()


def _kept(law: Tensor, old: Tensor, tokens: Tensor) -> Tensor:
    """(M, V) the law of what replaces ``tokens`` (M,), drawn from ``old`` (M, V), so that it has ``law`` (M, V)."""
    own = tokens[:, None]
    stay = (law.gather(1, own) / old.gather(1, own)).clamp(max=1)
    rest = (law - old).clamp(min=0)
    rest = rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
    return ((1 - stay) * rest).scatter_add(1, own, stay)


@dataclass(kw_only=True)
class FirstHitting:
    """The paper's choices, as keyword arguments of a `MaskedSampler`: one step per token is Algorithm 1, fewer are
    Algorithm 2, with another solver Algorithms 3 and 4."""

    rule: Random = field(default_factory=Random)
    temperature: float = 1.0
    solver: Solver = field(default_factory=First)
