"""Small models that describe pictures, with random weights, in folders as transformers keeps them: BLIP, which
captions, and LLaVA, which chats. Their words come from a picture's colours, whatever they mean."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import torch
from PIL import Image
from support.text_models import fill
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging as transformers_logging

from serve.captions.describer import Describer
from serve.captions.pool import CaptionPool
from serve.captions.service import CaptionService, ReadPicture
from serve.models.captioner import captioner_of
from serve.settings.pools import CaptionSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import Metrics

SIDE, PATCH = 32, 8
BLIP_POSITIONS = 96
WORDS = (
    "a",
    "red",
    "blue",
    "green",
    "yellow",
    "circle",
    "square",
    "triangle",
    "on",
    "of",
    "the",
    "picture",
    "and",
    ".",
)
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>", "<turn>")
BEGIN = len(MARKS) + len(WORDS)
"""What BLIP's captions begin with; as in the published ones, its tokenizer does not know of it."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}<turn>"
)
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def blip_folder(path: Path, seed: int = 7) -> Path:
    """Captions a picture alone, or goes on from the words that it is given."""
    config = BlipConfig(
        text_config={
            "vocab_size": BEGIN + 1,
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": BLIP_POSITIONS,
            "bos_token_id": BEGIN,
            "pad_token_id": MARKS.index("[PAD]"),
            "eos_token_id": MARKS.index("[SEP]"),
            "sep_token_id": MARKS.index("[SEP]"),
        },
        vision_config=_TOWER,
        projection_dim=16,
    )
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), _tokenizer(ends=True))
    return _save(BlipForConditionalGeneration(config), processor, path, seed)


def llava_folder(path: Path, seed: int = 7) -> Path:
    """Answers what it is told of a picture."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_TOWER, projection_dim=16),
        text_config=LlamaConfig(
            vocab_size=BEGIN,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=MARKS.index("[CLS]"),
            eos_token_id=MARKS.index("[SEP]"),
            pad_token_id=MARKS.index("[PAD]"),
        ),
        image_token_index=MARKS.index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        _tokenizer(ends=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    return _save(LlavaForConditionalGeneration(config), processor, path, seed)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """What is so small takes ten times as long where threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def describer_of(settings: CaptionSettings) -> Describer:
    folder = captioner_of(settings)
    assert folder is not None
    return Describer.load(folder, settings, torch.device("cpu"))


@contextlib.asynccontextmanager
async def describing(settings: Settings, view: ReadPicture, metrics: Metrics) -> AsyncIterator[CaptionService | None]:
    """What an ingress has of captions, with the pool in this process; None where the settings name no model."""
    own = settings.captions
    if not own.source:
        yield None
        return
    pool = CaptionPool(describer_of(own), own.max_batch_size, metrics)
    yield CaptionService(own.model, own, settings.limits, view, pool.caption)
    await pool.close()


def picture(colour: str, width: int = 48, height: int = 40) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def _tokenizer(*, ends: bool) -> PreTrainedTokenizerFast:
    """Whole words. `ends`: a text stands between two marks, as BERT's does."""
    vocabulary = {word: index for index, word in enumerate((*MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>", "turn_token": "<turn>"},
    )


def _save(model: PreTrainedModel, processor: BlipProcessor | LlavaProcessor, path: Path, seed: int) -> Path:
    transformers_logging.disable_progress_bar()
    fill(model, seed)
    for name, parameter in model.named_parameters():
        if "patch_embedding" in name or "crossattention.output.dense.weight" in name:  # else all pictures are alike
            parameter.data *= 6
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
