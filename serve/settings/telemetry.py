"""Settings of what a server tells of itself: metrics, traces, logs."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import unquote

from pydantic import Field, SecretStr, field_validator

from serve.settings.room import Room

_COLLECTOR = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^\s@?#]*)?")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
HEADERS_FORM = "name=value, with commas between them and values URL-encoded"


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


def header_pairs(text: str) -> dict[str, str]:
    """Names and values of `tracing.headers`. Raises ValueError."""
    pairs = {}
    for pair in filter(None, (each.strip() for each in text.split(","))):
        name, _, value = (part.strip() for part in pair.partition("="))
        value = unquote(value).strip()
        if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()) or not value:
            raise ValueError(HEADERS_FORM)
        pairs[name.lower()] = value
    return pairs
