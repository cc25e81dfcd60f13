"""What `tandem up` makes and says before anything slow begins."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from serve.errors import OperatorError
from serve.local import prepare
from serve.settings.tree import Settings


def begun(data_dir: Path, redis_url: str, **rooms: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"jobs": {"redis_url": redis_url}, "cache": {"redis_url": redis_url}} | rooms
    with contextlib.ExitStack() as stack:
        prepare(Settings(data_dir=data_dir, http={"port": port}, **given), stack)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_pictures_are_for_the_server_s_own_user_unless_the_operator_has_said_otherwise(
    tmp_path: Path, redis_url: str
) -> None:
    before = os.umask(0o022)
    try:
        begun(tmp_path / "data", redis_url)
        assert mode(tmp_path / "data") == 0o755
        assert mode(tmp_path / "data" / "images") == 0o700
        (tmp_path / "data" / "images").chmod(0o750)
        begun(tmp_path / "data", redis_url)
        assert mode(tmp_path / "data" / "images") == 0o750
    finally:
        os.umask(before)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "images").write_text("")
    with pytest.raises(OperatorError) as one:
        begun(tmp_path, redis_url)
    assert one.value.message == f"data_dir: {tmp_path}/images: File exists"


def test_a_store_that_does_not_answer_is_named_without_its_user(tmp_path: Path, redis_url: str) -> None:
    keys = {"bucket": "images", "region": "eu-central-1", "access_key_id": "k", "secret_access_key": "s"}
    s3 = {"endpoint_url": "http://me:hunter2@127.0.0.1:1", **keys}
    with pytest.raises(OperatorError) as one:
        begun(tmp_path, redis_url, results={"store": "s3", "s3": s3})
    assert one.value.message == "results.s3.endpoint_url: S3 at http://**********@127.0.0.1:1 does not answer"
