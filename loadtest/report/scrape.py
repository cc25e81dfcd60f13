"""Reading a server's Prometheus pages every few seconds during a run."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.report.series import RAY_EXPORT_S, Key, Page, Series
from serve.errors import OperatorError

NAMES = frozenset(
    {
        "tandem_encoder_forward_rows_total",
        "tandem_encoder_forwards_total",
        "tandem_engine_image_steps_total",
        "tandem_engine_out_of_memory_total",
        "tandem_engine_steps_total",
        "tandem_backlog_seconds",
        "tandem_cache_errors_total",
        "tandem_job_store_errors_total",
        "tandem_jobs_total",
        "tandem_queue_age_seconds",
        "tandem_queue_depth",
        "tandem_replica_capacity_images",
        "tandem_replica_images",
        "tandem_replicas",
        "tandem_replicas_wanted",
        "tandem_text_units_total",
        "tandem_unfinished_jobs",
    }
)
"""What is kept of a page, by the names of `serve.telemetry.metrics`. Ray exports them with `ray_` in front."""
LINGER_S = RAY_EXPORT_S + 2.0
"""After a run, until Ray has exported what its end came to."""
EVERY_S = RAY_EXPORT_S / 2
"""Between two looks. A page is work for Ray's agent, on cores that are being measured, and changes less often."""
_LINE = re.compile(rf"^(?:# TYPE )?(?:ray_)?(?:{'|'.join(sorted(NAMES))})[{{ ]")
_TIMEOUT_S = 5.0


class Scraper:
    """Reads pages from entering to leaving, every `every_s` seconds. A page that does not answer is a gap.

    Owns: its HTTP connections, and the task that reads.
    """

    def __init__(self, urls: str | Sequence[str], every_s: float = EVERY_S, *, linger_s: float = 0.0) -> None:
        """`urls` are the pages of one server: Ray's export has one for each node. `linger_s`: goes on reading for so
        long when the block has ended well. Raises OperatorError for what is no address."""
        self._urls = (urls,) if isinstance(urls, str) else tuple(urls)
        for url in self._urls:
            if not url.startswith(("http://", "https://")):
                raise OperatorError(f"metrics {url}: write the http:// address of a Prometheus page", "metrics")
        self._every_s = every_s
        self._linger_s = linger_s
        self._pages: list[Page] = []
        self._known: dict[Key, Key] = {}

    @property
    def series(self) -> Series:
        """What was read so far."""
        return Series(tuple(self._pages))

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, follow_redirects=True)
        await self._look()  # counters are counted from here
        self._task = asyncio.create_task(self._again())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._urls:
                await asyncio.sleep(self._linger_s)
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])
            if kind is None:
                await self._look()
            await self._http.aclose()

    async def _again(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._every_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            await self._look()

    async def _look(self) -> None:
        at = time.time()
        self._pages += await asyncio.gather(*(self._read(url, at) for url in self._urls))

    async def _read(self, url: str, at: float) -> Page:
        try:
            answer = await self._http.get(url)
            answer.raise_for_status()
            found = values(answer.text)
        except httpx.HTTPStatusError as error:
            return Page(at=at, url=url, error=f"status {error.response.status_code}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Page(at=at, url=url, error=f"no answer ({type(error).__name__})")
        except ValueError:
            return Page(at=at, url=url, error="not a Prometheus page")
        # The same few keys on every page: kept once.
        return Page(at=at, url=url, values={self._known.setdefault(key, key): value for key, value in found.items()})


def values(text: str) -> Mapping[Key, float]:
    """The metrics of `NAMES` on a Prometheus page. Raises ValueError for one that is none.

    A page of Ray's has thousands of lines of its own, and the parser takes its time for each: they are passed over.
    """
    if text.strip() and "# TYPE " not in text:
        raise ValueError("no metric has a type")
    lines = "".join(f"{line}\n" for line in text.splitlines() if _LINE.match(line))
    return {
        (sample.name.removeprefix("ray_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(lines)
        for sample in family.samples
    }
