"""FLEET.yaml: which cards there are, what is drawn on them, and what they cost an hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.errors import OperatorError
from serve.memory.classes import BUILT_IN, GpuClass
from serve.memory.shapes import published
from serve.memory.sheets import with_speed
from serve.memory.terms import Dtype
from serve.settings import DiffusionSettings, JobSettings

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """Descriptions are the docstrings: docs/simulate.md's table is made of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class CardClass(Part):
    """A kind of card: one of the built-in classes by its name, a card with a data sheet, or figures of your own."""

    like: str | None = None
    """Name of the card whose data sheet it has, as nvidia-smi says it; by default the built-in class of this name."""
    memory_gb: Above0 | None = None
    """Memory in GB (10^9 bytes)."""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    """What it computes in at full speed, where it is no built-in class."""
    price_per_hour: AtLeast0 = 0.0
    """Of one card, in whatever currency."""


class Curve(Part):
    """Step times that were measured, for one image size."""

    width: Count
    """Of the image, in pixels."""
    height: Count
    """Of the image, in pixels."""
    ms: Annotated[dict[Count, Above0], Field(min_length=1)]
    """Milliseconds of a step by lanes (batch entries; a guided image takes two)."""
    cap: Count | None = None
    """Most lanes of a step; by default the most of `ms`."""


class Pool(Part):
    """Replicas of one model on one class of cards: what a placement is in the settings."""

    model: str
    """One of the published models of `tandem plan`."""
    gpu_class: str
    """One of `classes`, or a built-in class."""
    replicas: Annotated[int, Field(ge=0)]
    """How many, each on a card of its own."""
    cold_start_s: AtLeast0 = 60.0
    """Seconds from the loss of a replica, or from the start with `from_zero`, until another one claims."""
    from_zero: bool = False
    """The pool is empty when the traffic begins, and all of it is started then."""
    mtbf_h: Above0 | None = None
    """Mean hours until a replica is lost with what it holds; by default none is."""
    diffusion: dict[str, Any] = {}
    """Settings of `diffusion` that differ: max_batch_size, max_rows, max_pixels, worst_rung, ..."""
    curves: tuple[Curve, ...] = ()
    """Step times that were measured; by default they are predicted from the card's data sheet."""
    decode_ms_per_megapixel: Above0 | None = None
    """Measured time of the VAE; by default predicted."""


class RedisCosts(Part):
    """Microseconds that scripts keep the job Redis busy. The defaults were measured with `tandem simulate
    --measure-redis` on two busy cores."""

    submit_us: AtLeast0 = 220.0
    """An order, into an empty queue."""
    claim_us: AtLeast0 = 205.0
    """A claim that gets a job, from a queue without others."""
    empty_us: AtLeast0 = 34.0
    """A claim that gets none from an empty queue."""
    renew_us: AtLeast0 = 72.0
    """Signs of life and progress."""
    settle_us: AtLeast0 = 200.0
    """The end of a job, and the end of its record."""
    submit_us_per_queued: AtLeast0 = 9.0
    """What each queued job adds to an order."""
    submit_us_per_held: AtLeast0 = 4.5
    """What each job in a replica's hand adds to an order: its ETA is told from all of them."""
    claim_us_per_queued: AtLeast0 = 9.0
    """What each queued job adds to a claim."""


class Fleet(Part):
    """All of it."""

    description: str = ""
    """Whose fleet it is."""
    classes: dict[str, CardClass] = {}
    """Kinds of cards by name, before the built-in ones."""
    pools: Annotated[dict[str, Pool], Field(min_length=1)]
    """What is drawn where, by a name of yours."""
    jobs: dict[str, Any] = {}
    """Settings of `jobs` that differ: max_queued, max_queued_s, lease_s, queue_ttl_s, ..."""
    text_ms: AtLeast0 = 10.0
    """From the claim to the first step: reading the text's units."""
    store_ms: AtLeast0 = 50.0
    """From the decoded picture to the end of the job: its file and its upload."""
    trip_ms: Above0 = 1.0
    """From a claim to its answer."""
    redis: RedisCosts = RedisCosts()
    """What the job Redis takes for its scripts."""

    def job_settings(self) -> JobSettings:
        """Raises OperatorError."""
        try:
            return JobSettings.model_validate(self.jobs)
        except ValidationError as error:
            raise OperatorError(f"jobs.{told(error)}", "fleet") from None

    def diffusion_settings(self, name: str) -> DiffusionSettings:
        """Of a pool. Raises OperatorError."""
        own = self.pools[name]
        fixed = {"model": own.model, "gpu_class": own.gpu_class, "replicas": own.replicas, "num_gpus": 1.0}
        try:
            return DiffusionSettings.model_validate(own.diffusion | fixed)
        except ValidationError as error:
            raise OperatorError(f"pools.{name}.diffusion.{told(error)}", "fleet") from None

    def gpu(self, name: str) -> GpuClass:
        """A class with its speed, as far as that is known. Raises OperatorError."""
        said = self.classes.get(name)
        if said is None or (said.like is None and said.memory_gb is None):
            if name not in BUILT_IN:
                raise OperatorError(f"classes: there is no {name}; built in are {', '.join(BUILT_IN)}", "fleet")
            return BUILT_IN[name]
        if said.memory_gb is None:
            raise OperatorError(f"classes.{name}.memory_gb: say how much the card has", "fleet")
        bare = GpuClass(name=said.like or name, memory_gb=said.memory_gb, dtypes=said.dtypes)
        known = with_speed(bare)
        if said.like is not None and known is bare:
            raise OperatorError(f"classes.{name}.like: no data sheet of {said.like} is here", "fleet")
        return replace(known, name=name, like=said.like or "")

    def price_per_hour(self, name: str) -> float:
        """Of one card of the class."""
        return self.classes[name].price_per_hour if name in self.classes else 0.0

    def with_replicas(self, replicas: Mapping[str, int]) -> Fleet:
        pools = {
            name: pool.model_copy(update={"replicas": replicas.get(name, pool.replicas)})
            for name, pool in self.pools.items()
        }
        return self.model_copy(update={"pools": pools})


def load(file: Path) -> Fleet:
    """Raises OperatorError, one line with the file and the key."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        fleet = Fleet.model_validate(written)
        fleet.job_settings()
        for name, pool in fleet.pools.items():
            fleet.gpu(pool.gpu_class)
            fleet.diffusion_settings(name)
            if pool.model not in published():
                known = ", ".join(published())
                raise OperatorError(f"pools.{name}.model: there is no {pool.model}; there are {known}", "fleet")
    except OSError as error:
        raise OperatorError(f"{file}: {error.strerror}", "fleet") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file}: {' '.join(str(error).split())}", "fleet") from None
    except ValidationError as error:
        raise OperatorError(f"{file}: {told(error)}", "fleet") from None
    except OperatorError as error:
        raise OperatorError(f"{file}: {error.message}", "fleet") from None
    return fleet


def told(error: ValidationError) -> str:
    """The first mistake as `key.key: what`."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(step) for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
