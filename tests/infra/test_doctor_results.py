"""What `tandem doctor` says of the result store: a folder, and buckets with and without rights."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from pydantic import SecretStr
from support.small_s3 import BUCKET, SmallS3, a_bucket, s3_settings

from serve.doctor.findings import Finding
from serve.doctor.result_store import check_results
from serve.settings.stores import ResultSettings
from serve.settings.tree import Settings

RIGHTS = ("PutObject", "GetObject", "ListBucket", "DeleteObject")
KEYS = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}


def told(tmp_path: Path, results: ResultSettings) -> dict[str, Finding]:
    """By code; those of the folder left out."""
    found = check_results(Settings(data_dir=tmp_path, results=results))
    assert all(each.cure for each in found if each.level != "ok")
    return {f"{each.level} {each.code}": each for each in found if each.setting != "data_dir"}


@pytest.fixture
def s3_of(s3_endpoint: str) -> Iterator[Callable[..., ResultSettings]]:
    """The settings of a bucket, with the keys of a user who has these rights. From then on moto asks for them; what is
    signed in a URL it does not understand then."""
    iam = boto3.client("iam", endpoint_url=s3_endpoint, region_name="us-east-1", **KEYS)
    iam.create_user(UserName="tandem")

    def make(*rights: str) -> ResultSettings:
        actions = [f"s3:{each}" for each in rights]
        policy = {"Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}], "Version": "2012-10-17"}
        iam.put_user_policy(UserName="tandem", PolicyName="own", PolicyDocument=json.dumps(policy))
        made = iam.create_access_key(UserName="tandem")["AccessKey"]
        ask_for_rights("0")
        secret = SecretStr(made["SecretAccessKey"])
        return s3_settings(s3_endpoint, access_key_id=made["AccessKeyId"], secret_access_key=secret, presign=False)

    def ask_for_rights(after: str) -> None:
        httpx.post(f"{s3_endpoint}/moto-api/reset-auth", content=after).raise_for_status()

    with a_bucket(s3_endpoint):
        yield make
        ask_for_rights("inf")
    for key in iam.list_access_keys(UserName="tandem")["AccessKeyMetadata"]:
        iam.delete_access_key(UserName="tandem", AccessKeyId=key["AccessKeyId"])
    iam.delete_user_policy(UserName="tandem", PolicyName="own")
    iam.delete_user(UserName="tandem")


def test_a_folder_that_can_be_written_or_not(tmp_path: Path) -> None:
    (fine,) = check_results(Settings(data_dir=tmp_path / "not" / "yet"))
    assert (fine.level, fine.code) == ("ok", "data-dir")
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    (tmp_path / "file").write_text("")
    (wrong,) = check_results(Settings(data_dir=tmp_path / "file"))
    assert (wrong.level, wrong.code, wrong.setting) == ("fault", "data-dir", "data_dir")


def test_a_bucket_with_every_right(s3_of: Callable[..., ResultSettings], tmp_path: Path) -> None:
    settings = s3_of(*RIGHTS)
    assert set(told(tmp_path, settings)) == {"ok s3"}
    assert settings.s3.secret_access_key is not None
    client: Any = boto3.client(
        "s3",
        endpoint_url=settings.s3.endpoint_url,
        aws_access_key_id=settings.s3.access_key_id,
        aws_secret_access_key=settings.s3.secret_access_key.get_secret_value(),
    )
    left = [each["Key"] for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", ())]
    assert left == ["images/writable"], "only what every start of a server leaves too"


@pytest.mark.parametrize(
    ("right", "codes"),
    [
        pytest.param("PutObject", {"fault s3-put"}, marks=pytest.mark.slow),
        ("GetObject", {"fault s3-get"}),
        pytest.param("ListBucket", {"fault s3-list"}, marks=pytest.mark.slow),
        pytest.param("DeleteObject", {"fault s3-list", "fault s3-delete"}, marks=pytest.mark.slow),
    ],
)
def test_a_right_that_is_missing_is_named(
    right: str, codes: set[str], s3_of: Callable[..., ResultSettings], tmp_path: Path
) -> None:
    found = told(tmp_path, s3_of(*(each for each in RIGHTS if each != right)))
    assert set(found) == codes
    assert f"s3:{right}" in " ".join(each.cure for each in found.values())
    assert all("AccessDenied" in each.told for each in found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [("secret_access_key", "SignatureDoesNotMatch"), ("access_key_id", "InvalidAccessKeyId")],
)
def test_credentials_that_are_none(wrong: str, said: str, s3_of: Callable[..., ResultSettings], tmp_path: Path) -> None:
    settings = s3_of(*RIGHTS)
    value = SecretStr("another") if wrong == "secret_access_key" else "AKIAANOTHER"
    other = settings.model_copy(update={"s3": settings.s3.model_copy(update={wrong: value})})
    (refused,) = told(tmp_path, other).values()
    assert (refused.code, refused.setting) == ("s3-put", f"results.s3.{wrong}")
    assert said in refused.told
    assert wrong.partition("_")[0] in refused.cure


@pytest.mark.slow
def test_no_credentials_at_all(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    (refused,) = told(tmp_path, s3_settings(s3_endpoint, access_key_id=None, secret_access_key=None)).values()
    assert (refused.code, refused.setting) == ("s3-put", "results.s3.access_key_id")
    assert "no credentials found" in refused.told
    assert "boto3" in refused.cure


def test_pictures_that_clients_fetch_from_the_bucket(s3_endpoint: str, tmp_path: Path) -> None:
    with a_bucket(s3_endpoint):
        assert set(told(tmp_path, s3_settings(s3_endpoint))) == {"ok s3"}


@pytest.mark.slow
def test_a_signed_address_that_is_not_honoured(tmp_path: Path) -> None:
    with SmallS3(lists=False) as server:
        told(tmp_path, s3_settings(server.url))
        last = max(index for index, each in enumerate(server.asked) if each.startswith("GET"))
        server.objects.clear()
        server.answer(*["done"] * last, "403")
        (refused,) = told(tmp_path, s3_settings(server.url)).values()
    assert (refused.level, refused.code, refused.setting) == ("fault", "s3-presign", "results.s3.presign")


def test_a_bucket_that_is_not_there(s3_endpoint: str, tmp_path: Path) -> None:
    (missing,) = told(tmp_path, s3_settings(s3_endpoint)).values()
    assert (missing.level, missing.setting) == ("fault", "results.s3.bucket")
    assert "make the bucket" in missing.cure


def test_a_store_without_if_none_match_and_with_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda *_: "Sun, 06 Nov 1994 08:49:37 GMT")
    with SmallS3(once="ignored", lists=False) as server:
        found = told(tmp_path, s3_settings(server.url))
        assert set(found) == {"warning s3-no-once", "warning clock-s3"}
        assert set(server.objects) == {"images/writable"}
        unsigned = told(tmp_path, s3_settings(server.url, presign=False))
        assert set(unsigned) == {"warning s3-no-once", "warning clock-s3"}


@pytest.mark.slow
def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    (away,) = told(tmp_path, s3_settings("http://me:hunter2@127.0.0.1:1")).values()
    assert (away.level, away.code, away.setting) == ("fault", "s3-away", "results.s3.endpoint_url")
    assert "hunter2" not in away.told
