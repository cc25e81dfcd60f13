"""API keys, kept as hashes in the job Redis: who may call, as whom, until when.

A key is written `tdm_<id>_<secret>`. The id, 60 random bits in base32, is no secret: it names the owner of jobs and is
shown in lists. The secret is 256 random bits, told once and kept nowhere. A hash without salt and stretching is enough,
because nobody can try 2^256 of them.

    tandem:keys     sorted set  key id -> when it was made, in Unix seconds
    tandem:key:ID   hash        key: the ApiKey as JSON; sha256: of the whole key as it is written, in hex;
                                revoked_at: once it was revoked

The times are of the Redis server's clock.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from serve.callers import API_KEY, Allowance, Scope
from serve.errors import OperatorError, Unauthorized
from serve.jobs.connection import Connection
from serve.settings.stores import JobSettings
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

KEEP_S = 1.0
"""Seconds for which a process goes by what it read of a key, from when it asked: so soon a revoked key is refused."""
_REMEMBERED = 1024
_ID_BYTES, _SECRET_BYTES = 8, 32
_ID = re.compile(r"[a-z2-7]{12}")
_INDEX = "tandem:keys"
_DEFAULT_SCOPES = frozenset({Scope.GENERATE, Scope.EMBED})
_FIRST = "first"
_WRITE_ONCE = """
if redis.call('exists', KEYS[1]) == 0 then
  redis.call('hset', KEYS[1], 'key', ARGV[1], 'sha256', ARGV[2])
  redis.call('zadd', KEYS[2], ARGV[3], ARGV[4])
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is known of a key; nothing in it opens anything. `expires_at` is None where it lasts until it is revoked."""

    id: str
    name: str
    scopes: frozenset[Scope]
    weight: float
    allowance: Allowance
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was made just now. `secret` is the whole of it as callers send it, and can't be had again."""

    key: ApiKey
    secret: str = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True)
class _Record:
    """What Redis held of a key. `asked_at` is our monotonic clock before the question, `clock` the clock of Redis."""

    key: ApiKey
    sha256: str
    asked_at: float
    clock: float

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.asked_at

    @property
    def expired(self) -> bool:
        return self.key.expires_at is not None and self.clock + self.age_s >= self.key.expires_at


_KEY = TypeAdapter(ApiKey)


class KeyStore:
    """The API keys, as every process of the server sees them. Every method may raise BackendUnavailable.

    Owns: connections to the job Redis, and what it has read within KEEP_S, of a bounded number of keys. Only keys that
    exist are remembered: whoever makes tokens up fills nothing.
    """

    def __init__(self, settings: JobSettings, metrics: Metrics) -> None:
        self._connection = Connection(settings, metrics)
        self._client: Any = self._connection.redis  # its annotations cover every protocol and decoding at once
        self._seen: OrderedDict[str, _Record] = OrderedDict()

    async def create(
        self,
        name: str,
        scopes: Collection[Scope] = _DEFAULT_SCOPES,
        weight: float = 1.0,
        allowance: Allowance | None = None,
        expires_in_s: float | None = None,
    ) -> NewKey:
        """Make a key. It is on disk when this returns, where Redis keeps jobs as it must."""
        now = await self._connection.guarded(self._now())
        key = ApiKey(
            id=base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode().lower()[:12],
            name=name,
            scopes=frozenset(scopes),
            weight=weight,
            allowance=allowance or Allowance(),
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )
        secret = base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip("=")
        token = f"tdm_{key.id}_{secret}"
        await self._connection.guarded(self._write(key, _digest(token)))
        return NewKey(key, token)

    async def make_first(self, token: str) -> str | None:
        """Make the key that is written like this, with every scope, unless a key of its id was ever made: that one
        stays as it is. Any number of processes may do so at once. Gives why the token opens nothing, where it doesn't.
        """
        written = API_KEY.fullmatch(token)
        if written is None:
            raise OperatorError("keys.first: it is not written as an API key", "keys.first")
        now = await self._connection.guarded(self._now())
        scopes, allowance = frozenset(Scope), Allowance()
        key = ApiKey(id=written[1], name=_FIRST, scopes=scopes, weight=1.0, allowance=allowance, created_at=now)
        record = await self._connection.guarded(self._write_once(key, _digest(token)))
        if record is None or not hmac.compare_digest(record.sha256, _digest(token)):
            return f"key {key.id} was made before, with another secret"
        return None if record.key.revoked_at is None else f"key {key.id} was revoked"

    async def list(self) -> tuple[ApiKey, ...]:
        """Every key that was made, revoked and expired ones too, in the order in which they were made."""
        records = await self._connection.guarded(self._read_all())
        return tuple(record.key for record in records if record is not None)

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key, for every process within KEEP_S; once more changes nothing. OperatorError: no key has this id."""
        record = await self._connection.guarded(self._revoke(key_id)) if _ID.fullmatch(key_id) else None
        if record is None:
            raise OperatorError("ID: no API key has this id; `tandem keys list` shows them", "ID")
        self._seen.pop(key_id, None)
        return record.key

    async def ever_made(self) -> bool:
        """Whether there is any key, be it revoked or expired."""
        return bool(await self._connection.guarded(self._client.exists(_INDEX)))

    async def find(self, token: str) -> ApiKey:
        """The key that is written like this, in at most one round trip. Unauthorized: there is none that is valid.

        What is wrong with a key is told to its holder only: a wrong secret is answered like an unknown id.
        """
        written = API_KEY.fullmatch(token)
        record = await self._record(written[1]) if written else None
        if record is None or not hmac.compare_digest(record.sha256, _digest(token)):
            raise Unauthorized("the API key is not valid")
        if record.key.revoked_at is not None:
            raise Unauthorized("the API key was revoked")
        if record.expired:
            raise Unauthorized("the API key has expired")
        return record.key

    async def close(self) -> None:
        await self._client.aclose()

    async def _record(self, key_id: str) -> _Record | None:
        known = self._seen.get(key_id)
        if known is not None and known.age_s < KEEP_S:
            return known
        record = await self._connection.guarded(self._read(key_id))
        self._seen.pop(key_id, None)
        if record is not None:
            self._seen[key_id] = record
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)  # who was asked for longest ago
        return record

    async def _now(self) -> float:
        return _seconds(await self._client.time())

    async def _write(self, key: ApiKey, digest: str) -> None:
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(_name(key.id), mapping={"key": _KEY.dump_json(key), "sha256": digest})
        pipeline.zadd(_INDEX, {key.id: key.created_at})
        await pipeline.execute()

    async def _write_once(self, key: ApiKey, digest: str) -> _Record | None:
        """What is there then."""
        told = (_KEY.dump_json(key), digest, key.created_at, key.id)
        await self._client.eval(_WRITE_ONCE, 2, _name(key.id), _INDEX, *told)
        return await self._read(key.id)

    async def _read(self, key_id: str) -> _Record | None:
        asked_at = time.monotonic()
        pipeline = self._client.pipeline(transaction=False)
        clock, fields = await pipeline.time().hgetall(_name(key_id)).execute()
        return _record(key_id, fields, asked_at, _seconds(clock))

    async def _read_all(self) -> tuple[_Record | None, ...]:
        asked_at, ids = time.monotonic(), [each.decode() for each in await self._client.zrange(_INDEX, 0, -1)]
        pipeline = self._client.pipeline(transaction=False)
        pipeline.time()
        for key_id in ids:
            pipeline.hgetall(_name(key_id))
        clock, *found = await pipeline.execute()
        return tuple(
            _record(key_id, fields, asked_at, _seconds(clock)) for key_id, fields in zip(ids, found, strict=True)
        )

    async def _revoke(self, key_id: str) -> _Record | None:
        # No record is ever deleted, so nothing comes between the look and the writing.
        if await self._client.exists(_name(key_id)):
            await self._client.hsetnx(_name(key_id), "revoked_at", await self._now())
        return await self._read(key_id)


def _record(key_id: str, fields: Mapping[bytes, bytes], asked_at: float, clock: float) -> _Record | None:
    """None where there is none, and where it can't be read: what is not understood opens nothing."""
    if not fields:
        return None
    revoked = fields.get(b"revoked_at")
    try:
        key = dataclasses.replace(
            _KEY.validate_json(fields[b"key"]), revoked_at=None if revoked is None else float(revoked)
        )
        return _Record(key, fields[b"sha256"].decode("ascii"), asked_at, clock)
    except (KeyError, ValueError) as error:
        kind = "fields missing" if isinstance(error, KeyError) else "fields of another form"
        log.error("the record of API key %s can't be read: %s", key_id, kind)
        return None


def _name(key_id: str) -> str:
    return f"tandem:key:{key_id}"


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("ascii")).hexdigest()


def _seconds(clock: tuple[int, int]) -> float:
    return clock[0] + clock[1] / 1e6
