"""What one request costs on an idle system over the engine's own time for the same order, and where it goes."""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from loadtest.bench.bare import Bare
from loadtest.bench.service_load import body_of
from serve.bench.stats import Percentiles, Spread
from serve.domain.jobs import Timings
from serve.domain.orders import ImageRequest
from serve.errors import OperatorError
from serve.shapes.captions import held_out_prompts
from serve.stages import STAGES, explained, stages, wall_s

Text = Literal["cached", "fresh"]
PROXY, SETTLEMENT = "proxy and network", "between the stages"
"""Stages that no server tells: what the client waited beyond its wall, and what no stage of the job holds."""
BLOCKS = 5
"""Parts of the pairs, one after another, whose differences make the spread."""
GIVE_UP_S = 60.0
_PAUSE_S = 0.05
"""Between two requests: what the server still has to do for the last one is not the next one's."""
_WARM_UP = 3
_AT_ONCE, _SEEDS = 16, 1000
_TIMINGS = TypeAdapter(Timings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One order over HTTP, seconds: until the answer that it is drawn, and until its picture was there too. `timings`
    are the job's."""

    answered_s: float
    fetched_s: float
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Pairs of the same order, one at a time. `bare` is the engine's own time, from submission to result. `added` and
    `added_fetched` are the median of the answers (with the picture fetched) less the engine's median; their spreads are
    of `BLOCKS` parts of the run. `stages` are the medians of the jobs' own stages, in their order, and of what these
    leave of the client's wait; `bare_stages` the engine's of the same name. `explained` is the median share of the
    server's wall that the stages hold."""

    steps: int
    width: int
    height: int
    text: Text
    bare: Percentiles
    answered: Percentiles
    fetched: Percentiles
    added: Spread
    added_fetched: Spread
    explained: float
    stages: Mapping[str, float] = field(default_factory=dict)
    bare_stages: Mapping[str, float] = field(default_factory=dict)


class Caller:
    """One connection that is kept open. Owns: the connection."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=GIVE_UP_S)

    def close(self) -> None:
        self._connection.close()

    def exchange(self, order: ImageRequest) -> Exchange:
        """Raises OperatorError for an order without a picture."""
        body = json.dumps(body_of(order)).encode()
        began = time.perf_counter()
        told = self._ask("POST", "/v1/jobs?wait=true", body)
        answered = time.perf_counter()
        job = json.loads(told)
        if job["state"] != "succeeded":
            raise OperatorError(f"a job of the bench ended as {job['state']}: {job['error']}")
        path = urlsplit(job["images"][0]["url"])
        self._ask("GET", path.path + (f"?{path.query}" if path.query else ""))
        fetched = time.perf_counter()
        return Exchange(
            answered_s=answered - began, fetched_s=fetched - began, timings=_TIMINGS.validate_python(job["timings"])
        )

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = self._connection.getresponse()
            told = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise OperatorError(f"the server does not answer: {error!r}") from None
        if answer.status != http.HTTPStatus.OK:
            raise OperatorError(f"the server answers {answer.status}: {told.decode(errors='replace')[:200]}")
        return told


def measure_overhead(
    url: str, bare: Bare, order: ImageRequest, text: Text, pairs: int, fresh: Callable[[], str]
) -> Overhead:
    """`order` as it is but for the seed; with fresh text another prompt each time, from `fresh`, over HTTP: the engine
    gets the order's own, because what a text says takes no time there. Blocks. Raises OperatorError."""
    caller = Caller(url)
    drawn, sent, own = list[float](), list[Exchange](), list[Mapping[str, float]]()
    try:
        for pair in range(-_WARM_UP, pairs):
            ours = replace(order, seed=order.seed + _WARM_UP + pair)
            theirs = ours if text == "cached" else replace(ours, prompt=fresh())
            for side in ("bare", "http") if pair % 2 else ("http", "bare"):
                time.sleep(_PAUSE_S)
                if side == "http":
                    exchange = caller.exchange(theirs)
                else:
                    one = bare.draw(ours)
            if pair >= 0:
                sent.append(exchange)
                drawn.append(one.seconds)
                own.append(one.stages)
    finally:
        caller.close()
    return overhead(order, text, drawn, sent, own)


def overhead(
    order: ImageRequest,
    text: Text,
    drawn: Sequence[float],
    sent: Sequence[Exchange],
    own: Sequence[Mapping[str, float]] = (),
) -> Overhead:
    """The figures of these pairs: `drawn` are the engine's seconds, `sent` the exchanges, `own` the engine's stages.
    Raises ValueError for none."""
    answered, fetched = [one.answered_s for one in sent], [one.fetched_s for one in sent]
    return Overhead(
        steps=order.num_inference_steps,
        width=order.width,
        height=order.height,
        text=text,
        bare=Percentiles.of(drawn),
        answered=Percentiles.of(answered),
        fetched=Percentiles.of(fetched),
        added=difference(answered, drawn),
        added_fetched=difference(fetched, drawn),
        explained=median(explained(one.timings) or 0.0 for one in sent),
        stages=stage_medians(sent),
        bare_stages={name: median(one[name] for one in own) for name in (own[0] if own else ())},
    )


def difference(longer: Sequence[float], shorter: Sequence[float]) -> Spread:
    """Median less median of all pairs; the extremes are those of `BLOCKS` parts, one after another, where there are as
    many pairs. Raises ValueError for none."""
    if not longer:
        raise ValueError("a difference of nothing")
    blocks = min(BLOCKS, len(longer))
    edges = [len(longer) * number // blocks for number in range(blocks + 1)]
    parts = [median(longer[begin:end]) - median(shorter[begin:end]) for begin, end in itertools.pairwise(edges)]
    whole = median(longer) - median(shorter)
    return Spread(median=whole, low=min(*parts, whole), high=max(*parts, whole), count=len(parts))


def stage_medians(sent: Sequence[Exchange]) -> dict[str, float]:
    """Median seconds of each stage that some job had (0 in a job without it), of what the server's wall has beside the
    stages, and of what the client waited beyond that wall for the answer."""
    found: dict[str, list[float]] = {name: [] for name in (*STAGES, SETTLEMENT, PROXY)}
    for one in sent:
        had = dict(stages(one.timings))
        wall = wall_s(one.timings) or 0.0
        for name in STAGES:
            found[name].append(had.get(name, 0.0))
        found[SETTLEMENT].append(wall - sum(had.values()))
        found[PROXY].append(one.answered_s - wall)
    return {name: median(values) for name, values in found.items() if any(values)}


def default_order(model: Any, prompt: str, seed: int) -> ImageRequest:
    """What a client gets who writes nothing but a prompt, as the model folder says; 20 steps."""
    denoiser = model.denoiser
    return ImageRequest(
        model=model.name,
        prompt=prompt,
        width=denoiser.default_width,
        height=denoiser.default_height,
        num_inference_steps=20,
        guidance_scale=denoiser.default_guidance_scale,
        seed=seed,
    )


def fresh_texts(known: Sequence[str], seed: int) -> Callable[[], str]:
    """A new text of the shipped model's language with every call, none of `known`."""
    texts = _unseen(set(known), seed)
    return lambda: next(texts)


def _unseen(given: set[str], seed: int) -> Iterator[str]:
    for number in itertools.count():
        for text, _ in held_out_prompts(_AT_ONCE, two=True, seed=(seed + 1) * _SEEDS + number):
            if text not in given:
                given.add(text)
                yield text
