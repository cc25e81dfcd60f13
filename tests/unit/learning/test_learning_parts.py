"""What learning is made of, each part against what it stands for: the planner, the encoders, diffusers."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from support.image_models import lcm_model, playground_model, sd_model, sdxl_model
from support.text_models import sd3_folder

from serve.diffusion.families import open_family
from serve.domain.text import TextRequest
from serve.encoders.codec import pack
from serve.encoders.compose import compose
from serve.encoders.concept_files import write_concept
from serve.encoders.concepts import ConceptFolder
from serve.encoders.forward import Row, TextTower
from serve.encoders.registry import register
from serve.errors import GenerationFailed, OperatorError
from serve.learning.captions import CAPTIONS, PLACE, checked
from serve.learning.examples import Example, read_examples
from serve.learning.learner import Learner, Process, Wishes, check_model
from serve.learning.words import Words
from serve.models import SHIPPED, ModelFolder, check_folder
from serve.prompts.plan import Planner
from serve.settings.pools import DiffusionSettings
from serve.settings.tree import Settings

CPU = torch.device("cpu")
ON_CPU = DiffusionSettings(device="cpu", torch_threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFolder]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "sd": sd_model(root / "sd"),
        "sd-v": sd_model(root / "sd-v", prediction_type="v_prediction"),
        "sdxl": sdxl_model(root / "sdxl"),
        "shapes": SHIPPED,
    }
    return {name: check_folder(folder, name) for name, folder in folders.items()}


def words(model: ModelFolder, init: str = "", vectors: int | None = None, seed: int = 0) -> Words:
    return Words(model, CPU, init, vectors, torch.Generator().manual_seed(seed))


def wishes(**changes: object) -> Wishes:
    return Wishes(**({"steps": 3, "batch": 2, "seed": 7, "init": "circle"} | changes))  # type: ignore[arg-type]


def examples(model: ModelFolder, *captions: str) -> list[Example]:
    assert model.denoiser is not None
    size = model.denoiser.default_width, model.denoiser.default_height
    colors = ("red", "green", "blue")
    return [Example(f"{color}.png", Image.new("RGB", size, color), captions or ("a {}",)) for color in colors]


@pytest.mark.parametrize("kind", ["object", "style"])
def test_the_standing_captions_are_captions(kind: str) -> None:
    for caption in CAPTIONS[kind]:  # type: ignore[index]
        assert checked(caption, "caption") == caption
        assert caption.count(PLACE) == 1


def test_a_picture_has_the_caption_beside_it_and_else_those_of_all(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "c.webp"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    (tmp_path / "b.txt").write_text(" a {}\n on a beach \n")
    (tmp_path / "notes.md").write_text("not a picture")
    found = read_examples(tmp_path, (16, 16), ("a {}", "the {}"))
    assert [(each.name, each.captions) for each in found] == [
        ("a.PNG", ("a {}", "the {}")),
        ("b.jpg", ("a {} on a beach",)),
        ("c.webp", ("a {}", "the {}")),
    ]
    assert {each.image.size for each in found} == {(16, 16)}


def test_the_middle_of_a_picture_is_taken_and_held_upright(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste("blue", (20, 0, 40, 20))
    wide.paste("red", (20, 0, 40, 10))
    turned = wide.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    (found,) = read_examples(tmp_path, (20, 20), ("a {}",))
    pixels = np.asarray(found.image)
    assert (pixels[:10] == (255, 0, 0)).all()
    assert (pixels[10:] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.png", b"no picture", "a.png is no image"),
        ("a.jpg", b"\xff\xd8\xff\xe0 cut", "a.jpg is broken or cut short"),
        ("a.txt", b"a caption without a place", "lacks {}"),
        ("a.txt", b"\xff\xfe{}", "no caption that can be read"),
        ("a.txt", b"{} " + b"x" * 1000, "at most 1000 characters"),
    ],
)
def test_a_file_that_can_not_be_learned_from_is_named(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.webp")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(OperatorError) as raised:
        read_examples(tmp_path, (16, 16), ("a {}",))
    assert told in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None, lambda path: path.write_text("a file")])
def test_a_folder_without_pictures_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "pictures")
    with pytest.raises(OperatorError, match="--images"):
        read_examples(tmp_path / "pictures", (16, 16), ("a {}",))


@pytest.mark.parametrize("model", ["sd", "sdxl"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_what_learns_is_what_is_served(
    tmp_path: Path, models: Mapping[str, ModelFolder], model: str, vectors: int
) -> None:
    """The saved concept, through planner, encoders and composition, is the embedding that the learner trained on."""
    own = models[model]
    learned = words(own, "red", vectors)
    folder = tmp_path / "concepts"
    write_concept(folder / "zorb.safetensors", own, {role: each.detach() for role, each in learned.vectors.items()})
    concepts = ConceptFolder(folder)
    registry = register([own], Settings(data_dir=tmp_path))
    planner = Planner(own, registry.sources(own.name), concepts.of(own))
    towers = {each.fingerprint: TextTower.load(each, "cpu", concepts) for each in registry.encoders}
    for caption in ("a {} on a blue background", "{}", "a photo of a {}, {} and a star"):
        prompt = caption.replace("{}", "<zorb>")
        plan = planner.plan(TextRequest(model=own.name, prompt=prompt, width=64, height=64))
        values = {}
        for unit in plan.units:
            tower = towers[unit.encoder]
            values[unit.key] = pack(tower.encode([Row.of(unit, tower.outputs)])[0][unit.output])
        (served,) = compose(plan, values).texts
        (mine,) = learned.read([caption], learned.vectors)
        assert torch.allclose(mine.context, served.context, atol=1e-6)
        assert (mine.pooled is None) == (served.pooled is None)
        assert mine.pooled is None or served.pooled is None or torch.allclose(mine.pooled, served.pooled, atol=1e-6)


def test_vectors_begin_as_the_words(models: Mapping[str, ModelFolder]) -> None:
    own = words(models["shapes"], "red circle", 5)
    (reader,) = own._readers
    (begun,) = own.vectors.values()
    red, circle = (reader.table[reader.tokenizer.tokenize(word).ids[0]] for word in ("red", "circle"))
    assert torch.equal(begun[0], red)
    assert torch.equal(begun[1], circle)
    assert torch.nn.functional.cosine_similarity(begun[2], red, 0) > 0.95
    assert not torch.equal(begun[2], red)
    assert words(models["shapes"], "red circle").count == 2
    assert words(models["shapes"]).count == 1


@pytest.mark.parametrize(("init", "vectors"), [("red circle", 1), ("", 0), ("", 76), ("red " * 80, None)])
def test_a_number_of_vectors_that_does_not_fit_is_refused(
    models: Mapping[str, ModelFolder], init: str, vectors: int | None
) -> None:
    with pytest.raises(OperatorError, match=r"^(init|vectors): "):
        words(models["shapes"], init, vectors)


def test_a_caption_that_is_longer_than_a_row_is_refused(models: Mapping[str, ModelFolder]) -> None:
    own = words(models["shapes"], "circle", 40)
    own.check("a red {}")
    with pytest.raises(OperatorError, match="tokens, 75 fit into a row"):
        own.check("a {} and a {}")


@pytest.mark.parametrize("model", ["sd", "sd-v"])
def test_the_noise_is_that_of_diffusers(models: Mapping[str, ModelFolder], model: str) -> None:
    family = open_family(models[model], CPU, torch.float32, ON_CPU)
    process, stock = Process(family), DDPMScheduler.from_config(family.scheduler_config)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(6, 4, 8, 8, generator=generator) for _ in range(2))
    times = process.times(6, generator)
    assert torch.allclose(process.noisy(clean, noise, times), stock.add_noise(clean, noise, times), atol=1e-6)
    wanted = stock.get_velocity(clean, noise, times) if model == "sd-v" else noise
    assert torch.allclose(process.target(clean, noise, times), wanted, atol=1e-6)


def test_every_batch_sees_the_whole_schedule(models: Mapping[str, ModelFolder]) -> None:
    process = Process(open_family(models["sd"], CPU, torch.float32, ON_CPU))
    generator = torch.Generator().manual_seed(random.randrange(1000))
    for count in (1, 4, 7):
        edges = [part * 1000 / count for part in range(count + 1)]
        for _ in range(1000):
            times = sorted(process.times(count, generator).tolist())
            for time, begin, end in zip(times, edges, edges[1:], strict=False):
                assert int(begin) <= time < end, "one of each part, an edge between two timesteps rounded down"


@pytest.mark.parametrize("model", ["sd", "sd-v", "sdxl"])
def test_only_the_vectors_learn(models: Mapping[str, ModelFolder], model: str) -> None:
    learner = Learner(models[model], examples(models[model]), wishes(vectors=2), ON_CPU)
    frozen = [learner.family.denoiser, *(reader._trunk.model for reader in learner.words._readers)]
    before = [parameter.clone() for part in frozen for parameter in part.parameters()]
    begun = {role: vectors.detach().clone() for role, vectors in learner.words.vectors.items()}
    losses = list(learner.losses())
    assert len(losses) == learner.done == 3
    assert np.isfinite(losses).all()
    after = [parameter for part in frozen for parameter in part.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    for role, vectors in learner.words.vectors.items():
        assert (vectors != begun[role]).any(1).all(), "every vector of every encoder has moved"
    assert set(learner.vectors) == {part.role for part in models[model].text}


def test_a_seed_fixes_what_is_learned(models: Mapping[str, ModelFolder]) -> None:
    def learned(seed: int) -> torch.Tensor:
        learner = Learner(models["sd"], examples(models["sd"], "a {}", "the {}"), wishes(seed=seed), ON_CPU)
        list(learner.losses())
        return learner.vectors["text_encoder"]

    assert torch.equal(learned(1), learned(1))
    assert not torch.equal(learned(1), learned(2))


def test_a_probe_takes_nothing_from_the_steps(models: Mapping[str, ModelFolder]) -> None:
    """It tells the same of the same vectors, and who asks learns the same as who does not."""
    asked, silent = (Learner(models["sd"], examples(models["sd"]), wishes(rate=0.05), ON_CPU) for _ in range(2))
    before = [asked.probe(), asked.probe()]
    for _ in asked.losses():
        asked.probe()
    list(silent.losses())
    assert before[0] == before[1] != asked.probe()
    assert asked.probe() == silent.probe()


def test_learning_that_comes_to_no_numbers_is_told(models: Mapping[str, ModelFolder]) -> None:
    learner = Learner(models["sd"], examples(models["sd"]), wishes(rate=1e38, steps=20), ON_CPU)
    with pytest.raises(GenerationFailed, match="take a smaller --rate"):
        list(learner.losses())
    assert learner.done < 20


def test_a_preview_is_the_stock_pipelines_picture(models: Mapping[str, ModelFolder]) -> None:
    own, prompt = models["shapes"], "a white star on a purple background"
    assert own.denoiser is not None
    learner = Learner(own, examples(own), wishes(), ON_CPU)
    stock = StableDiffusionPipeline.from_pretrained(SHIPPED, local_files_only=True, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    wanted = stock(
        prompt,
        num_inference_steps=own.denoiser.default_num_inference_steps,
        guidance_scale=own.denoiser.default_guidance_scale,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    difference = np.abs(np.asarray(learner.draw(prompt, 4), np.int16) - np.asarray(wanted, np.int16))
    assert difference.max() <= 1


def test_models_that_nothing_is_learned_with_are_refused(tmp_path: Path, models: Mapping[str, ModelFolder]) -> None:
    check_model(models["sdxl"])
    for name, folder, told in (
        ("sd3", sd3_folder(tmp_path / "sd3"), "is of the sd3 family; concepts are learned with Stable Diffusion"),
        ("lcm", lcm_model(tmp_path / "lcm"), "is distilled"),
        ("inpainting", sd_model(tmp_path / "inpainting", in_channels=9), "only repaints"),
        ("playground", playground_model(tmp_path / "playground"), "was trained against another noise"),
    ):
        with pytest.raises(OperatorError, match=told) as raised:
            check_model(check_folder(folder, name, text_only=name == "sd3"))
        assert "\n" not in raised.value.message
