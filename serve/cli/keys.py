"""`tandem keys`: make, list and revoke API keys. It asks the job Redis itself; no server has to run."""

from __future__ import annotations

import json
import re
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.callers import Allowance, Scope
from serve.cli.options import AsJson, Assignments, ConfigFile, DataDir, behind
from serve.errors import OperatorError

if TYPE_CHECKING:
    from serve.cli.backstage import Backstage
    from serve.keys import ApiKey

keys = typer.Typer(help="Look after the API keys.", no_args_is_help=True)

_NAME_CHARACTERS = 64
_MOST = 10**9
_WEIGHTS = (0.01, 100.0)
_LONGEST_S = 100 * 366 * 86400
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose it is, for people to read.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="generate, embed or admin; may be repeated.", show_default="generate and embed"),
    ] = None,
    weight: Annotated[
        float, typer.Option(help="Share of the replicas' time, beside other keys with waiting jobs.")
    ] = 1,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most orders a minute.")] = None,
    engine_seconds_per_day: Annotated[float | None, typer.Option(help="Most predicted replica seconds a day.")] = None,
    max_unfinished: Annotated[int | None, typer.Option(help="Most jobs that have not ended.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it stops, from now: 30d, 12h, 2w.", show_default="never")
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Make an API key, and show it this once."""
    if not (name.isprintable() and name.strip() and len(name) <= _NAME_CHARACTERS):
        raise OperatorError(f"NAME: write 1 to {_NAME_CHARACTERS} printable characters", "NAME")
    scopes = _scopes(scope or [Scope.GENERATE, Scope.EMBED])
    _within("--weight", weight, *_WEIGHTS)
    _within("--requests-per-minute", requests_per_minute, 1, _MOST)
    _within("--engine-seconds-per-day", engine_seconds_per_day, 1, _MOST)
    _within("--max-unfinished", max_unfinished, 1, _MOST)
    expires_in_s = None if expires is None else _seconds(expires)
    allowance = Allowance(
        requests_per_minute=requests_per_minute,
        engine_s_per_day=engine_seconds_per_day,
        max_unfinished=max_unfinished,
    )

    async def story(stage: Backstage) -> None:
        new = await stage.keys.create(name, scopes, weight, allowance, expires_in_s)
        # The key is alone on standard output, so that a script can take it.
        print(json.dumps({"secret": new.secret, **_told(new.key)}, indent=2) if as_json else new.secret)
        ends = f"`tandem keys revoke {new.key.id}` ends it"
        print(f"made in {stage.place}; shown this once, and kept only as a hash; {ends}", file=sys.stderr)

    behind(story, data_dir, config_file, assignments, begin=True)


@keys.command("list")
def list_keys(
    as_json: AsJson = False,
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Every key that was made, revoked and expired ones too."""

    async def story(stage: Backstage) -> None:
        found = await stage.keys.list()
        if as_json:
            print(json.dumps([_told(key) for key in found], indent=2))
        elif found:
            Console(highlight=False, markup=False).print(_table(found))
        else:
            print(f"no API keys in {stage.place}; `tandem keys create NAME` makes one")

    behind(story, data_dir, config_file, assignments)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the twelve characters after tdm_.")],
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """End a key. Its jobs go on; nobody but the operator sees them any more."""

    async def story(stage: Backstage) -> None:
        key = await stage.keys.revoke(key_id)
        print(f"{key.id} ({key.name}) is revoked; within a second every server refuses it")

    behind(story, data_dir, config_file, assignments)


def _scopes(names: list[str]) -> frozenset[Scope]:
    known = {scope.value: scope for scope in Scope}
    for name in names:
        if name not in known:
            raise OperatorError(f"--scope {name}: there are {', '.join(known)}", "scope")
    return frozenset(known[name] for name in names)


def _within(option: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # nor is a NaN
        raise OperatorError(f"{option} {value:g}: from {least:g} to {most:g}", option.removeprefix("--"))


def _seconds(duration: str) -> int:
    written = _DURATION.fullmatch(duration)
    seconds = int(written[1]) * _UNITS_S[written[2]] if written else 0
    if not 0 < seconds <= _LONGEST_S:
        raise OperatorError(f"--expires {duration}: write a time from now, such as 30d, 12h or 2w", "expires")
    return seconds


def _told(key: ApiKey) -> dict[str, Any]:
    """As JSON. Times are Unix seconds."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "weight": key.weight,
        "requests_per_minute": key.allowance.requests_per_minute,
        "engine_seconds_per_day": key.allowance.engine_s_per_day,
        "max_unfinished": key.allowance.max_unfinished,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _table(found: tuple[ApiKey, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("scopes")
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("allowance")
    table.add_column("state", no_wrap=True)
    for key in found:
        state, over = _state(key)
        cells = (key.id, key.name, " ".join(sorted(key.scopes)), f"{key.weight:g}", _allowance(key.allowance), state)
        table.add_row(*map(Text, cells), style="dim" if over else None)
    return table


def _allowance(allowance: Allowance) -> str:
    bounds = (
        (allowance.requests_per_minute, "/min"),
        (allowance.engine_s_per_day, " s/day"),
        (allowance.max_unfinished, " jobs"),
    )
    return ", ".join(f"{bound:.10g}{unit}" for bound, unit in bounds if bound is not None)


def _state(key: ApiKey) -> tuple[str, bool]:
    """In words, and whether the key is over."""
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}", True
    if key.expires_at is None:
        return "valid", False
    over = key.expires_at <= time.time()
    return f"{'expired' if over else 'until'} {_day(key.expires_at)}", over


def _day(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d")
