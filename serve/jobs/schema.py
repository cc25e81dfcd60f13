"""Two releases at one job Redis: which workers can draw an order as it was meant.

An order is logged with the lowest schema that has all that it makes use of, and a worker claims no order of a later
schema than its own: that waits for a worker of the release that wrote it. So while two releases run side by side, or
after the newer one was taken back, nothing is drawn without what its client asked for, and nothing fails for it.

Whoever changes an order keeps these rules, and a test holds them (`tests/unit/test_job_schema.py`):

- A field that is new has a default which means "as before", and stands in `fields` with the schema that it came with.
- So does a value that is new of an old field (a sampler, a syntax), in `values`.
- No field goes, or means something else: another meaning is another value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.domain.orders import ImageRequest

FIRST = 1
"""Of records that don't name any."""
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(ImageRequest)}


@dataclass(frozen=True, slots=True)
class Schema:
    """What a release knows of orders. `newest` is the latest schema that it reads; `fields` and `values`, as (field,
    value), are those that came after the first, with the schema that they came with."""

    newest: int = FIRST
    fields: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[tuple[str, object], int] = field(default_factory=dict)

    def of(self, request: ImageRequest) -> int:
        """The lowest schema that has all that the order makes use of."""
        used = [since for name, since in self.fields.items() if getattr(request, name) != _DEFAULTS[name]]
        used += [since for (name, value), since in self.values.items() if getattr(request, name) == value]
        return max(used, default=FIRST)


SCHEMA = Schema()
"""This release's."""
