"""Which models and cards `tandem plan` is asked about, and at which size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from serve.cli.plan_rows import Card, Model
from serve.errors import OperatorError
from serve.memory.cards import Found, NoDriver, cards_here
from serve.memory.classes import BUILT_IN, GpuClass
from serve.memory.shapes import published, shape_of
from serve.memory.sheets import with_speed
from serve.memory.terms import ModelShape
from serve.models import resolve
from serve.models.defaults import usual
from serve.models.denoiser import Guidance
from serve.models.folder import local_path
from serve.models.weight_files import PICKLED
from serve.settings.pools import GpuClassSettings, ModelSettings

_SAMPLERS = {"playground-v2.5": "EDMDPMSolverMultistepScheduler"}
"""By model, the published one's own, where its kind is told by it."""
_SIZE = re.compile(r"(\d{1,5})\s*[xX×]\s*(\d{1,5})")


def wanted_models(written: str | None, data_dir: Path = Path(), own: Sequence[ModelSettings] = ()) -> tuple[Model, ...]:
    """All published models by default; else their names, names of the settings' `own`, diffusers folders, checkpoints.

    A hub id is none of them: nothing is fetched for a plan. Raises OperatorError naming `models`.
    """
    known, named = published(), {each.name: each for each in own if each.name}
    found = []
    for name in _names(written, "models") or tuple(known):
        if name in named or name not in known:
            found.append(_of_source(named.get(name, ModelSettings(source=name)), data_dir))
        else:
            found.append(_published(known[name]))
    return tuple(found)


def wanted_cards(
    written: str | None, classes: Mapping[str, GpuClassSettings], *, from_nvidia_smi: bool
) -> tuple[Card, ...]:
    """The built-in classes by default, those of this machine where they are asked for. The settings' classes go before
    built-in ones of the same name. Raises OperatorError naming `classes` or `from-nvidia-smi`."""
    if from_nvidia_smi:
        if written is not None:
            raise OperatorError("--classes: the cards are read from nvidia-smi; name one or the other", "classes")
        return tuple(map(_of_found, _cards_here()))
    known = {**BUILT_IN, **{name: _of_settings(name, each) for name, each in classes.items()}}
    names = _names(written, "classes") or tuple(BUILT_IN)
    if unknown := [name for name in names if name not in known]:
        raise OperatorError(f"--classes: there is no class {unknown[0]}; there are {', '.join(known)}", "classes")
    return tuple(Card(gpu=known[name]) for name in names)


def wanted_size(written: str | None) -> tuple[int | None, int | None]:
    """Raises OperatorError naming `size`."""
    if written is None:
        return None, None
    if not (size := _SIZE.fullmatch(written.strip())):
        raise OperatorError(f"--size: {written} is no size like 1024x768", "size")
    return int(size[1]), int(size[2])


def _cards_here() -> tuple[Found, ...]:
    try:
        return cards_here()
    except OperatorError as error:
        more = "; name cards with --classes" if isinstance(error, NoDriver) else ""
        raise OperatorError(f"--from-nvidia-smi: {error.message}{more}", "from-nvidia-smi") from None


def _names(written: str | None, option: str) -> tuple[str, ...]:
    if written is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in written.split(",") if name.strip()))
    if not names:
        raise OperatorError(f"--{option}: nothing is named", option)
    return names


def _published(shape: ModelShape) -> Model:
    guidance: Guidance = (
        "classifier_free" if shape.guided else "embedded" if shape.denoiser.get("guidance_embeds") else "none"
    )
    own = usual(shape.name, shape.family, guidance, {"_class_name": _SAMPLERS.get(shape.name)})
    return Model(shape=shape, steps=_made(shape.family, own.num_inference_steps, own.strength))


def _of_source(said: ModelSettings, data_dir: Path) -> Model:
    source = said.source
    try:
        if source != "shapes" and not local_path(source).exists() and not source.endswith(PICKLED):
            raise OperatorError(f"{source} is neither a folder nor a file here, and none of {', '.join(published())}")
        folder = resolve(said, data_dir)
    except OperatorError as error:
        raise OperatorError(f"--models: {error.message.removeprefix('model.source: ')}", "models") from None
    own = folder.denoiser
    assert own is not None  # it was not resolved for its text alone
    steps = _made(folder.family, own.default_num_inference_steps, own.default_strength)
    return Model(shape=shape_of(folder), steps=steps)


def _made(family: str, steps: int, strength: float) -> int:
    """The steps of an order that names none: the refiner always starts from an image."""
    return max(1, int(steps * strength)) if family == "sdxl_refiner" else steps


def _of_settings(name: str, said: GpuClassSettings) -> GpuClass:
    """A class that is a built-in one by its name and memory has its speed too."""
    same = BUILT_IN.get(name)
    own = GpuClass(name=name, memory_gb=said.memory_gb, dtypes=said.dtypes)
    return replace(same, dtypes=said.dtypes) if same and same.memory_gb == said.memory_gb else own


def _of_found(found: Found) -> Card:
    own = GpuClass(name=found.name, memory_gb=found.memory_bytes / 1e9, dtypes=found.dtypes, like=found.name)
    return Card(gpu=with_speed(own), number=found.number)
