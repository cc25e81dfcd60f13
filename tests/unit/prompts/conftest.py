from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.text_models import (
    auraflow_folder,
    flux_folder,
    pixart_folder,
    sd3_folder,
    sd_folder,
    sdxl_folder,
    sdxl_refiner_folder,
)

from serve.models.folder import SHIPPED, ModelFolder, check_folder
from serve.prompts.concepts import Concepts
from serve.prompts.plan import Planner, Source
from serve.prompts.tokenizers import PromptTokenizer

FOLDERS: Mapping[str, Callable[[Path], Path]] = {
    "sd": sd_folder,
    "sdxl": sdxl_folder,
    "sdxl-encoded-empty": lambda path: sdxl_folder(path, zero_empty_negative=False),
    "sd3": sd3_folder,
    "sd3-without-t5": lambda path: sd3_folder(path, with_t5=False),
    "flux": flux_folder,
    "sdxl_refiner": sdxl_refiner_folder,
    "pixart": pixart_folder,
    "auraflow": auraflow_folder,
    "pixart-alpha": lambda path: pixart_folder(path, sigma=False),
}


def planner_of(model: ModelFolder, concepts: Concepts | None = None) -> Planner:
    """Every encoder is its own: `fingerprint` is the role."""
    return Planner(
        model,
        {
            part.role: Source(
                fingerprint=part.role,
                name=part.name,
                part=part,
                projection=None if part.projection is None else f"of-{part.role}",
            )
            for part in model.text
        },
        concepts,
    )


@pytest.fixture(scope="session")
def shipped() -> ModelFolder:
    return check_folder(SHIPPED, "shapes", text_only=True)


@pytest.fixture(scope="session")
def tokenizer(shipped: ModelFolder) -> PromptTokenizer:
    return PromptTokenizer(shipped.text[0])


@pytest.fixture(scope="session")
def planner(shipped: ModelFolder) -> Planner:
    return planner_of(shipped)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFolder]:
    """A small model of each family, and the two that differ in what is zeros."""
    root = tmp_path_factory.mktemp("models")
    return {name: check_folder(make(root / name), name, text_only=True) for name, make in FOLDERS.items()}


@pytest.fixture(scope="session")
def t5(models: Mapping[str, ModelFolder]) -> PromptTokenizer:
    return PromptTokenizer(models["flux"].text[1])


@pytest.fixture(scope="session")
def planner_with(models: Mapping[str, ModelFolder]) -> Callable[[str, Concepts], Planner]:
    """A model's planner, with concepts."""
    return lambda name, concepts: planner_of(models[name], concepts)


@pytest.fixture(scope="session")
def planners(models: Mapping[str, ModelFolder]) -> Mapping[str, Planner]:
    return {name: planner_of(model) for name, model in models.items()}
