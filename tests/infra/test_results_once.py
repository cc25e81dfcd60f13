"""Each object is stored once, whoever races, and whatever the server makes of `If-None-Match`."""

import asyncio
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.slow_proxy import SlowProxy
from support.small_s3 import BUCKET, SmallS3, a_bucket, one_at_a_time, s3_settings

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results import s3
from serve.results.keys import input_key, manifest_key
from serve.results.local import LocalStore
from serve.results.store import ResultStore, Stored, open_store
from serve.settings.stores import ResultSettings

JOB = "0123456789abcdef"
KEY = f"{JOB}/0.png"


def s3_store(url: str) -> ResultStore:
    return open_store(s3_settings(url), Path())


def test_racing_stores_make_one_version_of_each_key(s3_endpoint: str) -> None:
    """Several processes' clients; the bucket keeps every version that was ever put."""
    keys = [f"{JOB}/{index}.png" for index in range(5)]
    stores = [s3_store(s3_endpoint) for _ in range(6)]

    async def story() -> list[list[Stored]]:
        return [
            await asyncio.gather(*(store.put(key, bytes(100 + n), "image/png") for n, store in enumerate(stores)))
            for key in keys
        ]

    with a_bucket(s3_endpoint, versioned=True) as client, one_at_a_time():
        told = asyncio.run(story())
        versions = client.list_object_versions(Bucket=BUCKET)["Versions"]
    assert sorted(each["Key"] for each in versions) == [*(f"images/{key}" for key in keys), "images/writable"]
    sizes = {each["Key"]: each["Size"] for each in versions}
    for key, each in zip(keys, told, strict=True):
        assert sum(stored.created for stored in each) == 1
        assert {stored.bytes for stored in each} == {sizes[f"images/{key}"]}


@pytest.mark.parametrize("once", ["honoured", "ignored", "501", "400"])
@pytest.mark.parametrize("checked", [False, True])
def test_the_first_object_stays_whatever_the_server_has(once: str, checked: bool) -> None:
    async def story(store: ResultStore) -> None:
        if checked:
            await store.check()
        assert await store.put(KEY, b"first", "image/png") == Stored(5, True)
        assert await store.put(KEY, b"the second", "image/png") == Stored(5, False)
        assert await store.get(KEY) == b"first"
        await store.put(f"{JOB}/1.png", b"another", "image/png")

    with SmallS3(once) as server:
        asyncio.run(story(s3_store(server.url)))
        assert server.objects[f"images/{KEY}"].puts == 1
        assert server.asked.count("PUT images/writable") == 2, "that is found out once"
        put = server.objects[f"images/{KEY}"].headers
        assert put["content-type"] == "image/png"
        assert put.get("if-none-match") == ("*" if once == "honoured" else None)


def test_a_server_that_was_away_when_it_was_asked_is_asked_again() -> None:
    with SmallS3() as server:
        store = s3_store(server.url)
        server.answer(*["500"] * 3)
        with pytest.raises(BackendUnavailable):
            asyncio.run(store.put(KEY, b"first", "image/png"))
        asyncio.run(store.put(KEY, b"first", "image/png"))
        assert server.objects[f"images/{KEY}"].headers["if-none-match"] == "*"


def test_a_conflict_is_tried_again_but_not_for_ever() -> None:
    with SmallS3() as server:
        store = s3_store(server.url)
        asyncio.run(store.check())
        server.answer("409", "409")
        assert asyncio.run(store.put(KEY, b"an image", "image/png")) == Stored(8, True)
        server.answer(*["409"] * 100)
        asked = len(server.asked)
        with pytest.raises(BackendUnavailable):
            asyncio.run(store.put(f"{JOB}/1.png", b"an image", "image/png"))
        assert len(server.asked) - asked == 5
        server.answer("412")  # and the object is gone when it is looked for
        assert asyncio.run(store.put(f"{JOB}/1.png", b"an image", "image/png")) == Stored(8, True)


@pytest.mark.parametrize("once", ["honoured", "ignored"])
def test_a_put_whose_answer_was_lost_meets_its_own_object(once: str) -> None:
    with SmallS3(once) as server:
        store = s3_store(server.url)
        asyncio.run(store.check())
        server.answer(*["done"] * (once == "ignored"), "lost", "lost")
        assert asyncio.run(store.put(KEY, b"an image", "image/png")) == Stored(8, True)
        assert asyncio.run(s3_store(server.url).put(KEY, b"an image", "image/png")) == Stored(8, False)
        assert server.objects[f"images/{KEY}"].data == b"an image"


@pytest.mark.parametrize("status", ["403", "500", "503", "409"])
def test_a_store_that_refuses_has_no_part_of_the_image(status: str) -> None:
    with SmallS3() as server:
        store = s3_store(server.url)
        asyncio.run(store.check())
        server.answer(*[status] * 100)
        for call in (store.put(KEY, b"x", "image/png"), store.get(KEY), store.size(KEY), store.delete_job(JOB)):
            with pytest.raises(BackendUnavailable) as away:
                asyncio.run(call)
            assert away.value.retry_after_s
        if status == "403":
            with pytest.raises(OperatorError, match=r"^results\.s3\.access_key_id: "):
                asyncio.run(store.check())
        server.answer()
        assert list(server.objects) == ["images/writable"]
        assert asyncio.run(store.put(KEY, b"an image", "image/png")) == Stored(8, True)


def test_a_silent_store_holds_up_nothing_but_its_own_calls() -> None:
    async def story(silent: socket.socket) -> None:
        store = s3_store(f"http://127.0.0.1:{silent.getsockname()[1]}")
        puts = [asyncio.create_task(store.put(f"{JOB}/{index}.png", b"x", "image/png")) for index in range(40)]
        connection, _ = await asyncio.to_thread(silent.accept)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "done"), 10) == "done"
        assert not any(put.done() for put in puts)
        silent.close()
        connection.close()
        for put in puts:
            with pytest.raises(BackendUnavailable):
                await put

    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        asyncio.run(story(silent))


class Scissors(SlowProxy):
    """Cuts the connection after so many bytes of what the client sends, `cuts` times."""

    cuts = 0
    after = 1 << 18

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        while data := await reader.read(1 << 16):
            sent += len(data)
            if sent > self.after and self.cuts:
                self.cuts -= 1
                writer.transport.abort()
                raise OSError("cut")
            writer.write(data)
            await writer.drain()
        writer.close()


def test_an_upload_that_is_cut_leaves_nothing_and_is_made_again(s3_endpoint: str) -> None:
    data = os.urandom(1 << 20)

    async def story() -> None:
        async with Scissors(s3_endpoint) as proxy:
            store = s3_store(proxy.url)
            await store.check()
            proxy.cuts = 3
            with pytest.raises(BackendUnavailable):
                await store.put(KEY, data, "image/png")
            assert await store.size(KEY) is None
            proxy.cuts = 2
            assert await store.put(KEY, data, "image/png") == Stored(len(data), True)
            assert await store.get(KEY) == data

    with a_bucket(s3_endpoint, versioned=True) as client:
        asyncio.run(story())
        versions = client.list_object_versions(Bucket=BUCKET)["Versions"]
        assert sorted(each["Key"] for each in versions) == [f"images/{KEY}", "images/writable"]


def everything(job_id: str) -> list[str]:
    inputs = [input_key(job_id, field, "00c0ffee") for field in ("image", "mask")]
    return [*(f"{job_id}/{index}.webp" for index in range(5)), *inputs, manifest_key(job_id)]


async def delete_one_of_two_jobs(store: ResultStore) -> None:
    others = ("abc", "zab", "a")
    for key in [key for job_id in ("ab", *others) for key in everything(job_id)]:
        await store.put(key, key.encode(), "image/png")
    await store.delete_job("ab")
    assert [await store.size(key) for key in everything("ab")] == [None] * 8
    for key in [key for job_id in others for key in everything(job_id)]:
        assert await store.get(key) == key.encode()
    await store.delete_job("ab")
    await store.delete_job("never-was")
    for wrong in ("", ".", "..", "ab/", "a/b", "*", "ab\n", "a" * 65, ".writable"):
        with pytest.raises(ValueError, match="not a job's id"):
            await store.delete_job(wrong)


def test_a_job_is_deleted_with_all_it_has_and_no_other(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(delete_one_of_two_jobs(LocalStore(tmp_path / "images")))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["a", "abc", "zab"]
    with SmallS3(lists=False) as server:
        asyncio.run(delete_one_of_two_jobs(s3_store(server.url)))
    monkeypatch.setattr(s3, "_PAGE", 3)  # a thousand objects take moto seconds
    with a_bucket(s3_endpoint):
        asyncio.run(delete_one_of_two_jobs(s3_store(s3_endpoint)))


def test_the_temporary_files_of_dead_writers_go_with_their_job(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    asyncio.run(store.put(KEY, b"an image", "image/png"))
    for name in (".0.png.00.tmp", ".manifest.json.11.tmp"):
        (tmp_path / JOB / name).write_bytes(b"half")
    asyncio.run(store.delete_job(JOB))
    assert not list(tmp_path.iterdir())


def test_puts_and_deletions_of_one_job_race_without_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    async def write(index: int) -> None:
        for _ in range(100):
            stored = await store.put(f"{JOB}/{index % 2}.png", bytes(1000), "image/png")
            assert stored.bytes == 1000

    async def delete() -> None:
        for _ in range(100):
            await store.delete_job(JOB)

    async def story() -> None:
        await asyncio.gather(write(0), write(1), write(2), delete(), delete())
        await store.delete_job(JOB)

    asyncio.run(story())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links_keeps_the_first_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = LocalStore(tmp_path)

    async def story() -> list[Stored]:
        return await asyncio.gather(*(store.put(KEY, bytes(100 + n), "image/png") for n in range(8)))

    told = asyncio.run(story())
    assert sum(stored.created for stored in told) == 1
    assert {stored.bytes for stored in told} == {(tmp_path / KEY).stat().st_size}
    assert [path.name for path in (tmp_path / JOB).iterdir()] == ["0.png"]


WRITER = """
import asyncio, sys
from pathlib import Path
from serve.results.local import LocalStore

async def write():
    store = LocalStore(Path(sys.argv[1]))
    for index in range(10_000):
        await store.put(f"0123456789abcdef/{index}.png", bytes([index % 256]) * 300_000, "image/png")
        print(index, flush=True)

asyncio.run(write())
"""


def test_a_writer_that_is_killed_leaves_whole_files(tmp_path: Path) -> None:
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(random.randrange(2, 20)):
                told = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
        files = list((tmp_path / JOB).glob("[0-9]*.png"))
        assert len(files) > told
        for file in files:
            assert file.read_bytes() == bytes([int(file.stem) % 256]) * 300_000
        assert len(list((tmp_path / JOB).glob(".*.tmp"))) <= 1
        asyncio.run(LocalStore(tmp_path).delete_job(JOB))
        assert not list(tmp_path.iterdir())


JOBS = ("a", "b")
KEYS = [f"{job}/{name}" for job in JOBS for name in ("0.png", "1.png", "manifest.json")]
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(KEYS), st.binary(max_size=20)),
        st.tuples(st.just("delete"), st.sampled_from(KEYS), st.just(b"")),
        st.tuples(st.just("delete_job"), st.sampled_from(JOBS), st.just(b"")),
        st.tuples(st.just("left"), st.sampled_from(KEYS), st.just(b"")),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTS)
def test_the_folder_is_what_a_dictionary_would_be(acts: list[tuple[str, str, bytes]]) -> None:
    async def story(folder: Path) -> None:
        store, model = LocalStore(folder), dict[str, bytes]()
        for act, name, data in acts:
            if act == "put":
                expected = Stored(len(model.get(name, data)), name not in model)
                assert await store.put(name, data, "image/png") == expected
                model.setdefault(name, data)
            elif act == "delete":
                await store.delete(name)
                model.pop(name, None)
            elif act == "left" and (folder / name).parent.is_dir():  # by a writer that was killed
                job, _, base = name.partition("/")
                (folder / job / f".{base}.00.tmp").write_bytes(b"half")
            elif act == "delete_job":
                await store.delete_job(name)
                model = {key: kept for key, kept in model.items() if not key.startswith(f"{name}/")}
            for key in KEYS:
                assert await store.size(key) == (len(model[key]) if key in model else None)
                if key in model:
                    assert await store.get(key) == model[key]
                else:
                    with pytest.raises(JobNotFound):
                        await store.get(key)
        for job in JOBS:
            await store.delete_job(job)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))
        assert not list(Path(folder).iterdir())


def test_the_check_of_a_folder_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(ResultSettings(), tmp_path)
    asyncio.run(store.check())
    assert not list((tmp_path / "images").iterdir())
