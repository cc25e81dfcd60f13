"""What a replica's process still does when it is told to end while Serve knows nothing of it: a SIGTERM.

A Python handler can be set by the main thread alone, and Ray runs a replica's code on others. Ray's own handler begins
an orderly exit, which first waits for the calls that the process has made: for a replica that holds handles of other
deployments these are Serve's long polls, and so it waits for a minute or for good (Ray 2.60), deaf to calls and health
checks. `faulthandler` may be registered on any thread, and does what a handler in C may: it writes. Here it writes into
a pipe that the event loop reads, and passes the signal on to Ray.

Not reached by this: a process that is killed. That is `kill -9`, and the end of the node's raylet (`ray stop`, a pod
that is deleted without having been drained), which takes the workers along. Then the leases run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


def on_sigterm(farewell: Callable[[], Coroutine[Any, Any, None]], within_s: float) -> Callable[[], None]:
    """When the process gets a SIGTERM, run `farewell` on this event loop, for so many seconds at most, and end the
    process. What is given back undoes this."""
    loop = asyncio.get_running_loop()
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    leaving: set[asyncio.Task[None]] = set()

    async def leave() -> None:
        log.warning("told to end")
        try:
            async with asyncio.timeout(within_s):
                await farewell()
        except Exception as error:
            log.exception("the farewell failed", exc_info=error)
        finally:
            os._exit(EXIT_CODE)

    def told() -> None:
        loop.remove_reader(reading)
        leaving.add(loop.create_task(leave()))

    def undo() -> None:
        faulthandler.unregister(signal.SIGTERM)
        loop.remove_reader(reading)
        for end in (reading, writing):
            with contextlib.suppress(OSError):
                os.close(end)

    loop.add_reader(reading, told)
    faulthandler.register(signal.SIGTERM, file=writing, all_threads=False, chain=True)
    return undo
