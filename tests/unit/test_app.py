"""What each deployment reserves in Ray, and what is refused before Ray would start it."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.exceptions import RayServeException
from support.captioners import blip_folder

from deployments.app import application, build, captions, denoiser, text_encoder
from deployments.diffusion import own_grace_s
from serve.catalog import open_catalog
from serve.errors import OperatorError
from serve.local import on_this_machine
from serve.placements import GPU_CLASS_LABEL, plan_placements
from serve.settings.tree import Settings


def settings_of(folder: Path, **tree: Any) -> Settings:
    return Settings(data_dir=folder, gpu_classes={"4gb": {"memory_gb": 4}}, **tree)


def at_fault(settings: Settings) -> str:
    with pytest.raises(OperatorError) as raised:
        application(settings)
    assert raised.value.message.startswith(f"{raised.value.param}: ")
    assert "\n" not in raised.value.message
    return str(raised.value.param)


def test_replicas_on_a_class_of_gpus_must_reserve_one(tmp_path: Path) -> None:
    """Ray would start them all on one card, which it gives to others too."""
    tables = {"a": {"gpu_class": "4gb", "num_gpus": 0}}
    assert at_fault(settings_of(tmp_path, placements=tables)) == "placements.a.num_gpus"
    assert at_fault(settings_of(tmp_path, placements={"a": {"gpu_class": "4gb"}})) == "diffusion.num_gpus"
    assert at_fault(settings_of(tmp_path, diffusion={"gpu_class": "4gb"})) == "diffusion.num_gpus"
    for own in ({"num_gpus": 0.5}, {"device": "cpu"}, {"replicas": 0}):
        application(settings_of(tmp_path, diffusion={"gpu_class": "4gb", **own}))
    application(settings_of(tmp_path))


def test_one_machine_may_have_no_gpu_to_reserve(tmp_path: Path) -> None:
    application(on_this_machine(settings_of(tmp_path, diffusion={"gpu_class": "4gb"})))


def test_a_text_encoder_takes_whole_gpus_or_a_share_of_one(tmp_path: Path) -> None:
    assert at_fault(settings_of(tmp_path, encoder={"num_gpus": 1.5})).endswith("num_gpus")
    for num_gpus in (0.5, 1, 2):
        application(settings_of(tmp_path, encoder={"num_gpus": num_gpus}))


def test_a_placement_runs_on_the_nodes_of_its_class(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, diffusion={"gpu_class": "4gb", "num_gpus": 0.5, "replicas": 3})
    catalog = open_catalog(settings)
    (placement,) = plan_placements(settings, catalog.drawn)
    (encoder,) = catalog.registry.encoders
    application = denoiser(placement, settings, {encoder.fingerprint: text_encoder(encoder, settings)}, [placement])
    deployment = application._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    assert deployment.ray_actor_options["label_selector"] == {GPU_CLASS_LABEL: "4gb"}


def test_a_text_encoder_runs_on_the_nodes_of_its_class(tmp_path: Path) -> None:
    assert at_fault(settings_of(tmp_path, encoder={"gpu_class": "4gb"})).endswith("num_gpus")
    settings = settings_of(tmp_path, encoder={"gpu_class": "4gb", "num_gpus": 0.25})
    (encoder,) = open_catalog(settings).registry.encoders
    deployment = text_encoder(encoder, settings)._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.25
    assert deployment.ray_actor_options["label_selector"] == {GPU_CLASS_LABEL: "4gb"}


def test_what_needs_no_gpu_leaves_the_nodes_of_gpu_classes_to_those_who_do(tmp_path: Path) -> None:
    """Ray takes a selector with a blank in it, and then never finds the second value."""
    classes = {"4gb": {"memory_gb": 4}, "big": {"memory_gb": 11, "label": "11gb"}}
    settings = Settings(data_dir=tmp_path, gpu_classes=classes)
    (encoder,) = open_catalog(settings).registry.encoders
    for deployment in (application(settings), text_encoder(encoder, settings)):
        options = deployment._bound_deployment.ray_actor_options
        assert options["label_selector"] == {GPU_CLASS_LABEL: "!in(11gb,4gb)"}
        assert options["fallback_strategy"] == [{"label_selector": {}}], "where all nodes have cards, any will do"
    here = application(on_this_machine(settings))._bound_deployment
    assert "label_selector" not in here.ray_actor_options, "one machine is all there is"


def test_captions_are_a_pool_of_their_own_where_a_model_is_named(tmp_path: Path) -> None:
    assert captions(settings_of(tmp_path)) is None
    assert at_fault(settings_of(tmp_path, captions={"source": str(tmp_path / "nowhere")})) == "captions.source"
    source = str(blip_folder(tmp_path / "blip"))
    assert at_fault(settings_of(tmp_path, captions={"source": source, "gpu_class": "4gb"})) == "captions.num_gpus"
    own = {"source": source, "gpu_class": "4gb", "num_gpus": 0.5, "min_replicas": 0, "max_replicas": 3}
    application = captions(settings_of(tmp_path, captions=own))
    assert application is not None
    deployment = application._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 3)
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    assert deployment.ray_actor_options["label_selector"] == {GPU_CLASS_LABEL: "4gb"}


URLS = {
    "TANDEM_JOBS__REDIS_URL": "redis://:hunter2@jobs:6379/0",
    "TANDEM_CACHE__REDIS_URL": "redis://:hunter2@cache:6379/0",
}


def told(**args: Any) -> str:
    """What Serve shows of args that can't be deployed: the message of its own exception, and nothing around it."""
    with pytest.raises(RayServeException) as raised:
        call_user_app_builder_with_args_if_necessary(build, args)
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__
    return str(raised.value)


def test_serve_waits_for_as_long_as_a_replica_may_drain(tmp_path: Path) -> None:
    """Serve kills what is left after `graceful_shutdown_timeout_s`; a replica gives its jobs back before that."""
    tables = {"a": {"drain_s": 300}, "b": {"drain_s": 4}, "c": {}}
    settings = settings_of(tmp_path, placements=tables, http={"replicas": 2, "drain_s": 77})
    ingress = application(settings)._bound_deployment
    assert ingress._deployment_config.graceful_shutdown_timeout_s == 77
    denoisers = ingress.init_args[2]
    waits = {name: each._bound_deployment._deployment_config for name, each in denoisers.items()}
    grace = {name: each.graceful_shutdown_timeout_s for name, each in waits.items()}
    assert grace == {"a": 300, "b": 4, "c": settings.diffusion.drain_s}
    assert {name: own_grace_s(seconds) for name, seconds in grace.items()} == {"a": 292, "b": 2, "c": 112}


def test_a_wrong_setting_is_one_line_in_the_status_of_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"data_dir": str(tmp_path)}
    assert told(**here).startswith("jobs.redis_url: a cluster needs a Redis of its own; name it in TANDEM_JOBS__")
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", URLS["TANDEM_JOBS__REDIS_URL"])
    assert told(**here).startswith("cache.redis_url: ")
    monkeypatch.setenv("TANDEM_CACHE__REDIS_URL", "cache:6379:hunter2")
    assert told(**here).startswith("cache.redis_url: not a Redis URL")
    assert "hunter2" not in told(**here)
    monkeypatch.setenv("TANDEM_CACHE__REDIS_URL", URLS["TANDEM_CACHE__REDIS_URL"])
    assert told(**here, http={"prot": 1}) == "http.prot: no such setting (from args of the Serve application)"
    assert told(**here, model={"source": "/nowhere"}) == "model.source: /nowhere does not exist"
    monkeypatch.setenv("TANDEM_KEYS__FIRST", "hunter2")
    assert told(**here).startswith("keys.first: ")
    assert "hunter2" not in told(**here)


def test_the_application_that_ray_keeps_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = URLS | {"TANDEM_KEYS__FIRST": f"tdm_{'b' * 12}_{'hunter2' + 'B' * 36}"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    built = build_app(
        call_user_app_builder_with_args_if_necessary(build, {"data_dir": str(tmp_path)}),
        name="tandem",
        make_deployment_handle=lambda deployment, app: deployment.name,
    )
    kept = {each.name: each._replica_config.to_proto_bytes() for each in built.deployments}
    assert len(kept) == 3, "the ingress, a text encoder, a denoiser"
    assert all(b"TANDEM_JOBS__REDIS_URL" in each and b"hunter2" not in each for each in kept.values())
