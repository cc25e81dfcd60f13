"""The pages about the dialects and the client: every example of them runs."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.drawing import Drawing
from support.obliging import obliging
from support.pages import Reader, examples

from serve.results.store import open_store

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "api").glob("*.md")), ROOT / "docs" / "client.md"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader is: in a checkout, with a picture and a mask of as many pixels."""
    (tmp_path / "serve").symlink_to(ROOT / "serve")
    Image.new("RGB", (128, 128), "white").save(tmp_path / "start.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def obliged(drawing_with: Any) -> Iterator[Drawing]:
    """A server whose every order is drawn at once, by a worker without a model."""
    with drawing_with(worker=False) as server:
        working = obliging(server.jobs, open_store(server.settings.results, server.settings.data_dir))
        server.run(working.__aenter__())
        yield server
        server.run(working.__aexit__(None, None, None))


def run(page: Path, folder: Path, server: Drawing) -> None:
    found = list(examples(page.read_text(encoding="utf-8")))
    assert any(not each.why for each in found), "no example is run"
    reader = Reader(server.url, folder)
    try:
        for each in found:
            if not each.why:
                reader.run(each)
    finally:
        reader.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_of_a_page_runs(page: Path, folder: Path, obliged: Drawing) -> None:
    run(page, folder, obliged)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_of_a_page_runs_where_pictures_are_drawn(page: Path, folder: Path, drawing: Drawing) -> None:
    run(page, folder, drawing)


def test_an_example_that_fails_is_told_with_its_line(folder: Path, obliged: Drawing) -> None:
    page = "# A page\n\n```sh\necho fine; cat start.png > copy.png\n```\n\n```sh\ncurl http://127.0.0.1:8000/v1/nothing\n```\n"
    good, bad = examples(page)
    reader = Reader(obliged.url, folder)
    try:
        reader.run(good)
        assert Image.open(io.BytesIO((folder / "copy.png").read_bytes())).size == (128, 128)
        with pytest.raises(AssertionError, match=r"line 7: .*\n.*404\n.*not_found"):
            reader.run(bad)
    finally:
        reader.close()
