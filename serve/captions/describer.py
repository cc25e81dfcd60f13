"""Pictures -> words with a model of transformers, whichever it is. Greedy: the same picture gives the same words."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from serve.captions.messages import Ask, Caption
from serve.devices import check_dtype, device_errors
from serve.errors import InvalidRequest, OperatorError, TandemError
from serve.models.captioner import CaptionerFolder
from serve.settings.pools import CaptionSettings

log = logging.getLogger(__name__)

CHAT_PROMPT = "Describe this image in one sentence."
_SAFE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is fetched, and no code that came with a model is run."""
_GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
_TRIED = Image.new("RGB", (64, 48), (96, 128, 160))


class Describer:
    """One batch at a time.

    Owns: the model's weights, and the processor that makes pictures and texts ready for it.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device, prompt: str) -> None:
        """`prompt` is that of an ask without one; empty, the model's kind says it."""
        self._model = model
        self._processor = processor
        self._device = device
        self._chats = bool(getattr(processor, "chat_template", None))
        self._prompt = prompt or (CHAT_PROMPT if self._chats else "")
        self._marks = _marks(model, processor.tokenizer)
        # A position that a model has not is out of a table's bounds, which on a GPU breaks the whole device.
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._room: int = positions or sys.maxsize
        tokens = {*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", None)}
        self._control = sorted(str(token) for token in tokens if token)
        processor.tokenizer.padding_side = "left"  # what is written comes after the last token of every row

    @classmethod
    def load(cls, folder: CaptionerFolder, settings: CaptionSettings, device: torch.device) -> Describer:
        """Describes a picture of its own, so that what can't work is found out now. Raises OperatorError."""
        name = dtype_of(settings, device)
        check_dtype(device, name, "captions.dtype")
        try:
            model, processor, missing = _loaded(folder, getattr(torch, name))
            if missing:
                raise OperatorError(f"captions.source: {folder.path}: its weights lack {missing[0]}", "captions.source")
            describer = cls(model.to(device).eval(), processor, device, settings.prompt)
            if settings.max_new_tokens >= describer._room:
                message = f"captions.max_new_tokens: {folder.path} reads and writes {describer._room} tokens at most"
                raise OperatorError(message, "captions.max_new_tokens")
            with device_errors("the captions pool"):
                describer._written([_TRIED], describer._prompt, 1)
        except TandemError as error:
            if isinstance(error, OperatorError):
                raise
            raise OperatorError(f"captions.source: {folder.path}: {error.message}", "captions.source") from error
        except Exception as error:
            log.exception("%s can't be loaded", folder.path)
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            message = f"captions.source: transformers can't make captions with {folder.path} ({said})"
            raise OperatorError(message, "captions.source") from None
        return describer

    def check(self, ask: Ask) -> None:
        """InvalidRequest for a prompt with the model's own marks in it: a second picture's place, the end of a turn."""
        if met := next((token for token in self._control if token in ask.prompt), None):
            raise InvalidRequest(f"prompt holds {met}, which is a mark of the model's own", "prompt")

    def describe(self, asks: Sequence[Ask]) -> list[Caption]:
        """In the order of `asks`. Those that are told the same go together. Raises InvalidRequest where one is told
        more than the model can read; GenerationFailed, OutOfMemory, DeviceLost."""
        groups: dict[tuple[str, int], list[int]] = {}
        for index, ask in enumerate(asks):
            groups.setdefault((ask.prompt or self._prompt, ask.max_new_tokens), []).append(index)
        found: dict[int, Caption] = {}
        with device_errors("the captions pool"):
            for (prompt, most), places in groups.items():
                pictures = [Image.open(io.BytesIO(asks[place].picture)).convert("RGB") for place in places]
                found |= zip(places, self._written(pictures, prompt, most), strict=True)
        return [found[index] for index in range(len(asks))]

    @torch.inference_mode()
    def _written(self, pictures: Sequence[Image.Image], prompt: str, most: int) -> list[Caption]:
        inputs = self._inputs(pictures, prompt)
        read = inputs.get("input_ids")
        read = None if read is None else read.clone()  # BLIP writes into it
        taken = 0 if read is None else read.shape[1]
        if taken + most > self._room:
            told = f"prompt, picture and caption would take {taken} + {most} tokens; the model has {self._room}"
            raise InvalidRequest(told, "prompt")
        # One beam and no sampling, whatever the model's own generation_config.json says.
        rows = self._model.generate(**inputs, max_new_tokens=most, **_GREEDY)
        if read is not None and torch.equal(rows[:, : read.shape[1]], read):
            rows = rows[:, read.shape[1] :]  # a decoder's rows begin with what it was told
        texts = self._processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        counts = [sum(token not in self._marks for token in row) for row in rows.tolist()]
        return [Caption(text.strip(), count) for text, count in zip(texts, counts, strict=True)]

    def _inputs(self, pictures: Sequence[Image.Image], prompt: str) -> Mapping[str, Any]:
        if self._chats:
            turns = [[{"role": "user", "content": _content(picture, prompt)}] for picture in pictures]
            inputs = self._processor.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        else:
            told = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
            inputs = self._processor(images=list(pictures), return_tensors="pt", **told)
        moved: Mapping[str, Any] = inputs.to(self._device, self._model.dtype)  # floating point alone is cast
        return moved


def dtype_of(settings: CaptionSettings, device: torch.device) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"


def _marks(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text. BLIP's row begins with one that its tokenizer does not have."""
    text = model.config.get_text_config(decoder=True)
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "decoder_start")]
    found = [getattr(each, name, None) for each in (text, model.generation_config) for name in names]
    lists = [each if isinstance(each, list) else [each] for each in found]
    return frozenset(tokenizer.all_special_ids) | {token for each in lists for token in each if token is not None}


def _content(picture: Image.Image, prompt: str) -> list[dict[str, Any]]:
    return [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]


def _loaded(folder: CaptionerFolder, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """Model, processor, and the weights that the files lack: transformers would fill them with noise."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

    processor = AutoProcessor.from_pretrained(folder.path, **_SAFE)
    if not isinstance(processor, ProcessorMixin):  # a tokenizer, or what makes pictures ready, without the other
        message = f"captions.source: {folder.path} has no processor for pictures and text together"
        raise OperatorError(message, "captions.source")
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **_SAFE
    )
    return model, processor, sorted(found["missing_keys"])
