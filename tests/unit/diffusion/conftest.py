"""The shipped model's parts, loaded once for the room's tests."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from serve.diffusion.engine import Engine, Work
from serve.diffusion.profile import Profile
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.diffusion.start import work_of
from serve.domain.orders import ImageRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.settings.pools import DiffusionSettings, ModelSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics


@pytest.fixture(scope="session")
def model() -> ModelFolder:
    return resolve(ModelSettings(), Path())


@pytest.fixture(scope="session")
def runner(model: ModelFolder) -> Runner:
    return open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))


@pytest.fixture(scope="session")
def work(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Work]:
    """work(run_id, prompt, image=, mask=, **parameters) -> a job whose text is encoded."""
    registry = register([model], Settings(data_dir=tmp_path_factory.mktemp("data")))
    planner = Planner(model, registry.sources(model.name))
    tower = TextTower.load(registry.encoders[0], "cpu")

    def make(
        run_id: str,
        prompt: str = "a red circle on a blue background",
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        **parameters: object,
    ) -> Work:
        values = {
            "image": None if image is None else f"{run_id}/image.png",
            "mask": None if mask is None else f"{run_id}/mask.png",
            "strength": None if image is None else 0.8,
            "model": model.name,
            "width": 128,
            "height": 128,
            "num_inference_steps": 8,
            "guidance_scale": 5.0,
            "seed": 0,
        } | parameters
        request = ImageRequest(prompt=prompt, **values)  # type: ignore[arg-type]
        plan = planner.plan(request.text)
        outputs = tower.encode([Row.of(unit, tower.outputs) for unit in plan.units])
        embeddings = {unit.key: pack(row[unit.output]) for unit, row in zip(plan.units, outputs, strict=True)}
        request = replace(request, composed=plan.composed)
        return work_of(run_id, request, compose(plan, embeddings), image, mask)

    return make


@pytest.fixture
def quick_gc() -> Iterator[None]:
    """Memory that runs out is collected for: what the test process has loaded by now is left out of that."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def engine(runner: Runner) -> Iterator[Engine]:
    profile = Profile(4)
    engine = Engine(runner, StepScheduler(profile), profile, InProcessMetrics())
    yield engine
    engine.stop()
