"""Synchronous calls that take several jobs, as every process of the server sees them: what a caller has under way can
be asked for and ended wherever the question comes in.

    tandem:call:O:NAME  hash        `call`: the Call as JSON, without what follows; `job:ID`: the place of a job and its
                                    share of the whole, as JSON; `stopped`: all of it is to end, `stopped:N`: round N
                                    is; `ended`: the call was answered. NAME stands for the call's id: nothing that a
                                    client wrote enters a key. Lives as long as anybody waits, or a while after the end
    tandem:calls:O      sorted set  NAME -> when it began        the calls of an owner that have not ended
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.jobs.base import Shared, checked
from serve.jobs.connection import milliseconds

ENDED_S = 600.0
"""So long a call is known that has ended, or is to end."""
_DAY_S = 86400.0
_LOOKED_AT = 64
"""Calls of one owner, from the newest, that are looked at."""
_JOB, _STOPPED = "job:", "stopped"
_TOLD = ("id", "rounds", "stages", "started_at")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A job of a call: of its round (from 0), of that round's pass (from 0), the job so many. `share` is its part of
    the whole call's work."""

    round: int
    stage: int
    index: int
    job_id: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A synchronous call. `id` is what its caller, or we, call it. It draws `rounds` after or beside one another, each
    in `stages` passes. `parts` are the jobs so far, in order; `stopped` the rounds that are to end, all of them where
    `interrupted`. Times are Unix seconds."""

    id: str
    rounds: int = 1
    stages: int = 1
    started_at: float
    parts: tuple[Part, ...] = ()
    stopped: frozenset[int] = frozenset()
    interrupted: bool = False
    ended: bool = False

    def stops(self, round_: int) -> bool:
        return self.interrupted or round_ in self.stopped


class Calls(Shared):
    """Every method may raise BackendUnavailable."""

    async def begin_call(self, owner: str, call: Call, within_s: float) -> None:
        """It is forgotten after `within_s`, whatever became of the process that answers it. A further call of the same
        id takes the former's place."""
        told = {name: getattr(call, name) for name in _TOLD}
        key, index = _key(owner, call.id), _index(owner)
        pipeline: Any = self._redis.pipeline(transaction=True)
        pipeline.delete(key).hset(key, "call", json.dumps(told)).pexpire(key, milliseconds(within_s))
        pipeline.zadd(index, {_name(call.id): call.started_at}).pexpire(index, milliseconds(_DAY_S))
        await self._connection.guarded(pipeline.execute())

    async def add_part(self, owner: str, call_id: str, part: Part) -> bool:
        """A job was submitted for the call. False where it is to end: whoever said so before does not know of it."""
        key = _key(owner, call_id)
        told = json.dumps([part.round, part.stage, part.index, part.share])
        pipeline: Any = self._redis.pipeline(transaction=True)
        pipeline.hset(key, f"{_JOB}{checked(part.job_id)}", told)
        pipeline.hmget(key, _STOPPED, f"{_STOPPED}:{part.round}")
        _, stopped = await self._connection.guarded(pipeline.execute())
        return not any(stopped)

    async def end_call(self, owner: str, call_id: str) -> None:
        key = _key(owner, call_id)
        pipeline: Any = self._redis.pipeline(transaction=True)
        pipeline.hset(key, "ended", 1).pexpire(key, milliseconds(ENDED_S)).zrem(_index(owner), _name(call_id))
        await self._connection.guarded(pipeline.execute())

    async def stop_call(self, owner: str, call_id: str, round_: int | None = None) -> Call | None:
        """Say that a round of it, or all of it (None), is to end, and have what is there by then: its jobs are the
        caller's to cancel. None where there is no such call."""
        key = _key(owner, call_id)
        pipeline: Any = self._redis.pipeline(transaction=True)
        pipeline.hset(key, _STOPPED if round_ is None else f"{_STOPPED}:{round_}", 1)
        pipeline.pexpire(key, milliseconds(ENDED_S)).hgetall(key)
        *_, fields = await self._connection.guarded(pipeline.execute())
        return _call(fields)

    async def call(self, owner: str, call_id: str) -> Call | None:
        """None for one that there is not, or that ended long ago."""
        client: Any = self._redis  # its annotations cover every protocol and decoding at once
        return _call(await self._connection.guarded(client.hgetall(_key(owner, call_id))))

    async def calls(self, owner: str) -> tuple[Call, ...]:
        """Those of an owner that have not ended, the newest first, and no more than a few."""
        client: Any = self._redis
        index = _index(owner)
        names = [each.decode() for each in await self._connection.guarded(client.zrevrange(index, 0, _LOOKED_AT - 1))]
        if not names:
            return ()
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(_named(owner, name))
        found = [_call(fields) for fields in await self._connection.guarded(pipeline.execute())]
        if lost := [name for name, call in zip(names, found, strict=True) if call is None]:
            await self._connection.guarded(client.zrem(index, *lost))
        return tuple(call for call in found if call is not None and not call.ended)

    async def latest_preview(self, job_id: str, index: int = 0) -> tuple[int, bytes] | None:
        """How image `index` of a job that is drawn looks by now: a number that rises from one preview to the next, and
        the JPEG file. None before the first and after the job's end."""
        client: Any = self._redis
        call = client.hmget(f"tandem:previews:{checked(job_id)}", f"{index}:entry", str(index))
        entry, data = await self._connection.guarded(call)
        if entry is None or data is None:
            return None
        moment, _, number = entry.decode().partition("-")
        return int(moment) * 100 + int(number), data


def started_now(call_id: str, rounds: int, stages: int) -> Call:
    """A call that begins now."""
    return Call(id=call_id, rounds=rounds, stages=stages, started_at=time.time())


def _call(fields: Mapping[bytes, bytes]) -> Call | None:
    if b"call" not in fields:
        return None
    named = {name.decode(): value for name, value in fields.items()}
    parts = [_part(name.removeprefix(_JOB), value) for name, value in named.items() if name.startswith(_JOB)]
    stopped = [name.removeprefix(f"{_STOPPED}:") for name in named if name.startswith(f"{_STOPPED}:")]
    told = json.loads(fields[b"call"])
    return Call(
        **{name: told[name] for name in _TOLD if name in told},  # another release may tell more
        parts=tuple(sorted(parts)),
        stopped=frozenset(map(int, stopped)),
        interrupted=_STOPPED.encode() in fields,
        ended=b"ended" in fields,
    )


def _part(job_id: str, told: bytes) -> Part:
    round_, stage, index, share = json.loads(told)
    return Part(round_, stage, index, job_id, share)


def _name(call_id: str) -> str:
    return hashlib.blake2b(call_id.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _key(owner: str, call_id: str) -> str:
    return _named(owner, _name(call_id))


def _named(owner: str, name: str) -> str:
    return f"tandem:call:{owner}:{name}"


def _index(owner: str) -> str:
    return f"tandem:calls:{owner}"
