"""One record is one line, whatever a user wrote."""

import io
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry.logs import LineFormatter, configure, escape


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    roots = [logging.getLogger(name) for name in ("serve", "deployments")]
    before = [(root.handlers, root.level, root.propagate) for root in roots]
    stream = io.StringIO()
    configure("info", stream)
    yield stream
    for root, (handlers, level, propagate) in zip(roots, before, strict=True):
        root.handlers, root.propagate = handlers, propagate
        root.setLevel(level)


def test_a_line_has_time_level_logger_message_and_fields(stream: io.StringIO) -> None:
    logging.getLogger("serve.jobs").info(
        "job %s finished", "abc", extra={"state": "succeeded", "prompt": 'a "red" dog'}
    )
    stamp, rest = stream.getvalue().split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert rest == 'INFO serve.jobs job abc finished state=succeeded prompt="a \\"red\\" dog"\n'


def test_the_level_is_obeyed_and_configuring_again_adds_no_second_line(stream: io.StringIO) -> None:
    configure("warning", stream)
    logging.getLogger("serve.x").info("quiet")
    logging.getLogger("deployments.x").warning("loud")
    assert stream.getvalue().count("\n") == 1
    assert "loud" in stream.getvalue()


def test_a_traceback_stays_on_its_line(stream: io.StringIO) -> None:
    try:
        raise KeyError("two\nlines")
    except KeyError:
        logging.getLogger("serve.x").exception("broken")
    assert stream.getvalue().count("\n") == 1
    assert "KeyError" in stream.getvalue()


@given(st.text(st.characters()))
def test_no_text_breaks_the_line_or_reaches_the_terminal_raw(text: str) -> None:
    assert escape(text).isprintable()
    record = logging.LogRecord("serve.x", logging.INFO, "", 0, "%s", (text,), None)
    record.prompt = text
    line = LineFormatter().format(record)
    assert line.isprintable()
    line.encode()
