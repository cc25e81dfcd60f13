"""What each caller has set once for all orders to come, beside the jobs: small, and forgotten after a while.

tandem:options:OWNER   hash   option -> its value as JSON; expires OPTIONS_S after it was last set
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve.jobs.base import Shared
from serve.jobs.connection import milliseconds

OPTIONS_S = 30 * 86400.0
"""Seconds for which options are kept after they were last set."""


class KeptOptions(Shared):
    """Every method may raise BackendUnavailable."""

    async def options(self, owner: str) -> dict[str, Any]:
        """Empty where nothing was set, or long ago."""
        client: Any = self._redis  # its annotations cover every protocol and decoding at once
        found = await self._connection.guarded(client.hgetall(_key(owner)))
        return {name.decode(): json.loads(value) for name, value in found.items()}

    async def set_options(self, owner: str, values: Mapping[str, Any]) -> None:
        """One by one: what another process of the server sets meanwhile of the others stays."""
        if not values:
            return
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hset(_key(owner), mapping={name: json.dumps(value) for name, value in values.items()})
        pipeline.pexpire(_key(owner), milliseconds(OPTIONS_S))
        await self._connection.guarded(pipeline.execute())


def _key(owner: str) -> str:
    return f"tandem:options:{owner}"
