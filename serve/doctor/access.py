"""Who may come in, and whom the server calls: API keys, webhooks, the collector of traces."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from serve.doctor.findings import Finding, fault, ok, warning
from serve.doctor.redis_servers import job_redis
from serve.embedded import ever_used
from serve.errors import TandemError
from serve.keys import KeyStore
from serve.ports import LOOPBACK
from serve.settings.stores import JobSettings
from serve.settings.telemetry import header_pairs
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics
from serve.urls import shown_url
from serve.webhooks.addresses import host_of, public

_CALL_S = 5.0
_MAKE = "`tandem keys create NAME` with these settings, or keys.first from a secret"


def check_access(settings: Settings) -> list[Finding]:
    return [*_keys(settings), *_webhooks(settings), *_tracing(settings)]


def _keys(settings: Settings) -> Iterator[Finding]:
    host, required = settings.http.host, settings.keys.required
    reachable = host not in LOOPBACK
    if required is False:
        if reachable:
            told = f"it is off, and http.host {host} can be reached from elsewhere: whoever does may order"
            cure = "keys.required: true, unless a proxy in front authenticates and nothing else reaches the port"
            yield warning("keys-off", "keys.required", told, cure)
        if reachable and settings.http.benchmark:
            told = "whoever reaches the server may take all replicas' time (POST /v1/benchmark)"
            yield warning("benchmark-open", "http.benchmark", told, "http.benchmark: false, or keys.required: true")
        return
    if not (reachable or required or settings.keys.first):
        told = f"off under `tandem up`: only this machine reaches {host}; on a cluster it is on unless it says false"
        yield ok("keys", "keys.required", told)
        return
    if settings.keys.first is not None:
        yield ok("keys", "keys.first", "the server makes a key at its start")
        return
    made = _ever_made(settings)
    if made is False:
        told = "API keys are required, and none was ever made: the server does not start"
        yield fault("keys-none", "keys.required", told, _MAKE)
    elif made is None:
        told = "API keys are required; whether there are any is not known while no Redis runs"
        yield ok("keys", "keys.required", f"{told}: `tandem keys list`")
    else:
        yield ok("keys", "keys.required", "on, and there are keys")


def _ever_made(settings: Settings) -> bool | None:
    """None where there is no telling."""
    try:
        url = job_redis(settings)
        if url is not None:
            return asyncio.run(_asked(settings.jobs.model_copy(update={"redis_url": SecretStr(url)})))
    except TandemError:
        return None
    return None if ever_used(settings.data_dir) else False


async def _asked(jobs: JobSettings) -> bool:
    keys = KeyStore(jobs, InProcessMetrics())
    try:
        return await keys.ever_made()
    finally:
        await keys.close()


def _webhooks(settings: Settings) -> Iterator[Finding]:
    own = settings.webhooks
    if not own.allowed_hosts:
        return
    if urlsplit(own.public_url).scheme not in ("http", "https"):
        told = "it is no http or https URL: receivers could not follow the links in a call"
        yield warning("webhook-links", "webhooks.public_url", told, "such as https://images.example.com")
    if own.allow_private:
        told = "on: orders may have the server call addresses of its own network"
        yield warning("webhook-private", "webhooks.allow_private", told, "off, unless the receivers are there")
    for entry in own.allowed_hosts:
        yield from _webhook_host(entry, allow_private=own.allow_private)


def _webhook_host(entry: str, *, allow_private: bool) -> Iterator[Finding]:
    host = host_of(entry)
    if host.startswith("*."):
        return
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        told = f"{entry} has no address here"
        yield warning("webhook-host", "webhooks.allowed_hosts", told, "mend the name, or the DNS of this machine")
        return
    private = [each for each in sorted(found) if not public(each.partition("%")[0])]
    if private and not allow_private:
        told = f"{entry} is {private[0]}, which is not public: calls are refused"
        yield fault("webhook-not-public", "webhooks.allowed_hosts", told, "webhooks.allow_private, or another host")
    else:
        yield ok("webhooks", "webhooks.allowed_hosts", f"{entry} is {', '.join(sorted(found))}")


def _tracing(settings: Settings) -> Iterator[Finding]:
    """An empty call of OTLP is a whole one."""
    own = settings.tracing
    if own.endpoint is None:
        return
    headers = header_pairs(own.headers.get_secret_value()) if own.headers else {}
    place = shown_url(own.endpoint)
    try:
        answer = httpx.post(
            own.endpoint, content=b"", headers={**headers, "content-type": "application/x-protobuf"}, timeout=_CALL_S
        )
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError):
        told = f"{place} does not answer: spans are lost, jobs are not"
        yield warning("tracing-away", "tracing.endpoint", told, "start the collector, or mend the URL")
        return
    if answer.is_success:
        yield ok("tracing", "tracing.endpoint", f"{place} takes spans")
    elif answer.status_code in (401, 403):
        told = f"{place} wants other headers ({answer.status_code})"
        yield warning("tracing-refused", "tracing.headers", told, "the collector's key: name=value")
    else:
        told = f"{place} answers {answer.status_code}"
        yield warning("tracing-refused", "tracing.endpoint", told, "the URL of OTLP over HTTP ends with /v1/traces")
