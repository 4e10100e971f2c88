"""Samples in one picture: a row per prompt, or a column per decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unveil.rewards.images import pil_image

Tile = tuple[Tensor, bool]
"""An image (C, H, W) in [0, 1], and whether the judge takes it for what was asked: it then has a green edge."""
_SMALL, _LARGE = 64, 256
"""Sides in pixels between which images are shown."""
_EDGE, _GAP, _LINE = 2, 4, 18
_NAME = 180
"""Pixels of a row's name, at most."""
_GREEN, _GREY = (46, 160, 67), (208, 208, 208)


def sheet(rows: Sequence[Sequence[Tile]], names: Sequence[str], heads: Sequence[str] = ()) -> Any:
    """A PIL image of rows of tiles with a name beside each, and heads above the columns.

    Small images are enlarged pixel by pixel, large ones made smaller.

    Args:
        rows: of images of one shape; rows may differ in length.
        names: one per row.
        heads: one per column; none: no line of heads.
    """
    from PIL import Image, ImageDraw

    width, height, resampling = _size(rows[0][0][0])
    across, down = width + 2 * _EDGE + _GAP, height + 2 * _EDGE + _GAP
    top = _LINE + _GAP if heads else _GAP
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [_fitting(measure, name, _NAME) for name in names]
    left = 2 * _GAP + round(max(map(measure.textlength, names)))
    made = Image.new("RGB", (left + across * max(map(len, rows)), top + down * len(rows)), "white")
    pen = ImageDraw.Draw(made)
    for place, head in enumerate(heads):
        pen.text((left + across * place, _GAP), _fitting(pen, head, across - _GAP), fill="black")
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + down * number
        pen.text((_GAP, y + height // 2 - _LINE // 3), name, fill="black")
        for place, (image, right) in enumerate(row):
            x = left + across * place
            pen.rectangle(
                (x, y, x + width + 2 * _EDGE - 1, y + height + 2 * _EDGE - 1), fill=_GREEN if right else _GREY
            )
            made.paste(pil_image(image).convert("RGB").resize((width, height), resampling), (x + _EDGE, y + _EDGE))
    return made


def _size(image: Tensor) -> tuple[int, int, Any]:
    """Width and height of a tile, and how an image comes to them."""
    from PIL import Image

    height, width = image.shape[1:]
    if max(height, width) < _SMALL:
        factor = -(-_SMALL // max(height, width))
        return width * factor, height * factor, Image.Resampling.NEAREST
    share = min(1.0, _LARGE / max(height, width))
    return round(width * share), round(height * share), Image.Resampling.LANCZOS


def _fitting(pen: Any, text: str, width: int) -> str:
    """The text, or as much of its beginning as fits."""
    text = " ".join(text.split())
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
