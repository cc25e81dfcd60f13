"""Embeddings and their cache over HTTP: a real encoder pool, the shipped model, Redis, the stock pipeline."""

import asyncio
import contextlib
import json
import os
import re
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from diffusers import StableDiffusionPipeline
from pydantic import SecretStr
from safetensors.torch import load
from support.listening import listening
from support.text_models import (
    CLIP_L,
    CLIP_L_PROJECTION,
    OPENCLIP,
    OPENCLIP_PROJECTION,
    T5,
    flux_folder,
    sd3_folder,
    sdxl_folder,
)

from serve.domain.text import TextRequest
from serve.embedded import EmbeddedRedis
from serve.encoders.cache import EmbeddingCache
from serve.encoders.census import CensusTaker
from serve.models import SHIPPED
from serve.settings.pools import ModelSettings
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

pytestmark = pytest.mark.anyio
PROMPT, NEGATIVE = "a green star on a yellow background", "a red circle"
BOTH = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
SECRET = "x-tenant"


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # diffusers 0.42 looks for the final norm where transformers 4 had it. Set past nn.Module, it is no submodule.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return pipeline


def cached(url: str, **settings: Any) -> CacheSettings:
    return CacheSettings(redis_url=SecretStr(url), **settings)


@pytest.fixture
async def texts(stand_on: Any, redis_url: str, tmp_path: Path) -> AsyncIterator[Any]:
    """A stand whose embeddings have a Redis, and tenants."""
    async with stand_on(redis_url, tmp_path, cache=cached(redis_url, salt_header=SECRET)) as stand:
        yield stand


async def embed(stand: Any, order: dict[str, Any], **headers: str) -> dict[str, torch.Tensor]:
    answer = await stand.client.post("/v1/embeddings", json=order, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="embeddings.safetensors"'
    return load(answer.content)


async def report(stand: Any, order: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = await stand.client.post("/v1/embeddings", json=order | {"output": "report"}, headers=headers)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
async def test_embeddings_are_the_stock_pipeline_s(texts: Any, stock: Any, clip_skip: int | None) -> None:
    strangers = [embed(texts, {"prompt": f"a stranger {n}"}) for n in range(5)]
    given, *_ = await asyncio.gather(embed(texts, BOTH | {"clip_skip": clip_skip}), *strangers)
    prompt, negative = stock.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE, clip_skip=clip_skip)
    assert set(given) == {"prompt_embeds", "negative_prompt_embeds"}
    for ours, theirs in ((given["prompt_embeds"], prompt), (given["negative_prompt_embeds"], negative)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


async def test_fed_to_the_stock_pipeline_they_give_the_prompt_s_picture(texts: Any, stock: Any) -> None:
    def draw(**text: Any) -> np.ndarray:
        seeded = torch.Generator().manual_seed(11)
        return np.asarray(
            stock(**text, num_inference_steps=8, guidance_scale=5.0, generator=seeded).images[0], dtype=int
        )

    by_text = await asyncio.to_thread(draw, **BOTH)
    by_embeddings = await asyncio.to_thread(draw, **await embed(texts, BOTH))
    assert np.abs(by_text - by_embeddings).max() <= 1
    other = await asyncio.to_thread(draw, **await embed(texts, BOTH | {"prompt": "a red heart on a black background"}))
    assert np.abs(by_text - other).max() > 50, "the comparison would see a difference"


async def test_without_a_negative_prompt_there_are_no_negative_tensors_and_an_empty_one_is_a_text(
    texts: Any, stock: Any
) -> None:
    assert set(await embed(texts, {"prompt": PROMPT})) == {"prompt_embeds"}
    given = await embed(texts, {"prompt": PROMPT, "negative_prompt": ""})
    _, empty = stock.encode_prompt(PROMPT, "cpu", 1, True)
    torch.testing.assert_close(given["negative_prompt_embeds"], empty, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_another_precision_is_the_same_rounded(texts: Any, dtype: str) -> None:
    exact, rounded = await embed(texts, BOTH), await embed(texts, BOTH | {"dtype": dtype})
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))


async def test_the_file_tells_where_it_comes_from(texts: Any) -> None:
    order = {"prompt": "a red circle, " * 40, "negative_prompt": "blurry", "long_prompt": "head"}
    answer = await texts.client.post("/v1/embeddings", json=order)
    assert answer.headers["x-tandem-cache"] == "memory=0, redis=0, encoded=2"
    (length,) = struct.unpack("<Q", answer.content[:8])
    metadata = json.loads(answer.content[8 : 8 + length])["__metadata__"]
    told = await report(texts, order)
    assert (metadata["model"], metadata["family"]) == (told["model"], told["family"]) == ("shapes", "sd")
    assert json.loads(metadata["truncated"]) == told["truncated"]
    assert json.loads(metadata["tokens"]) == told["tokens"]
    assert json.loads(metadata["notes"]) == told["notes"] == []
    assert json.loads(metadata["cache"]) == {"memory": 0, "redis": 0, "encoded": 2}
    (cut,) = told["truncated"]
    assert (cut["field"], cut["limit"]) == ("prompt", 75)
    counts = {count["field"]: (count["used"], count["cut"]) for count in told["tokens"]}
    assert counts["prompt"] == (75, cut["tokens"] - 75)
    assert counts["negative_prompt"][1] == 0
    assert told["encoders"] == [cut["encoder"]]
    assert told["tensors"]["prompt_embeds"] == told["tensors"]["negative_prompt_embeds"]
    assert told["cache"] == {"memory": 2, "redis": 0, "encoded": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSettings, ...]:
    """Text of the other families, which this version does not draw."""
    root = tmp_path_factory.mktemp("models")
    makers = {"sdxl": sdxl_folder, "sd3": sd3_folder, "flux": flux_folder}
    return tuple(ModelSettings(source=str(make(root / name))) for name, make in makers.items())


@pytest.fixture
async def families(
    stand_on: Any, redis_url: str, tmp_path: Path, folders: tuple[ModelSettings, ...]
) -> AsyncIterator[Any]:
    async with stand_on(redis_url, tmp_path, cache=cached(redis_url), text_models=folders) as stand:
        yield stand


XL, SD3, T5_WIDTH = (
    CLIP_L["hidden_size"] + OPENCLIP["hidden_size"],
    CLIP_L_PROJECTION + OPENCLIP_PROJECTION,
    T5["d_model"],
)


@pytest.mark.parametrize(
    ("order", "shapes"),
    [
        (
            {"model": "sdxl", "negative_prompt": "red"},
            {
                "prompt_embeds": [1, 77, XL],
                "negative_prompt_embeds": [1, 77, XL],
                "pooled_prompt_embeds": [1, OPENCLIP_PROJECTION],
                "negative_pooled_prompt_embeds": [1, OPENCLIP_PROJECTION],
                "add_time_ids": [1, 6],
            },
        ),
        ({"model": "sd3"}, {"prompt_embeds": [1, 77 + 256, T5_WIDTH], "pooled_prompt_embeds": [1, SD3]}),
        (
            {"model": "sd3", "max_sequence_length": 100, "use_t5": False},
            {"prompt_embeds": [1, 177, T5_WIDTH], "pooled_prompt_embeds": [1, SD3]},
        ),
        (
            {"model": "flux"},
            {
                "prompt_embeds": [1, 512, T5_WIDTH],
                "pooled_prompt_embeds": [1, CLIP_L["hidden_size"]],
                "text_ids": [512, 3],
            },
        ),
    ],
)
async def test_each_family_has_its_tensors(families: Any, order: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    order = order | {"prompt": PROMPT}
    assert (await report(families, order))["tensors"] == shapes
    given = await embed(families, order)
    assert {name: list(tensor.shape) for name, tensor in given.items()} == shapes
    assert all(torch.isfinite(tensor).all() for tensor in given.values())
    if not order.get("use_t5", True):
        assert not given["prompt_embeds"][0, 77:].any()


async def test_sdxl_s_time_ids_are_the_size_asked_for(families: Any) -> None:
    by_default = await embed(families, {"model": "sdxl", "prompt": PROMPT})
    assert by_default["add_time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]]
    wide = await embed(families, {"model": "sdxl", "prompt": PROMPT, "width": 1344, "height": 768, "dtype": "bfloat16"})
    assert wide["add_time_ids"].tolist() == [[768, 1344, 0, 0, 768, 1344]]


async def test_an_empty_negative_prompt_of_sdxl_is_zeros_and_no_unit(families: Any) -> None:
    told = await report(families, {"model": "sdxl", "prompt": PROMPT, "negative_prompt": ""})
    assert sum(told["cache"].values()) == 3
    given = await embed(families, {"model": "sdxl", "prompt": PROMPT, "negative_prompt": ""})
    assert not given["negative_prompt_embeds"].any()
    assert not given["negative_pooled_prompt_embeds"].any()


async def test_models_share_the_units_of_the_encoders_that_they_share(families: Any) -> None:
    await report(families, {"model": "sdxl", "prompt": PROMPT})
    told = await report(families, {"model": "sd3", "prompt": PROMPT})
    assert told["cache"]["encoded"] == 1, "only the T5 is new"
    (t5,) = {count["encoder"] for count in told["tokens"] if count["role"] == "text_encoder_3"}
    assert families.metrics.value("tandem_text_units_total", tier="encoded", encoder=t5) == 1
    assert len(told["encoders"]) == 3


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"model": "sd3", "max_sequence_length": 513}, "max_sequence_length"),
        ({"model": "sdxl", "max_sequence_length": 77}, "max_sequence_length"),
        ({"model": "flux", "use_t5": False}, "use_t5"),
        ({"model": "flux", "clip_skip": 1}, "clip_skip"),
        ({"model": "sdxl", "clip_skip": 2}, "clip_skip"),
    ],
)
async def test_what_a_family_can_t_do_is_refused(
    families: Any, refused: Any, order: dict[str, Any], param: str
) -> None:
    error = refused(await families.client.post("/v1/embeddings", json=order | {"prompt": "a"}), 422, param)
    assert param in error["message"]


async def test_a_weight_is_arithmetic_and_encodes_nothing(texts: Any) -> None:
    plain = await embed(texts, {"prompt": "a red circle"})
    told = await report(texts, {"prompt": "a (red:1.3) circle"})
    assert told["cache"] == {"memory": 1, "redis": 0, "encoded": 0}
    weighted = await embed(texts, {"prompt": "a (red:1.3) circle"})
    assert not torch.equal(plain["prompt_embeds"], weighted["prompt_embeds"])


async def test_who_asks_for_the_same_at_once_shares_one_row(texts: Any) -> None:
    given = await asyncio.gather(*(embed(texts, {"prompt": PROMPT}) for _ in range(20)))
    assert all(torch.equal(each["prompt_embeds"], given[0]["prompt_embeds"]) for each in given)
    assert texts.metrics.value("tandem_encoder_forward_rows_total") == 1
    assert texts.metrics.value("tandem_prompts_total") == 20
    assert texts.metrics.value("tandem_text_units_total", sign="positive") == 20


async def test_units_are_counted_by_tier_and_sign(texts: Any) -> None:
    for _ in range(2):
        await report(texts, BOTH)
        await report(texts, {"prompt": PROMPT, "negative_prompt": ""})
    counted = {
        (tier, sign): texts.metrics.value("tandem_text_units_total", tier=tier, sign=sign)
        for tier in ("memory", "encoded")
        for sign in ("positive", "negative", "empty")
    }
    assert counted == {
        ("encoded", "positive"): 1,
        ("encoded", "negative"): 1,
        ("encoded", "empty"): 1,
        ("memory", "positive"): 3,
        ("memory", "negative"): 1,
        ("memory", "empty"): 1,
    }
    assert texts.metrics.value("tandem_prompts_total") == 8
    assert texts.metrics.value("tandem_prompt_tokens_total", kind="used") > 0


async def test_tenants_share_nothing_and_only_the_header_of_the_settings_names_them(
    texts: Any, stand_on: Any, redis_url: str, tmp_path: Path
) -> None:
    async def tiers(stand: Any, **headers: str) -> dict[str, int]:
        cache: dict[str, int] = (await report(stand, {"prompt": PROMPT}, **headers))["cache"]
        return {tier: units for tier, units in cache.items() if units}

    assert await tiers(texts, **{SECRET: "a"}) == {"encoded": 1}
    assert await tiers(texts, **{SECRET: "b"}) == {"encoded": 1}
    assert await tiers(texts) == {"encoded": 1}
    assert await tiers(texts, **{SECRET: "a"}) == {"memory": 1}
    for both in ([(SECRET, "a"), (SECRET, "b")], [(SECRET, "b"), (SECRET, "a")]):
        answer = await texts.client.post("/v1/embeddings", json={"prompt": PROMPT}, headers=both)
        assert answer.headers["x-tandem-cache"].endswith("encoded=1"), "a client can't add itself to a tenant"
    async with stand_on(redis_url, tmp_path, cache=cached(redis_url)) as other:
        assert await tiers(other, **{SECRET: "a"}) == {"redis": 1}, "where no header is set, everybody is one tenant"
        assert await tiers(other, **{SECRET: "b"}) == {"memory": 1}


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "model"),
    ({"prompt": ""}, 422, "prompt"),
    ({"prompt": " \n"}, 422, "prompt"),
    ({"prompt": "x" * 8193}, 422, "prompt"),
    ({"prompt": "a <lora:b:1>"}, 422, "prompt"),
    ({"prompt": None}, 422, "prompt"),
    ({"negative_prompt": "☃" * 3000}, 422, "negative_prompt"),
    ({"negative_prompt": "a AND b"}, 422, "negative_prompt"),
    ({"clip_skip": -1}, 422, "clip_skip"),
    ({"clip_skip": 1000}, 422, "clip_skip"),
    ({"clip_skip": 10**30}, 422, "clip_skip"),
    ({"clip_skip": 1.0}, 422, "clip_skip"),
    ({"use_t5": False}, 422, "use_t5"),
    ({"max_sequence_length": 256}, 422, "max_sequence_length"),
    ({"width": 0}, 422, "width"),
    ({"width": 4096}, 422, "width"),
    ({"height": -8}, 422, "height"),
    ({"height": 10**30}, 422, "height"),
    ({"dtype": "float64"}, 422, "dtype"),
    ({"dtype": "torch.float16"}, 422, "dtype"),
    ({"output": "png"}, 422, "output"),
    ({"seed": -7}, 422, "seed"),
    ({"step": -1}, 422, "step"),
    ({"step": 20, "num_inference_steps": 20}, 422, "step"),
    ({"num_inference_steps": 0}, 422, "num_inference_steps"),
    ({"salt": "x"}, 422, "salt"),
]


@pytest.mark.parametrize(("order", "status", "param"), BAD)
async def test_a_bad_order_names_its_field_and_encodes_nothing(
    texts: Any, refused: Any, order: dict[str, Any], status: int, param: str
) -> None:
    error = refused(await texts.client.post("/v1/embeddings", json={"prompt": "a"} | order), status, param)
    assert param in error["message"]
    assert texts.metrics.value("tandem_encoder_forwards_total") == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, "body"),
        (b"[]", 422, "body"),
        (b"{}", 422, "prompt"),
        (b'{"prompt": "a", "width": NaN}', 422, "width"),
        (b'{"prompt": "a", "clip_skip": Infinity}', 422, "clip_skip"),
        (b'{"prompt": "a\\ud800"}', 422, "prompt"),
        (b'{"prompt": "' + b"x" * 1_000_000 + b'"}', 422, "prompt"),
        pytest.param(b'{"prompt": "' + b"x" * (32 << 20) + b'"}', 413, "body", id="over 32 MiB"),
    ],
)
async def test_a_bad_body_is_refused(texts: Any, refused: Any, body: bytes, status: int, param: str) -> None:
    headers = {"content-type": "application/json"}
    refused(await texts.client.post("/v1/embeddings", content=body, headers=headers), status, param)


async def test_a_body_of_another_type_is_refused(texts: Any, refused: Any) -> None:
    answer = await texts.client.post(
        "/v1/embeddings", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}
    )
    refused(answer, 415, "body")


async def test_a_pool_that_is_away_is_a_503(stand_on: Any, redis_url: str, tmp_path: Path, refused: Any) -> None:
    async with stand_on(redis_url, tmp_path, encoder_away=True) as stand:
        answer = await stand.client.post("/v1/embeddings", json={"prompt": "a"})
        assert refused(answer, 503, None)["code"] == "backend_unavailable"
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_cache_redis_that_dies_costs_no_answer(
    stand_on: Any, redis_url: str, tmp_path: Path, refused: Any
) -> None:
    (tmp_path / "cache").mkdir()
    with EmbeddedRedis(tmp_path / "cache", "cache") as server:
        async with stand_on(redis_url, tmp_path, cache=cached(server.url)) as stand:
            before = await embed(stand, BOTH)
            server.stop()
            after = await embed(stand, BOTH)
            assert torch.equal(before["prompt_embeds"], after["prompt_embeds"])
            assert (await report(stand, {"prompt": "another"}))["cache"]["encoded"] == 1
            state = (await stand.client.get("/v1/cache")).json()
            assert state["redis"] is None
            assert "does not answer" in state["redis_detail"]
            assert "redis://" not in state["redis_detail"]
            (own,) = state["processes"]
            assert (own["name"], own["place"], own["redis"], own["entries"]) == ("this process", "ingress", "away", 3)
            answer = await stand.client.delete("/v1/cache")
            assert refused(answer, 503, answer.json()["error"]["param"])["code"] == "backend_unavailable"


async def test_without_a_redis_there_is_one_process_and_nothing_to_clear(stand: Any, refused: Any) -> None:
    await report(stand, BOTH)
    state = (await stand.client.get("/v1/cache")).json()
    assert (state["redis"], state["redis_detail"]) == (None, "cache.redis_url is not set")
    assert state["processes"][0]["hits"] == {"memory": 0, "redis": 0, "encoded": 2}
    assert state["places"]["ingress"]["hit_rate"] == 0
    refused(await stand.client.delete("/v1/cache"), 503, "cache.redis_url")


@contextlib.asynccontextmanager
async def counted(stand: Any, url: str) -> AsyncIterator[EmbeddingCache]:
    """The stand's cache reports to the census, and so does that of a second process, which this yields."""
    other = EmbeddingCache(cached(url), stand.encode, InProcessMetrics(), place="diffusion")
    takers = [
        CensusTaker(stand.embeddings, url, "a", tick_s=0.02),
        CensusTaker(other, url, "b", tick_s=0.02),
    ]
    for taker in takers:
        taker.start()
    try:
        yield other
    finally:
        for taker in takers:
            await taker.close()
        await other.close()


async def overview(stand: Any, until: Any) -> dict[str, Any]:
    """The first answer of `GET /v1/cache` for which `until` holds: processes report at their own pace."""
    async with asyncio.timeout(10):
        while True:
            answer = await stand.client.get("/v1/cache")
            assert answer.status_code == 200, answer.text
            state: dict[str, Any] = answer.json()
            if until(state):
                return state


async def test_the_cache_is_counted_in_redis_and_in_every_process_and_cleared_in_both(
    texts: Any, redis_url: str
) -> None:
    async with counted(texts, redis_url) as other:
        for _ in range(3):
            await report(texts, BOTH)
        await other.get_many(texts.planner.plan(TextRequest(model="shapes", **BOTH, width=64, height=64)).units)
        asked = {
            "ingress": {"memory": 4, "redis": 0, "encoded": 2},
            "diffusion": {"memory": 0, "redis": 2, "encoded": 0},
        }
        state = await overview(
            texts, lambda state: asked.items() <= {name: each["hits"] for name, each in state["places"].items()}.items()
        )
        ingress, diffusion = state["places"]["ingress"], state["places"]["diffusion"]
        assert (ingress["hit_rate"], diffusion["hit_rate"]) == (pytest.approx(4 / 6), 1)
        assert (ingress["entries"], diffusion["entries"], ingress["processes"]) == (2, 2, 1)
        assert 0 < ingress["bytes"] <= ingress["capacity"] == 256 * 1024**2
        assert {(each["place"], each["name"]) for each in state["processes"]} >= {("ingress", "a"), ("diffusion", "b")}
        assert state["redis_detail"] == "up"
        assert state["redis"]["keys"] >= 2
        assert state["redis"]["bytes"] > 0

        answer = await texts.client.delete("/v1/cache")
        assert (answer.status_code, answer.json()) == (200, {"removed": 2})
        assert texts.embeddings.stats().entries == 0
        with redis.Redis.from_url(redis_url) as client:
            assert client.keys("tandem:embedding:*") == []
        await overview(texts, lambda state: all(process["entries"] == 0 for process in state["processes"]))
        assert other.stats().entries == 0
        assert (await texts.client.delete("/v1/cache")).json() == {"removed": 0}


async def tandem(*arguments: str, code: int = 0, stdin: bytes = b"") -> tuple[str, str]:
    """Standard output and error of the command, as a person with 80 columns sees them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serve.cli", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "80"},
    )
    out, err = await process.communicate(stdin)
    assert process.returncode == code, err.decode()
    assert b"Traceback" not in err
    return out.decode(), err.decode()


def number(row: str, told: str) -> str:
    found = re.search(rf"^ *{row} +([\d,.]+)", told, re.MULTILINE)
    assert found, told
    return found[1]


async def test_warming_stats_and_clearing_from_the_command_line(texts: Any, redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# shapes\na red circle\n\na blue star\na (red:1.3) circle\n")
    lines = tmp_path / "orders.jsonl"
    orders = [
        {"prompt": "a red circle", "negative_prompt": "blurry"},
        {"prompt": "x", "clip_skip": 99},
        {"prompt": "y", "model": "z"},
        {"prompt": "a red circle, " * 40, "long_prompt": "head"},
    ]
    lines.write_text("\n".join(map(json.dumps, orders)))
    async with counted(texts, redis_url), listening(texts.app) as port:
        url = f"http://127.0.0.1:{port}"
        told, _ = await tandem("cache", "warm", str(file), "--url", url, "--model", "shapes", "--concurrency", "1")
        assert (number("prompts", told), number("units encoded", told)) == ("3", "2")
        assert (number("units from cache", told), number("failed", told)) == ("1", "0")
        assert "prompts cut" not in told

        told, _ = await tandem("cache", "warm", "-", "--url", url, code=1, stdin=lines.read_bytes())
        assert (number("prompts", told), number("units encoded", told), number("failed", told)) == ("2", "2", "2")
        assert number("prompts cut", told) == "1"
        assert re.search(r"^line 2: .*clip_skip.*\nline 3: model 'z' is not served here", told, re.MULTILINE)

        await overview(texts, lambda state: state["places"]["ingress"]["entries"] == 4)
        told, _ = await tandem("cache", "stats", "--url", url)
        assert all(len(line.rstrip()) <= 80 for line in told.splitlines())
        assert "…" not in told
        assert re.search(r"^Redis: \d+ keys, \d.* [kM]B, 0 evicted$", told, re.MULTILINE)
        assert number("ingress", told) == "4"
        assert "diffusion" in told
        assert "hit rate" in told
        raw = json.loads((await tandem("cache", "stats", "--url", url, "--json"))[0])
        assert raw["places"]["ingress"]["entries"] == 4

        told, _ = await tandem("cache", "clear", "--yes", "--url", url)
        assert told.startswith("4 embeddings removed")
        _, said = await tandem("cache", "clear", "--url", url, code=2)
        assert said == "tandem: cache clear: nobody can be asked here; say --yes\n"
