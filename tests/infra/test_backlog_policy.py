"""The policy of the diffusion replicas as Serve gets it, with a real job store."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from support.jobs import MODEL, Bench, a_request, on
from support.server import wait_until

from deployments.app import denoisers
from serve.catalog import open_catalog
from serve.jobs.terms import Terms
from serve.origins import load_args
from serve.placements import plan_placements
from serve.settings.tree import Settings

VARIABLE = "TANDEM_JOBS__REDIS_URL"


def described(settings: Settings) -> dict[str, Any]:
    placements = plan_placements(settings, open_catalog(settings).drawn)
    (placement,) = placements
    return denoisers(placement, settings, placements)


def scaled(folder: Path, url: str | None, **diffusion: Any) -> Settings:
    own = {"replicas": 0, "min_replicas": 0, "max_replicas": 3, "target_wait_s": 10, "idle_s": 60} | diffusion
    jobs = {"redis_url": SecretStr(url)} if url else {}
    return Settings(data_dir=folder, jobs=jobs, diffusion=own)


def policy_of(settings: Settings) -> Any:
    """As Serve's controller makes it, from what travels there."""
    config = AutoscalingConfig(**described(settings)["autoscaling_config"])
    return config.policy.get_policy()(**json.loads(json.dumps(config.policy.policy_kwargs)))


def context(target: int, running: int = 0) -> AutoscalingContext:
    name = DeploymentID(name="Diffusion-shapes", app_name="tandem")
    replicas = [ReplicaID(unique_id=str(n), deployment_id=name) for n in range(running)]
    return AutoscalingContext(
        deployment_id=name,
        deployment_name=name.name,
        app_name="tandem",
        current_num_replicas=running,
        target_num_replicas=target,
        running_replicas=replicas,
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=3,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )


def test_replicas_scale_where_the_settings_let_them(tmp_path: Path) -> None:
    assert described(Settings(data_dir=tmp_path)) == {"num_replicas": 1}
    assert described(scaled(tmp_path, None, replicas=2, min_replicas=2, max_replicas=2)) == {"num_replicas": 2}
    config = described(scaled(tmp_path, "redis://x", replicas=1))["autoscaling_config"]
    assert (config["min_replicas"], config["initial_replicas"], config["max_replicas"]) == (0, 1, 3)
    sleeper = described(scaled(tmp_path, "redis://x"))["autoscaling_config"]
    assert "initial_replicas" not in sleeper, "an update would end them all at once"
    assert (config["upscale_delay_s"], config["downscale_delay_s"]) == (0, 0), "the policy's own memory steadies it"


def test_what_travels_to_serve_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "redis://:hunter2@jobs:6379/0")
    settings = load_args({"data_dir": str(tmp_path), "diffusion": {"max_replicas": 2}}).settings
    kwargs = json.dumps(described(settings)["autoscaling_config"]["policy"].policy_kwargs)
    assert VARIABLE in kwargs
    assert "hunter2" not in kwargs


def test_it_follows_the_work_in_the_store(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, redis_url)
    args = {"data_dir": str(tmp_path), **scaled(tmp_path, None).model_dump(include={"diffusion"})}
    policy = policy_of(load_args(args).settings)

    def wants(replicas: int, target: int, running: int = 0) -> bool:
        return bool(policy(context(target, running)) == (replicas, {}))

    assert wants(0, 0)
    assert wants(2, 2, 2), "nothing is known yet"

    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request(), terms=Terms(cost_ms=1))
        wait_until(lambda: wants(1, 0), 10, "the first job to wake it")
        assert wants(1, 1), "it starts, and nobody orders another"
        await bench.store.submit("b", a_request(), terms=Terms(cost_ms=25_000))
        wait_until(lambda: wants(3, 1, 1), 10, "more work to want more")
        assert wants(3, 3, 1)
        for name in "ab":
            await bench.store.cancel(name)
        wait_until(lambda: policy._watch.seen().wanted[MODEL] == 0, 10, "nothing to be wanted")
        assert wants(3, 3, 3), "a pause is no idleness"

    on(redis_url, story)
