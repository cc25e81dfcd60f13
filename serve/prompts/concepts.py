"""What a planner asks of concepts, which were learned by textual inversion. The files are `serve.encoders.concepts`'.

Which vectors a name stands for depends on the model: each of its text encoders has a width of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ConceptRef:
    """Vectors of one concept for one encoder: `digest` names them in unit keys, `vectors` is how many there are."""

    digest: str
    vectors: int


class ConceptFault(ValueError):
    """The concept can't be used with this model; its text says why, fit for the client."""


class Concepts(Protocol):
    """The concepts of one model."""

    def find(self, name: str) -> Mapping[str, ConceptRef] | None:
        """By role; a role that the file has no vectors for is not in it, and reads nothing in the concept's place.

        None where no file defines the name. Raises ConceptFault.
        """

    def names(self) -> frozenset[str]:
        """Of those that this model can use: what a bare word is held against. Cheap."""


class NoConcepts:
    """Of a planner that was given none."""

    def find(self, name: str) -> Mapping[str, ConceptRef] | None:
        return None

    def names(self) -> frozenset[str]:
        return frozenset()
