"""The identity of a text encoder, so that two encoders never share a cache entry and two replicas of one always do."""

from __future__ import annotations

import hashlib
from pathlib import Path

from serve.models.weight_files import TOKENIZER_FILES, weight_files


def fingerprint(folder: Path, dtype: str) -> str:
    """32 hex digits over the encoder's config, weights and tokenizer under `folder`, and the dtype it runs in.

    Names and lengths are hashed with the bytes, so that moving bytes between files is another encoder. Reads the
    weights once (about a second per GB); raises OSError where a file is gone.
    """
    encoder = folder / "text_encoder"
    files = [encoder / "config.json", *weight_files(encoder)]
    files += [path for name in TOKENIZER_FILES if (path := folder / "tokenizer" / name).is_file()]
    digest = hashlib.blake2b(dtype.encode(), digest_size=16)
    for path in files:
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
