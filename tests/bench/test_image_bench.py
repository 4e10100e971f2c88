"""The bench compares equals; how fast this machine is, is not tested."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from unveil.bench import _updates, image
from unveil.cli.main import main
from unveil.denoisers.dit import Dit
from unveil.registry import UserError

TINY = (Dit(patch=2, dim=48, layers=1, heads=2, hidden=96), (1, 4, 4))


METHODS = {sides.method: sides for sides in _updates.METHODS}


@pytest.fixture(scope="module")
def result() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image.NETWORKS, "tiny", TINY)
        return image.run(repeats=2, steps=4, group=2, networks=["tiny"])


def test_both_sides_do_the_same_work(result: Any) -> None:
    assert [case["method"] for case in result["cases"]] == list(METHODS) == ["flow_grpo", "diffusion_nft"]
    for case in result["cases"]:
        assert case["identical"] and case["difference"] < 0.05 and case["gradient_difference"] < 1e-5
        assert case["ratio_min"] <= case["ratio"] <= case["ratio_max"]
    assert result["setting"]["chains"] == 8


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("flow_grpo", "noise", 0.6), ("flow_grpo", "clip", 1e-9), ("flow_grpo", "steps", 3), ("flow_grpo", "group", 4),
        ("diffusion_nft", "beta", 0.9), ("diffusion_nft", "limit", 4.0), ("diffusion_nft", "group", 4),
    ],
)  # fmt: skip
def test_sides_that_differ_are_told_apart(method: str, name: str, value: float) -> None:
    sides = METHODS[method](*TINY, steps=4, group=2, seed=0)
    setattr(sides.plain, name, value)
    assert not sides.difference().none


def test_an_old_policy_that_does_not_follow_is_told_from_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = METHODS["diffusion_nft"](*TINY, steps=4, group=2, seed=0)
    monkeypatch.setattr(sides.plain, "follow", lambda decay: None)
    said = sides.difference()
    assert said.gradient < 1e-5 and said.weights > 1


def test_memory_does_not_grow_with_the_steps(result: Any) -> None:
    for case in result["cases"]:
        assert case["memory_ratio"] < 1.05
        assert 0 < case["peak_bytes"] < 1.1 * case["reference_peak_bytes"]


class Counted(TorchDispatchMode):
    """How many operations on tensors there are, but draws of noise."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket not in (torch.ops.aten.normal_, torch.ops.aten.randn)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "most"), [("flow_grpo", 110), ("diffusion_nft", 140)])
def test_what_a_step_costs_beyond_the_loop_is_few_operations(method: str, most: int) -> None:
    """Of a step, rollout and training: the coefficients of its times are not computed anew, nor statistics of it."""
    more = []
    for steps in (4, 8):
        sides = METHODS[method](*TINY, steps=steps, group=4, seed=0)
        sides.ours()
        for side in (sides.ours, sides.reference):
            with Counted() as counted:
                side()
            more.append(counted.count)
    assert more[2] - more[0] < more[3] - more[1] + 4 * most


def test_a_graph_over_the_whole_chain_would_be_seen() -> None:
    """The same measure on a loop that keeps all steps' activations until one backward pass."""

    def peak(steps: int) -> int:
        sides = _updates.FlowGrpoSides(*TINY, steps=steps, group=2, seed=0)

        def whole() -> None:
            x = torch.zeros(8, *TINY[1])
            losses = [sides.plain._step(x, sides.ids, step)[0].square().mean() for step in range(steps)]
            torch.stack(losses).sum().backward()

        return image._peak(sides, whole)

    assert peak(16) > 1.5 * peak(4)


def test_the_verdict_follows_the_demands_and_the_result_prints(result: Any) -> None:
    for case in result["cases"]:
        assert case["holds"] == (case["ratio"] <= 1.05 and case["memory_ratio"] <= 1.05)
    assert result["holds"] == all(case["holds"] for case in result["cases"])
    assert json.loads(json.dumps(result)) == result
    names = {f"{method} tiny" for method in METHODS}
    assert set(result["ratios"]) == names | {f"memory {name}" for name in names}
    page = io.StringIO()
    Console(file=page, width=160).print(image.render(result))
    assert "Flow-GRPO, tiny: seconds" in page.getvalue() and "DiffusionNFT, tiny" in page.getvalue()


def test_bad_input() -> None:
    with pytest.raises(UserError, match="steps: should be at least 2, got 1"):
        image.run(steps=1)
    assert main(["bench", "image", "--model", "digits-base"]) == 2
    assert main(["bench", "image", "--batch", "3"]) == 2
