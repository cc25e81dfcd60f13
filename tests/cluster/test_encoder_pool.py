"""The text-encoder pools under Ray Serve: batching under load, cancelled callers, sleep, encoders that models share.

The text encoder here is deep and narrow: a forward costs its layers' overhead more than arithmetic, so that batching
pays on two CPU cores as it does on a GPU. Times are compared with forwards of the same machine in the same run.
"""

import asyncio
import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
import torch
from pydantic import SecretStr
from ray import serve
from support.server import free_port, wait_until
from support.text_models import clip_part, flux_folder, sd_folder

from deployments.app import text_encoder
from deployments.handles import EncoderClients
from deployments.text_encoder import DOOR, TextEncoder
from serve.catalog import Catalog, open_catalog
from serve.domain.text import EncodeUnit, Tier
from serve.embedded import EmbeddedRedis
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import Encoder
from serve.errors import BackendUnavailable
from serve.settings.pools import DiffusionSettings, EncoderSettings, ModelSettings
from serve.settings.stores import CacheSettings
from serve.settings.tree import Settings

pytestmark = pytest.mark.cluster

QUIET = {"log_level": "WARNING"}
DEEP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 160, "num_attention_heads": 1}
OPEN_LOOP_S = 8.0


@dataclass(frozen=True)
class Cluster:
    metrics_port: int

    def metric(self, name: str, **labels: str) -> float:
        """Summed over processes, as Prometheus would read it from Ray's agent."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10).text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith((f"ray_{name}{{", f"ray_{name} "))
            and all(f'{label}="{value}"' in line for label, value in labels.items())
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray of this module's own, with Serve but without HTTP."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:  # short: Ray keeps Unix sockets in it
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=port,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        yield Cluster(port)
        serve.shutdown()
        ray.shutdown()


@dataclass(frozen=True)
class Pools:
    """A catalog's text encoders, deployed."""

    catalog: Catalog
    clients: EncoderClients

    @property
    def encoder(self) -> Encoder:
        """Where there is one."""
        (encoder,) = self.catalog.registry.encoders
        return encoder

    def forward_s(self, rows: int) -> float:
        """Seconds of an undisturbed forward of so many rows, on one thread as a replica has it."""
        torch.set_num_threads(1)
        tower = TextTower.load(self.encoder, "cpu")
        times = []
        for _ in range(9):
            batch = [Row(unseen(self).token_ids) for _ in range(rows)]
            began = time.perf_counter()
            tower.encode(batch)
            times.append(time.perf_counter() - began)
        return min(times)


def deploy(name: str, settings: Settings) -> Pools:
    catalog = open_catalog(settings)
    handles = {
        encoder.fingerprint: serve.run(
            text_encoder(encoder, settings), name=f"{name}-{encoder.name}", route_prefix=None, logging_config=QUIET
        )
        for encoder in catalog.registry.encoders
    }
    return Pools(catalog, EncoderClients(handles, catalog.registry.encoders))


@pytest.fixture(scope="module")
def deep_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("deep")
    clip_part(sd_folder(home / "sd"), "text_encoder", 0, DEEP)
    return Settings(
        data_dir=home, model=ModelSettings(source=str(home / "sd")), diffusion=DiffusionSettings(replicas=0)
    )


@pytest.fixture(scope="module")
def deep(cluster: Cluster, deep_settings: Settings) -> Pools:
    return deploy("deep", deep_settings)


_numbers = itertools.count(1)


def unseen(pools: Pools) -> EncodeUnit:
    """A row of text that nobody has asked for."""
    encoder = pools.encoder
    number, most = next(_numbers), encoder.part.vocab_size - 2
    ids = (most, number % most, number // most, *[most + 1] * 74)
    return EncodeUnit(encoder.fingerprint, ids, encoder.outputs[0])


@dataclass(frozen=True)
class OpenLoop:
    """What an open loop saw: seconds from the moment at which each request was due to its answer."""

    offered: float
    latencies: list[float]
    took_s: float

    @property
    def served(self) -> float:
        return len(self.latencies) / self.took_s

    @property
    def p50(self) -> float:
        return statistics.median(self.latencies)

    @property
    def p95(self) -> float:
        return statistics.quantiles(self.latencies, n=20)[-1]

    def __str__(self) -> str:
        return f"{self.offered:.0f}/s offered, {self.served:.0f}/s served, P50 {self.p50:.3f} s, P95 {self.p95:.3f} s"


async def open_loop(ask: Callable[[], Awaitable[object]], rate: float, seconds: float) -> OpenLoop:
    """Requests at set times, whether the ones before are answered or not."""
    latencies = []
    began = time.perf_counter()

    async def one(due: float) -> None:
        await ask()
        latencies.append(time.perf_counter() - due)

    tasks = []
    for number in range(int(rate * seconds)):
        due = began + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    return OpenLoop(rate, latencies, time.perf_counter() - began)


@pytest.mark.slow
def test_twice_the_one_by_one_rate_is_served(
    cluster: Cluster, deep: Pools, deep_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The known trap: `@serve.batch` cuts a batch by the clock and then waits for the slot, so that a handler that
    runs longer than the wait collapses to small batches. The naive deployment is shown, ours is held to it."""
    alone_s, full_s = deep.forward_s(1), deep.forward_s(32)
    rate = 2 / alone_s

    async def ours() -> OpenLoop:
        await asyncio.gather(*(deep.clients.encode([unseen(deep)]) for _ in range(8)))
        return await open_loop(lambda: deep.clients.encode([unseen(deep)]), rate, OPEN_LOOP_S)

    async def naive() -> OpenLoop:
        handle = serve.run(naive_pool(deep_settings), name="naive", route_prefix=None, logging_config=QUIET)
        await handle.encode.remote(unseen(deep).token_ids)
        return await open_loop(lambda: handle.encode.remote(unseen(deep).token_ids), rate, OPEN_LOOP_S)

    pool = asyncio.run(ours())
    batch = asyncio.run(naive())
    serve.delete("naive")
    with capsys.disabled():
        print(f"\none by one {1 / alone_s:.0f}/s; pool: {pool}; @serve.batch alone: {batch}")
    assert pool.served >= 0.95 * pool.offered
    assert pool.p95 <= 3 * full_s, "the batch under way, its own, and the way there and back"


def naive_pool(settings: Settings) -> serve.Application:
    """The same encoder behind `@serve.batch` alone, with Serve's default wait."""

    class Naive:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self._tower = TextTower.load(open_catalog(settings).registry.encoders[0], "cpu")

        @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
        async def encode(self, rows: list[tuple[int, ...]]) -> list[int]:
            return [
                len(row) for row in await asyncio.to_thread(self._tower.encode, [Row(token_ids) for token_ids in rows])
            ]

    # Within a function, so that Ray pickles it by value: the replica can't import this module.
    return serve.deployment(Naive, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.2}).bind()


def test_an_idle_pool_adds_no_wait(deep: Pools) -> None:
    """One request at a time: a forward and the way there and back, which `ready` alone takes too."""

    async def main() -> tuple[list[float], list[float]]:
        asked, there_and_back = [], []
        (ready,) = deep.clients.probes.values()
        for _ in range(30):
            began = time.perf_counter()
            (got,) = await deep.clients.encode([unseen(deep)])
            asked.append(time.perf_counter() - began)
            assert got.tier is Tier.ENCODED
            began = time.perf_counter()
            await ready()
            there_and_back.append(time.perf_counter() - began)
        return asked, there_and_back

    asked, there_and_back = asyncio.run(main())
    # The least of many: what else the machine does can only add to it, and so would a wait.
    assert min(asked) < min(there_and_back) + 1.3 * deep.forward_s(1)


def test_cancelled_callers_are_dropped_and_wedge_nothing(cluster: Cluster, deep: Pools) -> None:
    """Ray issue 50046: a `@serve.batch` deployment whose callers were cancelled never answered again."""
    name = deep.encoder.name
    before = cluster.metric("tandem_encoder_dropped_rows_total", encoder=name)

    async def main() -> float:
        for _ in range(3):
            tasks = [asyncio.create_task(deep.clients.encode([unseen(deep)])) for _ in range(200)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, list | asyncio.CancelledError) for result in results)
        began = time.perf_counter()
        await deep.clients.encode([unseen(deep)])
        return time.perf_counter() - began

    took_s = asyncio.run(main())
    assert took_s < 3 * deep.forward_s(32), "the batch under way and its own, not the hundreds that were left"
    wait_until(
        lambda: cluster.metric("tandem_encoder_dropped_rows_total", encoder=name) - before >= 200,
        30,
        "Ray to export the dropped rows",
    )


def test_the_same_text_goes_to_the_same_replica(cluster: Cluster, tmp_path: Path) -> None:
    """Two replicas without a Redis to share: each text is encoded by one of them, and remembered there."""
    settings = Settings(
        data_dir=tmp_path,
        model=ModelSettings(source=str(sd_folder(tmp_path / "sd"))),
        diffusion=DiffusionSettings(replicas=0),
        encoder=EncoderSettings(min_replicas=2, max_replicas=2),
    )
    pools = deploy("twins", settings)

    async def main() -> list[list[Tier]]:
        units = [unseen(pools) for _ in range(20)]
        # Some are at home at each of the two, unless one coin fell twenty times on one side.
        return [[got.tier for unit in units for got in await pools.clients.encode([unit])] for _ in range(4)]

    first, *again = asyncio.run(main())
    assert first == [Tier.ENCODED] * 20
    assert again == [[Tier.MEMORY] * 20] * 3


@pytest.mark.slow
def test_a_pool_sleeps_and_wakes_at_the_first_text(cluster: Cluster, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        model=ModelSettings(source=str(flux_folder(tmp_path / "flux"))),
        diffusion=DiffusionSettings(replicas=0),
        encoder=EncoderSettings(min_replicas=0, idle_s=2.0),
    )
    pools = deploy("flux", settings)
    t5 = next(encoder for encoder in pools.catalog.registry.encoders if encoder.part.kind == "t5")
    unit = EncodeUnit(t5.fingerprint, tuple(range(40)), "hidden")

    async def states() -> set[str]:
        return {(await probe()).detail for probe in pools.clients.probes.values()}

    assert "1 awake" in asyncio.run(states()), "the last one has just started"
    wait_until(lambda: asyncio.run(states()) == {"asleep"}, 60, "the pools to fall asleep, although they are probed")
    (got,) = asyncio.run(pools.clients.encode([unit]))
    assert got.tier is Tier.ENCODED
    assert asyncio.run(states()) == {"asleep", "1 awake"}, "the pool that was not asked sleeps on"
    wait_until(lambda: asyncio.run(states()) == {"asleep"}, 60, "the pool to fall asleep again")


@pytest.mark.slow
def test_a_pool_that_sleeps_is_tried_at_the_start(cluster: Cluster, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        model=ModelSettings(source=str(sd_folder(tmp_path / "sd"))),
        diffusion=DiffusionSettings(replicas=0),
        encoder=EncoderSettings(min_replicas=0, device="mps"),
    )
    with pytest.raises(RuntimeError):
        deploy("wrong", settings)
    (told,) = (each.message for each in serve.status().applications["wrong-clip-32x3"].deployments.values())
    assert "OperatorError: encoder.device: there is no mps device here" in told
    serve.delete("wrong-clip-32x3")


def test_overload_is_refused_at_once(
    cluster: Cluster, deep_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a replica takes at once is encoded; few may wait for it, and the others are told so."""
    monkeypatch.setattr("deployments.app.MAX_QUEUED", 20)
    pools = deploy("crowd", deep_settings)

    async def one() -> tuple[str, float]:
        began = time.perf_counter()
        try:
            await pools.clients.encode([unseen(pools)])
        except BackendUnavailable as error:
            return error.message, time.perf_counter() - began
        return "", 0.0

    async def main() -> list[tuple[str, float]]:
        await one()
        return await asyncio.gather(*(one() for _ in range(DOOR + 200)))

    outcomes = asyncio.run(main())
    serve.delete(f"crowd-{pools.encoder.name}")
    refused = [(message, took_s) for message, took_s in outcomes if message]
    assert 100 <= len(refused) < len(outcomes)
    assert all(message.endswith("pool has too many requests waiting") for message, _ in refused)
    assert max(took_s for _, took_s in refused) < 5


@pytest.mark.slow
@pytest.mark.parametrize("redis", [False, True])
def test_affinity_saves_forwards_where_replicas_share_nothing(
    cluster: Cluster, deep_settings: Settings, tmp_path: Path, redis: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two replicas, the same Zipf-distributed texts through the product's router and through Serve's own."""
    with contextlib.ExitStack() as stack:
        forwards = {}
        for router in ("product", "serve"):
            url = stack.enter_context(EmbeddedRedis(tmp_path / router, "cache")).url if redis else None
            settings = deep_settings.model_copy(
                update={
                    # A busy machine must not make Redis time out: each replica would go on by itself.
                    "cache": CacheSettings(redis_url=SecretStr(url) if url else None, timeout_s=5.0),
                    "encoder": EncoderSettings(min_replicas=2, max_replicas=2, torch_threads=1),
                }
            )
            forwards[router] = asyncio.run(zipf(router, settings))
        with capsys.disabled():
            print(f"\nrows encoded {'with' if redis else 'without'} Redis: {forwards}")
    assert forwards["product"] <= forwards["serve"] * (1.1 if redis else 0.9)


async def zipf(router: str, settings: Settings) -> int:
    """Rows that the pool encodes for 800 requests of 400 texts (exponent 0.8) at 40 a second."""
    catalog = open_catalog(settings)
    (encoder,) = catalog.registry.encoders
    application = text_encoder(encoder, settings)
    if router == "serve":
        options = {"num_replicas": 2, "max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 0.2}}
        application = serve.deployment(TextEncoder, **options).bind(settings, encoder.name)
    handle = serve.run(application, name=f"zipf-{router}", route_prefix=None, logging_config=QUIET)
    clients = EncoderClients({encoder.fingerprint: handle}, catalog.registry.encoders)
    texts = [EncodeUnit(encoder.fingerprint, (1, number, *[0] * 75), encoder.outputs[0]) for number in range(2, 402)]
    draw = random.Random(0)
    weights = [1 / rank**0.8 for rank in range(1, len(texts) + 1)]
    tiers = []

    async def ask() -> None:
        tiers.extend(await clients.prepare(draw.choices(texts, weights)))

    await open_loop(ask, 40.0, 20.0)
    serve.delete(f"zipf-{router}")
    return sum(tier is Tier.ENCODED for tier in tiers)
