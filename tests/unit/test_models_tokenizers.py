"""A tokenizer is judged by the files that transformers would load it from, and by its rules."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.text_models import sd_folder
from transformers import CLIPTokenizer

from serve.catalog import open_catalog
from serve.errors import OperatorError
from serve.models import SHIPPED, resolve
from serve.models.sources import hub_files
from serve.models.text_tokenizers import check_clip_tokenizer
from serve.prompts.tokenizers import PromptTokenizer
from serve.settings.pools import ModelSettings
from serve.settings.tree import Settings

SIZE = 918
"""Tokens of the shipped vocabulary; the last two begin and end a text."""
PLAIN = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
TOKENS = ["<cat>", "<dog>", "<new>", "!", "red</w>", "<|startoftext|>", "<|endoftext|>"]


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def tokenizer(folder: Path, files: Mapping[str, object]) -> Path:
    """The shipped vocabulary and merges, and beside them `files`."""
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHIPPED / "tokenizer" / name, folder)
    for name, content in files.items():
        write(folder / name, content)
    return folder


def whole_file(*added: str) -> dict[str, Any]:
    """tokenizer.json with `added` behind the shipped tokens."""
    content: dict[str, Any] = json.loads((SHIPPED / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] += [
        {"id": SIZE + index, "content": token, "special": True} | PLAIN for index, token in enumerate(added)
    ]
    return content


names = st.sampled_from(TOKENS)
roles = st.sampled_from(["bos_token", "eos_token", "unk_token", "pad_token"])
several = st.lists(names, unique=True, max_size=3)


def specials(**mark: str) -> st.SearchStrategy[dict[str, object]]:
    """Special tokens by role, as text or as an object with `mark`."""
    return st.dictionaries(roles, names | names.map(lambda token: {"content": token} | PLAIN | mark), max_size=3)


@st.composite
def constellations(draw: st.DrawFn) -> dict[str, object]:
    config = draw(specials(__type="AddedToken"))
    if draw(st.booleans()):
        ids = draw(st.permutations(range(SIZE - 2, SIZE + 3)))
        config["added_tokens_decoder"] = {
            str(index): {"content": token, "special": True} | PLAIN
            for index, token in zip(ids, draw(several), strict=False)
        }
    files: dict[str, object] = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": draw(specials()),
        "added_tokens.json": {token: SIZE + index for index, token in enumerate(draw(several))},
        "tokenizer.json": whole_file(*draw(several)),
    }
    return {name: content for name, content in files.items() if draw(st.booleans())}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=constellations())
def test_what_passes_is_what_transformers_loads(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, Any]
) -> None:
    folder = tokenizer(tmp_path_factory.mktemp("files") / "tokenizer", files)
    loaded = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    size, end = max(loaded.get_vocab().values()) + 1, loaded.eos_token_id
    check_clip_tokenizer(folder, size, end)
    check_clip_tokenizer(folder, size, 2)
    with pytest.raises(OperatorError, match=rf"knows {size} tokens, the text encoder {size + 1}"):
        check_clip_tokenizer(folder, size + 1, end)
    with pytest.raises(OperatorError, match=rf"ends a text with {end} "):
        check_clip_tokenizer(folder, size, end - 1)


def test_a_wrong_tokenizer_json_beside_a_good_vocabulary(tmp_path: Path) -> None:
    """transformers reads tokenizer.json."""
    content = whole_file()
    vocabulary = content["model"]["vocab"]
    del vocabulary[next(token for token, index in vocabulary.items() if index == 500)]
    vocabulary["<elsewhere>"] = SIZE + 40
    folder = tokenizer(tmp_path / "tokenizer", {"tokenizer.json": content})
    with pytest.raises(OperatorError, match=f"knows {SIZE + 41} tokens, the text encoder {SIZE}"):
        check_clip_tokenizer(folder, SIZE, SIZE - 1)
    write(folder / "tokenizer.json", {})
    with pytest.raises(OperatorError, match="holds a None tokenizer, not a BPE one"):
        check_clip_tokenizer(folder, SIZE, SIZE - 1)
    (folder / "tokenizer.json").unlink()
    check_clip_tokenizer(folder, SIZE, SIZE - 1)
    write(folder / "added_tokens.json", {"<cat>": "last"})
    with pytest.raises(OperatorError, match=r"added_tokens\.json garbles its added_tokens"):
        check_clip_tokenizer(folder, SIZE, SIZE - 1)


@pytest.mark.parametrize("how", ["added_tokens.json", "added_tokens_decoder", "both"])
def test_a_token_that_was_added_in_training(tmp_path: Path, how: str) -> None:
    """As transformers 4 saves a tokenizer that has learned a word (textual inversion): SD 1.5 with 49409 rows."""
    path = sd_folder(tmp_path / "sd")
    shutil.rmtree(path / "tokenizer")
    decoder = {str(SIZE): {"content": "<cat>", "special": False} | PLAIN}
    files: dict[str, object] = {}
    if how != "added_tokens_decoder":
        files["added_tokens.json"] = {"<cat>": SIZE}
    if how != "added_tokens.json":
        files["tokenizer_config.json"] = {"added_tokens_decoder": decoder}
    tokenizer(path / "tokenizer", files)
    model = ModelSettings(source=str(path))
    with pytest.raises(OperatorError, match=f"knows {SIZE + 1} tokens, the text encoder {SIZE}"):
        resolve(model, tmp_path, text_only=True)
    weights = path / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = tensors[name][[*range(SIZE), 0]].contiguous()
    save_file(tensors, weights)
    config = json.loads((path / "text_encoder" / "config.json").read_text())
    write(path / "text_encoder" / "config.json", config | {"vocab_size": SIZE + 1})
    (part,) = resolve(model, tmp_path, text_only=True).text
    assert part.vocab_size == SIZE + 1
    stock = CLIPTokenizer.from_pretrained(part.tokenizer, local_files_only=True)
    text = "a red <cat> on a blue background"
    ids = PromptTokenizer(part).tokenize(text).ids
    assert SIZE in ids
    assert list(ids) == stock(text, add_special_tokens=False).input_ids


def test_added_tokens_come_from_the_hub_too() -> None:
    assert list(filter_repo_objects(["tokenizer/added_tokens.json"], allow_patterns=hub_files(["text_encoder"], True)))


def test_what_only_loading_finds_is_told_of_the_right_model(tmp_path: Path) -> None:
    """Garbled merges pass the check, which reads no merges."""
    folder = sd_folder(tmp_path / "other")
    content = whole_file()
    content["model"]["merges"] = [["no", "such", "merge"]]
    write(folder / "tokenizer" / "tokenizer.json", content)
    others = (ModelSettings(source=str(folder)),)
    catalog = open_catalog(Settings(data_dir=tmp_path / "data", text_models=others))
    with pytest.raises(OperatorError, match=r"^text_models\.0\.source: .*tokenizer can't be loaded") as raised:
        catalog.planners()
    assert raised.value.param == "text_models.0.source"
    catalog = open_catalog(Settings(data_dir=tmp_path / "data", model=others[0], diffusion={"replicas": 0}))
    with pytest.raises(OperatorError, match=r"^model\.source: .*tokenizer can't be loaded"):
        catalog.planners()
