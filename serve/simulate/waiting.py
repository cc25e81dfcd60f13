"""Replicas that found nothing to claim and wait for the store's bell, by what they would claim."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve.jobs.records import Want
from serve.simulate.replica import Replica


@dataclass(slots=True)
class Same:
    """Replicas that would send the same claim."""

    wants: list[Want]
    idle: bool
    members: list[Replica] = field(default_factory=list)


class Waiting:
    """Each of them hears each bell, and all of them ask; the one whose claim comes first gets the job. So it is drawn
    by lot, and only as many claims are really made as can have different answers: `Same` tells apart who asks alike.

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

    def drawn(self, groups: list[Same]) -> Iterator[tuple[Same, Replica]]:
        """One of all members of the groups by lot, again and again while there are any. Who draws takes replicas and
        groups out meanwhile."""
        while left := [group for group in groups if group.members]:
            (group,) = self._lots.choices(left, [len(each.members) for each in left])
            yield group, self._lots.choice(group.members)
