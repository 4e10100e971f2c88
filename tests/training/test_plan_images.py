"""Plans of image runs against what the runs themselves count, keep and compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny_images as tiny
from unveil.bench._memory import peak_bytes
from unveil.cli.main import main
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.shells import shell
from unveil.learning.advantages import GroupAdvantage, PromptHistory
from unveil.recipe import build, load
from unveil.registry import UserError
from unveil.systems import catalogue
from unveil.tasks.digits import Digits
from unveil.training import plan_images
from unveil.training.rehearsal import chain_forwards, rehearse
from unveil.training.runs import TrainRecipe, train
from unveil.training.trainer import OptimConfig

RECIPES = Path(plan_images.__file__).parent.parent / "recipes"
IMAGE = {system.name for system in catalogue() if system.family == "image"}
CPU = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in RECIPES.glob("*/*.yaml")
    if path.parent.name in IMAGE - {"alignprop"} and path.stem not in ("full", "multi")
)
SMALL = ("policy.rollout.prompts=2", "eval.problems=1", "eval.shown=0", "log.tensorboard=false")


def recipe_of(name: str, *overrides: str) -> TrainRecipe:
    return build(TrainRecipe, load(RECIPES / f"{name}.yaml", list(overrides)))


def run_and_plan(name: str, folder: Path, *overrides: str) -> tuple[dict[str, Any], Any]:
    """What a run of a few updates has counted, and the plan of it."""
    recipe = recipe_of(name, *SMALL, *overrides)
    assert train(recipe, folder)
    cost = json.loads((folder / "run.json").read_text())["cost"]
    _, denoiser = shell(recipe.model.path, None)
    return cost, rehearse(recipe, denoiser.spec)


@pytest.mark.parametrize("name", [name for name in CPU if not name.startswith("b2_diffurl")])
def test_a_run_counts_what_was_planned(name: str, tmp_path: Path) -> None:
    # Windows that move do so; a batch that cuts groups cuts what they share.
    more = ("policy.rollout.sampler.window.every=1",) if name == "flow_grpo/mix" else ()
    cost, (updates, counts) = run_and_plan(
        name, tmp_path / "run", "policy.rollout.group_size=4", "updates=3", "policy.rollout.batch_size=3", *more
    )
    assert counts.exact and len(updates) == 3
    planned = {"rollouts": counts.rollouts, "forwards": counts.forwards, "optimizer_steps": counts.optimizer_steps}
    assert planned == {key: cost[key] for key in planned}


def test_what_rewards_decide_is_bounded(tmp_path: Path) -> None:
    """B2-DiffuRL trains on at most two leaves of a stem; with all of them chosen the count is exact."""
    group = ("policy.rollout.group_size=10", "policy.rollout.sampler.window.stages=3", "updates=4")
    cost, (updates, counts) = run_and_plan("b2_diffurl/cpu", tmp_path / "most", *group)
    assert not counts.exact and cost["rollouts"] == counts.rollouts == 80
    assert sum(one.drawn for one in updates) <= cost["forwards"] <= counts.forwards
    assert cost["optimizer_steps"] <= counts.optimizer_steps == 8
    assert updates[0].views == 2 * 2 * 2 * 7 and len({one.forwards for one in updates}) > 1
    cost, (_, counts) = run_and_plan("b2_diffurl/cpu", tmp_path / "all", *group, "policy.selector=all")
    assert counts.exact and (counts.forwards, counts.optimizer_steps) == (cost["forwards"], cost["optimizer_steps"])


def test_evaluations_are_counted_apart() -> None:
    recipe = recipe_of(
        "flow_grpo/cpu",
        "updates=5",
        "eval.every=2",
        "eval.problems=3",
        "eval.shown=1",
        "eval.decoders.two={name: latent, steps: 2}",
    )
    _, denoiser = shell("digits-base", None)
    _, counts = rehearse(recipe, denoiser.spec)
    assert counts.evaluations == 4 * (3 + 1) * (10 + 2)  # after 0, 2, 4 and 5 updates


def test_operations_are_those_that_torch_counts() -> None:
    """On the real network, whose attention the counter knows in its plain form."""
    recipe = recipe_of("flow_grpo/cpu")
    _, empty = shell("digits-base", None)
    shape = plan_images.shape_of(empty, recipe)
    real = load_denoiser("digits-base")
    assert shape.parameters == shape.trained == sum(one.numel() for one in real.parameters())
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5, dtype=torch.float64)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as forward:
        loss = real.predict(x, t, real.condition(["1", "2", "3"])).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == 3 * shape.forward and backward.get_total_flops() == 3 * shape.backward


@pytest.mark.parametrize("microbatch", [48, 512])
def test_memory_is_within_a_quarter_of_what_is_measured(tmp_path: Path, microbatch: int) -> None:
    """One by rollouts, one by activations. Measured are bytes of live tensors."""
    recipe = recipe_of("flow_grpo/cpu", "policy.rollout.prompts=4", "policy.rollout.group_size=8")
    net, optim = load_denoiser("digits-base"), OptimConfig(lr=1e-3, microbatch=microbatch)
    job = tiny.job(tmp_path, replace(recipe.policy, task=Digits()), net, optim=optim)  # type: ignore[arg-type]
    job.update(0, job.trainer.optimise)
    states = [value for state in job.trainer.optimizer.state.values() for value in state.values()]
    own = list(net.parameters())
    fixed = [*own, *(p.grad for p in own if p.grad is not None), *states]
    measured = peak_bytes(lambda: job.update(1, job.trainer.optimise), torch.device("cpu"), fixed)
    _, empty = shell("digits-base", None)
    recipe = replace(recipe, optim=optim)
    (update, *_), _ = rehearse(recipe, empty.spec)
    shape, work = plan_images.shape_of(empty, recipe), plan_images.work_of(recipe, update, 1)
    estimated = plan_images.memory(shape, work, fixed=0.0)["peak"] + plan_images.host_memory(shape, work)["held"]
    assert 0.75 < estimated / measured < 1.25


def test_what_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*words: str) -> tuple[int, dict[str, Any]]:
        status = main(["plan", *words, "--json"])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    status, said = answer("flow_grpo")
    assert status == 0 and said["fits"] and said["warnings"] == [] and said["counts"]["exact"]
    assert said["counts_per_update"] == {"rollouts": 240, "forwards": 4560, "optimizer_steps": 2}
    assert said["counts"]["forwards"] == 40 * 4560 and said["host_memory_gb"]["held"] >= 0
    status, said = answer("flow_grpo", "--memory", "2.3", "optim.microbatch=4096")
    assert status == 1 and any(line.startswith("optim.microbatch=") for line in said["change"])
    smaller = [line for line in said["change"] if "=" in line]
    assert answer("flow_grpo", "--memory", "2.3", *smaller)[0] == 0
    for words, message in (
        (["flow_grpo", "model.path=nowhere/x"], "model.path: nothing is known of 'nowhere/x', and there is no such"),
        (["flow_grpo", "model.path=countdown-base"], "is no model of images"),
        (["flow_grpo", "--prompt-tokens", "3"], "--prompt-tokens: of models of text"),
        (["flow_grpo", "distributed.shard=full", "--gpus", "2"], "distributed.shard: 'full' is for models of text"),
        (["flow_grpo", "policy.rollout.sampler.kernel={name: ddim, eta: 0}"], "leaves nothing to score"),
        (["judge-digits"], "neither a recipe for `unveil train` nor one of a denoiser for `unveil pretrain`"),
    ):
        status, said = answer(*words)
        assert status == 2 and message in said["error"] and "\n" not in said["error"], said


def test_small_groups_are_warned_of_where_they_are_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of images, and only of advantages that are relative to the group; the run goes on."""
    small = {"prompts": 8, "group_size": 7}
    (line,) = tiny.policy(advantage=GroupAdvantage(), rollout=small).warnings
    assert "group_size 7 and 8 prompts" in line and "\n" not in line
    assert tiny.policy(advantage=GroupAdvantage(), rollout={"prompts": 7, "group_size": 8}).warnings
    assert not tiny.policy(advantage=GroupAdvantage(), rollout={"prompts": 8, "group_size": 8}).warnings
    assert not tiny.policy(advantage=PromptHistory(), rollout=small).warnings
    argv = ["policy.rollout.group_size=4", *SMALL, "updates=1", "--quiet"]
    assert main(["train", "flow_grpo", *argv, "--run", str(tmp_path / "run")]) == 0
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("warning: policy.rollout")]
    assert said == [f"warning: {recipe_of('flow_grpo/cpu', *argv[:-1]).policy.warnings[0]}"]
    assert not recipe_of("ddpo/cpu", *argv[:-1]).policy.warnings
    assert main(["plan", "flow_grpo", *argv[:-1]]) == 0
    assert said[0] in capsys.readouterr().out


def test_a_filter_cannot_be_planned() -> None:
    recipe = recipe_of("flow_grpo/cpu")
    _, denoiser = shell("digits-base", None)
    recipe.policy.filter = type("Filter", (), {"name": "mine"})()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"policy\.filter: 'mine' draws what cannot be counted beforehand"):
        rehearse(recipe, denoiser.spec)


def test_a_chain_that_is_run_again_cannot_be_planned() -> None:
    recipe = recipe_of("alignprop/cpu")
    with pytest.raises(UserError, match=r"policy\.likelihood: 'rollout_reward' runs chains again"):
        rehearse(recipe, shell(recipe.model.path, None)[1].spec)


def test_a_chain_counts_solver_and_guidance() -> None:
    from unveil.samplers.guidance import ClassifierFree
    from unveil.samplers.latent_solvers import Heun
    from unveil.training.rehearsal import StandIn

    stand_in = StandIn(load_denoiser("digits-base").spec)
    sampler = tiny.LatentSampler(steps=4, solver=Heun(), guidance=ClassifierFree(scale=2.0))
    assert chain_forwards(sampler, stand_in) == 2 * (2 * 4 - 1)
