"""A small real HTTP server that speaks every dialect of a load test and does with an order what its prompt says."""

import base64
import contextlib
import json
import select
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PICTURE = b"\x89PNG and so on"
WAIT_S = 20.0


class Obedient(ThreadingHTTPServer):
    """`together`: orders that say so are answered when so many are there. Counts requests by method and path without
    ids, and callers who left."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, together: int = 1) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.together = threading.Barrier(together)
        self.seen: Counter[str] = Counter()
        self.connections = 0
        self.left = threading.Semaphore(0)
        self.jobs: dict[str, str] = {}
        self.resumed_from: list[str] = []
        self.keys: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client who left is not the server's error."""


@contextlib.contextmanager
def obedient(together: int = 1) -> Iterator[Obedient]:
    server = Obedient(together)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Obedient

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        path = urlsplit(self.path)
        self.server.seen[f"POST {path.path}"] += 1
        self.server.keys.add(self.headers.get("Authorization", ""))
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wish = order["prompt"]
        if wish == "hang up":
            self.close_connection = True
        elif wish == "together":
            self.server.together.wait(WAIT_S)
        elif wish == "never":
            select.select([self.connection], [], [], WAIT_S)
            self.server.left.release()
            self.close_connection = True
        elif wish in ("refuse", "rude"):
            error = self._error("queue_full")
            return self._answer(503, error, {"Retry-After": "7"} if wish == "refuse" else {})
        elif wish in ("invalid", "fail"):
            return self._answer(422 if wish == "invalid" else 500, self._error(wish))
        if not self.close_connection:
            self._take(path.path, path.query, order)
        return None

    def _error(self, code: str) -> dict[str, Any]:
        a1111 = self.path.startswith("/sdapi")
        return {"error": code, "detail": "no"} if a1111 else {"error": {"code": code, "message": "no"}}

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        parts = path.strip("/").split("/")
        self.server.seen["GET " + "/".join(part for part in parts if part not in self.server.jobs)] += 1
        if path == "/readyz":
            self._answer(200, {"ready": True})
        elif path == "/v1/models":
            self._answer(200, {"data": [MODEL]})
        elif parts[-1] == "events" and self._wish(parts[-2]) == "no stream":
            self._answer(404, {"error": {"code": "not_found", "message": "no"}})
        elif parts[-1] == "events":
            self._events(parts[-2])
        elif parts[:2] == ["v1", "jobs"]:
            self._answer(200, self._job(parts[2]))
        elif parts[0] == "status":
            told = {"status": "SUCCESS", "result": {"url": f"/outputs/{parts[1]}.png"}}
            self._answer(200, told if self._wish(parts[1]) != "job fails" else {"status": "FAILURE", "error": "no"})
        elif parts[:2] == ["v1", "images"] and self._wish(parts[2]) == "moved":
            self._answer(307, None, {"Location": f"{self.server.url}/outputs/{parts[2]}.png?signed=yes"})
        else:
            self._answer(200, PICTURE)

    def _take(self, path: str, query: str, order: dict[str, Any]) -> None:
        job_id = f"{len(self.server.jobs):032x}"
        self.server.jobs[job_id] = order["prompt"]
        if path == "/v1/embeddings":
            self._answer(200, {"cache": {"memory": 1, "redis": 0, "encoded": 0}, "truncated": [], "asked": order})
        elif path == "/generate":
            synchronous = order["prompt"] != "job fails" and order.get("seed") != 202
            self._answer(*(200, PICTURE) if synchronous else (202, {"job_id": job_id}))
        elif path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
            self._draw(path, job_id)
        elif query == "wait=true":
            self._answer(200, self._job(job_id))
        else:
            self._answer(202, {"id": job_id, "state": "queued"})

    def _draw(self, path: str, job_id: str) -> None:
        if self._wish(job_id) == "job fails":
            return self._answer(500, self._error("out_of_memory"))
        file = base64.b64encode(PICTURE).decode()
        answer = {"data": [{"b64_json": file}]} if path.startswith("/v1") else {"images": [file], "info": "{}"}
        return self._answer(200, answer, {"Location": f"/v1/jobs/{job_id}"})

    def _wish(self, job_id: str) -> str:
        return self.server.jobs[job_id]

    def _job(self, job_id: str) -> dict[str, Any]:
        failed = self._wish(job_id) == "job fails"
        return {
            "id": job_id,
            "state": "failed" if failed else "succeeded",
            "error": {"code": "out_of_memory"} if failed else None,
            "images": [] if failed else [{"url": f"/v1/images/{job_id}/0"}],
            "timings": {"total_s": 1.0},
            "cache": {"memory": 2, "redis": 0, "encoded": 1},
        }

    def _events(self, job_id: str) -> None:
        """Told to cut, the stream ends in the middle of an event until it is resumed behind the one before."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        last = self.headers.get("Last-Event-ID", "")
        self._chunk("retry: 10\n\n")
        if not last:
            self._chunk('id: 1-0\nevent: state\ndata: {"state": "running"}\n\n')
        if self._wish(job_id) == "cut":
            if not last:
                self._chunk('id: 2-0\nevent: state\ndata: {"sta')
                self.close_connection = True
                return
            self.server.resumed_from.append(last)
        state = "failed" if self._wish(job_id) == "job fails" else "succeeded"
        self._chunk(f'id: 3-0\nevent: state\ndata: {{"state": "{state}"}}\n\n')
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, text: str) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text.encode()))
        self.wfile.flush()

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "image/png" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


MODEL: dict[str, Any] = {
    "id": "shapes",
    "images": True,
    "aspect_ratios": {"1:1": [128, 128], "3:2": [152, 104], "2:3": [104, 152], "16:9": [168, 96]},
    "schedulers": ["dpmpp_2m_karras", "euler_a", "ddim", "unipc", "euler"],
    "guidance": "classifier_free",
    "default_guidance_scale": 5.0,
}
