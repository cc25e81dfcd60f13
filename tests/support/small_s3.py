"""S3 for tests: a bucket on moto's server, and a small server that does what moto does not."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import pytest
from moto.s3.responses import S3Response
from pydantic import SecretStr

from serve.settings.stores import ResultSettings, S3Settings

BUCKET = "tandem-tests"


def s3_settings(endpoint: str, **changes: object) -> ResultSettings:
    s3 = {
        "bucket": BUCKET,
        "endpoint_url": endpoint,
        "region": "us-east-1",
        "access_key_id": "key",
        "secret_access_key": SecretStr("secret"),
        **changes,
    }
    return ResultSettings(store="s3", s3=S3Settings(**s3))  # type: ignore[arg-type]


@contextlib.contextmanager
def a_bucket(endpoint: str, versioned: bool = False) -> Iterator[Any]:
    """A client of the server, which has `BUCKET` until the block ends."""
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    client.create_bucket(Bucket=BUCKET)
    if versioned:
        client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    yield client
    listed = client.list_object_versions(Bucket=BUCKET)
    for entry in [*listed.get("Versions", []), *listed.get("DeleteMarkers", [])]:
        client.delete_object(Bucket=BUCKET, Key=entry["Key"], VersionId=entry["VersionId"])
    client.delete_bucket(Bucket=BUCKET)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """moto looks for the object and puts it in two steps; a real server does both in one."""
    lock, real = threading.Lock(), S3Response.put_object

    def put_object(self: S3Response) -> Any:
        with lock:
            return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        yield


@dataclass
class Object:
    data: bytes
    headers: dict[str, str]
    puts: int = 1


@dataclass
class SmallS3:
    """One bucket in memory. `once` is what it does of `If-None-Match: *`: `honoured`, `ignored`, or a status that it
    refuses the header with. `lists` False: it takes no lists of objects to delete.

    Owns: its listening socket and threads.
    """

    once: str = "honoured"
    lists: bool = True
    objects: dict[str, Object] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """`METHOD key` of every request."""
    _next: list[str] = field(default_factory=list)

    def answer(self, *how: str) -> None:
        """How the requests from now on are answered, one each: a status, `lost` (the work is done, and the connection
        ends without an answer) or `done` (as usual)."""
        self._next = list(how)

    def __enter__(self) -> Self:
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"s3": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, key: str, data: bytes, headers: dict[str, str]) -> int:
        if "if-none-match" in headers:
            if self.once.isdecimal():
                return int(self.once)
            if self.once == "honoured" and key in self.objects:
                return 412
        puts = self.objects[key].puts + 1 if key in self.objects else 1
        self.objects[key] = Object(data, headers, puts)
        return 200


class _Handler(BaseHTTPRequestHandler):
    s3: SmallS3
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        place = urlsplit(self.path)
        key, query = unquote(place.path).removeprefix(f"/{BUCKET}").lstrip("/"), parse_qs(place.query, True)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.s3.lock:
            self.s3.asked.append(f"{self.command} {key}")
            how = self.s3._next.pop(0) if self.s3._next else "done"
            status, headers, data = (int(how), {}, b"") if how.isdecimal() else self._done(key, query, body)
        if how == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _done(self, key: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        objects = self.s3.objects
        if self.command == "PUT":
            return self.s3.put(key, body, {name.lower(): value for name, value in self.headers.items()}), {}, b""
        if self.command == "DELETE":
            objects.pop(key, None)
            return 204, {}, b""
        if "list-type" in query:
            found = [name for name in sorted(objects) if name.startswith(query["prefix"][0])]
            rows = "".join(f"<Contents><Key>{name}</Key></Contents>" for name in found)
            return 200, {}, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        if self.command == "POST":
            return 400 if not self.s3.lists else 500, {}, b"<Error><Code>MissingContentMD5</Code></Error>"
        if key not in objects:
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        told = {name: value for name, value in objects[key].headers.items() if name.startswith("x-amz-meta-")}
        return 200, told, objects[key].data

    def log_message(self, format: str, *args: object) -> None:
        pass


for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
    setattr(_Handler, f"do_{method}", _Handler._serve)
