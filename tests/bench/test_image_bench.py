"""The bench compares equals; how fast this machine is, is not tested."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from unveil.bench import image
from unveil.cli.main import main
from unveil.denoisers.dit import Dit
from unveil.registry import UserError

TINY = (Dit(patch=2, dim=48, layers=1, heads=2, hidden=96), (1, 4, 4))


@pytest.fixture(scope="module")
def result() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image.NETWORKS, "tiny", TINY)
        return image.run(repeats=2, steps=4, group=2, networks=["tiny"])


def test_both_sides_do_the_same_work(result: Any) -> None:
    (case,) = result["cases"]
    assert case["identical"] and case["difference"] < 0.05
    assert case["ratio_min"] <= case["ratio"] <= case["ratio_max"]
    assert result["setting"]["chains"] == 8


def test_sides_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"noise": 0.6}, {"clip": 1e-9}, {"steps": 3}):
        sides = image.Sides(*TINY, steps=4, group=2, seed=0)
        for name, value in change.items():
            setattr(sides.plain, name, value)
        assert sides.difference() > 0.05, change


def test_memory_does_not_grow_with_the_steps(result: Any) -> None:
    (case,) = result["cases"]
    assert case["memory_ratio"] < 1.05
    assert case["peak_bytes"] > 0
    assert case["peak_bytes"] < 1.1 * case["reference_peak_bytes"]


def test_a_graph_over_the_whole_chain_would_be_seen() -> None:
    """The same measure on a loop that keeps all steps' activations until one backward pass."""

    def peak(steps: int) -> int:
        sides = image.Sides(*TINY, steps=steps, group=2, seed=0)

        def whole() -> None:
            x = torch.zeros(8, *TINY[1])
            losses = [sides.plain._step(x, sides.ids, step)[0].square().mean() for step in range(steps)]
            torch.stack(losses).sum().backward()

        return image._peak(sides, whole)

    assert peak(16) > 1.5 * peak(4)


def test_the_verdict_follows_the_demands_and_the_result_prints(result: Any) -> None:
    (case,) = result["cases"]
    assert case["holds"] == (case["ratio"] <= 1.05 and case["memory_ratio"] <= 1.05)
    assert result["holds"] == case["holds"]
    assert json.loads(json.dumps(result)) == result
    assert set(result["ratios"]) == {"update tiny", "memory tiny"}
    page = io.StringIO()
    Console(file=page, width=160).print(image.render(result))
    assert "tiny: seconds" in page.getvalue()


def test_bad_input() -> None:
    with pytest.raises(UserError, match="steps: should be at least 2, got 1"):
        image.run(steps=1)
    assert main(["bench", "image", "--model", "digits-base"]) == 2
    assert main(["bench", "image", "--batch", "3"]) == 2
