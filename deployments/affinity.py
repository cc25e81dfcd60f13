"""Which replica of a text encoder's pool is asked: for the same text the same one, so that it is encoded once.

Serve pickles the class into every process that holds a handle.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

SPARE_REQUESTS = 4
"""Requests that a replica may have beyond its share before text that is at home there goes elsewhere."""
SHARE = 1.25
"""Its share, as a multiple of the mean over the replicas."""


def rank(token_ids: Sequence[int], queues: Mapping[str, int]) -> list[str]:
    """Replicas for a row, best first; `queues` has the requests that each one is at work on, by its id.

    Highest random weight (Thaler & Ravishankar 1998): when a replica comes or goes, only the rows move that it gains
    or had. With a bound on the load (Mirrokni et al. 2016, https://arxiv.org/abs/1608.01350): a text that everybody
    asks for must not wait at one replica while another is idle.
    """
    row = struct.pack(f"<{len(token_ids)}I", *token_ids)
    weights = {name: hashlib.blake2b(row, key=name.encode()[:64], digest_size=8).digest() for name in queues}
    bound = SPARE_REQUESTS + SHARE * sum(queues.values()) / max(1, len(queues))
    return sorted(queues, key=lambda name: (queues[name] <= bound, weights[name]), reverse=True)


class UnitAffinity(RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica at which the first of its rows is at home. A positive prompt is the first: the
    negative ones are few, and every replica soon has them."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        units = pending_request.args[0] if pending_request is not None and pending_request.args else ()
        if not units:
            return [list(candidate_replicas)]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in rank(units[0].token_ids, queues)]
