"""A TCP proxy that makes a real server slow, silent, gone or wrong, while a test runs."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class SlowProxy:
    """Forwards to `url` in the test's own event loop. The attributes may be changed at any time.

    `delay_s` holds back each piece of an answer; `flip` turns a bit in the middle of each piece of at least that many
    bytes. `connections` counts those that were made, `answers` the pieces that the server sent.

    Owns: its listening socket and the connections through it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._parts = parts
        self._target = (parts.hostname, parts.port)
        self._server: asyncio.Server | None = None
        self._streams: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0
        self.delay_s = 0.0
        self.flip: int | None = None
        self.connections = 0
        self.answers = 0

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        password = f":{self._parts.password}@" if self._parts.password else ""
        return urlunsplit(self._parts._replace(netloc=f"{password}127.0.0.1:{self._port}"))

    async def cut(self) -> None:
        """End all connections and refuse new ones."""
        if self._server:
            self._server.close()
            self._server = None
        for stream in self._streams:
            stream.transport.abort()

    async def mend(self) -> None:
        """Take connections, again, under the same URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                from_server, to_server = await asyncio.open_connection(*self._target)
                self._streams |= {writer, to_server}
                try:
                    await asyncio.gather(self._pump(reader, to_server), self._pump_back(from_server, writer))
                finally:
                    self._streams -= {writer, to_server}
                    to_server.close()
            finally:
                writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _pump_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self.answers += 1
            await asyncio.sleep(self.delay_s)
            if self.flip is not None and len(data) >= self.flip:
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            writer.write(data)
            await writer.drain()
        writer.close()
