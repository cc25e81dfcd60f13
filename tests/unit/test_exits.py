"""A process that is told to end, as Ray and Serve run a replica: Ray's handler, which waits for good, on the main
thread; the replica's event loop on another."""

import signal
import subprocess
import sys

import pytest

from deployments.exits import EXIT_CODE

REPLICA = """
import asyncio, signal, threading, time

from deployments.exits import on_sigterm

signal.signal(signal.SIGTERM, lambda *_: print("passed on", flush=True))

async def farewell():
    await asyncio.sleep({takes_s})
    print("given back", flush=True)

async def replica():
    undo = on_sigterm(farewell, 0.5)
    if {undone}:
        undo()
    print("here", flush=True)
    await asyncio.sleep(60)

threading.Thread(target=asyncio.run, args=(replica(),), daemon=True).start()
while True:
    time.sleep(0.01)
"""


def process_of(takes_s: float = 0.0, undone: bool = False) -> subprocess.Popen[str]:
    script = REPLICA.replace("{takes_s}", str(takes_s)).replace("{undone}", str(undone))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize(("takes_s", "said"), [(0.1, ["passed on", "given back"]), (60.0, ["passed on"])])
def test_a_process_that_is_told_to_end_takes_its_leave(takes_s: float, said: list[str]) -> None:
    """And ends, also where that takes too long."""
    process = process_of(takes_s)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=30)
    assert (rest.splitlines(), process.returncode) == (said, EXIT_CODE)


def test_it_can_be_undone() -> None:
    process = process_of(undone=True)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "passed on\n"
    assert process.poll() is None
    process.kill()
    assert process.communicate(timeout=30)[0] == ""
