"""Concepts from the file to the embedding: through the planner and the encoder, against words and against diffusers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from support.text_models import sd_folder, sdxl_folder

from serve.domain.conditioning import Schedule
from serve.domain.text import FIRST_CONCEPT_ID, EncodeUnit, TextRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.concepts import ConceptFolder
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.errors import BackendUnavailable, InvalidRequest
from serve.models import SHIPPED, ModelFolder, check_folder
from serve.prompts.plan import Planner, PromptPlan
from serve.settings.tree import Settings

KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Text:
    """A model's text side on a folder of concepts: all real."""

    model: ModelFolder
    folder: ConceptFolder
    planner: Planner
    towers: Mapping[str, TextTower]

    def plan(self, prompt: str, **options: object) -> PromptPlan:
        request = {"model": self.model.name, "width": 128, "height": 128, "negative_prompt": ""} | options
        return self.planner.plan(TextRequest(prompt=prompt, **request))  # type: ignore[arg-type]

    def encode(self, unit: EncodeUnit) -> bytes:
        tower = self.towers[unit.encoder]
        (values,) = tower.encode([Row.of(unit, tower.outputs)])
        return pack(values[unit.output])

    def schedule(self, prompt: str) -> Schedule:
        plan = self.plan(prompt)
        return compose(plan, {unit.key: self.encode(unit) for unit in plan.units})

    def words(self, *words: str) -> dict[str, torch.Tensor]:
        """The words' own vectors, by the key of each encoder."""
        found = {}
        for role, tokenizer in self.planner.tokenizers.items():
            tower = self.towers[self.planner.sources[role].fingerprint]
            table = tower._trunk.model.get_input_embeddings().weight
            ids = [id for word in words for id in tokenizer.tokenize(word).ids]
            found[KEYS[role]] = table[ids].detach().clone()
        return found


MakeText = Callable[[str], Text]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> MakeText:
    """By the name of a family, or `shapes`."""
    made: dict[str, Text] = {}

    def make(name: str) -> Text:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            path = SHIPPED if name == "shapes" else {"sd": sd_folder, "sdxl": sdxl_folder}[name](root / "model")
            model = check_folder(path, name, text_only=True)
            registry = register([model], Settings(data_dir=root))
            (root / "concepts").mkdir()
            folder = ConceptFolder(root / "concepts")
            towers = {each.fingerprint: TextTower.load(each, "cpu", folder) for each in registry.encoders}
            made[name] = Text(model, folder, Planner(model, registry.sources(name), folder.of(model)), towers)
        return made[name]

    return make


def put(text: Text, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
    file = text.folder._folder / f"{name}.safetensors"
    save_file(dict(tensors), file)
    text.folder._looked = None
    return file


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("words", [("red",), ("red", "large", "circle")])
def test_a_concept_of_words_own_vectors_is_those_words(text: MakeText, family: str, words: tuple[str, ...]) -> None:
    own = text(family)
    put(own, "zorb", own.words(*words))
    plain = f"a {' '.join(words)} on a blue background"
    learned, spoken = own.plan("a <zorb> on a blue background"), own.plan(plain)
    assert not {unit.key for unit in learned.units if unit.concepts} & {unit.key for unit in spoken.units}
    for mine, theirs in zip(
        own.schedule("a <zorb> on a blue background").texts, own.schedule(plain).texts, strict=True
    ):
        assert torch.equal(mine.context, theirs.context)
        assert mine.pooled is None or (theirs.pooled is not None and torch.equal(mine.pooled, theirs.pooled))


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_the_same_file_to_the_same_embedding(text: MakeText, count: int) -> None:
    own = text("shapes")
    vectors = 0.05 * torch.randn(count, own.model.text[0].width, generator=torch.Generator().manual_seed(count))
    file = put(own, "zorb", {"emb_params": vectors})
    pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED, local_files_only=True, dtype=torch.float32)
    pipeline.load_textual_inversion(str(file), token="<zorb>")
    wanted, _ = pipeline.encode_prompt("a large <zorb> on a blue background", "cpu", 1, False)
    found = own.schedule("a large <zorb> on a blue background").texts[0].context
    assert torch.allclose(found, wanted[0].float(), atol=1e-5)


def test_the_key_of_a_unit_follows_the_vectors_and_not_the_name(text: MakeText) -> None:
    own = text("sd")

    def key(name: str, seed: int) -> str:
        width = own.model.text[0].width
        put(own, name, {"emb_params": torch.randn(2, width, generator=torch.Generator().manual_seed(seed))})
        (unit,) = (unit for unit in own.plan(f"a <{name}>").units if unit.concepts)
        assert set(range(FIRST_CONCEPT_ID, FIRST_CONCEPT_ID + 2)) <= set(unit.token_ids)
        return unit.key

    assert key("one", 1) == key("two", 1)
    assert key("one", 2) != key("one", 1)


def test_a_bare_word_that_names_a_concept_is_the_concept(text: MakeText) -> None:
    own = text("sd")
    put(own, "zorb", own.words("red"))
    assert own.plan("a zorb on a blue background").units == own.plan("a <zorb> on a blue background").units


@pytest.mark.parametrize(
    ("prompt", "tensor", "told"),
    [
        ("a <nobody>", None, "nobody"),
        ("a <wide>", torch.ones(1, 768), "<wide> has vectors 768 wide; sd reads 32"),
        ("a <bad>", torch.full((1, 32), float("nan")), "<bad>: bad.safetensors: 'emb_params' holds values"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_concept_that_can_not_be_used_is_refused_at_its_place(
    text: MakeText, field: str, prompt: str, tensor: torch.Tensor | None, told: str
) -> None:
    own = text("sd")
    if tensor is not None:
        put(own, prompt.split("<")[1][:-1], {"emb_params": tensor})
    with pytest.raises(InvalidRequest) as raised:
        own.plan(**({"prompt": "a star"} | {field: prompt}))
    assert raised.value.param == field
    assert raised.value.message.startswith(f"{field}: ")
    assert told in raised.value.message


def test_a_unit_whose_concept_is_gone_is_refused_until_it_comes(text: MakeText) -> None:
    own = text("sd")
    file = put(own, "gone", {"emb_params": torch.randn(1, 32)})
    (unit,) = (unit for unit in own.plan("a <gone>").units if unit.concepts)
    kept = file.read_bytes()
    own.folder._vectors.clear()
    own.folder._files = {}
    file.unlink()
    with pytest.raises(BackendUnavailable):
        own.encode(unit)
    file.write_bytes(kept)
    assert own.encode(unit)
