"""Small model folders with random weights, in the diffusers layout: the text side of each family, no denoiser.

Everything that the stock pipelines' `encode_prompt` reads is real: classes, configurations, tokenizers. Widths differ
from part to part, so that a mix-up can't pass, and no parameter is left at 0 or 1, so that a forgotten one shows.
The CLIP-L of all families has the same trunk for the same `clip_seed`, OpenCLIP for `open_seed`, T5 for `t5_seed`;
by default each comes from `seed`, so that folders of one seed share what their families share.
"""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from serve.models import SHIPPED

CLIP_L = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP_L_PROJECTION = 20
OPENCLIP = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6}
OPENCLIP_PROJECTION = 28
T5 = {"d_model": 96, "d_kv": 16, "d_ff": 104, "num_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu"}
T5_SENTINELS = 10
T5_TOKENS = 512
"""`model_max_length` of every published pipeline's T5 tokenizer."""


def sd_folder(path: Path, seed: int = 0, *, clip_seed: int | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Stable Diffusion 1.x: one CLIP."""
    _clip_l(path, _or(clip_seed, seed), dtype)
    return _index(path, "StableDiffusionPipeline", ("unet", "UNet2DConditionModel"))


def sdxl_folder(
    path: Path,
    seed: int = 0,
    *,
    clip_seed: int | None = None,
    open_seed: int | None = None,
    zero_empty_negative: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """SDXL: CLIP-L without projection, OpenCLIP with one, whose tokenizer pads with `!`."""
    _clip_l(path, _or(clip_seed, seed), dtype)
    _openclip(path, _or(open_seed, seed), dtype)
    return _index(
        path,
        "StableDiffusionXLPipeline",
        ("unet", "UNet2DConditionModel"),
        {"force_zeros_for_empty_prompt": zero_empty_negative},
    )


def sdxl_refiner_folder(
    path: Path, seed: int = 0, *, open_seed: int | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """SDXL's refiner: OpenCLIP alone, in the second role."""
    _openclip(path, _or(open_seed, seed), dtype)
    options = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return _index(path, "StableDiffusionXLImg2ImgPipeline", ("unet", "UNet2DConditionModel"), options)


def sd3_folder(
    path: Path,
    seed: int = 0,
    *,
    with_t5: bool = True,
    clip_seed: int | None = None,
    open_seed: int | None = None,
    t5_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """SD 3: CLIP-L and OpenCLIP with projections, and T5, which a folder may lack."""
    _clip_l(path, _or(clip_seed, seed), dtype, CLIP_L_PROJECTION)
    _openclip(path, _or(open_seed, seed), dtype)
    if with_t5:
        t5_part(path, "text_encoder_3", _or(t5_seed, seed), dtype)
    (path / "transformer").mkdir()
    _write(path / "transformer" / "config.json", {"joint_attention_dim": T5["d_model"]})
    return _index(path, "StableDiffusion3Pipeline", ("transformer", "SD3Transformer2DModel"))


def flux_folder(
    path: Path,
    seed: int = 0,
    *,
    clip_seed: int | None = None,
    t5_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """FLUX.1: the pooled output of CLIP-L, and T5."""
    _clip_l(path, _or(clip_seed, seed), dtype)
    t5_part(path, "text_encoder_2", _or(t5_seed, seed), dtype)
    return _index(path, "FluxPipeline", ("transformer", "FluxTransformer2DModel"))


def pixart_folder(
    path: Path,
    seed: int = 0,
    *,
    sigma: bool = True,
    t5_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """PixArt-Sigma, or Alpha, whose text is shorter: T5 alone."""
    t5_part(path, "text_encoder", _or(t5_seed, seed), dtype)
    pipeline = "PixArtSigmaPipeline" if sigma else "PixArtAlphaPipeline"
    return _index(path, pipeline, ("transformer", "PixArtTransformer2DModel"))


def auraflow_folder(path: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Path:
    """AuraFlow: UMT5 with a tokenizer of Llama's kind."""
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    config = UMT5Config(**T5, vocab_size=-(-len(tokenizer) // 128) * 128)
    _save(UMT5EncoderModel(config), path / "text_encoder", seed, dtype)
    return _index(path, "AuraFlowPipeline", ("transformer", "AuraFlowTransformer2DModel"))


def clip_part(
    path: Path,
    role: str,
    seed: int,
    sizes: Mapping[str, int],
    *,
    projection: int | None = None,
    act: str = "quick_gelu",
    pad: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """One CLIP text encoder and its tokenizer: the shipped one, which pads with the end of text unless `pad` says else.

    The trunk depends on `seed` and `sizes` alone, whether there is a projection or not.
    """
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer", local_files_only=True)
    if pad is not None:
        tokenizer.pad_token = pad
    tokenizer.save_pretrained(path / role.replace("text_encoder", "tokenizer"))
    config = CLIPTextConfig(
        **sizes,
        vocab_size=len(tokenizer),
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    return _save(model, path / role, seed, dtype)


def t5_part(path: Path, role: str, seed: int, dtype: torch.dtype = torch.float32, **sizes: object) -> Path:
    """One T5 encoder and its tokenizer; `sizes` are `T5Config`'s and go over `T5`."""
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(path / role.replace("text_encoder", "tokenizer"))
    # Padded to a multiple of 128 rows, as T5's own embedding is.
    config = T5Config(**{**T5, **sizes}, vocab_size=-(-len(tokenizer) // 128) * 128)
    return _save(T5EncoderModel(config), path / role, seed, dtype)


def t5_tokenizer() -> T5Tokenizer:
    """A real Unigram tokenizer, laid out as T5's: the shipped vocabulary's words, letters and marks; no capitals."""
    words = json.loads((SHIPPED / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    whole = [word.removesuffix("</w>") for word in words if word.endswith("</w>")]
    whole = [word for word in whole if word.isascii() and word.isalpha() and len(word) > 1]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(letter, -9.0) for letter in string.ascii_lowercase + string.digits + string.punctuation]
    pieces += [(f"▁{word}", -6.0 - 0.001 * index) for index, word in enumerate(whole)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(T5_SENTINELS))]
    return T5Tokenizer(vocab=pieces, extra_ids=T5_SENTINELS, model_max_length=T5_TOKENS)


def llama_tokenizer() -> LlamaTokenizer:
    """A real BPE tokenizer, laid out as Pile-T5's: the same words, built up letter by letter, and bytes for all else.

    It puts an end after a text, and nothing before it.
    """
    pieces = t5_tokenizer().get_vocab()
    words = sorted(piece for piece in pieces if piece.startswith("▁") and len(piece) > 1)
    tokens = ("<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for piece in (*string.ascii_lowercase, *string.digits, *string.punctuation, "▁"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = {}
    for word in words:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=list(merges),
        pad_token="<pad>",
        add_bos_token=False,
        add_eos_token=True,
        model_max_length=T5_TOKENS,
    )


def fill(model: PreTrainedModel, seed: int) -> None:
    """Every parameter from `seed` and its own name, so that equal trunks under different heads are equal.

    Matrices have the spread that keeps activations near 1; gains lie about 1, biases about 0.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + _spell(name))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.data = noise if "embedding" in name or "shared" in name else noise * parameter.shape[1] ** -0.5
        else:
            parameter.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))


def _clip_l(path: Path, seed: int, dtype: torch.dtype, projection: int | None = None) -> None:
    clip_part(path, "text_encoder", seed, CLIP_L, projection=projection, dtype=dtype)


def _openclip(path: Path, seed: int, dtype: torch.dtype) -> None:
    clip_part(path, "text_encoder_2", seed, OPENCLIP, projection=OPENCLIP_PROJECTION, act="gelu", pad="!", dtype=dtype)


def _save(model: PreTrainedModel, path: Path, seed: int, dtype: torch.dtype) -> Path:
    transformers_logging.disable_progress_bar()
    fill(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(path)
    return path


def _spell(name: str) -> int:
    """A number for a parameter's name, the same in every process and for every spelling of a trunk's tensor."""
    return int.from_bytes(name.removeprefix("text_model.").encode()) % 999_983


def _or(seed: int | None, default: int) -> int:
    return default if seed is None else seed


def _index(path: Path, pipeline: str, denoiser: tuple[str, str], options: Mapping[str, Any] = {}) -> Path:
    """model_index.json, as the pipeline itself would write it. Text parts that are not there are null."""
    index: dict[str, object] = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **options}
    index |= {denoiser[0]: ["diffusers", denoiser[1]], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    for number in ("", "_2", "_3") if pipeline == "StableDiffusion3Pipeline" else ("", "_2"):
        encoder = path / f"text_encoder{number}" / "config.json"
        cls = json.loads(encoder.read_text())["architectures"][0] if encoder.is_file() else None
        if cls is None and pipeline.startswith(("StableDiffusionPipeline", "PixArt", "AuraFlow")):
            continue
        tokenizers = {None: None, "T5EncoderModel": "T5TokenizerFast", "UMT5EncoderModel": "LlamaTokenizerFast"}
        tokenizer = tokenizers.get(cls, "CLIPTokenizer")
        library = cls and "transformers"
        index |= {f"text_encoder{number}": [library, cls], f"tokenizer{number}": [library, tokenizer]}
    _write(path / "model_index.json", index)
    return path


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
