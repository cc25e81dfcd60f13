"""One replica of the pool of one text encoder, without the framework that carries it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.devices import device_errors
from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.coalesce import Coalescer
from serve.encoders.codec import pack, unpack
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder
from serve.errors import BackendUnavailable, DeviceLost, GenerationFailed
from serve.settings.tree import Settings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

REMEMBERED = 1024
"""Units whose last forward is remembered, for the log of slow requests."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One row to compute, for the tenant of `salt`.

    Tenants don't share a forward under way, as they share no cache entry: a shorter wait would tell one of them what
    another has just asked for.
    """

    row: Row
    salt: str


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass: when it began (`time.perf_counter`), the seconds that it took, its rows."""

    began: float
    took_s: float
    rows: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a forward gave for one row: packed embeddings by output. Those that hold no numbers are not there."""

    values: Mapping[str, bytes]
    forward: Forward


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLoad:
    """Tokens that wait or are being encoded now; since the start, seconds in forward passes and requests."""

    queued_tokens: int
    forward_s: float
    requests: int


class EncoderPool:
    """Units in, packed embeddings out: cached where anyone has encoded them, else in one forward with all that waits.

    One forward of a row gives every output that the served models read of it: those that nobody asked for yet go to
    the cache, so that SDXL and SD 3 with the same prompt run their common encoder once.

    `lost` says that the device is broken: nothing is encoded here any more.

    Owns: the text tower, the cache in front of it (the one that writes to Redis), the queue between the two.
    """

    def __init__(self, tower: TextTower, encoder: Encoder, settings: Settings, metrics: Metrics) -> None:
        self.lost = False
        self._tower = tower
        self._encoder = encoder
        self._exact = settings.cache.values == "exact"
        self._values = settings.cache.values
        self._metrics = metrics
        self._busy_since: float | None = None
        self._forward_s = 0.0
        self._requests = 0
        self._recent: dict[EncodeUnit, Forward] = {}
        self._queue: Coalescer[Ask, Encoded] = Coalescer(
            self.encode_batch,
            length=lambda ask: len(ask.row.token_ids),
            max_batch_size=encoder.settings.max_batch_size,
            max_batch_tokens=encoder.settings.max_batch_tokens,
            on_dropped=self._on_dropped,
            on_unclaimed=lambda ask, encoded: self._cache.adopt(self._named(ask, encoded)),
            on_load=self._on_load,
            fatal=(DeviceLost,),
        )
        self._cache = EmbeddingCache(
            settings.cache,
            self._fetch,
            metrics,
            place="encoder",
            write_through=True,
            private=() if encoder.settings.redis else (encoder.fingerprint,),
            leases=encoder.settings.lease_s,
            by_row=True,
        )

    @property
    def cache(self) -> EmbeddingCache:
        return self._cache

    async def encode(self, units: Sequence[EncodeUnit], redis_away: bool = False) -> list[Fetched]:
        """In the order of `units`. `redis_away`: the caller has just found the cache Redis away. A caller that is
        cancelled takes its rows out of the queue, unless another waits for them.

        Raises what `check` raises, GenerationFailed (OutOfMemory, DeviceLost) where the forward failed.
        """
        self.check(units)
        if redis_away:
            self._cache.hear_redis_away()
        began = time.perf_counter()
        self._requests += 1
        found = await self._cache.get_many(units)
        took_s = time.perf_counter() - began
        self._metrics.observe("tandem_encode_seconds", took_s, encoder=self._encoder.name)
        if took_s > self._encoder.settings.slow_s:
            self._tell_slow([unit for unit in units if found[unit.key].tier is Tier.ENCODED], began, took_s)
        return [found[unit.key] for unit in units]

    def check(self, units: Sequence[EncodeUnit]) -> None:
        """BackendUnavailable for a unit of another encoder or projection. During a rollout they arrive here, and our
        embedding must not be stored under their key."""
        known = {f"projected:{name}" for name, _ in self._encoder.projections}
        for unit in units:
            if unit.encoder != self._tower.fingerprint or (
                unit.output.startswith("projected:") and unit.output not in known
            ):
                raise BackendUnavailable("this text encoder serves another model", "model", 1.0)

    def encode_batch(self, asks: Sequence[Ask]) -> list[Encoded]:
        """One forward, no cache; the asks have one length. Blocks; one caller at a time. Raises GenerationFailed."""
        name = self._encoder.name
        if self.lost:
            raise DeviceLost(f"text encoder {name}: the device failed")
        began = self._busy_since = time.perf_counter()
        rows = self._tower.rows
        try:
            with device_errors(f"text encoder {name}"):
                outputs = self._tower.encode([ask.row for ask in asks])
            values = [
                {output: pack(tensor, self._values) for output, tensor in row.items() if tensor.isfinite().all()}
                for row in outputs
            ]
        except DeviceLost:
            self.lost = True
            raise
        finally:
            self._busy_since = None
            self._forward_s += time.perf_counter() - began
        forward = Forward(began, time.perf_counter() - began, self._tower.rows - rows)
        self._metrics.inc("tandem_encoder_forwards_total", encoder=name)
        self._metrics.inc("tandem_encoder_forward_rows_total", forward.rows, encoder=name)
        self._metrics.observe("tandem_encoder_batch_rows", forward.rows, encoder=name)
        self._metrics.observe("tandem_encoder_forward_seconds", forward.took_s, encoder=name)
        if not self._exact:
            for output, value in values[0].items():  # of one row in each batch: the metric must not cost a forward
                exact, kept = outputs[0][output].double().flatten(), unpack(value).double().flatten()
                cosine = float(exact @ kept / (exact.norm() * kept.norm()).clamp(min=1e-30))
                self._metrics.observe("tandem_embedding_similarity", cosine, encoder=name)
        return [Encoded(each, forward) for each in values]

    @property
    def busy_s(self) -> float:
        """Seconds since the forward under way began; 0 between them."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def load(self) -> PoolLoad:
        return PoolLoad(
            queued_tokens=self._queue.queued_tokens,
            forward_s=self._forward_s + self.busy_s,
            requests=self._requests,
        )

    async def close(self) -> None:
        await self._queue.close()
        await self._cache.close()

    async def _fetch(self, units: Sequence[EncodeUnit]) -> list[Fetched]:
        """Through the queue. What the forwards gave beside `units` is adopted by the cache."""
        asks = self._asks(units)
        distinct = list(dict.fromkeys(asks))
        encoded = dict(zip(distinct, await self._queue.submit_all(distinct), strict=True))
        asked = frozenset(units)
        for ask, result in encoded.items():
            named = self._named(ask, result)
            self._cache.adopt({unit: value for unit, value in named.items() if unit not in asked})
        for unit, ask in zip(units, asks, strict=True):
            self._recent.pop(unit, None)
            self._recent[unit] = encoded[ask].forward
        while len(self._recent) > REMEMBERED:
            del self._recent[next(iter(self._recent))]
        return [Fetched(self._value(encoded[ask], unit), Tier.ENCODED) for unit, ask in zip(units, asks, strict=True)]

    def _value(self, encoded: Encoded, unit: EncodeUnit) -> bytes:
        """Raises GenerationFailed rather than keep, for a week and for everybody, what would make a black picture."""
        if unit.output not in encoded.values:
            name, dtype = self._encoder.name, self._encoder.settings.dtype
            advice = "; encoder.dtype bfloat16 or float32 has a wider range" if dtype == "float16" else ""
            raise GenerationFailed(f"text encoder {name} gave values that are no numbers{advice}")
        return encoded.values[unit.output]

    def _asks(self, units: Sequence[EncodeUnit]) -> list[Ask]:
        """The row that gives each unit: units of the same text share one."""
        return [Ask(Row.of(unit, self._tower.outputs), unit.salt) for unit in units]

    def _named(self, ask: Ask, encoded: Encoded) -> dict[EncodeUnit, bytes]:
        encoder = self._tower.fingerprint
        return {ask.row.unit(encoder, output, ask.salt): value for output, value in encoded.values.items()}

    def _on_dropped(self, _: Ask) -> None:
        self._metrics.inc("tandem_encoder_dropped_rows_total", encoder=self._encoder.name)

    def _on_load(self, queued_tokens: int) -> None:
        self._metrics.set("tandem_encoder_queue_tokens", queued_tokens, encoder=self._encoder.name)

    def _tell_slow(self, encoded: Sequence[EncodeUnit], began: float, took_s: float) -> None:
        """Sizes and times, never text: the log is not the place for what users write."""
        rows = {Row.of(unit, (unit.output,)) for unit in encoded}
        forwards = [forward for unit in encoded if (forward := self._recent.get(unit))]
        last = max(forwards, key=lambda forward: forward.began, default=Forward(began, 0.0, 0))
        figures = {
            "encoder": self._encoder.name,
            "took_s": f"{took_s:.3f}",
            "rows": len(rows),
            "tokens": sum(len(row.token_ids) for row in rows),
            "wait_s": f"{max(0.0, last.began - began):.3f}",
            "forward_s": f"{last.took_s:.3f}",
            "batch_rows": last.rows,
        }
        log.warning("a slow request for text", extra=figures)
