"""A workload: whose traffic it is, as data. The YAML files of those that come with Tandem lie in `workloads/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest.report.thresholds import Thresholds
from serve.bench.mixed import GUIDANCE, RATIOS, SAMPLERS, STEPS, UNGUIDED, Mix
from serve.errors import OperatorError

FOLDER = Path(__file__).with_name("workloads")

Dialect = Literal["wait", "events", "poll", "embeddings", "openai", "a1111", "generate", "imagen"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

Share = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """Descriptions are the docstrings: docs/loadtest.md's table is made of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Clocked(Part):
    """Requests are sent on a clock, whether the earlier ones are answered or not."""

    rate: Above0 | None = None
    """Requests a second, mean over the run."""
    load: Above0 | None = None
    """In place of `rate`: a multiple of the capacity that is measured first."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.rate is None) == (self.load is None):
            raise ValueError("write either rate or load")
        return self


class Poisson(_Clocked):
    """Many users who know nothing of each other."""

    process: Literal["poisson"] = "poisson"
    """`poisson`, `burst`, `diurnal` or `closed`."""


class Burst(_Clocked):
    """Everybody at once, then nobody: a Poisson process that is on and off by turns."""

    process: Literal["burst"] = "burst"
    """`poisson`, `burst`, `diurnal` or `closed`."""
    on_s: Above0
    """Seconds of each burst."""
    off_s: Above0
    """Seconds of silence after it."""


class Diurnal(_Clocked):
    """A day, scaled to the length of the run: from the night's low over the day's peak and back."""

    process: Literal["diurnal"] = "diurnal"
    """`poisson`, `burst`, `diurnal` or `closed`."""
    swing: Share = 0.8
    """How far the rate goes below and above its mean, as a share of it."""


class Closed(Part):
    """Users of whom each waits for an answer before the next request."""

    process: Literal["closed"] = "closed"
    """`poisson`, `burst`, `diurnal` or `closed`."""
    users: Count
    """Requests under way at once."""
    orders: Count
    """Requests in all; the run ends after them, or after `duration_s`."""


Arrivals = Annotated[Poisson | Burst | Diurnal | Closed, Field(discriminator="process")]


class _Texts(Part):
    scenes: Count = 1
    """Captions in each text, one after another: 8 are longer than a row of CLIP."""


class Unique(_Texts):
    """No text comes twice."""

    repetition: Literal["unique"] = "unique"
    """`unique`, `zipf` or `fixed`."""


class Zipf(_Texts):
    """Text number k is as likely as 1 / k**a."""

    repetition: Literal["zipf"] = "zipf"
    """`unique`, `zipf` or `fixed`."""
    a: Annotated[float, Field(ge=0, le=10)]
    """0: all texts are as likely; the larger, the more repetition."""
    texts: Annotated[int, Field(ge=1, le=1_000_000)]
    """Different texts."""


class Fixed(_Texts):
    """One text."""

    repetition: Literal["fixed"] = "fixed"
    """`unique`, `zipf` or `fixed`."""
    text: str | None = None
    """By default a caption that the seed chooses."""


Texts = Annotated[Unique | Zipf | Fixed, Field(discriminator="repetition")]


class Prompts(Part):
    """Captions in the language of the shipped model; what is repeated among prompts and among negative prompts."""

    positive: Texts = Zipf(a=1.0, texts=1000)
    """How prompts repeat."""
    negative: Texts = Zipf(a=1.0, texts=20)
    """How negative prompts repeat, those that are not empty."""
    empty_negative: Share = 0.5
    """Share of the requests whose negative prompt is empty."""


class Guidance(Part):
    """Evenly between `low` and `high`, where the model has guidance."""

    low: Annotated[float, Field(ge=1, le=100)] = GUIDANCE[0]
    """Least `guidance_scale`."""
    high: Annotated[float, Field(ge=1, le=100)] = GUIDANCE[1]
    """Largest `guidance_scale`."""
    unguided: Share = UNGUIDED
    """Share of the images without guidance."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Images(Part):
    """What each image is drawn from: values of equal weight. Every order has a seed of its own."""

    model: str | None = None
    """Name of a served model; by default the target's first."""
    steps: Annotated[tuple[Count, ...], Field(min_length=1)] = STEPS
    """`num_inference_steps`."""
    sizes: Literal["presets"] | Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1)] = "presets"
    """`presets`: the sizes that the target's model has for `ratios`; or a list of [width, height]."""
    ratios: Annotated[tuple[str, ...], Field(min_length=1)] = RATIOS
    """Aspect ratios of `presets`."""
    guidance: Guidance = Guidance()
    """`guidance_scale`."""
    samplers: Annotated[tuple[str, ...], Field(min_length=1)] = SAMPLERS
    """`scheduler`; of these the ones that the model has."""

    def mix(self) -> Mix:
        return Mix(
            steps=self.steps,
            ratios=self.ratios,
            sizes=None if self.sizes == "presets" else self.sizes,
            guidance=(self.guidance.low, self.guidance.high),
            unguided=self.guidance.unguided,
            samplers=self.samplers,
        )


class HangUps(Part):
    """Clients who leave before they are answered."""

    share: Share
    """Of the requests."""
    after_s: tuple[Above0, Above0]
    """They leave so many seconds after sending it, evenly between [shortest, longest]."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.after_s[0] > self.after_s[1]:
            raise ValueError("after_s must be [shortest, longest]")
        return self


class Workload(Part):
    """Whose traffic it is, and what the server must make of it."""

    name: str = ""
    """By default the name of the file."""
    description: str
    """Whose traffic it is."""
    arrivals: Arrivals
    """When requests are sent."""
    duration_s: Above0 = 60.0
    """How long requests are sent."""
    warm_up_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """The beginning that is in no figure."""
    deadline_s: Above0 = 10.0
    """Goodput counts what was finished within this time of when it was due."""
    give_up_s: Above0 = 60.0
    """A client goes away after this time, and its request is `late`."""
    dialects: Annotated[dict[Dialect, Above0], Field(min_length=1)] = {"wait": 1.0}
    """How clients ask, each with its weight."""
    images: Images = Images()
    """What they ask for."""
    prompts: Prompts = Prompts()
    """In which words."""
    hang_ups: HangUps | None = None
    """Who leaves early; by default nobody."""
    server: dict[str, dict[str, Any]] = {}
    """Settings of the server that is started for the run where no target is named, in groups as in settings.yaml."""
    thresholds: Thresholds = {}
    """What the run must reach; it decides the exit code."""

    @model_validator(mode="after")
    def _warm_up_within(self) -> Self:
        if self.warm_up_s >= self.duration_s:
            raise ValueError(f"warm_up_s ({self.warm_up_s:g}) must be below duration_s ({self.duration_s:g})")
        return self

    @property
    def users(self) -> int | None:
        """Of a closed loop; None for an open one."""
        return self.arrivals.users if isinstance(self.arrivals, Closed) else None

    @property
    def load(self) -> float | None:
        """The multiple of a capacity that is to be measured first; None where there is nothing to measure."""
        return None if isinstance(self.arrivals, Closed) else self.arrivals.load

    @property
    def rate(self) -> float | None:
        """Requests a second; None for a closed loop, and where it depends on a capacity."""
        return None if isinstance(self.arrivals, Closed) else self.arrivals.rate

    def at(self, rate: float) -> Workload:
        """With so many requests a second. Raises OperatorError for a closed loop, which has no rate."""
        if isinstance(self.arrivals, Closed):
            raise OperatorError(f"--rate: {self.name} is a closed loop, whose rate is the server's", "rate")
        return self.model_copy(update={"arrivals": self.arrivals.model_copy(update={"rate": rate, "load": None})})

    def for_capacity(self, capacity: float) -> Workload:
        """With the rate that `load` comes to on a server that answers so many requests a second."""
        return self if self.load is None else self.at(self.load * capacity)

    def lasting(self, seconds: float) -> Workload:
        """Raises OperatorError for a time that the warm-up fills."""
        if seconds <= self.warm_up_s:
            raise OperatorError(f"--duration: {self.name} warms up for {self.warm_up_s:g} s", "duration")
        return self.model_copy(update={"duration_s": seconds})


def names() -> tuple[str, ...]:
    """Of the workloads that come with Tandem."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def load(name_or_path: str | Path) -> Workload:
    """One that comes with Tandem, by its name; or a file. Raises OperatorError, one line with the file and the key."""
    file = Path(name_or_path)
    if file.suffix not in (".yaml", ".yml"):
        if str(name_or_path) not in names():
            raise OperatorError(
                f"workload {name_or_path}: there are {', '.join(names())}, or name a .yaml file", "workload"
            )
        file = FOLDER / f"{name_or_path}.yaml"
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OperatorError(f"{file}: {error.strerror}", "workload") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file}: {' '.join(str(error).split())}", "workload") from None
    if not isinstance(written, dict):
        raise OperatorError(f"{file}: a workload is a mapping of keys to values", "workload")
    try:
        return Workload.model_validate({"name": file.stem} | written)
    except ValidationError as error:
        raise OperatorError(f"{file}: {_told(error)}", "workload") from None


_TAGS = {"poisson", "burst", "diurnal", "closed", "unique", "zipf", "fixed"}
"""pydantic puts the chosen kind into the path of an error; the file has no such key."""


def _told(error: ValidationError) -> str:
    """One mistake as `key.key: what`: the innermost, because a key that takes one of two kinds complains of both."""
    first = max(error.errors(include_url=False), key=lambda each: len(_key(each["loc"]).split(".")))
    message = first["msg"].removeprefix("Value error, ")
    key = _key(first["loc"])
    return f"{key}: {message}" if key else message


def _key(path: Sequence[Any]) -> str:
    kept = [str(step) for step in path if step not in _TAGS and not str(step).startswith(("literal[", "tuple["))]
    return ".".join(step for step in kept if step != "[key]")
