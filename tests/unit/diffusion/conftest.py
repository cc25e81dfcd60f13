"""The shipped model's parts, loaded once for the room's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.diffusion.engine import Engine, Work
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.scheduler import StepScheduler
from serve.domain import ImageRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.forward import TextTower
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.prompts.tokenizers import PromptTokenizer
from serve.settings import DiffusionSettings, ModelSettings
from serve.telemetry.metrics import InProcessMetrics


@pytest.fixture(scope="session")
def model() -> ModelFolder:
    return resolve(ModelSettings(), Path())


@pytest.fixture(scope="session")
def runner(model: ModelFolder) -> Runner:
    return open_runner(model, DiffusionSettings(device="cpu", torch_threads=1))


@pytest.fixture(scope="session")
def work(model: ModelFolder) -> Callable[..., Work]:
    """work(run_id, prompt, **parameters) -> a job whose text is encoded."""
    planner = Planner(PromptTokenizer(model.path), "test")
    tower = TextTower.load(model.path, "cpu", "float32")

    def make(run_id: str, prompt: str = "a red circle on a blue background", **parameters: object) -> Work:
        values = {
            "model": model.name,
            "width": 128,
            "height": 128,
            "num_inference_steps": 8,
            "guidance_scale": 5.0,
            "seed": 0,
        } | parameters
        request = ImageRequest(prompt=prompt, **values)  # type: ignore[arg-type]
        plan = planner.plan(request)
        embeddings = {unit.key: pack(tensor) for unit, tensor in zip(plan.units, tower.encode(plan.units), strict=True)}
        return Work(run_id, request, compose(plan, embeddings))

    return make


@pytest.fixture
def engine(runner: Runner) -> Iterator[Engine]:
    engine = Engine(runner, StepScheduler(4), InProcessMetrics())
    yield engine
    engine.stop()
