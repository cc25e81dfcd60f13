"""Traces of jobs, told to an OpenTelemetry collector (OTLP over HTTP): a span for each order at the ingress, below it
one for each attempt at its job, and below that one for each stage.

The only place that imports OpenTelemetry, and only once a collector is named. Spans are made of times that were taken
anyway, wait in a queue of bounded length, and are sent by a thread of their own: nothing here holds up or fails a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from serve import __version__
from serve.domain.jobs import Timings
from serve.domain.orders import ImageRequest
from serve.settings.telemetry import TracingSettings, header_pairs
from serve.stages import stages
from serve.urls import STARS, shown_url

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

Attributes = Mapping[str, str | int | float]

EVERY_S = 1.0
"""Between two calls of the collector."""
QUEUED_SPANS = 4096
"""Spans that wait at most; beyond them the oldest are dropped."""
BATCH_SPANS = 512
CALL_S = 5.0
"""That one batch may take, its repetitions included; then it is dropped."""
CLOSE_S = 2.0
"""For what is left at the end."""
JOB = "job"
"""The span of one attempt."""
SUCCEEDED = "succeeded"


def open_tracing(settings: TracingSettings, pool: str, name: str) -> Tracing | None:
    """None where no collector is named. `pool` is the kind of this process, `name` tells it from others of its kind."""
    return None if settings.endpoint is None else Tracing(settings, pool, name)


class OrderSpan:
    """The span of one order, from its arrival until its answer has gone out."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What continues the trace below this span (W3C)."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def end(self, name: str, attributes: Attributes, *, failed: bool) -> None:
        """`failed`: by the server's fault, not the client's."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(name)
        self._span.set_attributes(attributes)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Tracing:
    """Whether an order is traced is decided once: by the caller's `traceparent`, else by `sample_ratio`. Whatever is
    made of the order follows.

    Owns: the spans that wait, and the thread that sends them.
    """

    def __init__(self, settings: TracingSettings, pool: str, name: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        assert settings.endpoint is not None
        headers = header_pairs(settings.headers.get_secret_value()) if settings.headers else {}
        sender = OTLPSpanExporter(settings.endpoint, headers=headers, timeout=CALL_S)
        self._exporter = _Told(sender, settings.endpoint, tuple(headers.values()))
        told = {
            "service.namespace": "tandem",
            "service.name": f"tandem-{pool}",
            "service.version": __version__,
            "service.instance.id": name,
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create(told),
            shutdown_on_exit=False,
        )
        queue = BatchSpanProcessor(cast("SpanExporter", self._exporter), QUEUED_SPANS, 1000 * EVERY_S, BATCH_SPANS)
        self._provider.add_span_processor(queue)
        self._tracer = self._provider.get_tracer("tandem", __version__)

    def order(self, traceparent: str | None) -> OrderSpan:
        """Begin the span of an order that has just arrived; a `traceparent` that can't be read begins a trace."""
        from opentelemetry.trace import SpanKind

        return OrderSpan(self._tracer.start_span("order", _parent(traceparent), SpanKind.SERVER))

    def attempt(
        self,
        traceparent: str | None,
        timings: Timings,
        *,
        since_s: float,
        outcome: str,
        request: ImageRequest,
        attributes: Attributes,
    ) -> None:
        """The spans of an attempt that was just settled, whose last stage ended `since_s` ago. They begin where it
        joined the queue: what came before it has spans of its own.

        Of `batch` and `steps`, and of the VAE's waits and work, which take turns, each is told as one span.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        chain = [(name, seconds) for name, seconds in stages(timings) if name not in ("admission", "retried", "told")]
        now = time.time_ns()
        at = now - _ns(since_s + sum(seconds for _, seconds in chain))
        told = {**attributes, **_told(request, timings, outcome)}
        span = self._tracer.start_span(JOB, _parent(traceparent), SpanKind.CONSUMER, told, start_time=at)
        if span.is_recording():
            below = set_span_in_context(span)
            for name, seconds in chain:
                stage = self._tracer.start_span(name, below, attributes=_of_stage(name, timings), start_time=at)
                at += _ns(seconds)
                stage.end(at)
        if outcome in ("failed", "retried"):
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)

    async def close(self) -> None:
        """Send what is left, for as long as CLOSE_S."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody waits for it any more
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, name="last spans", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await sent.wait()
        self._exporter.shutdown()


class _Told:
    """The exporter, whose failures are told once, by us: the library would tell each batch."""

    def __init__(self, exporter: SpanExporter, endpoint: str, secrets: Sequence[str]) -> None:
        """`secrets` are told to nobody, whatever the library says of them."""
        self._exporter = exporter
        self._secrets = secrets
        self._place = shown_url(endpoint)
        self._failing = False
        self._reason = _Reason()
        self._open = True
        for name in ("opentelemetry.exporter", "opentelemetry.sdk"):
            logger = logging.getLogger(name)
            logger.propagate = False
            logger.addHandler(self._reason)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        failing = result.name != "SUCCESS"
        if failing and not self._failing:
            reason = self._reason.text
            for secret in self._secrets:
                reason = reason.replace(secret, STARS)
            log.warning("tracing.endpoint: spans are dropped: %s takes none: %s", self._place, reason)
        elif self._failing and not failing:
            log.info("tracing.endpoint: %s takes spans again", self._place)
        self._failing = failing
        return result

    def shutdown(self) -> None:
        """May be called twice: by whoever has waited long enough, and by the queue in the end."""
        if self._open:
            self._open = False
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class _Reason(logging.Handler):
    """What the library last complained of, but for its giving up, which follows every other complaint. A queue that is
    full is no failure of the collector, and is told here, once."""

    text = "no reason is known"
    full = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "queue full" in text.lower():
            if not self.full:
                log.warning("tracing.endpoint: spans are dropped: more of them come than the collector takes")
            self.full = True
        elif "shutdown" not in text.lower():
            self.text = text


def _parent(traceparent: str | None) -> Context:
    """Empty without one: whatever this process is at besides is no part of an order's trace."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if traceparent is None:
        return Context()
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def _told(request: ImageRequest, timings: Timings, outcome: str) -> dict[str, str | int | float]:
    """What an attempt's span says: nothing that the client wrote as text but the model's name."""
    told: dict[str, str | int | float] = {
        "tandem.model": request.model,
        "tandem.task": request.task,
        "tandem.steps": request.num_inference_steps,
        "tandem.images": request.num_images,
        "tandem.width": request.width,
        "tandem.height": request.height,
        "tandem.outcome": outcome,
    }
    for stage in ("text", "steps"):
        told |= _of_stage(stage, timings)
    return told


def _of_stage(name: str, timings: Timings) -> dict[str, str | int | float]:
    if name == "text" and timings.text_from is not None:
        return {"tandem.tier": timings.text_from}
    if name == "steps" and timings.batch_images is not None:
        return {"tandem.batch_images": timings.batch_images}
    return {}


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
