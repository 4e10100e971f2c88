"""Small denoisers of images: shapes, conditions, locality, folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unveil.denoisers.continuous import Condition
from unveil.denoisers.dit import Dit
from unveil.denoisers.image import Characters, Classes, ImageDenoiser, ImageModel, ImageNetwork, Prompts
from unveil.denoisers.load import load_denoiser, load_masked
from unveil.denoisers.unet import UNet
from unveil.processes.gaussian import Flow, GaussianProcess, Prediction, VarianceExploding, VariancePreserving
from unveil.registry import UserError

NETWORKS: list[ImageNetwork] = [
    Dit(patch=2, dim=32, layers=2, heads=2, hidden=48),
    UNet(channels=8, multipliers=(1, 2), heads=2),
    UNet(channels=8, multipliers=(1,), blocks=2, heads=1),
]
PROMPTS: list[Prompts] = [Classes(names=("cat", "dog")), Characters(alphabet="ABC", length=3)]
SHAPE = (2, 4, 8)


def model(
    network: ImageNetwork,
    prompts: Prompts = PROMPTS[0],
    *,
    process: GaussianProcess | None = None,
    prediction: Prediction = "u",
    alive: bool = True,
) -> ImageDenoiser:
    """``alive``: no weight is 0, so that everything that can have an effect has one."""
    config = ImageModel(shape=SHAPE, prompts=prompts, network=network, process=process or Flow(), prediction=prediction)
    denoiser = ImageDenoiser(config)
    denoiser.initialise(torch.Generator().manual_seed(0))
    if alive:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return denoiser.eval()


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(2)
    return torch.randn(count, *SHAPE, generator=stream), torch.rand(count, generator=stream)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: prompts.name)
def test_a_batch_equals_single_calls_and_everything_has_an_effect(network: ImageNetwork, prompts: Prompts) -> None:
    denoiser = model(network, prompts)
    x, t = inputs()
    names = ["cat", "", "dog"] if isinstance(prompts, Classes) else ["AB", "", "CAB"]
    condition = denoiser.condition(names)
    whole = denoiser.predict(x, t, condition)
    assert whole.shape == x.shape
    for row in range(3):
        part = slice(row, row + 1)
        one = denoiser.predict(x[part], t[part], denoiser.condition(names[part]))
        torch.testing.assert_close(one, whole[part], atol=1e-5, rtol=1e-5)
    assert (denoiser.predict(x, t.flip(0), condition) - whole).abs().max() > 1e-4
    assert (denoiser.predict(x, t, denoiser.condition(["", "", ""])) - whole)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-4
    if isinstance(prompts, Characters):
        other = denoiser.predict(x, t, denoiser.condition(["BA", "", "CBA"]))
        assert (other - whole)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_new_network_predicts_zero_and_can_learn_with_all_its_weights(network: ImageNetwork) -> None:
    denoiser = model(network, PROMPTS[1], alive=False)
    x, t = inputs()
    condition = denoiser.condition(["ABC", "B", ""])
    assert (denoiser.predict(x, t, condition) == 0).all()
    denoiser = model(network, PROMPTS[1])
    denoiser.predict(x, t, condition).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_patches_come_back_where_they_were_taken() -> None:
    """At first the blocks pass everything through, so a pixel is made from its own patch alone."""
    denoiser = model(Dit(patch=2, dim=16, layers=1, heads=2, hidden=16), alive=False)
    torch.nn.init.normal_(denoiser.network.output.weight, generator=torch.Generator().manual_seed(0))
    x = inputs(1)[0].requires_grad_()
    out = denoiser.predict(x, torch.tensor([0.5]), denoiser.condition(["cat"]))
    (seen,) = torch.autograd.grad(out[0, 1, 3, 4], x)
    touched = torch.zeros(SHAPE, dtype=torch.bool)
    touched[:, 2:4, 4:6] = True
    assert (seen[0][~touched] == 0).all()
    assert (seen[0][touched] != 0).all()


def test_conditions_are_taken_apart_and_put_together() -> None:
    denoiser = model(NETWORKS[0], PROMPTS[1])
    condition = denoiser.condition(["A", "BC", ""])
    assert condition["ids"].tolist() == [[1, 0, 0], [2, 3, 0], [0, 0, 0]]
    assert condition.rows(torch.tensor([1, 1, 0]))["ids"].tolist() == [[2, 3, 0], [2, 3, 0], [1, 0, 0]]
    both = Condition.cat([condition, condition.rows(slice(0, 1))])
    assert len(both) == 4
    assert both["ids"][3].tolist() == [1, 0, 0]


def test_images_and_latents() -> None:
    denoiser = model(NETWORKS[0])
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(denoiser.decode(denoiser.encode(images)), images)
    far = torch.full((1, *SHAPE), 3.0)
    assert (denoiser.decode(far) == 1).all()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "u", "edm"])
@pytest.mark.parametrize("process", [Flow(), VariancePreserving(), VarianceExploding()], ids=lambda path: path.name)
def test_a_guess_explains_the_sample(process: GaussianProcess, prediction: Prediction) -> None:
    if prediction == "edm" and process.name != "edm":
        with pytest.raises(UserError, match="prediction: prediction 'edm' is not known"):
            model(NETWORKS[0], process=process, prediction=prediction)
        return
    denoiser = model(NETWORKS[0], process=process, prediction=prediction)
    x, t = inputs()
    with torch.no_grad():
        guess = denoiser.guess(x, t, denoiser.condition(["cat", "dog", ""]))
    torch.testing.assert_close(process.corrupt(guess.x0, t, guess.eps), x, atol=1e-3, rtol=1e-3)


def test_networks_of_edm_see_inputs_of_unit_size() -> None:
    denoiser = model(NETWORKS[0], process=VarianceExploding(), prediction="edm")
    x, t = inputs()
    seen = []
    denoiser.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    noisy = denoiser.spec.process.corrupt(x / 2, t, torch.ones_like(x))
    denoiser.predict(noisy, t, denoiser.condition(["", "", ""]))
    sigma = denoiser.spec.process.sigma(t).float()[:, None, None, None]
    torch.testing.assert_close(seen[0], noisy / (sigma**2 + 0.25).sqrt())


@pytest.mark.parametrize("network", NETWORKS[:2], ids=str)
@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: prompts.name)
def test_a_folder_opens_again(network: ImageNetwork, prompts: Prompts, tmp_path: Path) -> None:
    process = VariancePreserving(betas="cosine", steps=100)
    denoiser = model(network, prompts, process=process, prediction="v")
    denoiser.save_pretrained(tmp_path / "model")
    again = load_denoiser(tmp_path / "model")
    assert isinstance(again, ImageDenoiser)
    assert again.config == denoiser.config
    assert again.spec == denoiser.spec
    x, t = inputs()
    condition = denoiser.condition(["", "", ""])
    assert torch.equal(again.predict(x, t, condition), denoiser.predict(x, t, condition))
    with pytest.raises(UserError, match="is of kind 'image'"):
        load_masked(tmp_path / "model")


def test_bad_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    model(NETWORKS[0]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"network": {"name": "dit", "patch": 3}}, "network.patch: 3 does not divide images of 4 x 8"),
        ({"network": {"name": "unet", "multipliers": [1, 1, 1, 1]}}, "4 levels halve images of 4 x 8 too often"),
        ({"network": {"name": "dit", "dim": 32, "layers": 2, "heads": 5}}, "heads: 5 must divide"),
        ({"prediction": "edm"}, "'edm' is not known on the path 'flow'"),
        ({"process": "vq"}, "no process is called 'vq'"),
        ({"network": {**good["network"], "layers": 3}}, "another architecture: it lacks 'network.blocks.2"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message) as error:
            load_denoiser(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompts", "prompt", "message"),
    [
        (PROMPTS[0], "bird", r"'bird': the model knows other ones only \(allowed: cat, dog\)"),
        (PROMPTS[1], "ABCA", r"longer than 3 \(allowed: up to 3 of ABC\)"),
        (PROMPTS[1], "AD", "'D' is unknown"),
    ],
)
def test_unknown_prompts_are_refused(prompts: Prompts, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(NETWORKS[0], prompts).condition(["", prompt])
