"""All settings: one frozen tree. `serve/origins.py` reads it, `docs/settings.md` is generated from it."""
