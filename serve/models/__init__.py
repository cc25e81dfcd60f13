"""`model.source` -> a checked diffusers folder, whatever it was: a folder, a single-file checkpoint, a hub id."""

from serve.models.folder import ROW_TOKENS, SHIPPED, ModelFolder, check_folder, resolve

__all__ = ["ROW_TOKENS", "SHIPPED", "ModelFolder", "check_folder", "resolve"]
