"""All settings: one frozen tree. `origins.py` reads it, `docs/settings.md` is generated from it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from serve.callers import API_KEY
from serve.rungs import Rung, worse

ENV_PREFIX = "TANDEM_"
ENV_DELIMITER = "__"
MIB = 1024 * 1024
MOST_STEPS = 100_000
"""Beyond what anybody draws, and what times are still predicted for."""

_PLACEMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPLATE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TEMPLATE_FORM = "the name of a template or an arm has up to 64 letters, digits, '_' and '-' alone"
_FIRST_KEY_FORM = "tdm_ and 12 of a-z2-7, _ and 43 of A-Za-z0-9_-"
_WEBHOOK_KEY_BYTES = range(24, 65)
_WEBHOOK_SECRET_FORM = "whsec_ and 24 to 64 bytes in base64 (`echo whsec_$(openssl rand -base64 32)`)"

_COLLECTOR = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^\s@?#]*)?")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADERS_FORM = "name=value, with commas between them and values URL-encoded"

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "float16", "bfloat16"]
RungName = Literal[
    "resident",
    "vae_slicing",
    "vae_tiling",
    "attention_slicing",
    "int8",
    "int4",
    "offload",
    "sequential_offload",
    "cpu",
]
"""`serve.rungs.Rung`, as the settings write it."""


class Room(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HttpSettings(Room):
    host: str = "127.0.0.1"
    """Address that the HTTP ingress listens on."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that the HTTP ingress listens on."""
    max_body_bytes: int = Field(32 * MIB, ge=1024)
    """Largest request body that is read, images in it included (in base64 a third larger than their files); more is
    refused with 413."""
    max_bodies_bytes: int = Field(512 * MIB, ge=1024)
    """Most bytes of request bodies that one ingress replica holds at once; one that does not fit is refused with 503.
    At least `max_body_bytes`. While a body is read, its decoded pictures come on top."""
    replicas: int = Field(1, ge=1)
    """Number of ingress replicas."""
    max_connections: int = Field(1000, ge=1)
    """Requests, open event streams among them, that one ingress replica serves at once."""
    max_streams: int = Field(64, ge=1)
    """Event streams and waits (`wait=true`) that one caller, an API key or a tenant, may have open at one ingress
    replica; one more is refused with 429."""
    num_cpus: float = Field(0.2, ge=0)
    """CPUs that one ingress replica reserves in Ray."""
    wait_s: float = Field(300.0, gt=0)
    """Longest time in seconds that a synchronous call is held open: then its answer names the job, which goes on.
    Below what proxies in front allow."""
    drain_s: float = Field(5.0, gt=0)
    """Seconds that an ingress replica which is to go has for the calls that it is answering; then they are cut. Where
    there are two and more, make it `wait_s`, so that none is; with one, new calls wait for as long."""
    cancel_on_disconnect: bool = True
    """Cancel the job of a synchronous call whose caller hangs up; never that of one with an `Idempotency-Key`."""
    benchmark: bool | None = None
    """Answer `POST /v1/benchmark`, which takes the diffusion replicas' time; by default only under `tandem up` on a
    loopback `host`."""

    @model_validator(mode="after")
    def _holds_one_body(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(f"max_bodies_bytes {self.max_bodies_bytes} is less than max_body_bytes")
        return self

    @property
    def offers_benchmark(self) -> bool:
        """Behind a cluster's proxy, `host` says nothing of who can reach the server: what is left open is a no."""
        return bool(self.benchmark)


class ModelSettings(Room):
    source: str = "shapes"
    """Model to serve: `shapes` (shipped), a diffusers folder, a `.safetensors` checkpoint, or a hub id."""
    revision: str | None = None
    """Hub revision; required for a hub id, as a full commit hash, so that every replica loads the same weights."""
    name: str | None = None
    """Name that requests use in `model`; by default the last part of the source."""
    config: str | None = None
    """For a single-file checkpoint: a diffusers folder or hub id whose configuration and tokenizer describe it, and
    which has the parts that the file lacks (of SD 3 and FLUX usually all but the transformer)."""
    num_inference_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Steps of a request that names none; by default what the model is made for."""
    guidance_scale: float | None = Field(None, ge=0)
    """Guidance scale of a request that names none; by default what the model is made for."""


class LimitSettings(Room):
    max_prompt_bytes: int = Field(8192, ge=1, le=16_384)
    """Longest prompt or negative prompt, in UTF-8 bytes."""
    max_num_inference_steps: int = Field(150, ge=1)
    """Most denoising steps of one request."""
    max_num_images: int = Field(10, ge=1)
    """Most images of one request."""
    max_side: int = Field(2048, ge=64)
    """Largest width or height, in pixels."""
    max_guidance_scale: float = Field(50.0, ge=1)
    """Largest guidance scale."""
    max_image_bytes: int = Field(11 * MIB, ge=1024)
    """Largest file of an image or mask to start from. By default both fit into `http.max_body_bytes`."""
    max_image_pixels: int = Field(4096 * 4096, ge=4096)
    """Most pixels of an image or mask to start from; it is refused before it is decoded."""


class ArmSettings(Room):
    text: str
    """The prompt, like a template's `text`."""
    negative_prompt: str | None = None
    """What the pictures must not show, where an order does not say it; by default the template's."""
    share: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How many of the template's orders it gets, beside the others' shares."""


class TemplateSettings(Room):
    text: str | None = None
    """The prompt. `{subject}` stands for the order's variable of that name, `{prompt}` for its prompt, `{a|b}` for one
    of them, by the order's seed. Not beside `arms`."""
    negative_prompt: str | None = None
    """What the pictures must not show, where an order does not say it; written like `text`."""
    syntax: Literal["a1111", "compel"] = "a1111"
    """What the texts are written in."""
    arms: dict[str, ArmSettings] = {}
    """Texts that are held against one another, by name: an order gets one of them by its seed, or names it. Metrics
    count them apart."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.text is None) is not bool(self.arms):
            raise ValueError("a template has either a text or arms")
        return self


class PromptSettings(Room):
    templates: dict[str, TemplateSettings] = {}
    """Prompts that orders name in `template`: `{portrait: {text: "a portrait of {subject}, oil on canvas"}}`."""


class JobSettings(Room):
    redis_url: SecretStr | None = None
    """Redis for jobs (durable, `noeviction`); by default `tandem up` starts one of its own under `data_dir`."""
    max_queued: int = Field(100, ge=1)
    """Most jobs that wait for a model at once; one more is refused with 503. Half as many again, for callers who have
    fewer than their share of them, so that nobody can take all places."""
    max_queued_s: float = Field(600.0, gt=0)
    """Most predicted seconds of work that wait for each replica of a model; what comes on top is refused with 503."""
    lease_s: float = Field(10.0, gt=0)
    """Seconds after a worker's last sign of life when its job goes to another worker."""
    max_attempts: int = Field(3, ge=1)
    """Times that a job is started before it fails for good."""
    retry_backoff_s: float = Field(10.0, ge=0)
    """Seconds after which a job is started again that failed for lack of memory or of a part of the server; half to one
    and a half times as many, by chance, so that not all come back at once."""
    queue_ttl_s: float = Field(600.0, gt=0)
    """Seconds that a job may wait for its first start; then it expires."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds from its first start in which a job must end, all attempts included; then it expires."""
    result_ttl_s: float = Field(3600.0, gt=0)
    """Seconds for which an ended job's record and its pictures are kept; then both are deleted."""
    dead_letter_ttl_s: float = Field(7 * 86400.0, gt=0)
    """The same for a job that failed although nothing was wrong with the order: `tandem jobs list --dead`."""
    idempotency_ttl_s: float = Field(86400.0, gt=0)
    """Seconds from submission for which an `Idempotency-Key` or a job id that the client chose stands for its order."""

    @property
    def heartbeat_s(self) -> float:
        """Seconds between a worker's signs of life: a third of the lease, so that two may be lost."""
        return self.lease_s / 3


class KeySettings(Room):
    required: bool | None = None
    """Serve only who sends an API key (`tandem keys create`); by default everywhere but on a loopback `http.host`."""
    first: SecretStr | None = None
    """The first API key, with every scope, which the server makes at its start unless a key of its id was ever made:
    `tdm_` and 12 of a-z2-7 (the id), `_` and 43 of A-Za-z0-9_- (the secret). Where `required` is left open, it is
    on then; where it is off, nobody asks for this key either."""
    salt: bool = False
    """Keys share no cache entry, so that timing can't tell what another has asked for."""


class WebhookSettings(Room):
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that orders may name in `webhook`; `*.example.com` allows what is below it, `host:port` another port than
    443. Without any there are none."""
    allow_private: bool = False
    """Also call addresses that are not public (loopback, private networks), over http too."""
    secret: SecretStr | None = None
    """Signs the calls (Standard Webhooks): `whsec_` and 24 to 64 bytes in base64. Required with `allowed_hosts`."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds that one call may take."""
    max_attempts: int = Field(8, ge=1)
    """Calls of which one must be answered with a 2xx, at growing distances; then it is given up."""
    public_url: str = ""
    """Where clients reach this server, such as `https://images.example.com`: what the links in a call begin with."""


class CacheSettings(Room):
    redis_url: SecretStr | None = None
    """Redis for embeddings (`allkeys-lfu`, no persistence); by default `tandem up` starts one of its own."""
    memory_bytes: int = Field(256 * MIB, ge=0)
    """Bytes of embeddings that each process keeps in its own memory."""
    embedded_bytes: int = Field(256 * MIB, ge=MIB)
    """Memory bound of the cache Redis that `tandem up` starts."""
    values: Literal["exact", "int8"] = "exact"
    """How embeddings are kept: as computed, or as int8 by row with the rows that it would spoil left exact."""
    salt_header: str | None = None
    """Request header that names the tenant, set by an authenticating proxy: tenants then share no cache entry, so that
    timing can't tell what another has asked for."""
    ttl_s: float = Field(7 * 86400.0, gt=0)
    """Seconds for which Redis keeps an embedding."""
    timeout_s: float = Field(0.25, gt=0)
    """Seconds to wait for the cache Redis before going on without it."""
    max_value_bytes: int = Field(16 * MIB, ge=1024)
    """Largest embedding that is written to Redis."""


class EncoderSettings(Room):
    device: Device = "auto"
    """Device of the text encoder; `auto` takes a GPU where `num_gpus` gives the replica one, else the CPU."""
    dtype: Dtype = "float32"
    """Precision of the text encoder; part of the cache key."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Weights of the linear layers in fewer bits; part of the cache key."""
    compile: bool = False
    """Compile the layers with `torch.compile` at start, which takes longer then; no request ever waits for it."""
    shard: bool = False
    """Spread the layers over all GPUs that `num_gpus` gives a replica, for an encoder that is larger than one.
    Can't be combined with `compile`."""
    max_batch_size: int = Field(32, ge=1)
    """Most rows of one forward pass."""
    max_batch_tokens: int = Field(4096, ge=77)
    """Most tokens of one forward pass, padding included; a longer row goes alone."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the text encoder, where it runs on a CPU; by default torch's own choice, which under Ray is one
    thread unless `num_cpus` is larger (Ray sets OMP_NUM_THREADS)."""
    redis: bool = True
    """Share embeddings through the cache Redis."""
    lease_s: float = Field(0.0, ge=0)
    """Seconds for which one replica may keep the others from encoding the same text; 0 lets them. Pays for encoders
    whose forward takes longer than a round trip to Redis and that have several replicas (T5)."""
    slow_s: float = Field(0.2, gt=0)
    """A request to the pool that takes longer is logged."""
    stall_s: float = Field(60.0, gt=0)
    """Seconds that one forward pass may take before the replica counts as hung and is replaced."""
    start_s: float = Field(120.0, gt=0)
    """Seconds that a request waits for a pool that is asleep, beyond those that it would wait for one that is awake."""
    min_replicas: int = Field(1, ge=0)
    """Fewest encoder replicas; 0 lets the pool sleep, once it was loaded at the start, and the next text wakes it."""
    max_replicas: int = Field(1, ge=1)
    """Most encoder replicas."""
    target_queue_tokens: int = Field(8192, ge=1)
    """Tokens that wait or are being encoded per replica at which the pool grows."""
    idle_s: float = Field(60.0, gt=0)
    """Seconds of a smaller load after which the pool shrinks."""
    num_cpus: float = Field(0.2, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs (fractions allowed) that one replica reserves in Ray."""
    gpu_class: str | None = None
    """One of `gpu_classes`: the replicas run on nodes with its label. By default on any that has what they reserve."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.compile and self.shard:
            raise ValueError("compile and shard can't be combined")
        return self

    @property
    def place(self) -> Device:
        """The device that is asked for. Ray hides no GPU from a replica that reserves none, so this must."""
        return "cpu" if self.device == "auto" and not self.num_gpus else self.device


class GpuClassSettings(Room):
    memory_gb: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    """Memory of one such GPU, in GB (10^9 bytes)."""
    label: str | None = None
    """Value of the node label `tandem.dev/gpu-class`; by default the class's name."""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    """What it computes in at full speed; `dtype: auto` takes the model's own among them, or else the first. Turing has
    no bfloat16."""

    @model_validator(mode="after")
    def _computes(self) -> Self:
        if not self.dtypes:
            raise ValueError("dtypes is empty")
        return self


class DiffusionSettings(Room):
    model: str | None = None
    """Name of the model that is drawn here; by default the first. `placements` say which model is drawn where."""
    gpu_class: str | None = None
    """One of `gpu_classes`: the replicas run on nodes with its label, and hold what its memory holds."""
    device: Device = "auto"
    """Device of the denoiser; `auto` takes cuda, then mps, then cpu."""
    dtype: Literal["auto", Dtype] = "auto"
    """Precision of denoiser and VAE; `auto` takes float32 on a CPU, on a GPU float16 for Stable Diffusion 1.x, 2.x and
    XL and bfloat16 for the others, as far as the card (its class's `dtypes`) has them."""
    max_batch_size: int = Field(8, ge=1)
    """Most images that step together in one forward pass; the profile taken at start may set fewer."""
    max_rows: int = Field(16, ge=1)
    """Most images in hand: beyond a full batch they take turns, so that a short job need not wait for long ones."""
    max_pixels: int | None = Field(None, ge=64)
    """Largest image (width x height) that is drawn here; by default what the GPU class's memory holds."""
    rung: Literal["auto", RungName] = "auto"
    """Where the memory ladder begins: the first of its rungs, from this one down, that holds the model's own size is
    taken. `auto` begins at the top, with everything on the card."""
    worst_rung: RungName = "sequential_offload"
    """The last rung of the memory ladder that may be taken, at the start and where memory runs out while images are
    drawn."""
    replicas: int = Field(1, ge=0)
    """Number of diffusion replicas, at the start where `min_replicas` and `max_replicas` let it change. With 0, and no
    `max_replicas`, this server only encodes text."""
    min_replicas: int | None = Field(None, ge=0)
    """Fewest replicas, by default `replicas`; 0 lets them all go while nothing is ordered, and the next order brings
    one back."""
    max_replicas: int | None = Field(None, ge=0)
    """Most replicas, by default `replicas`."""
    target_wait_s: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Predicted seconds of work, queued and in hand, for each replica at which there are to be more."""
    idle_s: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Seconds of less work after which there are to be fewer."""
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0, le=1)
    """Share of a GPU that one replica reserves in Ray, at most 1: a denoiser runs on one. A replica that reserves none
    must not have a `gpu_class`, unless its `device` is the CPU; `tandem up` shares out what is left open."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the denoiser, where it runs on a CPU; by default all cores but one."""
    channels_last: bool | None = None
    """Keep convolutions' weights and activations channels-last; by default for U-Nets and VAEs, which have them."""
    compile: bool = False
    """Compile the denoiser with `torch.compile` at start, for batches padded to 1, 2, 4, 8, ... entries; the first step
    of a new size waits for it."""
    tiny_vae: str | None = None
    """Folder of a small VAE (TAESD, `AutoencoderTiny`) that requests may choose with `tiny_vae`."""
    step_cache: bool = True
    """Let requests choose `step_cache`, which reuses predictions between steps that hardly differ."""
    profile_s: float = Field(20.0, ge=0)
    """Seconds that a replica may take at its first start to find the batch that pays for each size, kept under
    `data_dir`; 0 measures nothing, and a step takes `max_batch_size` images."""
    stall_s: float | None = Field(None, gt=0)
    """Seconds without any step or decoding, although there is something to draw, after which the replica counts as hung
    and is replaced; by default 20 on a GPU, 120 on a CPU or with `compile`, whose first step of a new size compiles. In
    any case five times the slowest step that is known for what is in hand."""
    drain_s: float = Field(120.0, gt=0)
    """Seconds that a replica which is told to stop may take to finish the jobs that it holds."""

    @model_validator(mode="after")
    def _descends(self) -> Self:
        if worse(self.best_rung, than=Rung(self.worst_rung)):
            raise ValueError(f"rung {self.rung} is below worst_rung {self.worst_rung}")
        return self

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.least_replicas > self.replicas:
            raise ValueError(f"min_replicas {self.least_replicas} is more than replicas {self.replicas}")
        if self.replicas > self.most_replicas:
            raise ValueError(f"replicas {self.replicas} is more than max_replicas {self.most_replicas}")
        return self

    @property
    def least_replicas(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        """A placement of which there are none at most is left out."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def best_rung(self) -> Rung:
        """The first that is tried."""
        return Rung.RESIDENT if self.rung == "auto" else Rung(self.rung)

    @property
    def fixed_dtype(self) -> Dtype | None:
        """None where the card decides."""
        return None if self.dtype == "auto" else self.dtype


class CaptionSettings(Room):
    source: str = ""
    """Folder of the model that describes pictures (`POST /v1/captions`): any image-text-to-text model of transformers
    (BLIP, LLaVA, Pixtral, Llama 3.2 Vision) with safetensors. Without one, captions are not offered."""
    name: str | None = None
    """Name that requests use in `model`; by default the last part of the source."""
    prompt: str = ""
    """What the model is told of a picture by a request that tells it nothing. By default nothing, where the model
    captions pictures alone, and `Describe this image in one sentence.` where it chats."""
    max_new_tokens: int = Field(64, ge=1)
    """Most tokens of a caption, and those of a request that names none."""
    device: Device = "auto"
    """Device of the model; `auto` takes a GPU where `num_gpus` gives the replica one, else the CPU."""
    dtype: Literal["auto", Dtype] = "auto"
    """Precision of the model; `auto` takes float32 on a CPU, on a GPU bfloat16, or float16 where it has none."""
    max_batch_size: int = Field(8, ge=1)
    """Most pictures that are described at once."""
    batch_wait_s: float = Field(0.01, ge=0)
    """Seconds that a picture waits for others that may share its batch. While a batch is computed, the next one gathers
    by itself."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the model, where it runs on a CPU; by default all cores but one."""
    stall_s: float = Field(120.0, gt=0)
    """Seconds that one batch may take before the replica counts as hung and is replaced, and a request is given up."""
    start_s: float = Field(300.0, gt=0)
    """Seconds that a request waits for a pool that is asleep, beyond those that it would wait for one that is awake."""
    min_replicas: int = Field(1, ge=0)
    """Fewest replicas; 0 lets the pool sleep, once it was loaded at the start, and the next picture wakes it."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas; the pool grows where more than `max_batch_size` pictures wait for each."""
    idle_s: float = Field(300.0, gt=0)
    """Seconds of a smaller load after which the pool shrinks."""
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0, le=1)
    """Share of a GPU that one replica reserves in Ray, at most 1."""
    gpu_class: str | None = None
    """One of `gpu_classes`: the replicas run on nodes with its label. By default on any that has what they reserve."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @property
    def place(self) -> Device:
        """As an encoder's."""
        return "cpu" if self.device == "auto" and not self.num_gpus else self.device

    @property
    def model(self) -> str:
        """Name of the model; empty where captions are not offered."""
        return self.name or Path(self.source).name if self.source else ""


class S3Settings(Room):
    bucket: str = ""
    """Bucket for images; required with `results.store: s3`, because bucket names are global."""
    prefix: str = "images/"
    """Prefix of every key in the bucket."""
    endpoint_url: str | None = None
    """Endpoint of an S3-compatible store; by default AWS."""
    region: str | None = None
    """Region of the bucket."""
    access_key_id: str | None = None
    """Access key; by default boto3's own chain (environment, profile, instance role)."""
    secret_access_key: SecretStr | None = None
    """Secret of the access key."""
    presign: bool = True
    """Send clients to the bucket, with a presigned URL for each image. Off: the server hands images out itself, for
    clients who can't reach the bucket."""
    url_ttl_s: int = Field(900, ge=1, le=900)
    """Seconds for which a presigned image URL is valid."""


class ResultSettings(Room):
    store: Literal["local", "s3"] = "local"
    """Where images are kept: a folder under `data_dir`, or S3."""
    spool_bytes: int = Field(256 * MIB, ge=0)
    """Bytes of finished images that one diffusion replica keeps in memory while the store is away, and draws on; beyond
    them it claims no more."""
    s3: S3Settings = S3Settings()

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.store == "s3" and not self.s3.bucket:
            raise ValueError("store s3 needs results.s3.bucket")
        return self


class MetricsSettings(Room):
    port: int | None = Field(None, ge=1, le=65535)
    """Port on which the local server's Ray agent gives Prometheus its metrics; by default one that is free."""


class TracingSettings(Room):
    endpoint: str | None = None
    """URL that spans are posted to (OTLP over HTTP), such as `http://otel-collector:4318/v1/traces`; without one, jobs
    are not traced."""
    headers: SecretStr | None = None
    """Headers of these calls, such as a collector's API key: `name=value`, with commas between them and values
    URL-encoded, as in OTEL_EXPORTER_OTLP_HEADERS."""
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of the orders that are traced. For one that comes with a `traceparent`, its caller has decided."""

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _COLLECTOR.fullmatch(endpoint):
            raise ValueError(
                "must be an http or https URL with a host, without a user (that is for `tracing.headers`), such as "
                "http://otel-collector:4318/v1/traces"
            )
        return endpoint


class LogSettings(Room):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""


class ConceptSettings(Room):
    folder: Path | None = None
    """Folder of learned concepts (textual inversion): `NAME.safetensors` is what prompts write as `<NAME>`. By default
    `concepts` under `data_dir`; every node must see the same one."""


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        use_attribute_docstrings=True,
    )

    data_dir: Path = Path(".tandem")
    """Folder for everything that the local server keeps: images, Redis files, logs."""
    http: HttpSettings = HttpSettings()
    model: ModelSettings = ModelSettings()
    models: tuple[ModelSettings, ...] = ()
    """Further models that images are drawn with; a list of groups like `model`."""
    text_models: tuple[ModelSettings, ...] = ()
    """Further models whose text is encoded here, for diffusion that runs elsewhere; a list of groups like `model`."""
    limits: LimitSettings = LimitSettings()
    prompts: PromptSettings = PromptSettings()
    jobs: JobSettings = JobSettings()
    keys: KeySettings = KeySettings()
    webhooks: WebhookSettings = WebhookSettings()
    cache: CacheSettings = CacheSettings()
    encoder: EncoderSettings = EncoderSettings()
    encoders: dict[str, dict[str, Any]] = {}
    """What differs from `encoder` for one of the encoders, by its name: `{t5-xxl: {num_gpus: 1, min_replicas: 0}}`."""
    gpu_classes: dict[str, GpuClassSettings] = {}
    """Kinds of GPU, by name: `{4gb: {memory_gb: 4, dtypes: [float16]}}`."""
    diffusion: DiffusionSettings = DiffusionSettings()
    placements: dict[str, dict[str, Any]] = {}
    """Which model is drawn on which GPU class, by a name of its own; what differs from `diffusion`:
    `{sd-small: {model: sd15, gpu_class: 4gb}}`. Without any, each model has one placement with `diffusion` as it is."""
    captions: CaptionSettings = CaptionSettings()
    results: ResultSettings = ResultSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()
    log: LogSettings = LogSettings()
    concepts: ConceptSettings = ConceptSettings()

    @model_validator(mode="after")
    def _overrides_fit(self) -> Self:
        """Names and types. An entry that may stand on another's (`t5-xxl-3f9a2c` on `t5-xxl`) is not known as a whole
        before the encoders are: the registry checks that it fits."""
        for name in self.encoders:
            self._check_class(self.encoders[name].get("gpu_class"), ("encoders", name, "gpu_class"))
            stands = any(name.startswith(f"{other}-") for other in self.encoders)
            try:
                self.encoder_named(name)
            except ValidationError as error:
                if faults := [one for one in error.errors(include_url=False) if one["loc"] or not stands]:
                    raise _relocated(error.title, faults, ("encoders", name)) from None
        self._check_class(self.encoder.gpu_class, ("encoder", "gpu_class"))
        return self

    @model_validator(mode="after")
    def _placements_fit(self) -> Self:
        """Names, types and GPU classes; which models there are is not known before they are looked at."""
        for name in self.placements:
            if not _PLACEMENT.fullmatch(name):
                raise _misplaced(("placements", name), "a placement's name has letters, digits, '.', '_' and '-' alone")
            try:
                gpu_class = self.placement_named(name).gpu_class
            except ValidationError as error:
                raise _relocated(error.title, error.errors(include_url=False), ("placements", name)) from None
            if "gpu_class" in self.placements[name]:
                self._check_class(gpu_class, ("placements", name, "gpu_class"))
        self._check_class(self.diffusion.gpu_class, ("diffusion", "gpu_class"))
        self._check_class(self.captions.gpu_class, ("captions", "gpu_class"))
        return self

    @model_validator(mode="after")
    def _templates_fit(self) -> Self:
        """Their names are labels of metrics, and clients write them."""
        for name, template in self.prompts.templates.items():
            for place in ((name,), *((name, "arms", arm) for arm in template.arms)):
                if not _TEMPLATE.fullmatch(place[-1]):
                    raise _misplaced(("prompts", "templates", *place), _TEMPLATE_FORM)
        return self

    @model_validator(mode="after")
    def _first_key_is_one(self) -> Self:
        first = self.keys.first
        if first is not None and not API_KEY.fullmatch(first.get_secret_value()):
            raise _misplaced(("keys", "first"), _FIRST_KEY_FORM)
        return self

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        """By the letter of base64: what a lenient decoder drops, such as a stray blank, a receiver's may not."""
        secret = self.webhooks.secret
        if secret is None and self.webhooks.allowed_hosts:
            raise _misplaced(("webhooks", "secret"), f"required with webhooks.allowed_hosts: {_WEBHOOK_SECRET_FORM}")
        if secret is not None and not _signs_webhooks(secret.get_secret_value()):
            raise _misplaced(("webhooks", "secret"), _WEBHOOK_SECRET_FORM)
        return self

    @model_validator(mode="after")
    def _tracing_headers_are_some(self) -> Self:
        headers = self.tracing.headers
        if headers is not None:
            try:
                header_pairs(headers.get_secret_value())
            except ValueError:
                raise _misplaced(("tracing", "headers"), _HEADERS_FORM) from None
        return self

    @property
    def concept_folder(self) -> Path:
        return self.data_dir / "concepts" if self.concepts.folder is None else self.concepts.folder.expanduser()

    def _check_class(self, name: Any, place: tuple[str, ...]) -> None:
        """What is no name at all is told by its own group."""
        if isinstance(name, str) and name not in self.gpu_classes:
            known = ", ".join(self.gpu_classes) or "none"
            raise _misplaced(place, f"there is no GPU class {name}; gpu_classes has {known}")

    def placement_named(self, name: str) -> DiffusionSettings:
        """The settings of one placement: `diffusion`, over it what `placements` says. Raises ValidationError."""
        return DiffusionSettings.model_validate(self.diffusion.model_dump() | self.placements.get(name, {}))

    def encoder_named(self, *names: str) -> EncoderSettings:
        """The settings of one encoder: `encoder`, over it what `encoders` says of each of these names in order. Raises
        ValidationError."""
        options = self.encoder.model_dump()
        for name in names:
            options |= self.encoders.get(name, {})
        return EncoderSettings.model_validate(options)

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: Any, **_: Any
    ) -> tuple[Any, ...]:
        # `load` merges the origins itself, so that it can say where each value came from.
        return (init_settings,)


def header_pairs(text: str) -> dict[str, str]:
    """Names and values of `tracing.headers`. Raises ValueError."""
    pairs = {}
    for pair in filter(None, (each.strip() for each in text.split(","))):
        name, _, value = (part.strip() for part in pair.partition("="))
        value = unquote(value).strip()
        if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()) or not value:
            raise ValueError(_HEADERS_FORM)
        pairs[name.lower()] = value
    return pairs


def _signs_webhooks(secret: str) -> bool:
    prefix, _, key = secret.rpartition("_")
    try:
        return prefix == "whsec" and len(base64.b64decode(key, validate=True)) in _WEBHOOK_KEY_BYTES
    except ValueError:  # not base64, or not even ASCII
        return False


def _misplaced(place: tuple[str, ...], reason: str) -> ValidationError:
    """A complaint about one field, however deep it lies."""
    told = PydanticCustomError("value_error", "{reason}", {"reason": reason})
    return ValidationError.from_exception_data("Settings", [InitErrorDetails(type=told, loc=place, input=None)])


def _relocated(title: str, faults: Sequence[ErrorDetails], place: tuple[str, ...]) -> ValidationError:
    """The same complaints, about fields that lie deeper in the tree."""
    return ValidationError.from_exception_data(
        title,
        [
            InitErrorDetails(
                type=PydanticCustomError(one["type"], "{reason}", {"reason": one["msg"]}),
                loc=(*place, *one["loc"]),
                input=one["input"],
            )
            for one in faults
        ],
    )
