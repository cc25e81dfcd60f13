"""What `tandem learn` does: read the pictures, make the steps, draw previews, keep the vectors."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from serve.cli.sheet import Picture, contact_sheet
from serve.encoders.concept_files import NAME, SUFFIX, write_concept
from serve.errors import OperatorError
from serve.learning.captions import CAPTIONS, checked
from serve.learning.examples import Example, read_examples
from serve.learning.learner import Learner, Wishes, check_model
from serve.models import ModelFolder, resolve
from serve.prompts.concepts import ConceptFault
from serve.settings.tree import Settings

TILES = 4
"""Pictures of a preview, and a row of the sheet; more where more prompts are to be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be learned from what, and where it goes. Without `captions`, those of the kind are said."""

    name: str
    images: Path
    model: str | None
    captions: tuple[str, ...]
    style: bool
    preview_every: int
    previews: tuple[str, ...]
    out: Path | None
    replace: bool


class Stop:
    """Ctrl-C and SIGTERM in here ask for an end after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Sheet:
    """The previews as one picture, a row for each time, the pictures that are learned from above them.

    Owns: the file, which is whole at any time.
    """

    def __init__(self, file: Path, examples: Sequence[Example], tiles: Sequence[tuple[str, int]]) -> None:
        """`tiles` are captions and seeds."""
        self.file = file
        self._tiles = tiles
        shown = [examples[index % len(examples)] for index in range(len(tiles))]
        self._rows = [[Picture(each.image, each.name, "to learn from") for each in shown]]

    def add(self, learner: Learner, name: str, loss: float) -> None:
        """Draw the tiles as they come out by now. Raises OSError where the file can't be written."""
        note = f"step {learner.done}, loss {loss:.4f}"
        self._rows.append(
            [
                Picture(learner.draw(caption, seed), caption.replace("{}", f"<{name}>"), f"{note}, seed {seed}")
                for caption, seed in self._tiles
            ]
        )
        beside = self.file.with_name(f".{self.file.name}")
        contact_sheet(list(chain.from_iterable(self._rows)), len(self._tiles)).save(beside, "PNG")
        beside.replace(self.file)


def story(settings: Settings, order: Order, wishes: Wishes) -> int:
    """Exit code 0, or 1 where it was ended before the first step. Bars go to stderr, the report to stdout.

    Raises OperatorError naming what is wrong; OutOfMemory, DeviceLost, GenerationFailed.
    """
    file = _file(settings, order)
    model = _model(settings, order.model)
    check_model(model)
    assert model.denoiser is not None  # it was checked
    captions = [checked(each, "caption") for each in order.captions] or CAPTIONS["style" if order.style else "object"]
    previews = [checked(each, "preview") for each in order.previews]
    size = model.denoiser.default_width, model.denoiser.default_height
    examples = read_examples(order.images, size, captions)
    console = Console(stderr=True)
    with console.status(f"loading {model.name}"):
        learner = Learner(model, examples, wishes, settings.diffusion)
    tiles = _tiles(previews, examples, wishes.seed)
    sheet = Sheet(file.with_suffix(".png"), examples, tiles) if order.preview_every else None
    began, before = time.monotonic(), learner.probe()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _learn(learner, order, wishes, before, sheet, console)
        finally:  # whatever ended it
            if learner.done:
                write_concept(file, model, learner.vectors, _notes(model, learner, wishes))
    except OSError as error:
        raise OperatorError(f"--out {file}: {error.strerror}", "out") from None
    except ConceptFault as fault:
        raise OperatorError(f"--rate {learner.rate:g} is too large: {fault}", "rate") from None
    _report(learner, order, model, file, sheet, before, time.monotonic() - began)
    return 0 if learner.done else 1


def _learn(
    learner: Learner, order: Order, wishes: Wishes, before: float, sheet: Sheet | None, console: Console
) -> None:
    """`before` is the loss before the first step."""
    with Stop() as stop, _bar(console) as bar:
        task = bar.add_task(f"<{order.name}>", total=wishes.steps, loss=f"loss {before:.4f}")
        if sheet is not None:
            sheet.add(learner, order.name, before)
        for _ in learner.losses():
            bar.update(task, completed=learner.done)
            due = learner.done == wishes.steps or (order.preview_every and learner.done % order.preview_every == 0)
            if sheet is not None and due and not stop.asked:
                now = learner.probe()
                bar.update(task, loss=f"loss {before:.4f} -> {now:.4f}")
                sheet.add(learner, order.name, now)
            if stop.asked:
                break


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _report(
    learner: Learner, order: Order, model: ModelFolder, file: Path, sheet: Sheet | None, before: float, took_s: float
) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not learner.done:
        console.print("ended before the first step: nothing was learned", style="yellow")
        return
    count = learner.words.count
    console.print(
        f"<{order.name}>: {count} vector{'s' * (count > 1)} for {model.name}, {learner.done} steps in {took_s:.0f} s, "
        f"loss {before:.4f} -> {learner.probe():.4f}"
    )
    for each in (file, *([sheet.file] if sheet is not None else [])):
        console.print(str(each))


def _notes(model: ModelFolder, learner: Learner, wishes: Wishes) -> dict[str, str]:
    return {
        "model": model.name,
        "family": model.family,
        "init": wishes.init,
        "steps": str(learner.done),
        "batch": str(wishes.batch),
        "rate": f"{learner.rate:g}",
        "seed": str(wishes.seed),
    }


def _file(settings: Settings, order: Order) -> Path:
    if not NAME.fullmatch(order.name):
        raise OperatorError(f"name: {order.name!r}: up to 64 letters, digits, '_' and '-' make a name", "name")
    file = order.out or settings.concept_folder / f"{order.name}{SUFFIX}"
    if file.suffix != SUFFIX:
        raise OperatorError(f"--out {file}: it must end with {SUFFIX}", "out")
    if file.exists() and not order.replace:
        raise OperatorError(f"--out {file}: there is one already; --replace writes over it", "out")
    return file


def _model(settings: Settings, name: str | None) -> ModelFolder:
    """The settings' model of that name, None for the first. Raises OperatorError."""
    names = []
    for setting, each in (("model", settings.model), *((f"models.{i}", m) for i, m in enumerate(settings.models))):
        found = resolve(each, settings.data_dir.absolute(), setting=setting)
        if name in (None, found.name):
            return found
        names.append(found.name)
    raise OperatorError(f"--model {name}: the settings have {', '.join(names)}", "model")


def _tiles(previews: Sequence[str], examples: Sequence[Example], seed: int) -> list[tuple[str, int]]:
    """Captions and seeds: each caption once, and again with other seeds as far as there is room."""
    captions = previews or list(dict.fromkeys(each.captions[0] for each in examples))[:TILES]
    number = max(TILES, len(captions))
    return [(captions[index % len(captions)], seed + index // len(captions)) for index in range(number)]
