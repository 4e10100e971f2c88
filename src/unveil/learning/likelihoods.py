"""What stands in for log p of tokens: which canvases the network is shown, and which of their tokens count.

A view of tokens is a partly masked canvas together with the tokens whose log-probability is read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.unmask import UnmaskInputs
from unveil.learning.scoring import score_tokens
from unveil.learning.views import FIRST, Inner, Likelihood, Scores, Views
from unveil.registry import UserError
from unveil.samplers.actions import Action
from unveil.samplers.base import Sampler, TokenSampler
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.seeds import derive_seed, generator

AfterEnd = Literal["keep", "drop"]


@dataclass(kw_only=True)
class Order:
    """What a learned unmasking rule saw and did at each of N views.

    Attributes:
        action: the distribution that the rule drew positions from.
        inputs: what its network reads; features are computed when the view is scored.
        ranks: (N, R) 0 where the position stayed as it was, else its place in the order of selection, from 1.
        expert_share: (N,) share of the group's chains that a second sampler drew in this chain's stead, 0 for the
            policy's own chains: the action's probability is (1 - share) pi + share.
    """

    action: Action
    inputs: UnmaskInputs
    ranks: Tensor
    expert_share: Tensor

    def slice(self, part: slice | Tensor) -> Order:
        return Order(
            action=self.action,
            inputs=self.inputs.rows(part),
            ranks=self.ranks[part],
            expert_share=self.expert_share[part],
        )


@dataclass(kw_only=True)
class TokenViews(Views):
    """N canvases and what is scored in each.

    The *items* of a view are its scored tokens (columns 0..R-1) and, where a learned rule chose the order, one more
    column R for the log-probability of that choice; C is R or R + 1.

    Attributes:
        ids: (N, L) canvases.
        valid: (N, L) True at real tokens.
        prompt_width: the column at which responses start; R = L - prompt_width.
        scored: (N, R) True at tokens whose log-probability is read.
        targets: (N, R) the tokens themselves.
        holes: (N,) masked response tokens of the canvas.
        coefficient: (N, R) factor of each token's log-probability in every sum; None: 1.
        order: the choices of a learned rule; None: there is none, or it is not trained.
        times: (N,) the time that a time-conditioned network is told; None: it has none.
    """

    called = "tokens"

    ids: Tensor
    valid: Tensor
    prompt_width: int
    scored: Tensor
    targets: Tensor
    holes: Tensor
    coefficient: Tensor | None = None
    order: Order | None = None
    times: Tensor | None = None

    @property
    def items(self) -> Tensor:
        """(N, C) True at everything that has a log-probability."""
        if self.order is None:
            return self.scored
        return torch.cat([self.scored, torch.ones_like(self.scored[:, :1])], 1)

    @property
    def factors(self) -> Tensor:
        """(N, C) what every item's log-probability is multiplied by in a sum."""
        items = self.items
        if self.coefficient is None:
            return items.float()
        ones = self.coefficient.new_ones(len(self), items.shape[1] - self.coefficient.shape[1])
        return torch.cat([self.coefficient, ones], 1) * items

    @property
    def parts(self) -> Tensor:
        """(C,) 0 for tokens, 1 for the order."""
        parts = torch.zeros(self.items.shape[1], dtype=torch.long)
        parts[self.scored.shape[1] :] = 1
        return parts

    def slice(self, start: int, end: int) -> Self:
        sliced = super().slice(start, end)
        return sliced if self.order is None else replace(sliced, order=self.order.slice(slice(start, end)))


class TokenLikelihood(Likelihood):
    """Scores tokens that were drawn by the sampler 'masked'."""

    makes = TokenViews

    def check_fits(self, sampler: Sampler, denoiser: MaskedDenoiser) -> None:
        if sampler.name != "masked":
            raise UserError(
                f"policy.likelihood: {self.name!r} scores tokens drawn by the sampler 'masked', not {sampler.name!r}"
            )
        if not sampler.exact:
            raise UserError("policy.rollout.sampler.solver: draws from more than one output; nothing can score that")
        if denoiser.spec.time_conditioned:
            raise UserError(f"policy.likelihood: {self.name!r} tells the network no time, but it is time-conditioned")

    def views(
        self,
        trajectory: TokenTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: DenoiserSpec,
        inner: Inner = FIRST,
    ) -> TokenViews:
        raise NotImplementedError

    def score(self, denoiser: MaskedDenoiser, views: TokenViews, sampler: TokenSampler) -> Scores:
        """Log-probabilities of all items: tokens at the sampling temperature, orders by the rule that chose them.

        A view without scored tokens and with an order that reads no features costs no forward pass of the denoiser.
        """
        device = denoiser.device
        scored = views.scored.to(device)
        order = views.order
        features = None
        if bool(views.scored.any()) or (order is not None and denoiser.unmask_reads_features):
            times = None if views.times is None else views.times.to(device)
            canvas = denoiser.features(views.ids.to(device), views.valid.to(device), times)
            features = canvas[:, views.prompt_width :]
        log_prob = torch.zeros(scored.shape, device=device)
        entropy = torch.zeros(scored.shape, device=device)
        if features is not None:
            row, column = scored.nonzero(as_tuple=True)
            targets = views.targets.to(device)[row, column]
            temperature = sampler.temperature or 1.0
            tokens, spread = score_tokens(denoiser, features[row, column], targets, temperature, entropy=True)
            log_prob, entropy = log_prob.masked_scatter(scored, tokens), entropy.masked_scatter(scored, spread)
        if order is not None:
            chosen = score_order(denoiser, order, features)
            log_prob = torch.cat([log_prob, chosen[:, None]], 1)
            entropy = torch.cat([entropy, torch.zeros_like(entropy[:, :1])], 1)
        return Scores(log_prob=log_prob, entropy=entropy, forwards=0 if features is None else len(views))


def score_order(denoiser: MaskedDenoiser, order: Order, features: Tensor | None) -> Tensor:
    """(N,) log-probability of each view's choice of positions under the rule that the denoiser carries."""
    device = denoiser.device
    inputs = order.inputs.to(device)
    if denoiser.unmask_reads_features:
        inputs = replace(inputs, features=features)
    assert denoiser.unmask is not None
    log_prob = order.action.log_prob(denoiser.unmask(inputs), inputs.candidates, order.ranks.to(device))
    share = order.expert_share.to(device)
    mixed = torch.logaddexp(log_prob + torch.log1p(-share), share.clamp(min=1e-38).log())
    return torch.where(share > 0, mixed, log_prob)


@dataclass(kw_only=True)
class TrajectoryLikelihood(TokenLikelihood, name="trajectory"):
    """The states that inference really visited: sum over steps of sum over tokens of log p(a_s | x_s)."""

    tokens: Literal["masked", "revealed", "none"] = "masked"
    """``masked``: the action is a token for every hole (MDPO). ``revealed``: only what the step committed (CJ-GRPO).
    ``none``: only the order counts (unmasking policies)."""
    order: Action | None = None
    """Also the log-probability of the positions that a learned rule chose: the action of rollout.sampler.rule."""
    after_end: AfterEnd = "keep"
    """``drop``: tokens behind the first end token of the finished response do not count."""

    def __post_init__(self) -> None:
        if self.tokens == "none" and self.order is None:
            raise UserError("tokens: 'none' leaves nothing to score where order is null")
        needs = {"states"}
        if self.tokens != "none":
            needs |= {"guesses", "revealed"}
        if self.order is not None:
            needs |= {"confidence", "block", "order"}
        self.needs = frozenset(needs)

    @property
    def scores_samples(self) -> bool:
        return self.tokens != "none"

    def check_fits(self, sampler: Sampler, denoiser: MaskedDenoiser) -> None:
        super().check_fits(sampler, denoiser)
        cache = sampler.cache if isinstance(sampler, MaskedSampler) and sampler.block_length is not None else None
        if self.tokens == "masked" and cache is not None and not cache.looks_ahead:
            raise UserError(
                f"policy.rollout.sampler.cache: {cache.name!r} guesses holes of later blocks from earlier states, and "
                "policy.likelihood.tokens: masked scores them at this one (allowed: prefix; or tokens: revealed)"
            )
        if self.order is None:
            return
        if not self.order.trains:
            raise UserError(f"policy.likelihood.order: the action {self.order.name!r} has no likelihood to train by")
        if self.order != sampler.action:
            raise UserError("policy.likelihood.order: should be the action of rollout.sampler.rule (a rule 'policy')")
        if denoiser.unmask is None:
            raise UserError("policy.likelihood.order: the model carries no unmasking policy (give model.unmask)")

    def views(
        self,
        trajectory: TokenTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: DenoiserSpec,
        inner: Inner = FIRST,
    ) -> TokenViews:
        rows, steps = ((chosen > 0) & trajectory.active).nonzero(as_tuple=True)
        holes = trajectory.holes_at(rows, steps)
        scored = holes & (self.tokens != "none")
        if self.tokens == "revealed":
            assert trajectory.revealed is not None
            scored &= trajectory.revealed[rows, steps]
        if self.after_end == "drop":
            scored &= up_to_end(trajectory.response_ids, spec.end_ids)[rows]
        if self.order is None:  # steps that committed nothing have nothing to say
            said = scored.any(1)
            rows, steps, holes, scored = rows[said], steps[said], holes[said], scored[said]
        states = trajectory.states_at(rows, steps)
        return TokenViews(
            ids=torch.cat([trajectory.prompt_ids[rows], states], 1),
            valid=trajectory.valid[rows],
            prompt_width=trajectory.prompt_ids.shape[1],
            scored=scored,
            targets=states if trajectory.guesses is None else trajectory.guesses[rows, steps],
            rows=rows,
            steps=steps,
            holes=holes.sum(1),
            length=scored.sum(1) + int(self.order is not None),
            order=None if self.order is None else _order(self.order, trajectory, rows, steps, holes),
        )


def _order(action: Action, trajectory: TokenTrajectory, rows: Tensor, steps: Tensor, holes: Tensor) -> Order:
    """What the rule saw and chose at ``steps`` (N,) of chains ``rows`` (N,), with ``holes`` (N, R)."""
    assert trajectory.confidence is not None and trajectory.block is not None and trajectory.order is not None
    share = trajectory.expert_share
    return Order(
        action=action,
        inputs=UnmaskInputs(
            masked=holes,
            block=trajectory.block[rows, steps],
            confidence=trajectory.confidence[rows, steps],
            valid=trajectory.response_valid[rows],
            step=steps,
            planned=trajectory.planned[rows],
        ),
        ranks=trajectory.order[rows, steps],
        expert_share=torch.zeros(len(rows)) if share is None else share[rows],
    )


@dataclass(kw_only=True)
class OneStepLikelihood(TokenLikelihood, name="one_step"):
    """One forward pass with the whole response masked and a random part of the prompt masked (diffu-GRPO, 2504.12216).

    Every inner update masks the prompt anew. Given (infilled) response positions are masked and scored like the rest.
    """

    per_step: ClassVar[bool] = False
    prompt_mask: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Probability of masking each prompt token."""
    after_end: AfterEnd = "drop"
    """``drop``: tokens up to and including the first end token count; ``keep``: the whole response does."""

    def __post_init__(self) -> None:
        self.resamples = self.prompt_mask > 0

    def views(
        self,
        trajectory: TokenTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: DenoiserSpec,
        inner: Inner = FIRST,
    ) -> TokenViews:
        batch, width = trajectory.prompt_ids.shape
        prompt_valid, response_valid = trajectory.valid[:, :width], trajectory.response_valid
        drawn = torch.ones(batch, width)
        for row, seed in enumerate(seeds):
            # Drawn for the prompt's own length: padding of the batch must not change what is masked.
            own = prompt_valid[row].nonzero().squeeze(1)
            drawn[row, own] = torch.rand(len(own), generator=generator(derive_seed(seed, inner.number), "prompt mask"))
        prompts = torch.where(prompt_valid & (drawn < self.prompt_mask), spec.mask_id, trajectory.prompt_ids)
        masked = torch.where(response_valid, spec.mask_id, trajectory.response_ids)
        scored = answered(trajectory, spec, self.after_end)
        return TokenViews(
            ids=torch.cat([prompts, masked], 1),
            valid=trajectory.valid,
            prompt_width=width,
            scored=scored,
            targets=trajectory.response_ids,
            rows=torch.arange(batch),
            steps=trajectory.last_steps,
            holes=response_valid.sum(1),
            length=scored.sum(1),
        )


def answered(trajectory: TokenTrajectory, spec: DenoiserSpec, after_end: AfterEnd) -> Tensor:
    """(B, R) the response tokens that count: all of them, or those up to and including the first end token.

    Holes that a chain ended with are no tokens.
    """
    tokens = trajectory.response_valid & (trajectory.response_ids != trajectory.mask_id)
    if after_end == "keep":
        return tokens
    return tokens & up_to_end(trajectory.response_ids, spec.end_ids)


def up_to_end(ids: Tensor, end_ids: Sequence[int]) -> Tensor:
    """(B, R) True up to and including the first end token of each row."""
    ends = torch.isin(ids, torch.tensor(list(end_ids), device=ids.device))
    return (ends.cumsum(1) - ends.long()) == 0


def without(views: TokenViews, keep: Tensor) -> TokenViews:
    """The views with only the tokens that ``keep`` (N, C); an order always stays.

    Without coefficients a dropped token also leaves the length; an estimator's length is that of its answer.
    """
    scored = views.scored & keep[:, : views.scored.shape[1]]
    dropped = views.scored.sum(1) - scored.sum(1) if views.coefficient is None else 0
    return replace(views, scored=scored, length=views.length - dropped)
