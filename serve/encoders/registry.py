"""Which text encoders are served, and which models read which of them: one encoder per weights, not per model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from serve.encoders.unit import fingerprint, projection_id
from serve.errors import OperatorError
from serve.models import ModelFolder, TextPart
from serve.models.weight_files import naming
from serve.origins import reason_of
from serve.prompts.families import READS
from serve.prompts.plan import Source
from serve.settings.pools import EncoderSettings
from serve.settings.tree import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One text encoder as it is served: one set of weights in one precision, shared by all models that have it.

    `name` is unique here and fit for a deployment's name: the architecture's, with the first digits of the fingerprint
    where several encoders share it. The trunk is loaded from `part`; `projections` are (id, part whose file has it).
    `outputs` are all that the served models read by default: one forward gives all of them. `overrides` are (field,
    group) of the settings that come from a group of `encoders` (`encoders.t5-xxl`), not from `encoder`.
    """

    name: str
    fingerprint: str
    part: TextPart
    projections: tuple[tuple[str, TextPart], ...]
    outputs: tuple[str, ...]
    settings: EncoderSettings
    models: tuple[str, ...]
    overrides: tuple[tuple[str, str], ...] = ()

    def setting(self, option: str) -> str:
        """The dotted name under which a field of `settings` is set: `encoder.dtype`, or `encoders.t5-xxl.dtype`."""
        return f"{dict(self.overrides).get(option, 'encoder')}.{option}"


@dataclass(frozen=True, slots=True)
class Registry:
    """The encoders, in the order in which the models name them. `readers` has each model's sources by role."""

    encoders: tuple[Encoder, ...]
    readers: Mapping[str, Mapping[str, Source]]

    def sources(self, model: str) -> Mapping[str, Source]:
        """What a planner of `model` needs, by role. Raises KeyError."""
        return self.readers[model]

    def named(self, name: str) -> Encoder:
        """Raises KeyError."""
        for encoder in self.encoders:
            if encoder.name == name:
                return encoder
        raise KeyError(name)


@dataclass(slots=True)
class _Group:
    """Parts with one trunk, while they are being collected."""

    fingerprint: str
    part: TextPart
    projections: dict[str, TextPart] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    models: dict[str, None] = field(default_factory=dict)


def register(models: Sequence[ModelFolder], settings: Settings) -> Registry:
    """Group the models' text encoders by their weights. Reads all of them where no note of their fingerprint is left.

    Raises OperatorError that names `text_models` where two models have one name, `encoders` where an override fits no
    encoder or would part what its architecture's settings made one, and a model's `source` where its files are broken.
    """
    groups: dict[str, _Group] = {}
    placed: list[tuple[ModelFolder, TextPart, _Group, str | None]] = []
    for model in models:
        for part in model.text:
            group, projection = _join(groups, model, part, settings)
            placed.append((model, part, group, projection))
    names = _names(groups.values())
    _check_overrides(settings, groups.values(), names)
    _tell_parted(groups.values(), settings)
    encoders = tuple(_encoder(group, names[group.fingerprint], settings) for group in groups.values())
    readers: dict[str, dict[str, Source]] = {model.name: {} for model in models}
    if len(readers) < len(models):
        twice = next(name for name in readers if sum(model.name == name for model in models) > 1)
        raise OperatorError(f"text_models: two models are called {twice}; give one of them a name", "text_models")
    for model, part, group, projection in placed:
        readers[model.name][part.role] = Source(
            fingerprint=group.fingerprint, name=names[group.fingerprint], part=part, projection=projection
        )
    return Registry(encoders, readers)


def _join(
    groups: dict[str, _Group], model: ModelFolder, part: TextPart, settings: Settings
) -> tuple[_Group, str | None]:
    """Put the part into the group of its trunk; its group, and the id of its text projection."""
    own = _settings(settings, part.name)
    reads = READS[model.family][part.role]
    with naming(part.setting):
        trunk = fingerprint(part, own.dtype, own.quantization, settings.data_dir)
        projection = projection_id(part, own.dtype) if "projected" in reads else None
    group = groups.setdefault(trunk, _Group(trunk, part))
    group.models[model.name] = None
    if projection is not None:
        group.projections.setdefault(projection, part)
    group.outputs |= {f"projected:{projection}" if output == "projected" else output for output in reads}
    return group, projection


def _names(groups: Iterable[_Group]) -> dict[str, str]:
    """Fingerprint -> unique name. As many digits as it takes, at least 6."""
    names: dict[str, str] = {}
    by_name: dict[str, list[str]] = {}
    for group in groups:
        by_name.setdefault(group.part.name, []).append(group.fingerprint)
    for name, prints in by_name.items():
        if len(prints) == 1:
            names[prints[0]] = name
            continue
        digits = next(count for count in range(6, 33) if len({each[:count] for each in prints}) == len(prints))
        names |= {each: f"{name}-{each[:digits]}" for each in prints}
    return names


def _encoder(group: _Group, name: str, settings: Settings) -> Encoder:
    groups = dict.fromkeys((group.part.name, name))  # the last says most
    overrides = {field: f"encoders.{each}" for each in groups for field in settings.encoders.get(each, {})}
    return Encoder(
        name=name,
        fingerprint=group.fingerprint,
        part=group.part,
        projections=tuple(sorted(group.projections.items(), key=lambda pair: pair[0])),
        outputs=tuple(sorted(group.outputs)),
        settings=_special(settings, group.part.name, name),
        models=tuple(group.models),
        overrides=tuple(overrides.items()),
    )


def _special(settings: Settings, shared: str, name: str) -> EncoderSettings:
    """`encoder`, over it what `encoders` says of the architecture's name, over that what it says of the unique one."""
    own, special = _settings(settings, shared), _settings(settings, *dict.fromkeys((shared, name)))
    for option in ("dtype", "quantization"):
        if getattr(special, option) != getattr(own, option):
            raise OperatorError(
                f"encoders.{name}: {option} decides which weights are equal; set it for {shared}", f"encoders.{name}"
            )
    return special


def _settings(settings: Settings, *names: str) -> EncoderSettings:
    """What the groups of `encoders` say together, the last over the others."""
    try:
        return settings.encoder_named(*names)
    except ValidationError as error:
        *others, last = (f"encoders.{name}" for name in names if name in settings.encoders)
        rest = f" (with what {' and '.join(others)} says)" if others else ""
        raise OperatorError(f"{last}: {reason_of(error.errors(include_url=False)[0])}{rest}", last) from None


def _check_overrides(settings: Settings, groups: Iterable[_Group], names: Mapping[str, str]) -> None:
    known = {group.part.name for group in groups} | set(names.values())
    for name in settings.encoders:
        if name not in known:
            raise OperatorError(
                f"encoders.{name}: no model has this encoder; there are {', '.join(sorted(known))}", f"encoders.{name}"
            )


def _tell_parted(groups: Iterable[_Group], settings: Settings) -> None:
    """Say which models don't share an encoder though they have the same architecture: nobody sees it otherwise."""
    by_name: dict[str, list[_Group]] = {}
    for group in groups:
        by_name.setdefault(group.part.name, []).append(group)
    for name, parted in by_name.items():
        if len(parted) > 1:
            dtype = settings.encoder_named(name).dtype
            advice = "; float16 or bfloat16 may make them one" if dtype == "float32" else ""
            models = "; ".join(", ".join(group.models) for group in parted)
            log.info(
                f"{name} is {len(parted)} encoders in {dtype} (models {models}): their weights differ{advice}",
                extra={"encoder": name},
            )
