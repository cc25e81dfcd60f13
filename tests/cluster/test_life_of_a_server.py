"""A server with its images in S3, from its first forward to its restart."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from support.orders import finished, submit
from support.server import Server, launch, stop, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BUCKET = "pictures"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Settings of a real S3 server with an empty bucket."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
    yield {
        "TANDEM_RESULTS__STORE": "s3",
        "TANDEM_RESULTS__S3__ENDPOINT_URL": url,
        "TANDEM_RESULTS__S3__BUCKET": BUCKET,
        "TANDEM_RESULTS__S3__REGION": "us-east-1",
        "TANDEM_RESULTS__S3__ACCESS_KEY_ID": "test",
        "TANDEM_RESULTS__S3__SECRET_ACCESS_KEY": "secret",
    }
    moto.stop()


def rows_encoded(server: Server) -> float:
    """Rows that went through the encoder, as Prometheus would read it from Ray's agent."""
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10).text
    samples = [line for line in text.splitlines() if line.startswith("ray_tandem_encoder_forward_rows_total")]
    return sum(float(line.rpartition(" ")[2]) for line in samples)


def test_forwards_images_and_restart(s3: dict[str, str], tmp_path: Path) -> None:
    server = launch(tmp_path, **s3)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        # Two rows for the first words, none for the same words with other weights, two for the other words.
        first = finished(http, submit(http, "a purple cross on a white background", negative_prompt="blurry"))
        again = finished(http, submit(http, "a (purple:1.4) cross on a white background", negative_prompt="[blurry]"))
        other = finished(http, submit(http, "a black ring on a pink background", negative_prompt="dull"))
        assert [job["cache"]["encoded"] for job in (first, again, other)] == [2, 0, 2]
        wait_until(lambda: rows_encoded(server) >= 4, 60, "Ray to export the encoder's rows")
        assert rows_encoded(server) == 4

        answer = http.get(first["images"][0]["url"])
        assert answer.status_code == 307
        image = httpx.get(answer.headers["location"])
        assert image.headers["content-type"] == "image/png"
        assert len(image.content) == first["images"][0]["bytes"]

        waiting = [submit(http, f"a red circle number {number}", num_images=4) for number in range(12)]
    stop(server)

    server = launch(tmp_path, **s3)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        jobs = [finished(http, job_id) for job_id in waiting]
        assert [job["state"] for job in jobs] == ["succeeded"] * 12
        assert all(len(job["images"]) == 4 for job in jobs)
    stop(server)
