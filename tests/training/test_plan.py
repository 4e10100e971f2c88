"""Estimates of memory and operations against what small networks are measured to need."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import published
import tiny
from unveil.bench._memory import peak_bytes
from unveil.cli.main import main
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.shapes import KNOWN, Shape, shape_of, shape_of_config
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.denoisers.transformer import TransformerConfig, TransformerDenoiser
from unveil.registry import UserError
from unveil.seeds import generator
from unveil.training import plan
from unveil.training.runs import TrainRecipe
from unveil.training.trainer import OptimConfig


def network(dim: int, layers: int, hidden: int, words: int) -> tuple[TransformerDenoiser, Shape]:
    size = TransformerConfig(dim=dim, layers=layers, heads=4, hidden=hidden, context_length=64)
    net = TransformerDenoiser(size, TextTokenizer.of_words(tiny.WORDS + [f"w{number}" for number in range(words)]))
    net.initialise(generator(0, "plan"))
    return net, shape_of_config({"model_type": "unveil-transformer", "vocab_size": net.spec.vocab_size} | vars(size))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_operations_are_those_that_torch_counts() -> None:
    net, shape = network(64, 3, 128, 500)
    ids = torch.zeros(3, 40, dtype=torch.long)
    # The counter knows the plain form of attention alone.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = net(ids)[..., 0].sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = 3 * (shape.forward_flops(40) + shape.head_flops(40))
    assert forward.get_total_flops() == expected and backward.get_total_flops() == 2 * expected


CASES = [("mdpo", 128, 4, 384, 300, 64), ("diffu_grpo", 128, 2, 256, 3000, 8)]


@pytest.mark.parametrize(("system", "dim", "layers", "hidden", "words", "microbatch"), CASES)
def test_memory_is_within_a_quarter_of_what_is_measured(
    tmp_path: Path, system: str, dim: int, layers: int, hidden: int, words: int, microbatch: int
) -> None:
    """One by activations, one by logits of rollouts. Measured are bytes of live tensors."""
    net, shape = network(dim, layers, hidden, words)
    assert count(net) == shape.parameters
    sampler = tiny.MaskedSampler(steps=8, temperature=0.7)
    rollout = {"prompts": 4, "group_size": 4, "response_length": 40, "batch_size": 64, "sampler": sampler}
    policy, optim = tiny.policy(system, rollout=rollout, inner_updates=1), OptimConfig(lr=1e-3, microbatch=microbatch)
    job = tiny.job(tmp_path, policy, net, optim=optim)
    job.update(0, job.trainer.optimise)
    states = [value for state in job.trainer.optimizer.state.values() for value in state.values()]
    kept = [value for one in job.trainer.snapshots.sets.values() for value in one.values.values()]
    own = list(net.parameters())
    fixed = [*own, *(p.grad for p in own if p.grad is not None), *states, *kept]
    measured = peak_bytes(lambda: job.update(1, job.trainer.optimise), torch.device("cpu"), fixed)
    recipe = replace(tiny.recipe(tmp_path, system, 2), policy=policy, optim=optim)
    estimated = plan.memory(shape, plan.work_of(recipe, shape, 1, 3), fixed=0.0)["peak"]
    assert 0.75 < estimated / measured < 1.25


@pytest.mark.parametrize("model", ["llada", "dream", "qwen3", "llada2"])
def test_weights_of_published_shapes(tmp_path: Path, model: str) -> None:
    folder = published.write(tmp_path / model, model)
    assert shape_of(str(folder), folder)[1].parameters == count(load_denoiser(folder))


def test_known_models_have_their_published_sizes() -> None:
    sizes = {"llada-8b": 8_015_581_184, "dream-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920}
    assert {name: shape_of_config(KNOWN[name]).parameters for name in sizes} == sizes
    moe = shape_of_config(KNOWN["llada2-mini"])
    assert 15.5e9 < moe.parameters < 17e9 and 1.2e9 < moe.forward_flops(1) / 2 + moe.outside < 1.9e9
    for name in ("GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B", "apple/DiffuCoder-7B-Base"):
        assert shape_of(name, None)[1].parameters > 7e9
    with pytest.raises(UserError, match=r"model\.path: nothing is known of 'someone/llama'"):
        shape_of("someone/llama", None)
    with pytest.raises(UserError, match="model_type 'bert': its shape is not known"):
        shape_of_config({"model_type": "bert"})


def full(**changes: Any) -> tuple[TrainRecipe, Shape]:
    from unveil.cli.recipes import find_recipe
    from unveil.recipe import build, load

    overrides = [f"{key}={value}" for key, value in changes.items()]
    return build(TrainRecipe, load(find_recipe("mdpo/full"), overrides)), shape_of_config(KNOWN["llada-8b"])


def test_what_is_split_shrinks_and_what_is_whole_does_not() -> None:
    recipe, shape = full()
    one, eight = (plan.memory(shape, plan.work_of(recipe, shape, gpus, 256)) for gpus in (1, 8))
    for name in ("weights", "gradients", "optimiser", "snapshots"):
        assert eight[name] == one[name] / 8 > 0
    assert eight["whole weights"] == 2 * shape.parameters and one["whole weights"] == 0
    assert one["weights in bf16"] == 2 * shape.parameters and eight["peak"] < one["peak"] / 3


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*words: str) -> tuple[int, dict[str, Any]]:
        status = main(["plan", *words, "--json"])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    assert answer("mdpo/full", "--gpus", "8")[0] == 0
    status, said = answer("mdpo/full", "--gpus", "8", "distributed.shard=none")
    assert status == 1 and not said["fits"] and said["change"] == ["distributed.shard=full"]
    status, alone = answer("mdpo/full")
    assert status == 1 and alone["change"][0].startswith("model.lora=")
    words = [word for line in alone["change"] for word in line.split(" ") if "=" in word]
    assert answer("mdpo/full", "model.dtype=bf16", "model.lora={rank: 128, alpha: 64}", words[-1])[0] == 0
    assert answer("base-sudoku")[0] == 2  # a new model has no shape to read
    assert answer("mdpo")[0] == 0 and answer("mdpo", "--memory", "1")[0] == 1
    for wrong in (["mdpo", "--gpus", "0"], ["mdpo", "--utilisation", "2"], ["nothing"], []):
        assert answer(*wrong)[0] == 2


def test_time_follows_the_work() -> None:
    recipe, shape = full()
    work = plan.work_of(recipe, shape, 8, 256)
    assert (work.chains, work.steps, work.length) == (16, 128, 768)
    done = plan.operations(shape, work)
    twice = plan.operations(shape, replace(work, chains=2 * work.chains, views=2 * work.views))
    assert twice == {name: 2 * value for name, value in done.items()}
    machine = plan.Machine(peak=100.0, utilisation=0.5)
    assert plan.seconds(1e14, work, machine) == 2.0
