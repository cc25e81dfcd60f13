"""What a server's own counters say of its text: forwards, and units by tier and sign. And how its cache is emptied."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.report.scrape import LINGER_S, values
from loadtest.report.series import Key
from serve.domain.text import Tier
from serve.errors import OperatorError

ROWS, UNITS = "tandem_encoder_forward_rows_total", "tandem_text_units_total"
_PATIENCE_S = 60.0
"""Until then counters must have told of everything, and processes have forgotten everything."""
_POLL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """`rows` of token ids went through encoders; `units` that jobs read, by (tier, sign)."""

    rows: int = 0
    units: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, page: Mapping[Key, float]) -> Counts:
        rows, units = 0, defaultdict[tuple[str, str], int](int)
        for (name, pairs), value in page.items():
            labels = dict(pairs)
            if name == ROWS:
                rows += round(value)
            elif name == UNITS:
                units[labels["tier"], labels["sign"]] += round(value)
        return cls(rows=rows, units=dict(units))

    def since(self, before: Counts) -> Counts:
        units = {key: number - before.units.get(key, 0) for key, number in self.units.items()}
        return Counts(rows=self.rows - before.rows, units={key: number for key, number in units.items() if number})

    @property
    def all_units(self) -> int:
        return sum(self.units.values())

    def rate(self, tier: str, sign: str | None = None) -> float | None:
        """The share of the units of a sign, or of all, that came from a tier. None where there were none."""
        whole = sum(number for (_, s), number in self.units.items() if sign in (None, s))
        part = sum(number for (t, s), number in self.units.items() if t == tier and sign in (None, s))
        return part / whole if whole else None

    def hit_rate(self, sign: str | None = None) -> float | None:
        """The share of the units that were nobody's forward pass."""
        encoded = self.rate(Tier.ENCODED, sign)
        return None if encoded is None else 1.0 - encoded


class Meter:
    """Reads one server. Owns: the connection to it; an async context manager."""

    def __init__(
        self,
        url: str,
        metrics_url: str | None = None,
        *,
        linger_s: float = LINGER_S,
        patience_s: float = _PATIENCE_S,
        poll_s: float = _POLL_S,
    ) -> None:
        """Without a page of metrics there are no counts. `linger_s` is within what every process has told of what it
        did; beyond that `patience_s` are waited."""
        self._metrics_url = metrics_url
        self._linger_s = linger_s
        self._patience_s = patience_s
        self._poll_s = poll_s
        self._http = httpx.AsyncClient(base_url=url, timeout=10.0, trust_env=False)

    async def __aenter__(self) -> Meter:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def counts(self) -> Counts:
        """Of the page as it is now. Raises OperatorError where it can't be read."""
        assert self._metrics_url is not None
        try:
            answer = (await self._http.get(self._metrics_url)).raise_for_status()
            return Counts.of(values(answer.text))
        except (httpx.HTTPError, ValueError) as error:
            raise OperatorError(f"metrics {self._metrics_url}: {error}") from None

    async def settled(self, before: Counts | None = None, units: int = 0) -> Counts:
        """The counts when all processes have told what they did before this call: each does so within the interval of
        Ray's export, and what is told is no longer less than `units` more than `before`.

        Raises OperatorError where the server goes on counting or never tells of so many.
        """
        began = changed = time.monotonic()
        last = await self.counts()
        while True:
            now = time.monotonic()
            told = last.all_units - (before.all_units if before else 0)
            if now - changed >= self._linger_s and told >= units:
                return last
            if now - began > self._linger_s + self._patience_s:
                raise OperatorError(
                    f"the server has told of {told} text units, not of {units}, after {now - began:.0f} s"
                )
            await asyncio.sleep(self._poll_s)
            found = await self.counts()
            if found != last:
                last, changed = found, time.monotonic()

    async def empty(self) -> None:
        """Every embedding is gone from Redis and from every process's memory when this returns. Raises OperatorError
        where a process goes on keeping some, and where the server does not answer."""
        await self._cache("DELETE")
        deadline = time.monotonic() + self._patience_s
        while any(process["entries"] for process in (await self._cache("GET"))["processes"]):
            if time.monotonic() > deadline:
                raise OperatorError(
                    f"the cache of {self._http.base_url} is not empty {self._patience_s:.0f} s after a clear"
                )
            await asyncio.sleep(self._poll_s)

    async def ready(self) -> None:
        """Returns when the server says that it is; on a machine that others load, a replica may miss a look at its
        health. Raises OperatorError where that lasts."""
        deadline = time.monotonic() + self._patience_s
        while why := await self._unready():
            if time.monotonic() > deadline:
                raise OperatorError(f"the server is not ready for {self._patience_s:.0f} s: {why}")
            await asyncio.sleep(self._poll_s)

    async def _unready(self) -> str:
        """Why; empty where it is ready."""
        try:
            answer = await self._http.get("/readyz")
        except httpx.HTTPError as error:
            return str(error) or type(error).__name__
        return "" if answer.status_code == httpx.codes.OK else f"{answer.status_code} {answer.text[:500]}"

    async def _cache(self, method: str) -> dict[str, Any]:
        """Raises OperatorError."""
        try:
            answer = await self._http.request(method, "/v1/cache")
            found: dict[str, Any] = answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise OperatorError(
                f"{method} /v1/cache of {self._http.base_url}: {str(error) or type(error).__name__}"
            ) from None
        return found
