"""How busy the job Redis is: every script call of a fleet, counted, at what one was measured to take."""

from __future__ import annotations

from collections import defaultdict

from serve.jobs.pulse import STEPS_TOLD_A_SECOND, TELL_EVERY_S
from serve.simulate.fleet_parts import RedisCosts
from serve.simulate.outcome import RedisUse
from serve.wants import IDLE_WAIT_S

MOST_HELD = 256
"""Jobs in hand that an order's ETA is told from at most (`common.lua`)."""
RENEWED = 3
"""Signs of life of a job beside its steps: it runs, it made a step, it stores."""


class RedisMeter:
    """`slices` is of how many equal parts of the fleet one is simulated. A single Redis has as many times the calls,
    and a queue that is as many times as long.

    Owns: the counts.
    """

    def __init__(self, costs: RedisCosts, slices: int = 1) -> None:
        self._costs = costs
        self._slices = slices
        self._calls: defaultdict[str, float] = defaultdict(float)
        self._busy_us: defaultdict[str, float] = defaultdict(float)
        self._since_ms = 0.0

    def submitted(self, queued: int, held: int) -> None:
        self._add("submit", 1, self._costs.submit_us)
        self._longer("queue", queued * self._costs.submit_us_per_queued)
        # One Redis holds those of all slices, and every order of every slice looks at them.
        total = held * self._slices
        kind = "held" if total <= MOST_HELD else "held_at_most"
        self._busy_us[kind] += min(total, MOST_HELD) * self._costs.submit_us_per_held

    def claimed(self, queued: int) -> None:
        self._add("claim", 1, self._costs.claim_us)
        self._longer("queue", queued * self._costs.claim_us_per_queued)

    def settled(self) -> None:
        self._add("renew", RENEWED, self._costs.renew_us)
        self._add("settle", 1, self._costs.settle_us)

    def told(self) -> None:
        """One of those that stand by heard of a job."""
        self._busy_us["wake"] += self._costs.bell_us

    def in_vain(self, queued: int) -> None:
        """A replica asked, and got nothing."""
        self._add("wake", 1, self._costs.empty_us)
        self._longer("queue", queued * self._costs.claim_us_per_queued)

    def passes(self, now_ms: float, waiting: int, busy: int, rows: int) -> None:
        """So many replicas have waited, and so many stepped with so many images in hand, until now."""
        seconds, self._since_ms = (now_ms - self._since_ms) / 1000, now_ms
        self._add("poll", waiting * seconds / IDLE_WAIT_S, self._costs.empty_us)
        if busy:
            beat_s = max(TELL_EVERY_S, rows / busy / STEPS_TOLD_A_SECOND)
            self._add("renew", busy * seconds / beat_s, self._costs.renew_us)

    def use(self, duration_s: float) -> RedisUse:
        """Of one Redis for all slices."""
        return RedisUse(
            calls={name: self._slices * calls for name, calls in self._calls.items()},
            busy_s={name: self._slices * us / 1e6 for name, us in self._busy_us.items()},
            duration_s=duration_s,
        )

    def _longer(self, name: str, each_us: float) -> None:
        """A call takes longer by what there is of the whole fleet."""
        self._busy_us[name] += self._slices * each_us

    def _add(self, name: str, calls: float, each_us: float) -> None:
        self._calls[name] += calls
        self._busy_us[name] += calls * each_us
