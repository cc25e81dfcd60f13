import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from serve.domain import EncodeUnit
from serve.encoders.unit import fingerprint
from serve.models import SHIPPED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(SHIPPED / part, tmp_path / part)
    return tmp_path


def test_a_copy_is_the_same_encoder(folder: Path) -> None:
    (folder / "text_encoder" / "README.md").write_text("no part of it")
    assert fingerprint(folder, "float32") == fingerprint(SHIPPED, "float32")


@pytest.mark.parametrize("name", ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt"])
def test_any_changed_byte_is_another_encoder(folder: Path, name: str) -> None:
    file = folder / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder, "float32") != fingerprint(SHIPPED, "float32")


def test_dtype_is_part_of_it() -> None:
    assert fingerprint(SHIPPED, "float16") != fingerprint(SHIPPED, "float32")


def test_units_differ_in_every_part_of_their_key() -> None:
    unit = EncodeUnit("encoder", (1, 2, 3))
    others = [replace(unit, encoder="other"), replace(unit, token_ids=(1, 2)), replace(unit, output="pooled")]
    assert len({each.key for each in (unit, *others)}) == 4
    assert unit.key == EncodeUnit("encoder", (1, 2, 3)).key
    assert len(unit.key) == 40
