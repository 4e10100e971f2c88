"""Adapters to published image pipelines, against the pipelines' own code; and their schedulers against our kernels.

One module, because it takes seconds to import ``diffusers``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
)
from torch import Tensor

from pipelines import KINDS, tiny
from unveil.denoisers import hub
from unveil.denoisers.continuous import Condition
from unveil.denoisers.flow_transformers import Flux, StableDiffusion3
from unveil.denoisers.load import load_denoiser
from unveil.denoisers.pipelines import PipelineDenoiser, PipelineOptions
from unveil.denoisers.shells import encoded, shell
from unveil.denoisers.stable_diffusion import StableDiffusion, StableDiffusionXl
from unveil.processes.gaussian import Flow, Guess, Prediction, VariancePreserving
from unveil.processes.kernels import Ddim, Tau, deterministic
from unveil.registry import UserError
from unveil.samplers.grids import Grid, Sd3, Table, Uniform, resolution_shift
from unveil.samplers.guidance import Clamp, ClassifierFree, NoGuidance
from unveil.samplers.latent import LatentSampler
from unveil.samplers.latent_solvers import DpmSolver2M, Memory, SaSolver
from unveil.samplers.latents import Noise
from unveil.training.lora import Adapter, LoraSettings

ADAPTERS: dict[str, type[PipelineDenoiser]] = {
    "sd": StableDiffusion, "sd-v": StableDiffusion, "sdxl": StableDiffusionXl, "sd3": StableDiffusion3, "flux": Flux,
}  # fmt: skip
OPTIONS = PipelineOptions(resolution=16, prompt_tokens=12, guidance=2.5)
PROMPTS = ["a red cat", "", "7 dogs"]
ALL = pytest.mark.parametrize("kind", KINDS)


def opened(kind: str) -> Any:
    return ADAPTERS[kind](tiny(kind), OPTIONS).eval()


def noise(denoiser: PipelineDenoiser, count: int) -> Tensor:
    return torch.randn(count, *denoiser.spec.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_spec_and_own_call_of_stable_diffusion() -> None:
    for kind in ("sd", "sd-v"):
        denoiser = opened(kind)
        assert denoiser.spec.process == VariancePreserving(betas="scaled_linear", low=0.00085, high=0.012)
        assert denoiser.spec.prediction == {"sd": "eps", "sd-v": "v"}[kind]
        assert denoiser.spec.shape == (4, 8, 8)
        x, k = noise(denoiser, 3), torch.tensor([981, 421, 1])
        own = [
            denoiser.pipe.unet(x[row, None], k[row], denoiser.pipe.encode_prompt(prompt, "cpu", 1, False)[0]).sample
            for row, prompt in enumerate(PROMPTS)
        ]
        ours = denoiser.predict(x, (k + 1).double() / 1000, denoiser.condition(PROMPTS))
        torch.testing.assert_close(ours, torch.cat(own), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_own_call_of_stable_diffusion_xl() -> None:
    denoiser = opened("sdxl")
    x, k = noise(denoiser, 2), torch.tensor([981, 421])
    positive, negative, pooled, negative_pooled = denoiser.pipe.encode_prompt("a red cat")
    added = {
        "text_embeds": torch.cat([pooled, negative_pooled]),
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(2, 1),
    }
    own = denoiser.pipe.unet(x, k, torch.cat([positive, negative]), added_cond_kwargs=added).sample
    ours = denoiser.predict(x, (k + 1).double() / 1000, denoiser.condition(["a red cat", ""]))
    torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_own_call_of_stable_diffusion_3() -> None:
    denoiser = opened("sd3")
    assert denoiser.spec.process == Flow()
    assert denoiser.spec.prediction == "u"
    x, t = noise(denoiser, 2), torch.tensor([0.9, 0.25])
    positive, negative, pooled, negative_pooled = denoiser.pipe.encode_prompt(
        "a red cat", None, None, max_sequence_length=12
    )
    own = denoiser.pipe.transformer(
        hidden_states=x, timestep=1000 * t, encoder_hidden_states=torch.cat([positive, negative]),
        pooled_projections=torch.cat([pooled, negative_pooled]),
    ).sample  # fmt: skip
    ours = denoiser.predict(x, t, denoiser.condition(["a red cat", ""]))
    torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_own_call_of_flux_is_told_the_guidance() -> None:
    denoiser = opened("flux")
    assert denoiser.spec.shape == (4, 8, 8)
    x, t = noise(denoiser, 2), torch.tensor([0.9, 0.25])
    pipe = denoiser.pipe
    states, pooled, text_ids = pipe.encode_prompt(["a red cat", "7 dogs"], None, max_sequence_length=12)
    packed, image_ids = pipe.prepare_latents(2, 4, 16, 16, torch.float32, "cpu", torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed, pipe._pack_latents(x, 2, 4, 8, 8))
    own = pipe.transformer(
        hidden_states=packed, timestep=t, guidance=torch.tensor([2.5, 2.5]), pooled_projections=pooled,
        encoder_hidden_states=states, txt_ids=text_ids, img_ids=image_ids,
    ).sample  # fmt: skip
    ours = denoiser.predict(x, t, denoiser.condition(["a red cat", "7 dogs"]))
    torch.testing.assert_close(ours, pipe._unpack_latents(own, 16, 16, 2), atol=1e-6, rtol=1e-5)
    louder = Flux(tiny("flux"), PipelineOptions(resolution=16, prompt_tokens=12, guidance=7.0)).eval()
    assert (louder.predict(x, t, louder.condition(["a red cat", "7 dogs"])) - ours).abs().max() > 1e-5


def run(denoiser: PipelineDenoiser, grid: Grid, steps: int, prompts: list[str], x: Tensor, scale: float) -> Tensor:
    """Our sampler's ODE with classifier-free guidance of ``scale``; 1 is none."""
    guidance = NoGuidance() if scale == 1 else ClassifierFree(scale=scale)
    sampler = LatentSampler(steps=steps, grid=grid, guidance=guidance)
    start = Noise(condition=denoiser.condition(prompts), problems=[0, 1], copies=[0, 0], initial=x)
    trajectory = sampler.sample(denoiser, start, [0, 1])
    assert trajectory.forwards == len(x) * steps * guidance.evaluations
    return trajectory.samples


@ALL
@torch.no_grad()
def test_a_whole_run_is_the_pipeline_s_own(kind: str) -> None:
    """The same times, initial latents and guidance; then the decoded images."""
    denoiser, steps, prompts = opened(kind), 5, ["a red cat", "7 dogs"]
    pipe, x = denoiser.pipe, noise(denoiser, 2)
    how: dict[str, Any] = {
        "prompt": prompts, "num_inference_steps": steps, "height": 16, "width": 16, "output_type": "pt",
    }  # fmt: skip
    if kind == "flux":
        grid: Grid = Uniform(shift=resolution_shift(16))
        how |= {"latents": pipe._pack_latents(x, 2, 4, 8, 8), "guidance_scale": 2.5, "max_sequence_length": 12}
    elif kind == "sd3":
        grid = Sd3(shift=3.0)
        how |= {"latents": x, "guidance_scale": 4.5, "max_sequence_length": 12}
    else:
        grid = Table(offset=1, final="first")
        how |= {"latents": x, "guidance_scale": 4.5}
    theirs = pipe(**how).images
    ours = run(denoiser, grid, steps, prompts, x, 1.0 if kind == "flux" else 4.5)
    torch.testing.assert_close(denoiser.decode(ours), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.01


@ALL
def test_prompts_do_not_depend_on_their_batch_and_are_encoded_once(kind: str) -> None:
    denoiser = opened(kind)
    calls: list[str] = []
    encode = denoiser.encode_prompt
    denoiser.encode_prompt = lambda prompt: calls.append(prompt) or encode(prompt)
    whole = denoiser.condition([*PROMPTS, PROMPTS[0]])
    assert calls == PROMPTS
    assert len(whole) == 4
    for row, prompt in enumerate(PROMPTS):
        alone = denoiser.condition([prompt])
        for name, value in whole.tensors.items():
            assert torch.equal(value[row], alone[name][0]), name
    assert all(not value.requires_grad for value in whole.tensors.values())
    both = Condition.cat([whole.rows(slice(0, 1)), whole.rows(torch.tensor([1]))])
    assert len(both) == 2


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_latents_and_images(kind: str) -> None:
    denoiser = opened(kind)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = denoiser.encode(images)
    assert latents.shape == (2, *denoiser.spec.shape)
    config = denoiser.pipe.vae.config
    raw = latents / config.scaling_factor + (config.shift_factor or 0)
    own = denoiser.pipe.image_processor.postprocess(denoiser.pipe.vae.decode(raw).sample, output_type="pt")
    latents.requires_grad_()
    decoded = denoiser.decode(latents)
    torch.testing.assert_close(decoded, own)
    decoded.sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0


@ALL
def test_only_the_network_learns_and_gradients_can_be_recomputed(kind: str) -> None:
    denoiser = opened(kind)
    x, t = noise(denoiser, 1), torch.tensor([0.5], dtype=torch.float64)
    condition = denoiser.condition(["a cat"])
    trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert trained == {f"network.{name}" for name, _ in denoiser.network.named_parameters()}
    gradients = []
    for _ in range(2):
        denoiser.train()
        denoiser.zero_grad()
        denoiser.predict(x, t, condition).square().sum().backward()
        gradients.append([p.grad.clone() for p in denoiser.parameters() if p.grad is not None])
        denoiser.checkpoint_gradients()
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    for part in denoiser._frozen():
        assert all(parameter.grad is None for parameter in part.parameters())
        assert not part.training


@ALL
def test_adapters_are_saved_as_the_pipeline_reads_them(kind: str, tmp_path: Path) -> None:
    denoiser = opened(kind)
    x, t = noise(denoiser, 2), torch.tensor([0.7, 0.2], dtype=torch.float64)
    condition = denoiser.condition(PROMPTS[:2])
    with torch.no_grad():
        before = denoiser.predict(x, t, condition)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(0)
    adapter = Adapter(denoiser, LoraSettings(rank=2, alpha=6, targets=targets))
    learning = [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name, _ in learning)
    with torch.no_grad():
        for _, parameter in learning:
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        tuned = denoiser.predict(x, t, condition)
        assert (tuned - before).abs().max() > 1e-3
        with adapter.off():
            torch.testing.assert_close(denoiser.predict(x, t, condition), before)
    adapter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    fresh = tiny(kind)
    fresh.load_lora_weights(str(tmp_path))
    again = ADAPTERS[kind](fresh, OPTIONS).eval()
    with torch.no_grad():
        torch.testing.assert_close(again.predict(x, t, condition), tuned, atol=1e-5, rtol=1e-4)
        other = opened(kind)
        other.load_adapter(tmp_path)
        torch.testing.assert_close(other.predict(x, t, condition), tuned, atol=1e-5, rtol=1e-4)
        merged = adapter.merge()
        torch.testing.assert_close(merged.predict(x, t, condition), tuned, atol=1e-5, rtol=1e-4)  # type: ignore[operator]
    with pytest.raises(UserError, match="nowhere' holds no adapters"):
        other.load_adapter(tmp_path / "nowhere")


@ALL
def test_a_folder_opens_again(kind: str, tmp_path: Path) -> None:
    denoiser = opened(kind)
    denoiser.save_pretrained(tmp_path / "model")
    again = load_denoiser(tmp_path, pipeline=OPTIONS)
    assert isinstance(again, ADAPTERS[kind])
    assert again.spec == denoiser.spec
    x, t = noise(denoiser, 2), torch.tensor([0.7, 0.2], dtype=torch.float64)
    with torch.no_grad():
        ours = denoiser.predict(x, t, denoiser.condition(PROMPTS[:2]))
        torch.testing.assert_close(again.predict(x, t, again.condition(PROMPTS[:2])), ours, atol=1e-5, rtol=1e-4)
        half = load_denoiser(tmp_path, pipeline=OPTIONS, dtype="bf16", gradient_checkpointing=True)
        assert isinstance(half, PipelineDenoiser)
        guess = half.guess(x, t, half.condition(PROMPTS[:2]))
        assert guess.x0.dtype == torch.float32
        torch.testing.assert_close(half.predict(x, t, half.condition(PROMPTS[:2])).float(), ours, atol=0.1, rtol=0.1)
        assert half.decode(x).dtype == torch.float32


def test_the_hub_is_asked_for_the_parts_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("sd").save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **how: str(tmp_path) if how == SAFE else "")
    hub.download.cache_clear()
    assert isinstance(load_denoiser("owner/tiny", pipeline=OPTIONS), StableDiffusion)
    hub.download.cache_clear()


SAFE = {"use_safetensors": True, "trust_remote_code": False}


def test_bad_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    tiny("sd3").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for change, message in [
        ({"transformer": ["evil_module", "Network"]}, r"'transformer' is \['evil_module', 'Network'\] \(allowed: cl"),
        ({"_class_name": "StableDiffusion3XPipeline"}, "did you mean 'StableDiffusion3Pipeline'"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "is no scheduler of a flow"),
        ({"transformer": ["diffusers", "NoSuchModel"]}, "cannot be opened as a StableDiffusion3Pipeline"),
    ]:
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=message) as error:
            load_denoiser(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model.pipeline.resolution: 18 is no multiple of 4"):
        load_denoiser(tmp_path, pipeline=PipelineOptions(resolution=18))
    with pytest.raises(UserError, match="chat is an option of models of text"):
        load_denoiser(tmp_path, chat=True)
    with pytest.raises(UserError, match="pipeline is an option of published image pipelines"):
        load_denoiser("countdown-base", pipeline=OPTIONS)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be opened as a StableDiffusion3Pipeline"):
        load_denoiser(tmp_path)


def test_schedulers_that_are_not_understood_are_refused() -> None:
    for change, message in [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not known"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is set"),
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not known"),
    ]:
        pipe = tiny("sd")
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.register_to_config(**change)
        with pytest.raises(UserError, match=message):
            StableDiffusion(pipe, OPTIONS)


# ---- the library's schedulers, where they are right and where they are not

STABLE = VariancePreserving(betas="scaled_linear", low=0.00085, high=0.012)
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draws(count: int) -> Tensor:
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ddim_difference(grid: Table, steps: int, eta: float, zero_terminal: bool = False) -> float:
    """The largest difference of one step, with inputs of unit scale; v-prediction where the table ends in noise."""
    process = replace(STABLE, zero_terminal=zero_terminal)
    kind: Prediction = "v" if zero_terminal else "eps"
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=zero_terminal, prediction_type="v_prediction" if zero_terminal else "epsilon",
        **BETAS, clip_sample=False, timestep_spacing=grid.spacing, steps_offset=grid.offset,
        set_alpha_to_one=grid.final == "clean",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    times = grid.times(process, steps)
    assert ((times[:-1] * 1000 - 1).round() == scheduler.timesteps).all()
    differences = []
    for k, t, s in zip(scheduler.timesteps, times[:-1, None], times[1:, None], strict=True):
        x, said, z = draws(3)[:, None]
        theirs = scheduler.step(said, k, x, eta=eta, variance_noise=z).prev_sample
        ours = Ddim(eta=eta).step(process, process.guess(said, kind, x, t), x, t, s).sample(z)
        differences.append(float((ours - theirs).abs().max()))
    return max(differences)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_steps_agree_where_the_next_entry_is_a_fixed_distance_away(eta: float) -> None:
    for grid in (Table(), Table(offset=1, final="first"), Table(offset=1), Table(spacing="trailing")):
        assert ddim_difference(grid, 10, eta) < 2e-5
    # A table rescaled to end in pure noise. With eta = 1 its first step draws all noise anew: theirs takes the root of
    # a difference there, in float32.
    assert ddim_difference(Table(spacing="trailing"), 10, eta, zero_terminal=True) < (1e-3 if eta else 2e-5)
    # The step goes to k - 1000 // N, whatever the next entry is.
    assert 0.001 < ddim_difference(Table(spacing="trailing"), 7, eta) < 0.1
    assert ddim_difference(Table(spacing="linspace"), 7, eta) > 0.3


@pytest.mark.parametrize("rederive", [False, True])
def test_clipped_steps_agree(rederive: bool) -> None:
    """DDIM's two ways, and DDPM's own step, which has the second one."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=True, clip_sample_range=1.5)
    ancestral = DDPMScheduler(**BETAS, clip_sample=True, clip_sample_range=1.5)
    for one in (scheduler, ancestral):
        one.set_timesteps(10)
    times, clamp = Table().times(STABLE, 10), Clamp(limit=1.5, rederive=rederive)
    for k, t, s in zip(scheduler.timesteps, times[:-1, None], times[1:, None], strict=True):
        x, eps, z = draws(3)[:, None]
        guess = clamp.cut(STABLE, STABLE.guess(eps, "eps", x, t), x, t)
        step = Ddim(eta=1.0).step(STABLE, guess, x, t, s)
        theirs = scheduler.step(eps, k, x, eta=1.0, variance_noise=z, use_clipped_model_output=rederive).prev_sample
        torch.testing.assert_close(step.sample(z), theirs, atol=2e-5, rtol=1e-5)
        if rederive and s > 0:
            noise = torch.Generator().manual_seed(0)
            theirs = ancestral.step(eps, k, x, generator=noise).prev_sample
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
            torch.testing.assert_close(step.sample(z), theirs, atol=2e-5, rtol=1e-5)


def test_euler_steps_of_a_flow_agree() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    times = Sd3(shift=3.0).times(Flow(), 6)
    torch.testing.assert_close(scheduler.sigmas.double(), times, atol=1e-6, rtol=0)
    x, *velocities = draws(7)[:, None].float()
    ours = x
    for k, u, t, s in zip(scheduler.timesteps, velocities, times[:-1, None], times[1:, None], strict=True):
        x = scheduler.step(u, k, x).prev_sample
        ours = deterministic(Flow(), Flow().guess(u, "u", ours, t), s)
        torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def _never(x: Tensor, t: Tensor) -> Guess:
    raise AssertionError("the solver asked the network again")


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ode", "sde"])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_steps_agree(order: int, eta: float) -> None:
    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type=kind, solver_order=order, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(8)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    values = draws(17)[:, None].float()
    x = ours = values[0]
    memory: Memory = {}
    for step, k in enumerate(scheduler.timesteps):
        eps, z, t, s = values[1 + step], values[9 + step], times[step, None], times[step + 1, None]
        x = scheduler.step(eps, k, x, variance_noise=z).prev_sample
        guess = STABLE.guess(eps, "eps", ours, t)
        if order == 2:
            guess = DpmSolver2M().solve(STABLE, guess, ours, t, s, memory, _never)
        ours = Ddim(eta=eta).step(STABLE, guess, ours, t, s).sample(z)
        torch.testing.assert_close(ours, x, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("order", "corrector"), [(1, 1), (2, 2), (3, 3), (2, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_sa_solver_steps_agree(tau: float, order: int, corrector: int) -> None:
    """A whole chain, in float64, on one path and grid; theirs corrects the first step, too."""
    scheduler = SASolverScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, predictor_order=order,
        corrector_order=corrector, lower_order_final=False, tau_func=lambda t: torch.tensor(tau, dtype=torch.float64),
    )  # fmt: skip
    scheduler.set_timesteps(9)
    scheduler.sigmas = times = Uniform(shift=3.0, start=0.98, end=0.04).times(Flow(), 9)
    kernel, memory, noise = Tau(tau=tau), Memory(), torch.Generator().manual_seed(0)
    solver = SaSolver(order=order, corrector=corrector, correct_first=True)
    own_noise = torch.Generator().manual_seed(0)
    x = ours = draws(1)
    for step, k in enumerate(scheduler.timesteps):
        t, s = times[step, None], times[step + 1, None]
        x = scheduler.step(torch.tanh(1.2 * x) + 0.3 * t, k, x, generator=noise).prev_sample
        guess = Flow().guess(torch.tanh(1.2 * ours) + 0.3 * t, "u", ours, t)
        std = kernel.step(Flow(), guess, ours, t, s).std if tau else None
        better = solver.solve(Flow(), guess, ours, t, s, memory, _never, std)
        z = torch.randn(ours.shape, generator=own_noise, dtype=torch.float64)
        ours = kernel.step(Flow(), better, ours, t, s).sample(z)
        torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@ALL
def test_a_shell_has_the_shapes_of_the_model(kind: str, tmp_path: Path) -> None:
    denoiser = opened(kind)
    denoiser.save_pretrained(tmp_path)
    where, empty = shell(str(tmp_path), OPTIONS)
    assert where == str(tmp_path / "model_index.json") and empty.spec == denoiser.spec
    shapes, real = ({name: one.shape for name, one in net.named_parameters()} for net in (empty, denoiser))
    assert shapes == real and {one.device.type for one in empty.parameters()} == {"meta"}
    read, told = encoded(empty).tensors, denoiser.condition(PROMPTS[:1]).tensors
    assert {name: value.shape for name, value in read.items()} == {name: value.shape for name, value in told.items()}


def test_known_pipelines_have_their_published_sizes() -> None:
    sizes = {
        "CompVis/stable-diffusion-v1-4": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        "stabilityai/stable-diffusion-3.5-medium": {
            "transformer": 2_243_171_520, "vae": 83_819_683, "text_encoder": 123_650_304,
            "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656,
        },
    }  # fmt: skip
    for name, parts in sizes.items():
        _, empty = shell(name, PipelineOptions(resolution=512))
        assert isinstance(empty, PipelineDenoiser) and empty.spec.shape[1:] == (64, 64)
        counted = {part: sum(one.numel() for one in getattr(empty.pipe, part).parameters()) for part in parts}
        assert counted == parts
    with pytest.raises(UserError, match=r"model\.path: nothing is known of 'someone/pictures'"):
        shell("someone/pictures", None)
