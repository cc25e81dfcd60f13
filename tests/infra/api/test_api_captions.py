"""`POST /v1/captions` on the real services, with a small model: what is taken, what is refused, whose pictures."""

import base64
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.captioners import blip_folder, describer_of, one_thread, picture

from serve.captions.messages import Ask
from serve.captions.service import MAX_SIDE
from serve.images import MAX_RATIO
from serve.settings.front import KeySettings
from serve.settings.orders import LimitSettings
from serve.settings.pools import CaptionSettings

pytestmark = pytest.mark.anyio
RED = picture("red")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaptionSettings]:
    folder = blip_folder(tmp_path_factory.mktemp("models") / "a-blip")
    with one_thread():
        yield CaptionSettings(source=str(folder), max_new_tokens=6)


@pytest.fixture
async def captioning(stand_on: Any, redis_url: str, tmp_path: Path, room: CaptionSettings) -> AsyncIterator[Any]:
    async with stand_on(redis_url, tmp_path, captions=room, keys=KeySettings(required=True)) as stand:
        yield stand


async def test_a_picture_is_described(captioning: Any, room: CaptionSettings) -> None:
    """The same words for a file, a data URL and a job's picture of the same pixels; others for another prompt."""
    (expected,) = describer_of(room).describe([Ask(RED, "", 6)])
    mine, other = await captioning.key(), await captioning.key()
    job = await captioning.client.post("/v1/jobs", json={"prompt": "a red circle"}, headers=mine)
    await captioning.finish(job.json()["id"], data=RED)
    for image in (text(RED), f"data:image/png;base64,{text(RED)}", f"{job.json()['id']}/0"):
        answer = await captioning.client.post("/v1/captions", json={"image": image}, headers=mine)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"model": "a-blip", "caption": expected.text, "tokens": expected.tokens}
    order = {"image": text(RED), "prompt": "a picture of", "max_new_tokens": 2, "model": "a-blip"}
    answer = await captioning.client.post("/v1/captions", json=order, headers=mine)
    assert answer.json()["caption"].startswith("a picture of")
    assert answer.json()["tokens"] <= 5
    foreign = await captioning.client.post("/v1/captions", json={"image": f"{job.json()['id']}/0"}, headers=other)
    assert foreign.status_code == 404, "another owner's picture is one that there is not"
    assert foreign.json()["error"]["param"] == "image"


async def test_a_large_picture_is_seen_smaller(captioning: Any) -> None:
    key = await captioning.key()
    answer = await captioning.client.post(
        "/v1/captions", json={"image": text(picture("red", MAX_SIDE + 500, 300))}, headers=key
    )
    assert answer.status_code == 200, answer.text


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({}, 422, "image"),
    ({"image": ""}, 422, "image"),
    ({"image": "https://example.com/a.png"}, 422, "image"),
    ({"image": text(b"GIF89a")}, 422, "image"),
    ({"image": text(RED[:-30])}, 422, "image"),
    ({"image": text(picture("red", 8 * MAX_RATIO + 1, 8))}, 422, "image"),
    ({"image": f"{'0' * 32}/0"}, 404, "image"),
    ({"image": text(RED), "prompt": "[SEP]"}, 422, "prompt"),
    ({"image": text(RED), "prompt": "a" * 101}, 422, "prompt"),
    ({"image": text(RED), "prompt": "\u0000"}, 422, "prompt"),
    ({"image": text(RED), "max_new_tokens": 0}, 422, "max_new_tokens"),
    ({"image": text(RED), "max_new_tokens": 7}, 422, "max_new_tokens"),
    ({"image": text(RED), "model": "shapes"}, 404, "model"),
    ({"image": text(RED), "seed": 1}, 422, "seed"),
]


async def test_what_can_t_be_described_is_refused_by_name(
    stand_on: Any, redis_url: str, tmp_path: Path, room: CaptionSettings, refused: Any
) -> None:
    async with stand_on(redis_url, tmp_path, captions=room, limits=LimitSettings(max_prompt_bytes=100)) as stand:
        for order, status, param in BAD:
            refused(await stand.client.post("/v1/captions", json=order), status, param)
        assert stand.metrics.value("tandem_captions_total") == 0


async def test_a_server_without_a_model_says_which_setting_it_lacks(stand: Any, refused: Any) -> None:
    error = refused(await stand.client.post("/v1/captions", json={"image": text(RED)}), 404, None)
    assert error["code"] == "not_offered"
    assert "captions.source" in error["message"]
