"""What the settings say is served: the models, and the text encoders that they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.encoders.concepts import ConceptFolder
from serve.encoders.registry import Registry, register
from serve.errors import OperatorError
from serve.models import ModelFolder, resolve
from serve.placements import wanted_models
from serve.prompts.plan import Planner
from serve.settings.tree import Settings


@dataclass(frozen=True, slots=True)
class Catalog:
    """`models` by name, those that are drawn first, in the order of the settings.

    Owns: what was read of the folder of concepts.
    """

    models: dict[str, ModelFolder]
    registry: Registry
    concepts: ConceptFolder

    @property
    def drawn(self) -> Mapping[str, ModelFolder]:
        """The models that images are drawn with; the first is the one of an order that names none."""
        return {name: model for name, model in self.models.items() if model.denoiser is not None}

    def planners(self) -> dict[str, Planner]:
        """One for each model, by its name. Loads the tokenizers."""
        return {name: self.planner(name) for name in self.models}

    def planner(self, name: str) -> Planner:
        """Of the model of that name. Loads its tokenizers."""
        model = self.models[name]
        return Planner(model, self.registry.sources(name), self.concepts.of(model))


def open_catalog(settings: Settings) -> Catalog:
    """The same in every process, so that the same text gives the same units, whoever plans it.

    Fetches what is not here yet, checks it, and reads the encoders' weights where no note of their fingerprints is
    left. Raises OperatorError naming the setting.
    """
    models: dict[str, ModelFolder] = {}
    for setting, each, text_only in wanted_models(settings):
        model = resolve(each, settings.data_dir, text_only=text_only, setting=setting)
        if model.name in models:
            raise OperatorError(
                f"{setting}.name: another model is called {model.name} too; give one of them a name", f"{setting}.name"
            )
        models[model.name] = model
    concepts = ConceptFolder(settings.concept_folder)
    concepts.look()  # reads what is there now, before any request waits for it
    return Catalog(models, register(list(models.values()), settings), concepts)
