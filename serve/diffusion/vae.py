"""Pixels <-> latents. Nothing here touches the denoiser, so it may run beside a step, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from serve.devices import undoing
from serve.diffusion.families.load import load_part, loading
from serve.errors import GenerationFailed, NotFinite, OperatorError
from serve.models import ModelFolder
from serve.settings.pools import DiffusionSettings

log = logging.getLogger(__name__)

TINY = "diffusion.tiny_vae"
TILE = 1024
"""Side of a tile in pixels, where there is memory for it. Images of no more pixels than a tile has are encoded and
decoded whole."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """A VAE's own latents z <-> those that the denoiser reads: (z - mean) * factor / std."""

    factor: float
    mean: torch.Tensor | float = 0.0
    std: torch.Tensor | float = 1.0

    @classmethod
    def of(cls, vae: Any) -> Scaling:
        """`scaling_factor` with `shift_factor` (SD 3, FLUX), or with a mean and a std of each channel (Playground)."""
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return cls(config.scaling_factor, config.get("shift_factor") or 0.0)
        return cls(config.scaling_factor, *(torch.tensor(each).view(1, -1, 1, 1) for each in (mean, std)))

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._like(latents)
        scaled: torch.Tensor = (latents - mean) * self.factor / std
        return scaled

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._like(latents)
        unscaled: torch.Tensor = latents * std / self.factor + mean
        return unscaled

    def _like(self, latents: torch.Tensor) -> list[Any]:
        return [each.to(latents) if isinstance(each, torch.Tensor) else each for each in (self.mean, self.std)]


class Vae:
    """Owns: the VAE's weights on the device, and a small VAE's (TAESD) where the placement has one.

    Latents outside of this class are scaled as the denoiser reads them. One image at a time: a batch would multiply
    the memory of a decoder, whose activations are the largest of all, and decoders gain nothing from it. Images of
    more than `tile` x `tile` pixels are computed in overlapping tiles of that side, as diffusers does, so that no image
    needs more memory than a tile. `tile` is TILE, or less where memory is short; what is set holds for the next image.
    `tile_of` may have a plan say it for an image of so many pixels, where that is less (`Plan.tile_of`).

    `retries` counts the decodings that had to be made again in float32. Thread-safe: calls take turns.
    """

    def __init__(self, vae: Any, device: torch.device, dtype: torch.dtype, *, tiny: Any = None, upcast: bool = False):
        """`upcast`: compute in float32 where the VAE's `force_upcast` says so, as SDXL's stock pipelines do."""
        self.scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.retries = 0
        self.tile = TILE
        self.tile_of: Callable[[int], int] | None = None
        self._device = self._latents = device
        self._dtype = self._tiny_dtype = dtype
        upcast = upcast and bool(vae.config.force_upcast)
        # SDXL's VAE overflows in float16; bfloat16 has the range, but stock encodes in float32 there too.
        self._encode_dtype = torch.float32 if upcast else dtype
        self._decode_dtype = torch.float32 if upcast and dtype == torch.float16 else dtype
        self._vae = _cast(vae.to(device), self._decode_dtype)
        self._tiny = None if tiny is None else _cast(tiny.to(device), dtype)
        if tiny is not None:
            tiny.spatial_scale_factor = self.scale_factor  # diffusers puts 8 there, which its tiles go by
        self._scaling = Scaling.of(vae)
        self._lock = threading.Lock()

    @property
    def has_tiny(self) -> bool:
        return self._tiny is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(each.nbytes for vae in (self._vae, self._tiny) if vae is not None for each in vae.parameters())

    def encode(self, pixels: torch.Tensor, *, side: int | None = None) -> Moments:
        """The distribution of the latents of (1, 3, H, W) pixels in [-1, 1]. `side` is as in `decode`."""
        return self.encodings([pixels], side=side)[0]

    def encodings(self, pictures: Iterable[torch.Tensor], *, side: int | None = None) -> list[Moments]:
        """As `encode`, one by one; the weights change their precision once for all."""
        encoded = []
        resting = self._decode_dtype
        with self._lock, _computing(self._vae, self._encode_dtype, resting), torch.inference_mode():
            for pixels in pictures:
                _one(pixels)
                with _tiling(self._vae, side or self._tile(*pixels.shape[2:]), self.scale_factor):
                    encoded.append(self._vae.encode(pixels.to(self._device, self._encode_dtype)).latent_dist)
            _wait(self._device)
        return [Moments(moments, self._scaling, self._latents, self._dtype) for moments in encoded]

    def decode(self, latents: torch.Tensor, *, tiny: bool = False, side: int | None = None) -> torch.Tensor:
        """Pixels (3, H, W) of latents (1, C, h, w): float32, on the CPU, nominally in [-1, 1].

        `side` asks for tiles of so many pixels a side, whatever the image's size: for one that ran out of memory.
        Pixels that are not finite are decoded once more in float32. Raises NotFinite where they still are not: never a
        black image.
        """
        _one(latents)
        vae, dtype = (self._tiny, self._tiny_dtype) if tiny else (self._vae, self._decode_dtype)
        if vae is None:
            raise GenerationFailed("this server has no small VAE")
        side = side or self._tile(*(each * self.scale_factor for each in latents.shape[2:]))
        with self._lock, _tiling(vae, side, self.scale_factor):
            pixels = self._decode(vae, latents, dtype)
            if not _finite(pixels) and dtype != torch.float32 and _finite(latents):
                self.retries += 1
                log.warning("an image overflowed the VAE's %s and is decoded once more in float32", dtype)
                pixels = self._decode(vae, latents, torch.float32)
        if not _finite(pixels):
            raise NotFinite("the image came out as not-a-number; try other parameters")
        return pixels

    def _decode(self, vae: Any, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        own = vae is self._vae
        scaling, resting = (self._scaling, self._decode_dtype) if own else (Scaling.of(vae), self._tiny_dtype)
        with _computing(vae, dtype, resting), torch.inference_mode():
            latents = scaling.unscale(latents.to(self._device, dtype))
            pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0][0]
            return pixels.float().cpu()

    def differs(self, height: int, width: int, *, side: int | None = None) -> bool:
        """Whether `decode` gives an image of so many pixels other tones than in tiles of TILE, or whole where it has no
        more pixels than such a tile."""
        side = side or self._tile(height, width)
        return side is not None and side < TILE and max(height, width) > side

    def leave_card(self) -> None:
        """Compute on the CPU from now on, in float32 instead of float16. Latents come and go as before."""
        with self._lock, undoing(self._lay, "the VAE"):
            device, upcast = torch.device("cpu"), self._dtype == torch.float16
            for vae, dtype in self._parts():
                torch.nn.Module.to(vae, device)
                _cast(vae, torch.float32 if upcast else dtype)
            self._device = device
            if upcast:
                self._encode_dtype = self._decode_dtype = self._tiny_dtype = torch.float32

    def _parts(self) -> list[tuple[Any, torch.dtype]]:
        """The VAEs, each with the precision that its weights lie in."""
        own = [(self._vae, self._decode_dtype)]
        return own if self._tiny is None else [*own, (self._tiny, self._tiny_dtype)]

    def _lay(self) -> None:
        for vae, dtype in self._parts():
            torch.nn.Module.to(vae, self._device)
            _cast(vae, dtype)

    def _tile(self, height: int, width: int) -> int | None:
        """The side of the tiles for an image of so many pixels, None where it is computed whole."""
        pixels = height * width
        side = self.tile if self.tile_of is None else min(self.tile, self.tile_of(pixels))
        return side if pixels > side**2 else None


class Moments:
    """Latents before they are drawn: a diagonal Gaussian (Kingma & Welling 2013)."""

    def __init__(self, distribution: Any, scaling: Scaling, device: torch.device, dtype: torch.dtype) -> None:
        self._distribution = distribution
        self._scaling = scaling
        self._device = device
        self._dtype = dtype

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Latents (1, C, h, w), scaled; the noise is drawn from a CPU generator as diffusers does."""
        return self._finish(self._distribution.sample(generator))

    def mode(self) -> torch.Tensor:
        """Their mean, scaled."""
        return self._finish(self._distribution.mode())

    def _finish(self, latents: torch.Tensor) -> torch.Tensor:
        return self._scaling.scale(latents.to(self._device, self._dtype))


def open_vae(
    model: ModelFolder, device: torch.device, dtype: torch.dtype, settings: DiffusionSettings, *, upcast: bool = False
) -> Vae:
    """The model's VAE, and the small one of the settings.

    Raises OperatorError naming `model.source` or `diffusion.tiny_vae`.
    """
    with loading(model.name):
        vae = load_part(AutoencoderKL, model.path / "vae", dtype)
    tiny = None
    if settings.tiny_vae is not None:
        folder = Path(settings.tiny_vae).expanduser()
        with loading(str(folder), TINY):
            tiny = load_part(AutoencoderTiny, folder, dtype)
        _check_tiny(tiny, vae, folder)
    if settings.channels_last is not False:
        for part in (vae, tiny):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    return Vae(vae, device, dtype, tiny=tiny, upcast=upcast)


def _check_tiny(tiny: Any, vae: Any, folder: Path) -> None:
    channels = vae.config.latent_channels
    if tiny.config.latent_channels != channels:
        found = tiny.config.latent_channels
        raise OperatorError(f"{TINY}: {folder} reads latents of {found} channels, the model's have {channels}", TINY)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    # By what it does: the configuration of an AutoencoderTiny has no such number.
    weight = next(tiny.parameters())
    with torch.inference_mode():
        side = tiny.decode(torch.zeros(1, channels, 2, 2).to(weight), return_dict=False)[0].shape[-1] // 2
    if side != factor:
        raise OperatorError(f"{TINY}: {folder} makes {side} pixels of a latent, the model's VAE {factor}", TINY)


@contextmanager
def _computing(vae: Any, dtype: torch.dtype, resting: torch.dtype) -> Iterator[None]:
    """The VAE in `dtype`, and after it in `resting`: half-precision weights come back from float32 exactly.

    In place, so that no second copy stays in memory. Where there is no memory to come back, some weights stay as they
    were computed with, and the next call brings them along. Only under the VAE's lock.
    """
    try:
        if not _all_in(vae, dtype):
            _cast(vae, dtype)
        yield
    except BaseException as error:
        _wait(vae.device)
        traceback.clear_frames(error.__traceback__)  # the activations: coming back takes memory that they have
        raise
    finally:
        if not _all_in(vae, resting):
            _cast(vae, resting)


def _all_in(vae: Any, dtype: torch.dtype) -> bool:
    return all(tensor.dtype == dtype for tensor in vae.parameters())


@contextmanager
def _tiling(vae: Any, side: int | None, factor: int) -> Iterator[None]:
    """The VAE computing in tiles of so many pixels a side, and after it as it was. Only under the VAE's lock."""
    if side is None:
        yield
        return
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // factor
    vae.use_tiling = True
    try:
        yield
    finally:
        vae.use_tiling = False


def _cast(vae: Any, dtype: torch.dtype) -> Any:
    # What is replaced may have been allocated on another stream, which would give its memory away at once, while this
    # stream's copy of it is still queued: so it is held until the device has made the copies.
    replaced = [tensor.data for tensor in (*vae.parameters(), *vae.buffers())]
    # Parameters made in inference mode could never leave it; and diffusers' own `to` warns of every cast.
    with torch.inference_mode(False):
        cast = torch.nn.Module.to(vae, dtype)
    _wait(vae.device)
    del replaced
    return cast


def _wait(device: torch.device) -> None:
    """Until the device is done: another thread's stream may read the tensors next."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _one(images: torch.Tensor) -> None:
    assert images.shape[0] == 1, "one image at a time"
