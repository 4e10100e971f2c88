"""Likelihood estimators of finished answers: the tokens are masked again, at random, and the network guesses them.

The exact log p(y | prompt) of a masked language model is out of reach; its lower bound is an integral over time,

    ELBO(y) = int_0^1 E_mask[ 1/t sum_{i masked} log p(y_i | y_t) ] dt          every token masked with probability t
            = mean over n = 1..L of E[ L/n sum_{i masked} log p(y_i | y_n) ]     exactly n of the L tokens masked

and an estimator is a choice of K masked views with coefficients: the sum of coefficient * log p over views and holes
stands for it. All of them draw their masks per chain, over the chain's own maskable tokens, from the chain's seed:
neither batch nor padding changes a mask, and old, reference and new network see the same ones.

    estimator     K              times                                 coefficient of a hole
    double_mc     draws          random                                1 / (t K)  or  L / (n K)
    sdmc          nodes * draws  nodes of a quadrature, weights w      w / (t draws)  or  w L / (n draws)
    coupled       2 (+ 1)        t and 1 - t, complementary masks      1/(2 t), 1/(2 (1 - t)); full mask: a constant
    partial_mask  1              from t_1 ~ U evenly to 1 over the     1
                                 inner updates

`one_step` (``learning/likelihoods.py``) is the view at t = 1 alone. Times and masks as pure functions come first, then
the plug-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec
from unveil.learning.likelihoods import AfterEnd, TokenLikelihood, TokenViews, answered
from unveil.learning.views import FIRST, Inner
from unveil.registry import UserError
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import generator

Rule = Literal["gauss-1", "gauss-2", "gauss-3", "gauss-4", "gauss-5", "simpson"]

LOWEST_TIME = 1e-3
"""Random times are drawn from [LOWEST_TIME, 1]: 1/t has no finite variance down to 0."""


@dataclass(kw_only=True)
class Masks:
    """K masked views of one answer with n maskable tokens.

    Attributes:
        holes: (K, n) True where a token is masked.
        coefficient: (K,) factor of every hole's log-probability, float64.
        times: (K,) the time that a time-conditioned network is told, float64.
    """

    holes: Tensor
    coefficient: Tensor
    times: Tensor


def quadrature(rule: Rule) -> tuple[Tensor, Tensor]:
    """Times (N,) and weights (N,) on [0, 1], float64, weights summing to 1.

    ``gauss-N``: Gauss-Legendre, exact for polynomials of degree 2N - 1. ``simpson``: Simpson's rule with its first node
    at 0.1, because 1/t has no value at 0; no longer exact for any degree but 0.
    """
    if rule == "simpson":
        return torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.tensor([1, 4, 1], dtype=torch.float64) / 6
    # Golub and Welsch: the nodes are the eigenvalues of the symmetric matrix of Legendre's recurrence.
    count = int(rule.removeprefix("gauss-"))
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return (nodes + 1) / 2, vectors[0] ** 2


def subset(size: int, chosen: int, stream: torch.Generator) -> Tensor:
    """(size,) True at a uniformly drawn subset of ``chosen`` places."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=stream)[:chosen]] = True
    return mask


def sdmc_masks(size: int, rule: Rule, draws: int, realised: bool, stream: torch.Generator) -> Masks:
    """Exactly max(1, floor(t size)) masks at every node t of a quadrature rule, ``draws`` times each.

    The share floor(t size)/size that is really masked is smaller than t; ``realised`` divides by it instead of by t.
    """
    times, weights = quadrature(rule)
    counts = (times * size + 1e-9).floor().clamp(min=1, max=max(1, size))  # 0.1 * 30 must not fall short of 3
    divisor = counts / max(1, size) if realised else times
    holes = [subset(size, int(count), stream) for count in counts for _ in range(draws)]
    return Masks(
        holes=torch.stack(holes),
        coefficient=(weights / divisor / draws).repeat_interleave(draws),
        times=times.repeat_interleave(draws),
    )


def double_mc_masks(
    size: int, draws: int, form: Literal["time", "count"], stratified: bool, stream: torch.Generator
) -> Masks:
    """``draws`` random times with a random mask each; ``stratified`` draws one time in each of ``draws`` equal parts.

    ``time``: every token masked with probability t, coefficient 1/t. ``count``: n ~ U{1..size}, exactly n masks,
    coefficient size/n: the same expectation without the spread of n around t size.
    """
    u = torch.rand(draws, dtype=torch.float64, generator=stream)
    if stratified:
        u = (torch.arange(draws) + u) / draws
    if form == "time":
        times = LOWEST_TIME + (1 - LOWEST_TIME) * u
        holes = torch.rand(draws, size, dtype=torch.float64, generator=stream) < times[:, None]
        return Masks(holes=holes, coefficient=1 / times / draws, times=times)
    counts = (1 + (u * size).floor()).clamp(max=max(1, size))
    holes = torch.stack([subset(size, int(count), stream) for count in counts])
    return Masks(holes=holes, coefficient=size / counts / draws, times=counts / max(1, size))


def coupled_masks(size: int, low: float, high: float, full_mask: float, stream: torch.Generator) -> Masks:
    """A mask at t ~ U(low, high), its complement, and, if ``full_mask`` > 0, the full mask with that coefficient."""
    t = low + (high - low) * torch.rand((), dtype=torch.float64, generator=stream)
    first = torch.rand(size, dtype=torch.float64, generator=stream) < t
    holes, coefficient, times = [first, ~first], [0.5 / t, 0.5 / (1 - t)], [t, 1 - t]
    if full_mask > 0:
        holes.append(torch.ones_like(first))
        coefficient.append(torch.full_like(t, full_mask))
        times.append(torch.ones_like(t))
    return Masks(holes=torch.stack(holes), coefficient=torch.stack(coefficient), times=torch.stack(times))


def partial_masks(size: int, time: float, stream: torch.Generator) -> Masks:
    """One view in which every token is masked with probability ``time``, and at least one is."""
    u = torch.rand(size, dtype=torch.float64, generator=stream)
    holes = u < time
    if size > 0:
        holes[u.argmin()] = True
    one = torch.ones(1, dtype=torch.float64)
    return Masks(holes=holes[None], coefficient=one, times=time * one)


def partial_time(first: float, number: int, count: int) -> float:
    """Mask probability of inner update ``number`` (from 0) of ``count``: evenly from ``first`` to 1."""
    return first + (1 - first) * number / max(1, count - 1)


@dataclass(kw_only=True)
class MaskedAnswer(TokenLikelihood):
    """What all estimators share: which tokens are maskable, and how masks become views.

    Tokens behind the end that are dropped stay masked in every view, so that they give away nothing of the length.
    """

    resamples = True
    per_step: ClassVar[bool] = False
    after_end: AfterEnd = "keep"
    """``keep``: the whole response is the answer, as decoding fills it. ``drop``: up to and including the first end
    token."""
    given: Literal["score", "show"] = "score"
    """Response positions that were given at the start (infilled): masked and scored like the rest, or always shown."""

    def masks(self, size: int, seed: int, inner: Inner) -> Masks:
        """Views of an answer with ``size`` maskable tokens; ``seed`` is the chain's, the same at all inner updates."""
        raise NotImplementedError

    def views(
        self,
        trajectory: TokenTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: DenoiserSpec,
        inner: Inner = FIRST,
    ) -> TokenViews:
        counted = answered(trajectory, spec, self.after_end)
        shown = trajectory.given & (self.given == "show")
        maskable = counted & ~shown
        always = trajectory.response_valid & ~counted & ~shown
        drawn = [self.masks(int(maskable[row].sum()), seed, inner) for row, seed in enumerate(seeds)]
        rows = torch.arange(len(trajectory)).repeat_interleave(len(drawn[0].holes))
        scored = torch.zeros_like(maskable)[rows]
        scored[maskable[rows]] = torch.cat([masks.holes.flatten() for masks in drawn])
        coefficient = torch.cat([masks.coefficient for masks in drawn]).float()
        times = torch.cat([masks.times for masks in drawn]).float()
        said = scored.any(1)  # a view without masks has nothing to say
        rows, scored, coefficient, times = rows[said], scored[said], coefficient[said], times[said]
        holes = scored | always[rows]
        responses = trajectory.response_ids[rows]
        return TokenViews(
            ids=torch.cat([trajectory.prompt_ids[rows], responses.masked_fill(holes, spec.mask_id)], 1),
            valid=trajectory.valid[rows],
            prompt_width=trajectory.prompt_ids.shape[1],
            scored=scored,
            targets=responses,
            rows=rows,
            steps=trajectory.last_steps[rows],
            holes=holes.sum(1),
            length=(maskable.sum(1) / rows.bincount(minlength=len(trajectory)).clamp(min=1))[rows],
            coefficient=coefficient[:, None].expand(scored.shape),
            times=times,
        )


@dataclass(kw_only=True)
class SemiDeterministic(MaskedAnswer, name="sdmc"):
    """Semi-deterministic Monte Carlo (GDPO, 2510.08554): fixed times of a quadrature rule, random masks."""

    rule: Rule = "gauss-3"
    """Where the integral over time is evaluated."""
    draws: Annotated[int, Field(ge=1)] = 1
    """Masks per node."""
    realised: bool = True
    """Divide by the share of tokens that is really masked. False: by the node's t (the reference), which on short
    answers takes the first nodes for less than they are."""

    def masks(self, size: int, seed: int, inner: Inner) -> Masks:
        return sdmc_masks(size, self.rule, self.draws, self.realised, generator(seed, inner.number, "masks"))


@dataclass(kw_only=True)
class DoubleMonteCarlo(MaskedAnswer, name="double_mc"):
    """Random times and random masks: the unbiased estimator of the ELBO (LLaDA's evaluation)."""

    draws: Annotated[int, Field(ge=1)] = 4
    """Views per chain."""
    form: Literal["count", "time"] = "count"
    """``count``: a uniform number of masks. ``time``: a uniform time, then every token for itself; far noisier."""
    stratified: bool = False
    """Low discrepancy: one time in each of ``draws`` equal parts of [0, 1]."""

    def masks(self, size: int, seed: int, inner: Inner) -> Masks:
        return double_mc_masks(size, self.draws, self.form, self.stratified, generator(seed, inner.number, "masks"))


@dataclass(kw_only=True)
class Coupled(MaskedAnswer, name="coupled"):
    """Complementary masks, so that every token is scored exactly once in a pair (DiffuCoder, 2506.20639)."""

    low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Smallest masking probability of the pair's first mask."""
    high: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Largest."""
    full_mask: Annotated[float, Field(ge=0)] = 0.5
    """Coefficient of the log-probability under the full mask, a third view; 0 leaves the view out. With 1/2 a token has
    (log p_full + log p_pair / t) / 2, as published; without it, and low and high near 0 and 1, the sum is the ELBO."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(f"low: should be at most high ({self.high}), got {self.low}")

    def masks(self, size: int, seed: int, inner: Inner) -> Masks:
        return coupled_masks(size, self.low, self.high, self.full_mask, generator(seed, inner.number, "masks"))


@dataclass(kw_only=True)
class PartialMask(MaskedAnswer, name="partial_mask"):
    """One partly masked view (UniGRPO of MMaDA, 2505.15809): the first inner update masks a random share of the answer,
    the following ones evenly more, the last one everything."""

    low: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Least share that the first inner update masks (IGPO's code: 30 of 128 steps)."""

    def masks(self, size: int, seed: int, inner: Inner) -> Masks:
        drawn = float(torch.rand((), dtype=torch.float64, generator=generator(seed, "first time")))
        time = partial_time(self.low + (1 - self.low) * drawn, inner.number, inner.count)
        return partial_masks(size, time, generator(seed, inner.number, "masks"))
