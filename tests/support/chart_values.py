"""Values with everything on, and what follows each number in them: a 0 must come through as a 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.chart import CHART, Place, Rendered, dotted, leaves, over, put, render, values_of, where

DEFAULTS = values_of(CHART / "values.yaml")
NEEDED = {"image": {"registry": "ghcr.io/acme"}, "s3": {"bucket": "pictures"}}
GIVEN = {
    "redis": {"existingSecret": "made-redis"},
    "keys": {"existingSecret": "made-key"},
    "s3": {"existingSecret": "made-s3"},
}
"""What a render that can't look into the cluster needs, to be the same each time."""
TABLES = {
    "commonLabels", "commonAnnotations", "labels", "annotations", "nodeSelector", "affinity", "placements",
    "gpu_classes", "encoders", "templates", "arms", "podSecurityContext", "containerSecurityContext", "seccompProfile",
    "capabilities",
}  # fmt: skip
"""Groups whose names are the operator's own, or Kubernetes'."""
FULL = over(
    over(NEEDED, GIVEN),
    {
        "config": {"diffusion": {"drain_s": 60}},
        "ray": {"upgrade": {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "envoy"}},
        "workerGroups": [{**group, "min": 600, "max": 900} for group in DEFAULTS["workerGroups"][:2]],
        "weights": {"enabled": True},
        "prePull": {"enabled": True},
        "tests": {"enabled": False},
        "monitoring": {
            "podMonitor": {"enabled": True},
            "rules": {"enabled": True},
            "dashboards": {"enabled": True},
        },
    },
)
"""Everything on that can be on at once, nothing drawn by chance."""
EVERY = over(DEFAULTS, {"workerGroups": FULL["workerGroups"]})
"""Where every value has its place."""
PROBES: dict[str, tuple[float, float]] = {
    "maxSurgePercent": (98, 99),
    "stepSizePercent": (97, 98),
    "gpus": (13, 14),
    "min": (577, 578),
    "minAvailable": (577, 578),
    "lt": (9977, 9978),
    "cacheHitRatio": (0.77, 0.78),
    "failedRatio": (0.77, 0.78),
    "serverErrorRatio": (0.77, 0.78),
}
"""Two values that a number may have where 977 and 978 are out of its bounds."""
BESIDE: dict[str, tuple[Place, Any]] = {
    "workerGroups.0.gpus": (("workerGroups", 0, "nodeSelector"), {"pool": "gpu"}),
    "ray.upgrade.maxSurgePercent": (("ray", "upgrade", "stepSizePercent"), 0),
}
"""What else has to be changed for a value to have all of (first, second, 0)."""
GONE_AT_ZERO = {
    "podDisruptionBudget.minAvailable": "an eviction that leaves none needs no budget",
    "workerGroups.0.gpus": "no GPU is no reservation of one",
    "workerGroups.1.gpus": "no GPU is no reservation of one",
    "workerGroups.0.priority": "it is KubeRay's own default",
    "workerDefaults.priority": "it is KubeRay's own default",
}
PRELOAD = re.compile(r"preload-[0-9a-f]{7}")
UNSET: tuple[Place, ...] = (("workerDefaults", "idle"), ("workerGroups", 0, "idle"), ("workerGroups", 0, "priority"))
"""Numbers that values.yaml leaves open."""


def numbers() -> Iterator[Place]:
    """Where values.yaml has a number, or leaves one open."""
    for path, value in leaves(EVERY):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield path
    yield from UNSET


def values_with(path: Place, value: Any) -> dict[str, Any]:
    """FULL and the lists of values.yaml with one value put in."""
    base = over({name: each for name, each in DEFAULTS.items() if isinstance(each, list)}, FULL)
    beside = BESIDE.get(dotted(path))
    if beside is not None:
        base = put(base, *beside)
    if path[0] == "workerGroups" and path[-1] == "max":
        base = put(base, (*path[:-1], "min"), 0)
    return put(base, path, value)


def lost_zeros(path: Place, chart: Path = CHART) -> list[str]:
    first, second = PROBES.get(str(path[-1]), (977, 978))
    one, two, zero = (_texts(render(values_with(path, value), chart=chart)) for value in (first, second, 0))
    places = [place for place in one if one[place] != two.get(place)]
    if not places:
        return [f"{dotted(path)}: nothing follows it"]
    faults = []
    for place in places:
        assert _replaced(one[place], first, second) == two.get(place), f"{place} follows {dotted(path)} in another way"
        if place not in zero and dotted(path) in GONE_AT_ZERO:
            continue
        if zero.get(place) != _replaced(one[place], first, 0):
            faults.append(f"{dotted(path)}: 0 is lost at {place}: {str(zero.get(place, 'nothing'))[:80]}")
    return faults


def _texts(rendered: Rendered) -> dict[str, str]:
    """Every leaf as text, by where it stands. The preload Job's name follows everything that the Job is made of."""
    return {
        f"{PRELOAD.sub('preload', where(manifest))} {dotted(path)}": PRELOAD.sub("preload", str(value))
        for manifest in rendered.manifests
        for path, value in leaves(manifest)
    }


def _replaced(text: str, old: float, new: float) -> str:
    return re.sub(rf"(?<![\w.]){re.escape(str(old))}(?![\w.])", str(new), text)
