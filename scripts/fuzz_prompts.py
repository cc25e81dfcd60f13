"""Feeds random text to everything that reads prompts, and keeps the slowest of it.

    python scripts/fuzz_prompts.py --minutes 60 --seed 1

Every syntax, the templates, and the shipped model's planner read it. The only error allowed is InvalidRequest with a
field; what is read has to survive being written and read again; and no text of a length that the server takes by
default may take longer than MOST_S. Ends with 1 at the first that does otherwise, and prints it.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from serve.domain.text import LongPrompt, Syntax, TextRequest, Weighting
from serve.errors import InvalidRequest
from serve.models.folder import SHIPPED, check_folder
from serve.prompts.normal import normal
from serve.prompts.parse import parse
from serve.prompts.places import MAX_CHARACTERS
from serve.prompts.plan import Planner, Source
from serve.prompts.templates import expand, names
from serve.prompts.written import written

T = TypeVar("T")

LONGEST = 8192
"""Characters, as many as `limits.max_prompt_bytes` has bytes."""
MOST_S = 0.05
PIECES = [
    *["cat", "a red circle", "a photo of ", ", ", " ", "  ", "\n", "é", "字", "\xa0", "A", "AND", " AND "],
    *["BREAK", " BREAK ", "(", ")", "[", "]", "{", "}", "<", ">", ":", "|", "\\", '"', "'", ",", ".", "+", "-"],
    *["~", "=", "++", "--", "\\(", "\\)", "\\[", "\\]", "\\{", "\\}", '\\"', "\\\\", "\\:", "\\|", "(x)"],
    *["(x:1.5)", "[x]", "((x))", ":1.2)", ":0.5]", ":3]", ":1-9]", ":0.1-0.9]", "[a:b:0.5]", "[a:b:3]"],
    *["[a:b:2-8]", "[a|b]", "[a||b]", "<c>", "<lora:x:1>", "<lora:", "1.5", "0.5", "3", "e5", "nan", "inf"],
    *[":nan)", ":1e9)", " :0.5", '("a", "b")', ".blend(", ".and(", ".schedule(", ".attend(", ".swap(", ".add("],
    *["no_normalize)", "0.7, 0.3)", "1-5)", "1~5)", "withLora(x)", "{a}", "{b}", "{x|y}", "{|}", "2::"],
    *["\ud800", "\x00", "\u202e"],
]
IMPOLITE = {"\ud800", "\x00", "<lora:x:1>", ":nan)", ":1e9)", ".swap(", "withLora(x)", "{a}", "{b}"}
"""Pieces that get a text refused."""


class Misread(Exception):
    """A reader did what none may do."""


@dataclass(order=True)
class Slow:
    """`seconds` is the best of three."""

    seconds: float
    reader: str = field(compare=False)
    text: str = field(compare=False)


class Slowest:
    """Owns: the slowest few."""

    def __init__(self, most: int = 5) -> None:
        self._most = most
        self._kept: list[Slow] = []

    @property
    def bar(self) -> float:
        """What is below need not be kept."""
        return self._kept[0].seconds if len(self._kept) == self._most else 0.0

    def keep(self, one: Slow) -> None:
        heapq.heappush(self._kept, one)
        if len(self._kept) > self._most:
            heapq.heappop(self._kept)

    def print(self, title: str, scale: float) -> None:
        print(f"{title}:")
        for one in sorted(self._kept, reverse=True):
            shown = one.text if len(one.text) <= 100 else f"{one.text[:100]}..."
            print(f"  {one.seconds * scale:8.3f}  {one.reader:7} {len(one.text):5} {shown!r}")


class Fuzzer:
    """Owns: the random numbers, and the slowest texts by time and by time per character."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._planner = shipped_planner()
        self.text = ""
        self.read = 0
        self.refused = 0
        self.slowest = Slowest()
        self.slowest_per_character = Slowest()
        self.slowest_plans = Slowest()

    def round(self) -> None:
        """One text through everything."""
        text = self.text = self._text()
        values = {name: self._short() for name in "ab"}
        seed = self._random.randrange(1000)
        request = self._request(text)
        filled = self._timed("expand", text, lambda: expand(text, values, seed))
        if filled is not None:
            check(expand(filled, {}, seed + 1) == filled, "expands further")
            check(names(text) <= set(values), "a variable had no value")
            self._read(filled, Syntax.A1111)
        for syntax in Syntax:
            self._read(text, syntax)
        self._timed("plan", text, lambda: self._planner.plan(request))

    def _read(self, text: str, syntax: Syntax) -> None:
        prompt = self._timed(syntax.value, text, lambda: parse(text, syntax=syntax))
        if prompt is not None:
            check(normal(prompt) == prompt, "not in normal form")
            again = written(prompt)
            if len(again) <= MAX_CHARACTERS:
                check(parse(again) == prompt, f"read otherwise when written as {again!r}")

    def _timed(self, reader: str, text: str, work: Callable[[], T]) -> T | None:
        """What `work` gives, None where it refuses."""
        taken, result = clocked(work)
        self.read += 1
        self.refused += result is None
        planned = reader == "plan"
        slowest = self.slowest_plans if planned else self.slowest
        per_character = taken / max(len(text), 200)
        if taken > slowest.bar or per_character > self.slowest_per_character.bar or taken > MOST_S:
            taken = min(taken, *(clocked(work)[0] for _ in range(2)))
            slowest.keep(Slow(taken, reader, text))
            if not planned:
                self.slowest_per_character.keep(Slow(taken / max(len(text), 200), reader, text))
        # A plan takes a tokenizer's time for each text of each step; it has a bound of its own.
        check(taken < MOST_S * (20 if planned else 1), f"{reader} took {taken:.3f} s")
        return result

    def _text(self) -> str:
        """Pieces at random, one piece again and again, or a few pieces again and again; now and then very long."""
        draw = self._random
        length = min(LONGEST, int(draw.lognormvariate(4.0, 1.5)))
        kind = draw.random()
        if kind < 0.7:
            return "".join(self._pieces(length))
        unit = "".join(draw.choices(PIECES, k=draw.choice([1, 1, 2, 3, 5]))) or "("
        before, after = self._short(), self._short()
        repeated = unit * min(90 if kind < 0.8 else LONGEST, length // len(unit) + 1)
        return f"{before}{repeated}{after}"[:LONGEST]

    def _short(self) -> str:
        return "".join(self._pieces(self._random.randrange(12)))

    def _pieces(self, length: int) -> Iterator[str]:
        """Half of the texts keep off what is refused at once, so that something is read."""
        polite = self._random.random() < 0.5
        while length > 0:
            piece = self._random.choice(PIECES)
            if polite and piece in (
                "\ud800",
                "\x00",
                "<lora:x:1>",
                ":nan)",
                ":1e9)",
                ".swap(",
                "withLora(x)",
                "{a}",
                "{b}",
            ):
                continue
            yield piece
            length -= len(piece)

    def _request(self, text: str) -> TextRequest:
        draw = self._random
        return TextRequest(
            model="shapes",
            prompt=text,
            negative_prompt=draw.choice([None, "", text[:100]]),
            width=64,
            height=64,
            num_inference_steps=draw.choice([1, 2, 20, 50]),
            syntax=draw.choice(list(Syntax)),
            weighting=draw.choice(list(Weighting)),
            long_prompt=draw.choice(list(LongPrompt)),
        )


def shipped_planner() -> Planner:
    model = check_folder(SHIPPED, "shapes", text_only=True)
    return Planner(model, {part.role: Source(fingerprint=part.role, name=part.name, part=part) for part in model.text})


def clocked(work: Callable[[], T]) -> tuple[float, T | None]:
    """How long `work` took of this process's own time, and what it gave; None where it refused, as it may."""
    started = time.process_time()
    result = None
    try:
        result = work()
    except InvalidRequest as error:
        named = bool(error.param) and error.message.startswith(str(error.param))
        check(named and len(error.message) < 400, f"refused with {error.message!r}")
    return time.process_time() - started, result


def check(holds: bool, told: str) -> None:
    if not holds:
        raise Misread(told)


def report(fuzzer: Fuzzer) -> None:
    print(f"{fuzzer.read} readings, {fuzzer.refused} refused")
    fuzzer.slowest.print("slowest to read, in ms", 1e3)
    fuzzer.slowest_per_character.print("slowest to read per character (of at least 200), in us", 1e6)
    fuzzer.slowest_plans.print("slowest to plan, in ms", 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fuzzer = Fuzzer(arguments.seed)
    gc.freeze()  # what the imports have left is not searched again and again
    ends = time.monotonic() + arguments.minutes * 60.0
    told = time.monotonic()
    while time.monotonic() < ends:
        try:
            fuzzer.round()
        except Exception:
            print(f"failed: {fuzzer.text!r}", file=sys.stderr)
            report(fuzzer)
            raise
        if time.monotonic() - told > 60.0:
            told = time.monotonic()
            print(f"{fuzzer.read} readings", flush=True)
    report(fuzzer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
