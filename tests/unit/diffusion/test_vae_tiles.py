"""Large images through a VAE: in tiles that need no more memory than a smaller image, as diffusers makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from support.image_models import FACTOR, tiny_vae, vae
from support.vaes import CPU, noise, overflowing, pixels_of

from serve.diffusion.vae import TILE, Vae


def sides(monkeypatch: pytest.MonkeyPatch, ours: Vae, part: str = "decoder") -> list[tuple[int, int]]:
    """What the decoder or encoder is given from now on, in pixels of the image."""
    seen: list[tuple[int, int]] = []
    module = getattr(ours._vae, part)
    forward, factor = module.forward, FACTOR if part == "decoder" else 1

    def spied(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append((tensor.shape[2] * factor, tensor.shape[3] * factor))
        found: torch.Tensor = forward(tensor, *arguments)
        return found

    monkeypatch.setattr(module, "forward", spied)
    return seen


@pytest.mark.parametrize(("height", "width"), [(96, 64), (160, 160), (64, 68), (260, 40)])
def test_a_large_image_is_tiled_as_diffusers_tiles(monkeypatch: pytest.MonkeyPatch, height: int, width: int) -> None:
    ours, stock = Vae(vae(0).eval(), CPU, torch.float32), vae(0).eval()
    ours.tile = 64
    stock.enable_tiling()
    stock.tile_sample_min_size, stock.tile_latent_min_size = 64, 64 // FACTOR
    latents, pixels = noise(1, 4, height // FACTOR, width // FACTOR), pixels_of(height, width)
    decoded, encoded = sides(monkeypatch, ours), sides(monkeypatch, ours, "encoder")
    with torch.inference_mode():
        expected = stock.decode(latents / stock.config.scaling_factor, return_dict=False)[0][0]
        assert torch.equal(ours.decode(latents), expected)
        assert torch.equal(
            ours.encode(pixels).mode(), stock.encode(pixels).latent_dist.mode() * stock.config.scaling_factor
        )
    for seen in (decoded, encoded):
        assert len(seen) > 1
        assert all(max(tile) <= 64 for tile in seen), "no tile needs more memory than an image that is not tiled"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 128), (16, 256)])
def test_an_image_of_no_more_pixels_than_a_tile_is_computed_whole(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    ours = Vae(vae(0).eval(), CPU, torch.float32)
    ours.tile = 64
    decoded, encoded = sides(monkeypatch, ours), sides(monkeypatch, ours, "encoder")
    latents = noise(1, 4, height // FACTOR, width // FACTOR)
    ours.decode(latents)
    ours.encode(pixels_of(height, width))
    assert decoded == encoded == [(height, width)]
    decoded.clear()
    ours.decode(latents, side=32)
    assert len(decoded) > 1
    assert all(max(tile) <= 32 for tile in decoded), "after running out of memory, a quarter of it"
    decoded.clear()
    ours.decode(latents)
    assert decoded == [(height, width)], "the next image is none the wiser"


@pytest.mark.parametrize(
    ("tile", "size", "side", "differs"),
    [
        (1024, (1024, 1024), None, False),
        (1024, (2048, 2048), None, False),
        (512, (512, 512), None, False),
        (512, (512, 513), None, True),
        (512, (2048, 128), None, False),
        (512, (2048, 256), None, True),
        (1024, (1024, 1024), 512, True),
        (1024, (512, 512), 512, False),
    ],
)
def test_an_image_differs_where_its_tiles_are_smaller_than_the_models(
    tile: int, size: tuple[int, int], side: int | None, differs: bool
) -> None:
    ours = Vae(vae(0).eval(), CPU, torch.float32)
    assert ours.tile == TILE == 1024
    ours.tile = tile
    assert ours.differs(*size, side=side) is differs


def test_a_plan_may_have_larger_images_in_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Vae(vae(0).eval(), CPU, torch.float32)
    ours.tile, ours.tile_of = 64, lambda pixels: 64 if pixels <= 64 * 64 else 32
    decoded = sides(monkeypatch, ours)
    ours.decode(noise(1, 4, 64 // FACTOR, 64 // FACTOR))
    assert decoded == [(64, 64)]
    decoded.clear()
    ours.decode(noise(1, 4, 96 // FACTOR, 64 // FACTOR))
    assert max(max(tile) for tile in decoded) == 32
    ours.tile = 16  # a lower rung's, which the plan did not know
    decoded.clear()
    ours.decode(noise(1, 4, 64 // FACTOR, 64 // FACTOR))
    assert max(max(tile) for tile in decoded) == 16


def test_tiles_hardly_show_and_a_small_vae_has_them_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = AutoencoderTiny.from_pretrained(tiny_vae(tmp_path / "tiny")).eval()
    ours = Vae(vae(0).eval(), CPU, torch.float32, tiny=tiny)
    ours.tile = 128
    latents = noise(1, 4, 48, 48)
    calls = []
    decode = tiny._tiled_decode
    monkeypatch.setattr(tiny, "_tiled_decode", lambda z: calls.append(z.shape) or decode(z))
    tiled = ours.decode(latents, tiny=True)
    assert len(calls) == 1
    ours.tile = 1024
    whole = ours.decode(latents, tiny=True)
    assert len(calls) == 1
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


def test_an_overflow_in_tiles_is_decoded_once_more_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Vae(overflowing(torch.float16), CPU, torch.float16)
    exact = Vae(overflowing(torch.float16).float(), CPU, torch.float32)
    ours.tile = exact.tile = 32
    latents = noise(1, 4, 12, 10, dtype=torch.float16)
    seen = sides(monkeypatch, ours)
    assert torch.equal(ours.decode(latents), exact.decode(latents.float()))
    assert ours.retries == 1
    assert all(max(tile) <= 32 for tile in seen)
