"""One subscription for a whole process: who waits for a change sleeps on an `asyncio.Event`, not on a connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

log = logging.getLogger(__name__)

WORK = "tandem:work"
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

    When the connection breaks, the listener and a subscriber may both find it so and both reconnect it; redis-py then
    raises whatever it trips over. Whatever it was, the answer is a new connection with every subscription.

    Owns: one connection and the task that reads it, both from the first use until `close`.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._work = asyncio.Event()
        self._pubsub: PubSub | None = None
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def work(self) -> asyncio.Event:
        """The event of WORK. It stays registered, so that what rings between two waits is not missed."""
        self._start()
        self._waiting.setdefault(WORK, set()).add(self._work)
        return self._work

    @contextlib.asynccontextmanager
    async def listening(self, channel: str, event: asyncio.Event | None = None) -> AsyncIterator[asyncio.Event]:
        """The event, by default one of its own, is set whenever `channel` rings; the listener clears it."""
        event = event or asyncio.Event()
        self._start()
        self._waiting.setdefault(channel, set()).add(event)
        # Shielded: a listener is often cancelled, and half a command would break the connection that all share.
        try:
            await asyncio.shield(self._follow(channel))
            yield event
        finally:
            self._waiting[channel].discard(event)
            if not self._waiting[channel]:
                del self._waiting[channel]
            await asyncio.shield(self._follow(channel))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())

    async def _follow(self, channel: str) -> None:
        """Make the subscription to `channel` what its listeners want now. One at a time: they come and go meanwhile."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWER_S), self._changing:
                pubsub = self._pubsub
                if pubsub is None:
                    return  # the next connection subscribes to every channel that is wanted then
                if channel not in self._waiting:
                    await pubsub.unsubscribe(channel)
                elif channel.encode() in pubsub.channels.keys() - pubsub.pending_unsubscribe_channels:
                    self._ring(channel)
                else:
                    await pubsub.subscribe(channel)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    async with asyncio.timeout(_ANSWER_S), self._changing:
                        await pubsub.subscribe(WORK, *self._waiting)
                        self._pubsub = pubsub
                    await self._heed(pubsub)
            except Exception as error:  # noqa: BLE001
                log.debug("the subscription broke: %s", error)
            finally:
                self._pubsub = None
            for channel in self._waiting:
                self._ring(channel)
            await asyncio.sleep(_RECONNECT_S)

    async def _heed(self, pubsub: PubSub) -> None:
        """Ring for every message. Raises when the connection breaks, or gives no answer any more."""
        asked = False
        while True:
            message = await pubsub.get_message(timeout=_ANSWER_S if asked else _QUIET_S)
            if message is not None:
                asked = False
                if message["channel"]:
                    self._ring(message["channel"].decode())
            elif asked:
                raise TimeoutError("the subscription is silent")
            else:
                asked = True
                async with asyncio.timeout(_ANSWER_S), self._changing:
                    await pubsub.ping()

    def _ring(self, channel: str) -> None:
        for event in self._waiting.get(channel, ()):
            event.set()
