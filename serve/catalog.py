"""What the settings say is served: the models, and the text encoders that they read."""

from __future__ import annotations

from dataclasses import dataclass

from serve.encoders.registry import Registry, register
from serve.models import ModelFolder, resolve
from serve.prompts.plan import Planner
from serve.settings import Settings


@dataclass(frozen=True, slots=True)
class Catalog:
    """`models` by name; the first is the one that images are drawn with, where this server draws any."""

    models: dict[str, ModelFolder]
    registry: Registry

    @property
    def drawn(self) -> ModelFolder:
        return next(iter(self.models.values()))

    def planners(self) -> dict[str, Planner]:
        """One for each model, by its name. Loads the tokenizers."""
        return {name: Planner(model, self.registry.sources(name)) for name, model in self.models.items()}


def open_catalog(settings: Settings) -> Catalog:
    """The same in every process, so that the same text gives the same units, whoever plans it.

    Fetches what is not here yet, checks it, and reads the encoders' weights where no note of their fingerprints is
    left. Raises OperatorError naming the setting.
    """
    data_dir = settings.data_dir
    models = [resolve(settings.model, data_dir, text_only=settings.diffusion.replicas == 0)]
    for index, each in enumerate(settings.text_models):
        models.append(resolve(each, data_dir, text_only=True, setting=f"text_models.{index}"))
    return Catalog({model.name: model for model in models}, register(models, settings))
