import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import pytest
from pydantic import SecretStr

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results.keys import CONTENT_TYPES, checked, content_type, input_key, reference, split
from serve.results.store import ResultStore, open_store
from serve.settings import ResultSettings, S3Settings

KEY = "0123456789abcdef/0.png"
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


@pytest.fixture
def bucket(s3_endpoint: str) -> Iterator[str]:
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    client.create_bucket(Bucket=BUCKET)
    yield s3_endpoint
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    if request.param == "local":
        return open_store(ResultSettings(), tmp_path)
    return open_store(s3_settings(request.getfixturevalue("bucket")), tmp_path)


def test_put_get_replace_delete(store: ResultStore) -> None:
    async def story() -> None:
        await store.check()
        await store.check()
        with pytest.raises(JobNotFound):
            await store.get(KEY)
        for data in (b"first", b"", os.urandom(1 << 20)):
            await store.put(KEY, data, "image/png")
            assert await store.get(KEY) == data
        await store.put("0123456789abcdef/1.png", b"the other", "image/png")
        await store.delete(KEY)
        await store.delete(KEY)
        with pytest.raises(JobNotFound):
            await store.get(KEY)
        assert await store.get("0123456789abcdef/1.png") == b"the other"

    asyncio.run(story())


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a.png",
        "a/images.png",
        "a/mask",
        "a/Image.png",
        "../a/0.png",
        "/a/0.png",
        "a/../0.png",
        "a/b/0.png",
        "a/0.png\n",
        "a/0.jpeg",
        "a/image.jpg",
        "é/0.png",
        "a/.png",
    ],
)
def test_a_key_of_another_shape_is_refused(store: ResultStore, key: str) -> None:
    async def story() -> None:
        with pytest.raises(ValueError, match="not a result key"):
            await store.put(key, b"", "image/png")
        with pytest.raises(ValueError, match="not a result key"):
            await store.get(key)
        with pytest.raises(ValueError, match="not a result key"):
            await store.delete(key)

    asyncio.run(story())


def test_what_a_job_starts_from_has_keys_of_its_own(store: ResultStore) -> None:
    job_id = "0" * 32

    async def story() -> None:
        for extension, kind in CONTENT_TYPES.items():
            key = checked(f"{job_id}/3.{extension}")
            await store.put(key, b"drawn", kind)
            assert (await store.get(key), content_type(key)) == (b"drawn", kind)
            assert split(reference(key)) == (job_id, "3")
            await store.delete(key)
        for field in ("image", "mask"):
            key = input_key(job_id, field)
            await store.put(key, field.encode(), "image/png")
            assert await store.get(checked(key)) == field.encode()
            assert split(reference(key)) == (job_id, field)
            await store.delete(key)

    asyncio.run(story())
    assert split(f"{job_id}/12") == (job_id, "12")
    for other in (f"{job_id}/12345", f"{job_id}/image.png", f"{job_id}/..", f"{job_id}/0\n", "a/0", "iVBORw0KGgo="):
        assert split(other) is None


def test_concurrent_writers_leave_one_whole_image(store: ResultStore) -> None:
    versions = [bytes([number]) * 200_000 for number in range(8)]

    async def story() -> None:
        await store.put(KEY, versions[0], "image/png")
        writes = asyncio.gather(*(store.put(KEY, data, "image/png") for data in versions))
        while not writes.done():
            assert await store.get(KEY) in versions
        await writes
        assert await store.get(KEY) in versions

    asyncio.run(story())


def test_a_presigned_url_is_a_get_for_a_while(bucket: str, tmp_path: Path) -> None:
    store = open_store(s3_settings(bucket, url_ttl_s=60), tmp_path)
    asyncio.run(store.put(KEY, b"an image", "image/png"))
    url = store.url(KEY)
    assert url is not None
    assert "X-Amz-Expires=60" in url
    with urlopen(url) as answer:
        assert answer.read() == b"an image"
        assert answer.headers["Content-Type"] == "image/png"
    absent = store.url("absent/0.png")
    assert absent is not None
    with pytest.raises(HTTPError):
        urlopen(absent)


def test_local_files_have_no_url_and_leave_no_folder(tmp_path: Path) -> None:
    store = open_store(ResultSettings(), tmp_path)
    assert store.url(KEY) is None

    async def story() -> None:
        await store.put(KEY, b"x", "image/png")
        # What a writer that was killed before its rename leaves behind:
        (tmp_path / "images" / "0123456789abcdef" / ".0.png.00.tmp").write_bytes(b"half")
        await store.delete(KEY)

    asyncio.run(story())
    assert not list((tmp_path / "images").iterdir())


def test_a_deletion_leaves_what_is_being_written_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(ResultSettings(), tmp_path)
    real, deleted = os.fsync, []

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if not deleted:
            deleted.append(True)
            asyncio.run(store.delete(KEY))

    monkeypatch.setattr(os, "fsync", fsync)
    writing = threading.Thread(target=lambda: asyncio.run(store.put(KEY, b"new", "image/png")))
    writing.start()
    writing.join()
    assert asyncio.run(store.get(KEY)) == b"new"
    assert [file.name for file in (tmp_path / "images" / "0123456789abcdef").iterdir()] == ["0.png"]


def test_folders_that_deletions_take_away_are_made_again(tmp_path: Path) -> None:
    """Both pictures of one job, put and deleted over and over by threads: no put fails, no file is lost or left."""
    store = open_store(ResultSettings(), tmp_path)

    async def story(field: str) -> None:
        for turn in range(300):
            key = input_key("0" * 32, field)
            await store.put(key, str(turn).encode(), "image/png")
            assert await store.get(key) == str(turn).encode()
            await store.delete(key)

    async def both() -> None:
        await asyncio.gather(story("image"), story("mask"))

    asyncio.run(both())
    assert not list((tmp_path / "images").iterdir())


def test_local_folder_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file")
    store = open_store(ResultSettings(), tmp_path)
    with pytest.raises(OperatorError, match=r"^data_dir: .* can't be written: ") as refused:
        asyncio.run(store.check())
    assert refused.value.param == "data_dir"
    with pytest.raises(BackendUnavailable) as away:
        asyncio.run(store.put(KEY, b"x", "image/png"))
    assert away.value.retry_after_s


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_image_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(ResultSettings(), tmp_path)
    asyncio.run(store.put(KEY, b"old", "image/png"))
    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args: real_open(Path("/dev/full") if self.suffix == ".tmp" else self, "wb")
    )
    with pytest.raises(BackendUnavailable):
        asyncio.run(store.put(KEY, bytes(1 << 20), "image/png"))
    monkeypatch.undo()
    assert asyncio.run(store.get(KEY)) == b"old"
    assert [file.name for file in (tmp_path / "images" / "0123456789abcdef").iterdir()] == ["0.png"]


def test_s3_set_up_wrong_names_the_setting(bucket: str, tmp_path: Path) -> None:
    store = open_store(s3_settings(bucket, bucket="absent"), tmp_path)
    with pytest.raises(OperatorError, match=r"^results\.s3\.bucket: .*NoSuchBucket") as refused:
        asyncio.run(store.check())
    assert refused.value.param == "results.s3.bucket"
    with pytest.raises(OperatorError, match=r"^results\.s3: ") as refused:
        open_store(s3_settings("not a url"), tmp_path)
    assert "\n" not in str(refused.value)


def test_s3_away_is_said_in_bounded_time(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        store = open_store(s3_settings(f"http://127.0.0.1:{taken.getsockname()[1]}"), tmp_path)
        for call in (store.put(KEY, b"x", "image/png"), store.get(KEY), store.delete(KEY), store.check()):
            started = time.monotonic()
            with pytest.raises(BackendUnavailable) as away:
                asyncio.run(call)
            assert time.monotonic() - started < 10
            assert away.value.param == "results.s3"
            assert away.value.retry_after_s


class _Flaky(BaseHTTPRequestHandler):
    """Answers 503 as often as told, then 200; counts what it was asked."""

    refusals = 0
    asked = 0
    stored = b""

    def do_PUT(self) -> None:
        kind = type(self)
        kind.asked += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if kind.asked <= kind.refusals:
            self.send_response(503)
        else:
            kind.stored = body
            self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(("refusals", "stored"), [(1, True), (100, False)])
def test_s3_that_refuses_for_a_moment_is_asked_again_but_not_for_ever(
    tmp_path: Path, refusals: int, stored: bool
) -> None:
    handler = type("Handler", (_Flaky,), {"refusals": refusals, "asked": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = open_store(s3_settings(f"http://127.0.0.1:{server.server_port}"), tmp_path)
        if stored:
            asyncio.run(store.put(KEY, b"an image", "image/png"))
            assert handler.stored == b"an image"
        else:
            with pytest.raises(BackendUnavailable):
                asyncio.run(store.put(KEY, b"an image", "image/png"))
        assert handler.asked == (2 if stored else 3)
    finally:
        server.shutdown()
        server.server_close()
