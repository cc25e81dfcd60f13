"""A1111's names of samplers, and ours."""

import pytest

from serve.errors import InvalidRequest
from serve.models.a1111 import ALIASES, labelled, labels, sampler_named, schedules
from serve.models.samplers import SAMPLERS, Process, sampler_names

PROCESSES: tuple[Process, ...] = ("diffusion", "flow", "edm")
DIFFUSION, FLOW = sampler_names("diffusion"), sampler_names("flow")


@pytest.mark.parametrize("process", PROCESSES)
def test_each_sampler_is_found_by_what_its_pictures_call_it(process: Process) -> None:
    names = sampler_names(process)
    for name in names:
        label, schedule = labels(name)
        assert sampler_named(names, label, schedule) == name
        assert sampler_named(names, label.upper(), (schedule or "automatic").upper()) == name
        assert sampler_named(names, name, None) == name
        assert sampler_named(names, SAMPLERS[name].label, schedule) == name
        if schedule is not None:
            assert sampler_named(names, f"{label} {schedule}", "Automatic") == name


def test_automatic_is_what_it_is_in_a1111() -> None:
    assert sampler_named(DIFFUSION, "DPM++ 2M", "Automatic") == "dpmpp_2m_karras"
    assert sampler_named(DIFFUSION, "DPM++ 2M", "Uniform") == "dpmpp_2m"
    assert sampler_named(DIFFUSION, "Euler", None) == "euler"
    assert sampler_named(DIFFUSION, "Euler a", "automatic") == "euler_a"
    assert sampler_named(DIFFUSION, "DDIM", "Karras") == "ddim"
    assert sampler_named(FLOW, "Euler", "Simple") == "flow_euler"
    assert sampler_named(sampler_names("edm"), "DPM++ 2M", "") == "edm_dpmpp_2m"


def test_an_order_that_names_none_gets_the_models_own() -> None:
    for nothing in (None, ""):
        assert sampler_named(DIFFUSION, nothing, nothing) is None
        assert sampler_named(DIFFUSION, nothing, "Automatic") is None
    assert sampler_named(DIFFUSION, None, "Karras") == "euler_karras"


def test_aliases_mean_their_labels() -> None:
    for label, aliases in ALIASES.items():
        for alias in aliases:
            assert sampler_named(DIFFUSION, alias, None) == sampler_named(DIFFUSION, label, None)


@pytest.mark.parametrize(
    ("names", "sampler", "scheduler", "param", "told"),
    [
        (DIFFUSION, "DPM fast", None, "sampler_name", "Euler a"),
        (FLOW, "Euler a", "Automatic", "sampler_name", "this model has Euler, Heun"),
        (DIFFUSION, "Euler a", "Karras", "scheduler", "with Euler a there is Automatic, Uniform"),
        (DIFFUSION, "DPM++ 2M", "Exponential", "scheduler", "Automatic, Uniform, Karras"),
        (DIFFUSION, "Euler a Karras", None, "scheduler", "with Euler a"),
        (FLOW, "Euler", "Karras", "scheduler", "Uniform, Simple"),
    ],
)
def test_what_there_is_not_is_refused(
    names: tuple[str, ...], sampler: str, scheduler: str | None, param: str, told: str
) -> None:
    with pytest.raises(InvalidRequest, match=param) as refused:
        sampler_named(names, sampler, scheduler)
    assert refused.value.param == param
    assert told in refused.value.message


def test_whatever_is_listed_is_taken() -> None:
    for process in PROCESSES:
        names = sampler_names(process)
        for each in labelled(names):
            found = sampler_named(names, each.label, None)
            assert found in names
            if each.schedule is not None:
                assert sampler_named(names, each.label, each.schedule) == found
    assert [each.label for each in labelled(FLOW)] == ["Euler", "Heun"]
    assert schedules(DIFFUSION) == ("Automatic", "Uniform", "Karras")
    assert schedules(FLOW) == ("Automatic", "Uniform", "Simple")
    assert schedules(()) == ("Automatic",)
