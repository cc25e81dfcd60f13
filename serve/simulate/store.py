"""The job store without its Redis: the very scripts, in a Lua interpreter, on a simulated clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lupa import luajit21

from serve.jobs import scripts
from serve.settings import JobSettings
from serve.simulate.calls import StoreCalls

TABLES = Path(__file__).with_name("redis.lua")
"""What of Redis the scripts call."""
EPOCH_MS = 1_700_000_000_000
"""When a simulation begins, on the store's clock: its times have the digits that they have in a server."""


class SimulatedStore(StoreCalls):
    """Owns: one Lua state, with the keys of a Redis as tables."""

    def __init__(self, settings: JobSettings) -> None:
        super().__init__(settings)
        self._lua = luajit21.LuaRuntime(unpack_returned_tuples=True)
        self._call_script = self._lua.execute(TABLES.read_text(encoding="utf-8"))
        self._redis = self._lua.globals().redis.call
        self._scripts = {
            name: self._lua.execute(f"return function() {source}\nend") for name, source in scripts.sources().items()
        }

    def claimed(self, job_id: str) -> None:
        # Each order's ETA is read from all leases, and nobody asks for it here: `last_sign` alone leaves one.
        self._redis("ZREM", "tandem:leases", job_id)

    def state(self, job_id: str) -> str | None:
        """Of the record; None where it is forgotten."""
        return self._redis("HGET", f"tandem:job:{job_id}", "state") or None

    def _run(self, name: str, now_ms: float, *args: str) -> Any:
        return _as_python(self._call_script(self._scripts[name], EPOCH_MS + now_ms, *self._settings_args, *args))


def _as_python(answer: Any) -> Any:
    """Tables are lists in Redis' answers, and false is nothing."""
    if luajit21.lua_type(answer) == "table":
        return [_as_python(answer[place]) for place in range(1, len(answer) + 1)]
    return None if answer is False else answer
