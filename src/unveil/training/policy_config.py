"""What a policy method is made of: the recipe's part that `PolicyJob` carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from unveil.learning.advantages import Advantage, GroupAdvantage
from unveil.learning.gates import Gate
from unveil.learning.likelihoods import TokenViews, TrajectoryLikelihood
from unveil.learning.objectives import Clipped, Objective, TokenMean, Weighting
from unveil.learning.regularisers import Kl, Regulariser
from unveil.learning.selectors import AllSteps, Selector
from unveil.learning.views import Likelihood, TokenFilter
from unveil.registry import Plugin, UserError
from unveil.rewards.base import Correct, Reward, Sum
from unveil.samplers.base import Sampler
from unveil.tasks.base import Task
from unveil.tasks.evaluate import Judged
from unveil.training.rollouts import GroupHook, Shaping

SMALL = 8
"""Samples per group, and prompts per update, below which group-relative advantages on images are mostly noise."""


class ProblemFilter(Plugin, family="filter"):
    """Chooses the problems of an epoch by what the present policy does with them."""

    pool: Annotated[int, Field(ge=1)]
    """Candidates per epoch."""
    every: Annotated[int, Field(ge=1)]
    """Updates per epoch."""
    decoder: Sampler
    """How candidates are decoded."""

    def keep(self, judged: Judged) -> Tensor:
        """(B,) True at problems to train on."""
        raise NotImplementedError


@dataclass(kw_only=True)
class RolloutConfig:
    """How samples are drawn for training."""

    sampler: Sampler
    """The decoder; the log-probabilities are those of what it draws from."""
    response_length: Annotated[int, Field(ge=1)] | None = None
    """Response positions of text; None for samples whose shape is the network's."""
    prompts: Annotated[int, Field(ge=1)] = 16
    """Problems per update."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts per problem: one group."""
    block_lengths: list[int] = field(default_factory=list)
    """If given, every update draws one of these block lengths for all its rollouts (MDPO's mixture)."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Rows per network call."""
    score_beside: bool = False
    """Judge and reward every batch of whole groups in a thread while the next one is drawn: for rewards that wait for a
    server, or work on the processor while the network works on a GPU. Nothing else changes."""
    drawn_by: Literal["policy", "old", "ema"] = "policy"
    """Whose samples they are: those of the policy as it is, or of a snapshot (``snapshots``)."""


@dataclass(kw_only=True)
class PolicyConfig:
    """A method: five small choices and the task that they are made for."""

    task: Task
    """Problems and verifier."""
    reward: Reward = field(default_factory=Correct)
    """What is optimised. Accuracy and the task's shaped score are logged whatever it is."""
    shaping: Shaping | None = None
    """Changes the reward by how the chain came about; None: it stays."""
    rollout: RolloutConfig
    """How samples are drawn."""
    filter: ProblemFilter | None = None
    """Which problems are worth training on; None: all."""
    groups: GroupHook | None = None
    """Repairs or extends groups before advantages are taken; None: they stay as sampled."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """What was good."""
    selector: Selector = field(default_factory=AllSteps)
    """Which steps are trained on (for likelihoods that have steps)."""
    likelihood: Likelihood = field(default_factory=TrajectoryLikelihood)
    """What stands in for log p."""
    token_filter: TokenFilter | None = None
    """Which tokens count, by the entropy of the policy that drew them; None: all."""
    objective: Objective = field(default_factory=Clipped)
    """How it becomes a loss."""
    weighting: Weighting = field(default_factory=TokenMean)
    """Who is averaged over what."""
    kl: Regulariser = field(default_factory=Kl)
    """What holds the policy back; without a name an estimate of the KL divergence."""
    regularisers: dict[str, Regulariser] = field(default_factory=dict)
    """Further ones, by their name in the log."""
    gate: Gate | None = None
    """Which samples the regularisers hold back; None: all."""
    inner_updates: Annotated[int, Field(ge=1)] = 1
    """Passes over the same rollouts, with stored old log-probabilities."""
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Gradient steps of a pass, each on its own share of the chains, which are dealt out at random."""

    @property
    def in_force(self) -> dict[str, Regulariser]:
        """The regularisers with a strength above 0, by their name in the log."""
        return {name: one for name, one in {"kl": self.kl, **self.regularisers}.items() if one.beta > 0}

    @property
    def keeps_reference(self) -> bool:
        """Whether anything is compared with the reference policy."""
        return any(one.towards == "reference" for one in self.in_force.values())

    @property
    def snapshots(self) -> dict[str, str]:
        """The snapshots that a run must keep for this method, and the keys that ask for them."""
        wanted: dict[str, str] = {one.towards: f"policy.{_key(name)}.towards" for name, one in self.in_force.items()}
        if self.rollout.drawn_by != "policy":
            wanted[self.rollout.drawn_by] = "policy.rollout.drawn_by"
        return wanted

    @property
    def warnings(self) -> list[str]:
        """What is allowed and mostly fails."""
        rollout = self.rollout
        small = self.task.medium == "image" and min(rollout.group_size, rollout.prompts) < SMALL
        if not (small and self.advantage.by_group):
            return []
        return [
            f"policy.rollout: group_size {rollout.group_size} and {rollout.prompts} prompts make advantages mostly "
            f"noise; runs of images by {self.advantage.name!r} often collapse with fewer than {SMALL} of either"
        ]

    @property
    def needs(self) -> set[str]:
        """The trajectory fields that somebody will read."""
        needs = {name for reader in self.readers.values() for name in reader.needs}
        return needs | ({"guesses"} if self.advantage.reads_guesses else set())

    @property
    def readers(self) -> dict[str, Any]:
        """Who declares the trajectory fields that it reads, by its key."""
        known = {
            "likelihood": self.likelihood, "weighting": self.weighting, "groups": self.groups,
            "shaping": self.shaping, "selector": self.selector if self.likelihood.per_step else None,
        }  # fmt: skip
        return {key: reader for key, reader in known.items() if reader is not None}

    def __post_init__(self) -> None:
        advantage, likelihood = self.advantage, self.likelihood
        self.reward.check_medium(self.task.medium, "reward")
        if likelihood.differentiates:
            self.reward.check_differentiable("reward")
            if self.shaping is not None:
                raise UserError(f"shaping: {likelihood.name!r} differentiates the reward as it is (allowed: null)")
        if advantage.features is not None and advantage.features.medium != self.task.medium:
            raise UserError(
                f"advantage: {advantage.name!r} compares {advantage.features.medium}s, and the task's samples are "
                f"{self.task.medium}s"
            )
        if advantage.reads_parts and not isinstance(self.reward, Sum):
            raise UserError(
                f"advantage: {advantage.name!r} mixes the parts of a sum of rewards, and the reward is "
                f"{self.reward.name!r} (allowed: sum)"
            )
        if advantage.reads_parts and self.shaping is not None:
            raise UserError(f"shaping: it changes the sum, and {advantage.name!r} reads its parts (allowed: null)")
        if self.gate is not None and self.gate.reads_audits and not self.reward.audit_weights:
            raise UserError(
                f"gate: {self.gate.name!r} compares the reward with others, and the reward {self.reward.name!r} has no "
                "part with the role 'audit' (allowed: a sum that has one)"
            )
        if "kl" in self.regularisers:
            raise UserError("regularisers.kl: the name is that of `kl` (allowed: any other)")
        for name, one in self.in_force.items():
            if missing := sorted(one.reads - likelihood.gives):
                raise UserError(
                    f"{_key(name)}: {one.name!r} reads the {missing[0]} of a step, which the likelihood "
                    f"{likelihood.name!r} does not give"
                )
        self._check_views()
        self._check_weights()
        if not advantage.per_step:
            return
        if self.objective.level == "sequence":
            raise UserError(
                f"objective.level: 'sequence' takes one advantage per chain, and {advantage.name!r} gives one per step "
                "(allowed: token, part, step)"
            )
        if not likelihood.per_step:
            raise UserError(
                f"likelihood: {likelihood.name!r} takes one advantage per chain, and {advantage.name!r} gives one per "
                "step (allowed: a likelihood of steps, such as trajectory)"
            )

    def _check_views(self) -> None:
        made = self.likelihood.makes
        readers: dict[str, Weighting | Regulariser] = {"weighting": self.weighting}
        for key, one in (readers | {_key(name): one for name, one in self.in_force.items()}).items():
            if not issubclass(made, one.reads_views):
                raise UserError(
                    f"{key}: {one.name!r} reads {one.reads_views.called}, and the likelihood {self.likelihood.name!r} "
                    f"scores {made.called}"
                )
        order = self.likelihood.order if isinstance(self.likelihood, TrajectoryLikelihood) else None
        if order is not None and not self.weighting.weighs_orders:
            raise UserError(
                f"weighting: {self.weighting.name!r} weighs tokens alone, and likelihood.order is {order.name!r} "
                "(allowed: null, or another weighting)"
            )
        if self.token_filter is not None and not issubclass(made, TokenViews):
            raise UserError(
                f"token_filter: {self.token_filter.name!r} chooses among tokens, and the likelihood "
                f"{self.likelihood.name!r} scores {made.called} (allowed: null)"
            )

    def _check_weights(self) -> None:
        objective, weighting, likelihood = self.objective, self.weighting, self.likelihood
        if weighting.carries_advantages and objective.reads_advantages:
            raise UserError(
                f"objective: {objective.name!r} would count the advantages that the weighting {weighting.name!r} "
                "carries once more (allowed: an objective without any, such as fit)"
            )
        if weighting.carries_advantages:
            return
        if likelihood.makes.opposed:
            raise UserError(
                f"weighting: {weighting.name!r} weighs {likelihood.makes.called} alike, and the gradients of the "
                f"likelihood {likelihood.name!r} cancel (allowed: one that carries the advantages, such as optimality)"
            )
        if not objective.reads_advantages:
            raise UserError(
                f"objective: {objective.name!r} reads no advantages, and the weighting {weighting.name!r} carries "
                "none: nothing would say what was good (allowed: another objective)"
            )


def _key(name: str) -> str:
    return "kl" if name == "kl" else f"regularisers.{name}"


@dataclass(kw_only=True)
class PolicyEval:
    """How progress is measured: held-out problems, decoded greedily."""

    every: Annotated[int, Field(ge=1)] = 25
    """Updates between two evaluations."""
    problems: Annotated[int, Field(ge=1)] = 512
    """Held-out problems."""
    decoders: dict[str, Sampler]
    """Named ways to decode."""
    shown: Annotated[int, Field(ge=0)] = 8
    """Problems whose completions and trajectories are kept for the report, the same at every evaluation."""
