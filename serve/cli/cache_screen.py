"""What `tandem cache stats` and `tandem cache clear` do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.client import Client

_NAME_WIDTH = 18


async def shown_stats(client: Client, *, as_json: bool) -> None:
    """The server's cache as a table, or as the JSON of `GET /v1/cache`."""
    async with client:
        state = await client.cache()
    if as_json:
        print(json.dumps(state, indent=2))
        return
    console = Console(highlight=False, markup=False)
    console.print(_redis_line(state))
    console.print(_table(state))
    console.print("Memory, Redis, encoded: units of text by where they were found.", style="dim")
    for process in state["processes"]:
        if process["redis"] == "away":
            console.print(f"{process['name']} leaves Redis alone for a while: it failed.", style="yellow")


async def cleared(client: Client) -> None:
    async with client:
        removed = await client.clear_cache()
    print(f"{removed:,} embeddings removed from Redis; every process empties its memory within seconds")


def _redis_line(state: Mapping[str, Any]) -> Text:
    redis = state["redis"]
    if redis is None:
        return Text(f"Redis: {state['redis_detail']}. Only the process that answered is known.", style="yellow")
    bound = f" of {size(redis['max_bytes'])}" if redis["max_bytes"] else ""
    return Text(f"Redis: {redis['keys']:,} keys, {size(redis['bytes'])}{bound}, {redis['evicted']:,} evicted")


def _table(state: Mapping[str, Any]) -> Table:
    """A row for each process, below a row for all of its place where there are several."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("process", no_wrap=True)
    for column in ("entries", "bytes", "memory", "Redis", "encoded", "hit rate"):
        table.add_column(column, justify="right", no_wrap=True)
    for place, total in state["places"].items():
        members = [process for process in state["processes"] if process["place"] == place]
        table.add_row(*_cells(place, total))
        for process in members if len(members) > 1 else ():
            table.add_row(*_cells(f"  {_short(process['name'])}", process), style="dim")
    return table


def _cells(name: str, memory: Mapping[str, Any]) -> list[Text]:
    hits, rate = memory["hits"], memory["hit_rate"]
    tiers = (count(hits[tier]) for tier in ("memory", "redis", "encoded"))
    share = "" if rate is None else f"{100 * rate:.1f} %"
    return [Text(cell) for cell in (name, count(memory["entries"]), size(memory["bytes"]), *tiers, share)]


def _short(name: str) -> str:
    """The end of a long name: a replica's begins with its machine's."""
    return name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"


def count(number: int) -> str:
    """At most six characters: 9,999, then 12.3k, 4.5M."""
    for bound, divisor, unit in ((10_000, 1, ""), (999_950, 1e3, "k"), (999_950_000, 1e6, "M")):
        if number < bound:
            return f"{number:,}" if divisor == 1 else f"{number / divisor:.1f}{unit}"
    return f"{number / 1e9:.1f}G"


def size(number: float) -> str:
    """Bytes in decimal units: 312 B, 4.1 kB, 268.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.95:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
