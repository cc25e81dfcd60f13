"""A contact sheet: captioned pictures side by side, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_TILE = 256
_MARGIN = 20
_TITLE_PX, _NOTE_PX = 15, 13
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, slots=True)
class Picture:
    """One tile: the image, what it should show, and one fainter line below."""

    image: Image.Image
    title: str
    note: str


def contact_sheet(pictures: Sequence[Picture], columns: int = 3) -> Image.Image:
    """An RGB sheet of `columns` tiles a row; images are fitted into the tile, larger or smaller, undistorted."""
    title_font, note_font = ImageFont.load_default(_TITLE_PX), ImageFont.load_default(_NOTE_PX)
    titles = [_wrap(picture.title, title_font) for picture in pictures]
    line = _TITLE_PX + 4
    cell_height = _TILE + 8 + line * max(map(len, titles)) + _NOTE_PX + 6 + _MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (_MARGIN + columns * (_TILE + _MARGIN), _MARGIN + rows * cell_height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x = _MARGIN + index % columns * (_TILE + _MARGIN)
        y = _MARGIN + index // columns * cell_height
        tile = _fitted(picture.image)
        sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        y += _TILE + 8
        for text in title:
            pen.text((x, y), text, _INK, title_font)
            y += line
        pen.text((x, y), picture.note, _FAINT, note_font)
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: Font) -> list[str]:
    """Lines no wider than a tile; a word that is wider alone is cut by the next tile, never the sheet's size."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _TILE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
