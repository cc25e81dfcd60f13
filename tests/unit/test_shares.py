"""How one machine is shared out, and which setting is at fault where it does not suffice."""

from pathlib import Path

import pytest

from serve.encoders.registry import Encoder
from serve.errors import OperatorError
from serve.models.text_parts import TextPart
from serve.placements import Placement
from serve.settings.front import HttpSettings
from serve.settings.pools import CaptionSettings, DiffusionSettings, EncoderSettings
from serve.settings.tree import Settings
from serve.shares import fit


def encoder(name: str, **options: object) -> Encoder:
    part = TextPart(
        role="text_encoder",
        kind="clip",
        name=name,
        weights=Path(),
        tokenizer=Path(),
        width=768,
        layers=12,
        vocab_size=49408,
        projection=None,
        row_tokens=77,
    )
    return Encoder(
        name=name,
        fingerprint=name,
        part=part,
        projections=(),
        outputs=("hidden",),
        settings=EncoderSettings(**options),
        models=("a",),
    )


def placements(settings: Settings) -> list[Placement]:
    """As `plan_placements` names them, without looking at a model."""
    names = settings.placements or ("m",)
    owns = {name: settings.placement_named(name) for name in names}
    return [
        Placement(name=name, model="m", gpu_class=None, settings=own, max_pixels=64)
        for name, own in owns.items()
        if own.replicas
    ]


def fitted(settings: Settings, *encoders: Encoder, cpus: float = 16.0, gpus: float = 0.0) -> Settings:
    machine = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return fit(settings, encoders, placements(settings), machine)


def share(gpus: int, *encoders: Encoder, **options: object) -> float:
    settings = Settings(diffusion=DiffusionSettings(**options))
    return fitted(settings, *encoders, gpus=float(gpus)).diffusion.num_gpus


def shares(gpus: int, *encoders: Encoder, **tables: dict[str, object]) -> dict[str, float]:
    """Of each placement."""
    settings = fitted(Settings(placements=tables), *encoders, gpus=float(gpus))
    return {name: settings.placement_named(name).num_gpus for name in tables}


def at_fault(settings: Settings, *encoders: Encoder, cpus: float = 16.0, gpus: float = 0.0) -> str:
    with pytest.raises(OperatorError) as raised:
        fitted(settings, *encoders, cpus=cpus, gpus=gpus)
    assert raised.value.message.startswith(f"{raised.value.param}: ")
    assert raised.value.param is not None
    return raised.value.param


def test_diffusion_gets_what_the_text_encoders_leave() -> None:
    clip, greedy = encoder("clip-l", num_gpus=0.2), encoder("t5-xxl", num_gpus=1.0)
    assert share(1) == 1.0
    assert share(1, clip) == pytest.approx(0.8, abs=1e-3)
    assert share(2, clip, greedy) == pytest.approx(0.8, abs=1e-3)
    assert share(2, greedy) == 1.0
    assert share(1, clip, replicas=2) == pytest.approx(0.4, abs=1e-3)
    assert share(1, replicas=3) == pytest.approx(1 / 3, abs=1e-3)
    assert share(1, encoder("clip-l", num_gpus=0.2, min_replicas=2, max_replicas=3)) == pytest.approx(0.6, abs=1e-3)


def test_no_share_spans_two_cards() -> None:
    """0.9 each for two replicas on two GPUs would leave 0.1 and 0.1, and no place for 0.2."""
    assert share(2, encoder("clip-l", num_gpus=0.2), replicas=2) == pytest.approx(0.8, abs=1e-3)
    assert share(2, replicas=3) == 0.5


def test_what_is_said_is_left_as_it_is() -> None:
    assert share(1, num_gpus=0.5) == 0.5
    assert share(0) == 0.0
    assert share(1, device="cpu") == 0.0
    assert share(1, encoder("clip-l", num_gpus=1.0), replicas=0) == 0.0


@pytest.mark.parametrize("least", [0, 1])
def test_an_encoder_that_takes_the_only_gpu_leaves_none_to_diffusion(least: int) -> None:
    """Asleep too: the first text would wake a replica that can be placed nowhere."""
    t5 = encoder("t5-xxl", num_gpus=1.0, min_replicas=least)
    assert at_fault(Settings(), t5, gpus=1.0) == "encoder.num_gpus"
    assert at_fault(Settings(diffusion=DiffusionSettings(num_gpus=0.5)), t5, gpus=1.0) == "diffusion.num_gpus"
    fitted(Settings(diffusion=DiffusionSettings(device="cpu")), t5, gpus=1.0)


def test_the_setting_at_fault_is_named() -> None:
    only_text = Settings(diffusion=DiffusionSettings(replicas=0))
    one, other = encoder("clip-l", num_gpus=0.6), encoder("t5-xxl", num_gpus=0.6)
    assert at_fault(only_text, encoder("clip-l", num_gpus=1.0)) == "encoders.clip-l.num_gpus"
    assert at_fault(only_text, one, other, gpus=1.0) == "encoder.num_gpus"
    assert at_fault(Settings(), one, other, gpus=1.0) == "encoder.num_gpus"
    assert at_fault(only_text, encoder("clip-l", num_cpus=20.0)) == "encoders.clip-l.num_cpus"
    assert at_fault(only_text, encoder("a", num_cpus=1.5), encoder("b", num_cpus=1.5), cpus=2.0) == "encoder.num_cpus"
    assert at_fault(Settings(diffusion=DiffusionSettings(num_gpus=1.0)), one, gpus=1.0) == "diffusion.num_gpus"
    assert at_fault(Settings(diffusion=DiffusionSettings(num_gpus=1.0))) == "diffusion.num_gpus"
    assert at_fault(Settings(diffusion=DiffusionSettings(num_cpus=2.0)), encoder("a"), cpus=2.0) == "diffusion.num_cpus"
    assert at_fault(Settings(http=HttpSettings(num_cpus=3.0)), cpus=2.0) == "http.num_cpus"


def test_placements_without_a_share_divide_what_the_others_leave() -> None:
    clip = encoder("clip-l", num_gpus=0.2)
    assert shares(1, a={}, b={}) == {"a": 0.5, "b": 0.5}
    assert shares(1, a={"replicas": 2}, b={}) == pytest.approx({"a": 0.3333, "b": 0.3333}, abs=1e-3)
    assert shares(1, clip, a={"num_gpus": 0.5}, b={}) == pytest.approx({"a": 0.5, "b": 0.3}, abs=1e-3)
    assert shares(2, a={"num_gpus": 1}, b={}) == {"a": 1.0, "b": 1.0}
    assert shares(1, a={"device": "cpu"}, b={}) == {"a": 0.0, "b": 1.0}
    assert shares(1, a={"num_gpus": 0.5}, b={"num_gpus": 0.25}) == {"a": 0.5, "b": 0.25}
    assert shares(1, a={}, b={"replicas": 0}) == {"a": 1.0, "b": 0.0}
    assert shares(0, a={}, b={}) == {"a": 0.0, "b": 0.0}


def test_the_placement_at_fault_is_named() -> None:
    def settings(**tables: dict[str, object]) -> Settings:
        return Settings(diffusion=DiffusionSettings(num_cpus=0.1), placements=tables)

    whole = {"num_gpus": 1.0}
    assert at_fault(settings(a=whole, b=whole), gpus=1.0) == "placements.b.num_gpus"
    assert at_fault(settings(a=whole)) == "placements.a.num_gpus"
    assert at_fault(settings(a=whole, b={}), gpus=1.0) == "placements.a.num_gpus"
    assert at_fault(settings(a={"num_gpus": 0.7, "replicas": 2}, b={}), gpus=1.0) == "placements.a.num_gpus"
    assert at_fault(settings(a={}, b={"num_cpus": 5}), cpus=4.0) == "placements.b.num_cpus"
    tree = Settings(diffusion=DiffusionSettings(num_gpus=0.6), placements={"a": {}, "b": {}})
    assert at_fault(tree, gpus=1.0) == "diffusion.num_gpus"


def test_captions_have_their_share_before_the_denoisers() -> None:
    settings = Settings(captions=CaptionSettings(source="a", num_gpus=0.5, min_replicas=0))
    assert fitted(settings, gpus=1).diffusion.num_gpus == 0.5
    assert (
        fitted(settings.model_copy(update={"captions": CaptionSettings(num_gpus=0.5)}), gpus=1).diffusion.num_gpus == 1
    )
    for gpus, cpus, setting in ((0, 16, "captions.num_gpus"), (1, 0.6, "captions.num_cpus")):
        with pytest.raises(OperatorError, match=rf"^{setting}: .*captions|^{setting}: it wants") as refused:
            fitted(settings, gpus=gpus, cpus=cpus)
        assert refused.value.param == setting
