"""What of a model is fetched from the hub: the files that `check_folder` asks for, at one commit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from serve.errors import OperatorError
from serve.models.defaults import GENERATION_CONFIG
from serve.models.weight_files import STEMS, TOKENIZER_FILES, NotHereYet, refused

_SHARD = "[0-9]" * 5
"""Shards are numbered like this; with `*` the files of the fp16 variant would come too."""


def _weights(part: str, stem: str) -> tuple[str, ...]:
    return (
        f"{part}/config.json",
        f"{part}/{stem}.safetensors",
        f"{part}/{stem}.safetensors.index.json",
        f"{part}/{stem}-{_SHARD}-of-{_SHARD}.safetensors",
    )


_IMAGE_FILES = (
    GENERATION_CONFIG,
    "scheduler/scheduler_config.json",
    *(pattern for part in ("unet", "transformer", "vae") for pattern in _weights(part, "diffusion_pytorch_model")),
)
"""A model has either a U-Net or a transformer."""


def configuration_files(parts: Iterable[str]) -> tuple[str, ...]:
    """Patterns of everything that is no weight, and of the weights of `parts`."""
    patterns = (pattern for part in parts for stem in STEMS for pattern in _weights(part, stem))
    return ("*.json", "*.txt", "*/*.json", "*/*.txt", *patterns)


def hub_files(roles: Iterable[str], text_only: bool) -> tuple[str, ...]:
    """Patterns of what `check_folder` asks for and nothing else: no pickles, no variants, no safety checker."""
    tokenizers = [role.replace("text_encoder", "tokenizer") for role in roles]
    return (
        "model_index.json",
        "transformer/config.json",
        *(f"{tokenizer}/{name}" for tokenizer in tokenizers for name in TOKENIZER_FILES),
        *(pattern for role in roles for pattern in _weights(role, "model")),
        *(() if text_only else _IMAGE_FILES),
    )


def downloaded(hub_id: str, commit: str, files: Iterable[str], *, here_only: bool = False) -> Path:
    """The hub's snapshot of exactly that commit, from the local hub cache where it is there, with what is there of
    `files` (patterns). Raises OperatorError; NotHereYet where it is not in the cache and `here_only`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        wanted = list(files)
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=wanted, local_files_only=here_only))
    except RevisionNotFoundError:
        raise OperatorError(f"model.revision: {hub_id} has no commit {commit} on the hub", "model.revision") from None
    except RepositoryNotFoundError:
        raise refused(f"the hub has no {hub_id}, or HF_TOKEN may not read it") from None
    except LocalEntryNotFoundError:
        if here_only:
            raise NotHereYet(f"model.source: {hub_id} at {commit} has to be fetched first", "model.source") from None
        raise refused(f"the hub does not answer, and {hub_id} at {commit} is not in the local hub cache") from None
    except (HfHubHTTPError, OSError):
        raise refused(f"{hub_id} at {commit} could not be fetched from the hub") from None
