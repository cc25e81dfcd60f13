"""`GET /v1/fleet`: what was planned, and what the replicas say of themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serve.jobs.terms import CardUse, WorkerReport
from serve.rungs import Rung

pytestmark = pytest.mark.anyio

CLASSES = {"4gb": {"memory_gb": 4, "dtypes": ["float16"]}}


def a_report(placement: str, **told: Any) -> WorkerReport:
    values = {"model": "shapes", "max_pixels": 1 << 20, "max_rows": 16, "batch": 8, "vae_factor": 4}
    return WorkerReport(name=f"{placement}-worker", placement=placement, **values | told)  # type: ignore[arg-type]


async def test_a_placement_without_a_class_has_no_plan_and_tells_of_its_replicas(stand: Any) -> None:
    card = CardUse(allowed=3_600_000_000, used=1_000, peak=2_000, planned=1_500)
    await stand.jobs.report(a_report("shapes", rung=Rung.INT8, card=card))
    (place,) = (await stand.client.get("/v1/fleet")).json()["data"]
    assert (place["name"], place["model"], place["gpu_class"], place["plan"]) == ("shapes", "shapes", None, None)
    assert place["replicas_wanted"] == 1
    told = {"allowed_bytes": 3_600_000_000, "planned_bytes": 1_500, "used_bytes": 1_000, "peak_bytes": 2_000}
    assert place["replicas"] == [{"rung": "int8", "images_at_once": 8, "card": told}]
    assert "worker" not in str(place), "a replica's name says where it runs"


async def test_every_placement_tells_its_plan_and_its_own_replicas(
    redis_url: str, tmp_path: Path, stand_on: Any
) -> None:
    tree = {
        "gpu_classes": CLASSES,
        "diffusion": {"num_gpus": 1},
        "placements": {"small": {"gpu_class": "4gb"}, "cpu": {"device": "cpu", "num_gpus": 0, "replicas": 2}},
    }
    async with stand_on(redis_url, tmp_path, **tree) as stand:
        await stand.jobs.report(a_report("cpu"))
        answer = await stand.client.get("/v1/fleet")
        small, cpu = answer.json()["data"]
    assert (small["gpu_class"], small["replicas"]) == ("4gb", [])
    assert small["plan"]["rung"] == "resident"
    assert small["plan"]["budget_bytes"] == 3_600_000_000
    assert 0 < small["plan"]["peak_bytes"] < small["plan"]["budget_bytes"]
    assert (small["plan"]["width"], small["plan"]["height"], small["plan"]["dtype"]) == (128, 128, "float16")
    side, other = small["max_size"]
    assert side * other <= small["max_pixels"]
    assert cpu["plan"] is None
    assert (cpu["replicas_wanted"], cpu["replicas"]) == (2, [{"rung": None, "images_at_once": 8, "card": None}])


LARGE = {"prompt": "a", "width": 512, "height": 384, "num_inference_steps": 1}


async def test_an_order_that_no_living_card_holds_is_refused(stand: Any, refused: Any) -> None:
    await stand.jobs.report(a_report("shapes", max_pixels=256 * 256))
    error = refused(await stand.client.post("/v1/jobs", json=LARGE), 422, "width")
    assert error["message"] == (
        "512 x 384 is 196608 pixels; the GPUs that draw shapes here hold 65536, such as 288 x 208"
    )
    refused(await stand.client.post("/v1/jobs?dry_run=true", json=LARGE), 422, "width")
    assert (await stand.client.post("/v1/jobs", json=LARGE | {"width": 256, "height": 256})).status_code == 202
    (place,) = (await stand.client.get("/v1/fleet")).json()["data"]
    assert (place["max_pixels"], place["max_size"]) == (256 * 256, [256, 256])


async def test_one_larger_card_is_enough(stand: Any) -> None:
    await stand.jobs.report(a_report("shapes", max_pixels=256 * 256))
    await stand.jobs.report(dataclasses.replace(a_report("shapes", max_pixels=1 << 20), name="another"))
    assert (await stand.client.post("/v1/jobs", json=LARGE)).status_code == 202


async def test_what_a_card_holds_is_not_guessed_before_a_replica_tells(stand: Any) -> None:
    await stand.jobs.report(a_report("of the settings before", max_pixels=256 * 256))
    assert (await stand.client.post("/v1/jobs", json=LARGE)).status_code == 202
