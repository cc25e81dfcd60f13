"""A receiver of webhooks: a small HTTP server in the test's own event loop that answers as the test says."""

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Call:
    """One request as it came over the wire; the names of `headers` are in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answers the n-th call with the n-th of `answers`, the last one ever after: a status, or the bytes themselves.

    While `open_` is not set no call is answered. `drip` is sent again and again after the answer, until the client
    leaves. `held` counts the calls that wait for their answer, `most_held` is the most of them at once; `connections`
    counts those that were made.

    Owns: its listening socket and its connections.
    """

    def __init__(
        self, *answers: int | bytes, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self._answers = answers or (204,)
        self._place = (host, port)
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard = asyncio.Event()
        self.open_ = asyncio.Event()
        self.open_.set()
        self.drip = b""
        self.calls: list[Call] = []
        self.connections = 0
        self.held = 0
        self.most_held = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, *self._place, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def url(self, host: str = "127.0.0.1", scheme: str = "http", path: str = "/done?by=tandem") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def heard(self, calls: int, within_s: float = 10.0) -> None:
        """Return once there were so many calls."""
        async with asyncio.timeout(within_s):
            while len(self.calls) < calls:
                self._heard.clear()
                await self._heard.wait()

    async def gone(self, within_s: float = 10.0) -> None:
        """Return once all who were connected have left."""
        async with asyncio.timeout(within_s):
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                await self._answer(reader, writer)
            finally:
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest if each)}
        body = await reader.readexactly(int(headers["content-length"]))
        answer = self._answers[min(len(self.calls), len(self._answers) - 1)]
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        self.calls.append(Call(line, headers, body))
        self._heard.set()
        gone = asyncio.ensure_future(reader.read())
        opened = asyncio.ensure_future(self.open_.wait())
        try:
            await asyncio.wait((gone, opened), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.held -= 1
            gone.cancel()
            opened.cancel()
        if isinstance(answer, int):
            answer = f"HTTP/1.1 {answer} Said\r\ncontent-length: 0\r\n\r\n".encode()
        writer.write(answer)
        await writer.drain()
        while self.drip:
            writer.write(self.drip)
            await writer.drain()
            await asyncio.sleep(0.001)
