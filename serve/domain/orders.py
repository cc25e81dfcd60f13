"""An order, complete."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from serve.domain.text import LongPrompt, Syntax, TextRequest, Weighting


class Priority(enum.StrEnum):
    """Which of one owner's jobs go first. Between owners it changes nothing."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Task(enum.StrEnum):
    """What an image is made from: the text alone, an image too, or an image and a mask."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"


class ResizeMode(enum.StrEnum):
    """How a picture to start from comes to the job's size: without regard to its ratio; filled with it, what juts out
    cut off; or all of it in the middle, its edges repeated around it. They are A1111's 0, 1 and 2."""

    STRETCH = "stretch"
    CROP = "crop"
    FILL = "fill"


class MaskedContent(enum.StrEnum):
    """What stands under a mask before the first step: the colours around it, what the picture has there, noise, or
    nothing (latents of 0). They are A1111's 0 to 3."""

    FILL = "fill"
    ORIGINAL = "original"
    LATENT_NOISE = "latent_noise"
    LATENT_NOTHING = "latent_nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What the client asked for, complete: every default is filled in, so that a retry repeats it exactly.

    `width` and `height` are pixels. Image i of `num_images` uses the seed `seed_of(i)`. `guidance_scale` is the w of
    classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598); at or below 1 there is none.
    FLUX reads it as a number that it was distilled on instead; its classifier-free guidance is `true_cfg_scale`, which
    is None for every other family.

    `scheduler` is a name of `serve.models.samplers`, None the model's own sampler. `image` and `mask` are keys of the
    result store: PNG files of `width` x `height`, RGB and L (white is repainted). `strength`, in (0, 1], is the
    share of the steps that an image to start from goes through; None without one. `mask_blur` (pixels) has what the
    mask leaves black stay the image's own, with an edge of that softness: `serve.diffusion.paste`; None for pixels that
    are all the VAE's. `masked_content` is what stands under the mask at first. With `padding_mask_crop` (pixels, as
    in diffusers) `image` and `mask` have a size of their own, only the surroundings of the mask are drawn at
    `width` x `height`, and the answer is the whole picture: `serve.diffusion.area`. `variation_strength` above 0 is
    the share of another seed's noise in what the image starts from: `serve.diffusion.noise`. `use_t5` False leaves
    the T5 of SD 3 unread.

    `prompt` and `negative_prompt` are as they are drawn: templates are filled in, random choices made. `composed` is
    the number of noise predictions beside the negative one's (`AND`). `template` and `arm` say which configured prompt
    this came from.

    `preview_every` asks for a preview after every so many steps, 0 for none. `step_cache` above 0 and `tiny_vae` trade
    exactness for time: the image is then labelled approximate.

    `output_format` is `png`, `jpeg` or `webp`; `output_compression` the quality of the latter two, 0 to 100, None for
    a PNG; `bit_depth` 8, or 16 for a PNG.
    """

    model: str
    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float | None = None
    seed: int
    num_images: int = 1
    scheduler: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    mask_blur: float | None = None
    padding_mask_crop: int | None = None
    masked_content: MaskedContent = MaskedContent.ORIGINAL
    variation_seed: int | None = None
    variation_strength: float = 0.0
    prompt_syntax: Syntax = Syntax.A1111
    prompt_weighting: Weighting = Weighting.A1111
    long_prompt: LongPrompt = LongPrompt.CHUNK
    composed: int = 1
    clip_skip: int | None = None
    use_t5: bool = True
    preview_every: int = 0
    step_cache: float = 0.0
    tiny_vae: bool = False
    output_format: str = "png"
    output_compression: int | None = None
    bit_depth: int = 8
    template: str | None = None
    arm: str | None = None
    salt: str = ""

    def seed_of(self, index: int) -> int:
        """Of image `index`. Variations, as in A1111, are all of one seed."""
        return self.seed if self.variation_strength else self.seed + index

    def variation_seed_of(self, index: int) -> int | None:
        """Whose noise is mixed into image `index`; None where none is."""
        return self.variation_seed + index if self.variation_strength and self.variation_seed is not None else None

    @property
    def cfg_scale(self) -> float:
        """The w of classifier-free guidance."""
        return self.guidance_scale if self.true_cfg_scale is None else self.true_cfg_scale

    @property
    def guided(self) -> bool:
        return self.cfg_scale > 1.0

    @property
    def task(self) -> Task:
        if self.mask is not None:
            return Task.INPAINT
        return Task.TXT2IMG if self.image is None else Task.IMG2IMG

    @property
    def lanes(self) -> int:
        """Entries of the denoiser's batch that one image takes."""
        return self.composed + self.guided

    @property
    def pixels(self) -> int:
        """Of one image: what decides which GPU class can hold the job."""
        return self.width * self.height

    @property
    def text(self) -> TextRequest:
        """The part of the request that the text encoders see; without guidance no step reads a negative prompt."""
        return TextRequest(
            model=self.model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt if self.guided else None,
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            syntax=self.prompt_syntax,
            weighting=self.prompt_weighting,
            long_prompt=self.long_prompt,
            clip_skip=self.clip_skip,
            use_t5=self.use_t5,
            salt=self.salt,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """An order's coming: when it reached the ingress (`time.monotonic` there), and what its trace is continued from
    (W3C `traceparent`), None where nobody traces it."""

    at: float
    trace: str | None = None
