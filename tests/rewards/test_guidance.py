"""Guidance by a classifier: exact where the classifier is, a finite difference elsewhere, and what it is good for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_images as tiny
from unveil.denoisers.continuous import Condition, ContinuousDenoiser, ContinuousSpec
from unveil.denoisers.load import load_denoiser
from unveil.processes.gaussian import Flow, GaussianProcess, VarianceExploding, VariancePreserving
from unveil.processes.kernels import Ddim
from unveil.registry import UserError
from unveil.rewards.guidance import ClassifierGuidance
from unveil.rewards.images import PixelStatistic
from unveil.rewards.networks import Classifier, ClassifierShape
from unveil.samplers.grids import Uniform
from unveil.samplers.latent import LatentSampler
from unveil.systems.alignprop import variant
from unveil.tasks.base import Problem
from unveil.tasks.evaluate import sample_problems
from unveil.training.policy_config import PolicyConfig, RolloutConfig

CENTRES, WIDTH = torch.tensor([-1.2, 0.4, 1.5], dtype=torch.float64), 0.35
PATHS: list[GaussianProcess] = [Flow(), VariancePreserving(), VarianceExploding(sigma_max=20.0, rho=3.0)]


def guidance(judge: Any = None, **settings: Any) -> ClassifierGuidance:
    found = ClassifierGuidance(network="digits-reward", **settings)
    if judge is not None:
        found.__dict__["judge"] = judge
    return found


class Bumps(ContinuousDenoiser):
    """The exact denoiser of three bumps of equal mass in one dimension; its images are its latents."""

    def __init__(self, process: GaussianProcess) -> None:
        super().__init__()
        self.spec = ContinuousSpec(shape=(1, 1, 1), process=process, prediction="x0")

    def posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log p(bump | x_t) (B, 3), and the mean of x_0 (B, 3) given x_t and the bump."""
        alpha, sigma = self.spec.process.alpha(t)[:, None], self.spec.process.sigma(t)[:, None]
        total, x = alpha**2 * WIDTH**2 + sigma**2, x.reshape(-1, 1)
        share = (-((x - alpha * CENTRES) ** 2) / (2 * total)).log_softmax(-1)
        return share, CENTRES + alpha * WIDTH**2 / total * (x - alpha * CENTRES)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition({"nothing": torch.zeros(len(prompts))})

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        share, means = self.posterior(x, t)
        return (share.exp() * means).sum(-1).view_as(x)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_classifier_that_knows_the_noise_gives_the_conditional_distribution(path: GaussianProcess) -> None:
    net, t = Bumps(path), torch.tensor([0.2, 0.6, 0.9, 0.9], dtype=torch.float64)
    x = torch.randn(4, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * path.sigma(t)[0]
    own = torch.tensor([0, 2, 1, 0])
    told = net.condition([""] * 4).beside({"class": own})

    class Exact:
        def __call__(self, images: Tensor) -> Tensor:
            return net.posterior(images.double(), t)[0]

    found = guidance(Exact(), sees="state").guess(net, x, t, told)
    means = net.posterior(x, t)[1].gather(1, own[:, None]).view_as(x)
    # The judge sees images in float32.
    torch.testing.assert_close(found.x0, means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.eps, path.rederived(means, x, t).eps, rtol=1e-3, atol=1e-3)
    none = guidance(Exact(), sees="state", scale=0.0).guess(net, x, t, told)
    torch.testing.assert_close(none.x0, net.guess(x, t, told).x0)


def judge(seed: int = 0) -> Classifier:
    """Of the images of `tiny.Mlp`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ClassifierShape(channels=[4], hidden=8).build((1, 4, 4), ["a", "b"]).requires_grad_(False)


def test_reconstruction_is_a_finite_difference_through_the_denoiser() -> None:
    net, network = tiny.Mlp(), judge()
    lead = guidance(network, scale=2.0)
    told = net.condition(["a", "b"]).beside(lead.told(["a", "b"]))
    x, t = torch.randn(2, *tiny.SHAPE), torch.tensor([0.5, 0.8], dtype=torch.float64)

    def sure(x: Tensor) -> Tensor:
        return network(net.decode(net.guess(x, t, told).x0)).log_softmax(-1)[[0, 1], [0, 1]]

    with torch.no_grad():
        plain, guided = net.guess(x, t, told), lead.guess(net, x, t, told)
        push = (plain.eps - guided.eps) / (2.0 * t.float())[:, None, None, None]
        for place in ((0, 0, 0), (1, 2, 3)):
            step = torch.zeros(tiny.SHAPE)
            step[place] = 1e-2
            slope = (sure(x + step) - sure(x - step)) / 2e-2
            torch.testing.assert_close(push[(slice(None), *place)], slope, rtol=0.02, atol=2e-5)
        # Both guesses explain the same x_t, and at pure noise there is nothing to lead by.
        alpha, sigma = (1 - t).float()[:, None, None, None], t.float()[:, None, None, None]
        torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x, rtol=1e-4, atol=1e-4)
        start = torch.ones(2, dtype=torch.float64)
        assert torch.equal(lead.guess(net, x, start, told).x0, net.guess(x, start, told).x0)
    without = guidance(network, through=False).guess(net, x, t, told).x0.sum()
    assert not torch.equal(*(
        torch.autograd.grad(value, net.inner.weight, retain_graph=True)[0]
        for value in (guidance(network).guess(net, x, t, told).x0.sum(), without)
    ))  # fmt: skip


def test_steps_are_scored_as_they_were_drawn(tmp_path: Path) -> None:
    lead = guidance(judge())
    policy = tiny.policy(rollout=vars(RolloutConfig(sampler=tiny.sampler(guidance=lead), prompts=2, group_size=4)))
    job = tiny.job(tmp_path, policy)
    assert job.update(0, job.trainer.optimise)["ratio_deviation"] < 1e-6


def test_chains_that_it_led_can_be_run_again_with_gradients(tmp_path: Path) -> None:
    sampler = tiny.sampler(kernel=Ddim(eta=0.0), guidance=guidance(judge(), scale=0.5))
    rollout = RolloutConfig(sampler=sampler, prompts=2, group_size=2)
    light = PixelStatistic(statistic="brightness")
    job = tiny.job(tmp_path, PolicyConfig(task=tiny.Bright(), reward=light, rollout=rollout, **vars(variant("draft"))))
    said = job.update(0, job.trainer.optimise)
    assert said["grad_norm"] > 0 and said["skipped"] == 0


def test_classes_are_held_once_per_encoding_and_follow_rows() -> None:
    told = (
        tiny.Mlp().condition(["a", "b"]).rows(torch.tensor([1, 0, 1, 1])).beside({"class": torch.tensor([7, 5, 7, 7])})
    )
    assert told.tensors["class"].tolist() == [5, 7] and told["class"].tolist() == [7, 5, 7, 7]
    assert told.rows(torch.tensor([2, 1])).compact()["class"].tolist() == [7, 5]


def test_what_it_cannot_lead_to_is_refused() -> None:
    with pytest.raises(UserError, match="it knows no class 'ten'"):
        guidance().told(["ten"])
    with pytest.raises(UserError, match="no such file or embedded network"):
        ClassifierGuidance(network="digit-reward")
    net = tiny.Mlp()
    with pytest.raises(ValueError, match="does not say which classes"):
        guidance().guess(net, torch.zeros(1, *tiny.SHAPE), torch.ones(1).double() / 2, net.condition(["a"]))


def test_an_unconditional_model_draws_the_digit_that_was_asked_for() -> None:
    """Of 40 images 10 digits were asked for; another classifier says what they show."""
    net, other = load_denoiser("digits-base"), Classifier.open("digits-judge")
    problems = [Problem(id=str(digit), prompt=str(digit), answer={}) for digit in range(10) for _ in range(4)]
    right = []
    for scale in (0.0, 3.0):
        sampler = LatentSampler(steps=10, grid=Uniform(shift=3.0), guidance=guidance(scale=scale, blank=True))
        chains: Any = sample_problems(net, problems, sampler, seed=0, needs=())
        with torch.no_grad():
            right.append(
                float(other.right(net.decode(chains.samples), [one.prompt for one in problems]).float().mean())
            )
    assert right[0] < 0.3 and right[1] > 0.7
