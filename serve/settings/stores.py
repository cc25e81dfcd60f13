"""Settings of what is kept: jobs, embeddings, pictures."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from serve.settings.room import MIB, Room


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
