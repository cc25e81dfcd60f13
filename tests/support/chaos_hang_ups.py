"""Clients that do not wait for their answers."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from urllib.parse import urlsplit

from support.chaos_server import an_order

AT_ONCE = 64


class HangUps:
    """Clients that open a connection, send a request whole or in part, and are gone after a random moment."""

    def __init__(self, url: str, seed: int) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._random = random.Random(seed)
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def many(self, count: int, job: str) -> None:
        await asyncio.gather(*(self._one(number, job) for number in range(count)))

    async def _one(self, number: int, job: str) -> None:
        request = self._events(job) if number % 2 else self._waiting()
        if number % 10 == 0:
            request = request[: self._random.randrange(1, len(request))]  # half open: the rest never comes
        async with self._gate:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
            except OSError:
                return
            try:
                writer.write(request)
                await writer.drain()
                async with asyncio.timeout(self._random.choice((0.0, 0.01, 0.05, 0.2))):
                    await reader.read(100)
            except (OSError, TimeoutError):
                pass
            if number % 3 == 0:  # a reset instead of an end
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    def _waiting(self) -> bytes:
        body = json.dumps(an_order(seed=self._random.randrange(2**31), num_inference_steps=20)).encode()
        head = "POST /v1/jobs?wait=true HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _events(self, job: str) -> bytes:
        return f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: here\r\n\r\n".encode()
