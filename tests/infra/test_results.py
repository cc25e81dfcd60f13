import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from support.small_s3 import SmallS3, a_bucket, one_at_a_time, s3_settings

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results.keys import CONTENT_TYPES, checked, content_type, input_key, manifest_key, reference, split
from serve.results.store import ResultStore, Stored, open_store
from serve.settings.stores import ResultSettings

KEY = "0123456789abcdef/0.png"


@pytest.fixture
def bucket(s3_endpoint: str) -> Iterator[str]:
    """URL of an S3 server that has the bucket."""
    with a_bucket(s3_endpoint):
        yield s3_endpoint


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    if request.param == "local":
        return open_store(ResultSettings(), tmp_path)
    return open_store(s3_settings(request.getfixturevalue("bucket")), tmp_path)


def test_put_once_get_delete(store: ResultStore) -> None:
    async def story() -> None:
        await store.check()
        await store.check()
        with pytest.raises(JobNotFound):
            await store.get(KEY)
        assert await store.size(KEY) is None
        await store.put("0123456789abcdef/1.png", b"the other", "image/png")
        for data in (b"first", b"", os.urandom(1 << 20)):
            assert await store.put(KEY, data, "image/png") == Stored(len(data), True)
            assert await store.put(KEY, b"second", "image/png") == Stored(len(data), False)
            assert await store.get(KEY) == data
            assert await store.size(KEY) == len(data)
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
        "a/image.png",
        "a/Image-01234567.png",
        "a/image-0123456.png",
        "a/image-0123456G.png",
        "a/image-01234567.jpg",
        "a/../manifest.json",
        "/manifest.json",
        "a/manifest.json\n",
        "a/other.json",
        "../a/0.png",
        "/a/0.png",
        "a/../0.png",
        "a/b/0.png",
        "a/0.png\n",
        "a/0.jpeg",
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
            key = input_key(job_id, field, "00c0ffee")
            await store.put(key, field.encode(), "image/png")
            assert await store.get(checked(key)) == field.encode()
            assert split(reference(key)) == (job_id, field)
            await store.delete(key)

    asyncio.run(story())
    assert content_type(manifest_key(job_id)) == "application/json"
    with pytest.raises(ValueError, match="not the key of a picture"):
        reference(manifest_key(job_id))
    assert split(f"{job_id}/12") == (job_id, "12")
    for other in (
        f"{job_id}/12345",
        f"{job_id}/image.png",
        f"{job_id}/..",
        f"{job_id}/0\n",
        f"{job_id}/manifest",
        "a/0",
        "iVBORw0KGgo=",
    ):
        assert split(other) is None


def test_of_concurrent_writers_one_is_first_and_stays(store: ResultStore) -> None:
    versions = [bytes([number]) * (100_000 + number) for number in range(8)]

    async def story() -> None:
        writes = asyncio.gather(*(store.put(KEY, data, "image/png") for data in versions))
        while not writes.done():
            with contextlib.suppress(JobNotFound):
                assert await store.get(KEY) in versions
        first = await store.get(KEY)
        told = await writes
        assert {each.bytes for each in told} == {len(first)}
        assert [data for data, each in zip(versions, told, strict=True) if each.created] == [first]

    with one_at_a_time():
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


def test_a_bucket_that_clients_cannot_reach_has_no_url(bucket: str, tmp_path: Path) -> None:
    assert open_store(s3_settings(bucket, presign=False), tmp_path).url(KEY) is None


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


@pytest.mark.parametrize("whole_job", [False, True])
def test_a_deletion_leaves_what_is_being_written_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_job: bool
) -> None:
    store = open_store(ResultSettings(), tmp_path)
    real, deleted = os.fsync, []

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if not deleted:
            deleted.append(True)
            asyncio.run(store.delete_job("0123456789abcdef") if whole_job else store.delete(KEY))

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
            key = input_key("0" * 32, field, "00c0ffee")
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
def test_a_full_disk_leaves_no_part_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(ResultSettings(), tmp_path)
    other = "0123456789abcdef/1.png"
    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args: real_open(Path("/dev/full") if self.suffix == ".tmp" else self, "wb")
    )
    with pytest.raises(BackendUnavailable):
        asyncio.run(store.put(KEY, bytes(1 << 20), "image/png"))
    assert not list((tmp_path / "images").iterdir())
    with pytest.raises(OperatorError, match=r"^data_dir: .* can't be written: No space"):
        asyncio.run(store.check())
    monkeypatch.undo()
    asyncio.run(store.put(other, b"other", "image/png"))
    assert asyncio.run(store.put(KEY, b"new", "image/png")).created
    assert sorted(file.name for file in (tmp_path / "images" / "0123456789abcdef").iterdir()) == ["0.png", "1.png"]


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


@pytest.mark.parametrize(("refusals", "stored"), [(1, True), (100, False)])
def test_s3_that_refuses_for_a_moment_is_asked_again_but_not_for_ever(
    tmp_path: Path, refusals: int, stored: bool
) -> None:
    with SmallS3() as server:
        store = open_store(s3_settings(server.url), tmp_path)
        asyncio.run(store.check())
        server.answer(*["503"] * refusals)
        before = len(server.asked)
        if stored:
            assert asyncio.run(store.put(KEY, b"an image", "image/png")).created
            assert server.objects[f"images/{KEY}"].data == b"an image"
        else:
            with pytest.raises(BackendUnavailable):
                asyncio.run(store.put(KEY, b"an image", "image/png"))
        assert len(server.asked) - before == (2 if stored else 3)
