"""What an examination finds, in the words of whoever has to mend it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from serve.errors import TandemError


class Level(enum.StrEnum):
    """OK is as it should be. A WARNING works, worse or less safely than it could. With a FAULT something won't work,
    or what clients were promised may not be kept."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. `code` names the kind of finding; docs/operations.md explains each by it. `setting` is what it is
    about, by its dotted name, or a word such as `clock` where it is about no setting. `cure` says what to do; it is
    empty for OK alone."""

    level: Level
    code: str
    setting: str
    told: str
    cure: str = ""


def ok(code: str, setting: str, told: str) -> Finding:
    return Finding(level=Level.OK, code=code, setting=setting, told=told)


def warning(code: str, setting: str, told: str, cure: str) -> Finding:
    return Finding(level=Level.WARNING, code=code, setting=setting, told=told, cure=cure)


def fault(code: str, setting: str, told: str, cure: str) -> Finding:
    return Finding(level=Level.FAULT, code=code, setting=setting, told=told, cure=cure)


def refused(code: str, error: TandemError, cure: str) -> Finding:
    """What the server itself would say at its start, as a fault; the setting's name is not said twice."""
    setting = error.param or code
    return fault(code, setting, error.message.removeprefix(f"{setting}: "), cure)
