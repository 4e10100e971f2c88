"""Trajectories: reading states, joining batches, files."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unveil.registry import UserError
from unveil.samplers.trajectory import TokenTrajectory, check_needs, concatenate

M = 0


def trajectory() -> TokenTrajectory:
    """Two chains over three positions; the second response is two tokens long and done after one step."""
    return TokenTrajectory(
        prompt_ids=torch.tensor([[7, 8], [1, 9]]),
        response_ids=torch.tensor([[4, 5, 6], [4, 4, 1]]),
        valid=torch.tensor([[True, True, True, True, True], [False, True, True, True, False]]),
        active=torch.tensor([[True, True], [True, False]]),
        given=torch.tensor([[False, True, False], [False, False, True]]),
        planned=torch.tensor([2, 1]),
        forwards=3,
        mask_id=M,
        states=torch.tensor([[[M, 5, M], [4, 5, M]], [[M, M, 1], [4, 4, 1]]]),
        guesses=torch.tensor([[[4, 5, 5], [4, 5, 6]], [[4, 4, 1], [4, 4, 1]]]),
        confidence=torch.rand(2, 2, 3),
        log_prob=-torch.rand(2, 2, 3),
        revealed=torch.tensor([[[True, False, False], [False, False, True]], [[True, True, False], [False] * 3]]),
        taken_back=torch.zeros(2, 2, 3, dtype=torch.bool),
        step_map=torch.tensor([[0, -1, 1], [0, 0, -1]]),
        entropy=torch.rand(2, 2, 3),
        block=torch.ones(2, 2, 3, dtype=torch.bool),
        order=torch.tensor([[[1, 0, 0], [0, 0, 1]], [[2, 1, 0], [0, 0, 0]]]),
        order_log_prob=-torch.rand(2, 2),
        times=torch.rand(2, 2, 2, dtype=torch.float64),
        expert_share=torch.tensor([0.0, 0.2]),
    )


def same(one: TokenTrajectory, other: TokenTrajectory) -> None:
    for field in fields(TokenTrajectory):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, Tensor):
            assert right.dtype == left.dtype and torch.equal(left, right), field.name
        else:
            assert left == right, field.name


def test_states_are_read_or_rebuilt() -> None:
    full = trajectory()
    assert (len(full), full.steps) == (2, 2)
    rows, steps = full.active.nonzero(as_tuple=True)
    expected = [[M, 5, M], [4, 5, M], [M, M, 1]]
    assert full.states_at(rows, steps).tolist() == expected
    assert replace(full, states=None).states_at(rows, steps).tolist() == expected
    holes = [[True, False, True], [False, False, True], [True, True, False]]
    assert full.holes_at(rows, steps).tolist() == holes
    with pytest.raises(ValueError, match="neither states nor step_map"):
        replace(full, states=None, step_map=None).states_at(rows, steps)


def test_padding_is_never_a_hole() -> None:
    # A padding id that equals the mask id would look like one.
    full = trajectory()
    states = full.states.clone()  # type: ignore[union-attr]
    states[1, 0, 2] = M
    assert not replace(full, states=states).holes_at(torch.tensor([1]), torch.tensor([0]))[0, 2]


def test_a_file_brings_everything_back(tmp_path: Path) -> None:
    full = trajectory()
    full.save(tmp_path / "full.safetensors")
    same(TokenTrajectory.load(tmp_path / "full.safetensors"), full)
    small = replace(full, **dict.fromkeys(TokenTrajectory.optional))
    small.save(tmp_path / "small.safetensors")
    same(TokenTrajectory.load(str(tmp_path / "small.safetensors")), small)


def test_what_is_not_a_trajectory_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chains.safetensors"
    with pytest.raises(UserError, match="not a readable trajectory file"):
        TokenTrajectory.load(path)
    trajectory().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="not a readable trajectory file"):
        TokenTrajectory.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a readable trajectory file"):
        TokenTrajectory.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"chains\.safetensors: not a trajectory file"):
        TokenTrajectory.load(path)


@pytest.mark.parametrize(
    "header", ["{", "[]", json.dumps({"forwards": 1}), json.dumps({"forwards": 1, "mask_id": 0, "more": 2})]
)
def test_another_version_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "chains.safetensors"
    trajectory().save(path)
    save_file(load_file(path), path, metadata={"unveil.trajectory": header})
    with pytest.raises(UserError, match="not a trajectory file of this version"):
        TokenTrajectory.load(path)


def test_joined_batches_pad_the_shorter_step_axis_with_the_finished_response() -> None:
    full = trajectory()
    long, short = ({}, {})
    for field in fields(TokenTrajectory):
        value = getattr(full, field.name)
        if isinstance(value, Tensor):
            long[field.name], short[field.name] = value[:1], value[1:]
    for name in ("active", *TokenTrajectory.optional):
        if name != "step_map":
            short[name] = short[name][:, :1]
    padded = ("confidence", "log_prob", "entropy", "order_log_prob", "times", "block")
    zero = {name: getattr(full, name).clone() for name in padded}
    for value in zero.values():
        value[1, 1] = 0
    joined = concatenate(
        [TokenTrajectory(**long, forwards=2, mask_id=M), TokenTrajectory(**short, forwards=1, mask_id=M)]
    )
    same(joined, replace(full, **zero))


def test_joining_keeps_absent_fields_absent() -> None:
    small = replace(trajectory(), **dict.fromkeys(TokenTrajectory.optional))
    joined = concatenate([small, small])
    assert len(joined) == 4 and joined.forwards == 6
    assert all(getattr(joined, name) is None for name in TokenTrajectory.optional)


def test_joining_pads_prompts_and_knows_whose_chain_it_is() -> None:
    full = trajectory()
    narrow = replace(full, prompt_ids=full.prompt_ids[:, 1:], valid=full.valid[:, 1:], expert_share=None)
    joined = concatenate([full, narrow])
    assert joined.prompt_ids.tolist() == [[7, 8], [1, 9], [0, 8], [0, 9]]
    assert joined.valid[2].tolist() == [False, True, True, True, True]
    assert joined.expert_share is not None and joined.expert_share.tolist() == pytest.approx([0.0, 0.2, 0.0, 0.0])


def test_rows_of_a_trajectory() -> None:
    full = trajectory()
    turned = full.rows(torch.tensor([1, 0, 1]))
    assert torch.equal(turned.response_ids, full.response_ids[[1, 0, 1]]) and turned.forwards == full.forwards
    same(turned.rows(torch.tensor([1, 0])), full)


def test_fields_are_checked_by_name() -> None:
    assert check_needs(["states", "states"], TokenTrajectory, {}) == {"states"}
    assert check_needs(TokenTrajectory.optional, TokenTrajectory, {}) == set(TokenTrajectory.optional)
    with pytest.raises(UserError, match="trajectory field 'guess' does not exist, did you mean 'guesses'"):
        check_needs(["guess"], TokenTrajectory, {})
    with pytest.raises(UserError, match="trajectory field 'step_map' is not exact"):
        check_needs(["step_map"], TokenTrajectory, {"step_map": "is not exact"})
