"""Settings of what clients meet: HTTP, API keys, webhooks."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, model_validator

from serve.settings.room import MIB, Room


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
