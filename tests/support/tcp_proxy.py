"""A TCP proxy in a thread of its own that slows, stalls, cuts and falsifies what goes through it, for Redis and S3."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_PIECE = 1 << 14
_LOOK_AGAIN_S = 0.02


class TcpProxy:
    """Forwards 127.0.0.1:`port` to a port of this machine. The attributes may be changed from any thread at any time.

    `delay_s` holds back each piece of an answer. `stalled` holds back everything: connections stay open and say
    nothing. `cut_every` breaks a connection after so many bytes of either direction, in the middle of whatever they
    were. `flip_over` turns a bit in the middle of each piece of an answer that is longer. `answers` are whole HTTP
    answers: one, by chance, stands for the server's at that `share` of the PUTs.

    Owns: its thread, its listening socket and the connections through it.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self._target = port
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._streams: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.delay_s = 0.0
        self.stalled = False
        self.cut_every: int | None = None
        self.flip_over: int | None = None
        self.answers: tuple[bytes, ...] = ()
        self.share = 0.0
        self.cuts = 0
        self.falsified = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.mend()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cut()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def address(self) -> tuple[str, int]:
        """Where the next connection leads. OSError: nowhere."""
        return "127.0.0.1", self._target

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        self._there(self._cut)

    def mend(self) -> None:
        """Everything as it should be, under the same port."""
        self.delay_s, self.stalled, self.cut_every, self.flip_over, self.answers, self.share = (
            0.0,
            False,
            None,
            None,
            (),
            0.0,
        )
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def break_all(self) -> None:
        """End all connections; new ones are taken."""
        self._there(self._abort)

    def _there(self, call: Callable[[], None]) -> None:
        async def run() -> None:
            call()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _abort(self) -> None:
        for stream in self._streams:
            stream.transport.abort()

    def _cut(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        self._abort()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            from_server, to_server = await asyncio.open_connection(*self.address())
            self._streams |= {writer, to_server}
            try:
                with contextlib.closing(to_server):
                    await asyncio.gather(
                        self._pump(reader, to_server, writer, answer=False),
                        self._pump(from_server, writer, to_server, answer=True),
                    )
            finally:
                self._streams -= {writer, to_server}

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter, *, answer: bool
    ) -> None:
        passed = 0
        while data := await reader.read(_PIECE):
            if answer and self.delay_s:
                await asyncio.sleep(self.delay_s)
            while self.stalled:  # noqa: ASYNC110  set from another thread
                await asyncio.sleep(_LOOK_AGAIN_S)
            if not answer and self.answers and data.startswith(b"PUT ") and self._random.random() < self.share:
                self.falsified += 1
                other.write(self._random.choice(self.answers))
                await other.drain()
                break
            if self.cut_every and passed + len(data) > self.cut_every:
                self.cuts += 1
                writer.write(data[: self.cut_every - passed])
                with contextlib.suppress(OSError):
                    await writer.drain()
                writer.transport.abort()
                other.transport.abort()
                return
            if answer and self.flip_over is not None and len(data) > self.flip_over:
                self.falsified += 1
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            passed += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


def http_answer(status: str, code: str) -> bytes:
    """What S3 says when it refuses."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>chaos</Message></Error>'.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return head.encode() + b"\r\n" + body
