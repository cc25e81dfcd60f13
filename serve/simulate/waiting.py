"""Replicas that found nothing to claim and stand by, by what they would claim."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.jobs.records import Want
from serve.simulate.replica import Replica

TOLD = 2
"""As in `common.lua`."""


@dataclass(slots=True)
class Same:
    """Replicas that would send the same claim."""

    wants: list[Want]
    idle: bool
    members: list[Replica] = field(default_factory=list)

    def may_take(self, model: str, pixels: int) -> bool:
        return any(want.model == model and want.upto >= pixels for want in self.wants)

    @property
    def kind(self) -> int:
        """0 for the idle, 1 where they hold others, 2 where they only take what others leave."""
        return (0 if self.idle else 1) if any(not want.waited_s for want in self.wants) else 2

    @property
    def rank(self) -> tuple[int, int]:
        return self.kind, max(want.upto for want in self.wants)


class Waiting:
    """Where many ask, only as many claims are really made as can have different answers: `Same` tells apart who asks
    alike.

    Owns: who waits where.
    """

    def __init__(self, lots: random.Random) -> None:
        self._lots = lots
        self._groups: dict[tuple[tuple[Want, ...], bool], Same] = {}
        self._where: dict[Replica, tuple[Same, int]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, replica: Replica) -> bool:
        return replica in self._where

    def join(self, replica: Replica, wants: list[Want]) -> None:
        self.leave(replica)
        idle = not replica.rows
        group = self._groups.setdefault((tuple(wants), idle), Same(wants, idle))
        self._where[replica] = group, len(group.members)
        group.members.append(replica)

    def leave(self, replica: Replica) -> None:
        if (found := self._where.pop(replica, None)) is None:
            return
        group, place = found
        last = group.members.pop()
        if last is not replica:
            group.members[place] = last
            self._where[last] = group, place

    def groups(self) -> list[Same]:
        """Those with anybody."""
        return [group for group in self._groups.values() if group.members]

    def told(self, model: str, pixels: int) -> list[tuple[Same, Replica]]:
        """Whom the store tells of a job that is queued (`tell_workers` in `common.lua`); among equals by lot."""
        fit = sorted((each for each in self.groups() if each.may_take(model, pixels)), key=lambda each: each.rank)
        chosen = [
            (group, replica)
            for group in fit
            if group.kind == fit[0].kind
            for replica in self._lots.sample(group.members, min(TOLD, len(group.members)))
        ]
        return chosen[:TOLD]

    def drawn(self, groups: list[Same]) -> Iterator[tuple[Same, Replica]]:
        """One of all members of the groups by lot, again and again while there are any. Who draws takes replicas and
        groups out meanwhile."""
        while left := [group for group in groups if group.members]:
            (group,) = self._lots.choices(left, [len(each.members) for each in left])
            yield group, self._lots.choice(group.members)
