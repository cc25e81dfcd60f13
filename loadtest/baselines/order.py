"""The body of `POST /generate`, the same for every baseline, how many may wait, and the command line."""

from __future__ import annotations

import argparse
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.models.samplers import SAMPLERS, sampler_names
from serve.orders import MAX_SEED
from serve.settings.orders import LimitSettings

MAX_WAITING = 100
"""Orders that wait beside the ones that are drawn; one more is refused. Tandem's `jobs.max_queued`."""
BATCH = 8
"""Images that a batching baseline draws at once. Tandem's batch."""
RETRY_AFTER = {"Retry-After": "1"}

_LIMITS = LimitSettings()
_Side = Annotated[int, Field(ge=8, le=_LIMITS.max_side, multiple_of=8)]


class Order(BaseModel):
    """What to draw: the fields of Tandem's native order that every baseline has, with Tandem's limits. What is left
    open has the model's default; the seed is random."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=_LIMITS.max_prompt_bytes)]
    negative_prompt: Annotated[str, Field(max_length=_LIMITS.max_prompt_bytes)] = ""
    num_inference_steps: Annotated[int | None, Field(ge=1, le=_LIMITS.max_num_inference_steps)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=_LIMITS.max_guidance_scale, allow_inf_nan=False)] = None
    width: _Side | None = None
    height: _Side | None = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    scheduler: str | None = None

    @model_validator(mode="after")
    def _has_a_known_sampler(self) -> Self:
        if self.scheduler is None:
            return self
        if self.scheduler not in (known := sampler_names("diffusion")):
            raise ValueError(f"scheduler: there are {', '.join(known)}")
        most = SAMPLERS[self.scheduler].most_steps
        if most is not None and (self.num_inference_steps or 0) > most:
            raise ValueError(f"num_inference_steps: {self.scheduler} makes at most {most}")
        return self


def options(description: str | None) -> argparse.ArgumentParser:
    """The words that every baseline's command line has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--port", type=int, default=9000, help="port to listen on, on the loopback address")
    parser.add_argument("--model", default="shapes", help="`shapes` or a diffusers folder")
    parser.add_argument("--torch-threads", type=int, default=None, help="torch's threads; None is torch's own choice")
    parser.add_argument("--max-waiting", type=int, default=MAX_WAITING, help="orders that wait; one more gets a 503")
    return parser


def batch_options(description: str | None) -> argparse.ArgumentParser:
    """With those of a baseline that draws several at once."""
    parser = options(description)
    parser.add_argument("--batch", type=int, default=BATCH, help="most images of a batch")
    parser.add_argument("--batch-wait-s", type=float, default=0.05, help="how long a batch waits to be filled")
    return parser
