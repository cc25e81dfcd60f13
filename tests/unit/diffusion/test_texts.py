"""The texts of a run: what is on the device and when, what is mixed and how, what can't be drawn."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.image_models import sd_model, sdxl_refiner_model
from support.text_models import OPENCLIP_PROJECTION

from serve.diffusion.families import open_family
from serve.diffusion.families.base import Family, Text
from serve.diffusion.texts import Sides, Texts, check
from serve.domain.conditioning import Conditioning, Mix, Phase, Schedule, TextEmbedding
from serve.domain.orders import ImageRequest
from serve.errors import GenerationFailed, InvalidRequest
from serve.models import check_folder
from serve.settings.pools import DiffusionSettings

TOKENS, WIDTH = 5, 48


def opened(folder: Path, dtype: torch.dtype) -> Family:
    return open_family(check_folder(folder, folder.name), torch.device("cpu"), dtype, DiffusionSettings())


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The refiner, in bfloat16: its texts have vectors, and time ids that the two sides don't share."""
    return opened(sdxl_refiner_model(tmp_path_factory.mktemp("models") / "refiner"), torch.bfloat16)


@pytest.fixture(scope="module")
def embeddings() -> tuple[TextEmbedding, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        TextEmbedding(
            torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(OPENCLIP_PROJECTION, generator=generator)
        )
        for _ in range(3)
    )


def one(*mix: tuple[float, int]) -> tuple[tuple[float, Mix], ...]:
    return ((1.0, mix),)


def rounded(texts: tuple[TextEmbedding, ...], mix: Mix, pooled: bool = False) -> torch.Tensor:
    """Each in bfloat16, added up in double precision, rounded once."""
    tensors = [text.pooled if pooled else text.context for text in texts]
    summed = sum((share * tensors[index].bfloat16().double() for share, index in mix), torch.zeros(1))
    return summed.bfloat16()


def test_a_mix_is_added_up_finely_and_rounded_once(family: Family, embeddings: tuple[TextEmbedding, ...]) -> None:
    mix = ((0.7, 0), (0.7, 1), (-0.9, 2))
    sides = Texts(family, Schedule(embeddings, (Phase(0, one(*mix)),))).at(0)
    ((_, text),) = sides.positive
    for found, pooled in ((text.context, False), (text.pooled, True)):
        assert found is not None
        assert found.dtype == torch.bfloat16
        right = rounded(embeddings, mix, pooled)
        # The one rounding may fall to the other side where float32 and double differ; never further.
        assert torch.allclose(found.double(), right.double(), rtol=2**-7, atol=0)
        assert (found == right).float().mean() > 0.99


def test_each_side_has_its_own_time_ids(family: Family, embeddings: tuple[TextEmbedding, ...]) -> None:
    """Even where both read the same text; a side that has none of its own has the other's."""
    ids, other = torch.arange(5.0), torch.arange(5.0) + 1
    schedule = Schedule(embeddings, (Phase(0, one((1.0, 0)), ((1.0, 0),)),), ids, other)
    for found, expected in ((schedule, other), (replace(schedule, negative_time_ids=None), ids)):
        negative, positive = Texts(family, found).at(0).texts
        assert negative.context is positive.context
        for text, right in ((positive, ids), (negative, expected)):
            assert text.time_ids is not None
            assert torch.equal(text.time_ids, right.bfloat16())


def test_a_conditioning_is_a_schedule_that_never_changes(family: Family, embeddings: tuple[TextEmbedding, ...]) -> None:
    ours, theirs = embeddings[:2]
    guided = Schedule.constant(Conditioning(ours.context, theirs.context, ours.pooled, theirs.pooled, torch.ones(5)))
    free = Schedule.constant(Conditioning(ours.context, None, ours.pooled, None, torch.ones(5)))
    for step in (0, 7):
        negative, positive = Texts(family, guided).at(step).texts
        (alone,) = Texts(family, free).at(step).texts
        for text, right in ((negative, theirs), (positive, ours), (alone, ours)):
            assert right.pooled is not None
            assert text.pooled is not None
            assert torch.equal(text.context, right.context.bfloat16())
            assert torch.equal(text.pooled, right.pooled.bfloat16())


def test_a_text_comes_to_the_device_once_and_when_it_is_read(
    family: Family, embeddings: tuple[TextEmbedding, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[TextEmbedding] = []
    place = family.text

    def counted(text: TextEmbedding, time_ids: torch.Tensor | None = None) -> Text:
        came.append(text)
        return place(text, time_ids)

    monkeypatch.setattr(family, "text", counted)
    phases = (
        Phase(0, one((1.0, 0)), ((1.0, 1),)),
        Phase(3, one((0.5, 0), (0.5, 1)), ((1.0, 0),)),
        Phase(5, one((1.0, 2)), ((1.0, 2),)),
    )
    texts = Texts(family, Schedule(embeddings, phases))
    seen = []
    for step in (0, 1, 2, 3, 4, 0, 3):
        texts.at(step)
        seen.append(len(came))
    assert seen == [2] * 7
    texts.at(5)
    assert [next(i for i, each in enumerate(embeddings) if each is text) for text in came] == [0, 1, 2]


def test_a_mix_lives_as_long_as_an_image_is_at_it(family: Family, embeddings: tuple[TextEmbedding, ...]) -> None:
    """A ramp has a mix for every step: those that no image is at are not there."""
    ramp = [Phase(step, one((1 - step / 50, 0), (step / 50, 1))) for step in range(51)]
    texts = Texts(family, Schedule(embeddings, tuple(ramp)))
    first, behind = texts.at(10), texts.at(10)
    assert first.positive[0][1] is behind.positive[0][1], "images at one step share it"
    made = []
    for step in range(11, 40):
        first = texts.at(step)
        made.append(weakref.ref(first.positive[0][1]))
    assert [ref() for ref in made[:-1]] == [None] * (len(made) - 1)
    assert made[-1]() is not None
    assert behind.positive[0][1].context is texts.at(10).positive[0][1].context, "and one that is behind keeps its own"


def test_a_mix_of_nothing_is_nothing(family: Family, embeddings: tuple[TextEmbedding, ...]) -> None:
    for mix in ((), ((0.0, 1), (0.0, 2))):
        ((_, text),) = Texts(family, Schedule(embeddings, (Phase(0, one(*mix)),))).at(0).positive
        assert text.pooled is not None
        assert (text.context.shape, text.pooled.shape) == ((TOKENS, WIDTH), (OPENCLIP_PROJECTION,))
        assert not text.context.any()
        assert not text.pooled.any()


def test_a_model_without_vectors_mixes_contexts(tmp_path: Path) -> None:
    family = opened(sd_model(tmp_path / "sd"), torch.float32)
    contexts = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(1))
    schedule = Schedule(tuple(TextEmbedding(each) for each in contexts), (Phase(0, one((0.25, 0), (0.75, 1))),))
    ((_, text),) = Texts(family, schedule).at(0).positive
    assert (text.pooled, text.time_ids) == (None, None)
    assert torch.allclose(text.context, torch.lerp(*contexts, 0.75), atol=1e-6)


def test_guidance_of_one_prompt_is_to_the_bit_what_it_always_was() -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        empty, prompt = torch.randn(2, 1, 4, 8, 8, generator=generator).to(dtype)
        text = Text(torch.zeros(1, 1))
        sides = Sides(Phase(0, one((1.0, 0)), ((1.0, 0),)), ((1.0, text),), text)
        assert torch.equal(sides.guide([empty, prompt], 7.5), empty + 7.5 * (prompt - empty))


def a_request(composed: int = 1, guidance: float = 5.0) -> ImageRequest:
    values = {"model": "m", "prompt": "", "width": 64, "height": 64, "num_inference_steps": 4, "seed": 0}
    return ImageRequest(**values, composed=composed, guidance_scale=guidance)  # type: ignore[arg-type]


def of_lengths(*tokens: int) -> tuple[TextEmbedding, ...]:
    return tuple(TextEmbedding(torch.zeros(each, WIDTH)) for each in tokens)


def test_a_composition_needs_guidance() -> None:
    schedule = Schedule(of_lengths(2), (Phase(0, (*one((1.0, 0)), *one((1.0, 0)))),))
    with pytest.raises(InvalidRequest, match="AND needs guidance") as refused:
        check(a_request(composed=2, guidance=1.0), schedule)
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("request_", "phases"),
    [
        (a_request(2), (Phase(0, one((1.0, 0)), ((1.0, 0),)),)),
        (a_request(1), (Phase(0, one((1.0, 0)) * 2, ((1.0, 0),)),)),
        (a_request(1), (Phase(0, one((1.0, 0)), ((1.0, 0),)), Phase(1, one((1.0, 0)) * 2, ((1.0, 0),)))),
        (a_request(1), (Phase(0, one((1.0, 0))),)),
        (a_request(1, guidance=1.0), (Phase(0, one((1.0, 0)), ((1.0, 0),)),)),
        (a_request(1), (Phase(0, one((1.0, 0)), ((1.0, 0),)), Phase(1, one((1.0, 0))))),
    ],
    ids=["too few", "too many", "too many later", "no negative", "a negative", "no negative later"],
)
def test_a_text_must_be_of_its_request(request_: ImageRequest, phases: tuple[Phase, ...]) -> None:
    with pytest.raises(GenerationFailed, match="not that of this request"):
        check(request_, Schedule(of_lengths(2), phases))


def test_lengths_may_differ_beside_each_other_but_in_no_mix() -> None:
    """PixArt's contexts are as long as their texts."""
    texts, negative = of_lengths(2, 3), ((1.0, 1),)
    check(a_request(), Schedule(texts, (Phase(0, one((1.0, 0)), negative), Phase(2, one((1.0, 1)), negative))))
    check(a_request(2), Schedule(texts, (Phase(0, (*one((1.0, 0)), *one((1.0, 1))), negative),)))
    check(a_request(), Schedule(of_lengths(3, 3), (Phase(0, one((0.5, 0), (0.5, 1)), negative),)))
    for phase in (Phase(1, one((0.5, 0), (0.5, 1)), negative), Phase(1, one((1.0, 0)), ((0.5, 0), (0.5, 1)))):
        with pytest.raises(GenerationFailed, match="unlike lengths"):
            check(a_request(), Schedule(texts, (Phase(0, one((1.0, 0)), negative), phase)))
