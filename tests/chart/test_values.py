"""Values: what may be left out, what is refused and with which words, and that each does what it says, a 0 too."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.chart import (
    CI,
    CI_BAD,
    Place,
    Refused,
    at,
    dotted,
    leaves,
    over,
    render,
    rendered_anew,
    tells,
    values_of,
    where,
)
from support.chart_values import DEFAULTS, EVERY, GIVEN, NEEDED, TABLES, lost_zeros, numbers, values_with


def groups(node: Any = EVERY, path: Place = ()) -> Iterator[Place]:
    """Every group of values.yaml whose names are ours."""
    if isinstance(node, Mapping):
        if not path or path[-1] not in TABLES:
            yield path
        for name, value in node.items():
            if not path or path[-1] not in TABLES - {"gpu_classes"}:
                yield from groups(value, (*path, name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from groups(value, (*path, index))


def test_a_registry_and_a_bucket_are_all_that_is_needed() -> None:
    render(NEEDED)
    render({"image": NEEDED["image"], "s3": {"trial": {"enabled": True}}})
    for name, path in (("image", "image.registry"), ("s3", "s3.bucket")):
        with pytest.raises(Refused, match=re.escape(path)):
            render({other: value for other, value in NEEDED.items() if other != name})


@pytest.mark.parametrize("file", CI_BAD, ids=lambda file: file.stem)
def test_a_bad_value_is_refused_by_its_path_and_the_way_out(file: Path) -> None:
    first, *_ = file.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# expect: "), f"{file.name} must begin with `# expect: ` and a part of the message"
    with pytest.raises(Refused) as refused:
        render(file)
    told = str(refused.value)
    assert first.removeprefix("# expect: ") in told
    paths = re.findall(r"values: ([A-Za-z][\w.\[\]-]*)", told)
    paths += [path.replace("/", ".") for path in re.findall(r"at '/([^']*)'", told)]
    named = [path for path in paths if re.split(r"[.\[]", path)[0] in DEFAULTS]
    assert named or "at '': additional properties" in told, f"no value is named: {told}"


@pytest.mark.parametrize("path", groups(), ids=dotted)
def test_an_unknown_name_is_refused_at_every_level(path: Place) -> None:
    with pytest.raises(Refused) as refused:
        render(values_with((*path, "registryy"), "x"))
    told = str(refused.value)
    assert "registryy" in told
    assert tells(told, path)


@pytest.mark.parametrize(
    "path",
    [path for path, value in leaves(EVERY) if isinstance(value, (bool, int, float)) and not TABLES & {*path}],
    ids=dotted,
)
def test_a_string_is_no_number_and_no_switch(path: Place) -> None:
    with pytest.raises(Refused) as refused:
        render(values_with(path, "yes"))
    assert tells(str(refused.value), path)


@pytest.mark.parametrize("path", numbers(), ids=dotted)
def test_a_zero_stays_a_zero_or_is_refused(path: Place) -> None:
    """Each place that follows the value follows it down to 0, where a template's `default` would put something else."""
    told = refusal(values_with(path, 0))
    if told:
        assert tells(told, path[:-1])
    else:
        assert lost_zeros(path) == []


def refusal(values: Mapping[str, Any]) -> str:
    """Helm's message; empty where it renders."""
    try:
        render(values)
    except Refused as refused:
        return str(refused)
    return ""


def test_settings_go_through_as_they_are() -> None:
    config = {
        "model": {"source": "shapes", "num_inference_steps": 4},
        "encoder": {"min_replicas": 0, "num_cpus": 0, "redis": False},
        "cache": {"memory_bytes": 0},
        "diffusion": {"profile_s": 0, "replicas": 0, "step_cache": False, "drain_s": 1.5},
        "jobs": {"retry_backoff_s": 0, "max_queued_s": 1000000},
        "results": {"spool_bytes": 0},
    }
    told = render({**NEEDED, "config": config}).args
    for path, value in leaves(config):
        assert at(told, path) == value
        assert type(at(told, path)) is type(value) or isinstance(value, float), f"{path}: {at(told, path)!r}"


def test_nothing_is_drawn_by_chance_where_secrets_are_given() -> None:
    given = {name: GIVEN[name] for name in ("keys", "redis")}
    for file in CI:
        values = over(given, values_of(file))
        assert rendered_anew(values).manifests == rendered_anew(values).manifests, file.name


def test_chance_makes_nothing_but_secrets() -> None:
    one, two = rendered_anew(NEEDED), rendered_anew(NEEDED)
    differ = [a for a, b in zip(one.manifests, two.manifests, strict=True) if a != b]
    assert differ
    assert {each["kind"] for each in differ} == {"Secret"}


def test_common_labels_lie_on_everything_but_rays_pods() -> None:
    rendered = render(over(NEEDED, {"commonLabels": {"team": "pictures"}, "commonAnnotations": {"note": "ours"}}))
    for manifest in rendered.manifests:
        assert manifest["metadata"]["labels"]["team"] == "pictures", where(manifest)
        assert manifest["metadata"]["annotations"]["note"] == "ours", where(manifest)
    assert "pictures" not in str(rendered.cluster)
