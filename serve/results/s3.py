"""Images in S3 or in a store that speaks it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from serve.errors import BackendUnavailable, JobNotFound, OperatorError
from serve.results.keys import checked
from serve.settings import S3Settings

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0
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


class S3Store:
    """One bucket under one prefix. Calls run in threads, each tried three times with jitter.

    Owns: the connections to the store.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        secret = settings.secret_access_key
        config = Config(
            connect_timeout=3,
            read_timeout=15,
            retries={"mode": "standard", "total_max_attempts": 3},
            max_pool_connections=32,
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
            raise OperatorError(f"results.s3: {' '.join(str(error).split())}", "results.s3") from None

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        await self._call("put_object", Key=self._name(key), Body=data, ContentType=content_type)

    async def get(self, key: str) -> bytes:
        try:
            return await asyncio.to_thread(self._read, self._name(key))
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                raise JobNotFound("the image is gone; its time is over", "index") from None
            raise _away(error) from None
        except (BotoCoreError, OSError) as error:
            raise _away(error) from None

    async def delete(self, key: str) -> None:
        await self._call("delete_object", Key=self._name(key))

    def url(self, key: str) -> str:
        parameters = {"Bucket": self._settings.bucket, "Key": self._name(key)}
        try:
            url = self._client.generate_presigned_url("get_object", parameters, ExpiresIn=self._settings.url_ttl_s)
        except BotoCoreError as error:
            raise _away(error) from None
        return str(url)

    async def check(self) -> None:
        """Writes an empty object; the same one each time."""
        try:
            await asyncio.to_thread(
                self._client.put_object, Bucket=self._settings.bucket, Key=f"{self._settings.prefix}writable", Body=b""
            )
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

    def _read(self, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self._settings.bucket, Key=name)["Body"].read()
        return data

    async def _call(self, operation: str, **arguments: Any) -> None:
        try:
            await asyncio.to_thread(getattr(self._client, operation), Bucket=self._settings.bucket, **arguments)
        except (ClientError, BotoCoreError, OSError) as error:
            raise _away(error) from None


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _away(error: Exception) -> BackendUnavailable:
    log.warning("the result store does not answer: %s", error)
    return BackendUnavailable("the result store does not answer", "results.s3", _RETRY_AFTER_S)
