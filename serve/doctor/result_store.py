"""The result store: whether images can be put there once, had back, handed out and deleted."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from serve.doctor.findings import Finding, fault, ok, refused, warning
from serve.errors import OperatorError, TandemError, Unavailable
from serve.origins import shown
from serve.results.keys import manifest_key
from serve.results.store import ResultStore, open_store
from serve.settings.tree import Settings

CLOCK_S = 60.0
"""S3 refuses what is signed a quarter of an hour off; a minute is far from what clocks are kept to."""
LOW_BYTES, LEAST_BYTES = 5 << 30, 256 << 20
"""Free space below which it is told, and below which not even what waits of one replica has room."""
_ASK_S = 10.0
_PROBE = b"tandem doctor"
_RIGHTS = {
    "put": "s3:PutObject",
    "read": "s3:GetObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
}
_CURES = {
    "RequestTimeTooSkewed": "set this machine's clock (NTP): S3 refuses what is signed 15 minutes off",
    "NoSuchBucket": "make the bucket, or mend results.s3.bucket",
    "InvalidAccessKeyId": "another results.s3.access_key_id, or what the environment says in its place",
    "SignatureDoesNotMatch": "the secret of this key: results.s3.secret_access_key, or the environment's",
    "PermanentRedirect": "the bucket's own results.s3.region",
    "AuthorizationHeaderMalformed": "the bucket's own results.s3.region",
    "": "name a key and its secret, or give boto3 some (environment, profile, instance role)",
}


def check_results(settings: Settings) -> list[Finding]:
    """The folder, or the bucket by a probe object that is put and removed again."""
    found = list(_folder(settings.data_dir))
    if settings.results.store == "s3":
        try:
            store = open_store(settings.results, settings.data_dir.absolute())
        except OperatorError as error:
            return [*found, refused("s3-settings", error, "docs/settings.md has the form of each of results.s3")]
        found += asyncio.run(_bucket(store, settings))
    return found


def _folder(data_dir: Path) -> Iterator[Finding]:
    """Images, Redis files, conversions and notes lie there. One that is not there yet would be made: then the nearest
    folder above it is looked at, and nothing is made."""
    there = data_dir.absolute()
    try:
        there = next(each for each in (there, *there.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(_PROBE)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = shutil.disk_usage(there).free
    except OSError as error:
        cure = "another data_dir, or its owner, room or mount; a shared one needs locks (flock)"
        yield fault("data-dir", "data_dir", f"{there}: {error.strerror}", cure)
        return
    told = f"{there} has {free / 1e9:.1f} GB left"
    if free < LOW_BYTES:
        tell = fault if free < LEAST_BYTES else warning
        yield tell("data-dir-full", "data_dir", told, "make room, or shorten jobs.result_ttl_s")
    else:
        yield ok("data-dir", "data_dir", f"{told}, and can be written")


async def _bucket(store: ResultStore, settings: Settings) -> list[Finding]:
    s3 = settings.results.s3
    place = f"{shown(s3.endpoint_url) or 'AWS'}, bucket {s3.bucket}"
    try:
        await store.check()
    except TandemError as error:
        return [_refusal("s3-put", "put", error, place)]
    found: list[Finding] = []
    if getattr(store, "once", True) is False:
        told = f"{place} has no If-None-Match: each put looks for the object first, and two at once may both write"
        found.append(warning("s3-no-once", "results.s3.endpoint_url", told, "a store that has conditional writes"))
    found += await _probed(store, place)
    found += await _handed_out(store, settings)
    return found or [ok("s3", "results.s3", f"{place}: an object was put, read, listed and deleted")]


async def _probed(store: ResultStore, place: str) -> list[Finding]:
    """One object of a job that never was, through all that a job's objects go through."""
    job = f"doctor-{secrets.token_hex(8)}"
    key = manifest_key(job)
    found: list[Finding] = []

    async def tried(code: str, what: str, work: Callable[[], Awaitable[object]]) -> bool:
        try:
            await work()
        except TandemError as error:
            found.append(_refusal(code, what, error, place))
            return False
        return True

    if await tried("s3-put", "put", lambda: store.put(key, _PROBE, "application/json")):
        await tried("s3-get", "read", lambda: store.get(key))
        await tried("s3-list", "list", lambda: store.delete_job(job))
        await tried("s3-delete", "delete", lambda: store.delete(key))
    return found


async def _handed_out(store: ResultStore, settings: Settings) -> list[Finding]:
    """By a presigned URL, as a client fetches it; and the store's clock, which comes with the answer."""
    key = manifest_key(f"doctor-{secrets.token_hex(8)}")
    s3 = settings.results.s3
    found: list[Finding] = []
    try:
        await store.put(key, _PROBE, "application/json")
        url = store.url(key) or s3.endpoint_url or f"https://s3.{s3.region or 'us-east-1'}.amazonaws.com"
        before = time.time()
        async with httpx.AsyncClient(timeout=_ASK_S) as client:
            answer = await client.get(url)
        if s3.presign and answer.content != _PROBE:
            told = f"a presigned URL is answered with {answer.status_code}"
            cure = "let results.s3's user read (s3:GetObject), set its region, or results.s3.presign: false"
            found.append(fault("s3-presign", "results.s3.presign", told, cure))
        found += _clock(answer.headers.get("date"), (before + time.time()) / 2)
    except TandemError:
        pass  # told by `_probed`
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        told = f"a presigned URL can't be fetched from here: {type(error).__name__}"
        cure = "results.s3.presign: false, where clients can't reach the bucket either"
        found.append(warning("s3-presign-away", "results.s3.presign", told, cure))
    with contextlib.suppress(Unavailable):  # told by `_probed`
        await store.delete(key)
    return found


def _clock(date: str | None, here: float) -> Iterator[Finding]:
    if date is None:
        return
    try:
        ahead = parsedate_to_datetime(date).timestamp() - here
    except ValueError:
        return
    if abs(ahead) > CLOCK_S:
        told = f"the clock of the result store is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this one"
        yield warning("clock-s3", "clock", told, "run an NTP client here: S3 refuses what is signed 15 minutes off")


def _refusal(code: str, what: str, error: TandemError, place: str) -> Finding:
    """botocore's code is in the error that the store has made its own of; without credentials there is none."""
    said = getattr(error.__context__, "response", {}).get("Error", {}).get("Code", "")
    right = _RIGHTS[what]
    setting = error.param if isinstance(error, OperatorError) and error.param else "results.s3.access_key_id"
    if not said and isinstance(error, Unavailable):
        setting = "results.s3.endpoint_url"
        cure = "start it, mend the URL, or open the way to it from here"
        return fault("s3-away", setting, f"{place} does not answer", cure)
    told = f"{place} refuses to {what} an object{f' ({said})' if said else f': {error.message}'}"
    return fault(code, setting, told, _CURES.get(said, f"give this user {right} on the bucket and its objects"))
