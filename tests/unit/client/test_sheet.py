"""The contact sheet: every picture in its place, whatever its size and caption."""

import pytest
from PIL import Image

from serve.cli.sheet import Picture, contact_sheet


def pictures(number: int, size: tuple[int, int] = (128, 128), title: str = "a red circle") -> list[Picture]:
    return [Picture(Image.new("RGB", size, (200, 10 * i, 0)), title, "a note") for i in range(number)]


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (6, 3, 2), (7, 3, 3)])
def test_pictures_lie_in_rows(number: int, columns: int, rows: int) -> None:
    sheet = contact_sheet(pictures(number))
    one = contact_sheet(pictures(1))
    assert sheet.width == 20 + columns * (256 + 20)
    assert sheet.height - 20 == rows * (one.height - 20)
    colors = {color for _, color in sheet.getcolors(1 << 24) or []}
    assert {(200, 10 * i, 0) for i in range(number)} <= colors


def test_a_wide_picture_keeps_its_shape() -> None:
    sheet = contact_sheet(pictures(1, size=(512, 128)))
    red = sum(count for count, color in sheet.getcolors(1 << 24) or [] if color == (200, 0, 0))
    assert red == 256 * 64


def test_a_long_caption_makes_room_for_itself() -> None:
    short, long = contact_sheet(pictures(2)), contact_sheet(pictures(2, title="a red circle " * 12))
    assert long.width == short.width
    assert long.height > short.height
    assert contact_sheet(pictures(1, title="x" * 500)).width == contact_sheet(pictures(1)).width
