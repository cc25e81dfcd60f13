"""Pages of documentation as tests see them: their examples in order, and where their links lead.

An example is a fenced block of `sh` or `python`. A comment `<!-- not run: why -->` above it says why it is not run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+?) -->\s*\Z")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<to>[^()\s]+)\)")
_DONE = "-- the block has ended --"
_PRELUDE = """set -eu -o pipefail
curl() { command curl --fail-with-body --silent --show-error --max-time 60 "$@"; }
"""


@dataclass(frozen=True)
class Example:
    """A block of a page, `line` from 1. `why` it is not run; empty where it is."""

    kind: str
    text: str
    line: int
    why: str


def examples(page: str) -> Iterator[Example]:
    for found in _FENCE.finditer(page):
        if found["kind"] in ("sh", "python"):
            before = page[: found.start()]
            why = _NOT_RUN.search(before)
            yield Example(found["kind"], found["text"], before.count("\n") + 1, why["why"] if why else "")


def links(page: str) -> Iterator[str]:
    """Where its links lead, but for those of examples."""
    for found in _LINK.finditer(_FENCE.sub("", page)):
        yield found["to"]


def anchors(page: str) -> set[str]:
    """What `#...` may name on it, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class Reader:
    """Runs a page's examples one after the other, in `folder`: those of `sh` in one shell, those of `python` in one
    namespace. Where they say `http://127.0.0.1:8000` the server at `url` answers.

    Owns: the shell, which `close` ends.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._names: dict[str, Any] = {"__name__": "__page__"}
        search = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder), "TANDEM_KEY": "a-key"}
        self._shell = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=search,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._tell(_PRELUDE)

    def run(self, example: Example) -> None:
        """AssertionError with what the shell said, or whatever the Python raises."""
        text = example.text.replace("http://127.0.0.1:8000", self._url)
        if example.kind == "python":
            exec(compile("\n" * example.line + text, "the page", "exec"), self._names)
            return
        self._tell(f"{text}\necho '{_DONE}'\n")
        assert self._shell.stdout is not None
        said = []
        for line in self._shell.stdout:
            if line.endswith(f"{_DONE}\n"):
                return
            said.append(line)
        raise AssertionError(f"line {example.line}: the shell ended with {self._shell.wait()}\n{''.join(said)}")

    def close(self) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.kill()
        self._shell.communicate()

    def _tell(self, text: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(text)
        self._shell.stdin.flush()
