"""`tandem bench prompts`: what the prompt language does to pictures, by the shipped model and its judge, and what
changing a prompt costs the text encoders. Everything goes through the product's own planner, encoder, weighting and
step loop, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.bench.machine import Machine, OtherWork, this_machine
from serve.diffusion.engine import Engine, Work
from serve.diffusion.profile import open_profile
from serve.diffusion.runner import open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain.orders import ImageRequest
from serve.domain.text import EncodeUnit, Weighting
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.settings.tree import Settings
from serve.shapes.captions import between
from serve.shapes.draw import COLOR_NAMES, PALETTE, SHAPES, is_held_out
from serve.shapes.judge import Reading, read, to_lab
from serve.telemetry.metrics import InProcessMetrics

STEPS, GUIDANCE, SIDE = 20, 3.0, 128
SWEEP = 10
HEAVY, LIGHT = 1.6, 0.4

Rgb = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Of `of` pictures, `right` moved as `wanted` says."""

    what: str
    wanted: str
    right: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """`jobs` orders that differ in one number: rows that the encoder computed for the first, and for all others."""

    what: str
    jobs: int
    first: int
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    machine: Machine
    effects: list[Effect] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    other_work: float | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """Two colours of one thing, which differ from each other and from the ground. No training picture shows the thing
    in its first colour on that ground."""

    first: str
    second: str
    shape: str
    ground: str
    seed: int

    def said(self, color: str) -> str:
        return f"a large {color} {self.shape} on a {self.ground} background"


class Studio:
    """Draws orders, and counts what their text costs. Owns: the text encoder, what it gave so far, the step loop."""

    def __init__(self, model: ModelFolder, data_dir: Path, engine: Engine) -> None:
        registry = register([model], Settings(data_dir=data_dir))
        self._model = model
        self._planner = Planner(model, registry.sources(model.name))
        self._towers = {each.fingerprint: TextTower.load(each, "cpu") for each in registry.encoders}
        self._engine = engine
        self._known: dict[str, bytes] = {}

    @property
    def encoded(self) -> int:
        """Rows that text encoders have computed."""
        return sum(tower.rows for tower in self._towers.values())

    def order(self, prompt: str, seed: int, **fields: Any) -> ImageRequest:
        return ImageRequest(
            model=self._model.name,
            prompt=prompt,
            seed=seed,
            **{
                "width": SIDE,
                "height": SIDE,
                "num_inference_steps": STEPS,
                "guidance_scale": GUIDANCE,
                **fields,
            },
        )

    def draw(self, orders: Sequence[ImageRequest]) -> list[Reading]:
        """What the judge sees in each."""
        works = [self._work(f"{number}", order) for number, order in enumerate(orders)]
        futures = [self._engine.submit(work, lambda _: None) for work in works]
        return [read(np.asarray(future.result().images[0])) for future in futures]

    def _work(self, run_id: str, order: ImageRequest) -> Work:
        plan = self._planner.plan(order.text)
        for unit in plan.units:
            if unit.key not in self._known:
                self._encode(unit)
        return Work(run_id, replace(order, composed=plan.composed), compose(plan, self._known))

    def _encode(self, unit: EncodeUnit) -> None:
        """All that the forward gives is kept, as a pool does."""
        tower = self._towers[unit.encoder]
        (values,) = tower.encode([Row.of(unit, tower.outputs)])
        for output, tensor in values.items():
            self._known[replace(unit, output=output).key] = pack(tensor)


def measure(count: int, tell: Callable[[str], None]) -> Report:
    """`count` prompts for each effect."""
    report = Report(machine=this_machine())
    with OtherWork() as others, _studio() as studio:
        for what, effect in EFFECTS.items():
            tell(what)
            report.effects.extend(effect(studio, scenes(count)))
        for (what, sweep), scene in zip(SWEEPS.items(), scenes(len(SWEEPS), seed=12), strict=True):
            tell(f"sweep: {what}")
            report.sweeps.append(_swept(studio, what, [sweep(scene, number) for number in range(SWEEP)]))
    return replace(report, other_work=others.share)


def scenes(count: int, seed: int = 11) -> list[Scene]:
    rng = np.random.default_rng(seed)
    found: list[Scene] = []
    while len(found) < count:
        ground, first, second = (str(name) for name in rng.choice(COLOR_NAMES, 3, replace=False))
        shape = str(rng.choice(SHAPES))
        if is_held_out(first, shape, ground):
            found.append(Scene(first, second, shape, ground, len(found)))
    return found


@contextmanager
def _studio() -> Iterator[Studio]:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        settings = DiffusionSettings(device="cpu", profile_s=0)
        model = resolve(ModelSettings(), Path(scratch))
        runner = open_runner(model, settings)
        profile = open_profile(runner, model, settings, Path(scratch))
        engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics())
        try:
            yield Studio(model, Path(scratch), engine)
        finally:
            engine.stop()


def _weights(studio: Studio, many: Sequence[Scene]) -> Iterator[Effect]:
    """Of "a red blue circle": 1.6 on one of the words, 0.4 on the other, moves the colour towards the one."""

    def draw(text: Callable[[Scene], str], rule: Weighting) -> list[Rgb]:
        orders = [studio.order(each.said(text(each)), each.seed, prompt_weighting=rule) for each in many]
        return _colors(studio.draw(orders))

    plain = draw(lambda each: f"{each.first} {each.second}", Weighting.A1111)
    for rule in Weighting:
        for name, text in (
            ("first", lambda each: f"({each.first}:{HEAVY}) ({each.second}:{LIGHT})"),
            ("second", lambda each: f"({each.first}:{LIGHT}) ({each.second}:{HEAVY})"),
        ):
            goals = [_rgb(getattr(each, name)) for each in many]
            moved = draw(text, rule)
            closer = [_far(m, g) < _far(p, g) for m, p, g in zip(moved, plain, goals, strict=True)]
            yield Effect(
                what=f"weight, {rule.value}: {HEAVY} on the {name} of two colours, {LIGHT} on the other",
                wanted="nearer to it",
                right=sum(closer),
                of=len(closer),
            )


def _negative(studio: Studio, many: Sequence[Scene]) -> Iterator[Effect]:
    """The prompt names no colour; what a seed gave without a negative prompt is the negative prompt then."""
    orders = [studio.order(f"a large {each.shape} on a {each.ground} background", each.seed) for each in many]
    before = [_name(reading) for reading in studio.draw(orders)]
    seen = [(order, color) for order, color in zip(orders, before, strict=True) if color]
    after = studio.draw([replace(order, negative_prompt=color) for order, color in seen])
    gone = [_name(reading) != color for reading, (_, color) in zip(after, seen, strict=True)]
    yield Effect(what="negative prompt: the colour that a seed gave", wanted="gone", right=sum(gone), of=len(gone))


def _blends(studio: Studio, many: Sequence[Scene]) -> Iterator[Effect]:
    def draw(share: float) -> list[Rgb]:
        texts = (f'("{s.said(s.first)}", "{s.said(s.second)}").blend({1 - share:g}, {share:g})' for s in many)
        return _colors(studio.draw([studio.order(text, s.seed) for text, s in zip(texts, many, strict=True)]))

    places = [_along(rgb, each) for rgb, each in zip(draw(0.5), many, strict=True)]
    yield Effect(
        what="blend of two colours, half and half",
        wanted="between them",
        right=sum(0.1 < place < 0.9 for place in places),
        of=len(places),
    )
    quarter = [_along(rgb, each) for rgb, each in zip(draw(0.25), many, strict=True)]
    most = [_along(rgb, each) for rgb, each in zip(draw(0.75), many, strict=True)]
    yield Effect(
        what="blend, a quarter against three quarters of the second colour",
        wanted="nearer to it with more of it",
        right=sum(less < more for less, more in zip(quarter, most, strict=True)),
        of=len(places),
    )


def _switches(studio: Studio, many: Sequence[Scene]) -> Iterator[Effect]:
    shapes = [SHAPES[1 + number % (len(SHAPES) - 1)] for number in range(len(many))]
    colors = [next(color for color in COLOR_NAMES if not is_held_out(color, shape, "white")) for shape in shapes]

    def draw(step: int) -> list[str]:
        texts = (
            f"a large {color} [circle:{shape}:{step}] on a white background"
            for color, shape in zip(colors, shapes, strict=True)
        )
        orders = [studio.order(text, each.seed) for text, each in zip(texts, many, strict=True)]
        return [reading.things[0].shape if reading.things else "" for reading in studio.draw(orders)]

    early = [seen == shape for seen, shape in zip(draw(2), shapes, strict=True)]
    yield Effect(
        what="switch of the shape after 2 of 20 steps", wanted="the new shape", right=sum(early), of=len(early)
    )
    late = [seen == "circle" for seen in draw(19)]
    yield Effect(what="the same after 19 steps", wanted="the old shape", right=sum(late), of=len(late))


def _ramps(studio: Studio, many: Sequence[Scene]) -> Iterator[Effect]:
    """One that is over early has the second colour in most steps, one that begins late the first."""

    def draw(when: str) -> list[float]:
        texts = (each.said(f"[{each.first}:{each.second}:{when}]") for each in many)
        orders = [studio.order(text, each.seed) for text, each in zip(texts, many, strict=True)]
        return [_along(rgb, each) for rgb, each in zip(_colors(studio.draw(orders)), many, strict=True)]

    early, late = draw("0-4"), draw("4-20")
    yield Effect(
        what="ramp from one colour to another, over steps 0-4 against 4-20",
        wanted="nearer to the second where it comes sooner",
        right=sum(soon > slow for soon, slow in zip(early, late, strict=True)),
        of=len(many),
    )


def _compositions(studio: Studio, many: Sequence[Scene]) -> Iterator[Effect]:
    """Two colours of one thing as two noise predictions: the weights decide."""

    def draw(first: float, second: float) -> list[float]:
        texts = (f"{each.said(each.first)} :{first:g} AND {each.said(each.second)} :{second:g}" for each in many)
        orders = [studio.order(text, each.seed) for text, each in zip(texts, many, strict=True)]
        return [_along(rgb, each) for rgb, each in zip(_colors(studio.draw(orders)), many, strict=True)]

    less, more = draw(0.8, 0.2), draw(0.2, 0.8)
    yield Effect(
        what="AND of two colours, 0.8 to 0.2 against 0.2 to 0.8",
        wanted="nearer to the heavier one",
        right=sum(a < b for a, b in zip(less, more, strict=True)),
        of=len(many),
    )


EFFECTS: dict[str, Callable[[Studio, Sequence[Scene]], Iterator[Effect]]] = {
    "weights": _weights,
    "a negative prompt": _negative,
    "blends": _blends,
    "switches": _switches,
    "ramps": _ramps,
    "compositions": _compositions,
}


def _blended(scene: Scene, number: int) -> str:
    share = (number + 0.5) / SWEEP
    return f'("{scene.said(scene.first)}", "{scene.said(scene.second)}").blend({1 - share:g}, {share:g})'


SWEEPS: dict[str, Callable[[Scene, int], str]] = {
    "a weight": lambda scene, number: scene.said(f"({scene.first}:{0.55 + 0.1 * number:g})"),
    "a blend": _blended,
    "a switch's step": lambda scene, number: scene.said(f"[{scene.first}:{scene.second}:{number + 2}]"),
}


def _swept(studio: Studio, what: str, prompts: Sequence[str]) -> Sweep:
    counts = [studio.encoded]
    for text in prompts:
        studio.draw([studio.order(text, 3, negative_prompt=f"sweep of {what}")])
        counts.append(studio.encoded)
    return Sweep(what=what, jobs=len(prompts), first=counts[1] - counts[0], others=counts[-1] - counts[1])


def _name(reading: Reading) -> str:
    return reading.things[0].color if reading.things else ""


def _colors(readings: Sequence[Reading]) -> list[Rgb]:
    return [np.asarray(each.things[0].rgb if each.things else each.background_rgb) for each in readings]


def _rgb(color: str) -> Rgb:
    return np.asarray(PALETTE[COLOR_NAMES.index(color)])


def _far(one: Rgb, other: Rgb) -> float:
    """In CIELAB."""
    return float(np.linalg.norm(to_lab(one) - to_lab(other)))


def _along(rgb: Rgb, scene: Scene) -> float:
    """Where a colour lies between the scene's two: 0 at the first, 1 at the second, in sRGB."""
    one, other = (np.asarray(between(scene.first, scene.second, share)) for share in (0.0, 1.0))
    return float((rgb - one) @ (other - one) / ((other - one) @ (other - one)))
