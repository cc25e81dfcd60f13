"""`tandem doctor`: what keeps this server from working as it should, and what to change."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from serve.cli.client import local_url
from serve.cli.options import AsJson, Assignments, ConfigFile, DataDir, Url, load_settings

if TYPE_CHECKING:
    from serve.doctor.findings import Finding

_STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


def doctor(
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    url: Url = None,
    every: Annotated[bool, typer.Option("--all", help="Show what is as it should be, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for what keeps the server from working, and say what to change: Redis, S3, models, GPUs, versions, clocks,
    ports. Exit code 1 where anything is at fault. A server may be up or not."""
    settings = load_settings(config_file, assignments, {"data_dir": data_dir}).settings
    from serve.doctor.examine import examine

    here = local_url(settings.http)
    found = examine(settings, url or here, here=url in (None, here))
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        _show(found, every=every)
    raise typer.Exit(int(any(each.level == "fault" for each in found)))


def _show(found: list[Finding], *, every: bool) -> None:
    """A line each, however wide the terminal is: lines are to be searched and compared."""
    console = Console(soft_wrap=True, highlight=False)
    shown = [each for each in found if every or each.level != "ok"]
    width = max((len(each.setting) for each in shown), default=0)
    for each in shown:
        cure = f" -> {each.cure}" if each.cure else ""
        line = Text(f"{each.level.value:<8}", style=_STYLES[each.level.value])
        console.print(line + Text(f"{each.setting:<{width}}  {_line(each.told)}{_line(cure)}  [{each.code}]", style=""))
    counts = {level: sum(each.level == level for each in found) for level in _STYLES}
    faults, warnings = counts["fault"], counts["warning"]
    console.print(f"{_counted(faults, 'fault')}, {_counted(warnings, 'warning')}, {counts['ok']} ok")


def _line(text: str) -> str:
    """What a file, a server or a setting has put into it can't move the cursor or begin another line."""
    return "".join(each if each.isprintable() else " " for each in text)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
