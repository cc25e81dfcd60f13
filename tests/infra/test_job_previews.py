"""Previews in a job's stream, and the pulse that sends them, renews the lease and hears of a cancel."""

import asyncio
import time

import pytest
from support.jobs import IMAGE, Bench, a_preview, a_request, history, on, until

from serve.domain.jobs import JobEvent, JobState, Preview, StepEvent, Timings
from serve.embedded import EmbeddedRedis
from serve.errors import BackendUnavailable, LeaseLost
from serve.jobs.events import follow
from serve.jobs.pulse import SHOW_EVERY_S, STEPS_TOLD_A_SECOND, TELL_EVERY_S, Pulse
from serve.jobs.records import step_of, steps_of
from serve.jobs.store import Claim

PAINTED = {"image": "a/image.png", "strength": 0.6}


def shown(events: list[JobEvent]) -> list[tuple[int | None, int, bytes | None]]:
    return [(event.index, event.step, event.preview) for event in events if event.index is not None]


async def stream(bench: Bench, job_id: str = "a") -> list[JobEvent]:
    events, _ = await bench.store.events_after(job_id, None)
    return events


@pytest.mark.parametrize(
    ("steps", "strength", "real"), [(10, 0.6, 6), (50, 0.58, 28), (4, 0.1, 1), (30, 1.0, 30), (7, 0.99, 6)]
)
def test_an_image_to_start_from_takes_its_share_of_the_steps(steps: int, strength: float, real: int) -> None:
    assert steps_of(a_request(steps=steps)) == steps
    for inputs in ({"image": "a/image.png"}, {"image": "a/image.png", "mask": "a/mask.png"}):
        request = a_request(steps=steps, strength=strength, **inputs)
        assert steps_of(request) == real
        # A sampler that makes two forward passes of a step tells a whole number of steps, and the last at the end.
        told = [step_of(request, forward, 2 * real) for forward in range(2 * real + 1)]
        assert told == [(forward + 1) // 2 for forward in range(2 * real + 1)]


def test_a_job_that_starts_from_an_image_counts_its_own_steps(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=10, **PAINTED)
        assert (await bench.store.get("a")).steps == 6
        await bench.store.renew(claim, 5)
        await bench.store.succeed(claim, images=[IMAGE], cache={}, timings=Timings(), approximate=["step_cache"])
        job = await bench.store.get("a")
        assert (job.step, job.steps, job.approximate) == (6, 6, ("step_cache",))
        await bench.succeed(await bench.claimed("b"))
        assert (await bench.store.get("b")).approximate == ()

    on(redis_url, story)


def test_previews_stand_in_the_stream_one_for_an_image_until_the_job_ends(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=10)
        await bench.store.renew(claim, 2)
        for index, step, data in ((0, 4, b"first"), (1, 4, b"other"), (0, 8, b"\xff\x00second"), (0, 99, b"last")):
            await bench.store.preview(claim, a_preview(index, step, 20, data))
            await bench.store.check_integrity()
        events = await stream(bench)
        assert shown(events) == [(1, 2, b"other"), (0, 10, b"last")]
        assert {event.state for event in events[-2:]} == {JobState.RUNNING}
        job = await bench.store.get("a")
        assert (job.state, job.step) == (JobState.RUNNING, 2)
        assert await history_from(bench, events[-2].id) == [events[-1]]
        await bench.succeed(claim)
        assert shown(await history(bench.store, "a")) == []

    on(redis_url, story)


def test_previews_that_go_together_are_one_write_in_their_order(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=10)
        await bench.store.preview(claim, a_preview(0, 2, 10, b"old"))
        before = await _calls(bench)
        await bench.store.preview(claim, a_preview(1, 4, 10, b"one"), a_preview(0, 4, 10, b"zero"))
        assert await _calls(bench) == before + 1
        assert shown(await stream(bench)) == [(1, 4, b"one"), (0, 4, b"zero")]

    on(redis_url, story)


def test_who_wants_no_previews_is_sent_none(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=4)
        for step in range(1, 4):
            await bench.store.preview(claim, *(a_preview(index, step, 4) for index in range(250)))
            await bench.store.renew(claim, step)
        bare, _ = await bench.store.events_after("a", None, previews=False)
        assert {event.preview for event in bare} == {None}
        told: list[JobEvent] = []

        async def listen() -> None:
            async for event in follow(bench.store, "a", previews=False):
                told.append(event)

        listening = asyncio.create_task(listen())
        await until(lambda: _true(len(told) == 5))  # past more than a page of previews
        await bench.succeed(claim)
        await listening
        assert [(event.state, event.step, event.index) for event in told] == [
            (JobState.QUEUED, 0, None),
            (JobState.ENCODING, 0, None),
            *((JobState.RUNNING, step, None) for step in range(1, 4)),
            (JobState.SUCCEEDED, 4, None),
        ]

    on(redis_url, story)


async def _calls(bench: Bench) -> int:
    """Scripts that were run so far."""
    stats = await bench.store._redis.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


async def history_from(bench: Bench, after: str) -> list[JobEvent]:
    events, _ = await bench.store.events_after("a", after)
    return events


@pytest.mark.parametrize("end", ["release", "lapse", "cancel", "success"])
def test_a_lost_claim_shows_nothing_and_its_previews_are_gone(redis_url: str, end: str) -> None:
    async def story(bench: Bench) -> None:
        late = await bench.claimed("a")
        await bench.store.preview(late, a_preview(0, 1, 4))
        if end == "release":
            await bench.store.release(late)
        elif end == "lapse":
            await until(bench.store.reap)
        elif end == "cancel":
            await bench.store.cancelled(late)
        else:
            await bench.succeed(late)
        with pytest.raises(LeaseLost):
            await bench.store.preview(late, a_preview(0, 2, 4))
        if end in ("release", "lapse"):
            await bench.claimed("a")  # the same job once more
            with pytest.raises(LeaseLost):
                await bench.store.preview(late, a_preview(0, 2, 4))
        assert shown(await stream(bench)) == []

    on(redis_url, story, **({"lease_s": 0.001} if end == "lapse" else {}))


def test_many_previews_leave_redis_small(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=150)
        data = bytes(2000)
        for step in range(1, 151):
            await bench.store.renew(claim, step)
            for index in range(4):
                await bench.store.preview(claim, a_preview(index, step, 150, data))
        keys = [key async for key in bench.store._redis.scan_iter("tandem:*:a")]
        used = sum([await bench.store._redis.memory_usage(key, samples=0) or 0 for key in keys])
        assert used < 100_000  # of 1.2 MB that were written

    on(redis_url, story)


def test_a_pulse_shows_the_latest_previews_to_a_live_follower(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=50)
        pulse = Pulse(bench.store, claim, heartbeat_s=600)
        seen: list[JobEvent] = []

        async def listen() -> None:
            async for event in follow(bench.store, "a"):
                seen.append(event)

        listener = asyncio.create_task(listen())
        for step in range(1, 51):
            pulse.on_step(StepEvent("a run", step, 50))
            for index in (0, 1):
                pulse.on_preview(a_preview(index, step, 50, b"%d" % step))
        await until(lambda: _true(shown(seen)[-2:] == [(0, 50, b"50"), (1, 50, b"50")]))
        assert len(shown(seen)) <= 2 * 2  # what came too late was dropped
        await bench.succeed(claim)
        await listener
        await pulse.stop()

    on(redis_url, story)


def test_a_pulse_sends_previews_seldom_and_all_images_that_wait_together(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a", steps=50)
        sent: list[tuple[float, list[int]]] = []

        async def preview(claim: Claim, *previews: Preview) -> None:
            sent.append((time.monotonic(), [each.index for each in previews]))

        monkeypatch.setattr(bench.store, "preview", preview)
        pulse = Pulse(bench.store, claim, heartbeat_s=600)
        pulse.on_preview(a_preview(0, 1, 50))
        await until(lambda: _true(len(sent) == 1))
        for index in (3, 1, 3, 0, 1):
            pulse.on_preview(a_preview(index, 2, 50))
        await until(lambda: _true(len(sent) == 2))
        assert [images for _, images in sent] == [[0], [3, 1, 0]]
        assert sent[1][0] - sent[0][0] >= SHOW_EVERY_S
        await pulse.stop()

    on(redis_url, story)


def test_steps_are_told_at_beats_that_pulses_share_and_that_grow_longer_with_the_jobs(redis_url: str) -> None:
    in_hand = 20
    beat_s = in_hand / STEPS_TOLD_A_SECOND
    assert beat_s > TELL_EVERY_S

    async def story(bench: Bench) -> None:
        claims = [await bench.claimed(f"job{number}", steps=50) for number in range(4)]
        pulses = [Pulse(bench.store, claim, heartbeat_s=600, in_hand=lambda: in_hand) for claim in claims]
        await _listening(bench)

        def step(number: int) -> None:
            for pulse in pulses:
                pulse.on_step(StepEvent("a run", number, 50))

        async def told(number: int) -> bool:
            return {(await bench.store.get(claim.job_id)).step for claim in claims} == {number}

        for pulse in pulses:
            pulse.enter(JobState.RUNNING)
        step(1)
        await until(lambda: told(1))
        before, began = await _entries(bench, claims), time.monotonic()
        for number in range(2, 50):
            step(number)
            await bench.store.ping()  # meanwhile a step could be told
        await until(lambda: told(49))
        beats = 2 + (time.monotonic() - began) / beat_s
        assert await _entries(bench, claims) - before <= beats * len(claims)
        step(50)
        for pulse in pulses:
            pulse.enter(JobState.STORING)
        await until(lambda: told(50))
        for pulse, claim in zip(pulses, claims, strict=True):
            await pulse.stop()
            events = await history_of(bench, claim.job_id)
            assert [event.step for event in events] == sorted(event.step for event in events)
            assert (events[-1].state, events[-1].step) == (JobState.STORING, 50)
            await bench.succeed(claim)

    on(redis_url, story)


async def _entries(bench: Bench, claims: list[Claim]) -> int:
    return sum([len(await history_of(bench, claim.job_id)) for claim in claims])


async def history_of(bench: Bench, job_id: str) -> list[JobEvent]:
    events, _ = await bench.store.events_after(job_id, None)
    return events


def test_a_pulse_hears_of_a_cancel_without_a_step_or_a_heartbeat(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        claims = [await bench.claimed(job_id) for job_id in ("a", "b")]
        pulses = [Pulse(bench.store, claim, heartbeat_s=600) for claim in claims]
        await _listening(bench)
        await bench.store.cancel("a")
        await asyncio.wait_for(pulses[0].gone.wait(), 5)
        assert not pulses[1].gone.is_set()
        for pulse in pulses:
            await pulse.stop()
        assert bench.store._bell._waiting == {}
        await bench.store.cancelled(claims[0])

    on(redis_url, story)


def test_a_pulse_hears_of_a_cancel_that_came_while_redis_was_gone_for_it(jobs_redis: EmbeddedRedis) -> None:
    async def story(bench: Bench) -> None:
        claim = await bench.claimed("a")
        pulse = Pulse(bench.store, claim, heartbeat_s=600)
        await _listening(bench)
        await asyncio.to_thread(jobs_redis.kill)
        with pytest.raises(BackendUnavailable):
            await bench.store.ping()
        await asyncio.to_thread(jobs_redis.start)
        other = Bench(jobs_redis.url)
        await other.store.cancel("a")
        await other.store.close()
        await asyncio.wait_for(pulse.gone.wait(), 10)
        await pulse.stop()

    on(jobs_redis.url, story)


async def _listening(bench: Bench) -> None:
    """Returns once Redis knows of the subscription to what is cancelled."""

    async def subscribed() -> bool:
        return b"tandem:cancel" in await bench.store._redis.pubsub_channels()

    await until(subscribed)


async def _true(condition: bool) -> bool:
    await asyncio.sleep(0)
    return condition
