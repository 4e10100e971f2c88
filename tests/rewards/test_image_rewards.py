"""Rewards of images: sizes of files, opinions of networks, statistics, DDPO's functions, bundles of them."""

from __future__ import annotations

import base64
import importlib.machinery
import io
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from unveil.recipe import RecipeError, build, dump
from unveil.registry import UserError
from unveil.rewards.base import Correct, Failure, Metric, Part, Reward, Sum
from unveil.rewards.ddpo import Ddpo
from unveil.rewards.images import ClassProbability, JpegSize, PixelStatistic, data_url, pil_image
from unveil.rewards.networks import Classifier, ReaderShape
from unveil.rewards.reading import Ocr, RapidOcr, edit_distance, text_score, wanted_text
from unveil.rewards.trl import Trl


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ask(reward: Reward, images: list[Tensor], metadata: list[Any] | None = None) -> list[Any]:
    total = reward.ask(images, ["p"] * len(images), metadata or [{}] * len(images)).total
    return [one.kind if isinstance(one, Failure) else one for one in total]


# ---- files


@pytest.mark.parametrize("channels", [1, 3])
def test_the_size_of_a_jpeg_is_what_pillow_writes(channels: int) -> None:
    images = [noise(channels, 24, 16), torch.zeros(channels, 24, 16)]
    sizes = []
    for image in images:
        values = (image * 255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(values.squeeze()).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert sizes[0] > sizes[1], "noise is hard to compress"
    assert ask(JpegSize(prefer="large"), images) == sizes
    assert ask(JpegSize(), images) == [-size for size in sizes]
    assert ask(JpegSize(quality=20, prefer="large"), images)[0] < sizes[0]


def test_a_data_url_keeps_every_level() -> None:
    image = torch.arange(256).reshape(1, 16, 16) / 255
    head, body = data_url(image).split(",")
    assert head == "data:image/png;base64"
    again = Image.open(io.BytesIO(base64.b64decode(body)))
    assert list(again.tobytes()) == list(range(256)) and pil_image(noise(3, 4, 5)).size == (5, 4)


@pytest.mark.parametrize("image", [torch.full((1, 8, 8), math.nan), torch.zeros(2, 8, 8), torch.zeros(8, 8)])
def test_what_is_no_image_has_no_size(image: Tensor) -> None:
    assert ask(JpegSize(), [image]) == ["not_an_image"]


# ---- statistics


@pytest.mark.parametrize(
    "reward",
    [PixelStatistic(statistic=name) for name in ("brightness", "contrast", "norm", "colourfulness", "sharpness")]
    + [ClassProbability(network="digits-reward", output=name) for name in ("probability", "logit")],  # type: ignore[arg-type]
    ids=lambda reward: getattr(reward, "statistic", None) or reward.output,
)
def test_values_are_the_scores_with_a_gradient(reward: Reward) -> None:
    classes = isinstance(reward, ClassProbability)
    batch, about = noise(3, 1 if classes else 3, 8, 8) * 0.9 + 0.05, [{"label": 3}, {"label": 0}, {"label": 8}]
    inner = batch.clone().requires_grad_()
    values = reward.values(inner, [""] * 3, about)
    assert values.tolist() == pytest.approx(ask(reward, list(batch), about), rel=1e-6)
    values.sum().backward()
    assert inner.grad is not None
    step = 2e-3 * inner.grad / inner.grad.abs().max()
    with torch.no_grad():
        ends = [float(reward.values(batch + sign * step, [""] * 3, about).double().sum()) for sign in (1, -1)]
    assert ends[0] - ends[1] == pytest.approx(2 * float((inner.grad * step).sum()), rel=0.02)


def test_statistics_of_plain_images() -> None:
    black, white = torch.zeros(1, 6, 6), torch.ones(1, 6, 6)
    half = torch.cat([torch.zeros(1, 3, 6), torch.ones(1, 3, 6)], 1)
    want = {
        "brightness": [0, 1, 0.5],
        "contrast": [0, 0, 0.5],
        "sparsity": [1, 0, 0.5],
        "norm": [1, 1, 1],
        "colourfulness": [0, 0, 0],
        "sharpness": [0, 0, 0.5],  # two of the four inner rows lie at the edge
    }
    for statistic, values in want.items():
        reward = PixelStatistic(statistic=statistic)  # type: ignore[arg-type]
        assert ask(reward, [black, white, half]) == pytest.approx(values), statistic


def test_colourfulness_equals_its_formula() -> None:
    image = noise(3, 5, 7)
    red, green, blue = (image * 255).double()
    rg, yb = red - green, (red + green) / 2 - blue
    deviation = math.hypot(rg.std(unbiased=False), yb.std(unbiased=False))
    want = deviation + 0.3 * math.hypot(rg.mean(), yb.mean())
    assert ask(PixelStatistic(statistic="colourfulness"), [image]) == pytest.approx([want])
    assert ask(PixelStatistic(statistic="colourfulness"), [image.mean(0).expand(3, -1, -1)])[0] < 1e-3


# ---- networks


def test_a_classifier_s_opinion_in_three_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Classifier({"shape": [1, 8, 8], "names": ["a", "b", "c"], "channels": [4, 4], "hidden": 8})
    path = tmp_path / "c.safetensors"
    network.half().float().save(path)
    images, labels = [noise(1, 8, 8, seed=seed) for seed in range(4)], [0, 2, 1, 1]
    logits = network(torch.stack(images))[range(4), labels], network(torch.stack(images)).softmax(-1)[range(4), labels]
    metadata = [{"label": label} for label in labels]
    for output, want in {"logit": logits[0], "probability": logits[1], "log_probability": logits[1].log()}.items():
        reward = ClassProbability(network=str(path), output=output)  # type: ignore[arg-type]
        assert ask(reward, images, metadata) == pytest.approx(want.tolist(), abs=2e-3)
    assert ask(ClassProbability(network=str(path)), [torch.full((1, 8, 8), math.inf)], metadata[:1]) == ["not_an_image"]


def test_a_network_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"digit-judge.*did you mean 'digits-judge'"):
        build(Reward, {"name": "classifier", "network": "digit-judge"})
    reader = tmp_path / "reader.safetensors"
    ReaderShape().build([1, 8, 16], []).save(reader)
    with pytest.raises(UserError, match="should be a classifier, is 'reader'"):
        Classifier.open(reader)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="should be a classifier, is 'unmarked'"):
        Classifier.open(other)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be opened"):
        Classifier.open(tmp_path / "broken.safetensors")


def test_a_classifier_sees_larger_images_as_means_of_pixels() -> None:
    judge = Classifier.open("digits-judge")
    large = noise(5, 1, 24, 24)
    small = torch.nn.functional.avg_pool2d(large, 3)
    assert torch.equal(judge(large), judge(small)) and not torch.equal(judge(large), judge(large[..., :8, :8]))


def test_gradients_reach_the_pixels() -> None:
    image = noise(1, 1, 8, 8).requires_grad_()
    Classifier.open("digits-reward")(image).log_softmax(-1)[0, 3].backward()
    assert image.grad is not None and image.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2), ("x", "x", 0)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_the_score_of_a_text_ignores_case_and_spaces_and_is_never_negative() -> None:
    assert text_score("c a t", "CAT") == 1 and text_score("CUT", "CAT") == pytest.approx(2 / 3)
    assert text_score("SOMETHING ELSE", "CAT") == 0 and text_score("", "CAT") == 0


def test_a_reader_says_what_its_columns_say() -> None:
    reader = ReaderShape(alphabet="AB").build([1, 8, 16], [])
    a, b, nothing = torch.eye(3).mul(-9).add(9).neg().unbind(0)  # log-probabilities with one sure letter
    columns = {"": [nothing, nothing], "AAB": [a, a, nothing, a, b, b], "BA": [nothing, b, a, a]}
    for text, rows in columns.items():
        reader.forward = lambda images, rows=rows: torch.stack(rows)[None]  # type: ignore[method-assign]
        assert reader.read(torch.zeros(1, 1, 8, 16)) == [text]


# ---- functions


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return lambda name, **settings: Ddpo(function=f"image_functions:{name}", **settings)


def test_functions_of_ddpo_are_called_as_its_trainer_calls_them(ddpo: Any) -> None:
    images = [torch.full((3, 4, 6), 0.25), torch.full((3, 4, 6), 0.5)]
    assert ask(ddpo("brightness"), images, [{"bonus": 1}, {"bonus": 2}]) == [1.25, 2.5]
    assert ask(ddpo("brightness", timeout=None), images, [{"bonus": 1}, {"bonus": 2}]) == [1.25, 2.5]
    assert ask(ddpo("bare"), images) == [2.0, 2.0]
    assert ask(ddpo("of_pil", pil=True), images) == [6.0, 6.0]
    assert ask(ddpo("made", arguments={"factor": 3.0}), images) == [3.0, 3.0]
    assert ask(ddpo("made", arguments={}), images) == [1.0, 1.0]
    assert ask(ddpo("crashes"), images) == ["exception"] * 2
    assert ask(ddpo("two"), images) == [1.0, 2.0], "a pair of numbers is two scores, not scores and info"


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("nothing", {}, "cannot be imported"),
        ("made", {"arguments": {"no": 1}}, "cannot be imported"),
        ("NOT_A_FUNCTION", {}, "is no function, but int"),
    ],
)
def test_functions_that_cannot_work_are_refused(ddpo: Any, name: str, settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ddpo(name, **settings)


# ---- bundles


def test_a_part_for_evaluation_is_asked_then_alone(ddpo: Any) -> None:
    bundle = Sum(
        parts={
            "size": Part(reward=JpegSize(prefer="large"), weight=0.0),
            "bright": Part(reward=PixelStatistic(statistic="brightness"), role="audit"),
            "slow": Part(reward=ddpo("crashes"), role="evaluate"),
            "judge": Part(reward=Metric(key="distance"), role="evaluate", weight=9.0),
        }
    )
    assert bundle.part_weights == {"size": 0.0}
    images, metadata = [torch.zeros(3, 8, 8)], [{"metrics": {"distance": 2.5}}]
    training = bundle.ask(images, ["p"], metadata)
    assert list(training.parts) == ["size", "bright"] and training.failures() == []
    evaluation = bundle.ask(images, ["p"], metadata, evaluating=True)
    assert evaluation.parts["judge"] == [2.5] and evaluation.total == [0.0]
    assert [name for name, _ in evaluation.failures()] == ["slow"]
    assert build(Reward, dump(bundle)) == bundle


def test_a_metric_that_the_task_does_not_give_is_no_score() -> None:
    assert ask(Metric(key="distance"), [torch.zeros(1, 8, 8)], [{"metrics": {}}]) == ["exception"]


def test_rewards_of_another_medium_are_refused_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    text = Trl(function="functions:length")
    with pytest.raises(UserError, match=r"^policy\.reward: 'trl' scores texts, and the task's samples are images$"):
        text.check_medium("image", "policy.reward")
    with pytest.raises(UserError, match=r"^policy\.reward\.parts\.a\.reward: 'jpeg' scores images, and the"):
        Sum(parts={"a": Part(reward=JpegSize())}).check_medium("text", "policy.reward")
    for reward in (Correct(), Metric(key="x"), Sum(parts={"a": Part(reward=JpegSize())})):
        reward.check_medium("image", "policy.reward")


def test_readers_of_words_score_by_edit_distance() -> None:
    reward = Ocr(network="glyphs-judge")
    reward.reader.read = lambda images: ["CAT", "CA"]  # type: ignore[method-assign]
    try:
        assert ask(reward, [torch.zeros(1, 12, 32)] * 2, [{"text": "CAT"}] * 2) == [1.0, pytest.approx(2 / 3)]
    finally:
        del reward.reader.read


def test_the_wanted_text_is_the_answer_s_or_stands_in_quotation_marks() -> None:
    assert wanted_text('a sign that says "Open Now" and "x"', {}) == "Open Now"
    assert wanted_text('a sign that says "Open"', {"text": "CAT"}) == "CAT"
    assert wanted_text("no text in it", {}) is None and wanted_text('""', {}) is None
    assert ask(Ocr(network="glyphs-judge"), [torch.zeros(1, 12, 32)]) == [None], "the reward does not apply"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """RapidOCR's package with an engine that reads what the test says and keeps what it was asked."""
    asked: list[Any] = []

    class RapidOCR:
        lines: Any = None

        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def __call__(self, array: Any, **settings: Any) -> tuple[Any, Any]:
            asked.append((array, settings))
            return RapidOCR.lines, None

    module = types.ModuleType("rapidocr_onnxruntime")
    module.__spec__ = importlib.machinery.ModuleSpec("rapidocr_onnxruntime", None)
    module.RapidOCR, module.asked = RapidOCR, asked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", module)
    return module


def test_an_engine_gets_pixels_and_its_lines_are_joined(engine: Any) -> None:
    image, place = torch.zeros(3, 4, 6), [[0, 0], [1, 0], [1, 1], [0, 1]]
    image[0] = 1.0  # red
    engine.RapidOCR.lines = [[place, "Hello ", 0.9], [place, "World", 0.4]]
    reward = RapidOcr(confidence=0.3)
    assert ask(reward, [image], [{"text": "hello world"}]) == [1.0]
    assert ask(reward, [image], [{"text": "World"}]) == [1.0], "what else stands there costs nothing"
    assert ask(reward, [image], [{"text": "Hallo World"}]) == [pytest.approx(0.9)]
    assert ask(reward, [image]) == [None]
    settings, (array, asked) = engine.asked[:2]
    assert settings == {"intra_op_num_threads": 1, "text_score": 0.3} and asked == {"use_det": True, "use_cls": False}
    assert array.shape == (4, 6, 3) and array.dtype == "uint8" and array[0, 0].tolist() == [0, 0, 255], "blue first"
    assert len(engine.asked) == 4, "one engine, and no call where the reward does not apply"


def test_an_engine_that_finds_no_line_or_gets_none_to_find(engine: Any) -> None:
    assert ask(RapidOcr(), [torch.zeros(1, 4, 6)], [{"text": "CAT"}]) == [0.0]
    engine.RapidOCR.lines = [["CUT", 0.9]]
    assert ask(RapidOcr(detect=False), [torch.zeros(1, 4, 6)], [{"text": "CAT"}]) == [pytest.approx(2 / 3)]
    assert engine.asked[-1][0].shape == (4, 6, 3) and engine.asked[-1][1]["use_det"] is False
    assert ask(RapidOcr(), [torch.full((1, 4, 6), math.nan)], [{"text": "CAT"}]) == ["not_an_image"]


def test_an_engine_that_is_not_installed_is_refused_by_its_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    said = r"^recipe: reward 'rapidocr': rapidocr-onnxruntime is not installed \(pip install"
    with pytest.raises(RecipeError, match=said) as told:
        build(Reward, {"name": "rapidocr"})
    assert "\n" not in str(told.value)


def test_the_recipe_of_the_page_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)]
    (bundle,) = [block["reward"] for block in blocks if "class" in block.get("reward", {}).get("parts", {})]
    found = build(Reward, bundle)
    images, metadata = [torch.zeros(1, 8, 8)], [{"label": 3, "metrics": {"distance": 2.0}}]
    answer = found.ask(images, ["3"], metadata, evaluating=True)
    assert answer.failures() == [] and set(answer.parts) == {"class", "near", "size"}
    assert answer.total == answer.parts["class"]
