"""A contact sheet: many pictures with their prompts underneath, as one PNG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
GAP = 12
CAPTION_HEIGHT = 46
CAPTION_SIZE = 11
CAPTION_LINES = 3
PAPER, INK = (255, 255, 255), (40, 40, 40)
FRAME = (208, 208, 208)
STEPS = [round(round(value / 255 * 63) * 255 / 63) for value in range(256)]
"""64 steps a channel: nobody sees the difference, and the file is half as large."""


def contact_sheet(pictures: Sequence[tuple[str, NDArray[Any]]], out: Path, columns: int = COLUMNS) -> None:
    """Write (prompt, picture in 0..1) pairs to ``out``, row by row."""
    side = pictures[0][1].shape[0]
    width = columns * (side + GAP) + GAP
    height = math.ceil(len(pictures) / columns) * (side + CAPTION_HEIGHT) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(CAPTION_SIZE)
    for index, (prompt, picture) in enumerate(pictures):
        x = GAP + index % columns * (side + GAP)
        y = GAP + index // columns * (side + CAPTION_HEIGHT)
        sheet.paste(Image.fromarray((np.asarray(picture) * 255).round().astype(np.uint8)), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=FRAME)
        for line, text in enumerate(_wrap(prompt, side, font)[:CAPTION_LINES]):
            pen.text((x, y + side + 3 + line * (CAPTION_SIZE + 1)), text, fill=INK, font=font)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.point(STEPS * 3).save(out, optimize=True)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text as lines of at most ``width`` pixels, where words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
