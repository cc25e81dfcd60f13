"""`model.source` -> a checked diffusers folder, whatever it was: a folder, a single-file checkpoint, a hub id."""

from serve.models.denoiser import Denoiser
from serve.models.folder import SHIPPED, ModelFolder, check_folder, resolve
from serve.models.text_parts import TextPart

__all__ = ["SHIPPED", "Denoiser", "ModelFolder", "TextPart", "check_folder", "resolve"]
