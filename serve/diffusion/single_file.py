"""A single-file Stable Diffusion checkpoint (LDM key layout) -> a diffusers folder, by diffusers' own mapping.

Runs as `python -m serve.diffusion.single_file CHECKPOINT OUT [CONFIG]`; exit status 1 with the reason as the last line
of stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open

from serve.models.weight_files import read_header


def convert(checkpoint: Path, config: str | Path | None, out: Path) -> None:
    """Write the diffusers folder `out`, as safetensors; in half precision where the whole checkpoint is.

    `config` is a diffusers folder or a hub id whose configuration and tokenizer describe the checkpoint; None lets
    diffusers recognize the checkpoint and take them from the hub.
    """
    pipeline = StableDiffusionPipeline.from_single_file(
        str(checkpoint),
        config=None if config is None else str(config),
        torch_dtype=_half_dtype(checkpoint),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)


def _half_dtype(checkpoint: Path) -> Any:
    """The torch dtype of all weights if that is float16 or bfloat16, else None: float32, which rounds nothing."""
    floats = {
        info.dtype: name for name, info in read_header(checkpoint).items() if not info.dtype.startswith(("I", "U"))
    }
    if floats.keys() not in ({"F16"}, {"BF16"}):
        return None
    with safe_open(checkpoint, "pt") as file:
        return file.get_tensor(*floats.values()).dtype


def main() -> None:
    checkpoint, out, *config = sys.argv[1:]
    try:
        convert(Path(checkpoint), config[0] if config else None, Path(out))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        sys.exit("its configuration could not be had from the hub; set model.config to a diffusers folder that fits it")
    except NotImplementedError:
        # accelerate left parameters without data: the checkpoint has none for them.
        sys.exit("it lacks weights that its configuration asks for")
    except Exception as error:  # noqa: BLE001 -- whatever else diffusers raises becomes the reason that the operator reads
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}")


if __name__ == "__main__":
    main()
