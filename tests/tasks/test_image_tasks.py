"""Tasks of images: what they draw, that halves never mix, what the judge says, files that are broken."""

from __future__ import annotations

import gzip
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from unveil.recipe import RecipeError, build
from unveil.registry import UserError
from unveil.rewards.images import PixelStatistic
from unveil.tasks.base import Split, Task
from unveil.tasks.countdown import Countdown
from unveil.tasks.digits import Digits
from unveil.tasks.glyphs import CONSONANTS, VOWELS, Glyphs
from unveil.tasks.mnist import Fashion, Mnist, resized
from unveil.tasks.pixels import FILM_SIDE, SAMPLE_SIDE, shrunk
from unveil.tasks.prompts import ImageFolder, Prompts

DIGITS = Digits()


def rows(images: torch.Tensor) -> set[bytes]:
    return {row.tobytes() for row in images.flatten(1).numpy()}


# ---- digits


def test_the_halves_of_the_digits_are_all_of_them_and_share_no_image() -> None:
    train, test = DIGITS.halves["train"], DIGITS.halves["test"]
    assert len(train[0]) + len(test[0]) == 1797 and DIGITS.shape == tuple(train[0].shape[1:]) == (1, 8, 8)
    assert not rows(train[0]) & rows(test[0])
    for images, labels in (train, test):
        assert labels.bincount().min() >= 70 and images.min() == 0 and images.max() == 1
        assert len(labels) >= 850


def test_problems_ask_for_every_class_equally_often() -> None:
    first = DIGITS.problems("train", 23, seed=4)
    assert first == DIGITS.problems("train", 23, seed=4) != DIGITS.problems("train", 23, seed=5)
    assert len({problem.id for problem in first}) == 23
    counts = [sum(problem.prompt == name for problem in first) for name in DIGITS.vocabulary]
    assert sorted(counts) == [2] * 7 + [3] * 3
    assert all(problem.prompt == DIGITS.names[problem.answer["label"]] for problem in first)
    assert not {p.id for p in first} & {p.id for p in DIGITS.problems("test", 50, seed=4)}
    assert [len(DIGITS.problems("test", count, 0)) for count in (0, 1, 10)] == [0, 1, 10]


def test_examples_are_of_their_half_and_carry_their_class() -> None:
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        prompts, images = DIGITS.examples(split, 300, seed=1)
        own = {image.numpy().tobytes(): int(label) for image, label in zip(*DIGITS.halves[split], strict=True)}
        assert prompts == [str(own[image.numpy().tobytes()]) for image in images]
    again = DIGITS.examples("test", 300, seed=1)
    assert again[0] == prompts and again[1].equal(images)


def test_label_noise_replaces_the_prompt_by_any_class() -> None:
    clean, images = DIGITS.examples("train", 20_000, seed=2)
    noisy, same = Digits(label_noise=0.5).examples("train", 20_000, seed=2)
    assert same.equal(images)
    agreement = sum(a == b for a, b in zip(clean, noisy, strict=True)) / 20_000
    assert agreement == pytest.approx(0.5 + 0.5 * 0.1, abs=0.015)


def test_the_judge_knows_real_digits_and_was_taught_by_the_other_half() -> None:
    images, labels = DIGITS.halves["train"]
    by_label = {problem.answer["label"]: problem for problem in DIGITS.problems("test", 10, 0)}
    problems = [by_label[label] for label in labels.tolist()]
    verdicts = DIGITS.check_all(problems, list(images))
    accuracy = sum(verdict.correct for verdict in verdicts) / len(verdicts)
    assert accuracy >= 0.96, "real digits that it has never seen"
    assert all((verdict.score > 0.5) <= verdict.correct for verdict in verdicts)
    assert all(verdict.metrics["distance"] > 0 for verdict in verdicts)
    wrong = [by_label[(label + 1) % 10] for label in labels.tolist()]
    assert sum(verdict.correct for verdict in DIGITS.check_all(wrong, list(images))) / len(images) <= 0.02
    measured = DIGITS.measure(problems, list(images))
    assert measured["distance"] == pytest.approx(sum(v.metrics["distance"] for v in verdicts) / len(verdicts), rel=1e-5)
    noise = list(torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    far = DIGITS.measure(problems[:400], noise)
    assert far["distance"] > 1.5 * measured["distance"] and far["frechet"] > 5 * measured["frechet"]
    flat = DIGITS.measure(problems[:400], [torch.zeros(1, 8, 8)] * 400)
    assert flat["diversity"] == 0 < measured["diversity"]


@pytest.mark.parametrize("task", [DIGITS, Glyphs()])
def test_a_judge_never_raises_on_any_image(task: Any) -> None:
    problem = task.problems("test", 1, 0)[0]
    for image in (torch.full(task.shape, math.nan), torch.full(task.shape, math.inf), torch.full(task.shape, -7.0)):
        verdict = task.check(problem, image)
        assert 0 <= verdict.score <= 1 and all(map(math.isfinite, verdict.metrics.values()))
    assert task.check_all([], []) == []


def test_one_image_alone_is_judged_as_among_others() -> None:
    problems = DIGITS.problems("test", 7, 0)
    images = list(DIGITS.examples("test", 7, 3)[1])
    together = DIGITS.check_all(problems, images)
    alone = [DIGITS.check(*pair) for pair in zip(problems, images, strict=True)]
    assert [v.correct for v in together] == [v.correct for v in alone]
    assert [v.score for v in together] == pytest.approx([v.score for v in alone], abs=1e-5)


def test_texts_and_images_are_told_apart() -> None:
    assert (Countdown().medium, DIGITS.medium, Glyphs().medium) == ("text", "image", "image")
    assert Countdown().measure([], []) == {}
    problem = Countdown().problems("test", 1, 0)[0]
    assert Countdown().check_all([problem] * 2, [problem.solution, ""])[0].correct


# ---- glyphs


def test_words_of_the_splits_are_all_words_and_share_none() -> None:
    words = Glyphs().words
    assert len(words["train"]) + len(words["test"]) == len(CONSONANTS) ** 2 * len(VOWELS)
    assert not set(words["train"]) & set(words["test"])
    assert {letter for word in words["test"] for letter in word} == set(CONSONANTS + VOWELS)
    assert 400 < len(words["test"]) < 560
    with pytest.raises(UserError, match="test words, 5000 were asked for"):
        Glyphs().problems("test", 5000, 0)


def test_drawn_words_are_inside_the_canvas_and_differ() -> None:
    task = Glyphs()
    images = task.draw(["MUM"] * 40, random.Random(0))
    assert tuple(images.shape[1:]) == task.shape and images.min() == 0 and 0.5 < images.max() <= 1
    assert len(rows(images)) > 30
    edge = torch.cat([images[:, 0, 0], images[:, 0, -1]], 1)
    assert edge.mean() < 0.2, "letters are not cut at the upper and lower edge"


def test_the_judge_reads_what_is_drawn() -> None:
    task = Glyphs()
    problems = task.problems("test", 200, seed=3)
    images = task.draw([problem.prompt for problem in problems], random.Random(1))
    verdicts = task.check_all(problems, list(images))
    assert sum(verdict.correct for verdict in verdicts) / 200 >= 0.97
    assert all(verdict.correct == (verdict.score == 1) for verdict in verdicts)
    shifted = task.check_all(problems[1:] + problems[:1], list(images))
    assert sum(verdict.correct for verdict in shifted) <= 2 and sum(verdict.score for verdict in shifted) > 5
    assert task.measure([problems[0]] * 2, list(images[:2]))["diversity"] > 0


@pytest.mark.parametrize("settings", [{}, {"sizes": [10], "pitch": 10, "jitter": 1}])
def test_the_distance_to_drawings_is_that_of_the_nearest_of_any_brightness(settings: Any) -> None:
    task = Glyphs(**settings)
    words = ["CAT", "WIM", "QUJ", "HIL"]
    images = task.draw(words, random.Random(2))
    assert task.distances(images, words).max() < 0.03, "what was drawn is among the drawings, but for rounding"
    found = task.distances(images, ["CAT"] * 4)
    real = task.drawings("CAT").flatten(1)
    levels = torch.arange(150, 256) / 255
    for row in range(4):
        nearest = min((images[row].flatten() - level * real).norm(dim=1).min().item() for level in levels)
        assert found[row].item() == pytest.approx(nearest, abs=0.02)
    assert torch.allclose(task.distances(images, [""] * 4).float(), images.flatten(1).norm(dim=1))
    verdicts = task.check_all(task.problems("test", 4, 0), list(images))
    told = [verdict.metrics["distance"] for verdict in verdicts]
    assert told == pytest.approx(task.distances(images, words).tolist())


def test_a_typewriter_sets_every_letter_in_its_own_pixels() -> None:
    task = Glyphs(sizes=[10], pitch=10, jitter=0)
    word, alone = task.draw(["MIT", "M"], random.Random(0))
    parts = (word > 0).any(1)[0].nonzero().flatten()
    assert word[..., 11:20].max() > 0 and parts.min() >= 1 and parts.max() < 31
    edges = [task.drawings(letters).amax((0, 1, 2)).nonzero().flatten() for letters in ("IIM", "MMM")]
    assert edges[0].max() == edges[1].max(), "the third letter stands where it stands, whatever comes before it"
    free = Glyphs(sizes=[10])
    assert len(free.drawings("III")) > 5 * len(Glyphs(sizes=[10], jitter=1).drawings("III"))
    assert alone.sum() < word.sum()


def test_strings_to_teach_a_reader_have_any_letters() -> None:
    strings, _ = Glyphs(examples_of="strings").examples("test", 400, seed=0)
    assert {len(string) for string in strings} == {1, 2, 3}
    assert len({string[:2] for string in strings if string[0] in VOWELS}) > 30


def test_misheard_prompts_keep_the_kinds_of_letters() -> None:
    clean, images = Glyphs().examples("train", 300, seed=0)
    noisy, _ = Glyphs(label_noise=0.5).examples("train", 300, seed=0)
    assert Glyphs(label_noise=0.5).examples("train", 300, seed=0)[1].equal(images)
    pairs = [(a, b) for one, other in zip(clean, noisy, strict=True) for a, b in zip(one, other, strict=True)]
    assert sum(a != b for a, b in pairs) / len(pairs) == pytest.approx(0.5, abs=0.06)
    assert all((a in VOWELS) == (b in VOWELS) for a, b in pairs)


def test_a_font_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"fonts\.0: 'no\.ttf': no such file"):
        build(Task, {"name": "glyphs", "fonts": ["no.ttf"]})


# ---- sets that packages of others bring


def write_idx(path: Path, values: numpy.ndarray[Any, Any]) -> None:
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.astype(numpy.uint8).tobytes()))


def test_fashion_is_read_from_its_four_files(tmp_path: Path) -> None:
    rng = numpy.random.default_rng(0)
    images = {part: rng.integers(0, 256, (count, 28, 28)) for part, count in (("train", 30), ("t10k", 20))}
    for part, own in images.items():
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", own)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", numpy.arange(len(own)) % 10)
    task = Fashion(folder=str(tmp_path), size=14)
    train, labels = task.halves["train"]
    assert train.shape == (30, 1, 14, 14) and labels[:3].tolist() == [0, 1, 2] and len(task.images[0]) == 50
    assert float(train[2, 0, 0, 1]) == pytest.approx(images["train"][2, :2, 2:4].mean() / 255, abs=1e-6)
    assert set(task.examples("test", 50, 0)[0]) <= set(task.vocabulary)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03abc"))
    with pytest.raises(UserError, match="is no IDX file of bytes with 1 dimensions"):
        _ = Fashion(folder=str(tmp_path)).halves
    with pytest.raises(UserError, match=r"no such file \(Debian's package dataset-fashion-mnist"):
        _ = Fashion(folder=str(tmp_path / "no")).halves


def test_mnist_is_read_from_its_table(tmp_path: Path) -> None:
    values = numpy.concatenate([numpy.full((4, 784), 255), numpy.array([[3], [1], [4], [1]])], 1)
    path = tmp_path / "m.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in values.tolist()).encode()))
    images, labels = Mnist(file=str(path), size=14).images
    assert labels.tolist() == [3, 1, 4, 1] and images.shape == (4, 1, 14, 14) and images.eq(1).all()
    path.write_bytes(gzip.compress(b"1,2\n3,4"))
    with pytest.raises(UserError, match="should have 785 columns"):
        _ = Mnist(file=str(path)).images
    with pytest.raises(UserError, match="cannot be read"):
        _ = Mnist(file=str(tmp_path / "no")).images


def test_sizes_are_means_of_pixels() -> None:
    images = torch.rand(2, 1, 28, 28)
    assert resized(images, 28) is images
    assert resized(images, 14)[0, 0, 3, 5] == pytest.approx(images[0, 0, 6:8, 10:12].mean().item())


# ---- prompt files


def test_prompt_files_in_both_forms(tmp_path: Path) -> None:
    text, lines = tmp_path / "train.txt", tmp_path / "test.jsonl"
    text.write_text("a cat\n\n  a dog \na cat\nan owl\n")
    lines.write_text(
        json.dumps({"prompt": "an owl", "tag": "single", "include": [{"class": "owl"}], "metadata": {"seed": 3}})
        + "\n"
        + json.dumps({"prompt": "a fox"})
    )
    task = Prompts(train_file=str(text), test_file=str(lines))
    assert {problem.prompt for problem in task.problems("train", 2, 0)} == {"a cat", "a dog"}, "the owl is held out"
    first = task.problems("test", 2, 0)[0]
    assert first.prompt == "an owl" and first.answer == {"tag": "single", "include": [{"class": "owl"}], "seed": 3}
    with pytest.raises(UserError, match="holds 2 different train problems, 3 were asked for"):
        task.problems("train", 3, 0)


def test_a_list_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "animals.json"
    path.write_text(json.dumps(["a cat", "a dog", "a cat", "a fox"]))
    task = Prompts(train_file=str(path), test_file=str(path))
    assert [problem.prompt for problem in task.problems("test", 3, 0)] == ["a cat", "a dog", "a fox"]
    for content, message in (
        ('["a cat", {"prompt": "a dog"}]', "entry 2 is no prompt"), ('{"prompt": "a cat"}', "expected a JSON list"),
        ('["a cat"', "not valid JSON"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=rf"animals\.json: {message}"):
            Prompts(train_file=str(path)).problems("train", 1, 0)


def test_without_a_test_file_one_prompt_in_ten_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(1000)))
    task = Prompts(train_file=str(path))
    test = task.problems("test", 80, 0)
    train = task.problems("train", 850, 0)
    assert not {p.prompt for p in train} & {p.prompt for p in test}


def test_a_prompt_function_is_repeatable_and_leaves_the_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    task = Prompts(function="prompt_functions:drawn")
    random.seed(1)
    before = random.random(), numpy.random.get_state()[1][:3].tolist(), torch.initial_seed()
    first = task.problems("train", 20, seed=7)
    random.seed(1)
    assert (random.random(), numpy.random.get_state()[1][:3].tolist(), torch.initial_seed()) == before
    assert [p.prompt for p in first] == [p.prompt for p in task.problems("train", 20, seed=7)]
    assert len({p.id for p in first}) == 20 and first[0].answer == {"length": len(first[0].prompt)}
    assert not {p.prompt for p in first} & {p.prompt for p in task.problems("test", 5, seed=7)}
    with pytest.raises(UserError, match="gave 1 different train prompts, 3 were asked for"):
        Prompts(function="prompt_functions:always_the_same").problems("train", 3, 0)
    for bad in ({}, {"train_file": "a", "function": "b:c"}, {"function": "prompt_functions:nothing"}):
        with pytest.raises(UserError):
            Prompts(**bad)


def test_a_reward_judges_what_has_no_right_answer(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(50)))
    images = [torch.full((3, 4, 4), value) for value in (0.2, 0.7, math.nan)]
    problems = Prompts(train_file=str(path)).problems("train", 3, 0)
    unjudged = Prompts(train_file=str(path)).check_all(problems, images)
    assert [(v.correct, v.score) for v in unjudged] == [(False, 0.0)] * 3
    task = Prompts(train_file=str(path), judge=PixelStatistic(statistic="brightness"))
    judged = task.check_all(problems[:2], images[:2])
    assert [v.correct for v in judged] == [False, True] and judged[1].score == pytest.approx(0.7)
    broken = task.check(problems[0], images[2])
    assert (broken.correct, broken.score, broken.metrics) == (False, 0.0, {"judged": 0.0})
    with pytest.raises(UserError, match="has prompts and no images"):
        _ = Prompts(train_file=str(path)).examples("train", 1, 0)


# ---- image folders


def test_image_folders_with_captions_and_with_subfolders(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for number in range(30):
            colour = (255, 0, 0) if name == "red" else (0, 0, 255)
            Image.new("RGB", (12, 8), colour).save(tmp_path / name / f"{name}{number}.png")
    task = ImageFolder(folder=str(tmp_path), size=6)
    prompts, images = task.examples("train", 40, 0)
    assert images.shape == (40, *task.shape) and set(prompts) == {"red", "blue"}
    channel = {"red": 0, "blue": 2}
    assert all(image[channel[prompt]].min() > 0.99 for prompt, image in zip(prompts, images, strict=True))
    assert ImageFolder(folder=str(tmp_path), size=6, colour=False).examples("test", 2, 0)[1].shape == (2, 1, 6, 6)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "red/red0.png", "text": "all red"}))
    assert ImageFolder(folder=str(tmp_path)).files == [(str(tmp_path / "red" / "red0.png"), "all red")]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "no.png", "text": "x"}))
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: 'no\.png': no such file"):
        ImageFolder(folder=str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        ImageFolder(folder=str(tmp_path / "no"))


def test_embedded_judges_fit_their_tasks() -> None:
    assert DIGITS.judge.names == DIGITS.vocabulary and tuple(DIGITS.judge.about["shape"]) == DIGITS.shape
    assert tuple(Glyphs().judge.about["shape"]) == Glyphs().shape


# ---- what a run keeps of them


def test_images_in_records_are_shrunk_to_their_longest_side_and_never_enlarged() -> None:
    image = torch.zeros(3, 300, 600)
    image[0, :, :300] = 1.0
    small = shrunk(image, 150)
    assert small.shape == (3, 75, 150) and small[1:].eq(0).all()
    assert torch.allclose(small[0, :, :70], torch.ones(75, 70)) and small[0, :, 80:].eq(0).all()
    assert abs(float(small.mean()) - float(image.mean())) < 1e-6 and small.max() < 1 + 1e-6
    assert shrunk(image, 600) is image and shrunk(torch.zeros(1, 900, 2), 100).shape == (1, 100, 1)
    assert FILM_SIDE < SAMPLE_SIDE
