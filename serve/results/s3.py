"""Images in S3 or in a store that speaks it."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results.keys import checked, checked_job
from serve.results.stored import Stored
from serve.settings.stores import S3Settings

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
_THREADS = 32
_SETTING_OF = {
    "NoSuchBucket": "results.s3.bucket",
    "404": "results.s3.bucket",
    "PermanentRedirect": "results.s3.region",
    "AuthorizationHeaderMalformed": "results.s3.region",
    "InvalidAccessKeyId": "results.s3.access_key_id",
    "SignatureDoesNotMatch": "results.s3.secret_access_key",
    "AccessDenied": "results.s3.access_key_id",
    "403": "results.s3.access_key_id",
}
_PUT_ATTEMPTS = 5
"""Times that a put is made which meets another write or a deletion of the same key."""
_CONFLICT_WAIT_S = 0.05
_PAGE = 1000
"""Objects that one request deletes; the most that S3 takes."""
_WRITER = "tandem-put"
"""Metadata of an object: the put that wrote it."""
_CONFLICT, _PRECONDITION_FAILED = 409, 412
_NOT_UNDERSTOOD = (400, 501)
T = TypeVar("T")


class S3Store:
    """One bucket under one prefix. Calls run in threads of their own, each tried three times with jitter: while the
    server is silent they wait for it there, and in nobody's way.

    A put says `If-None-Match: *`, which the first writer passes and any other is told 412. Whether the server means it
    is found out once, by two such puts of an empty object, at `check` or else before the first put; servers there are
    that answer 400 or 501, and others that pass over the header and replace the object. There a put looks for the
    object first, so that two writers at the same moment may both take theirs for the first, and the later object stays.

    Owns: the threads, and the connections to the store.
    """

    kind = "s3"

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._once: bool | None = None
        """Whether the server has `If-None-Match`, None until that is known."""
        self._threads = ThreadPoolExecutor(_THREADS, "s3")
        secret = settings.secret_access_key
        config = Config(
            connect_timeout=3,
            read_timeout=15,
            retries={"mode": "standard", "total_max_attempts": 3},
            max_pool_connections=_THREADS,
            signature_version="s3v4",
            # Stores other than AWS often know neither host names per bucket nor the newer checksum headers.
            s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            self._client: Any = boto3.client(
                "s3",
                endpoint_url=settings.endpoint_url,
                region_name=settings.region,
                aws_access_key_id=settings.access_key_id,
                aws_secret_access_key=secret.get_secret_value() if secret else None,
                config=config,
            )
        except (BotoCoreError, ValueError) as error:
            raise OperatorError(f"results.s3: {_told(error)}", "results.s3") from None

    @property
    def once(self) -> bool | None:
        """Whether the server has `If-None-Match`; None until that was found out."""
        return self._once

    async def put(self, key: str, data: bytes, content_type: str) -> Stored:
        name = self._name(key)
        for attempt in range(_PUT_ATTEMPTS):
            if attempt:
                await asyncio.sleep(random.uniform(0, _CONFLICT_WAIT_S * 2**attempt))
            stored = await self._tried(lambda: self._put(name, data, content_type))
            if stored is not None:
                return stored
        raise _away("a put met another write each time")

    async def get(self, key: str) -> bytes:
        name = self._name(key)
        data = await self._tried(lambda: _unless_absent(lambda: self._read(name)))
        if data is None:
            raise JobNotFound("the image is gone; its time is over", "index")
        return data

    async def size(self, key: str) -> int | None:
        name = self._name(key)
        head = await self._tried(lambda: self._head(name))
        return None if head is None else int(head["ContentLength"])

    async def delete(self, key: str) -> None:
        name = self._name(key)
        await self._tried(lambda: self._client.delete_object(Bucket=self._settings.bucket, Key=name))

    async def delete_job(self, job_id: str) -> None:
        prefix = f"{self._settings.prefix}{checked_job(job_id)}/"
        await self._tried(lambda: self._delete_under(prefix))

    def url(self, key: str) -> str | None:
        if not self._settings.presign:
            return None
        parameters = {"Bucket": self._settings.bucket, "Key": self._name(key)}
        try:
            url = self._client.generate_presigned_url("get_object", parameters, ExpiresIn=self._settings.url_ttl_s)
        except BotoCoreError as error:
            raise _away(error) from None
        return str(url)

    async def check(self) -> None:
        """Puts an empty object, the same one each time."""
        try:
            self._once = await self._threaded(self._has_once)
        except ClientError as error:
            code = _code(error)
            setting = _SETTING_OF.get(code)
            if setting is None:
                raise _away(error) from None
            raise OperatorError(f"{setting}: the result store refuses to write ({code})", setting) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise OperatorError("results.s3.access_key_id: no credentials found", "results.s3.access_key_id") from None
        except (BotoCoreError, OSError) as error:
            raise _away(error) from None

    def _name(self, key: str) -> str:
        return f"{self._settings.prefix}{checked(key)}"

    async def _tried(self, work: Callable[[], T]) -> T:
        try:
            return await self._threaded(work)
        except (ClientError, BotoCoreError, OSError) as error:
            raise _away(error) from None

    async def _threaded(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _put(self, name: str, data: bytes, content_type: str) -> Stored | None:
        """None where another write or a deletion came in between: to be made again.

        A put that botocore repeats because its answer was lost may meet its own object: the metadata says so.
        """
        if self._once is None:
            self._once = self._has_once()
        if not self._once and (head := self._head(name)) is not None:
            return Stored(int(head["ContentLength"]), False)
        writer = secrets.token_hex(8)
        try:
            self._put_object(name, data, self._once, ContentType=content_type, Metadata={_WRITER: writer})
            return Stored(len(data), True)
        except ClientError as error:
            if _status(error) == _CONFLICT:
                return None
            if _status(error) != _PRECONDITION_FAILED:
                raise
        head = self._head(name)
        if head is None:
            return None
        return Stored(int(head["ContentLength"]), head["Metadata"].get(_WRITER) == writer)

    def _has_once(self) -> bool:
        """Whether the server has `If-None-Match`. Raises what a server raises that can't be written."""
        name = f"{self._settings.prefix}writable"
        try:
            for _ in range(2):
                self._put_object(name, b"", True)
        except ClientError as error:
            if _status(error) in (_CONFLICT, _PRECONDITION_FAILED):
                return True
            if _status(error) not in _NOT_UNDERSTOOD:
                raise
            self._put_object(name, b"", False)  # which fails too where that was not the reason
        log.warning("the result store has no If-None-Match: each put looks for the object first")
        return False

    def _put_object(self, name: str, data: bytes, once: bool, **more: Any) -> None:
        if once:
            more["IfNoneMatch"] = "*"
        self._client.put_object(Bucket=self._settings.bucket, Key=name, Body=data, **more)

    def _head(self, name: str) -> dict[str, Any] | None:
        return _unless_absent(lambda: self._client.head_object(Bucket=self._settings.bucket, Key=name))

    def _read(self, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self._settings.bucket, Key=name)["Body"].read()
        return data

    def _delete_under(self, prefix: str) -> None:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._settings.bucket, Prefix=prefix, PaginationConfig={"PageSize": _PAGE}
        )
        for page in pages:
            if names := [entry["Key"] for entry in page.get("Contents", ())]:
                self._delete_all(names)

    def _delete_all(self, names: Sequence[str]) -> None:
        objects = {"Objects": [{"Key": name} for name in names], "Quiet": True}
        try:
            reply = self._client.delete_objects(Bucket=self._settings.bucket, Delete=objects)
        except ClientError as error:
            if _status(error) not in _NOT_UNDERSTOOD:
                raise
            # A store that wants another checksum of the list than botocore sends, or that takes no lists.
            for name in names:
                self._client.delete_object(Bucket=self._settings.bucket, Key=name)
            return
        if errors := reply.get("Errors"):
            raise ClientError({"Error": errors[0]}, "DeleteObjects")


def _unless_absent(work: Callable[[], T]) -> T | None:
    try:
        return work()
    except ClientError as error:
        if _code(error) in ("NoSuchKey", "404"):
            return None
        raise


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _told(reason: object) -> str:
    """boto's words on one line, less whoever stands before the host of a URL in them."""
    return re.sub(r"\S*@", "", " ".join(str(reason).split()))


def _away(reason: object) -> BackendUnavailable:
    log.warning("the result store does not answer: %s", _told(reason))
    return BackendUnavailable("the result store does not answer", "results.s3", _RETRY_AFTER_S)
