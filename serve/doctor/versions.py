"""Python and the packages: what this version needs, and what it was tested with where that is known."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from serve import __version__
from serve.doctor.findings import Finding, fault, ok, warning
from serve.settings.tree import Settings

PACKAGE = "tandem-serve"
PINS = Path(__file__).parents[2] / "constraints.txt"
"""Of a checkout; a wheel has none."""
SHOWN = ("ray", "torch", "diffusers", "transformers", "redis")
_CURE = "install tandem-serve anew, with constraints.txt: `pip install -c constraints.txt tandem-serve`"


def check_versions(settings: Settings) -> list[Finding]:
    """Of this process: on a cluster every node's image must have the same."""
    own = distribution(PACKAGE)
    found = [*_python(own.metadata["Requires-Python"]), *against(own.requires or (), _pins(PINS))]
    found += _quantization(settings)
    told = ", ".join(f"{name} {version(name)}" for name in SHOWN if _installed(name))
    return found or [ok("versions", "python", f"Tandem {__version__}, Python {platform.python_version()}, {told}")]


def against(requirements: Iterable[str], pins: Mapping[str, str]) -> Iterator[Finding]:
    """`requirements` as packaging writes them, those of extras left out; `pins` by normal name."""
    for line in requirements:
        needs = Requirement(line)
        if needs.marker is None or needs.marker.evaluate({"extra": ""}):
            yield from _package(needs, pins)


def _python(needs: str) -> Iterator[Finding]:
    here = platform.python_version()
    if here not in Requirement(f"python{needs}").specifier:
        yield fault("version-python", "python", f"this is Python {here}; {needs} is needed", "another interpreter")


def _package(needs: Requirement, pins: Mapping[str, str]) -> Iterator[Finding]:
    here = _installed(needs.name)
    if here is None:
        yield fault("version-package", "python", f"the package {needs.name} is not installed", _CURE)
    elif not needs.specifier.contains(here, prereleases=True):
        yield fault("version-package", "python", f"{needs.name} is {here}; {needs.specifier} is needed", _CURE)
    elif (pin := pins.get(_name(needs.name))) is not None and Version(here).public != pin:
        told = f"{needs.name} is {here}; this version was tested with {pin}"
        yield warning("version-untested", "python", told, _CURE)


def _quantization(settings: Settings) -> Iterator[Finding]:
    if _installed("bitsandbytes") is not None:
        return
    wanting = [("encoder", settings.encoder.quantization)]
    wanting += [(f"encoders.{name}", each.get("quantization", "none")) for name, each in settings.encoders.items()]
    for room, quantization in wanting:
        if quantization != "none":
            told = f"{quantization} needs the package bitsandbytes"
            cure = "pip install 'tandem-serve[quantization]'"
            yield fault("version-bitsandbytes", f"{room}.quantization", told, cure)


def _pins(file: Path) -> dict[str, str]:
    """Name -> version, of the lines `name==version`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {_name(name): pinned.strip() for name, _, pinned in pairs if pinned}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _name(written: str) -> str:
    return re.sub(r"[-_.]+", "-", written.strip()).lower()
