"""Jobs in Redis: what was accepted is never lost, and ends once. Every transition is one script in `scripts/`.

The store needs one Redis (6.2 or later) with `noeviction` and an append-only file, or its replicated equivalent; not
Redis Cluster, because a claim chooses among jobs that would lie on different shards.
"""

from __future__ import annotations

from serve.jobs.calls import Calls
from serve.jobs.claims import Claims
from serve.jobs.integrity import violations
from serve.jobs.options import KeptOptions
from serve.jobs.records import Claim, Want
from serve.jobs.submissions import Submissions
from serve.jobs.terms import Hold, Terms
from serve.jobs.upkeep import Upkeep

__all__ = ["Claim", "Hold", "JobStore", "Terms", "Want"]


class JobStore(Submissions, Claims, Upkeep, KeptOptions, Calls):
    """The jobs, as every process of the server sees them. Every method may raise BackendUnavailable."""

    async def check_integrity(self) -> None:
        """For tests, on a store at rest: AssertionError unless every key keeps the rules of `common.lua`."""
        found = await violations(self._redis, self._settings.max_attempts)
        if found:
            raise AssertionError("; ".join(found))
