from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.text_models import auraflow_folder, clip_part, flux_folder, sd3_folder, sdxl_folder, t5_part
from transformers import T5EncoderModel

from serve.encoders.registry import Encoder, register
from serve.models import check_folder
from serve.settings.tree import Settings

WIDE_CLIP = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
WIDE_T5 = {"d_model": 256, "d_kv": 64, "d_ff": 640, "num_layers": 4, "num_heads": 4}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Encoder]:
    """Small random ones, as the registry has them: `clip` has no projection; `umt5` is AuraFlow's, others SD 3's."""
    root = tmp_path_factory.mktemp("encoders")
    folders = {"sdxl": sdxl_folder(root / "sdxl"), "sd3": sd3_folder(root / "sd3", seed=1)}
    folders["auraflow"] = auraflow_folder(root / "auraflow", seed=2)
    models = [check_folder(folder, name, text_only=True) for name, folder in folders.items()]
    served = register(models, Settings(data_dir=root / "data")).encoders
    by_role = {(encoder.models[0], encoder.part.role): encoder for encoder in served}
    return {
        "clip": by_role["sdxl", "text_encoder"],
        "clip-projected": by_role["sd3", "text_encoder"],
        "openclip": by_role["sd3", "text_encoder_2"],
        "t5": by_role["sd3", "text_encoder_3"],
        "umt5": by_role["auraflow", "text_encoder"],
    }


@pytest.fixture(scope="session")
def wide_encoders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Encoder]:
    """Wide enough for the linear layers to be most of the weights, and for the errors of many to average."""
    path = flux_folder(tmp_path_factory.mktemp("wide") / "model")
    clip_part(path, "text_encoder", 0, WIDE_CLIP)
    t5 = T5EncoderModel.from_pretrained(t5_part(path, "text_encoder_2", 0, **WIDE_T5))
    for block in t5.encoder.block:
        # T5 does not scale attention scores, its queries are small instead: else each token would look at one other.
        block.layer[0].SelfAttention.q.weight.data *= WIDE_T5["d_kv"] ** -0.5
    t5.save_pretrained(path / "text_encoder_2")
    model = check_folder(path, "wide", text_only=True)
    served = {each.part.role: each for each in register([model], Settings(data_dir=path / "data")).encoders}
    return {"clip": served["text_encoder"], "t5": served["text_encoder_2"]}


@pytest.fixture(scope="session")
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture
def fresh_compiler(compiled_code: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph and no compiled code from earlier sessions, and none left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
