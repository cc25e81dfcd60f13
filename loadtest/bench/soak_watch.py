"""A server looked at from outside while it works: its processes, both of its Redis servers, its files, its pictures."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import redis
from PIL import Image

from loadtest.processes import Use, usage
from loadtest.servers import Serving
from serve.embedded import running_url
from serve.errors import OperatorError
from serve.results.png import JSON_CHUNK
from serve.shapes.expectation import of_prompt
from serve.shapes.judge import agrees, read

RECORDS, SEQUENCE = "tandem:records", "tandem:sequence"
"""Keys of the job Redis: the jobs that have a record, and the number of the latest submission."""
WHOLE_SIDE = 128
"""The side of the pictures that the shipped model was trained on: they are judged in full. Of smaller ones the
background alone is: stock pipeline and engine alike draw no clean shapes at 64 x 64."""
_TIMEOUT_S = 10.0
_GAPS = 5
_WORSE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")
_WARNINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUse:
    """`bytes` is `used_memory`; `bound` is `maxmemory`, 0 without. `records` are jobs, of the job Redis alone."""

    keys: int
    bytes: int
    bound: int = 0
    records: int = 0
    submissions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One moment: seconds after the start, images finished so far, processes by pid, `own_bytes` of each (see
    `own_memory`), both Redis servers, files and their bytes in the result store, and in the whole data directory."""

    at_s: float
    images: int
    processes: Mapping[int, Use]
    own_bytes: Mapping[int, int]
    jobs: RedisUse
    cache: RedisUse
    result_files: int
    result_bytes: int
    all_files: int
    all_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One picture as it lay in the result store: does it show what its own parameters say was ordered? The `side`
    is 0 of a file that is no picture of ours."""

    job: str
    side: int
    prompt: str
    right: bool


class Watch:
    """Owns: the connections to the server and its job Redis, every look and every judged picture, and the number of
    looks that failed (`gaps`). A context manager.

    Pictures are taken from the result store at random, those of jobs that were not looked at yet; the sweep may take
    one away at any time.
    """

    def __init__(self, serving: Serving, *, every_s: float, judged_at_once: int, seed: int) -> None:
        """Raises OperatorError where the server's job Redis can't be found."""
        url = running_url(serving.data_dir)
        if url is None:
            raise OperatorError(f"the job Redis of {serving.name} does not answer")
        self._serving = serving
        self._every_s = every_s
        self._judged_at_once = judged_at_once
        self._redis = redis.Redis.from_url(url, socket_timeout=_TIMEOUT_S)
        self._http = httpx.Client(base_url=serving.url, timeout=_TIMEOUT_S, trust_env=False)
        self._random = random.Random(seed)
        self._known: set[str] = set()
        self.gaps = 0
        self.looks: list[Look] = []
        self.judged: list[Judged] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()
        self._redis.close()

    async def keep_looking(self, clock: Callable[[], float], images: Callable[[], int]) -> None:
        """Until it is cancelled. A look that fails is a gap; raises OperatorError for too many in a row."""
        row = 0
        while True:
            try:
                await self.look(clock, images)
                row = 0
            except (httpx.HTTPError, redis.RedisError) as error:
                self.gaps += 1
                if (row := row + 1) == _GAPS:
                    raise OperatorError(f"{self._serving.name} can't be looked into: {error}") from None
            await asyncio.sleep(self._every_s)

    async def look(self, clock: Callable[[], float], images: Callable[[], int]) -> Look:
        at_s, drawn = clock(), images()
        look = await asyncio.to_thread(self._look, at_s, drawn)
        self.looks.append(look)
        self.judged += await asyncio.to_thread(self._judge)
        return look

    def job_redis(self) -> RedisUse:
        memory: dict[str, Any] = self._told(self._redis.info("memory"))
        return RedisUse(
            keys=self._told(self._redis.dbsize()),
            bytes=int(memory["used_memory"]),
            bound=int(memory["maxmemory"]),
            records=self._told(self._redis.zcard(RECORDS)),
            submissions=int(self._told(self._redis.get(SEQUENCE)) or 0),
        )

    def cache_redis(self) -> RedisUse:
        """As the server tells it: the password of its cache is nobody else's."""
        told = self._http.get("/v1/cache").raise_for_status().json()["redis"]
        if told is None:
            raise redis.ConnectionError("the server does not reach its cache Redis")
        return RedisUse(keys=told["keys"], bytes=told["bytes"], bound=told["max_bytes"])

    def clear_cache(self) -> None:
        self._http.delete("/v1/cache").raise_for_status()

    def keys(self) -> frozenset[str]:
        """Every key of the job Redis."""
        return frozenset(key.decode() for key in self._redis.scan_iter(count=1000))

    def records(self) -> frozenset[str]:
        """The ids of the jobs that have a record."""
        return frozenset(job.decode() for job in self._told(self._redis.zrange(RECORDS, 0, -1)))

    def stored_jobs(self) -> frozenset[str]:
        """The ids of the jobs of which there is anything in the result store."""
        with suppress(FileNotFoundError):
            return frozenset(entry.name for entry in os.scandir(self._images) if not entry.name.startswith("."))
        return frozenset()

    def result_files(self) -> int:
        return _sizes(self._images)[0]

    def warnings(self) -> tuple[str, ...]:
        """The last warnings and errors in the server's log."""
        try:
            lines = (self._serving.data_dir.parent / "server.log").read_text(errors="replace").splitlines()
        except OSError:
            return ()
        return tuple(line for line in lines if _WORSE.search(line))[-_WARNINGS:]

    @property
    def _images(self) -> Path:
        return self._serving.data_dir / "images"

    @staticmethod
    def _told(answer: Any) -> Any:
        """redis-py types every answer as one that may be awaited."""
        return answer

    def _look(self, at_s: float, images: int) -> Look:
        result, everything = _sizes(self._images), _sizes(self._serving.data_dir)
        processes = usage(self._serving.root)
        return Look(
            at_s=at_s,
            images=images,
            processes=processes,
            own_bytes={pid: own_memory(pid, use.pss_or_uss) for pid, use in processes.items()},
            jobs=self.job_redis(),
            cache=self.cache_redis(),
            result_files=result[0],
            result_bytes=result[1],
            all_files=everything[0],
            all_bytes=everything[1],
        )

    def _judge(self) -> list[Judged]:
        fresh = sorted(self.stored_jobs() - self._known)
        self._known.update(fresh)
        found: list[Judged] = []
        for job in self._random.sample(fresh, len(fresh)):
            if len(found) == self._judged_at_once:
                break
            if (judged := judge_stored(self._images / job / "0.png")) is not None:
                found.append(judged)
        return found


def own_memory(pid: int, otherwise: int) -> int:
    """Bytes that the process itself has asked for, in memory or swapped out: anonymous and shared ones, mapped files
    aside. A file's pages are in RSS, PSS and USS by turns, as other processes come and go that map them too: torch's
    libraries are hundreds of megabytes. `otherwise` where the system doesn't tell (proc_pid_status(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))
    except (OSError, KeyError, ValueError, IndexError):
        return otherwise


def judge_stored(file: Path) -> Judged | None:
    """None for one that was swept meanwhile, or is not written yet."""
    try:
        return judge(file)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, SyntaxError):  # pictures get their name when they are whole
        return Judged(job=file.parent.name, side=0, prompt="", right=False)


def judge(file: Path) -> Judged:
    """A stored picture against the parameters that it carries. Raises FileNotFoundError, and OSError, KeyError,
    ValueError or SyntaxError (Pillow's, of a broken PNG) for what is no picture of ours."""
    with Image.open(file) as image:
        image.load()
        ordered = json.loads(image.info[JSON_CHUNK])
        reading, wanted = read(image), of_prompt(ordered["prompt"])
        whole = image.width >= WHOLE_SIDE
        right = agrees(reading, wanted).ok if whole else wanted.background in (None, reading.background)
        return Judged(job=file.parent.name, side=image.width, prompt=ordered["prompt"], right=right)


def _sizes(folder: Path) -> tuple[int, int]:
    """Files below a folder, and their bytes. What goes away meanwhile is not counted."""
    sizes = list(_files(str(folder)))
    return len(sizes), sum(sizes)


def _files(folder: str) -> Iterator[int]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # gone, or not a folder any more
        return
    for entry in entries:
        with suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                yield entry.stat(follow_symlinks=False).st_size
