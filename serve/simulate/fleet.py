"""FLEET.yaml: which cards there are, what is drawn on them, and what they cost an hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from serve.errors import OperatorError
from serve.memory.classes import BUILT_IN, GpuClass
from serve.memory.shapes import published, shape_of
from serve.memory.sheets import with_speed
from serve.memory.terms import ModelShape
from serve.models import resolve
from serve.models.folder import local_path
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.settings.stores import JobSettings
from serve.simulate.fleet_parts import CardClass, Milliseconds, Part, Pool, RedisCosts, Times


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
    text_ms: Milliseconds = 10.0
    """From the claim to the first step: reading the text's units."""
    store_ms: Milliseconds = 50.0
    """From the decoded picture to the end of the job: its file and its upload."""
    trip_ms: Times = 1.0
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
        fixed = {
            "model": own.model,
            "gpu_class": own.gpu_class,
            "num_gpus": 1.0,
            "replicas": own.replicas,
            "min_replicas": own.least,
            "max_replicas": own.most,
            "target_wait_s": own.target_wait_s,
            "idle_s": own.idle_s,
        }
        try:
            return DiffusionSettings.model_validate(own.diffusion | fixed)
        except ValidationError as error:
            raise OperatorError(f"pools.{name}.diffusion.{told(error)}", "fleet") from None

    def shape(self, name: str) -> ModelShape:
        """Of the model of a pool. Raises OperatorError."""
        try:
            return _shape(self.pools[name].model)
        except OperatorError as error:
            message = error.message.removeprefix("model.source: ")
            raise OperatorError(f"pools.{name}.model: {message}", "fleet") from None

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
        """As many of these pools, at all times."""
        return self.with_pools({name: self.pools[name].at(number) for name, number in replicas.items()})

    def with_pools(self, pools: Mapping[str, Pool]) -> Fleet:
        """These in place of those of the same name."""
        return self.model_copy(update={"pools": {**self.pools, **pools}})


@cache
def _shape(model: str) -> ModelShape:
    """Raises OperatorError."""
    if model in published():
        return published()[model]
    if model != "shapes" and not local_path(model).is_dir():
        raise OperatorError(f"there is no {model}; there are {', '.join(published())}, shapes, or name a folder")
    return replace(shape_of(resolve(ModelSettings(source=model), Path(), here_only=True)), name=model)


def load(file: Path) -> Fleet:
    """Raises OperatorError, one line with the file and the key."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        fleet = Fleet.model_validate(written)
        fleet.job_settings()
        for name, pool in fleet.pools.items():
            fleet.gpu(pool.gpu_class)
            fleet.diffusion_settings(name)
            fleet.shape(name)
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
