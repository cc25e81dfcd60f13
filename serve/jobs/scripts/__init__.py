"""The Lua scripts, each one atomic transition. `common.lua` explains the keys and stands in front of every one."""

from pathlib import Path

FOLDER = Path(__file__).parent


def sources(folder: Path = FOLDER) -> dict[str, str]:
    """Every script by its name."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.lua"))}
    common = texts.pop("common")
    return {name: f"{common}\n{text}" for name, text in texts.items()}
