"""All settings: one frozen tree. `origins.py` reads it, `docs/settings.md` is generated from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "TANDEM_"
ENV_DELIMITER = "__"
MIB = 1024 * 1024

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "float16", "bfloat16"]


class Room(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HttpSettings(Room):
    host: str = "127.0.0.1"
    """Address that the HTTP ingress listens on."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that the HTTP ingress listens on."""
    max_body_bytes: int = Field(256 * 1024, ge=1024)
    """Largest request body that is read; more is refused with 413."""
    replicas: int = Field(1, ge=1)
    """Number of ingress replicas."""
    max_connections: int = Field(1000, ge=1)
    """Requests, open event streams among them, that one ingress replica serves at once."""
    num_cpus: float = Field(0.2, ge=0)
    """CPUs that one ingress replica reserves in Ray."""


class ModelSettings(Room):
    source: str = "shapes"
    """Model to serve: `shapes` (shipped), a diffusers folder, a `.safetensors` checkpoint, or a hub id."""
    revision: str | None = None
    """Hub revision; required for a hub id, as a full commit hash, so that every replica loads the same weights."""
    name: str | None = None
    """Name that requests use in `model`; by default the last part of the source."""
    config: str | None = None
    """For a single-file checkpoint: a diffusers folder or hub id whose configuration and tokenizer describe it."""


class LimitSettings(Room):
    max_prompt_bytes: int = Field(8192, ge=1)
    """Longest prompt or negative prompt, in UTF-8 bytes."""
    max_num_inference_steps: int = Field(150, ge=1)
    """Most denoising steps of one request."""
    max_num_images: int = Field(8, ge=1)
    """Most images of one request."""
    max_side: int = Field(2048, ge=64)
    """Largest width or height, in pixels."""
    max_guidance_scale: float = Field(50.0, ge=1)
    """Largest guidance scale."""
    default_num_inference_steps: int = Field(20, ge=1)
    """Steps of a request that names none."""
    default_guidance_scale: float = Field(5.0, ge=0)
    """Guidance scale of a request that names none."""


class JobSettings(Room):
    redis_url: SecretStr | None = None
    """Redis for jobs (durable, `noeviction`); by default `tandem up` starts one of its own under `data_dir`."""
    max_queued: int = Field(100, ge=1)
    """Most jobs that wait at once; one more is refused with 503."""
    lease_s: float = Field(10.0, gt=0)
    """Seconds after a worker's last sign of life when its job goes to another worker."""
    max_attempts: int = Field(3, ge=1)
    """Times that a job is started before it fails for good."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds from submission after which an unfinished job expires."""
    result_ttl_s: float = Field(3600.0, gt=0)
    """Seconds for which a finished job's record is kept."""

    @property
    def heartbeat_s(self) -> float:
        """Seconds between a worker's signs of life: a third of the lease, so that two may be lost."""
        return self.lease_s / 3


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


class DiffusionSettings(Room):
    device: Device = "auto"
    """Device of the denoiser; `auto` takes cuda, then mps, then cpu."""
    dtype: Literal["auto", Dtype] = "auto"
    """Precision of denoiser and VAE; `auto` takes float16 on a GPU and float32 elsewhere."""
    max_batch_size: int = Field(8, ge=1)
    """Most images that step together in one forward pass."""
    replicas: int = Field(1, ge=0)
    """Number of diffusion replicas; with 0 this server only encodes text."""
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that one replica reserves in Ray."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs (fractions allowed) that one replica reserves in Ray."""
    torch_threads: int | None = Field(None, ge=1)
    """CPU threads of the denoiser, where it runs on a CPU; by default all cores but one."""
    stall_s: float = Field(120.0, gt=0)
    """Seconds that one step or one decoding may take before the replica counts as hung and is replaced."""
    drain_s: float = Field(120.0, gt=0)
    """Seconds that a replica which is told to stop may take to finish the jobs that it holds."""


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
    url_ttl_s: int = Field(900, ge=1, le=900)
    """Seconds for which a presigned image URL is valid."""


class ResultSettings(Room):
    store: Literal["local", "s3"] = "local"
    """Where images are kept: a folder under `data_dir`, or S3."""
    s3: S3Settings = S3Settings()

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.store == "s3" and not self.s3.bucket:
            raise ValueError("store s3 needs results.s3.bucket")
        return self


class MetricsSettings(Room):
    port: int | None = Field(None, ge=1, le=65535)
    """Port on which the local server's Ray agent gives Prometheus its metrics; by default one that is free."""


class LogSettings(Room):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""


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
    text_models: tuple[ModelSettings, ...] = ()
    """Further models whose text is encoded here, for diffusion that runs elsewhere; a list of groups like `model`."""
    limits: LimitSettings = LimitSettings()
    jobs: JobSettings = JobSettings()
    cache: CacheSettings = CacheSettings()
    encoder: EncoderSettings = EncoderSettings()
    encoders: dict[str, dict[str, Any]] = {}
    """What differs from `encoder` for one of the encoders, by its name: `{t5-xxl: {num_gpus: 1, min_replicas: 0}}`."""
    diffusion: DiffusionSettings = DiffusionSettings()
    results: ResultSettings = ResultSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _overrides_fit(self) -> Self:
        """Names and types. An entry that may stand on another's (`t5-xxl-3f9a2c` on `t5-xxl`) is not known as a whole
        before the encoders are: the registry checks that it fits."""
        for name in self.encoders:
            stands = any(name.startswith(f"{other}-") for other in self.encoders)
            try:
                self.encoder_named(name)
            except ValidationError as error:
                if faults := [one for one in error.errors(include_url=False) if one["loc"] or not stands]:
                    raise _relocated(error.title, faults, ("encoders", name)) from None
        return self

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
