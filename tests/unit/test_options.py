"""A1111's options and styles, so far as they mean something here."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ClientError, InvalidRequest, ModelNotFound
from serve.options import Options, Style, changed, kept, model_named, read, styled, styles_of
from serve.settings.orders import ArmSettings, TemplateSettings

MODELS = ("shapes", "sd 1.5")


def test_only_what_is_given_is_changed_and_what_there_is_not_is_passed_over() -> None:
    given = {"CLIP_stop_at_last_layers": 2, "samples_format": "jpg", "eta_noise_seed_delta": 31337}
    assert read(given, MODELS) == {"CLIP_stop_at_last_layers": 2, "samples_format": "jpeg"}
    before = Options(jpeg_quality=50, CLIP_stop_at_last_layers=3)
    assert changed(before, given, MODELS) == Options(jpeg_quality=50, CLIP_stop_at_last_layers=2, samples_format="jpeg")


def test_null_sets_an_option_back() -> None:
    assert changed(Options(jpeg_quality=50), {"jpeg_quality": None}, MODELS) == Options()
    chosen = Options(sd_model_checkpoint="shapes")
    assert changed(chosen, {"sd_model_checkpoint": ""}, MODELS).sd_model_checkpoint is None


@pytest.mark.parametrize(
    "given",
    [
        {"CLIP_stop_at_last_layers": 0},
        {"CLIP_stop_at_last_layers": 13},
        {"CLIP_stop_at_last_layers": "two"},
        {"samples_format": "gif"},
        {"samples_format": ["png"]},
        {"jpeg_quality": 101},
        {"show_progress_every_n_steps": 1.5},
        {"live_previews_enable": "perhaps"},
        {"sd_model_checkpoint": 1},
        {"sd_model_checkpoint": "x" * 513},
        {"sd_model_checkpoint": "v1-5-pruned.safetensors"},
    ],
)
def test_a_wrong_value_names_its_option(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises((InvalidRequest, ModelNotFound)) as refused:
        read(given, MODELS, "override_settings.")
    assert refused.value.param == f"override_settings.{name}"
    assert refused.value.message.startswith(f"override_settings.{name}: ")


@pytest.mark.parametrize(
    "title", ["shapes", "shapes.safetensors", "shapes.ckpt", "shapes [6ce0161689]", "shapes.safetensors [6ce0161689]"]
)
def test_a_model_by_its_title(title: str) -> None:
    assert model_named(title, MODELS) == "shapes"


def test_a_model_that_there_is_not() -> None:
    with pytest.raises(ModelNotFound, match=r"there are: shapes, sd 1\.5") as refused:
        model_named("shapes [x]", MODELS)
    assert refused.value.param == "sd_model_checkpoint"
    assert model_named("sd 1.5", MODELS) == "sd 1.5"


def test_what_was_kept_by_another_version_does_no_harm() -> None:
    values = {"sd_model_checkpoint": "gone", "jpeg_quality": 1000, "CLIP_stop_at_last_layers": 2, "other": [1]}
    assert kept(values, MODELS) == Options(CLIP_stop_at_last_layers=2)


names = st.sampled_from([*Options.__dataclass_fields__, "other"])
values = st.none() | st.booleans() | st.integers(-2, 200) | st.sampled_from(["png", "shapes", "", "x"]) | st.text()


@given(st.dictionaries(names, values))
def test_whatever_is_given_is_read_or_refused(given: dict[str, Any]) -> None:
    told = None
    with contextlib.suppress(ClientError):
        told = read(given, MODELS)
    if told is None:
        with pytest.raises(ClientError) as refused:
            changed(Options(), given, MODELS)
        assert refused.value.param in given
    else:
        assert kept(told, MODELS) == changed(Options(), given, MODELS)


TEMPLATES = {
    "oil": TemplateSettings(text="an oil painting of {prompt}", negative_prompt="photo"),
    "calm": TemplateSettings(text="calm, {soft|warm} light"),
    "portrait": TemplateSettings(text="a portrait of {subject}"),
    "no": TemplateSettings(text="{prompt}", negative_prompt="{what}"),
    "arms": TemplateSettings(arms={"a": ArmSettings(text="{prompt}")}),
    "compel": TemplateSettings(text="{prompt}++", syntax="compel"),
}


def test_styles_are_the_templates_that_need_only_a_prompt() -> None:
    assert styles_of(TEMPLATES) == {
        "oil": Style("oil", "an oil painting of {prompt}", "photo"),
        "calm": Style("calm", "calm, {soft|warm} light", ""),
    }


def test_styles_go_around_the_prompt_or_behind_it() -> None:
    oil, calm = styles_of(TEMPLATES).values()
    assert styled("a cat", "", [oil]) == ("an oil painting of a cat", "photo")
    assert styled("a cat", "a dog", [oil, calm]) == (
        "an oil painting of a cat, calm, {soft|warm} light",
        "a dog, photo",
    )
    assert styled("", "", [calm]) == ("calm, {soft|warm} light", "")
    assert styled("a cat", "", []) == ("a cat", "")
