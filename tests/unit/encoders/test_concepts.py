"""Learned concepts: which files are read, who reads which vectors, and that a folder is known as it is now."""

import os
import pickle
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from support.text_models import CLIP_L, OPENCLIP, T5, flux_folder, sd3_folder, sd_folder, sdxl_folder

from serve.encoders import concepts
from serve.encoders.concept_files import MAX_BYTES, MAX_VECTORS, Vectors, fit, read_concept, write_concept
from serve.encoders.concepts import LOOK_S, REPLACED, ConceptFolder, ConceptInfo
from serve.errors import BackendUnavailable
from serve.models import ModelFolder, check_folder
from serve.prompts.concepts import ConceptFault

L, G, W = CLIP_L["hidden_size"], OPENCLIP["hidden_size"], int(str(T5["d_model"]))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFolder]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "sd": sd_folder(root / "sd"),
        "sdxl": sdxl_folder(root / "sdxl"),
        "sd3": sd3_folder(root / "sd3"),
        "sd3-without-t5": sd3_folder(root / "sd3-without-t5", with_t5=False),
        "flux": flux_folder(root / "flux"),
    }
    return {name: check_folder(folder, name, text_only=True) for name, folder in folders.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(concepts.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def put(folder: Path, name: str, **tensors: torch.Tensor) -> Path:
    file = folder / f"{name}.safetensors"
    beside = folder / ".new"
    beside.write_bytes(save(tensors))
    beside.replace(file)
    return file


def fault(file: Path) -> str:
    with pytest.raises(ConceptFault) as raised:
        read_concept(file)
    assert str(raised.value).startswith(file.name)
    return str(raised.value)


@pytest.mark.parametrize("key", ["emb_params", "<cat>", "clip_l", "text_encoders_0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_layout_gives_the_same_vectors(
    tmp_path: Path, models: Mapping[str, ModelFolder], key: str, dtype: torch.dtype
) -> None:
    wanted = vectors(3, L).half().float()
    (found,) = read_concept(put(tmp_path, "cat", **{key: wanted.to(dtype)}))
    placed = fit("cat", (found,), models["sd"])
    assert torch.equal(placed["text_encoder"].values, wanted.to(dtype).float())


def test_one_vector_needs_no_second_axis(tmp_path: Path) -> None:
    (found,) = read_concept(put(tmp_path, "cat", emb_params=vectors(1, L)[0]))
    assert found.values.shape == (1, L)


def test_equal_vectors_have_one_digest_and_others_another(tmp_path: Path) -> None:
    one = vectors(2, L)
    nudged = one.clone()
    nudged[1, 5] = torch.nextafter(nudged[1, 5], torch.tensor(9.0))
    files = {"a": {"emb_params": one}, "b": {"<b>": one.double()}, "c": {"x": nudged}, "d": {"x": one.view(1, 2 * L)}}
    a, b, c, d = (read_concept(put(tmp_path, name, **tensors))[0].digest for name, tensors in files.items())
    assert a == b
    assert len({a, c, d}) == 3


@pytest.mark.parametrize(
    ("model", "tensors", "roles"),
    [
        ("sd", {"emb_params": L}, {"text_encoder": L}),
        ("sdxl", {"clip_l": L, "clip_g": G}, {"text_encoder": L, "text_encoder_2": G}),
        ("sdxl", {"emb_params": G}, {"text_encoder_2": G}),
        ("sdxl", {"clip_g": G}, {"text_encoder_2": G}),
        ("sd3", {"clip_l": L, "clip_g": G}, {"text_encoder": L, "text_encoder_2": G}),
        ("sd3", {"clip_l": L, "t5xxl": W}, {"text_encoder": L, "text_encoder_3": W}),
        ("sd3-without-t5", {"clip_l": L, "t5xxl": W}, {"text_encoder": L}),
        ("flux", {"clip_l": L, "t5xxl": W}, {"text_encoder": L, "text_encoder_2": W}),
        ("flux", {"emb_params": W}, {"text_encoder_2": W}),
    ],
)
def test_each_encoder_reads_its_own_vectors(
    tmp_path: Path, models: Mapping[str, ModelFolder], model: str, tensors: dict[str, int], roles: dict[str, int]
) -> None:
    file = put(tmp_path, "cat", **{key: vectors(2, width) for key, width in tensors.items()})
    placed = fit("cat", read_concept(file), models[model])
    assert {role: each.width for role, each in placed.items()} == roles


@pytest.mark.parametrize(
    ("model", "tensors", "told"),
    [
        ("sd", {"emb_params": 768}, f"<cat> has vectors 768 wide; sd reads {L} (clip-{L}x3)"),
        ("sdxl", {"emb_params": 1024}, f"<cat> has vectors 1024 wide; sdxl reads {L} (clip-{L}x3), {G} (clip-{G}x2)"),
        ("sdxl", {"clip_l": L, "clip_g": 1280}, f"1280 wide for clip_g; sdxl reads {G} (clip-{G}x2)"),
        ("sd", {"clip_l": L, "clip_g": G}, f"{G} wide for clip_g; sd reads {L}"),
        ("sdxl", {"clip_l": L, "t5xxl": W}, f"{W} wide for t5xxl; sdxl reads {L}"),
        ("sd3-without-t5", {"t5xxl": W}, "for a T5 alone, which sd3-without-t5 does without"),
    ],
)
def test_vectors_that_nobody_reads_are_refused_with_both_widths(
    tmp_path: Path, models: Mapping[str, ModelFolder], model: str, tensors: dict[str, int], told: str
) -> None:
    put(tmp_path, "cat", **{key: vectors(2, width) for key, width in tensors.items()})
    usable = ConceptFolder(tmp_path).of(models[model])
    with pytest.raises(ConceptFault) as raised:
        usable.find("cat")
    assert told in str(raised.value)
    assert usable.names() == frozenset()
    (info,) = usable.list()
    assert info.fault == str(raised.value)


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_a_pickle_is_refused_and_never_read(tmp_path: Path, models: Mapping[str, ModelFolder], suffix: str) -> None:
    mark, folder = tmp_path / "exploded", tmp_path / "concepts"
    folder.mkdir()
    (folder / f"cat{suffix}").write_bytes(pickle.dumps(Bomb(mark)))
    (folder / "dog.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    usable = ConceptFolder(folder).of(models["sd"])
    with pytest.raises(ConceptFault, match=rf"<cat>: cat\{suffix} is pickled.*only safetensors are read"):
        usable.find("cat")
    with pytest.raises(ConceptFault, match="not a whole safetensors file"):
        usable.find("dog")
    assert not mark.exists()


def test_a_pickle_does_not_stand_before_the_same_concept_as_safetensors(
    tmp_path: Path, models: Mapping[str, ModelFolder], clock: Callable[[float], None]
) -> None:
    for suffix in (".pt", ".bin"):
        (tmp_path / f"cat{suffix}").write_bytes(b"")
    usable = ConceptFolder(tmp_path).of(models["sd"])
    assert usable.names() == frozenset()
    put(tmp_path, "cat", emb_params=vectors(2, L))
    clock(LOOK_S)
    assert usable.find("cat") is not None


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"emb_params": torch.full((1, L), float("nan"))}, "no numbers"),
        ({"emb_params": torch.tensor([[1.0, float("inf")]])}, "no numbers"),
        ({"emb_params": torch.full((1, L), 1e30)}, "no numbers, or beyond 65504"),
        ({"emb_params": torch.ones(1, L, dtype=torch.int32)}, "not vectors"),
        ({"emb_params": torch.ones(1, 1, L)}, "not vectors"),
        ({"emb_params": torch.ones(0, L)}, "not vectors"),
        ({"emb_params": torch.ones(())}, "not vectors"),
        ({"emb_params": torch.ones(MAX_VECTORS + 1, L)}, "76 vectors; 75 fit"),
        ({"clip_l": torch.ones(1, L), "other": torch.ones(1, L)}, "'other'"),
        ({"clip_l": torch.ones(1, L), "text_encoders_0": torch.ones(1, L)}, "clip_l twice"),
        ({"a\nb": torch.ones(2, 2, 2)}, "'a b' is"),
        ({}, "holds no vectors"),
    ],
)
def test_what_is_no_concept_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], told: str) -> None:
    assert told in fault(put(tmp_path, "cat", **tensors))


def test_a_file_that_is_no_file_of_vectors_is_refused(tmp_path: Path) -> None:
    whole = put(tmp_path, "cat", emb_params=vectors(2, L)).read_bytes()
    for name, data in {
        "empty": b"",
        "cut": whole[:-1],
        "longer": whole + b"x",
        "headless": whole[8:],
        "bomb": struct.pack("<Q", 2**63) + whole[8:],
    }.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(data)
        assert "not a whole safetensors file" in fault(file)
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    assert "over 16 MiB" in fault(huge)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_file_does_more_than_be_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A real file with bytes changed, cut or put in."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    raw = bytearray(save({"clip_l": vectors(1, 4), "clip_g": vectors(2, 4).half()}))
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    file.write_bytes(raw)
    found: tuple[Vectors, ...] = ()
    with suppress(ConceptFault):
        found = read_concept(file)
    assert all(each.values.isfinite().all() and each.values.ndim == 2 for each in found)


def test_only_regular_files_with_fit_names_are_concepts(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    for name in ("cat", "cat.v2", "über", "a b", "x" * 64, "x" * 65, ".hidden"):
        put(tmp_path, name, emb_params=vectors(1, L))
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "cat.png").write_bytes(b"")
    assert ConceptFolder(tmp_path).of(models["sd"]).names() == {"cat", "x" * 64}


def test_without_a_folder_there_are_no_concepts(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    usable = ConceptFolder(tmp_path / "none").of(models["sd"])
    assert usable.find("cat") is None
    assert usable.names() == frozenset()
    assert usable.list() == ()


def test_the_list_tells_vectors_by_role_and_faults(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    put(tmp_path, "both", clip_l=vectors(2, L), clip_g=vectors(3, G))
    put(tmp_path, "broken", emb_params=torch.full((1, L), float("nan")))
    both, broken = ConceptFolder(tmp_path).of(models["sdxl"]).list()
    widths = {"text_encoder": L, "text_encoder_2": G}
    assert both == ConceptInfo(name="both", vectors={"text_encoder": 2, "text_encoder_2": 3}, widths=widths)
    assert broken.name == "broken"
    assert not broken.vectors
    assert broken.fault is not None
    assert broken.fault.startswith("<broken>: broken.safetensors: 'emb_params'")


def test_a_new_file_is_known_a_second_later_without_a_restart(
    tmp_path: Path, models: Mapping[str, ModelFolder], clock: Callable[[float], None]
) -> None:
    usable = ConceptFolder(tmp_path).of(models["sd"])
    assert usable.find("cat") is None
    put(tmp_path, "cat", emb_params=vectors(2, L))
    clock(0.9 * LOOK_S)
    assert usable.find("cat") is None, "the folder is looked at once a second"
    clock(0.2 * LOOK_S)
    found = usable.find("cat")
    assert found is not None
    assert found["text_encoder"].vectors == 2
    assert usable.names() == {"cat"}


def test_a_thousand_questions_are_one_look_and_one_read(
    tmp_path: Path, models: Mapping[str, ModelFolder], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, reads = [], []
    monkeypatch.setattr(concepts.os, "scandir", lambda folder, scan=os.scandir: looks.append(folder) or scan(folder))
    read = concepts.read_concept
    monkeypatch.setattr(concepts, "read_concept", lambda file: reads.append(file) or read(file))
    put(tmp_path, "cat", emb_params=vectors(2, L))
    usable = ConceptFolder(tmp_path).of(models["sd"])
    for _ in range(500):
        usable.find("cat")
        usable.find("nobody")
        usable.names()
    assert (len(looks), len(reads)) == (1, 1)
    clock(LOOK_S)
    usable.find("cat")
    assert (len(looks), len(reads)) == (2, 1), "a file that is as it was is not read again"


def test_a_replaced_file_has_new_vectors_and_the_old_ones_answer_still(
    tmp_path: Path, models: Mapping[str, ModelFolder], clock: Callable[[float], None]
) -> None:
    """An order that was planned before the change is encoded after it."""
    folder = ConceptFolder(tmp_path)
    usable = folder.of(models["sd"])
    digests = []
    for seed in range(REPLACED + 2):
        put(tmp_path, "cat", emb_params=vectors(2, L, seed))
        clock(LOOK_S)
        found = usable.find("cat")
        assert found is not None
        digests.append(found["text_encoder"].digest)
    assert len(set(digests)) == len(digests)
    for seed in range(1, REPLACED + 2):
        assert torch.equal(folder.vectors([digests[seed]]), vectors(2, L, seed))
    with pytest.raises(BackendUnavailable):
        folder.vectors([digests[0]])


def test_a_removed_concept_is_unknown(
    tmp_path: Path, models: Mapping[str, ModelFolder], clock: Callable[[float], None]
) -> None:
    file = put(tmp_path, "cat", emb_params=vectors(2, L))
    usable = ConceptFolder(tmp_path).of(models["sd"])
    assert usable.names() == {"cat"}
    file.unlink()
    clock(LOOK_S)
    assert usable.find("cat") is None
    assert usable.names() == frozenset()


def test_the_table_has_vectors_in_the_order_of_their_digests(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    put(tmp_path, "one", emb_params=vectors(1, L, 1))
    put(tmp_path, "two", emb_params=vectors(2, L, 2))
    folder = ConceptFolder(tmp_path)
    refs = [folder.of(models["sd"]).find(name) for name in ("two", "one")]
    table = folder.vectors([ref["text_encoder"].digest for ref in refs if ref])
    assert torch.equal(table, torch.cat([vectors(2, L, 2), vectors(1, L, 1)]))
    assert table.dtype == torch.float32


def test_an_encoder_looks_at_once_for_what_a_planner_has_seen(
    tmp_path: Path, models: Mapping[str, ModelFolder], clock: Callable[[float], None]
) -> None:
    encoder, planner = ConceptFolder(tmp_path), ConceptFolder(tmp_path)
    encoder.look()
    put(tmp_path, "cat", emb_params=vectors(2, L))
    found = planner.of(models["sd"]).find("cat")
    assert found is not None
    assert torch.equal(encoder.vectors([found["text_encoder"].digest]), vectors(2, L))
    with pytest.raises(BackendUnavailable, match="gone, or has not come") as raised:
        encoder.vectors(["0" * 40])
    assert raised.value.retry_after_s


@pytest.mark.parametrize(
    ("model", "keys", "roles"),
    [
        ("sd", {"emb_params"}, {"text_encoder": L}),
        ("sdxl", {"clip_l", "clip_g"}, {"text_encoder": L, "text_encoder_2": G}),
    ],
)
def test_what_is_written_is_read_again(
    tmp_path: Path, models: Mapping[str, ModelFolder], model: str, keys: set[str], roles: dict[str, int]
) -> None:
    wanted = {role: vectors(3, width, width) for role, width in roles.items()}
    file = tmp_path / "new" / "cat.safetensors"
    write_concept(file, models[model], wanted, {"init": "a\ncat"})
    placed = fit("cat", read_concept(file), models[model])
    assert {role: each.values.tolist() for role, each in placed.items()} == {
        role: each.tolist() for role, each in wanted.items()
    }
    assert {each.name for each in file.parent.iterdir()} == {"cat.safetensors"}
    header = file.read_bytes()
    assert all(key.encode() in header for key in keys)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    file = tmp_path / "cat.safetensors"
    file.mkdir()
    with pytest.raises(OSError):
        write_concept(file, models["sd"], {"text_encoder": vectors(1, L)})
    assert [each.name for each in tmp_path.iterdir()] == ["cat.safetensors"]
