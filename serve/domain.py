"""The frozen messages that cross rooms. No room shares a mutable object with another."""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from serve.rungs import Rung

if TYPE_CHECKING:
    import torch


class JobState(enum.StrEnum):
    """queued -> encoding -> running -> storing -> one of the four terminal states.

    A worker holds the job from `encoding` (it collects the text) to `storing` (the images are drawn). A lost lease, a
    retry and a release lead from there back to `queued`.
    """

    QUEUED = "queued"
    ENCODING = "encoding"
    RUNNING = "running"
    STORING = "storing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def held(self) -> bool:
        """A worker has it."""
        return self in (JobState.ENCODING, JobState.RUNNING, JobState.STORING)

    @property
    def terminal(self) -> bool:
        return self is not JobState.QUEUED and not self.held


class Priority(enum.StrEnum):
    """Which of one owner's jobs go first. Between owners it changes nothing."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Tier(enum.StrEnum):
    """Where a text unit's embedding came from: this process's memory, Redis, or a forward pass of the encoder."""

    MEMORY = "memory"
    REDIS = "redis"
    ENCODED = "encoded"


class Syntax(enum.StrEnum):
    """What a prompt is written in. `plain` has no syntax: brackets are text."""

    A1111 = "a1111"
    COMPEL = "compel"
    PLAIN = "plain"


class Weighting(enum.StrEnum):
    """What a weight does to the embedding of its tokens: `serve.encoders.weighting`."""

    A1111 = "a1111"
    COMPEL = "compel"
    MULTIPLY = "multiply"


class LongPrompt(enum.StrEnum):
    """What becomes of a text that is longer than an encoder's row: `serve.prompts.chunks`."""

    CHUNK = "chunk"
    WINDOW = "window"
    HEAD = "head"
    TAIL = "tail"
    HIERARCHICAL = "hierarchical"
    ERROR = "error"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What a model's text encoders are asked for. `negative_prompt` is None where nothing is to be encoded for it.

    `width` and `height` (pixels) only enter SDXL's time ids. `clip_skip` n reads CLIP n layers earlier than the
    family's default, as in diffusers. `use_t5` False leaves the T5 of a model that can do without it (SD 3) unread.
    `max_sequence_length` is the length of a T5 row, by default the family's. `salt` enters the cache keys.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    num_inference_steps: int = 1
    syntax: Syntax = Syntax.A1111
    weighting: Weighting = Weighting.A1111
    long_prompt: LongPrompt = LongPrompt.CHUNK
    clip_skip: int | None = None
    use_t5: bool = True
    max_sequence_length: int | None = None
    salt: str = ""

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.negative_prompt or "")


UNIT_SCHEME = "tandem.unit.3"
"""Version of the recipe behind `EncodeUnit.key`. Another recipe needs another name: Redis outlives a release."""


FIRST_CONCEPT_ID = 1 << 30
"""Token ids from here on are no words of a vocabulary but learned vectors."""


@dataclass(frozen=True, slots=True)
class EncodeUnit:
    """One forward of one fixed-length row of token ids through one text encoder: what is batched, cached and shared.

    `encoder` is the fingerprint of the encoder's weights and of the precision they run in. `output` names what is read
    out of the forward:

        hidden          last hidden state after the final norm, (len(token_ids), width)
        skip:N          hidden state N layers before the last, no final norm; skip:1 is the penultimate
        skip:N:norm     the same after the final norm
        pooled          `hidden` at the first end-of-text token, (width,)
        projected:ID    `pooled` through the text projection ID, (projection width,)

    `salt` keeps tenants' entries apart: no timing tells one of them what another has written.

    `concepts` are digests of learned vectors (textual inversion), in the order in which the row first reads them: the
    token id FIRST_CONCEPT_ID + n is row n of their vectors one below the other. `hidden` are positions of the row that
    no other token looks at (Compel's way to leave words out), in rising order.
    """

    encoder: str
    token_ids: tuple[int, ...]
    output: str = "hidden"
    salt: str = ""
    concepts: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The cache key, 40 hex digits: equal keys mean equal embeddings, within the dtype's tolerance."""
        concepts, hidden = ",".join(self.concepts), ",".join(map(str, self.hidden))
        head = "\0".join((UNIT_SCHEME, self.encoder, self.output, self.salt, concepts, hidden, ""))
        ids = struct.pack(f"<{len(self.token_ids)}I", *self.token_ids)
        return hashlib.blake2b(head.encode() + ids, digest_size=20).hexdigest()


class Sign(enum.StrEnum):
    """Which side of the guidance reads a unit. An empty text is its own sign: everybody shares it, and it would
    pass for a hit rate of one half."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Text that did not fit into an encoder's row: `tokens` were written, `limit` were used, `text` was cut."""

    field: str
    encoder: str
    tokens: int
    limit: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of the text of `field` for one encoder: `used` in its row or rows (`chunks`), of which `unknown` stand for
    text outside its vocabulary, and `cut`."""

    field: str
    role: str
    encoder: str
    used: int
    cut: int
    unknown: int
    chunks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that a client should know of a text of theirs. `code` is for programs, `message` for people."""

    field: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """How many of the job's text units came from which tier. No unit is counted twice."""

    memory: int = 0
    redis: int = 0
    encoded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a job's time went: seconds of its stages, which follow one another in this order and don't overlap. None is
    a stage that it had not, or has not come to; `serve.stages` has their sum. They are those of its last attempt.

        admission_s    the order's arrival at the ingress -> it is logged
        retried_s      earlier attempts, and the waits before them
        queued_s       it (last) joined the queue -> claimed
        claim_s        claimed -> the replica begins
        text_s         plan, collect the text units, compose; `text_from` is the slowest tier that it waited for
        input_s        fetch and decode the images that it starts from
        source_s       wait for the VAE's thread, encode those
        batch_s        in the step loop, but in no step: it waits for its turns
        steps_s        in steps, which it shares with others' images
        decode_wait_s  after the last step: it waits for the VAE's thread
        decode_s       after the last step: the VAE decodes
        compress_s     PNG, JPEG or WebP, and the way there
        put_s          images and manifest into the result store
        told_s         settled -> a process that follows the job has read its end

    Two clocks tell them. Redis' tells admission, queue, `total_s` (logged -> settled) and `told_s`; the replica's
    monotonic one tells the rest. What no stage holds is the way between them: the settlement's round trip, above all.
    `admission_s` comes before `total_s`, `told_s` after it.

    `ahead_s` is how long the pools took for the text that was encoded while the job waited, beside the stages.
    `batch_images` is how many images, its own included, shared its steps on average. A job of several images is told by
    the one that ends last.
    """

    admission_s: float | None = None
    retried_s: float | None = None
    queued_s: float | None = None
    claim_s: float | None = None
    text_s: float | None = None
    text_from: Tier | None = None
    input_s: float | None = None
    source_s: float | None = None
    batch_s: float | None = None
    steps_s: float | None = None
    decode_wait_s: float | None = None
    decode_s: float | None = None
    compress_s: float | None = None
    put_s: float | None = None
    total_s: float | None = None
    told_s: float | None = None
    ahead_s: float | None = None
    batch_images: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """One stored image. `key` is its key in the result store; `bytes` its size there."""

    index: int
    key: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int


class WebhookState(enum.StrEnum):
    """Of telling a job's end to the client's address."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Relief:
    """Memory ran out in a phase, and a measure was taken before that was tried again.

    The phases are those of the engine: `begin` an image, `encode` what it starts from, `step`, `decode`. The measures:

        fewer_images    of a step; the others wait for the next one
        fewer_lanes     of one image at a time
        between_steps   what was to be computed beside the steps, with nothing else under way
        tiles_512       in tiles of so many pixels a side; tiles_256 too
        <rung>          of the memory ladder: all images of the replica are on it from then on
        another_card    the job waits for a placement with more memory
        another_time    there is none with more: it waits for the same kind
    """

    phase: str
    measure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """How a job fared for memory, over all of its attempts.

    `rung` is that of the memory ladder on which it was drawn, None until it is. `retries` is how often memory ran out
    and something was tried again; `relief` are the first of these, in order. `above_mb` (1e6 bytes) is what the
    placements have that gave it back for one with more, None where none did.
    """

    rung: Rung | None = None
    retries: int = 0
    relief: tuple[Relief, ...] = ()
    above_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A copy of a job's record at one moment. Times are Unix seconds on the job store's clock.

    `owner` is the caller who ordered it. `position` is 1 for the job of its model that is claimed next, None once it is
    claimed; `eta_s` the predicted seconds until it ends, None once it has. `cost_ms` is the predicted share of a
    replica's time. `attempt` counts the attempts at it. `approximate` names what kept the images from being exact:
    `step_cache`, `tiny_vae`, `tiled_vae`, `int8`, `int4`. `memory` is None until an attempt has ended that drew
    something or ran out of memory. `webhook` is the address that hears of its end, and `webhook_state` how far that
    came. `notes` say what was read otherwise than it was written.
    """

    id: str
    state: JobState
    request: ImageRequest
    attempt: int
    step: int
    steps: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    owner: str = ""
    priority: Priority = Priority.INTERACTIVE
    position: int | None = None
    eta_s: float | None = None
    cost_ms: int = 1
    webhook: str | None = None
    webhook_state: WebhookState | None = None
    tokens: tuple[TokenCount, ...] = ()
    truncated: tuple[Truncation, ...] = ()
    notes: tuple[Note, ...] = ()
    cache: CacheReport | None = None
    timings: Timings = field(default_factory=Timings)
    images: tuple[ImageRef, ...] = ()
    approximate: tuple[str, ...] = ()
    memory: MemoryReport | None = None
    error: JobError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """One entry of a job's event stream. `id` orders the stream and resumes it; `step` counts denoising steps done.

    `attempt` counts the attempts that were used by then. `fence` is the number of the claim that it happened under, 0
    before the first. `preview`, where the entry is one, is a JPEG file: image `index` of the job as it looks after that
    step.
    """

    id: str
    state: JobState
    step: int
    steps: int
    attempt: int = 0
    fence: int = 0
    index: int | None = None
    preview: bytes | None = None


@dataclass(frozen=True, slots=True)
class StepEvent:
    """`step` of `steps` forward passes are done for the slowest image of a run, which is one attempt at a job."""

    run_id: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """A JPEG file of image `index` of a run as it looks after `step` of `steps` forward passes: one pixel a latent."""

    run_id: str
    index: int
    step: int
    steps: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The text side of one image at one step, ready for the denoiser: float32 tensors on the CPU.

    `positive` and `negative` are (tokens, width), the pooled ones (width,), where the family has them. `negative` is
    None when the request has no guidance. `time_ids` are SDXL's six: original size, crop, target size (height first);
    its refiner has five, the last an aesthetic score, and others for the negative side.
    """

    positive: torch.Tensor
    negative: torch.Tensor | None
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    negative_time_ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One text as the denoiser reads it: float32 tensors on the CPU. `context` is (tokens, width), `pooled` (width,)
    where the family has one."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None


Mix: TypeAlias = tuple[tuple[float, int], ...]
"""Shares of texts, each named by its index: the sum of share times embedding. The shares need not add up to 1."""


@dataclass(frozen=True, slots=True)
class Phase:
    """The text from step `first` on. `positive` has a weight and a mix for each noise prediction, one unless the
    prompt is a composition (`AND`); `negative` is None where there is no guidance."""

    first: int
    positive: tuple[tuple[float, Mix], ...]
    negative: Mix | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """The text of every step: phases in rising order, the first from step 0, over `texts`, which have one shape.

    Steps are those that the client asked for. All phases have as many positive mixes and all a negative one, or none.
    """

    texts: tuple[TextEmbedding, ...]
    phases: tuple[Phase, ...]
    time_ids: torch.Tensor | None = None
    negative_time_ids: torch.Tensor | None = None

    @classmethod
    def constant(cls, conditioning: Conditioning) -> Schedule:
        positive = TextEmbedding(conditioning.positive, conditioning.pooled)
        ids = conditioning.time_ids, conditioning.negative_time_ids
        if conditioning.negative is None:
            return cls((positive,), (Phase(0, ((1.0, ((1.0, 0),)),)),), *ids)
        negative = TextEmbedding(conditioning.negative, conditioning.negative_pooled)
        return cls((positive, negative), (Phase(0, ((1.0, ((1.0, 0),)),), ((1.0, 1),)),), *ids)

    def at(self, step: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.first <= step)
