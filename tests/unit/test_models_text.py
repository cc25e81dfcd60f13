"""The text side of model folders: what each family has, and what is refused, from configurations and headers alone."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.text_models import (
    CLIP_L,
    auraflow_folder,
    clip_part,
    flux_folder,
    pixart_folder,
    sd3_folder,
    sd_folder,
    sdxl_folder,
    sdxl_refiner_folder,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from serve.errors import OperatorError
from serve.models import SHIPPED, ModelFolder, resolve
from serve.models.sources import hub_files
from serve.models.tensor_tables import Kind, clip_table, stored_names, t5_table
from serve.models.text_parts import CLASSES
from serve.settings.pools import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTING = "text_models.1"


def find(folder: Path | str, **settings: str) -> ModelFolder:
    return resolve(ModelSettings(source=str(folder), **settings), Path("unused"), text_only=True, setting=SETTING)


def refusal(folder: Path | str, field: str = "source", **settings: str) -> str:
    with pytest.raises(OperatorError) as raised:
        find(folder, **settings)
    assert raised.value.param == f"{SETTING}.{field}"
    assert raised.value.message.startswith(f"{SETTING}.{field}: ")
    assert "\n" not in raised.value.message
    return raised.value.message


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(part: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(part / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "model.safetensors")


@pytest.fixture
def sd3(tmp_path: Path) -> Path:
    return sd3_folder(tmp_path / "sd3")


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return flux_folder(tmp_path / "flux")


def test_what_the_families_have(tmp_path: Path) -> None:
    made = {
        "sd": sd_folder(tmp_path / "a"),
        "sdxl": sdxl_folder(tmp_path / "b"),
        "sd3": sd3_folder(tmp_path / "c"),
        "flux": flux_folder(tmp_path / "d"),
        "sdxl_refiner": sdxl_refiner_folder(tmp_path / "e"),
        "pixart": pixart_folder(tmp_path / "f"),
        "auraflow": auraflow_folder(tmp_path / "g"),
    }
    for family, folder in made.items():
        model = find(folder)
        assert (model.family, model.name, model.denoiser) == (family, folder.name, None)
        assert tuple(part.role for part in model.text) == tuple(CLASSES[family])
        for part in model.text:
            assert part.weights == folder / part.role
            assert part.tokenizer == folder / part.role.replace("text_encoder", "tokenizer")
            assert part.row_tokens == (77 if part.kind == "clip" else None)
    assert [part.projection for part in find(made["sdxl"]).text] == [None, 28]
    assert [part.projection for part in find(made["sd3"]).text] == [20, 28, None]
    assert [part.projection for part in find(made["sdxl_refiner"]).text] == [28]
    alpha = find(pixart_folder(tmp_path / "h", sigma=False))
    assert [find(made[name]).text[-1].longest_row for name in ("flux", "pixart", "auraflow")] == [None, 300, None]
    assert (alpha.family, alpha.text[0].longest_row) == ("pixart", 120)
    assert find(made["auraflow"]).text[0].kind == "umt5"
    assert [part.projection for part in find(made["flux"]).text] == [None, None]
    assert [part.name for part in find(made["sd3"]).text] == ["clip-32x3", "clip-48x2", "t5-96x2"]
    assert {family: find(folder).context_width for family, folder in made.items()} == {
        "sd": 32,
        "sdxl": 32 + 48,
        "sd3": 96,
        "flux": 96,
        "sdxl_refiner": 48,
        "pixart": 96,
        "auraflow": 96,
    }


def hollow(part: Path, table: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float16 with a whole header and holes for weights."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in table.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (part / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


@pytest.mark.parametrize(
    ("width", "inner", "layers", "name"),
    [
        (768, 3072, 12, "clip-l"),
        (1024, 4096, 23, "openclip-h"),
        (1024, 4096, 24, "openclip-h"),
        (1280, 5120, 32, "openclip-bigg"),
        (1280, 5120, 31, "clip-1280x31"),
    ],
)
def test_clips_that_everybody_knows_are_called_by_their_names(
    tmp_path: Path, width: int, inner: int, layers: int, name: str
) -> None:
    part = sd_folder(tmp_path / "sd") / "text_encoder"
    edit(part / "config.json", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers)
    hollow(part, clip_table(json.loads((part / "config.json").read_text()), None))
    assert find(part.parent).text[0].name == name


@pytest.mark.parametrize(
    ("width", "inner", "layers", "heads", "name"),
    [
        (512, 1024, 8, 6, "t5-small"),
        (768, 2048, 12, 12, "t5-base"),
        (1024, 2816, 24, 16, "t5-large"),
        (2048, 5120, 24, 32, "t5-xl"),
        (4096, 10240, 24, 64, "t5-xxl"),
    ],
)
def test_t5s_that_everybody_knows_are_called_by_their_names(
    flux: Path, width: int, inner: int, layers: int, heads: int, name: str
) -> None:
    """At their real sizes, 9 GB for the largest: no weight is read."""
    part = flux / "text_encoder_2"
    edit(part / "config.json", d_model=width, d_ff=inner, num_layers=layers, num_heads=heads, d_kv=64)
    hollow(part, t5_table(json.loads((part / "config.json").read_text())))
    assert find(flux).text[1].name == name
    assert find(flux).context_width == width


def test_sdxl_says_what_no_negative_prompt_means(tmp_path: Path) -> None:
    folder = sdxl_folder(tmp_path / "sdxl")
    assert find(folder).zero_empty_negative
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=None)
    assert find(folder).zero_empty_negative, "the stock pipeline's default"
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not find(folder).zero_empty_negative
    assert not find(sd_folder(tmp_path / "sd")).zero_empty_negative


def test_sd3_without_its_t5(sd3: Path) -> None:
    edit(sd3 / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(sd3 / "text_encoder_3")
    model = find(sd3)
    assert [part.role for part in model.text] == ["text_encoder", "text_encoder_2"]
    assert model.context_width == 96, "what the transformer reads"
    shutil.rmtree(sd3 / "transformer")
    assert find(sd3).context_width == 4096


def test_sd3_whose_parts_do_not_fit_together(sd3: Path) -> None:
    edit(sd3 / "transformer" / "config.json", joint_attention_dim=128)
    assert "reads text 128 wide" in refusal(sd3)
    edit(sd3 / "transformer" / "config.json", joint_attention_dim="wide")
    assert "reads text wide wide" in refusal(sd3)
    shutil.rmtree(sd3 / "transformer")
    assert find(sd3).context_width == 96


def test_a_folder_with_text_alone_is_drawn_nowhere(sd3: Path) -> None:
    with pytest.raises(OperatorError) as raised:
        resolve(ModelSettings(source=str(sd3)), Path("unused"))
    assert raised.value.param == "model.source"
    assert "vae/config.json is missing" in raised.value.message


def test_pipelines_that_are_not_served(flux: Path) -> None:
    edit(flux / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
    assert "CLIPTextModelWithProjection is what the sdxl_refiner family has" in refusal(flux)
    edit(flux / "model_index.json", _class_name="KolorsPipeline")
    assert "KolorsPipeline" in refusal(flux)
    edit(flux / "model_index.json", _class_name=None)
    assert "this version serves StableDiffusionPipeline" in refusal(flux)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder is CLIPTextModel"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2 is missing"),
        ("model_index.json", {"text_encoder_3": ["transformers", "UMT5EncoderModel"]}, "UMT5EncoderModel"),
        ("model_index.json", {"text_encoder": "CLIPTextModelWithProjection"}, "text_encoder is missing"),
        ("tokenizer/tokenizer.json", {"added_tokens": [{"id": 916}]}, "tokenizer.json garbles its added_tokens"),
        ("tokenizer_3/tokenizer.json", {"model": {"type": "Unigram", "vocab": [1]}}, "garbles its vocabulary"),
        ("tokenizer_3/tokenizer.json", {"model": []}, "holds a None tokenizer"),
        ("text_encoder/config.json", {"model_type": "clip"}, "model_type is clip, not clip_text_model"),
        ("text_encoder_3/config.json", {"model_type": "umt5"}, "model_type is umt5, not t5"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide"),
        ("text_encoder/config.json", {"hidden_size": "32"}, "hidden_size (32)"),
        ("text_encoder/config.json", {"num_hidden_layers": True}, "num_hidden_layers (True)"),
        ("text_encoder/config.json", {"eos_token_id": [917]}, "eos_token_id [917]"),
        ("text_encoder/config.json", {"eos_token_id": 49407}, "eos_token_id 49407 is not one of its 918"),
        ("text_encoder/config.json", {"eos_token_id": 5}, "ends a text with 917 (<|endoftext|>), the text encod"),
        ("text_encoder/config.json", {"hidden_act": "tanhshrink"}, "hidden_act is tanhshrink"),
        ("text_encoder/config.json", {"layer_norm_eps": 0.0}, "layer_norm_eps (0.0)"),
        ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": ["<cat>"]}, "config.json garbles its added_tok"),
        ("text_encoder_3/config.json", {"dense_act_fn": "tanhshrink"}, "dense_act_fn is tanhshrink"),
        ("text_encoder_3/config.json", {"dense_act_fn": None, "feed_forward_proj": "gated-"}, "feed_forward_proj is"),
        ("text_encoder_3/config.json", {"layer_norm_epsilon": "small"}, "layer_norm_epsilon (small)"),
        ("text_encoder/config.json", {"hidden_size": 64}, "has the shape [918, 32], its configuration says [918, 64]"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "not explain the tensor text_model.encoder.layers.2."),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, "its weights lack encoder.layers.3."),
        ("text_encoder/config.json", {"projection_dim": 21}, "text_projection.weight has the shape [20, 32]"),
        ("text_encoder_2/config.json", {"projection_dim": None}, "projection_dim (None)"),
        ("text_encoder_3/config.json", {"d_model": None}, "d_model (None)"),
        ("text_encoder_3/config.json", {"vocab_size": 324}, "knows 325 tokens, the text encoder 324"),
        ("text_encoder_3/config.json", {"vocab_size": 32128}, "knows 325 tokens, the text encoder 32128"),
        ("text_encoder_3/config.json", {"is_gated_act": False}, "DenseReluDense.wi.weight"),
        ("text_encoder_3/config.json", {"relative_attention_num_buckets": 16}, "relative_attention_bias.weight has"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(sd3: Path, file: str, changes: dict[str, object], reason: str) -> None:
    edit(sd3 / file, **changes)
    assert reason in refusal(sd3)


def test_a_mask_that_the_stock_pipeline_would_use(tmp_path: Path, sd3: Path) -> None:
    """StableDiffusionPipeline alone heeds it."""
    sd = sd_folder(tmp_path / "sd")
    edit(sd / "text_encoder" / "config.json", use_attention_mask=False)
    assert find(sd).family == "sd"
    edit(sd / "text_encoder" / "config.json", use_attention_mask=True)
    assert "text_encoder: use_attention_mask is set, and padding is always read here" in refusal(sd)
    edit(sd3 / "text_encoder" / "config.json", use_attention_mask=True)
    assert find(sd3).family == "sd3"


def test_another_encoders_weights(sd3: Path) -> None:
    shutil.copy(sd3 / "text_encoder_3" / "model.safetensors", sd3 / "text_encoder_2" / "model.safetensors")
    assert "lack embeddings.token_embedding.weight and " in refusal(sd3)


def test_encoders_in_exchanged_places(flux: Path) -> None:
    (flux / "text_encoder").rename(flux / "spare")
    (flux / "text_encoder_2").rename(flux / "text_encoder")
    (flux / "spare").rename(flux / "text_encoder_2")
    assert "model_type is t5" in refusal(flux)


def test_a_t5_with_another_tokenizer(flux: Path) -> None:
    shutil.copy(flux / "tokenizer" / "tokenizer.json", flux / "tokenizer_2" / "tokenizer.json")
    assert "holds a BPE tokenizer, not a Unigram one" in refusal(flux)
    (flux / "tokenizer_2" / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in refusal(flux)


def test_a_clip_with_another_tokenizer(flux: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (flux / "tokenizer" / name).unlink(missing_ok=True)
    assert find(flux).family == "flux"
    shutil.copy(flux / "tokenizer_2" / "tokenizer.json", flux / "tokenizer" / "tokenizer.json")
    assert "holds a Unigram tokenizer, not a BPE one" in refusal(flux)


def test_quantized_weights_are_not_taken_for_plain_ones(flux: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    edit_tensors(flux / "text_encoder_2", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is stored as I8" in refusal(flux)


def test_what_checkpoints_hold_beside_the_encoder(flux: Path) -> None:
    """Constants of old versions, the other half of a whole T5, a projection that the family does not read."""
    edit_tensors(
        flux / "text_encoder",
        lambda tensors: tensors.update(
            {
                "embeddings.position_ids": torch.arange(77)[None],
                "text_projection.weight": torch.zeros(20, 32),
            }
        ),
    )
    edit_tensors(
        flux / "text_encoder_2",
        lambda tensors: tensors.update(
            {
                "encoder.embed_tokens.weight": tensors["shared.weight"].clone(),
                "decoder.final_layer_norm.weight": torch.ones(96),
                "lm_head.weight": torch.zeros(384, 96),
            }
        ),
    )
    assert [part.projection for part in find(flux).text] == [None, None]
    edit_tensors(flux / "text_encoder_2", lambda tensors: tensors.pop("shared.weight"))
    assert find(flux).family == "flux"
    edit_tensors(flux / "text_encoder_2", lambda tensors: tensors.pop("encoder.embed_tokens.weight"))
    assert "lack shared.weight" in refusal(flux)


def test_a_tensor_under_two_names(flux: Path) -> None:
    name = "final_layer_norm.bias"
    edit_tensors(flux / "text_encoder", lambda tensors: tensors.update({f"text_model.{name}": tensors[name].clone()}))
    assert f"under two names: {name} and text_model.{name}" in refusal(flux)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("whole") / "sd3")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_lost_bent_or_foreign_tensor_is_named(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bent") / "sd3"
    shutil.copytree(whole, folder)
    part = folder / data.draw(st.sampled_from(["text_encoder", "text_encoder_2", "text_encoder_3"]))
    tensors = load_file(part / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    how = data.draw(st.sampled_from(["lose", "flatten", "shorten", "rename", "add"]))
    if how in ("lose", "rename"):
        tensors.pop(name)
    if how in ("rename", "add"):
        tensors[f"{name}2"] = tensor.clone()
    elif how != "lose":
        tensors[name] = tensor[None] if how == "flatten" else tensor[:-1].contiguous()
    save_file(tensors, part / "model.safetensors")
    assert name.removeprefix("text_model.") in refusal(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_cut_weights(sd3: Path, keep: int) -> None:
    file = sd3 / "text_encoder_3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refusal(sd3)


sizes = st.integers(1, 4)


@settings(max_examples=30, deadline=None)
@given(heads=sizes, width=sizes, inner=sizes, layers=sizes, vocab=st.integers(2, 9), projection=st.none() | sizes)
def test_the_clip_table_is_transformers_own(
    heads: int, width: int, inner: int, layers: int, vocab: int, projection: int | None
) -> None:
    config = CLIPTextConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=vocab,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    promised = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = stored_names(promised, "clip")
    assert {name: promised[stored] for name, stored in names.items()} == clip_table(config.to_dict(), projection)


@settings(max_examples=30, deadline=None)
@given(
    width=sizes, inner=sizes, heads=sizes, head=sizes, layers=sizes, vocab=sizes, buckets=st.sampled_from([4, 32]),
    act=st.sampled_from(["relu", "gated-gelu", "gated-silu"]), kind=st.sampled_from(["t5", "umt5"]),
)  # fmt: skip
def test_the_t5_table_is_transformers_own(
    width: int, inner: int, heads: int, head: int, layers: int, vocab: int, buckets: int, act: str, kind: Kind
) -> None:
    configuration, encoder = (T5Config, T5EncoderModel) if kind == "t5" else (UMT5Config, UMT5EncoderModel)
    config = configuration(
        d_model=width,
        d_ff=inner,
        num_heads=heads,
        d_kv=head,
        num_layers=layers,
        vocab_size=vocab,
        relative_attention_num_buckets=buckets,
        feed_forward_proj=act,
        pad_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        promised = {name: tuple(tensor.shape) for name, tensor in encoder(config).state_dict().items()}
    written = config.to_dict()
    table = {name: promised[stored] for name, stored in stored_names(promised, kind).items()}
    assert table == t5_table(written, kind)
    derived = {key: value for key, value in written.items() if key not in ("dense_act_fn", "is_gated_act")}
    assert table == t5_table(derived, kind), "older configurations write feed_forward_proj alone"
    if act == {"t5": "relu", "umt5": "gated-gelu"}[kind]:
        assert table == t5_table({key: value for key, value in derived.items() if key != "feed_forward_proj"}, kind)


def test_a_hub_id_needs_a_commit_and_its_text_alone(
    tmp_path: Path, flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "40 hex digits" in refusal("someone/some-flux", field="revision")
    assert "does not answer" in refusal("someone/some-flux", revision=COMMIT)
    shutil.copytree(flux, tmp_path / "hub" / "models--someone--some-flux" / "snapshots" / COMMIT)
    assert find("someone/some-flux", revision=COMMIT).name == "some-flux"


def test_what_is_fetched_from_the_hub_for_text() -> None:
    """The files of FLUX.1-dev and stable-diffusion-3.5-medium, as the hub lists them."""
    flux = [
        "flux1-dev.safetensors",
        "ae.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/special_tokens_map.json",
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    got = list(filter_repo_objects(flux, allow_patterns=hub_files(CLASSES["flux"], True)))
    weights = [name for name in flux if name.startswith(("text_encoder", "tokenizer")) and "spiece" not in name]
    assert got == ["model_index.json", *weights, "transformer/config.json"]
    sd3 = [
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00001-of-00002.fp16.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "text_encoder_3/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
    ]
    assert list(filter_repo_objects(sd3, allow_patterns=hub_files(CLASSES["sd3"], True))) == sd3[:1]


def test_for_drawing_the_image_side_comes_too() -> None:
    files = ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json"]
    assert list(filter_repo_objects(files, allow_patterns=hub_files(CLASSES["sd"], False))) == files
    assert not list(filter_repo_objects(files, allow_patterns=hub_files(CLASSES["sd"], True)))


def test_text_alone_asks_for_nothing_else(tmp_path: Path) -> None:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(SHIPPED / part, tmp_path / "text" / part)
    shutil.copy(SHIPPED / "model_index.json", tmp_path / "text")
    assert find(tmp_path / "text").text[0].width == 128
    with pytest.raises(OperatorError, match=r"unet.config\.json is missing"):
        resolve(ModelSettings(source=str(tmp_path / "text")), tmp_path)


def test_the_trunk_of_a_seed_is_one_whatever_is_on_top(tmp_path: Path) -> None:
    """What the tests of sharing stand on."""
    bare = load_file(clip_part(tmp_path / "a", "text_encoder", 7, CLIP_L) / "model.safetensors")
    crowned = load_file(clip_part(tmp_path / "b", "text_encoder", 7, CLIP_L, projection=5) / "model.safetensors")
    assert crowned.pop("text_projection.weight").shape == (5, 32)
    assert {name.removeprefix("text_model.") for name in crowned} == set(bare)
    assert all(torch.equal(bare[name.removeprefix("text_model.")], tensor) for name, tensor in crowned.items())
