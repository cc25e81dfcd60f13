"""One subscription for a whole process: who waits for a change sleeps on an `asyncio.Event`, not on a connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from serve.lately import Lately

log = logging.getLogger(__name__)

WORK = "tandem:work:"
"""And a worker's name: rung when a job is queued that the worker may take, which stands by since its last claim."""
ENDED, CANCEL = "tandem:ended", "tandem:cancel"
"""Rung for all jobs, each time with the id of one."""
REMEMBERED_S = 10.0
"""For so long an id that was rung is known: who listens for what he has heard of since then has missed nothing."""
_KEPT = "tandem:bell"
"""Nobody rings it. Without a subscription a connection could not be asked whether it lives."""
_RECONNECT_S = 0.2
_ANSWER_S = 5.0
"""For each word with the server: a connection that was taken and then went silent must not hold those who wait."""
_QUIET_S = 15.0
"""After so long without a word the connection is tried."""


class Bell:
    """Sets events when Redis publishes on their channels.

    A ring may be spurious, and says only "look again"; it may never be missed while the server answers. So every event
    is also rung when its subscription takes effect (what was published before that was not heard) and when the
    connection breaks.

    A channel whose messages are job ids is subscribed to once, by whoever first listens for any job, and stays: a
    message to all costs less than two commands for each job that somebody waits for. Who listens for a job there is not
    rung at once, but where the job was rung, or the subscription took effect, in the last REMEMBERED_S.

    When the connection breaks, the listener and a subscriber may both find it so and both reconnect it; redis-py then
    raises whatever it trips over. Whatever it was, the answer is a new connection with every subscription.

    Owns: one connection and the task that reads it, both from the first use until `close`.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, dict[str, set[asyncio.Event]]] = {}  # by channel, by message
        self._standing = {_KEPT}
        self._heard_since: dict[str, float] = {}
        self._lately: Lately[tuple[str, str]] = Lately(REMEMBERED_S)
        self._work: dict[str, asyncio.Event] = {}  # by worker
        self._pubsub: PubSub | None = None
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def work(self, worker: str) -> asyncio.Event:
        """The event of a worker's WORK. It stays registered, so that what rings between two waits is not missed."""
        channel, event = WORK + worker, self._work.setdefault(worker, asyncio.Event())
        if channel not in self._heard_since:
            self._enter(channel, "", event)
            await self._subscribe_for_good(channel)
        return event

    @contextlib.asynccontextmanager
    async def listening(self, channel: str, event: asyncio.Event | None = None) -> AsyncIterator[asyncio.Event]:
        """The event, by default one of its own, is set whenever `channel` rings; the listener clears it."""
        event = event or asyncio.Event()
        self._enter(channel, "", event)
        # Shielded: a listener is often cancelled, and half a command would break the connection that all share.
        try:
            await asyncio.shield(self._follow(channel))
            yield event
        finally:
            self._leave(channel, "", event)
            await asyncio.shield(self._follow(channel))

    @contextlib.asynccontextmanager
    async def listening_for(
        self, channel: str, job_id: str, event: asyncio.Event | None = None
    ) -> AsyncIterator[asyncio.Event]:
        """The same for a channel of all jobs, ENDED or CANCEL: set when it rings for that job."""
        event = event or asyncio.Event()
        self._enter(channel, job_id, event)
        try:
            since = self._heard_since.get(channel)
            if since is None:
                await self._subscribe_for_good(channel)
            elif (channel, job_id) in self._lately or time.monotonic() < since + REMEMBERED_S:
                event.set()
            yield event
        finally:
            self._leave(channel, job_id, event)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _enter(self, channel: str, message: str, event: asyncio.Event) -> None:
        self._waiting.setdefault(channel, {}).setdefault(message, set()).add(event)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())

    def _leave(self, channel: str, message: str, event: asyncio.Event) -> None:
        events = self._waiting[channel]
        events[message].discard(event)
        if not events[message]:
            del events[message]
        if not events:
            del self._waiting[channel]

    async def _subscribe_for_good(self, channel: str) -> None:
        self._standing.add(channel)
        await asyncio.shield(self._follow(channel))

    async def _follow(self, channel: str) -> None:
        """Make the subscription to `channel` what its listeners want now. One at a time: they come and go meanwhile."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWER_S), self._changing:
                pubsub = self._pubsub
                if pubsub is None:
                    return  # the next connection subscribes to every channel that is wanted then
                if channel not in self._waiting and channel not in self._standing:
                    await pubsub.unsubscribe(channel)
                elif channel.encode() in pubsub.channels.keys() - pubsub.pending_unsubscribe_channels:
                    self._ring_all(channel)
                else:
                    await pubsub.subscribe(channel)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    async with asyncio.timeout(_ANSWER_S), self._changing:
                        await pubsub.subscribe(*self._standing.union(self._waiting))
                        self._pubsub = pubsub
                    await self._heed(pubsub)
            except Exception as error:  # noqa: BLE001
                log.debug("the subscription broke: %s", error)
            finally:
                self._pubsub = None
                self._heard_since.clear()
            for channel in self._waiting:
                self._ring_all(channel)
            await asyncio.sleep(_RECONNECT_S)

    async def _heed(self, pubsub: PubSub) -> None:
        """Ring for every message. Raises when the connection breaks, or gives no answer any more."""
        asked = False
        while True:
            message = await pubsub.get_message(timeout=_ANSWER_S if asked else _QUIET_S)
            if message is not None:
                asked = False
                self._heed_one(message["type"], message["channel"], message["data"])
            elif asked:
                raise TimeoutError("the subscription is silent")
            else:
                asked = True
                async with asyncio.timeout(_ANSWER_S), self._changing:
                    await pubsub.ping()

    def _heed_one(self, kind: str, channel: bytes | None, data: Any) -> None:
        if kind == "message" and channel is not None:
            self._ring(channel.decode(), data.decode())
        elif kind == "subscribe" and channel is not None:
            if channel.decode() in self._standing:
                self._heard_since[channel.decode()] = time.monotonic()
            self._ring_all(channel.decode())

    def _ring(self, channel: str, message: str) -> None:
        if message:
            self._lately.note((channel, message))
        for event in self._waiting.get(channel, {}).get(message, ()):
            event.set()

    def _ring_all(self, channel: str) -> None:
        for events in self._waiting.get(channel, {}).values():
            for event in events:
                event.set()
