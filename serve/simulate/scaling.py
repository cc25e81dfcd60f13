"""How many replicas each pool is to have: the server's policy (serve/scaling), asked as its controller asks it."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from itertools import pairwise

from serve.domain.orders import ImageRequest
from serve.scaling.demand import Band, carried, desired
from serve.scaling.places import places_of
from serve.scaling.rates import Rates
from serve.scaling.steady import Steady
from serve.simulate.clock import Clock
from serve.simulate.pools import PoolPlan
from serve.simulate.staff import Staff


class Scaler:
    """What a server's store tells of the work, and its decisions, are computed here as there; what its workers report
    of their pace is that they keep to what was predicted.

    Owns: the average of what arrives, and each pool's memory of what was wanted.
    """

    def __init__(self, pools: Mapping[str, PoolPlan], clock: Clock) -> None:
        self._clock = clock
        self._places = places_of([pool.placement for pool in pools.values()])
        self._bounds = {
            place.model: sorted({each.max_pixels for each in self._places if each.model == place.model})
            for place in self._places
        }
        self._rates = Rates()
        self._arrived: defaultdict[Hashable, float] = defaultdict(float)
        self._steady = {
            name: Steady(pool.placement.settings.idle_s, lambda: clock.now_ms / 1000) for name, pool in pools.items()
        }

    @property
    def scales(self) -> bool:
        """Whether any pool's number of replicas may change."""
        return any(place.min_replicas < place.max_replicas for place in self._places)

    def arrived(self, request: ImageRequest, cost_ms: float) -> None:
        self._arrived[self._band(request)] += cost_ms

    def decide(
        self,
        queued: Iterable[tuple[ImageRequest, float]],
        held: Iterable[tuple[ImageRequest, float]],
        staff: Mapping[str, Staff],
    ) -> Mapping[str, int]:
        """By pool. `queued` and `held` are orders with the predicted milliseconds that are left of them."""
        self._rates.add(self._clock.now_ms / 1000, self._arrived)
        self._arrived.clear()
        waiting, under_way = defaultdict[Hashable, float](float), defaultdict[Hashable, float](float)
        jobs = defaultdict[Hashable, int](int)
        for into, orders in ((waiting, queued), (under_way, held)):
            for request, left_ms in orders:
                band = self._band(request)
                into[band] += left_ms
                jobs[band] += 1
        bands = {
            model: [
                Band(above, upto, waiting[model, n], under_way[model, n], jobs[model, n], self._rates.of((model, n)))
                for n, (above, upto) in enumerate(pairwise([0, *bounds]))
            ]
            for model, bounds in self._bounds.items()
        }
        wanted, least = desired(self._places, bands), carried(self._places, bands)
        return {name: self._decided(name, wanted[name], least[name], its) for name, its in staff.items()}

    def _decided(self, name: str, wanted: int, least: int, staff: Staff) -> int:
        """As `deployments.autoscaling.BacklogSeconds`."""
        current = staff.target
        if current and not staff.living:
            wanted = max(wanted, 1)
        return self._steady[name](wanted, current, least)

    def _band(self, request: ImageRequest) -> Hashable:
        return request.model, bisect_left(self._bounds[request.model], request.pixels)
