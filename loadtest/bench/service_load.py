"""The service against the bare engine, saturated: the same orders through both, in turns, and what each process took
for an image.

The server starts anew for each of its turns and is gone when the bare engine has its own: an idle Ray takes some
percent of a core, which the bare engine would pay for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Literal

import httpx
import psutil

from loadtest.bench.bare import Bare, Drawn
from loadtest.driver import Progress, drive
from loadtest.processes import COMPUTING, DIFFUSION, ENGINE, REST, VAE, Use, by_role, spent, thread_seconds
from loadtest.samples import Arrival, Outcome, Sample
from serve.bench.stats import Spread
from serve.domain.orders import ImageRequest

USERS = 24
DIALECT = "wait"
_READY_S, _POLL_S = 30.0, 0.5

Look = Callable[[], Mapping[int, Use]]
"""At the processes of the server."""
Side = Literal["tandem", "bare"]
Tell = Callable[[str], None]
Started = Callable[[], AbstractAsyncContextManager[tuple[str, Look]]]
"""A server that has drawn a picture, by its URL; ended when it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One order: when it was sent and when its image was there, on one clock, and what it weighs."""

    sent_s: float
    ended_s: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One closed loop of one side. `drawn` are its pictures by the number of their order; the others are CPU seconds by
    role and by thread, of the whole loop."""

    drawn: Sequence[Drawn]
    roles: Mapping[str, float] = field(default_factory=dict)
    threads: Mapping[str, float] = field(default_factory=dict)
    client_s: float = 0.0
    failed: Mapping[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return max(1, len(self.drawn))

    def rate(self, weights: Sequence[float]) -> float:
        """Work a second. Raises ValueError for a loop too short to have one."""
        spans = [Span(sent_s=one.sent_s, ended_s=one.ended_s, weight=weights[one.index]) for one in self.drawn]
        return work_rate(spans, USERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturated:
    """Rates are images a second of the mean order; their spreads, and that of `ratio`, are over rounds. CPU is in
    seconds an image, its medians over rounds: `roles` and `threads` (of the diffusion process) of the server, `client`
    of what sent the orders, `bare` of the bare engine by its threads. `idle` is the CPU that the server took in
    seconds a second while nobody asked for anything, before its first turn. `others` is what all roles but diffusion
    took over what that took."""

    users: int
    in_hand: int
    orders: int
    tandem: Spread
    bare: Spread
    ratio: Spread
    others: Spread
    roles: Mapping[str, float]
    threads: Mapping[str, float]
    client: float
    bare_threads: Mapping[str, float]
    idle: Mapping[str, float]
    failed: Mapping[str, int]


def body_of(order: ImageRequest) -> dict[str, Any]:
    """The order as the native dialect writes it."""
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "seed")
    body = {name: getattr(order, name) for name in names}
    return body if order.scheduler is None else body | {"scheduler": order.scheduler}


async def measure_saturated(
    started: Started, bare: Bare, orders: Sequence[ImageRequest], rounds: int, in_hand: int, idle_s: float, tell: Tell
) -> Saturated:
    """Each round sends its part of the orders through both; who begins takes turns, at first the server: the bare
    engine, which is entered here, reads the step times that it found. What comes before a round's first `USERS` answers
    warms up. Raises ValueError for rounds too short to have a window."""
    share = len(orders) // rounds
    served, drawn, idle = list[Turn](), list[Turn](), dict[str, float]()
    async with AsyncExitStack() as stack:
        for number, side in sides(rounds):
            part = orders[number * share : (number + 1) * share]
            tell(f"saturated, round {number + 1} of {rounds}, {side}")
            if side == "tandem":
                async with started() as (url, look):
                    await drive(url, _arrivals(orders[:USERS]), users=USERS)  # texts are in the caches beforehand
                    idle = idle or await _idle(look, idle_s)
                    served.append(await _serve(url, look, part))
                continue
            if not drawn:
                await stack.enter_async_context(entered(bare))
                weights = await asyncio.to_thread(bare.weights, orders)
            drawn.append(await asyncio.to_thread(_draw, bare, part, in_hand))
    return _saturated(served, drawn, weights, idle, in_hand)


def sides(rounds: int) -> Iterator[tuple[int, Side]]:
    """Number of the round and who has the turn."""
    for number in range(rounds):
        yield from ((number, side) for side in (("bare", "tandem") if number % 2 else ("tandem", "bare")))


@asynccontextmanager
async def entered(bare: Bare) -> AsyncIterator[Bare]:
    """Its methods block, and so do its start and its end."""
    await asyncio.to_thread(bare.__enter__)
    try:
        yield bare
    finally:
        await asyncio.to_thread(bare.__exit__, None, None, None)


def _saturated(
    served: Sequence[Turn], drawn: Sequence[Turn], weights: Sequence[float], idle: Mapping[str, float], in_hand: int
) -> Saturated:
    """`weights` are of all rounds' orders, as many in each."""
    share, mean = len(weights) // len(served), fmean(weights)
    parts = [weights[number * share : (number + 1) * share] for number in range(len(served))]
    ours = [turn.rate(part) / mean for turn, part in zip(served, parts, strict=True)]
    theirs = [turn.rate(part) / mean for turn, part in zip(drawn, parts, strict=True)]
    return Saturated(
        users=USERS,
        in_hand=in_hand,
        orders=share,
        tandem=Spread.of(ours),
        bare=Spread.of(theirs),
        ratio=Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)]),
        others=Spread.of([others_share(turn.roles) for turn in served]),
        roles=_medians([_each(turn.roles, turn.images) for turn in served]),
        threads=_medians([_each(turn.threads, turn.images) for turn in served]),
        client=median(turn.client_s / turn.images for turn in served),
        bare_threads=_medians([_each(turn.threads, turn.images) for turn in drawn]),
        idle=idle,
        failed=dict(sum((Counter(turn.failed) for turn in served), Counter[str]())),
    )


def work_rate(spans: Sequence[Span], users: int) -> float:
    """Work a second while `users` orders were under way: from the `users`th answer, before which the loop warms up, to
    the moment at which the last order was sent, from which on it runs dry.

    An order that lies in this window in part counts in part, as if its work were spread evenly over its time: so no
    edge of the window is worth an order more or less. Raises ValueError where there is no such window.
    """
    ends = sorted(span.ended_s for span in spans)
    if len(ends) < users:
        raise ValueError(f"{len(ends)} answers of {users} users")
    begin, end = ends[users - 1], max(span.sent_s for span in spans)
    if end <= begin:
        raise ValueError(f"{len(spans)} orders are too few for {users} users: the last was sent before all had one")
    work = 0.0
    for span in spans:
        inside = min(span.ended_s, end) - max(span.sent_s, begin)
        if inside > 0:
            work += span.weight * inside / (span.ended_s - span.sent_s)
    return work / (end - begin)


def others_share(roles: Mapping[str, float]) -> float:
    """What all other processes of the server took over what the diffusion replicas did; infinite where these took
    nothing."""
    engine = roles.get(DIFFUSION, 0.0)
    rest = sum(seconds for role, seconds in roles.items() if role != DIFFUSION)
    return rest / engine if engine else float("inf")


async def until_ready(url: str) -> None:
    """A server that was busy may have been slow to answer for its pools. One that never is ready is for whoever sends
    next to tell."""
    deadline = time.monotonic() + _READY_S
    async with httpx.AsyncClient(base_url=url, timeout=_READY_S, trust_env=False) as http:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/readyz")).is_success:
                    return
            await asyncio.sleep(_POLL_S)


async def _idle(look: Look, seconds: float) -> dict[str, float]:
    """What the server takes while nobody asks for anything: CPU seconds a second, by role."""
    before, began = look(), time.monotonic()
    await asyncio.sleep(seconds)
    took_s = time.monotonic() - began
    return {role: cpu_s / took_s for role, cpu_s in spent(before, look()).items()}


async def _serve(url: str, look: Look, orders: Sequence[ImageRequest]) -> Turn:
    client, before = ClientTime(), look()
    threads = _threads(before)
    samples = await drive(url, _arrivals(orders), users=USERS, on_progress=client.look)
    after = look()
    done = [sample for sample in samples if sample.outcome is Outcome.DONE]
    return Turn(
        drawn=[Drawn(index=one.index, sent_s=one.sent_s, ended_s=one.ended_s, stages={}) for one in done],
        roles=spent(before, after),
        threads=_less(_threads(after), threads),
        client_s=client.seconds,
        failed=Counter(_reason(sample) for sample in samples if sample.outcome is not Outcome.DONE),
    )


def _draw(bare: Bare, orders: Sequence[ImageRequest], in_hand: int) -> Turn:
    pid = bare.root.pid
    threads = thread_seconds(pid)
    drawn = bare.saturate(orders, USERS, in_hand)
    return Turn(drawn=drawn, threads=_less(thread_seconds(pid), threads))


class ClientTime:
    """CPU seconds of the child that sends orders, from its first sign of life to its last: its start is not counted.
    It is the child that this process did not have before."""

    def __init__(self) -> None:
        self._known = {child.pid for child in psutil.Process().children()}
        self._seen: list[float] = []

    def look(self, _: Progress) -> None:
        seconds = 0.0
        for child in psutil.Process().children():
            if child.pid not in self._known:
                try:
                    each = [child, *child.children(recursive=True)]
                    seconds += sum(sum(one.cpu_times()[:2]) for one in each)
                except psutil.Error:
                    continue
        if seconds:
            self._seen.append(seconds)

    @property
    def seconds(self) -> float:
        return self._seen[-1] - self._seen[0] if self._seen else 0.0


def _arrivals(orders: Sequence[ImageRequest]) -> list[Arrival]:
    return [Arrival(index=index, due_s=0.0, dialect=DIALECT, body=body_of(order)) for index, order in enumerate(orders)]


def _reason(sample: Sample) -> str:
    return f"{sample.outcome}: {sample.status} {sample.detail}".strip()[:200]


def _threads(uses: Mapping[int, Use]) -> dict[str, float]:
    """Of all diffusion replicas together."""
    seconds = Counter[str]()
    for pid in by_role(uses, DIFFUSION):
        seconds.update(thread_seconds(pid))
    return dict(seconds)


def _less(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before.get(name, 0.0) for name in (ENGINE, VAE, COMPUTING, REST) if name in after}


def _each(seconds: Mapping[str, float], images: int) -> dict[str, float]:
    return {name: value / images for name, value in seconds.items()}


def _medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name; a turn without it has 0."""
    names = dict.fromkeys(name for turn in turns for name in turn)
    return {name: median(turn.get(name, 0.0) for turn in turns) for name in names}
