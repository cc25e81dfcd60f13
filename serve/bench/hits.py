"""How long a cache hit takes, by tier and by what is asked for. Values have the real sizes; nothing is encoded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import SecretStr

from serve.bench.stats import Percentiles
from serve.domain.text import EncodeUnit, Tier
from serve.encoders.cache import EmbeddingCache, Fetched
from serve.encoders.codec import pack
from serve.settings.room import MIB
from serve.settings.stores import CacheSettings
from serve.telemetry.metrics import InProcessMetrics

Kind = Literal["memory", "redis"]

_CLIP_L, _BIGG = "clip-l", "openclip-bigg"
Asked = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Of each unit: the encoder, the output, the embedding's shape."""

_SDXL: Asked = (
    (_CLIP_L, "skip:1", (77, 768)),
    (_BIGG, "skip:1", (77, 1280)),
    (_BIGG, "projected", (1280,)),
)
_SD15: Asked = ((_CLIP_L, "hidden", (77, 768)),)
SDXL_PAIR = "SDXL, prompt and negative, 6 units"
REQUESTS: Mapping[str, tuple[Asked, int]] = {
    "SD 1.5, 1 unit": (_SD15, 1),
    "SD 1.5, prompt and negative, 2 units": (_SD15, 2),
    "SDXL, 3 units": (_SDXL, 1),
    SDXL_PAIR: (_SDXL, 2),
    "T5-XXL, 256 tokens, 1 unit": ((("t5-xxl", "hidden", (256, 4096)),), 1),
    "T5-XXL, 512 tokens, 1 unit": ((("t5-xxl", "hidden", (512, 4096)),), 1),
}
"""What is asked for at once: the units of one text, and how many texts."""
IN_MEMORY = ("SD 1.5, 1 unit", SDXL_PAIR)
_TEXTS = 16
"""Different requests in turn, so that no processor cache holds the answer already."""
_DTYPE = torch.float16


@dataclass(frozen=True, slots=True, kw_only=True)
class HitLatency:
    """One call of `EmbeddingCache.get_many`; `bytes` of embeddings came back."""

    tier: Kind
    request: str
    bytes: int
    seconds: Percentiles


async def measure_hits(redis_url: str, samples: int) -> list[HitLatency]:
    """Embeddings in float16. Every hit is checked to come from its tier."""
    memory = [await _measure("memory", name, None, samples) for name in IN_MEMORY]
    return memory + [await _measure("redis", name, redis_url, samples) for name in REQUESTS]


async def _measure(tier: Kind, name: str, redis_url: str | None, samples: int) -> HitLatency:
    requests = [_units(name, text) for text in range(_TEXTS)]
    values = {unit.key: _value(unit, shape) for request in requests for unit, shape in request.items()}

    async def fetch(units: Sequence[EncodeUnit]) -> list[Fetched]:
        return [Fetched(values[unit.key], Tier.ENCODED) for unit in units]

    cache = EmbeddingCache(
        CacheSettings(
            redis_url=None if redis_url is None else SecretStr(redis_url),
            memory_bytes=0 if tier == "redis" else 256 * MIB,
            timeout_s=5.0,  # the bench measures how long it takes, not whether it is given up
        ),
        fetch,
        InProcessMetrics(),
        place="bench",
        write_through=True,
    )
    taken: list[float] = []
    try:
        for number in range(samples + 3 * _TEXTS):
            units = list(requests[number % _TEXTS])
            began = time.perf_counter()
            found = await cache.get_many(units)
            took = time.perf_counter() - began
            if number < 3 * _TEXTS:
                continue
            if any(got.tier != tier for got in found.values()):
                raise RuntimeError(f"{name}: an embedding that is in {tier} came from elsewhere")
            taken.append(took)
    finally:
        await cache.close()
    size = sum(len(values[unit.key]) for unit in requests[0])
    return HitLatency(tier=tier, request=name, bytes=size, seconds=Percentiles.of(taken))


def _units(name: str, text: int) -> dict[EncodeUnit, tuple[int, ...]]:
    """The units of request number `text` and the shapes of their embeddings."""
    asked, texts = REQUESTS[name]
    return {
        EncodeUnit(f"{name} {encoder}", (text, side, *range(2, shape[0] if len(shape) == 2 else 77)), output): shape
        for side in range(texts)
        for encoder, output, shape in asked
    }


def _value(unit: EncodeUnit, shape: tuple[int, ...]) -> bytes:
    generator = torch.Generator().manual_seed(int(unit.key[:12], 16))
    return pack(torch.randn(shape, generator=generator).to(_DTYPE))
