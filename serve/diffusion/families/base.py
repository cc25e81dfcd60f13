"""The contract between the step loop and a model family.

A family knows how its denoiser is called and how it was trained; it knows nothing of requests, samplers' names, what
makes up a batch, or guidance. Everything here is about one replica's device and dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from serve.devices import device_errors
from serve.diffusion.families.load import load_part, load_scheduler, loading
from serve.diffusion.families.speed import remember_signatures
from serve.diffusion.offload import Offload
from serve.diffusion.rungs import check_library, settle
from serve.diffusion.vae import Vae, open_vae
from serve.domain.conditioning import TextEmbedding
from serve.models import ModelFolder
from serve.rungs import Rung
from serve.settings.pools import DiffusionSettings


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Text:
    """What one lane reads beside its latents, on the device and in the dtype of the denoiser.

    `context` is (tokens, width), `pooled` (width,), `time_ids` (5,) or (6,), where the family has them.
    """

    context: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Lane:
    """One entry of the denoiser's batch: an image with one of the texts that its prediction is made of. A guided image
    takes two lanes, a composition more.

    `latents` is (1, latent channels, height, width), scaled as the sampler wants its model input; `timestep` is 0-dim,
    on the CPU, as the sampler lists it. `guidance_scale` is read by families that embed it. `extra` is
    (1, in_channels - latent_channels, height, width): mask and masked image's latents of an inpainting U-Net.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    text: Text
    guidance_scale: float
    extra: torch.Tensor | None = None


class Family(ABC):
    """One model's denoiser and VAE, never a text encoder.

    A family of its own sets the class variables and says how its denoiser is called.

    Owns: the denoiser's weights, and what brings them to the device where they lie elsewhere; the VAE.
    """

    part: ClassVar[str]
    """Folder of the denoiser: `unet` or `transformer`."""
    part_class: ClassVar[Any]
    """diffusers' class of the denoiser."""
    convolutional: ClassVar[bool] = False
    """Whether the denoiser gains from channels-last activations."""
    upcasts_vae: ClassVar[bool] = False
    """Whether the stock pipeline heeds the VAE's `force_upcast`."""
    pads_context: ClassVar[bool]
    """Whether lanes with different numbers of text tokens may share a forward pass, their padding hidden."""

    model: ModelFolder
    device: torch.device
    dtype: torch.dtype
    denoiser: Any
    vae: Vae
    rung: Rung
    """Of the memory ladder. What it means for the denoiser is done by `serve.diffusion.rungs`."""
    offload: Offload | None = None
    packed: tuple[str, ...] = ()
    """What layers of the denoiser have their weights packed to (`serve.quantize.packed`): those of a way down that
    failed too, so that the rung alone does not say it."""
    compiled: bool = False
    scheduler_class: Any
    """Class of the model's own sampler (diffusers' `SchedulerMixin`)."""
    scheduler_config: dict[str, Any]
    """Its configuration, as the stock pipeline mends it."""

    def __init__(
        self,
        model: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        settings: DiffusionSettings,
        rung: Rung = Rung.RESIDENT,
    ) -> None:
        """Raises OperatorError naming `model.source`, `diffusion.tiny_vae` or `diffusion.rung`."""
        check_library(rung)
        self.model = model
        self.device = device
        self.dtype = dtype
        self._channels_last = settings.channels_last or (settings.channels_last is None and self.convolutional)
        denoiser = self.load_denoiser()
        self.scheduler_class, self.scheduler_config = self.load_scheduler()
        with device_errors("the VAE"):
            self.vae = self.load_vae(settings)
        settle(self, denoiser, rung)

    def load_denoiser(self) -> Any:
        """The denoiser of the model's folder, on the CPU. Raises OperatorError naming `model.source`."""
        with loading(self.model.name):
            denoiser = load_part(self.part_class, self.model.path / self.part, self.dtype)
            self.check(denoiser.config)
        remember_signatures(denoiser)
        if self._channels_last:
            denoiser.to(memory_format=torch.channels_last)
        return denoiser

    def load_scheduler(self) -> tuple[Any, dict[str, Any]]:
        """Class and configuration of the model's own sampler. Raises OperatorError naming `model.source`."""
        with loading(self.model.name):
            return load_scheduler(self.model, self.mends())

    def load_vae(self, settings: DiffusionSettings) -> Vae:
        """The model's VAE on the device. Raises OperatorError naming `model.source` or `diffusion.tiny_vae`."""
        return open_vae(self.model, self.device, self.dtype, settings, upcast=self.upcasts_vae)

    def check(self, config: Any) -> None:
        """Raise ValueError where the denoiser's configuration asks for what `predict` does not do."""
        return

    def mends(self) -> Mapping[str, Any]:
        """What the stock pipeline's constructor sets in an old sampler's configuration."""
        return {}

    def text(self, text: TextEmbedding, time_ids: torch.Tensor | None = None) -> Text:
        """The text on the device."""
        pooled, ids = (None if each is None else self.place(each) for each in (text.pooled, time_ids))
        return Text(self.place(text.context), pooled, ids)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, shape: tuple[int, int]) -> None:
        """Have a sampler list its timesteps, on the CPU, as the stock pipeline does for latents of (height, width).

        Families whose schedule depends on the image's size (FLUX, SD 3.5) override this.
        """
        scheduler.set_timesteps(num_inference_steps, device="cpu")

    @abstractmethod
    def predict(self, lanes: Sequence[Lane]) -> torch.Tensor:
        """The denoiser's output for each lane, (lanes, latent channels, height, width), in the denoiser's dtype.

        All latents have one shape, each lane a timestep of its own. Unless `pads_context`, all contexts have one
        length.
        """
