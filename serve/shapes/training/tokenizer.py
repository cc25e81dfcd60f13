"""A byte-pair tokenizer of the world's captions, with CLIP's conventions (Radford et al. 2021).

CLIP's: lower case, ``</w>`` at word ends, ``<|startoftext|>`` and ``<|endoftext|>``, rows of 77 padded by the end one.
The alphabet is complete, so any text has tokens; unknown words only take more of them.
"""

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from serve.shapes.captions import caption
from serve.shapes.draw import COLOR_NAMES, PLACE_NAMES, SHAPES, sample_scene

ROW_LENGTH = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
VOCABULARY_LIMIT = 1100
COMMON_WORDS = """photo picture painting portrait cat dog house tree sun moon flower car person woman man mountain sea
sky water street city forest night day old young beautiful detailed realistic style art light dark pale deep bright
color colour colored image with without and or not no in on of the an a to at by from under over very two three one
four several many background foreground blurry ugly low quality bad worst watermark text cropped deformed gray grey
brown gold silver teal magenta"""
"""Words of ordinary prompts and negative prompts; they get tokens of their own though no caption has them."""


def train_tokenizer(seed: int, out: Path) -> None:
    """Learn the merges from captions and save the folder that CLIPTokenizer loads."""
    merges = _learn_merges(_corpus(seed))
    alphabet = list(bytes_to_unicode().values())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=ROW_LENGTH)
    tokenizer.save_pretrained(out)
    _write_classic_files(out, vocabulary, merges)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in ``folder``."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def _corpus(seed: int) -> list[str]:
    rng, words = np.random.default_rng([seed, 1]), random.Random(seed)
    captions = [caption(sample_scene(rng), words) for _ in range(6000)]
    return captions + COMMON_WORDS.split() * 12 + [*COLOR_NAMES, *SHAPES, *PLACE_NAMES] * 20


def _learn_merges(corpus: list[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    return [(left, right) for left, right in pairs]


def _write_classic_files(out: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """The files that older readers want (vocab.json, merges.txt, special_tokens_map.json) beside tokenizer.json."""
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {
        name: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, token in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
    }
    (out / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": EOS}, indent=1))
    config = json.loads((out / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "model_max_length": ROW_LENGTH,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
