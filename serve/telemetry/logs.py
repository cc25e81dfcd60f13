"""One-line structured logs on the standard library: `2026-01-31T12:00:00.123Z INFO serve.jobs.store message key=value`.

Fields are given as `logger.info("job finished", extra={"job": id, "state": state})`. Everything that could hold a
user's text is escaped, so that no prompt can start a line, forge a field or reach the terminal as a control sequence.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import IO

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_ROOTS = ("serve", "deployments")
_FORMS = "python_multipart"
"""Warns of each form that it can't read. Who sent it is told; strangers don't write the log."""


def escape(text: str) -> str:
    """The text on one line: control characters, line separators and lone surrogates become \\u escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class LineFormatter(logging.Formatter):
    """A record as one line: UTC time, level, logger, message, then its extra fields as `key=value`."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        stamp = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z"
        parts = [stamp, record.levelname, record.name, escape(record.getMessage())]
        parts += [
            f"{key}={_shown(value)}" for key, value in record.__dict__.items() if key not in _STANDARD and key[0] != "_"
        ]
        if record.exc_info:
            parts.append(f"exception={_shown(self.formatException(record.exc_info))}")
        return " ".join(parts)


def _shown(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(character in ' "=\\' for character in text):
        return text
    # json.dumps escapes control characters and quotes; escape() then takes what JSON leaves, such as U+2028.
    return escape(json.dumps(text, ensure_ascii=False))


def configure(level: str = "info", stream: IO[str] | None = None) -> None:
    """Send the logs of `serve` and `deployments` at or above `level` to `stream` (stderr). May be called again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    for name in _ROOTS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    logging.getLogger(_FORMS).setLevel(logging.ERROR)
