"""Composition: every objective with every decoding rule that its contract allows, on two architectures.

A cell is two updates of a system's shipped recipe (its advantage, likelihood, objective, weighting ...) with another
rule and network: on-policy ratios are exactly 1 before the first gradient step, and weights move and stay finite. A
pair that cannot work is refused before anything runs, with one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
import unveil
from unveil.denoisers.base import MaskedDenoiser
from unveil.learning.likelihoods import TrajectoryLikelihood
from unveil.learning.objectives import Clipped
from unveil.recipe import build, load
from unveil.registry import UserError, lookup, names
from unveil.samplers.actions import Bernoulli, DynamicPlackettLuce, PlackettLuce
from unveil.samplers.masked import MaskedSampler
from unveil.samplers.rules import Policy, Rule
from unveil.training.policy_config import PolicyConfig
from unveil.training.runs import TrainRecipe

RECIPES = Path(unveil.__file__).parent / "recipes"
NETWORKS: dict[str, Callable[[], MaskedDenoiser]] = {"transformer": tiny.denoiser, "pooled": tiny.Pooled}
RULES: dict[str, Rule] = {name: lookup(Rule, name)() for name in names(Rule) if name != "policy"}
RULES |= {f"policy {a.name}": Policy(action=a) for a in (PlackettLuce(), Bernoulli(), DynamicPlackettLuce())}


def trained_systems() -> Iterator[tuple[str, TrainRecipe]]:
    """Every system whose cpu recipe trains a sampler of masked tokens."""
    for folder in sorted(RECIPES.iterdir()):
        data = load(folder / "cpu.yaml")
        if "policy" in data:
            recipe = build(TrainRecipe, data)
            if isinstance(recipe.policy.rollout.sampler, MaskedSampler):
                yield folder.name, recipe


SYSTEMS = dict(trained_systems())


def cell(system: str, rule: Rule) -> PolicyConfig:
    """The recipe's method on the tiny task, with another rule."""
    policy = SYSTEMS[system].policy
    sampler = policy.rollout.sampler
    assert isinstance(sampler, MaskedSampler)
    transform = sampler.transform if rule.follows_schedule and rule.confidence in ("probability", "margin") else None
    own = replace(sampler, steps=5, block_length=None, schedule=MaskedSampler(steps=1).schedule, rule=rule,
                  transform=transform, temperature=0.7)  # fmt: skip
    return replace(policy, task=tiny.Echo(), rollout=tiny.rollouts(sampler=own), filter=None)


class Ratios(Clipped):
    """Clipped, and remembers how far ratios were from 1."""

    def terms(self, log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        self.__dict__.setdefault("deviations", []).append((log_prob - old).detach().abs().max().item())
        return super().terms(log_prob, old, advantage)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_updates(tmp_path: Path, system: str, rule: str, network: str) -> None:
    config = cell(system, RULES[rule])
    net = NETWORKS[network]()
    if isinstance(RULES[rule], Policy) or SYSTEMS[system].model.unmask is not None:
        tiny.with_policy(net, features=True)
    scores_order = isinstance(config.likelihood, TrajectoryLikelihood) and config.likelihood.order is not None
    if scores_order and config.likelihood.order != config.rollout.sampler.action:  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"policy\.likelihood\.order: should be the action of rollout\.sampler"):
            tiny.job(tmp_path, config, net)
        return
    job = tiny.job(tmp_path, config, net)
    objective = config.objective
    assert isinstance(objective, Clipped)
    spy = Ratios(**{key: value for key, value in vars(objective).items() if not key.startswith("_")})
    config.objective = spy
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first: list[float] = []
    moved = False
    for update in range(2):

        def optimise(losses: object) -> dict[str, float]:
            start = len(spy.__dict__.get("deviations", []))
            result = job.trainer.optimise(losses)  # type: ignore[arg-type]
            first.append(max(spy.__dict__.get("deviations", [])[start:], default=0.0))
            return result

        first.clear()
        metrics = job.update(update, optimise)
        assert first[0] == 0.0, "the ratio is exactly 1 before the first gradient step"
        assert metrics["skipped"] == 0 and torch.isfinite(torch.tensor(metrics["loss"]))
        moved |= metrics["grad_norm"] > 0
    assert moved
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_every_trained_system_is_in_the_matrix() -> None:
    assert set(SYSTEMS) >= {"mdpo", "diffu_grpo"}


def test_pairs_that_cannot_work_are_refused_with_one_line() -> None:
    mdpo, one_step = tiny.policy("mdpo"), tiny.policy("diffu_grpo").likelihood
    for change, match in (
        ({"objective": Clipped(level="sequence")}, "takes one advantage per chain, and 'improvement' gives one per"),
        ({"likelihood": one_step}, "'one_step' takes one advantage per chain"),
    ):
        with pytest.raises(UserError, match=match) as refused:
            replace(mdpo, **change)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)
