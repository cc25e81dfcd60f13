"""The models' files and the learned concepts: whole, safe to load, and the same ones for every replica. No weights are
loaded, nothing is fetched or converted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from serve.doctor.findings import Finding, fault, ok, refused, warning
from serve.errors import OperatorError
from serve.models import ModelFolder, resolve
from serve.models.weight_files import NotHereYet
from serve.placements import wanted_models
from serve.settings.tree import Settings

_CURE = "mend the files or the setting: a whole diffusers folder or checkpoint in safetensors, a hub id at a commit"


def check_models(settings: Settings) -> tuple[list[Finding], dict[str, ModelFolder]]:
    """And the models that are whole here, by name, in the settings' order."""
    found: list[Finding] = []
    models: dict[str, ModelFolder] = {}
    for setting, said, text_only in wanted_models(settings):
        try:
            model = resolve(said, settings.data_dir, text_only=text_only, setting=setting, here_only=True)
        except NotHereYet as error:
            place = f"{setting}.source"
            told = error.message.removeprefix(f"{place}: ")
            cure = "`tandem fetch` with these settings, so that no server's start waits for it"
            found.append(warning("model-not-here", place, told, cure))
            continue
        except OperatorError as error:
            found.append(refused("model-files", error, _CURE))
            continue
        if model.name in models:
            told = f"another model is called {model.name} too"
            found.append(fault("model-names", f"{setting}.name", told, "give one of them a name"))
            continue
        models[model.name] = model
        what = "text alone" if model.denoiser is None else "whole"
        found.append(ok("model-files", f"{setting}.source", f"{model.name}: {model.family}, {what}, {model.path}"))
    found += _captions(settings)
    return found, models


def _captions(settings: Settings) -> Iterator[Finding]:
    if not settings.captions.source:
        return
    from serve.models.captioner import captioner_of  # brings transformers

    try:
        captioner_of(settings.captions)
    except OperatorError as error:
        yield refused("model-files", error, _CURE)
    else:
        told = f"{settings.captions.model}: describes pictures, {settings.captions.source}"
        yield ok("model-files", "captions.source", told)


def check_concepts(settings: Settings, models: Mapping[str, ModelFolder]) -> list[Finding]:
    """Of the folder, by each model: a file that none of them can use is told, with the reason of the last."""
    folder = settings.concept_folder
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and settings.concepts.folder is None:
            return []
        told, cure = f"{folder}: {error.strerror}; no prompt knows any <name>", "make it, mount it, or leave it open"
        return [warning("concepts-away", "concepts.folder", told, cure)]
    if empty or not models:
        return []
    from serve.encoders.concepts import ConceptFolder  # brings torch

    files = ConceptFolder(folder)
    faults: dict[str, str | None] = {}
    for model in models.values():
        for info in files.of(model).list():
            faults[info.name] = info.fault and faults.get(info.name, info.fault)
    unusable = [
        warning("concept-unusable", "concepts.folder", why, "a safetensors file of a model that is served")
        for why in faults.values()
        if why is not None
    ]
    return unusable or [ok("concepts", "concepts.folder", f"{folder}: {len(faults)} concepts, each of use")]
