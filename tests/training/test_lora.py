"""Low-rank adapters by peft: reference, what is trained, files, resume."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from unveil.denoisers.load import load_denoiser
from unveil.learning.regularisers import Kl
from unveil.registry import UserError
from unveil.training.lora import Adapter, LoraSettings
from unveil.training.runs import BaseModel, train
from unveil.training.snapshots import SnapshotConfig

IDS = torch.tensor([[1, 4, 5, 0, 6, 0], [4, 5, 6, 0, 0, 7]])
VALID = IDS != 1
SETTINGS = LoraSettings(rank=2, alpha=4.0)


def perturb(net: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.full_like(parameter, 0.1))


def state(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_adapters_off_is_exactly_the_base_model() -> None:
    net = tiny.denoiser()
    base = net(IDS, VALID)
    adapter = Adapter(net, SETTINGS)
    assert torch.equal(net(IDS, VALID), base)  # B starts at zero
    perturb(net)
    moved = net(IDS, VALID)
    assert not torch.equal(moved, base)
    with adapter.off():
        assert torch.equal(net(IDS, VALID), base)
    assert torch.equal(net(IDS, VALID), moved)
    with pytest.raises(RuntimeError), adapter.off():
        raise RuntimeError
    assert torch.equal(net(IDS, VALID), moved)
    assert any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("system", ["mdpo", "diffu_grpo"])
def test_only_adapters_change_and_the_reference_is_the_base(tmp_path: Path, system: str) -> None:
    net = tiny.denoiser()
    base = net(IDS, VALID).detach()
    adapter = Adapter(net, SETTINGS)
    job = tiny.job(tmp_path, tiny.policy(system, kl=Kl(beta=0.1), inner_updates=2), net, adapter=adapter)
    before = state(net)
    metrics = [job.update(update, job.trainer.optimise) for update in range(2)]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    with job.trainer.reference():
        assert torch.equal(net(IDS, VALID), base)
    assert job.trainer.snapshots.sets == {}  # no second copy of anything
    assert metrics[0]["kl"] > 0 and metrics[1]["kl"] > 0
    assert all(parameter.requires_grad for parameter in job.trainer.parameters)


def test_kl_is_zero_while_the_adapters_are(tmp_path: Path) -> None:
    net = tiny.denoiser()
    adapter = Adapter(net, SETTINGS)
    config = tiny.policy("mdpo", kl=Kl(beta=0.1, estimator="k2"))
    job = tiny.job(tmp_path, config, net, adapter=adapter)
    assert job.update(0, job.trainer.optimise)["kl"] == 0
    assert job.update(1, job.trainer.optimise)["kl"] > 0


def test_a_synced_reference_moves_with_adapters_too(tmp_path: Path) -> None:
    net = tiny.denoiser()
    adapter = Adapter(net, SETTINGS)
    sync = SnapshotConfig(reference_sync=1, reference_mix=1.0)
    job = tiny.job(tmp_path, tiny.policy("mdpo"), net, adapter=adapter, snapshots=sync)
    base = net(IDS, VALID)
    job.update(0, job.trainer.optimise)
    with job.trainer.reference():
        assert torch.equal(net(IDS, VALID), base)
    job.trainer.snapshots.after_update(1)
    live = net(IDS, VALID)
    with job.trainer.reference():
        assert torch.equal(net(IDS, VALID), live)
    assert all("lora_" in name for name in job.trainer.snapshots.sets["reference"].values)


def test_saved_folder_opens_with_peft(tmp_path: Path) -> None:
    net = tiny.denoiser()
    adapter = Adapter(net, SETTINGS)
    perturb(net)
    adapter.save(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    expected = net(IDS, VALID)
    opened = peft.PeftModel.from_pretrained(tiny.denoiser(), str(tmp_path / "adapter")).eval()
    assert torch.equal(opened(IDS, VALID), expected)

    other = peft.get_peft_model(tiny.denoiser(), peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))).eval()
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(other, weights)
    assert not result.unexpected_keys
    assert torch.equal(other(IDS, VALID), expected)


def test_merged_is_an_ordinary_denoiser(tmp_path: Path) -> None:
    net = tiny.denoiser()
    adapter = Adapter(net, SETTINGS)
    perturb(net)
    expected = net(IDS, VALID)
    merged = adapter.merge()
    torch.testing.assert_close(merged(IDS, VALID), expected)
    merged.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(load_denoiser(tmp_path / "model")(IDS, VALID), expected)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets: no linear layer is called 'q_proj' \(allowed: "):
        Adapter(tiny.denoiser(), LoraSettings(targets=["q_proj"]))


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def recipe(updates: int) -> object:
        made = tiny.recipe(tmp_path, "mdpo", updates, snapshots=SnapshotConfig(ema_decay=0.8))
        made.model = BaseModel(path=made.model.path, lora=SETTINGS)
        made.policy.kl = Kl(beta=0.3, estimator="k2")
        return made

    assert train(recipe(4), tmp_path / "whole")  # type: ignore[arg-type]
    assert train(recipe(2), tmp_path / "split")  # type: ignore[arg-type]
    assert train(recipe(4), tmp_path / "split", resume=True)  # type: ignore[arg-type]
    whole, split = tiny.newest(tmp_path / "whole"), tiny.newest(tmp_path / "split")
    assert tiny.same(whole, split) == []
    assert all("lora_" in name for name in whole["weights"])
    files = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "split")]
    assert tiny.same(*files) == []


def test_the_final_model_is_the_average_of_the_adapters_merged(tmp_path: Path) -> None:
    made = tiny.recipe(tmp_path, "mdpo", 3, snapshots=SnapshotConfig(ema_decay=0.8))
    made.model = BaseModel(path=made.model.path, lora=SETTINGS)
    assert train(made, tmp_path / "run")
    opened = peft.PeftModel.from_pretrained(tiny.denoiser(), str(tmp_path / "run" / "adapter")).eval()
    final = load_denoiser(tmp_path / "run")
    torch.testing.assert_close(final(IDS, VALID), opened(IDS, VALID))
    assert not torch.allclose(final(IDS, VALID), tiny.denoiser()(IDS, VALID))
    average, saved = tiny.newest(tmp_path / "run")["snapshots"]["ema"], dict(opened.named_parameters())
    for name, value in average.items():
        assert torch.equal(saved[f"base_model.model.{name}"], value)
