"""Everything on one machine: the embedded Redis servers, a local Ray, the application; one call that blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pkgutil
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
from pydantic import SecretStr

from serve.catalog import Catalog, open_catalog
from serve.devices import claim_device
from serve.embedded import EmbeddedRedis, check_redis, make_private
from serve.errors import OperatorError, Unavailable
from serve.keys import KeyStore
from serve.models.captioner import captioner_of
from serve.origins import Loaded, shown
from serve.placements import GPU_CLASS_LABEL, HERE, plan_placements, setting_of
from serve.ports import LOOPBACK, check_port
from serve.results.store import open_store
from serve.settings.orders import ConceptSettings
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.shares import fit
from serve.telemetry import logs
from serve.telemetry.metrics import InProcessMetrics

log = logging.getLogger(__name__)

NAME = "tandem"
WATCH_S = 0.5
DRAIN_MARGIN_S = 10.0
RAY_END_S = 2.0
RAY_SERVERS = ("raylet", "gcs_server")
APPLICATION = "deployments.app:application"
"""The graph, by its import path: `serve` does not import `deployments`."""


def run(loaded: Loaded) -> None:
    """Serve until SIGINT or SIGTERM, then end every process that was started. Raises OperatorError before the start."""
    logs.configure(loaded.settings.log.level)
    with contextlib.ExitStack() as stack:
        try:
            _interrupt_on_signals()
            settings, catalog, servers = prepare(loaded.settings, stack)
            if settings.keys.required:
                log.info("API keys are on (keys.required); `tandem keys create NAME` makes one")
            _start(settings, catalog, stack)
            _interrupt_on_signals()  # ray.init replaced the handler
            log.info("ready at http://%s:%d, Ctrl-C stops it", settings.http.host, settings.http.port)
            _watch(servers, psutil.Process().children())
        except KeyboardInterrupt:
            log.info("stopping; running jobs finish first, a second Ctrl-C leaves them to the next start")


def prepare(settings: Settings, stack: contextlib.ExitStack) -> tuple[Settings, Catalog, list[EmbeddedRedis]]:
    """Check what can be checked before the slow start, and start the Redis servers that are not given.

    Returns the settings as `on_this_machine` and with every path absolute and every URL filled in, what is served, and
    the servers. Raises OperatorError naming the setting.
    """
    check_port(settings.http.host, settings.http.port)
    data_dir = settings.data_dir.absolute()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if settings.results.store == "local":
            make_private(data_dir / "images")  # where open_store has them
    except OSError as error:
        raise OperatorError(f"data_dir: {error.filename}: {error.strerror}", "data_dir") from None
    concepts = ConceptSettings(folder=settings.concept_folder.absolute())
    settings = settings.model_copy(update={"data_dir": data_dir, "concepts": concepts})
    catalog = open_catalog(settings)
    for placement in plan_placements(settings, catalog.drawn):
        claim_device(placement.settings.device, 0.0, setting_of(settings, placement.name, "device"))
    for encoder in catalog.registry.encoders:
        claim_device(encoder.settings.place, 0.0, encoder.setting("device"))
    if captioner_of(settings.captions) is not None:
        claim_device(settings.captions.place, 0.0, "captions.device")
    try:
        asyncio.run(open_store(settings.results, data_dir).check())
    except Unavailable:
        setting = "results.s3.endpoint_url"
        place = shown(settings.results.s3.endpoint_url) or "AWS"
        raise OperatorError(f"{setting}: S3 at {place} does not answer", setting) from None
    servers: list[EmbeddedRedis] = []

    def redis(url: SecretStr | None, name: Literal["jobs", "cache"], max_bytes: int | None) -> SecretStr:
        if url is not None:
            check_redis(url.get_secret_value(), f"{name}.redis_url")
            return url
        servers.append(stack.enter_context(EmbeddedRedis(data_dir, name, max_bytes)))
        return SecretStr(servers[-1].url)

    jobs_url = redis(settings.jobs.redis_url, "jobs", None)
    cache_url = redis(settings.cache.redis_url, "cache", settings.cache.embedded_bytes)
    filled = {
        "jobs": settings.jobs.model_copy(update={"redis_url": jobs_url}),
        "cache": settings.cache.model_copy(update={"redis_url": cache_url}),
    }
    settings = on_this_machine(settings.model_copy(update=filled))
    if settings.keys.required and settings.keys.first is None and not asyncio.run(_ever_made(settings.jobs)):
        raise _no_keys(settings, own=any(server.kind == "jobs" for server in servers))
    return settings, catalog, servers


async def _ever_made(settings: JobSettings) -> bool:
    keys = KeyStore(settings, InProcessMetrics())
    try:
        return await keys.ever_made()
    finally:
        await keys.close()


def _no_keys(settings: Settings, *, own: bool) -> OperatorError:
    """`own`: the job Redis is this machine's own, and its files are all that a command needs to know."""
    host = settings.http.host
    why = "is on" if host in LOOPBACK else f"is on, because http.host {host} can be reached from elsewhere"
    how = f" --data-dir {shlex.quote(str(settings.data_dir))}`" if own else "` with the same jobs.redis_url"
    return OperatorError(
        f"keys.required {why}, and there is no API key: make one with `tandem keys create NAME{how}, "
        "or let everybody in with keys.required=false",
        "keys.required",
    )


def on_this_machine(settings: Settings) -> Settings:
    """The settings with what the operator left open and one machine answers: every GPU class is here; and where only
    this machine can reach the server, whoever does needs no API key and may have it measure itself."""
    http, keys = settings.http, settings.keys
    alone = http.host in LOOPBACK
    benchmark = alone if http.benchmark is None else http.benchmark
    required = not alone or keys.first is not None if keys.required is None else keys.required
    classes = {name: each.model_copy(update={"label": HERE}) for name, each in settings.gpu_classes.items()}
    return settings.model_copy(
        update={
            "http": http.model_copy(update={"benchmark": benchmark}),
            "keys": keys.model_copy(update={"required": required}),
            "gpu_classes": classes,
        }
    )


def _watch(servers: Sequence[EmbeddedRedis], family: Sequence[psutil.Process]) -> None:
    """Keep the Redis servers up for as long as this process lives; their clients wait meanwhile. Nobody can start Ray
    again under replicas that live: OperatorError when one of its two servers has ended."""
    ray_servers = [process for process in family if process.name() in RAY_SERVERS]
    while True:
        for process in ray_servers:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise OperatorError("Ray has ended; the next start goes on with the jobs that wait")
        for server in servers:
            if not server.alive:
                log.error("the embedded Redis for %s ended and is started again", server.kind)
                server.start()
        time.sleep(WATCH_S)


def _start(settings: Settings, catalog: Catalog, stack: contextlib.ExitStack) -> None:
    import ray
    from ray import serve

    # Ray makes all workers nice, the denoisers and those who answer for them alike; ours choose
    # (deployments/diffusion.py).
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Serve's controller looks after its few replicas here ten times a second otherwise: 2 % of a core, for ever.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    temp_dir = Path(tempfile.mkdtemp(prefix="tandem-"))  # short: Ray keeps Unix sockets in it
    stack.callback(shutil.rmtree, temp_dir, ignore_errors=True)
    stack.callback(_end_ray, psutil.Process().children())  # also ends what an interrupted start has begun
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, 2),
        labels={GPU_CLASS_LABEL: HERE},
        include_dashboard=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(temp_dir),
        _metrics_export_port=settings.metrics.port,
    )
    placements = plan_placements(settings, catalog.drawn)
    settings = fit(settings, catalog.registry.encoders, placements, ray.cluster_resources())
    serve_logs = {"log_level": "DEBUG" if settings.log.level == "debug" else "WARNING"}
    serve.start(http_options={"host": settings.http.host, "port": settings.http.port}, logging_config=serve_logs)
    application = pkgutil.resolve_name(APPLICATION)(settings)
    stack.callback(_drain, max((each.settings.drain_s for each in placements), default=0.0))
    try:
        serve.run(application, name=NAME, route_prefix="/", logging_config=serve_logs)
    except RuntimeError:
        deployments = serve.status().applications[NAME].deployments.values()
        told = re.search(r"OperatorError: (.+)", "\n".join(deployment.message for deployment in deployments))
        raise OperatorError(
            told[1] if told else "the application does not start; the log above has the reason"
        ) from None


def _end_ray(others: Sequence[psutil.Process]) -> None:
    """Ray's agents notice only after a while that their node is gone: what is left of its processes is ended here."""
    import ray

    family = set(psutil.Process().children(recursive=True)).difference(others)
    ray.shutdown()
    _, left = psutil.wait_procs(family, timeout=RAY_END_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _drain(drain_s: float) -> None:
    """Serve's own shutdown cuts the replicas off after 30 s; deleting the application lets them finish."""
    from ray import serve

    deadline = time.monotonic() + drain_s + DRAIN_MARGIN_S
    serve.delete(NAME, _blocking=False)
    while NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(WATCH_S)


def _interrupt_on_signals() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job begins with SIGINT ignored
        signal.signal(number, interrupt)
