"""Users in threads of their own, who order over HTTP, follow each job to its end and fetch its picture; and what they
were told."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
from support.history import Accepted, Entry

PNG = b"\x89PNG\r\n\x1a\n"
PAUSE_S = 0.2
RETRY_S = 0.3
TIMEOUT_S = 60.0
END_S = 240.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """A request that was not answered as asked: no answer at all (`status` 0), or a 5xx. It was made again."""

    at: float
    request: str
    status: int
    told: str


@dataclass(frozen=True, slots=True)
class Done:
    """A job at its end, as the client is told; `order` is what was asked."""

    order: dict[str, Any]
    job: dict[str, Any]
    at: float


class Traffic:
    """`users` who always have one job under way, of `orders` in turn.

    An order is made again under its Idempotency-Key until it is answered, so that each is one job. Whatever is answered
    otherwise than with success or a 5xx ends the user, and the block with it.

    Owns: the users' threads.
    """

    def __init__(self, url: str, key: str, orders: Sequence[dict[str, Any]], users: int = 4, seed: int = 0) -> None:
        self._url, self._orders = url, list(orders)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        self._random = random.Random(seed)
        self._users = [threading.Thread(target=self._use, name=f"user{n}", daemon=True) for n in range(users)]
        self.told: list[Entry] = []
        self.done: list[Done] = []
        self.troubles: list[Trouble] = []
        self.resumed = 0
        self.faults: list[str] = []

    def __enter__(self) -> Self:
        for user in self._users:
            user.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        if kind is None:
            self.end()

    def end(self) -> None:
        """Nobody orders any more; who has a job under way waits for it."""
        self._over.set()
        for user in self._users:
            user.join(END_S)
        assert not any(user.is_alive() for user in self._users), "a job did not end"
        assert self.faults == []

    def more(self, jobs: int, within_s: float = 120.0, such: Callable[[Done], bool] = lambda _: True) -> list[Done]:
        """So many ended after this was called."""
        before, deadline = len(self.done), time.monotonic() + within_s
        while len(found := [each for each in self.done[before:] if such(each)]) < jobs:
            assert not self.faults, self.faults
            assert time.monotonic() < deadline, f"{len(found)} of {jobs} jobs ended within {within_s:.0f} s"
            time.sleep(0.1)
        return found

    def _use(self) -> None:
        try:
            while not self._over.is_set():
                with self._lock:
                    order = self._orders[self._next % len(self._orders)] | {"seed": self._next}
                    self._next += 1
                with httpx.Client(base_url=self._url, headers=self._headers, timeout=TIMEOUT_S) as http:
                    self._follow(http, order)
                self._over.wait(self._random.uniform(0, 2 * PAUSE_S))
        except Exception as error:  # noqa: BLE001  told in the test's own thread
            self.faults.append(f"{type(error).__name__}: {error}")

    def _follow(self, http: httpx.Client, order: dict[str, Any]) -> None:
        key = uuid.uuid4().hex
        job = self._asked(http, "POST", "/v1/jobs", json=order, headers={"Idempotency-Key": key}).json()["id"]
        self.told.append(Accepted(job=job, images=order.get("num_images", 1)))
        while True:
            with contextlib.suppress(httpx.HTTPError), http.stream("GET", f"/v1/jobs/{job}/events") as stream:
                for _ in stream.iter_lines():
                    pass
            found = self._asked(http, "GET", f"/v1/jobs/{job}").json()
            if found["state"] in ("succeeded", "failed", "cancelled", "expired"):
                break
            self.resumed += 1
        if found["state"] == "succeeded":
            picture = self._asked(http, "GET", found["images"][0]["url"], follow_redirects=True)
            assert picture.content.startswith(PNG), "the picture is none"
        self.done.append(Done(order, found, time.monotonic()))

    def _asked(self, http: httpx.Client, method: str, path: str, **rest: Any) -> httpx.Response:
        """The first answer with success. AssertionError for what is neither that nor a 5xx."""
        while True:
            try:
                answer = http.request(method, path, **rest)
            except httpx.HTTPError as error:
                status, told = 0, repr(error)
            else:
                if answer.is_success:
                    return answer
                status, told = answer.status_code, answer.text[:200]
                assert status >= 500, f"{method} {path}: {status} {told}"
            self.troubles.append(Trouble(time.monotonic(), f"{method} {path}", status, told))
            time.sleep(RETRY_S)
