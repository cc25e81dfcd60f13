"""Pixels <-> latents: what the stock pipelines compute, in the precision that they compute it in; a VAE that overflows
is asked once more in float32, and a picture of not-a-number is nobody's."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from support.image_models import FACTOR, sd_model, sdxl_model, tiny_vae, vae
from support.vaes import CPU, noise, overflowing, pixels_of
from torch.multiprocessing.reductions import StorageWeakRef

from serve.diffusion import vae as vae_module
from serve.diffusion.vae import Vae, open_vae
from serve.errors import GenerationFailed, NotFinite, OperatorError
from serve.models import check_folder
from serve.settings.pools import DiffusionSettings

PLAIN = DiffusionSettings(channels_last=False)
HALF = [torch.float16, torch.bfloat16]
ALL = [torch.float32, *HALF]
IDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd_model(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl_model(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.mark.parametrize("dtype", ALL, ids=IDS)
def test_sd_decodes_in_the_denoisers_dtype(sd: Path, dtype: torch.dtype) -> None:
    """Its stock pipeline does not read `force_upcast`, which every AutoencoderKL has by default."""
    ours = open_vae(check_folder(sd, "sd"), CPU, dtype, PLAIN)
    model = AutoencoderKL.from_pretrained(sd / "vae", torch_dtype=dtype)
    assert model.config.force_upcast
    latents = noise(1, 4, 6, 10, dtype=dtype)
    found = ours.decode(latents)
    with torch.inference_mode():
        expected = model.decode(latents / model.config.scaling_factor, return_dict=False)[0][0]
    assert (found.shape, found.dtype, found.device) == ((3, 6 * FACTOR, 10 * FACTOR), torch.float32, CPU)
    assert torch.equal(found, expected.float())
    assert (ours.scale_factor, ours.retries) == (FACTOR, 0)


@pytest.mark.parametrize("dtype", ALL, ids=IDS)
def test_sdxl_decodes_as_its_stock_pipeline(sdxl: Path, dtype: torch.dtype) -> None:
    """In float32 for float16, whose range is too small for SDXL's VAE; in bfloat16 as it is."""
    ours = open_vae(check_folder(sdxl, "sdxl"), CPU, dtype, PLAIN, upcast=True)
    model = AutoencoderKL.from_pretrained(sdxl / "vae", torch_dtype=dtype)
    latents = noise(1, 4, 6, 10, dtype=dtype)
    found = ours.decode(latents)
    computed = torch.float32 if dtype == torch.float16 else dtype
    with torch.inference_mode():
        latents = latents.to(computed) / model.config.scaling_factor
        expected = model.to(computed).decode(latents, return_dict=False)[0][0]
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", ALL, ids=IDS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_image_is_encoded_as_the_stock_pipeline_does(
    request: pytest.FixtureRequest, family: str, dtype: torch.dtype
) -> None:
    path: Path = request.getfixturevalue(family)
    stock = StableDiffusionImg2ImgPipeline if family == "sd" else StableDiffusionXLImg2ImgPipeline
    pipeline = stock.from_pretrained(path, torch_dtype=dtype, safety_checker=None, feature_extractor=None)
    pixels = pixels_of()
    generator = torch.Generator().manual_seed(11)
    if family == "sd":
        encoded = pipeline.vae.encode(pixels.to(dtype)).latent_dist.sample(generator)
        expected = pipeline.vae.config.scaling_factor * encoded
    else:
        expected = pipeline.prepare_latents(pixels.to(dtype), None, 1, 1, dtype, CPU, generator, add_noise=False)
    ours = open_vae(check_folder(path, family), CPU, dtype, PLAIN, upcast=family == "sdxl")
    found = ours.encode(pixels.to(dtype)).sample(torch.Generator().manual_seed(11))
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    # The same moments serve other images: each draws with its own generator, and the mean draws nothing.
    moments = ours.encode(pixels.to(dtype))
    assert torch.equal(moments.sample(torch.Generator().manual_seed(11)), found)
    assert not torch.equal(moments.sample(torch.Generator().manual_seed(12)), found)
    assert torch.equal(moments.mode(), moments.mode())


def test_a_shift_and_statistics_of_channels_are_undone() -> None:
    """SD 3 and FLUX shift; Playground v2.5 has a mean and a spread for each channel. Both ways are inverse."""
    latents = noise(1, 4, 6, 10)
    mean, std = [0.5, -1.5, 2.0, 0.0], [3.0, 0.5, 7.0, 1.5]
    spread = vae(0, scaling_factor=0.5, latents_mean=mean, latents_std=std).eval()
    shifted = vae(0, scaling_factor=1.5305, shift_factor=0.0609).eval()
    column = torch.tensor(mean).view(1, 4, 1, 1), torch.tensor(std).view(1, 4, 1, 1)
    for model, own in (
        (spread, latents * column[1] / 0.5 + column[0]),
        (shifted, latents / 1.5305 + 0.0609),
    ):
        ours = Vae(model, CPU, torch.float32)
        with torch.inference_mode():
            assert torch.equal(ours.decode(latents), model.decode(own, return_dict=False)[0][0])
            encoded = model.encode(pixels_of()).latent_dist.mode()
        scaled = ours.encode(pixels_of()).mode()
        expected = (encoded - column[0]) * 0.5 / column[1] if model is spread else (encoded - 0.0609) * 1.5305
        assert torch.equal(scaled, expected)


def test_a_float16_overflow_is_decoded_once_more_in_float32() -> None:
    ours = Vae(overflowing(torch.float16), CPU, torch.float16)
    exact = Vae(overflowing(torch.float16).float(), CPU, torch.float32)
    before = {name: tensor.clone() for name, tensor in ours._vae.state_dict().items()}
    latents = noise(1, 4, 6, 10, dtype=torch.float16)
    with torch.inference_mode():  # the runner's own mode must not be caught by the weights
        found = ours.decode(latents)
    assert ours.retries == 1
    assert torch.equal(found, exact.decode(latents.float()))
    after = ours._vae.state_dict()
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.is_inference() for parameter in ours._vae.parameters())
    assert torch.equal(ours.decode(latents), found)
    assert ours.retries == 2


def test_what_the_dtype_holds_is_decoded_once() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        ours = Vae(overflowing(dtype), CPU, dtype)
        assert torch.isfinite(ours.decode(noise(1, 4, 6, 10, dtype=dtype))).all()
        assert ours.retries == 0
    upcast = Vae(overflowing(torch.float16), CPU, torch.float16, upcast=True)
    assert torch.isfinite(upcast.decode(noise(1, 4, 6, 10, dtype=torch.float16))).all()
    assert upcast.retries == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_a_number_fail_at_once(value: float) -> None:
    ours = Vae(overflowing(torch.float16), CPU, torch.float16)
    latents = noise(1, 4, 6, 10, dtype=torch.float16)
    latents[0, 1, 2, 3] = value
    with pytest.raises(NotFinite, match="not-a-number; try other parameters"):
        ours.decode(latents)
    assert ours.retries == 0


@pytest.mark.parametrize(("dtype", "retries"), [(torch.float16, 1), (torch.float32, 0)], ids=IDS)
def test_a_vae_that_is_broken_in_float32_too_fails(dtype: torch.dtype, retries: int) -> None:
    model = vae(0).eval().requires_grad_(False)
    model.decoder.conv_out.bias.data[1] = float("nan")
    ours = Vae(torch.nn.Module.to(model, dtype), CPU, dtype)
    with pytest.raises(NotFinite, match="not-a-number; try other parameters"):
        ours.decode(noise(1, 4, 6, 10, dtype=dtype))
    assert ours.retries == retries
    assert ours._vae.dtype == dtype


def test_calls_from_several_threads_take_turns() -> None:
    """A decoding that has the weights in float32 is never met by another that counts on float16."""
    ours = Vae(overflowing(torch.float16), CPU, torch.float16)
    latents = [noise(1, 4, 6, 10, dtype=torch.float16, seed=seed) for seed in range(8)]
    decoded = [ours.decode(each) for each in latents]
    encoded = ours.encode(pixels_of().half()).mode()
    with ThreadPoolExecutor(4) as threads:
        encodings = [threads.submit(lambda: ours.encode(pixels_of().half()).mode()) for _ in range(8)]
        decodings = [threads.submit(ours.decode, each) for each in latents]
        assert all(torch.equal(each.result(), encoded) for each in encodings)
        assert all(torch.equal(each.result(), expected) for each, expected in zip(decodings, decoded, strict=True))


def test_a_batch_is_refused() -> None:
    ours = Vae(vae(0).eval(), CPU, torch.float32)
    with pytest.raises(AssertionError, match="one image at a time"):
        ours.decode(noise(2, 4, 6, 10))
    with pytest.raises(AssertionError, match="one image at a time"):
        ours.encode(noise(2, 3, 24, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS)
def test_a_small_vae_is_read_as_the_stock_pipeline_reads_one(sd: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_vae(tmp_path / "tiny")
    settings = DiffusionSettings(tiny_vae=str(folder), channels_last=False)
    ours = open_vae(check_folder(sd, "sd"), CPU, dtype, settings)
    stock = AutoencoderTiny.from_pretrained(folder, torch_dtype=dtype)
    latents = noise(1, 4, 6, 10, dtype=dtype)
    with torch.inference_mode():
        expected = stock.decode(latents / stock.config.scaling_factor, return_dict=False)[0][0]
    assert ours.has_tiny
    assert torch.equal(ours.decode(latents, tiny=True), expected.float())
    exact = open_vae(check_folder(sd, "sd"), CPU, dtype, PLAIN)
    assert not exact.has_tiny
    assert torch.equal(ours.decode(latents), exact.decode(latents))
    with pytest.raises(GenerationFailed, match="no small VAE"):
        exact.decode(latents, tiny=True)


def test_a_small_vae_that_does_not_fit_is_refused_at_start(sd: Path, tmp_path: Path) -> None:
    model = check_folder(sd, "sd")
    deep = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    deep.save_pretrained(tmp_path / "deep")
    (tmp_path / "empty").mkdir()
    for folder, reason in (
        (tiny_vae(tmp_path / "wide", latent_channels=16), "latents of 16 channels, the model's have 4"),
        (tmp_path / "deep", "makes 8 pixels of a latent, the model's VAE 4"),
        (tmp_path / "empty", "can't be loaded"),
        (tmp_path / "nowhere", "can't be loaded"),
        (sd / "vae", "can't be loaded"),
    ):
        with pytest.raises(OperatorError, match=reason) as raised:
            open_vae(model, CPU, torch.float32, DiffusionSettings(tiny_vae=str(folder)))
        assert raised.value.param == "diffusion.tiny_vae"
        assert "\n" not in raised.value.message


def test_channels_last_is_the_default_and_changes_nothing_but_the_layout(sd: Path) -> None:
    model = check_folder(sd, "sd")
    laid = open_vae(model, CPU, torch.float32, DiffusionSettings())
    assert laid._vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    latents = noise(1, 4, 6, 10)
    assert torch.allclose(laid.decode(latents), open_vae(model, CPU, torch.float32, PLAIN).decode(latents), atol=1e-5)


def test_weights_that_are_replaced_outlive_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory may be another stream's to give away: it is held until the device has copied them."""
    ours = Vae(overflowing(torch.float16), CPU, torch.float16)
    held: list[list[bool]] = []

    def weights() -> list[StorageWeakRef]:
        return [StorageWeakRef(each.untyped_storage()) for each in ours._vae.parameters()]

    before, wait = weights(), vae_module._wait
    monkeypatch.setattr(
        vae_module, "_wait", lambda device: (held.append([not each.expired() for each in before]), wait(device))
    )
    with vae_module._computing(ours._vae, torch.float32, torch.float16):
        assert [all(each) for each in held] == [True], "the device is waited for while they are held"
        assert all(each.expired() for each in before), "and then they go"
        before = weights()
        held.clear()
    assert [all(each) for each in held] == [True]
    assert all(each.expired() for each in before)


class Failing(torch.nn.Module):
    """Runs out of memory: `forward` with an activation in its frame, or a cast, so often."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.casts = 0
        self.held: list[weakref.ref[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.forwards:
            self.forwards -= 1
            activation = x.clone()
            self.held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("none left")
        found: torch.Tensor = self.model(x)
        return found

    def _apply(self, fn: object, recurse: bool = True) -> torch.nn.Module:
        if self.casts == 1:
            self.casts = 0
            raise torch.OutOfMemoryError("none left")
        self.casts = max(0, self.casts - 1)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


def failing_vae() -> tuple[Vae, Failing]:
    """One that overflows in float16 as it is decoded, and fails in its last layer."""
    model = overflowing(torch.float16)
    last = model.decoder.conv_out = Failing(model.decoder.conv_out)
    return Vae(model, CPU, torch.float16), last


def test_weights_that_had_no_memory_to_come_back_come_back_with_the_next_call() -> None:
    """Half of them in float32 is a VAE that can compute nothing, but says that it is in float16."""
    ours, last = failing_vae()
    latents = noise(1, 4, 6, 10, dtype=torch.float16)
    expected = ours.decode(latents)
    last.casts = 2  # to float32, and the way back
    with pytest.raises(torch.OutOfMemoryError):
        ours.decode(latents)
    assert {each.dtype for each in ours._vae.parameters()} == {torch.float16, torch.float32}
    assert torch.equal(ours.decode(latents), expected)
    assert {each.dtype for each in ours._vae.parameters()} == {torch.float16}


def test_activations_are_let_go_before_the_weights_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, last = failing_vae()
    last.forwards, alive, cast = 1, [], vae_module._cast
    ours._decode_dtype = torch.float32
    vae_module._cast(ours._vae, torch.float16)
    ours._decode_dtype = torch.float16
    monkeypatch.setattr(
        vae_module,
        "_cast",
        lambda vae, dtype: (alive.extend(each() is not None for each in last.held), cast(vae, dtype)),
    )
    with pytest.raises(torch.OutOfMemoryError):
        ours._decode(ours._vae, noise(1, 4, 6, 10, dtype=torch.float16), torch.float32)
    assert alive == [False]


@pytest.mark.usefixtures("quick_gc")
def test_a_vae_that_can_not_leave_the_card_stays_as_it_was(sd: Path, tmp_path: Path) -> None:
    settings = DiffusionSettings(tiny_vae=str(tiny_vae(tmp_path / "tiny")), channels_last=False)
    ours = open_vae(check_folder(sd, "sd"), CPU, torch.float16, settings)
    latents = noise(1, 4, 6, 10, dtype=torch.float16)
    expected = [ours.decode(latents, tiny=tiny) for tiny in (False, True)]
    part = ours._tiny.decoder.layers
    part[-1] = Failing(part[-1])
    for casts in (1, 2):  # as it moves, and as it changes its precision
        part[-1].casts = casts
        with pytest.raises(torch.OutOfMemoryError):
            ours.leave_card()
        assert {each.dtype for each in (*ours._vae.parameters(), *ours._tiny.parameters())} == {torch.float16}
        assert all(torch.equal(ours.decode(latents, tiny=tiny), expected[tiny]) for tiny in (False, True))
    ours.leave_card()
    assert {each.dtype for each in (*ours._vae.parameters(), *ours._tiny.parameters())} == {torch.float32}


def test_many_encodings_change_the_precision_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Vae(overflowing(torch.float16), CPU, torch.float16, upcast=False)
    ours._encode_dtype = torch.float32
    casts: list[torch.dtype] = []
    cast = vae_module._cast
    monkeypatch.setattr(vae_module, "_cast", lambda vae, dtype: (casts.append(dtype), cast(vae, dtype))[1])
    pictures = [pixels_of(24, 40), pixels_of(40, 24)]
    found = ours.encodings(pictures)
    assert casts == [torch.float32, torch.float16]
    assert all(
        torch.equal(each.mode(), ours.encode(picture).mode()) for each, picture in zip(found, pictures, strict=True)
    )
