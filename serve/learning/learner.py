"""The learning itself: noise on the pictures, the frozen denoiser's guess at it, and one step of the vectors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from serve.devices import check_dtype, claim_device, device_errors, use_threads
from serve.diffusion.families import open_family
from serve.diffusion.families.base import Family, Lane, Text
from serve.errors import GenerationFailed, OperatorError
from serve.learning.examples import Example
from serve.learning.preview import draw
from serve.learning.words import Words
from serve.models import ModelFolder
from serve.prompts.families import time_ids
from serve.settings.pools import DiffusionSettings

FAMILIES = {"sd": "Stable Diffusion 1.x and 2.x", "sdxl": "Stable Diffusion XL"}
PREDICTIONS = ("epsilon", "v_prediction")
RATE = 0.15
"""Learning rate where none is named, as a share of the spread of the vocabulary's values."""
BETAS = (0.9, 0.99)
WARMUP_STEPS = 10
PROBES = 32
AVERAGED = 0.98
"""Share of the running mean of the vectors that is kept at each step. The mean is what is saved: single steps are as
noisy as the noise that they learn from."""
_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How to learn. `rate` None takes RATE times the spread of the vocabulary. The rest is what `Words` takes."""

    steps: int
    batch: int
    seed: int
    rate: float | None = None
    init: str = ""
    vectors: int | None = None


class Learner:
    """Owns: the frozen model on its device, the latents of the pictures, the vectors and their optimizer.

    Everything is drawn from the seed: on one device, the same wishes give the same vectors.
    """

    def __init__(
        self, model: ModelFolder, examples: Sequence[Example], wishes: Wishes, settings: DiffusionSettings
    ) -> None:
        """Raises OperatorError naming what is wrong with the wishes, the captions, the settings or the model."""
        check_model(model)
        self._wishes = wishes
        self._generator = torch.Generator().manual_seed(wishes.seed)
        self._random = random.Random(wishes.seed)
        self.family = _open(model, settings)
        self.words = Words(model, self.family.device, wishes.init, wishes.vectors, self._generator)
        self._captions = [example.captions for example in examples]
        for caption in dict.fromkeys(caption for each in self._captions for caption in each):
            self.words.check(caption)
        self._pictures = self.family.vae.encodings(_pixels(example.image) for example in examples)
        self._process = Process(self.family)
        self._rate = RATE * self.words.spread if wishes.rate is None else wishes.rate
        self._adam = torch.optim.AdamW(self.words.vectors.values(), self._rate, betas=BETAS, weight_decay=0.0)
        self._mean = {role: vectors.detach().clone() for role, vectors in self.words.vectors.items()}
        self._queue: list[int] = []
        self.done = 0

    @property
    def rate(self) -> float:
        """The largest learning rate."""
        return self._rate

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """What has been learned so far, by role: float32 on the CPU."""
        return {role: mean.detach().cpu().clone() for role, mean in self._mean.items()}

    def losses(self) -> Iterator[float]:
        """Make the steps, one at a time; the loss of each. Raises OutOfMemory, DeviceLost, GenerationFailed; what was
        learned before stays."""
        while self.done < self._wishes.steps:
            with device_errors("learning"):
                yield self._step()

    def draw(self, caption: str, seed: int) -> Image.Image:
        """The caption as the model draws it by now, at the size, steps and guidance that it is made for."""
        self.words.check(caption)
        with device_errors("the preview"):
            return draw(self.family, self.words, self._mean, caption, seed)

    @torch.no_grad()
    def probe(self) -> float:
        """The loss of what has been learned so far over PROBES draws, which are always the same ones: what is told of
        the way, for the steps' own losses depend on their noise above all."""
        generator, chance = torch.Generator().manual_seed(self._wishes.seed), random.Random(self._wishes.seed)
        losses = []
        with device_errors("learning"):
            for first in range(0, PROBES, self._wishes.batch):
                chosen = [at % len(self._pictures) for at in range(first, min(PROBES, first + self._wishes.batch))]
                losses.append(float(self._loss(chosen, self._mean, generator, chance)) * len(chosen))
        return sum(losses) / PROBES

    def _step(self) -> float:
        chosen = [self._next() for _ in range(self._wishes.batch)]
        loss = self._loss(chosen, self.words.vectors, self._generator, self._random)
        if not bool(loss.isfinite()):
            raise GenerationFailed(f"learning came to no numbers at step {self.done + 1}; take a smaller --rate")
        self._adam.zero_grad()
        loss.backward()
        for group in self._adam.param_groups:
            group["lr"] = self._rate * self._share(self.done)
        self._adam.step()
        self.done += 1
        kept = min(AVERAGED, self.done / (self.done + 9))
        for role, mean in self._mean.items():
            mean.lerp_(self.words.vectors[role].detach(), 1 - kept)
        return float(loss.detach())

    def _loss(
        self,
        chosen: Sequence[int],
        vectors: Mapping[str, torch.Tensor],
        generator: torch.Generator,
        chance: random.Random,
    ) -> torch.Tensor:
        """Mean squared error of the denoiser's guess, over one draw of caption, latents, noise and time for each of the
        pictures."""
        texts = self._texts([chance.choice(self._captions[index]) for index in chosen], vectors)
        # Cloned: what the VAE made in inference mode may not be kept for a backward pass.
        clean = torch.cat([self._pictures[index].sample(generator).clone() for index in chosen]).float()
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        times = self._process.times(len(chosen), generator)
        noisy = self._process.noisy(clean, noise, times)
        lanes = [Lane(noisy[at : at + 1], times[at], texts[at], 1.0) for at in range(len(chosen))]
        wanted = self._process.target(clean, noise, times)
        return torch.nn.functional.mse_loss(self.family.predict(lanes).float(), wanted)

    def _next(self) -> int:
        """The pictures in turns, each round in another order."""
        if not self._queue:
            self._queue = self._random.sample(range(len(self._pictures)), len(self._pictures))
        return self._queue.pop()

    def _texts(self, captions: Sequence[str], vectors: Mapping[str, torch.Tensor]) -> list[Text]:
        denoiser = self.family.model.denoiser
        assert denoiser is not None, "a model that is learned with is drawn"
        ids, _ = time_ids(self.family.model.family, denoiser.default_height, denoiser.default_width)
        told = None if ids is None else torch.tensor(ids)
        return [self.family.text(embedding, told) for embedding in self.words.read(captions, vectors)]

    def _share(self, step: int) -> float:
        """Of the learning rate: warm up, then half a cosine down to nothing."""
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        return 0.5 * (1 + math.cos(math.pi * step / self._wishes.steps))


class Process:
    """The noise that a diffusion model was trained against: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise (Ho et al. 2020),
    and what its denoiser was asked for."""

    def __init__(self, family: Family) -> None:
        denoiser = family.model.denoiser
        assert denoiser is not None, "a model that is learned with is drawn"
        known = {name: family.scheduler_config[name] for name in _PROCESS if name in family.scheduler_config}
        self._alphas: torch.Tensor = DDPMScheduler(**known).alphas_cumprod.clone()
        self._velocity = denoiser.prediction_type == "v_prediction"

    def times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) timesteps, on the CPU: one from each of `count` equal parts of the schedule, so that every batch
        sees all of it, in random order."""
        parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        times = (parts * len(self._alphas)).long().clamp(max=len(self._alphas) - 1)
        return times[torch.randperm(count, generator=generator)]

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        signal, spread = self._shares(clean, times)
        return signal * clean + spread * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) x (Salimans & Ho 2022)."""
        if not self._velocity:
            return noise
        signal, spread = self._shares(clean, times)
        return signal * noise - spread * clean

    def _shares(self, like: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self._alphas[times].to(like).view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()


def check_model(model: ModelFolder) -> None:
    """Raises OperatorError where concepts are not learned with this model."""
    denoiser = model.denoiser
    if denoiser is None or model.family not in FAMILIES:
        raise OperatorError(
            f"model: {model.name} is of the {model.family} family; concepts are learned with "
            f"{' and '.join(FAMILIES.values())}",
            "model",
        )
    if denoiser.process != "diffusion" or denoiser.prediction_type not in PREDICTIONS:
        raise OperatorError(
            f"model: {model.name} was trained against another noise ({denoiser.process}, {denoiser.prediction_type}) "
            f"than concepts are learned with (diffusion, {' or '.join(PREDICTIONS)})",
            "model",
        )
    if denoiser.guidance != "classifier_free":
        raise OperatorError(f"model: {model.name} is distilled; learn with the model that it was made from", "model")
    if denoiser.in_channels != denoiser.latent_channels:
        raise OperatorError(f"model: {model.name} only repaints; learn with the model that it was made from", "model")


def _open(model: ModelFolder, settings: DiffusionSettings) -> Family:
    """The frozen model. On a GPU in bfloat16 where it has that: gradients are too small for float16."""
    device = claim_device(settings.device, 0.0, "diffusion.device")
    if device.type == "cpu":
        use_threads(settings.torch_threads)
    dtype = settings.dtype
    if dtype == "auto":
        short = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        dtype = "bfloat16" if short else "float32"
    if dtype == "float16":
        raise OperatorError("diffusion.dtype: gradients are too small for float16; take bfloat16 or float32", "dtype")
    check_dtype(device, dtype, "diffusion.dtype")
    plain = settings.model_copy(update={"compile": False, "tiny_vae": None})
    family = open_family(model, device, getattr(torch, dtype), plain)
    if device.type == "cuda":
        family.denoiser.enable_gradient_checkpointing()
    return family


def _pixels(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).unsqueeze(0)
    return pixels / 127.5 - 1.0
