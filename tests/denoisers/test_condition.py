"""Conditions of many samples: encodings are stored once per prompt and laid out when they are read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import tiny_images as tiny
from unveil.denoisers.continuous import Condition
from unveil.samplers.latents import LatentTrajectory
from unveil.tasks.medium import Origins
from unveil.tasks.pixels import Image

TABLE = {"states": torch.arange(12.0).view(4, 3), "pooled": torch.arange(4.0)}


def read(condition: Condition) -> tuple[Tensor, Tensor]:
    assert len(condition) == len(condition["states"]) == len(condition["pooled"])
    return condition["states"], condition["pooled"]


def test_rows_are_those_of_the_laid_out_tensors() -> None:
    plain = Condition(TABLE)
    index, again = torch.tensor([2, 2, 0, 3, 2]), torch.tensor([4, 0, 2])
    told = plain.rows(index)
    for one, places in (
        (told, index), (told.rows(again), index[again]), (told.rows(slice(1, 4)), index[1:4]),
        (told.compact(), index), (told.rows(again).to(torch.device("cpu")), index[again]),
        (plain.rows(slice(1, 3)), torch.tensor([1, 2])),
    ):  # fmt: skip
        for mine, wanted in zip(read(one), read(plain), strict=True):
            assert torch.equal(mine, wanted[places])
    assert told.rows(again).tensors is TABLE
    assert {name: len(value) for name, value in told.compact().tensors.items()} == {"states": 3, "pooled": 3}


def test_joined_conditions_are_those_of_the_parts() -> None:
    plain, other = Condition(TABLE), Condition({name: -value for name, value in TABLE.items()})
    told = plain.rows(torch.tensor([3, 1]))
    for parts in ([plain, other], [told, other], [other, told], [told, plain.rows(torch.tensor([0, 0, 2]))]):
        joined = Condition.cat(parts)
        for mine, *wanted in zip(read(joined), *(read(part) for part in parts), strict=True):
            assert torch.equal(mine, torch.cat(wanted))
    assert Condition.cat([told, plain.rows(torch.tensor([0]))]).tensors is TABLE


def test_a_rollout_holds_one_encoding_per_prompt(tmp_path: Path) -> None:
    prompts = ["b", "a"] * 4
    net = tiny.Mlp()
    begin = Image().start(net, prompts, None, Origins(problems=[0, 1] * 4, copies=[0, 0, 1, 1, 2, 2, 3, 3]))
    chains: LatentTrajectory = tiny.sampler().sample(net, begin, list(range(8)), batch_size=3)
    assert len(chains.condition.tensors["ids"]) == 2
    assert torch.equal(chains.condition["ids"], net.condition(prompts)["ids"])
    path = tmp_path / "chains.safetensors"
    chains.rows(torch.tensor([1, 3, 5])).save(path)
    back = LatentTrajectory.load(path).condition
    assert len(back.tensors["ids"]) == 1 and torch.equal(back["ids"], net.condition(["a"] * 3)["ids"])
