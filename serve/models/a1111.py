"""Samplers by the names that A1111's web UI and its clients use: a sampler, and a schedule type beside it.

Until its version 1.9 both stood in one name ("DPM++ 2M Karras"), which is still understood everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.errors import InvalidRequest
from serve.models.samplers import SAMPLERS, Process

AUTOMATIC, UNIFORM, KARRAS, SIMPLE = "Automatic", "Uniform", "Karras", "Simple"
ALIASES: Mapping[str, tuple[str, ...]] = {
    "Euler a": ("k_euler_a", "k_euler_ancestral"),
    "Euler": ("k_euler",),
    "Heun": ("k_heun",),
    "DPM2": ("k_dpm_2",),
    "DPM2 a": ("k_dpm_2_a",),
    "DPM++ 2M": ("k_dpmpp_2m",),
    "DPM++ 2M SDE": ("k_dpmpp_2m_sde",),
    "DDIM": ("ddim",),
    "PLMS": ("plms",),
    "UniPC": ("unipc",),
}
"""By label."""

_KARRAS_BY_DEFAULT = ("DPM++ 2M", "DPM++ 2M SDE")
"""What `Automatic` is for them: for the former as in A1111, for the latter the nearest that there is to it."""
_NO_SCHEDULE = ("DDIM", "PLMS")
"""A1111 passes over the schedule type that is asked of them."""
_DEFAULT = "Euler"
"""A1111's sampler where an order names none, but a schedule type."""
_PLAIN: Mapping[Process, tuple[str, ...]] = {"diffusion": (UNIFORM,), "flow": (UNIFORM, SIMPLE), "edm": (KARRAS,)}
"""What a sampler without a schedule type of its own goes by, for models of that kind."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A sampler as A1111 lists it. `schedule` is what `Automatic` comes to, None where that says nothing more."""

    label: str
    aliases: tuple[str, ...]
    schedule: str | None
    second_order: bool


def labels(name: str) -> tuple[str, str | None]:
    """A sampler of ours -> A1111's sampler and schedule type, None where its `Automatic` means the same."""
    label = SAMPLERS[name].label
    if label.endswith(f" {KARRAS}"):
        return label.removesuffix(f" {KARRAS}"), KARRAS
    spaced = label in _KARRAS_BY_DEFAULT and SAMPLERS[name].process == "diffusion"
    return label, UNIFORM if spaced else None


def labelled(names: Sequence[str]) -> tuple[Labelled, ...]:
    """These samplers of ours as A1111 lists them, each label once."""
    found: dict[str, Labelled] = {}
    for name in names:
        label, _ = labels(name)
        default = KARRAS if label in _KARRAS_BY_DEFAULT else None
        found.setdefault(label, Labelled(label, ALIASES.get(label, ()), default, SAMPLERS[name].order == 2))
    return tuple(found.values())


def schedules(names: Sequence[str]) -> tuple[str, ...]:
    """The schedule types that these samplers know, `Automatic` first."""
    known = {schedule for name in names for schedule in (labels(name)[1], *_PLAIN[SAMPLERS[name].process])}
    return (AUTOMATIC, *(each for each in (UNIFORM, KARRAS, SIMPLE) if each in known))


def sampler_named(names: Sequence[str], sampler: str | None, scheduler: str | None) -> str | None:
    """A1111's `sampler_name` and `scheduler` -> one of `names`, which are those of a model; None, the model's own,
    where neither says anything.

    Labels are read whatever their case, and A1111's aliases, both names in one, and our own names. Raises
    InvalidRequest, which says what there is.
    """
    kinds = _kinds(names)
    wanted, schedule = _read(names, (sampler or "").strip().lower())
    asked = (scheduler or "").strip().lower()
    if asked not in ("", AUTOMATIC.lower()):
        schedule = asked
    if not wanted and schedule is None:
        return None
    wanted = wanted or _DEFAULT.lower()
    label = next((each for each in kinds if wanted in (each.lower(), *ALIASES.get(each, ()))), None)
    if label is None:
        raise InvalidRequest(f"sampler_name: this model has {', '.join(kinds)}", "sampler_name")
    return _chosen(label, kinds[label], None if label in _NO_SCHEDULE else schedule)


def _chosen(label: str, kinds: Mapping[str, str], schedule: str | None) -> str:
    """Of the samplers of a label, by schedule type in small letters."""
    name = kinds[""]
    if schedule is None:
        return kinds.get(KARRAS.lower(), name) if label in _KARRAS_BY_DEFAULT else name
    plain = _PLAIN[SAMPLERS[name].process]
    if schedule not in kinds and schedule not in map(str.lower, plain):
        known = [AUTOMATIC, *plain, *([KARRAS] if KARRAS.lower() in kinds else [])]
        raise InvalidRequest(f"scheduler: with {label} there is {', '.join(known)}", "scheduler")
    return kinds.get(schedule, name)


def _kinds(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Our names by A1111's label, and by schedule type in small letters: "" for the plain one, which each label has."""
    kinds: dict[str, dict[str, str]] = {}
    for name in names:
        label, schedule = labels(name)
        kinds.setdefault(label, {})["" if schedule in (None, UNIFORM) else str(schedule).lower()] = name
    return kinds


def _read(names: Sequence[str], text: str) -> tuple[str, str | None]:
    """The label, in small letters, and the schedule type that stands in the sampler's name."""
    if text in names:
        label, schedule = labels(text)
        return label.lower(), schedule and schedule.lower()
    for schedule in (KARRAS, UNIFORM, SIMPLE):
        if text.endswith(f" {schedule.lower()}"):
            return text.removesuffix(f" {schedule.lower()}").strip(), schedule.lower()
    return text, None
