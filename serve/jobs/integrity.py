"""The rules of the records, as `scripts/common.lua` states them, checked over a whole store at rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from serve.domain import JobState

_INDEXES = ("tandem:queue", "tandem:leases", "tandem:deadlines")
_ENTRY = b":entry"


async def violations(redis: Redis, max_attempts: int) -> list[str]:
    """One line for each broken rule; empty when the store is sound. The store must not change meanwhile."""
    client: Any = redis  # its annotations cover every protocol and decoding at once
    keys = {key.decode() async for key in client.scan_iter(match="tandem:*", count=1000)}
    members: dict[str, dict[str, float]] = {}
    for index in _INDEXES:
        members[index] = {job.decode(): score for job, score in await client.zrange(index, 0, -1, withscores=True)}
    jobs = {key.removeprefix("tandem:job:") for key in keys if key.startswith("tandem:job:")}
    owned = {f"tandem:{part}:{job}" for job in jobs for part in ("job", "events", "previews")}
    found = [f"{key} belongs to no job" for key in keys - owned - {*_INDEXES, "tandem:sequence"}]
    found += [f"{index} holds {job}, which has no record" for index in _INDEXES for job in members[index].keys() - jobs]
    for job in jobs:
        found += [f"{job}: {rule}" for rule in await _broken(client, job, members, max_attempts)]
    return found


async def _broken(redis: Any, job: str, members: dict[str, dict[str, float]], max_attempts: int) -> list[str]:
    pipeline = redis.pipeline(transaction=False)  # a full Redis refuses even reads inside a transaction
    pipeline.hgetall(f"tandem:job:{job}").xrange(f"tandem:events:{job}")
    pipeline.pttl(f"tandem:job:{job}").pttl(f"tandem:events:{job}")
    pipeline.hgetall(f"tandem:previews:{job}")
    record, stream, *ttls, previews = await pipeline.execute()
    fields = {name.decode(): value.decode() for name, value in record.items()}
    told = [(entry_id, entry) for entry_id, entry in stream if b"index" not in entry]
    entries = [(JobState(entry[b"state"].decode()), int(entry[b"step"])) for _, entry in told]
    state = JobState(fields["state"])
    queue, leases, deadlines = (members[index] for index in _INDEXES)
    ends = sum(each.terminal for each, _ in entries)
    rules = {
        "is in the queue exactly while it is queued": (job in queue) is (state is JobState.QUEUED),
        "keeps its place": job not in queue or queue[job] == float(fields["sequence"]),
        "has a lease exactly while it runs": (job in leases) is (state is JobState.RUNNING),
        "has a deadline exactly until it ends": (job in deadlines) is not state.terminal,
        "has a time to live exactly once it ended": all((ttl > 0) is state.terminal for ttl in ttls),
        "says when it ended, exactly once it ended": ("finished" in fields) is state.terminal,
        "shows previews only while it runs": state is JobState.RUNNING or not previews,
        "tells of one preview of an image, which it keeps": _match(stream, previews),
        "ends once, as its stream's last entry": ends == state.terminal and entries[-1][0].terminal is state.terminal,
        "its stream's last entry is its present": entries[-1] == (state, int(fields["step"])),
        "its stream starts in the queue": entries[0] == (JobState.QUEUED, 0),
        "uses no more attempts than it may": 0 <= int(fields["attempt"]) <= max_attempts,
        "has a claim for every attempt": int(fields["attempt"]) <= int(fields["fence"]),
        "makes no more steps than were asked for": 0 <= int(fields["step"]) <= int(fields["steps"]),
        "says why it failed": ("error" in fields) is (state in (JobState.FAILED, JobState.EXPIRED)),
        "has images exactly when it succeeded": ("images" in fields) is (state is JobState.SUCCEEDED),
        "says how exact its images are, exactly when it has some": ("approximate" in fields) is ("images" in fields),
    }
    return [rule for rule, kept in rules.items() if not kept]


def _match(stream: Sequence[tuple[bytes, Mapping[bytes, bytes]]], previews: Mapping[bytes, bytes]) -> bool:
    """Whether the stream's entries for previews and the previews that are kept are the same, one for an image."""
    told = sorted((entry[b"index"], entry_id) for entry_id, entry in stream if b"index" in entry)
    kept = sorted((name.removesuffix(_ENTRY), value) for name, value in previews.items() if name.endswith(_ENTRY))
    files = sorted(name for name in previews if not name.endswith(_ENTRY))
    return told == kept and files == [index for index, _ in kept]
