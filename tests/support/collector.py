"""An OpenTelemetry collector of a test's own: it takes spans over OTLP/HTTP, as `opentelemetry-proto` defines them."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

PATH = "/v1/traces"


@dataclass(frozen=True)
class Span:
    """Times in seconds; ids in hex. `service` is the name of whoever made it, `failed` its status."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start_s: float
    end_s: float
    attributes: dict[str, Any]
    failed: bool

    @property
    def took_s(self) -> float:
        return self.end_s - self.start_s


class Collector:
    """Answers every call with `status`; of those with 200 it keeps the spans. `headers` are those of the latest call.
    With `reason` that is the text of the status.

    Owns: its listening socket and its thread.
    """

    def __init__(self) -> None:
        self.status = 200
        self.reason: str | None = None
        self.calls = 0
        self.headers: dict[str, str] = {}
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = collector.take(self.path, headers, body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status, collector.reason)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{PATH}"

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def trace_of(self, job_id: str) -> list[Span]:
        """All spans of the trace which has that job's order, or else its attempts."""
        spans = self.spans
        traces = {span.trace for span in spans if span.attributes.get("tandem.job") == job_id}
        return [span for span in spans if span.trace in traces]

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        with self._lock:
            self.calls += 1
            self.headers = headers
            if path != PATH:
                return 404
            if self.status == 200:
                plain = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
                self._spans += _spans(ExportTraceServiceRequest.FromString(plain))
            return self.status

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _spans(request: ExportTraceServiceRequest) -> list[Span]:
    return [
        Span(
            service=str(_told(resource.resource.attributes)["service.name"]),
            name=span.name,
            trace=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            start_s=span.start_time_unix_nano / 1e9,
            end_s=span.end_time_unix_nano / 1e9,
            attributes=_told(span.attributes),
            failed=span.status.code == span.status.STATUS_CODE_ERROR,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _told(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
