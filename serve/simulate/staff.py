"""The replicas of one pool over time: some start, some live, some end what they hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from serve.simulate.clock import Clock
from serve.simulate.fleet import Fleet
from serve.simulate.outcome import PoolUse
from serve.simulate.pools import PoolPlan
from serve.simulate.replica import Held, Replica


class Staff:
    """A card counts from the moment that its replica is ordered until that is gone; one that is lost has another
    started in its place at once.

    Owns: the replicas of the pool, what their cards come to, how often their number changed.
    """

    def __init__(
        self,
        plan: PoolPlan,
        clock: Clock,
        until_ms: float,
        begun: Callable[[Replica], None],
        drawn: Callable[[Replica, Held], None],
    ) -> None:
        """`begun` hears of each that lives, `drawn` of each image; hours are those until `until_ms`."""
        self.plan = plan
        self.living: list[Replica] = []
        self.leaving: list[Replica] = []
        self._everyone: list[Replica] = []
        self._lost = self._changes = 0
        self._card_ms = self._whole_ms = 0.0
        self._course = [(0.0, 0)]
        self._clock = clock
        self._until_ms = until_ms
        self._begun, self._drawn = begun, drawn
        self._orders = 0
        self._starting: list[int] = []
        self._cards = 0
        self._since_ms = 0.0

    @property
    def target(self) -> int:
        """How many there are, those that start included."""
        return len(self._starting) + len(self.living)

    def start(self, after_s: float) -> None:
        """Another one, that lives after so long."""
        self._count(1)
        self._order(after_s)

    def scale(self, to: int) -> list[Replica]:
        """Order replicas, or end some: those first that have not started, then the youngest. Those that are to end what
        they hold, and claim no more, are answered."""
        if to == self.target:
            return []
        self._changes += 1
        for _ in range(to - self.target):
            self.start(self.plan.about.cold_start_s)
        ending = []
        while to < self.target:
            if self._starting:
                self._starting.pop()
                self._count(-1)
                continue
            replica = self.living.pop()
            replica.leaving = True
            self.leaving.append(replica)
            ending.append(replica)
        return ending

    def lose(self, replica: Replica) -> list[Held]:
        """It is gone with what it held, which is answered."""
        self._lost += 1
        held = replica.lose()
        if replica.leaving:
            self.leaving.remove(replica)
            self._count(-1)
        else:
            self.living.remove(replica)
            self._order(self.plan.about.cold_start_s)
        return held

    def gone(self, replica: Replica) -> None:
        """One that was to leave holds nothing any more."""
        replica.lose()
        self.leaving.remove(replica)
        self._count(-1)

    def use(self, fleet: Fleet) -> PoolUse:
        """What became of the pool until now."""
        self._count(0)
        about, hours = self.plan.about, self._card_ms / 3.6e6
        return PoolUse(
            name=self.plan.name,
            model=about.model,
            gpu_class=about.gpu_class,
            replicas=about.replicas,
            least=about.least,
            most=about.most,
            rung=self.plan.placement.rung.value,
            busy=sum(each.busy_ms for each in self._everyone) / max(1.0, self._whole_ms),
            images=sum(each.images for each in self._everyone),
            lost=self._lost,
            changes=self._changes,
            hours=hours,
            cost=hours * fleet.price_per_hour(about.gpu_class),
            course=tuple(self._course),
        )

    def _order(self, after_s: float) -> None:
        self._orders += 1
        self._starting.append(self._orders)
        self._clock.at(self._clock.now_ms + 1000 * after_s, partial(self._lives, self._orders))

    def _lives(self, order: int) -> None:
        if order not in self._starting:
            return  # it was called off
        self._starting.remove(order)
        replica = Replica(self.plan, len(self._everyone), self._clock, self._drawn)
        self._everyone.append(replica)
        self.living.append(replica)
        self._begun(replica)

    def _count(self, by: int) -> None:
        now, until = self._clock.now_ms, self._until_ms
        self._whole_ms += self._cards * (now - self._since_ms)
        self._card_ms += self._cards * max(0.0, min(now, until) - min(self._since_ms, until))
        self._cards += by
        self._since_ms = now
        if by:
            if self._course[-1][0] == now / 1000:
                self._course.pop()
            self._course.append((now / 1000, self._cards))
