"""docs/operations/production.yaml loads, as a file and as `args`; it can be planned; the doctor finds nothing wrong."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from support.published_folders import published_model
from support.server import free_port

from serve.doctor.examine import examine
from serve.embedded import EmbeddedRedis
from serve.models import SHIPPED, ModelFolder
from serve.origins import load, load_args, plain_secrets
from serve.placements import plan_placements
from serve.rungs import Rung
from serve.settings.tree import Settings

FILE = Path(__file__).parents[2] / "docs" / "operations" / "production.yaml"
TREE: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
THIS_MACHINE = {
    *("no-cards", "gpus-short", "torch-cuda", "class-without-card", "driver", "version-untested"),
    *("data-dir-full", "temporary-full", "shared-memory", "open-files", "redis-slow", "jobs-redis-slow-disk"),
}
"""What says nothing of the settings."""


def tree_here(folder: Path) -> dict[str, Any]:
    """The file's, but for what is not here: the shipped model in place of two from the hub, a folder of the test's."""
    here = {"source": str(SHIPPED)}
    models = {"model": here | {"name": "sd15"}, "models": [here | {"name": "sdxl"}]}
    return TREE | models | {"data_dir": str(folder), "http": TREE["http"] | {"port": free_port()}}


@pytest.fixture
def environ(jobs_redis: EmbeddedRedis, tmp_path: Path) -> Iterator[dict[str, str]]:
    with EmbeddedRedis(tmp_path / "cache", "cache", 1 << 28) as cache:
        yield {
            "TANDEM_JOBS__REDIS_URL": jobs_redis.url,
            "TANDEM_CACHE__REDIS_URL": cache.url,
            "TANDEM_KEYS__FIRST": f"tdm_{'b' * 12}_{'B' * 43}",
        }


def test_it_is_a_file_of_settings_and_the_args_of_an_application(environ: dict[str, str]) -> None:
    of_file, of_args = load(FILE, environ).settings, load_args(TREE, environ).settings
    assert of_file == of_args
    assert plain_secrets(load_args(TREE, environ).settings) == []
    assert not [word for word in ("redis_url", "secret", "password", "access_key") if word in str(TREE)]


def test_its_times_fit_each_other(environ: dict[str, str]) -> None:
    own = load(FILE, environ).settings
    assert own.http.replicas >= 2
    assert own.http.drain_s >= own.http.wait_s, "a roll-out cuts no synchronous call"
    assert own.jobs.queue_ttl_s > own.jobs.max_queued_s, "what was let in can be drawn in time"
    assert own.jobs.timeout_s > own.diffusion.drain_s > own.jobs.lease_s


def test_its_placements_hold_their_models_whole(tmp_path: Path, environ: dict[str, str]) -> None:
    drawn: dict[str, ModelFolder] = {}
    for name in ("sd15", "sdxl"):
        drawn[name] = dataclasses.replace(published_model(tmp_path / name, name), name=name)
    placed = {each.name: each for each in plan_placements(load(FILE, environ).settings, drawn)}
    assert placed.keys() == TREE["placements"].keys()
    assert {each.rung for each in placed.values()} == {Rung.RESIDENT}
    assert placed["xl"].max_pixels >= 1024**2
    assert placed["sd-small"].max_pixels >= 768**2


def test_the_doctor_finds_nothing_that_is_not_for_lack_of_cards(
    tmp_path: Path, environ: dict[str, str], s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    own = TREE["results"]["s3"] | {"endpoint_url": s3_endpoint, "bucket": "of-the-production-yaml"}
    boto3.client("s3", endpoint_url=s3_endpoint, region_name=own["region"]).create_bucket(
        Bucket=own["bucket"], CreateBucketConfiguration={"LocationConstraint": own["region"]}
    )
    tree = tree_here(tmp_path / "data") | {"results": TREE["results"] | {"s3": own}}
    settings: Settings = load_args(tree, environ).settings
    found = examine(settings, "http://127.0.0.1:1", here=False)
    assert [each for each in found if each.level != "ok" and each.code not in THIS_MACHINE] == []
    assert {"jobs.redis_url", "cache.redis_url", "results.s3", "model.source"} <= {each.setting for each in found}
