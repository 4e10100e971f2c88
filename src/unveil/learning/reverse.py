"""The reverse process' own step probability as policy (DCoLT, arXiv 2505.10446, for score networks).

Every masked position of a step counts, also those that stayed masked: with a network of scores the probability of
staying is the network's, so that the policy gradient also teaches it when tokens appear. With a masked process moving
or staying is a coin that no weight turns, and only the revealed tokens have a gradient. With uniform noise every
position counts at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.learning.likelihoods import TokenLikelihood, TokenViews
from unveil.learning.scoring import in_chunks
from unveil.learning.views import FIRST, Inner, Scores
from unveil.processes.score_entropy import Method
from unveil.registry import UserError
from unveil.samplers.base import Sampler, TokenSampler
from unveil.samplers.reverse import ReverseSampler
from unveil.samplers.trajectory import TokenTrajectory
from unveil.samplers.uniform import Ancestral


@dataclass(kw_only=True)
class ReverseLikelihood(TokenLikelihood, name="reverse"):
    """The states that the sampler `reverse` or `ancestral` visited: log p(x_s | x_t) of every position that was open at
    time t."""

    needs = frozenset({"states", "guesses", "revealed", "times"})
    method: Method = "tweedie"
    """How a score network's reverse rates are integrated; that of rollout.sampler."""

    def check_fits(self, sampler: Sampler, denoiser: MaskedDenoiser) -> None:
        if isinstance(sampler, Ancestral):
            if denoiser.spec.canvas_length is not None:
                raise UserError("policy.likelihood: 'reverse' needs a network without a cache of the text before it")
            return
        if not isinstance(sampler, ReverseSampler):
            raise UserError(f"policy.likelihood: 'reverse' scores that sampler and 'ancestral', not {sampler.name!r}")
        if self.method != sampler.method:
            raise UserError(
                f"policy.likelihood.method: should be {sampler.method!r} as in rollout.sampler, got {self.method!r}"
            )

    def views(
        self,
        trajectory: TokenTrajectory,
        chosen: Tensor,
        seeds: Sequence[int],
        spec: DenoiserSpec,
        inner: Inner = FIRST,
    ) -> TokenViews:
        rows, steps = ((chosen > 0) & trajectory.active).nonzero(as_tuple=True)
        assert trajectory.guesses is not None and trajectory.revealed is not None and trajectory.times is not None
        states, holes = trajectory.states_at(rows, steps), trajectory.holes_at(rows, steps)
        targets = torch.where(trajectory.revealed[rows, steps], trajectory.guesses[rows, steps], states)
        if spec.corruption == "uniform":
            assert trajectory.states is not None
            holes = (trajectory.response_valid & ~trajectory.given)[rows]
            targets = torch.cat([trajectory.states[:, 1:], trajectory.response_ids[:, None]], 1)[rows, steps]
        return TokenViews(
            ids=torch.cat([trajectory.prompt_ids[rows], states], 1),
            valid=trajectory.valid[rows],
            prompt_width=trajectory.prompt_ids.shape[1],
            scored=holes,
            targets=targets,
            rows=rows,
            steps=steps,
            holes=holes.sum(1),
            length=holes.sum(1),
            times=trajectory.times[rows, steps],
        )

    def score(self, denoiser: MaskedDenoiser, views: TokenViews, sampler: TokenSampler) -> Scores:
        """Log-probabilities of the next states, by the transition that the sampler drew them from."""
        device = denoiser.device
        scored = views.scored.to(device)
        assert views.times is not None
        times = views.times.to(device)
        canvas = denoiser.features(views.ids.to(device), views.valid.to(device), times[:, 0])
        row, column = scored.nonzero(as_tuple=True)
        features = canvas[row, views.prompt_width + column]
        here, targets = (ids.to(device)[row, column] for ids in (views.ids[:, views.prompt_width :], views.targets))
        inputs = (features, here, targets, times[row])
        log_prob, entropy = in_chunks(_score_rows, denoiser, inputs, sampler.temperature, self.method)
        nothing = torch.zeros(scored.shape, device=device)
        return Scores(
            log_prob=nothing.masked_scatter(scored, log_prob),
            entropy=nothing.masked_scatter(scored, entropy),
            forwards=len(views),
        )


def _score_rows(
    denoiser: MaskedDenoiser,
    features: Tensor,
    here: Tensor,
    targets: Tensor,
    times: Tensor,
    temperature: float,
    method: Method,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of the next states ``targets`` of N positions in states ``here``, and entropies (N,)."""
    spec = denoiser.spec
    process = spec.uniform if spec.corruption == "uniform" else spec.process(method)
    transition = process.step(denoiser.head(features), here, times[:, 0], times[:, 1], temperature)
    with torch.no_grad():
        entropy = transition.entropy()
    return transition.log_prob(targets), entropy
