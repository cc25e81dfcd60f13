"""The learned concepts of a folder: `<name>` in a prompt is `name.safetensors` there, in every process that sees it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from serve.encoders.concept_files import (
    NAME,
    SUFFIX,
    Vectors,
    fit,
    is_pickle,
    read_concept,
    refs,
    refuse_pickle,
)
from serve.errors import BackendUnavailable
from serve.models import ModelFolder
from serve.prompts.concepts import ConceptFault, ConceptRef

LOOK_S = 1.0
"""Between two looks at the folder, however many ask."""
REPLACED = 64
"""Vectors that are kept after their file was replaced or removed: orders that were planned before still read them."""

Stamp = tuple[str, int, int, int]
"""Suffix, time of change, size and inode: another file has another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptInfo:
    """`vectors` counts those of each role of the model, `widths` the numbers in one of them; `fault` says why the model
    can't use it, None where it can."""

    name: str
    vectors: Mapping[str, int]
    widths: Mapping[str, int] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class ConceptFile:
    """A file as it was at the last look: what it holds, or why that is not read."""

    stamp: Stamp
    concept: tuple[Vectors, ...] = ()
    fault: str | None = None


class ConceptFolder:
    """All concepts of a folder as they are now: a new or changed file needs no restart, only up to a second.

    A file is read once, when it is first seen. Where there is no folder, there are no concepts. Thread-safe.

    Owns: the vectors, by digest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._files: dict[str, ConceptFile] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._replaced: dict[str, torch.Tensor] = {}

    def of(self, model: ModelFolder) -> ModelConcepts:
        return ModelConcepts(self, model)

    def look(self) -> Mapping[str, ConceptFile]:
        """By name, as of at most LOOK_S ago. What is handed out never changes."""
        with self._lock:
            if self._looked is None or time.monotonic() - self._looked >= LOOK_S:
                self._look()
            return self._files

    def vectors(self, digests: Sequence[str]) -> torch.Tensor:
        """(n, width), float32 on the CPU: their vectors, one below the other. Digests come from a planner, and have one
        width. BackendUnavailable for one that no file has."""
        with self._lock:
            if any(self._kept(digest) is None for digest in digests):
                self._look()  # a planner has seen the file: we look at once
            found = [self._kept(digest) for digest in digests]
        here = [values for values in found if values is not None]
        if len(here) < len(found):
            raise BackendUnavailable("a concept of this text is gone, or has not come to this node yet", None, 1.0)
        return torch.cat(here)

    def _kept(self, digest: str) -> torch.Tensor | None:
        return self._vectors.get(digest, self._replaced.get(digest))

    def _look(self) -> None:
        self._looked = time.monotonic()
        seen = _entries(self._folder)
        known = self._files
        if {name: stamp for name, (_, stamp) in seen.items()} == {name: file.stamp for name, file in known.items()}:
            return
        self._files = {
            name: known[name] if name in known and known[name].stamp == stamp else _read(file, stamp)
            for name, (file, stamp) in seen.items()
        }
        now = {each.digest: each.values for file in self._files.values() for each in file.concept}
        self._replaced |= {digest: values for digest, values in self._vectors.items() if digest not in now}
        while len(self._replaced) > REPLACED:
            del self._replaced[next(iter(self._replaced))]
        self._vectors = now


class ModelConcepts:
    """The concepts as one model may use them: what its planner asks (`serve.prompts.concepts.Concepts`)."""

    def __init__(self, folder: ConceptFolder, model: ModelFolder) -> None:
        self._folder = folder
        self._model = model
        self._names: tuple[Mapping[str, ConceptFile] | None, frozenset[str]] = None, frozenset()

    def find(self, name: str) -> Mapping[str, ConceptRef] | None:
        """By role; a role that the file says nothing for is not there. None where no file has the name. Raises
        ConceptFault where this model can't use what is there."""
        file = self._folder.look().get(name)
        return None if file is None else refs(self._fitted(name, file))

    def names(self) -> frozenset[str]:
        """Of those that this model can use."""
        files = self._folder.look()
        if self._names[0] is not files:
            usable = frozenset(name for name, file in files.items() if self._info(name, file).fault is None)
            self._names = files, usable
        return self._names[1]

    def list(self) -> tuple[ConceptInfo, ...]:
        """All of the folder, by name, whether this model can use them or not."""
        return tuple(self._info(name, file) for name, file in sorted(self._folder.look().items()))

    def _info(self, name: str, file: ConceptFile) -> ConceptInfo:
        try:
            placed = self._fitted(name, file)
        except ConceptFault as fault:
            return ConceptInfo(name=name, vectors={}, fault=str(fault))
        counts = {role: ref.vectors for role, ref in refs(placed).items()}
        return ConceptInfo(name=name, vectors=counts, widths={role: each.width for role, each in placed.items()})

    def _fitted(self, name: str, file: ConceptFile) -> dict[str, Vectors]:
        if file.fault is not None:
            raise ConceptFault(f"<{name}>: {file.fault}")
        return fit(name, file.concept, self._model)


def _entries(folder: Path) -> dict[str, tuple[Path, Stamp]]:
    """Name -> file and stamp. A pickle counts only where no safetensors file has its name."""
    found: dict[str, tuple[Path, Stamp]] = {}
    try:
        with os.scandir(folder) as entries:
            files = [(Path(entry.path), entry) for entry in entries]
    except OSError:  # none yet, or none that may be read: no name is known then
        return {}
    for file, entry in sorted(files, key=lambda each: (each[0].suffix != SUFFIX, each[0].name)):
        if not NAME.fullmatch(file.stem) or file.stem in found or not (file.suffix == SUFFIX or is_pickle(file)):
            continue
        with suppress(OSError):  # removed meanwhile
            if entry.is_file():
                stat = entry.stat()
                found[file.stem] = file, (file.suffix, stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return found


def _read(file: Path, stamp: Stamp) -> ConceptFile:
    try:
        if is_pickle(file):
            raise refuse_pickle(file)
        return ConceptFile(stamp, read_concept(file))
    except ConceptFault as fault:
        return ConceptFile(stamp, fault=str(fault))
