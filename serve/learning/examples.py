"""The pictures that a concept is learned from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from serve.errors import InvalidRequest, OperatorError
from serve.images import image_png, inspect
from serve.learning.captions import checked
from serve.settings.orders import LimitSettings

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_EXAMPLES = 1000
LIMITS = LimitSettings(max_image_bytes=64 * 1024 * 1024, max_image_pixels=12_000 * 12_000)
"""One's own pictures come from cameras."""


@dataclass(frozen=True, slots=True)
class Example:
    """`image` is RGB, of the size that the model draws; one of `captions` is said of it."""

    name: str
    image: Image.Image
    captions: tuple[str, ...]


def read_examples(folder: Path, size: tuple[int, int], captions: Sequence[str]) -> tuple[Example, ...]:
    """Every PNG, JPEG and WebP of the folder, by name, its middle cut to `size` (width, height).

    Where `a.txt` lies beside `a.png`, that is its caption; else any of `captions` is. Raises OperatorError that names
    the file at fault.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    except OSError as error:
        raise OperatorError(f"--images {folder}: {error.strerror}", "images") from None
    if not files:
        raise OperatorError(f"--images {folder}: holds no picture ({', '.join(SUFFIXES)})", "images")
    if len(files) > MAX_EXAMPLES:
        raise OperatorError(f"--images {folder}: {len(files)} pictures; at most {MAX_EXAMPLES} are taken", "images")
    return tuple(Example(file.name, _read(file, size), _said(file) or tuple(captions)) for file in files)


def _read(file: Path, size: tuple[int, int]) -> Image.Image:
    try:
        upload = inspect(file.name, file.read_bytes(), LIMITS)
        whole = Image.open(io.BytesIO(image_png(upload, upload.width, upload.height)))
    except OSError as error:
        raise OperatorError(f"--images {file}: {error.strerror}", "images") from None
    except InvalidRequest as error:
        raise OperatorError(f"--images {file.parent}: {error.message}", "images") from None
    return ImageOps.fit(whole.convert("RGB"), size, Image.Resampling.LANCZOS)


def _said(file: Path) -> tuple[str, ...]:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return ()
    try:
        return (checked(beside.read_text(encoding="utf-8"), str(beside)),)
    except (OSError, UnicodeDecodeError):
        raise OperatorError(f"{beside}: no caption that can be read (UTF-8)", "images") from None
