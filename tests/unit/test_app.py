"""What each deployment reserves in Ray, and what is refused before Ray would start it."""

from pathlib import Path
from typing import Any

import pytest

from deployments.app import build, denoiser, text_encoder
from serve.catalog import open_catalog
from serve.errors import OperatorError
from serve.local import on_this_machine
from serve.placements import GPU_CLASS_LABEL, plan_placements
from serve.settings import Settings


def settings_of(folder: Path, **tree: Any) -> Settings:
    return Settings(data_dir=folder, gpu_classes={"4gb": {"memory_gb": 4}}, **tree)


def at_fault(settings: Settings) -> str:
    with pytest.raises(OperatorError) as raised:
        build(settings)
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
        build(settings_of(tmp_path, diffusion={"gpu_class": "4gb", **own}))
    build(settings_of(tmp_path))


def test_one_machine_may_have_no_gpu_to_reserve(tmp_path: Path) -> None:
    build(on_this_machine(settings_of(tmp_path, diffusion={"gpu_class": "4gb"})))


def test_a_text_encoder_takes_whole_gpus_or_a_share_of_one(tmp_path: Path) -> None:
    assert at_fault(settings_of(tmp_path, encoder={"num_gpus": 1.5})).endswith("num_gpus")
    for num_gpus in (0.5, 1, 2):
        build(settings_of(tmp_path, encoder={"num_gpus": num_gpus}))


def test_a_placement_runs_on_the_nodes_of_its_class(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, diffusion={"gpu_class": "4gb", "num_gpus": 0.5, "replicas": 3})
    catalog = open_catalog(settings)
    (placement,) = plan_placements(settings, catalog.drawn)
    (encoder,) = catalog.registry.encoders
    application = denoiser(placement, settings, {encoder.fingerprint: text_encoder(encoder, settings)})
    deployment = application._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    assert deployment.ray_actor_options["label_selector"] == {GPU_CLASS_LABEL: "4gb"}
