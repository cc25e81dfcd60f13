"""What an order may grow by, so that two releases share a queue, and that a record of any release is read."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support.jobs import IMAGE, a_request

from serve.domain.jobs import ImageRef, MemoryReport, Timings
from serve.domain.orders import ImageRequest, MaskedContent
from serve.domain.text import LongPrompt, Note, Syntax, Tier, TokenCount, Truncation, Weighting
from serve.errors import BackendUnavailable
from serve.jobs import reading
from serve.jobs.reading import REQUEST, beside, order, readable
from serve.jobs.records import job
from serve.jobs.schema import FIRST, SCHEMA, Schema
from serve.jobs.terms import REPORT, WorkerReport
from serve.models.samplers import SAMPLERS
from serve.once import fingerprint_of
from serve.orders import NewImage
from serve.results.encode import FORMATS

REQUIRED = {"model", "prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed"}
OPTIONAL = {
    "negative_prompt": "",
    "true_cfg_scale": None,
    "num_images": 1,
    "scheduler": None,
    "image": None,
    "mask": None,
    "strength": None,
    "mask_blur": None,
    "padding_mask_crop": None,
    "masked_content": "original",
    "variation_seed": None,
    "variation_strength": 0.0,
    "prompt_syntax": "a1111",
    "prompt_weighting": "a1111",
    "long_prompt": "chunk",
    "composed": 1,
    "clip_skip": None,
    "use_t5": True,
    "preview_every": 0,
    "step_cache": 0.0,
    "tiny_vae": False,
    "output_format": "png",
    "output_compression": None,
    "bit_depth": 8,
    "template": None,
    "arm": None,
    "salt": "",
}
"""What the orders of schema 1 have, with what it means to leave it out."""
VALUES: dict[str, set[str]] = {
    "prompt_syntax": {"a1111", "compel", "plain"},
    "prompt_weighting": {"a1111", "compel", "multiply"},
    "long_prompt": {"chunk", "window", "head", "tail", "hierarchical", "error"},
    "output_format": {"png", "jpeg", "webp"},
    "masked_content": {"fill", "original", "latent_noise", "latent_nothing"},
    "scheduler": {
        *("ddim", "ddpm", "deis", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde"),
        *("dpmpp_2m_sde_karras", "euler", "euler_karras", "euler_a", "heun", "lcm", "pndm", "tcd", "unipc"),
        *("unipc_karras", "flow_euler", "flow_heun", "edm_dpmpp_2m", "edm_euler"),
    },
}
"""The words of schema 1, by field."""
WORDS: dict[str, set[str]] = {
    "prompt_syntax": set(Syntax),
    "prompt_weighting": set(Weighting),
    "long_prompt": set(LongPrompt),
    "masked_content": set(MaskedContent),
    "output_format": set(FORMATS),
    "scheduler": set(SAMPLERS),
}
"""Those of this release."""
BESIDE: dict[str, Any] = {
    "tokens": tuple[TokenCount, ...],
    "truncated": tuple[Truncation, ...],
    "notes": tuple[Note, ...],
    "timings": Timings,
    "memory": MemoryReport,
    "cache": dict[str, Tier],
    "ahead": dict[str, Tier],
}
"""What of a record tells beside what the job is, and may have another release's form."""


def test_an_order_grows_by_fields_and_values_that_name_their_schema() -> None:
    """A field or value that fails here is new: it belongs into `SCHEMA` with a number above all that were released, and
    with a default that leaves the picture as it was. One that is missing was released, and must come back."""
    fields = {each.name: each.default for each in dataclasses.fields(ImageRequest)}
    assert fields.keys() - SCHEMA.fields.keys() == REQUIRED | OPTIONAL.keys()
    assert {name: fields[name] for name in OPTIONAL} == OPTIONAL
    assert all(fields[name] is not dataclasses.MISSING for name in SCHEMA.fields)
    later = {field: {str(value) for name, value in SCHEMA.values if name == field} for field in VALUES}
    assert {field: words - later[field] for field, words in WORDS.items()} == VALUES
    assert max([FIRST, *SCHEMA.fields.values(), *SCHEMA.values.values()]) == SCHEMA.newest


def test_an_order_has_the_lowest_schema_with_all_that_it_uses() -> None:
    schema = Schema(4, {"tiny_vae": 2, "step_cache": 4}, {("prompt_syntax", Syntax.PLAIN): 3})
    assert schema.of(a_request()) == FIRST
    assert schema.of(a_request(tiny_vae=True)) == 2
    assert schema.of(a_request(tiny_vae=True, prompt_syntax=Syntax.PLAIN)) == 3
    assert schema.of(a_request(prompt_syntax=Syntax.PLAIN, step_cache=0.1)) == 4


@given(st.dictionaries(st.sampled_from(sorted(OPTIONAL)), st.none(), max_size=5), st.text(max_size=8))
def test_an_order_of_any_earlier_or_later_release_that_uses_nothing_new_is_the_same_order(
    left: dict[str, None], new: str
) -> None:
    """An earlier one left fields out; a later one has more of them, at their defaults."""
    told = json.loads(REQUEST.dump_json(a_request(prompt="\N{SNOWMAN}")))
    told = {name: value for name, value in told.items() if name not in left} | {f"new_{new}": None}
    assert REQUEST.validate_json(json.dumps(told)) == a_request(prompt="\N{SNOWMAN}")


def test_an_order_of_a_newer_schema_is_told_as_far_as_it_is_understood() -> None:
    told = json.loads(REQUEST.dump_json(a_request(bit_depth=16))) | {"prompt_syntax": "klingon", "tiling": True}
    data = json.dumps(told).encode()
    assert order(data, newer=True) == a_request(bit_depth=16)
    with pytest.raises(ValueError, match="prompt_syntax"):
        order(data, newer=False)
    with pytest.raises(BackendUnavailable):
        order(json.dumps(told | {"width": {"of": "another form"}}).encode(), newer=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda each: st.lists(each) | st.dictionaries(st.text(max_size=5), each),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(BESIDE)), JSON), st.integers(1, 3))
def test_a_record_is_read_whatever_another_release_tells_beside_it(told: dict[str, Any], schema: int) -> None:
    record = {
        "state": "succeeded",
        "schema": schema,
        "request": REQUEST.dump_json(a_request()),
        "truncated": b"[]",
        "attempt": 1,
        "step": 4,
        "steps": 4,
        "created": 1000,
        "finished": 2000,
        "owner": "",
        "priority": "interactive",
        "cost": 5,
        "images": TypeAdapter(tuple[ImageRef, ...]).dump_json((IMAGE,)),
    } | {name: json.dumps(value).encode() for name, value in told.items()}
    flat = [str(part).encode() if not isinstance(part, bytes) else part for pair in record.items() for part in pair]
    found = job("a", (flat, False), newest=2)
    assert found is not None
    assert (found.request, found.images) == (a_request(), (IMAGE,))
    assert (reading.NEWER in found.notes) is (schema > 2)


def test_a_record_from_before_schemas_is_of_the_first() -> None:
    flat = [b"state", b"queued", b"request", REQUEST.dump_json(a_request()), b"truncated", b"[]", b"attempt", b"0"]
    flat += [b"step", b"0", b"steps", b"4", b"created", b"1", b"owner", b"", b"priority", b"batch", b"cost", b"1"]
    found = job("a", (flat, False))
    assert found is not None
    assert found.notes == ()


def test_a_report_of_another_form_is_left_out_and_one_with_more_is_read() -> None:
    mine = WorkerReport(name="w", model="m", placement="p", max_pixels=1, max_rows=1, batch=1, vae_factor=8)
    told = json.loads(REPORT.dump_json(mine))
    other = [told | {"rung": "a rung of tomorrow"}, told | {"schema": 9, "more": [1]}, [], {"name": "no"}]
    assert readable(REPORT, [json.dumps(each).encode() for each in other]) == [mine]


def test_an_order_sent_again_to_a_release_with_more_fields_is_the_same_order() -> None:
    newer = dataclasses.make_dataclass(
        "Newer", [("tiling", bool, dataclasses.field(default=False))], bases=(NewImage,), frozen=True, kw_only=True
    )
    told = asyncio.run(fingerprint_of(NewImage(prompt="a", seed=1)))
    assert asyncio.run(fingerprint_of(newer(prompt="a", seed=1))) == told
    assert asyncio.run(fingerprint_of(newer(prompt="a", seed=1, tiling=True))) != told


def test_what_is_missing_has_its_default() -> None:
    assert beside(REPORT, None, "nothing") == "nothing"
