"""FLEET.yaml's parts: kinds of cards, pools, what the job Redis takes."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.memory.terms import Dtype

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Cards = Annotated[int, Field(ge=0, le=100_000)]
Pixels = Annotated[int, Field(ge=16, le=8192)]
Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]
Times = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]
"""Milliseconds of what takes some."""
_OWN = frozenset(
    ("model", "gpu_class", "num_gpus", "replicas", "min_replicas", "max_replicas", "target_wait_s", "idle_s")
)
"""Settings of `diffusion` that a pool says itself, or that are the same for all of them."""


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

    width: Pixels
    """Of the image, in pixels."""
    height: Pixels
    """Of the image, in pixels."""
    ms: Annotated[dict[Count, Times], Field(min_length=1)]
    """Milliseconds of a step by lanes (batch entries; a guided image takes two)."""
    cap: Count | None = None
    """Most lanes of a step; by default the most of `ms`."""


class Pool(Part):
    """Replicas of one model on one class of cards: what a placement is in the settings."""

    model: str
    """One of the published models of `tandem plan`, `shapes` (the shipped one), or a diffusers folder."""
    gpu_class: str
    """One of `classes`, or a built-in class."""
    replicas: Cards
    """How many, each on a card of its own; at the start, where `min_replicas` and `max_replicas` let it change."""
    min_replicas: Cards | None = None
    """Fewest, by default `replicas`. As in a placement."""
    max_replicas: Cards | None = None
    """Most, by default `replicas`. As in a placement."""
    target_wait_s: Above0 = 30.0
    """Predicted seconds of work for each replica at which there are to be more. As in a placement."""
    idle_s: Above0 = 300.0
    """Seconds of less work after which there are to be fewer. As in a placement."""
    cold_start_s: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 60.0
    """Seconds from the order of a replica, the loss of one, or the start with `from_zero`, until it claims."""
    from_zero: bool = False
    """The pool is empty when the traffic begins, and all of it is started then."""
    mtbf_h: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] | None = None
    """Mean hours until a replica is lost with what it holds; by default none is."""
    diffusion: dict[str, Any] = {}
    """Settings of `diffusion` that differ: max_batch_size, max_rows, max_pixels, worst_rung, ..."""
    curves: tuple[Curve, ...] = ()
    """Step times that were measured; by default they are predicted from the card's data sheet."""
    decode_ms_per_megapixel: Times | None = None
    """Measured time of the VAE; by default predicted."""

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if said := _OWN & self.diffusion.keys():
            raise ValueError(f"diffusion: {min(said)} is the pool's own key")
        if self.least > self.replicas:
            raise ValueError(f"min_replicas {self.least} is more than replicas {self.replicas}")
        if self.replicas > self.most:
            raise ValueError(f"replicas {self.replicas} is more than max_replicas {self.most}")
        return self

    @property
    def least(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """A pool of which there are none at most is left out."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def scales(self) -> bool:
        return self.least < self.most

    def at(self, replicas: int) -> Pool:
        """With so many, at all times."""
        return self.model_copy(update={"replicas": replicas, "min_replicas": None, "max_replicas": None})

    def between(self, least: int, most: int) -> Pool:
        """With as many as the work wants, at least and at most so many; at the start the least."""
        return self.model_copy(update={"replicas": least, "min_replicas": least, "max_replicas": most})


class RedisCosts(Part):
    """Microseconds that scripts keep the job Redis busy. The defaults were measured with `tandem simulate
    --measure-redis` on two busy cores."""

    submit_us: AtLeast0 = 215.0
    """An order, into an empty queue."""
    claim_us: AtLeast0 = 180.0
    """A claim that gets a job, from a queue without others."""
    empty_us: AtLeast0 = 51.0
    """A claim that gets none from an empty queue."""
    renew_us: AtLeast0 = 60.0
    """Signs of life and progress."""
    settle_us: AtLeast0 = 157.0
    """The end of a job, and the end of its record."""
    submit_us_per_queued: AtLeast0 = 8.5
    """What each queued job adds to an order."""
    submit_us_per_held: AtLeast0 = 4.8
    """What each job in a replica's hand adds to an order, whose ETA is told from at most 256 of them."""
    claim_us_per_queued: AtLeast0 = 9.5
    """What each queued job adds to a claim."""
    bell_us: AtLeast0 = 2.0
    """What telling one replica takes that a job is queued."""
