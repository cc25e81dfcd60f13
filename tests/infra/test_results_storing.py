"""What is stored of a job, in which order, and what a run finds of the one before it."""

import asyncio
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.diffusion.engine import Rendered
from serve.diffusion.run import Spent
from serve.domain.orders import ImageRequest
from serve.errors import BackendUnavailable, GenerationFailed
from serve.jobs.records import Claim
from serve.patience import GivenBack, Patience, Withdrawn
from serve.results.encode import read_parameters
from serve.results.keys import manifest_key
from serve.results.local import LocalStore
from serve.results.manifest import read
from serve.results.png import parameters
from serve.results.store import Stored
from serve.storing import Encoded, Outcome, encode_images, put_images, stored_before
from serve.telemetry.metrics import InProcessMetrics

pytestmark = pytest.mark.anyio

JOB = "0" * 32
SIDE = 64
REQUEST = ImageRequest(
    model="shapes",
    prompt="a red circle \ud800",
    width=SIDE,
    height=SIDE,
    num_inference_steps=5,
    guidance_scale=3.0,
    seed=7,
    num_images=3,
)

SPENT = Spent(
    began_at=0.0,
    ended_at=0.0,
    source_s=0.0,
    batch_s=0.0,
    steps_s=0.0,
    decode_wait_s=0.0,
    decode_s=0.0,
    batch_images=1.0,
    vae_s=0.0,
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def claim(fence: int = 1, **changes: Any) -> Claim:
    return Claim(job_id=JOB, attempt=fence, fence=fence, request=dataclasses.replace(REQUEST, **changes))


def drawn(seed: int = 0, approximate: tuple[str, ...] = ()) -> Rendered:
    noise = np.random.default_rng(seed).integers(0, 256, (REQUEST.num_images, SIDE, SIDE, 3), np.uint8)
    return Rendered(tuple(Image.fromarray(each) for each in noise), SPENT, approximate)


def patience() -> Patience:
    return Patience(asyncio.Event(), asyncio.Event())


class Store(LocalStore):
    """The real store, which is away after so many puts, and remembers what was asked of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.puts_left = 1000
        self.put_keys: list[str] = []
        self.gets = 0
        self.refused = asyncio.Event()

    async def put(self, key: str, data: bytes, content_type: str) -> Stored:
        if self.puts_left == 0:
            self.refused.set()
            raise BackendUnavailable("away")
        self.puts_left -= 1
        self.put_keys.append(key.partition("/")[2])
        return await super().put(key, data, content_type)

    async def get(self, key: str) -> bytes:
        self.gets += 1
        return await super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


async def stored(
    store: Store, fence: int = 1, seed: int = 0, approximate: tuple[str, ...] = (), **changes: Any
) -> Outcome:
    held = claim(fence, **changes)
    encoded = await encode_images(held, drawn(seed, approximate), patience())
    return await put_images(store, held, encoded, patience(), InProcessMetrics())


async def agrees(store: Store, outcome: Outcome) -> None:
    """What is told is what the store has."""
    manifest = json.loads(await store.get(manifest_key(JOB)))
    for ref, entry in zip(outcome.images, manifest["images"], strict=True):
        data = await store.get(ref.key)
        assert ref.bytes == len(data) == entry["bytes"]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry | {"sha256": ""} == dataclasses.asdict(ref) | {"sha256": ""}
        assert read_parameters(data)["seed"] == ref.seed == REQUEST.seed + ref.index


async def test_the_manifest_is_put_last_and_a_later_run_finds_it(store: Store) -> None:
    outcome = await stored(store, approximate=("step_cache",))
    assert store.put_keys == ["0.png", "1.png", "2.png", "manifest.json"]
    await agrees(store, outcome)
    assert outcome.approximate == ("step_cache",)
    assert await stored_before(store, claim(2), patience()) == outcome
    manifest = json.loads(await store.get(manifest_key(JOB)))
    assert (manifest["version"], manifest["attempt"], manifest["fence"]) == (1, 1, 1)
    assert "circle" not in json.dumps(manifest)


async def test_a_first_claim_asks_nothing(store: Store) -> None:
    assert await stored_before(store, claim(1), patience()) is None
    assert store.gets == 0
    assert await stored_before(store, claim(2), patience()) is None
    assert store.gets == 1


@pytest.mark.parametrize("puts", [0, 1, 2, 3])
async def test_a_run_that_dies_at_any_put_is_completed_by_the_next(store: Store, puts: int) -> None:
    """The second run's images differ, as another kind of GPU's would."""
    store.puts_left = puts
    held, draining = claim(1), asyncio.Event()
    draining.set()
    encoded = await encode_images(held, drawn(0, ("tiled_vae",)), patience())
    with pytest.raises(GivenBack):
        await put_images(store, held, encoded, Patience(asyncio.Event(), draining), InProcessMetrics())
    store.puts_left = 1000
    assert await stored_before(store, claim(2), patience()) is None
    first = [await store.get(f"{JOB}/{index}.png") for index in range(puts)]
    outcome = await stored(store, fence=2, seed=1)
    assert [await store.get(f"{JOB}/{index}.png") for index in range(puts)] == first
    await agrees(store, outcome)
    assert outcome.approximate == (("tiled_vae",) if puts else ())
    assert await stored_before(store, claim(3), patience()) == outcome


async def test_of_two_runs_at_once_both_tell_the_same(store: Store) -> None:
    outcomes = await asyncio.gather(*(stored(store, fence=1 + n, seed=n) for n in range(4)))
    assert len(set(outcomes)) == 1
    await agrees(store, outcomes[0])


async def test_what_made_the_images_approximate_is_the_first_runs_to_say(store: Store) -> None:
    """Beside a prompt that long a JPEG has no room for it, so that the manifest alone knows."""
    long = {"prompt": "a" * 70_000, "output_format": "jpeg"}
    first = await stored(store, approximate=("tiled_vae",), **long)
    assert await stored(store, fence=2, seed=1, approximate=("step_cache",), **long) == first
    assert first.approximate == ("tiled_vae",)


async def test_an_image_that_went_is_drawn_again(store: Store) -> None:
    before = await stored(store)
    await store.delete(before.images[1].key)
    assert await stored_before(store, claim(2), patience()) is None
    after = await stored(store, fence=2, seed=1)
    assert after.images[0] == before.images[0]
    assert after.images[1].bytes == await store.size(after.images[1].key)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-10],
        lambda text: "\udcff",
        lambda text: "[]",
        lambda text: text.replace('"index":1', '"index":2'),
        lambda text: text.replace(f"{JOB}/1.png", f"{'1' * 32}/1.png"),
        lambda text: text.replace(f"{JOB}/1.png", "../1.png"),
        lambda text: text.replace('"version":1', '"version":2'),
    ],
)
async def test_a_damaged_manifest_says_nothing(store: Store, tmp_path: Path, damage: Any) -> None:
    before = await stored(store)
    path = tmp_path / manifest_key(JOB)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    assert read(path.read_bytes(), JOB, REQUEST.num_images) is None
    assert await stored_before(store, claim(2), patience()) is None
    assert await stored(store, fence=2, seed=1) == before


@pytest.mark.parametrize("change", [{"prompt": "a blue square"}, {"seed": 8}, {"num_inference_steps": 6}])
async def test_another_orders_images_are_never_this_jobs(store: Store, change: dict[str, Any]) -> None:
    await stored(store)
    with pytest.raises(GenerationFailed, match="another order"):
        await stored_before(store, claim(2, **change), patience())
    held = claim(1, **change)
    encoded = await encode_images(held, drawn(), patience())
    with pytest.raises(GenerationFailed, match="another order"):
        await put_images(store, held, encoded, patience(), InProcessMetrics())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "change",
    [{"prompt": "a blue square"}, {"height": 72}, {"clip_skip": 2}, {"guidance_scale": 4.0}, {"num_images": 2}],
)
async def test_an_image_of_another_order_is_not_adopted(store: Store, kind: str, change: dict[str, Any]) -> None:
    """Its manifest was never put, or is gone: the file alone says whose it is."""
    before = await stored(store, output_format=kind)
    await store.delete(manifest_key(JOB))
    first = await store.get(before.images[0].key)
    if "num_images" in change:
        assert await stored(store, seed=1, output_format=kind, **change), "the order of the picture is the same"
    else:
        with pytest.raises(GenerationFailed, match="another order"):
            await stored(store, seed=1, output_format=kind, **change)
    assert await store.get(before.images[0].key) == first


async def test_a_file_that_does_not_say_whose_it_is_is_not_adopted(store: Store) -> None:
    await LocalStore.put(store, f"{JOB}/0.png", b"no picture", "image/png")
    with pytest.raises(GenerationFailed, match="another order"):
        await stored(store)


async def test_an_image_of_another_version_s_is_the_same_order_s(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a rollout: its orders had a field more or less, which stands at its default."""

    def known(request: ImageRequest, index: int, approximate: Any = ()) -> dict[str, Any]:
        told = parameters(request, index, approximate)
        del told["use_t5"]
        return told | {"one_more": 7}

    monkeypatch.setattr("serve.storing.parameters", known)
    before = await stored(store)
    await store.delete(manifest_key(JOB))
    monkeypatch.undo()
    assert await stored(store, fence=2, seed=1) == before


async def test_puts_wait_for_the_store_and_are_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.patience.FIRST_RETRY_S", 0.001)
    metrics, store.puts_left = InProcessMetrics(), 2
    held = claim()
    encoded = await encode_images(held, drawn(), patience())
    storing = asyncio.create_task(put_images(store, held, encoded, patience(), metrics))
    await store.refused.wait()
    assert metrics.value("tandem_result_put_seconds", store="local") == 2
    store.puts_left = 1000
    await agrees(store, await storing)
    assert metrics.value("tandem_result_put_retries_total") >= 1
    assert metrics.value("tandem_result_put_seconds", store="local") == 4


async def test_what_nobody_wants_is_neither_encoded_nor_put(store: Store) -> None:
    gone = asyncio.Event()
    encoded = await encode_images(claim(), drawn(), patience())
    assert encoded.nbytes == sum(len(file.data) for file in encoded.files) > 3 * SIDE * SIDE
    gone.set()
    with pytest.raises(Withdrawn):
        await encode_images(claim(), drawn(), Patience(gone, asyncio.Event()))
    with pytest.raises(Withdrawn):
        await put_images(store, claim(), encoded, Patience(gone, asyncio.Event()), InProcessMetrics())
    assert store.put_keys == []


async def test_images_that_are_deleted_all_the_time_fail_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def put(key: str, data: bytes, content_type: str) -> Stored:
        return Stored(len(data), False)

    monkeypatch.setattr(store, "put", put)
    held = claim()
    encoded: Encoded = await encode_images(held, drawn(), patience())
    with pytest.raises(GenerationFailed, match="deleted"):
        await put_images(store, held, encoded, patience(), InProcessMetrics())
