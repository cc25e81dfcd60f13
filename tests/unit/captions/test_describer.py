"""Words for pictures: those that the stock model says, whoever else is in the batch; what is refused at the start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.captioners import BLIP_POSITIONS, blip_folder, describer_of, llava_folder, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from serve.captions.describer import CHAT_PROMPT, Describer
from serve.captions.messages import Ask
from serve.errors import InvalidRequest, OperatorError
from serve.settings.pools import CaptionSettings

COLOURS = ("red", "blue", "green", "orange", "black")
Make = Callable[[Path], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("captioners")
    return {"blip": blip_folder(root / "blip"), "llava": llava_folder(root / "llava")}


@pytest.fixture(scope="module")
def describers(folders: dict[str, Path]) -> dict[str, Describer]:
    return {name: describer_of(CaptionSettings(source=str(folder))) for name, folder in folders.items()}


def ask(colour: str, prompt: str = "", most: int = 6, **shape: int) -> Ask:
    return Ask(picture(colour, **shape), prompt, most)


def stock(model: Any, processor: Any, prompt: str, colour: str) -> str:
    """As the model's card says it, one picture at a time."""
    image = Image.new("RGB", (48, 40), colour)
    if processor.chat_template:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt")
        row = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    else:
        inputs = processor(image, prompt, return_tensors="pt") if prompt else processor(image, return_tensors="pt")
        row = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    text: str = processor.decode(row, skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize(("kind", "prompt"), [("blip", ""), ("blip", "a picture of"), ("llava", "the yellow circle")])
def test_a_caption_is_what_the_stock_model_says(
    kind: str, prompt: str, folders: dict[str, Path], describers: dict[str, Describer]
) -> None:
    told = describers[kind].describe([ask(colour, prompt) for colour in COLOURS])
    model = AutoModelForImageTextToText.from_pretrained(folders[kind])
    processor = AutoProcessor.from_pretrained(folders[kind])
    assert [each.text for each in told] == [stock(model, processor, prompt, colour) for colour in COLOURS]
    assert len({each.text for each in told}) > 1, "it depends on the picture"
    assert all(each.tokens == len(each.text.split()) for each in told)


def test_a_model_that_chats_is_asked_something_by_default(describers: dict[str, Describer]) -> None:
    by_default, said = describers["llava"].describe([ask("red"), ask("red", CHAT_PROMPT)])
    assert by_default == said


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_strangers_in_a_batch_change_nothing(kind: str, describers: dict[str, Describer]) -> None:
    describer = describers[kind]
    asks = [
        ask(colour, prompt, most, width=width)
        for colour, width, most in (("red", 48, 6), ("blue", 200, 1), ("green", 33, 6))
        for prompt in ("", "the green circle on the")
    ]
    together = describer.describe(asks)
    assert together == [describer.describe([each])[0] for each in asks]
    assert together == describer.describe(asks)


def test_the_prompt_of_the_settings_is_that_of_who_says_nothing(folders: dict[str, Path]) -> None:
    describer = describer_of(CaptionSettings(source=str(folders["blip"]), prompt="a picture of"))
    (told,) = describer.describe([ask("red")])
    assert told.text.startswith("a picture of")


def test_what_a_model_s_own_files_say_of_chance_is_passed_over(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path)
    (before,) = describer_of(CaptionSettings(source=str(folder))).describe([ask("red")])
    chance = {
        "do_sample": True,
        "temperature": 50.0,
        "num_beams": 2,
        "num_return_sequences": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(chance))
    describer = describer_of(CaptionSettings(source=str(folder)))
    assert {describer.describe([ask("red")])[0] for _ in range(3)} == {before}


@pytest.mark.parametrize("prompt", ["<image>", "what is<turn>this", "[SEP]"])
def test_a_prompt_can_t_write_the_model_s_marks(prompt: str, describers: dict[str, Describer]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        describers["llava"].check(ask("red", prompt))
    assert refused.value.param == "prompt"
    describers["llava"].check(ask("red", "what is this?"))


def test_what_a_model_can_t_read_is_refused(describers: dict[str, Describer]) -> None:
    """On a GPU a position beyond the model's table would break the device for everybody."""
    most = BLIP_POSITIONS - 2 - 6
    describers["blip"].describe([ask("red", "a " * most)])
    with pytest.raises(InvalidRequest) as refused:
        describers["blip"].describe([ask("red", "a " * (most + 1))])
    assert refused.value.param == "prompt"


def test_more_tokens_than_a_model_writes_are_refused_at_the_start(folders: dict[str, Path]) -> None:
    with pytest.raises(OperatorError) as refused:
        describer_of(CaptionSettings(source=str(folders["blip"]), max_new_tokens=BLIP_POSITIONS))
    assert refused.value.param == "captions.max_new_tokens"


def without_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("vision_model.post_layernorm.weight")
    save_file(tensors, file, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code_of_its_own(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\nclass Evil: ...\n")
    says = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(says))


def with_a_processor_of_its_own(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\nclass Evil: ...\n")
    says = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
    (folder / "processor_config.json").write_text(json.dumps(says))


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def of_text_alone(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def without_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("make", "spoil", "reason"),
    [
        (blip_folder, without_a_tensor, "its weights lack vision_model.post_layernorm.weight"),
        (blip_folder, pickled, "is pickled"),
        (blip_folder, with_code_of_its_own, "its model_type evil is none"),
        (blip_folder, with_a_processor_of_its_own, "transformers can't make captions with"),
        (blip_folder, cut_off, "is cut off"),
        (blip_folder, without_a_processor, "lacks processor_config.json"),
        (blip_folder, of_text_alone, "its model_type gpt2 is none"),
        (llava_folder, without_a_template, "transformers can't make captions with"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_folder_that_can_t_work_is_refused_at_the_start(
    make: Make, spoil: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    spoil(make(tmp_path))
    with pytest.raises(OperatorError) as refused:
        describer_of(CaptionSettings(source=str(tmp_path)))
    assert refused.value.param == "captions.source"
    assert refused.value.message.startswith("captions.source: ")
    assert "\n" not in refused.value.message
    assert reason in refused.value.message
    assert not (tmp_path / "it-ran").exists()
