"""Tasks whose samples are images, and those of them in which a prompt names the class of an image."""

from __future__ import annotations

import importlib.util
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unveil.registry import UserError
from unveil.rewards.networks import Classifier
from unveil.rewards.statistics import frechet_distance, group_diversity, nearest_distance
from unveil.seeds import generator
from unveil.tasks.base import Problem, Split, Task, Verdict


class ImageTask(Task):
    """Problems whose samples are images (C, H, W) with values in [0, 1]."""

    medium = "image"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images.

        Raises:
            UserError: the task has prompts only.
        """
        raise UserError(f"task: {self.name!r} has prompts and no images (allowed: a task with images of its own)")

    @property
    def vocabulary(self) -> list[str]:
        """All prompts there are, in the order of a class-conditional network; empty where prompts are free text."""
        return []

    def examples(self, split: Split, count: int, seed: int) -> tuple[list[str], Tensor]:
        """``count`` prompts with an image each, (N, C, H, W), to train or test a denoiser on; drawn with replacement.

        Raises:
            UserError: the task has no images of its own, or they cannot be read.
        """
        raise UserError(f"task: {self.name!r} has prompts and no images (allowed: a task with images of its own)")

    def check(self, problem: Problem, completion: Any) -> Verdict:
        """One of many: a judge looks at all samples at once, in `check_all`."""
        return self.check_all([problem], [completion])[0]


def image_task(task: Task, where: str) -> ImageTask:
    """The task, which stands at the key ``where``, as one of images.

    Raises:
        UserError: it is one of texts.
    """
    if not isinstance(task, ImageTask):
        raise UserError(f"{where}: {task.name!r} has texts, needed are images (allowed: a task of images)")
    return task


def stacked(samples: Sequence[Tensor]) -> Tensor:
    """Samples as one float tensor (N, C, H, W) on the CPU; what is no number becomes 0, so that judges never see it."""
    return torch.stack([sample.detach().float().cpu() for sample in samples]).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


@dataclass(kw_only=True)
class LabelledImages(ImageTask):
    """Prompt: the name of a class; a sample is right if a judge takes it for that class.

    The images are cut into two halves that never mix. The *train* half is all that a base model and the classifier
    of a reward see. The *test* half trains the judge, and is what distances to real data are taken to.

    What the judge says is a proxy as well: its mean certainty can be raised by images that look like no digit. So
    verdicts also carry the distance to the nearest real image, and `measure` the spread and the Frechet distance.
    """

    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of examples whose prompt is replaced by that of a class drawn at random (the right one included): a base
    model that learns from them follows its prompt badly, which is the head room of reinforcement learning."""

    names: ClassVar[tuple[str, ...]]
    """The prompt of every class."""
    judge_name: ClassVar[str]
    """The classifier that judges (`unveil.rewards.networks`)."""

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """All images (N, C, H, W) in [0, 1], and their classes (N,)."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> list[str]:
        return list(self.names)

    @cached_property
    def halves(self) -> dict[Split, tuple[Tensor, Tensor]]:
        """Images and classes of each half. Equal images lie in the same one."""
        images, labels = self.images
        raw = (images * 255).round().to(torch.uint8).flatten(1).numpy()
        test = torch.tensor([zlib.crc32(row.tobytes()) % 2 == 0 for row in raw])
        return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}

    @cached_property
    def judge(self) -> Classifier:
        return Classifier.open(self.judge_name)

    @cached_property
    def real_features(self) -> Tensor:
        """(M, D) the judge's features of the test half."""
        with torch.no_grad():
            return torch.cat([self.judge.features(part) for part in self.halves["test"][0].split(1024)])

    def problems(self, split: Split, count: int, seed: int) -> list[Problem]:
        """Every class as often as every other (but for the rest of a division), in random order.

        The prompts of both splits are the same, for there are no others; the ids, and with them the noise that a
        sample starts from, never are.
        """
        rng = random.Random(f"{self.name}/{split}/{seed}")
        places: list[int] = []
        while len(places) < count:
            places += rng.sample(range(len(self.names)), min(len(self.names), count - len(places)))
        seen: dict[int, int] = {}
        found = []
        for label in places:
            seen[label] = seen.get(label, -1) + 1
            name = f"{self.name}-{split}-{label}-{seen[label]}"
            found.append(Problem(id=name, prompt=self.names[label], answer={"label": label}))
        return found

    def examples(self, split: Split, count: int, seed: int) -> tuple[list[str], Tensor]:
        images, labels = self.halves[split]
        stream = generator(self.name, split, "examples", seed)
        rows = torch.randint(len(images), (count,), generator=stream)
        noisy = torch.rand(count, generator=stream) < self.label_noise
        other = torch.randint(len(self.names), (count,), generator=stream)
        return [self.names[label] for label in torch.where(noisy, other, labels[rows]).tolist()], images[rows]

    @torch.no_grad()
    def check_all(self, problems: Sequence[Problem], samples: Sequence[Any]) -> list[Verdict]:
        """Correct: the judge's first choice. Score: its probability of the class that was asked for."""
        if not len(samples):
            return []
        images = stacked(samples)
        labels = torch.tensor([problem.answer["label"] for problem in problems])
        chances = self.judge(images).softmax(-1)
        distances = nearest_distance(images.flatten(1), self.halves["test"][0].flatten(1)).tolist()
        certain = chances[torch.arange(len(labels)), labels].tolist()
        right = (chances.argmax(-1) == labels).tolist()
        return [
            Verdict(correct=one, score=sure, metrics={"distance": distance})
            for one, sure, distance in zip(right, certain, distances, strict=True)
        ]

    @torch.no_grad()
    def measure(self, problems: Sequence[Problem], samples: Sequence[Any]) -> dict[str, float]:
        """``diversity`` within the samples of a prompt, ``distance`` to the nearest real image, and the ``frechet``
        distance to real images in the judge's features."""
        images = stacked(samples)
        flat, features = images.flatten(1), self.judge.features(images)
        return {
            "diversity": group_diversity(flat, [problem.prompt for problem in problems]),
            "distance": nearest_distance(flat, self.halves["test"][0].flatten(1)).mean().item(),
            "frechet": frechet_distance(features, self.real_features),
        }


def require(package: str) -> None:
    """See that a package of the extra ``image`` is there.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed (pip install 'unveil[image]')")
