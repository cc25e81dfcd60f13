"""What `tandem demo` does: six pictures that show what the server is good at, made while one watches."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.child import ChildServer
from serve.cli.client import Client
from serve.cli.screen import job_bars, run_job
from serve.cli.sheet import Picture, contact_sheet
from serve.cli.wishes import WISHES, Wish
from serve.client import Job, Pool
from serve.domain.jobs import JobState
from serve.errors import OperatorError
from serve.settings.tree import Settings
from serve.shapes.expectation import of_prompt
from serve.shapes.judge import agrees, read

START_S = 300.0
"""Longest wait for a server to be ready."""
_POLL_S = 0.3


@dataclass(frozen=True, slots=True)
class Made:
    """A wish and what came of it. `seen` is what the judge says of the picture, `accepted` whether that is the wish."""

    wish: Wish
    job: Job
    image: Image.Image | None
    seen: str
    accepted: bool


async def demo(client: Client, settings: Settings, out: Path, *, keep: bool) -> int:
    """Make the pictures with the server that is up, or with one of our own, which `keep` keeps up until Ctrl-C.

    Exit code 1 if a picture failed or does not show what was asked for. Raises OperatorError.
    """
    console = Console(highlight=False, soft_wrap=True)
    async with client:
        with contextlib.ExitStack() as stack:
            server = await _running(client, settings, stack, console)
            began = time.monotonic()
            made = await _make(client)
            sheet = _save(made, out)
            console.print(_table(made))
            console.print(f"Six pictures in {time.monotonic() - began:.1f} s, side by side in {sheet}")
            if server is None:
                console.print(f"The server at {client.url} was up before and stays up.")
            elif keep:
                await _stay(server, client.url, console)
    return 0 if all(one.accepted for one in made) else 1


async def _running(
    client: Client, settings: Settings, stack: contextlib.ExitStack, console: Console
) -> ChildServer | None:
    """Wait until the server is ready; if there is none, start one first and return it."""
    server = None
    if await client.pools() is None:
        http, log = settings.http, settings.data_dir / "tandem.log"
        arguments = ["--host", http.host, "--port", str(http.port), "--data-dir", str(settings.data_dir)]
        server = stack.enter_context(ChildServer(arguments, log))
        stack.callback(_announce_stop, server, console)
        console.print(f"Starting a server at {client.url}, log in {log}")
    began = time.monotonic()
    with console.status("") as status:
        while not _ready(pools := await client.pools()):
            if server is not None:
                server.check()
            waited = time.monotonic() - began
            if waited > START_S:
                raise OperatorError(f"the server at {client.url} is not ready after {START_S:.0f} s: {_say(pools)}")
            status.update(f"{waited:.0f} s: {_say(pools)}")
            await asyncio.sleep(_POLL_S)
    console.print(f"Ready after {time.monotonic() - began:.0f} s: {_say(pools)}")
    return server


async def _stay(server: ChildServer, url: str, console: Console) -> None:
    console.print(f"The server stays up until Ctrl-C. Its API: {url}/docs. From another terminal, in this folder:")
    console.print(f'  {_tandem()} generate "a yellow star on a blue background" --url {url}')
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            server.check()
            await asyncio.sleep(_POLL_S)


def _tandem() -> str:
    """The command as this shell must spell it: `make demo` leaves it in an environment that is not on the path."""
    if shutil.which("tandem"):
        return "tandem"
    return shlex.quote(os.path.relpath(Path(sys.executable).with_name("tandem")))


async def _make(client: Client) -> list[Made]:
    """Order what can step together at once, the rest after it; the result is in the order of `WISHES`."""
    made: dict[Wish, Made] = {}
    with job_bars(Console(stderr=True)) as bars:

        async def make(wish: Wish) -> None:
            job = await run_job(client, wish.order, wish.label, bars)
            image = Image.open(io.BytesIO(await client.image(job.id, 0))) if job.images else None
            made[wish] = _judged(wish, job, image)

        for after in (False, True):
            try:
                async with asyncio.TaskGroup() as group:
                    for wish in WISHES:
                        if wish.after is after:
                            group.create_task(make(wish))
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
    return [made[wish] for wish in WISHES]


def _judged(wish: Wish, job: Job, image: Image.Image | None) -> Made:
    if job.state is not JobState.SUCCEEDED or image is None:
        return Made(wish, job, None, job.error.message if job.error else job.state.value, False)
    if job.model != "shapes":
        return Made(wish, job, image, "not judged: another model", True)
    reading = read(image)
    things = ", ".join(f"{thing.color} {thing.shape}" for thing in reading.things) or "nothing"
    return Made(wish, job, image, f"{things} on {reading.background}", agrees(reading, of_prompt(wish.shows)).ok)


def _save(made: Sequence[Made], out: Path) -> Path:
    pictures = []
    sheet = out / "contact-sheet.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(made, 1):
            if one.image is not None:
                one.image.save(out / f"{number}.png")
                pictures.append(Picture(one.image, one.wish.label, one.wish.point))
        if pictures:
            contact_sheet(pictures).save(sheet)
    except OSError as error:
        raise OperatorError(f"--out {out}: {error.strerror or error}", "out") from None
    return sheet


def _table(made: Sequence[Made]) -> Table:
    caption = "A unit is a row of tokens through the encoder; one that several pictures need at once is encoded once."
    table = Table(title="Where each picture's text came from, in units", caption=caption, box=SIMPLE_HEAD)
    table.add_column("picture")
    for column in ("time", "steps", "memory", "Redis", "encoder"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, one in enumerate(made, 1):
        cache, total = one.job.cache, one.job.timings.total_s
        text = Text(f"{number}. {one.wish.label}\n   ").append(f"{one.wish.point}; judge: ", style="dim")
        table.add_row(
            text.append(one.seen, style="green" if one.accepted else "red"),
            "" if total is None else f"{total:.1f} s",
            str(one.job.step),
            *(("", "", "") if cache is None else map(str, (cache.memory, cache.redis, cache.encoded))),
        )
    return table


def _ready(pools: Sequence[Pool] | None) -> bool:
    return bool(pools) and all(pool.ready for pool in pools or ())


def _say(pools: Sequence[Pool] | None) -> str:
    if pools is None:
        return "no answer yet"
    return ", ".join(f"{pool.name} {'ready' if pool.ready else pool.detail or 'not ready'}" for pool in pools)


def _announce_stop(server: ChildServer, console: Console) -> None:
    if server.alive:
        console.print("Stopping the server ...")
