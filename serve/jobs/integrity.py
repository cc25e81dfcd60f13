"""The rules of the records, as `scripts/common.lua` states them, checked over a whole store at rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from serve.domain.jobs import JobState

_INDEXES = ("records", "queue", "leases", "deadlines", "ended", "dead", "webhooks")
_COUNTS = ("waiting", "unfinished")
_OTHERS = ("sequence", "round", "rounds", "workers", "alive", "silent", "rules")
_OWN = ("job", "events", "previews")
_APART = ("owner", "allowance", "order", "key", "keys", "claim", "line", "options", "call", "calls", "standby")
_ENTRY = b":entry"

Fields = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Store:
    """All that concerns more than one job: the sorted sets and the counts, by name, and the records, by id."""

    indexes: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, Mapping[str, int]]
    rounds: Mapping[str, float]
    round: float | None
    owned: Mapping[str, Mapping[str, float]]
    lines: Mapping[str, Mapping[str, int]]
    jobs: Mapping[str, Fields]


async def violations(redis: Redis, max_attempts: int) -> list[str]:
    """One line for each broken rule; empty when the store is sound. The store must not change meanwhile."""
    client: Any = redis  # its annotations cover every protocol and decoding at once
    keys = sorted([key.decode() async for key in client.scan_iter(match="tandem:*", count=1000)])
    store = await _read(client, keys)
    found = _strays(keys, store.jobs.keys())
    for index, members in store.indexes.items():
        found += [f"{index} holds {job}, which has no record" for job in members.keys() - store.jobs.keys()]
    found += _counted(store)
    for job in store.jobs:
        found += [f"{job}: {rule}" for rule in await _broken(client, job, store, max_attempts)]
    return found


async def _read(redis: Any, keys: Sequence[str]) -> _Store:
    async def scores(key: str) -> dict[str, float]:
        return {name.decode(): score for name, score in await redis.zrange(key, 0, -1, withscores=True)}

    async def fields(key: str) -> dict[str, str]:
        return {name.decode(): value.decode("utf-8", "replace") for name, value in (await redis.hgetall(key)).items()}

    jobs, owners, lines = "tandem:job:", "tandem:owner:", "tandem:line:"
    latest = await redis.get("tandem:round")
    return _Store(
        indexes={name: await scores(f"tandem:{name}") for name in _INDEXES},
        counts={name: {of: int(n) for of, n in (await fields(f"tandem:{name}")).items()} for name in _COUNTS},
        rounds=await scores("tandem:rounds"),
        round=None if latest is None else float(latest),
        owned={key.removeprefix(owners): await scores(key) for key in keys if key.startswith(owners)},
        lines={
            key.removeprefix(lines): {of: int(n) for of, n in (await fields(key)).items()}
            for key in keys
            if key.startswith(lines)
        },
        jobs={key.removeprefix(jobs): await fields(key) for key in keys if key.startswith(jobs)},
    )


def _strays(keys: Sequence[str], jobs: Any) -> list[str]:
    """Keys that belong to nothing."""
    common = {f"tandem:{name}" for name in (*_INDEXES, *_COUNTS, *_OTHERS, "keys")}
    own = {f"tandem:{part}:{job}" for job in jobs for part in _OWN}
    apart = tuple(f"tandem:{name}:" for name in _APART)
    return [f"{key} belongs to no job" for key in keys if key not in common | own and not key.startswith(apart)]


def _counted(store: _Store) -> list[str]:
    """What is counted, counted again."""
    jobs, queue = store.jobs, [job for job in store.indexes["queue"] if job in store.jobs]
    live = [job for job in store.indexes["deadlines"] if job in jobs]
    lines: dict[str, Counter[str]] = {}
    for job in queue:
        owner, cost = jobs[job]["owner"], int(jobs[job]["cost"])
        line = lines.setdefault(jobs[job]["model"], Counter())
        line.update({"owners": f"jobs:{owner}" not in line})
        line.update({"jobs": 1, "ms": cost, f"jobs:{owner}": 1, f"ms:{owner}": cost})
    owned = {
        owner: {job: float(each["sequence"]) for job, each in jobs.items() if each["owner"] == owner}
        for owner in {each["owner"] for each in jobs.values()}
    }
    rules = {
        "the waiting of each owner are counted": store.counts["waiting"]
        == Counter(jobs[job]["owner"] for job in queue),
        "the unfinished of each owner are counted": store.counts["unfinished"]
        == Counter(jobs[job]["owner"] for job in live),
        "what waits for each model is counted": store.lines == lines,
        "exactly the owners of queued jobs share rounds": store.rounds.keys() == {jobs[job]["owner"] for job in queue},
        "there is a round only while something is queued": store.round is None or bool(queue),
        "each owner's jobs are listed": store.owned == owned,
    }
    return [f"not so: {rule}" for rule, kept in rules.items() if not kept]


async def _broken(redis: Any, job: str, store: _Store, max_attempts: int) -> list[str]:
    pipeline = redis.pipeline(transaction=False)  # a full Redis refuses even reads inside a transaction
    pipeline.xrange(f"tandem:events:{job}").hgetall(f"tandem:previews:{job}")
    stream, previews = await pipeline.execute()
    fields = store.jobs[job]
    told = [entry for _, entry in stream if b"index" not in entry]
    entries = [(JobState(entry[b"state"].decode()), int(entry[b"step"])) for entry in told]
    claims = [(int(entry[b"fence"]), int(entry[b"attempt"])) for entry in told]
    state = JobState(fields["state"])
    within = {name: job in members for name, members in store.indexes.items()}
    ends = sum(each.terminal for each, _ in entries)
    last = place = float(fields["sequence"])
    if fields["priority"] == "batch":
        place += 2**50
    rules = {
        "is among the records, in its place": store.indexes["records"].get(job) == last,
        "is in the queue exactly while it is queued": within["queue"] is (state is JobState.QUEUED),
        "keeps its place": not within["queue"] or store.indexes["queue"][job] == place,
        "has a lease exactly while a worker holds it": within["leases"] is state.held,
        "has a deadline exactly until it ends": within["deadlines"] is not state.terminal,
        "has an end of its record exactly once it ended": within["ended"] is state.terminal,
        "is a dead letter only where it failed": not within["dead"] or state is JobState.FAILED,
        "says when it ended, exactly once it ended": ("finished" in fields) is state.terminal,
        "a client was told of its end only once it ended": "told" not in fields or state.terminal,
        "shows previews only while it is held": state.held or not previews,
        "tells of one preview of an image, which it keeps": _match(stream, previews),
        "ends once, as its stream's last entry": ends == state.terminal and entries[-1][0].terminal is state.terminal,
        "its stream's last entry is its present": entries[-1] == (state, int(fields["step"])),
        "its stream starts in the queue": entries[0] == (JobState.QUEUED, 0),
        "no entry of a claim follows one of a later claim": claims == sorted(claims, key=lambda claim: claim[0]),
        "each claim begins with its text": all(
            entries[n][0] is JobState.ENCODING for n in range(1, len(claims)) if claims[n][0] > claims[n - 1][0]
        ),
        "uses no more attempts than it may": 0 <= int(fields["attempt"]) <= max_attempts,
        "has a claim for every attempt": int(fields["attempt"]) <= int(fields["fence"]),
        "makes no more steps than were asked for": 0 <= int(fields["step"]) <= int(fields["steps"]),
        "says why it failed": ("error" in fields) is (state in (JobState.FAILED, JobState.EXPIRED)),
        "has images exactly when it succeeded": ("images" in fields) is (state is JobState.SUCCEEDED),
        "says how exact its images are, exactly when it has some": ("approximate" in fields) is ("images" in fields),
        "its webhook waits only once it ended": not within["webhooks"]
        or (state.terminal and fields.get("webhook_state") == "pending"),
        "its webhook's state is told exactly once it ended": ("webhook_state" in fields)
        is (state.terminal and "webhook" in fields),
    }
    return [rule for rule, kept in rules.items() if not kept]


def _match(stream: Sequence[tuple[bytes, Mapping[bytes, bytes]]], previews: Mapping[bytes, bytes]) -> bool:
    """Whether the stream's entries for previews and the previews that are kept are the same, one for an image."""
    told = sorted((entry[b"index"], entry_id) for entry_id, entry in stream if b"index" in entry)
    kept = sorted((name.removesuffix(_ENTRY), value) for name, value in previews.items() if name.endswith(_ENTRY))
    files = sorted(name for name in previews if not name.endswith(_ENTRY))
    return told == kept and files == [index for index, _ in kept]
