"""What the job scripts take of a real Redis: the embedded one, started for this."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import redis

from serve.domain.orders import ImageRequest
from serve.embedded import EmbeddedRedis
from serve.jobs import scripts
from serve.jobs.bell import WORK
from serve.jobs.records import Want
from serve.settings.stores import JobSettings
from serve.simulate.calls import StoreCalls
from serve.simulate.fleet_parts import RedisCosts

DEPTH, LISTENERS = 200, 20
"""Jobs that wait or are held, and listeners to a bell, for what each of them adds."""
_ANY = Want("m", 0, 10**8)
_OWNERS = 10


class MeasuredStore(StoreCalls):
    """In a Redis that is there: it has a clock of its own, and times are not told to it."""

    def __init__(self, settings: JobSettings, url: str) -> None:
        super().__init__(settings)
        self._url = url
        self._redis = redis.Redis.from_url(url)
        self._scripts = {name: self._redis.register_script(text) for name, text in scripts.sources().items()}

    def busy_us(self) -> float:
        """Microseconds in scripts since it was last asked."""
        info = self._redis.info("commandstats")
        self._redis.config_resetstat()
        return float(info["cmdstat_evalsha"]["usec"]) if "cmdstat_evalsha" in info else 0.0

    def bell_us(self, listeners: int, rounds: int) -> float:
        """Of Redis' own processor time, what each of so many listeners adds to a ring of a bell. It writes to them
        after the command, which has no part in its time."""
        with redis.Redis.from_url(self._url, max_connections=listeners) as crowd:
            connections = [crowd.pubsub() for _ in range(listeners)]
            for each in connections:
                each.subscribe(WORK)
                each.get_message(timeout=5)
            alone, heard = self._ring("nobody hears this", rounds), self._ring(WORK, rounds)
            for each in connections:
                each.close()
        return max(0.0, heard - alone) / listeners

    def _ring(self, channel: str, rounds: int) -> float:
        before = self._processor_us()
        for _ in range(rounds):
            self._redis.publish(channel, "")
        return (self._processor_us() - before) / rounds

    def _processor_us(self) -> float:
        info = self._redis.info("cpu")
        return 1e6 * float(info["used_cpu_sys"] + info["used_cpu_user"])

    def close(self) -> None:
        self._redis.close()

    def _run(self, name: str, now_ms: float, *args: str) -> Any:
        return _as_text(self._scripts[name](args=(*self._settings_args, *args))[1])


def measure(rounds: int = 300, depth: int = DEPTH) -> RedisCosts:
    """On this machine, as it is loaded now: the mean of so many calls of each kind; what each job adds that waits or is
    held, with `depth` of them."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), "jobs") as server:
        own = JobSettings(max_queued=100 * depth, max_queued_s=1e9, queue_ttl_s=1e6, timeout_s=1e6)
        store = MeasuredStore(own, server.url)
        try:
            return _Rounds(store, rounds, depth).costs()
        finally:
            store.close()


class _Rounds:
    """Owns: the numbers of the jobs that it orders."""

    def __init__(self, store: MeasuredStore, rounds: int, depth: int) -> None:
        self._store, self._rounds, self._depth, self._number = store, rounds, depth, 0
        self._request = ImageRequest(
            model="m", prompt="", width=512, height=512, num_inference_steps=20, guidance_scale=7.0, seed=0
        )

    def costs(self) -> RedisCosts:
        submit, claim, renew, settle = self._turns()
        self._store.busy_us()
        for _ in range(self._rounds):
            self._store.claim(0, "w", [_ANY], idle=True)
        empty = self._store.busy_us() / self._rounds
        for _ in range(self._depth):
            self._submit()
        deep_submit, deep_claim, _, _ = self._turns()
        held = [self._claim() for _ in range(self._depth)]
        held_submit, *_ = self._turns()
        for job_id, fence in held:
            self._store.settle(0, job_id, fence)
        return RedisCosts(
            submit_us=_round(submit),
            claim_us=_round(claim),
            empty_us=_round(empty),
            renew_us=_round(renew),
            settle_us=_round(settle),
            submit_us_per_queued=_round(max(0.0, deep_submit - submit) / self._depth),
            claim_us_per_queued=_round(max(0.0, deep_claim - claim) / self._depth),
            submit_us_per_held=_round(max(0.0, held_submit - submit) / self._depth),
            bell_us=_round(self._store.bell_us(LISTENERS, self._rounds)),
        )

    def _turns(self) -> list[float]:
        """Mean microseconds of an order, a claim, a renewal, a settlement (with the sweep of its record), in turns."""
        totals = [0.0] * 4
        self._store.busy_us()
        for _ in range(self._rounds):
            self._submit()
            totals[0] += self._store.busy_us()
            job_id, fence = self._claim()
            totals[1] += self._store.busy_us()
            self._store.last_sign(0, job_id, fence)
            totals[2] += self._store.busy_us()
            self._store.settle(0, job_id, fence)
            totals[3] += self._store.busy_us()
        return [total / self._rounds for total in totals]

    def _submit(self) -> None:
        self._number += 1
        owner = f"owner-{self._number % _OWNERS}"
        name = f"j{self._number}"
        self._store.submit(0, name, self._request, owner=owner, priority="interactive", cost_ms=1000, replicas=1)

    def _claim(self) -> tuple[str, int]:
        found = self._store.claim(0, "w", [_ANY], idle=True)
        assert isinstance(found, tuple)
        return found[:2]


def _as_text(answer: Any) -> Any:
    if isinstance(answer, list):
        return [_as_text(each) for each in answer]
    return answer.decode() if isinstance(answer, bytes) else answer


def _round(us: float) -> float:
    """To three figures."""
    return float(f"{us:.3g}")
