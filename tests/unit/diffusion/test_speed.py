"""Precision by card and family; compiled denoisers in buckets of lanes."""

import inspect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.image_models import BUILDERS, sd_model, sdxl_model
from torch._dynamo.utils import counters

from serve.devices import check_dtype
from serve.diffusion.families import FAMILIES, open_family, speed
from serve.diffusion.families.base import Family, Lane, Text
from serve.diffusion.families.speed import blocks, bucket, bucketed, choose_dtype
from serve.diffusion.synthetic import synthetic_lanes
from serve.errors import OperatorError
from serve.models import check_folder
from serve.models.denoiser import FLOAT16
from serve.settings.pools import DiffusionSettings

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
OTHERS = sorted(FAMILIES.keys() - set(FLOAT16))


def card(monkeypatch: pytest.MonkeyPatch, *has: str) -> None:
    """A GPU that computes in the dtypes `has`: there is none here to ask."""

    def check(device: torch.device, dtype: str, setting: str) -> None:
        if device.type == "cpu":
            check_dtype(device, dtype, setting)
        elif dtype not in has:
            raise OperatorError(f"{setting}: this GPU has no {dtype}", setting)

    # Where the function looks, whatever has become of the module.
    monkeypatch.setitem(choose_dtype.__globals__, "check_dtype", check)


@pytest.mark.parametrize("device", [CUDA, MPS], ids=str)
def test_auto_takes_what_the_family_was_trained_in_where_the_card_has_it(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    card(monkeypatch, "bfloat16", "float16", "float32")
    assert {choose_dtype(device, "auto", (), family) for family in FLOAT16} == {torch.float16}
    assert {choose_dtype(device, "auto", (), family) for family in OTHERS} == {torch.bfloat16}
    card(monkeypatch, "float16", "float32")  # Turing
    assert {choose_dtype(device, "auto", (), family) for family in FAMILIES} == {torch.float16}


def test_auto_takes_the_familys_own_of_the_gpu_class_or_else_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "bfloat16", "float16", "float32")
    for family in FAMILIES:
        own = torch.float16 if family in FLOAT16 else torch.bfloat16
        assert choose_dtype(CUDA, "auto", ("float32", "bfloat16", "float16"), family) is own
        assert choose_dtype(CUDA, "auto", ("float32",), family) is torch.float32
        assert choose_dtype(CUDA, "auto", ("bfloat16",), family) is torch.bfloat16
    card(monkeypatch, "float16", "float32")
    with pytest.raises(OperatorError, match="no bfloat16") as raised:
        choose_dtype(CUDA, "auto", ("bfloat16", "float16"), "flux")
    assert raised.value.param == "gpu_classes"


def test_a_cpu_computes_in_float32_whatever_the_class_says() -> None:
    for family in FAMILIES:
        assert choose_dtype(CPU, "auto", ("bfloat16",), family) is torch.float32


def test_what_is_named_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype(CPU, "bfloat16", ("float16",), "sd") is torch.bfloat16
    card(monkeypatch, "float16", "float32")
    assert choose_dtype(CUDA, "float32", ("float16",), "sd") is torch.float32
    with pytest.raises(OperatorError) as raised:
        choose_dtype(CUDA, "bfloat16", ("float16",), "flux")
    assert raised.value.param == "diffusion.dtype"


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(lanes) for lanes in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def make_lanes(family: Family, count: int, shape: tuple[int, int] = (6, 8), tokens: int = 77) -> list[Lane]:
    config, generator = family.denoiser.config, torch.Generator().manual_seed(count)
    sdxl = config.addition_embed_type is not None
    return [
        Lane(
            latents=torch.randn(1, 4, *shape, generator=generator),
            timestep=torch.tensor(900 - 100 * index),
            text=Text(
                torch.randn(tokens, config.cross_attention_dim, generator=generator),
                torch.randn(28, generator=generator) if sdxl else None,
                torch.arange(6.0) * 32 if sdxl else None,
            ),
            guidance_scale=5.0,
        )
        for index in range(count)
    ]


def test_a_bucket_is_filled_with_the_last_lane_and_cut_off_again(tmp_path: Path) -> None:
    family = open_family(check_folder(sd_model(tmp_path / "sd"), "sd"), CPU, torch.float32, DiffusionSettings())
    seen: list[Sequence[Lane]] = []

    def predict(lanes: Sequence[Lane]) -> torch.Tensor:
        seen.append(lanes)
        return family.predict(lanes)

    for count in range(1, 6):
        lanes = make_lanes(family, count)
        with torch.inference_mode():
            found, expected = bucketed(predict)(lanes), family.predict(lanes)
        assert list(seen[-1]) == lanes + [lanes[-1]] * (bucket(count) - count)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd", {"BasicTransformerBlock": 4}),
        ("sd3", {"JointTransformerBlock": 3}),
        ("flux", {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 2}),
        ("pixart", {"BasicTransformerBlock": 3}),
        ("auraflow", {"AuraFlowJointTransformerBlock": 2, "AuraFlowSingleTransformerBlock": 2}),
    ],
)
def test_the_blocks_of_every_kind_of_denoiser_are_found(tmp_path: Path, family: str, expected: dict[str, int]) -> None:
    model = check_folder(BUILDERS[family](tmp_path / "model"), family)
    denoiser = open_family(model, CPU, torch.float32, DiffusionSettings()).denoiser
    names = [type(block).__name__ for block in blocks(denoiser)]
    assert {name: names.count(name) for name in names} == expected


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph and no compiled code from earlier tests, and none left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@torch.inference_mode()
def predict(family: Family, lanes: Sequence[Lane]) -> torch.Tensor:
    return family.predict(lanes)


def test_attention_finds_what_its_processor_takes_ready_made(tmp_path: Path) -> None:
    family = open_family(check_folder(sd_model(tmp_path / "sd"), "sd"), CPU, torch.float32, DiffusionSettings())
    for processor in family.denoiser.attn_processors.values():
        call = type(processor).__call__
        assert call.__signature__ == inspect.signature(call)
        assert list(inspect.signature(processor.__call__).parameters)[:2] == ["attn", "hidden_states"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_predictions_equal_eager_ones_and_batches_share_buckets(tmp_path: Path) -> None:
    model = check_folder(sd_model(tmp_path / "sd"), "sd")
    eager = open_family(model, CPU, torch.float32, DiffusionSettings())
    compiled = open_family(model, CPU, torch.float32, DiffusionSettings(compile=True))
    before, built = graphs(), []
    with ThreadPoolExecutor(1) as thread:  # steps are not made in the thread that loads
        for count in (1, 2, 3, 4, 5, 1, 8):
            lanes = make_lanes(compiled, count)
            found = thread.submit(predict, compiled, lanes).result()
            assert torch.allclose(found, predict(eager, lanes), atol=1e-4)
            built.append(graphs() - before)
    assert built == [1, 2, 3, 3, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_compiles(tmp_path: Path, family: str) -> None:
    model = check_folder(BUILDERS[family](tmp_path / "model"), family)
    eager = open_family(model, CPU, torch.float32, DiffusionSettings())
    compiled = open_family(model, CPU, torch.float32, DiffusionSettings(compile=True))
    generator = torch.Generator().manual_seed(1)
    lanes = [
        replace(
            lane,
            latents=torch.randn(lane.latents.shape, generator=generator),
            timestep=torch.tensor(900.0 - 300 * index),
        )
        for index, lane in enumerate(synthetic_lanes(eager, (8, 8), 3))
    ]
    before = graphs()
    found, expected = predict(compiled, lanes), predict(eager, lanes)
    assert graphs() > before
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_limit_on_graphs_holds_in_the_thread_that_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own (8) would leave most sizes uncompiled, and a thread that sets it sets it for itself alone."""
    monkeypatch.setattr(speed, "GRAPHS", 1)
    model = check_folder(sdxl_model(tmp_path / "sdxl"), "sdxl")
    eager = open_family(model, CPU, torch.float32, DiffusionSettings())
    compiled = open_family(model, CPU, torch.float32, DiffusionSettings(compile=True))
    before = graphs()
    with ThreadPoolExecutor(1) as thread:
        for count in (1, 2, 4):
            lanes = make_lanes(compiled, count)
            found = thread.submit(predict, compiled, lanes).result()
            assert torch.allclose(found, predict(eager, lanes), atol=1e-4)
    assert graphs() - before == 1, "what is beyond the limit runs as it is"


@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_compiler_it_names_the_setting(tmp_path: Path) -> None:
    model = check_folder(sd_model(tmp_path / "sd"), "sd")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}),
        pytest.raises(OperatorError, match=r"diffusion.compile: does not work here") as raised,
    ):
        open_family(model, CPU, torch.float32, DiffusionSettings(compile=True))
    assert raised.value.param == "diffusion.compile"
