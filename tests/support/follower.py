"""A client of an answer that stays open."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any


class Follower:
    """A client of an open stream, at ASGI's level: httpx's transport shows an answer only when it has ended."""

    def __init__(self, app: Any, path: str, query: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.left = asyncio.Event()
        self.begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.chunks: asyncio.Queue[bytes] = asyncio.Queue()
        asgi = {"version": "3.0", "spec_version": "2.3"}
        told = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "asgi": asgi, "http_version": "1.1", "method": "GET", "path": path, "headers": told}
        scope |= {"query_string": query, "root_path": "", "scheme": "http", "server": ("test", 80)}
        self.task = asyncio.create_task(app(scope, self.receive, self._send))

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.begun.set_result(message["status"])
        if message["type"] == "http.response.body":
            self.chunks.put_nowait(message["body"])

    async def status(self) -> int:
        async with asyncio.timeout(10):
            return await self.begun

    async def until(self, wanted: Callable[[str], bool]) -> str:
        """What arrives, up to the first chunk that is wanted."""
        async with asyncio.timeout(10):
            seen = ""
            while not wanted(seen):
                seen += (await self.chunks.get()).decode()
            return seen
