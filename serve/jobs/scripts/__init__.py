"""The Lua scripts, each one atomic transition. `common.lua` explains the keys and stands in front of every one."""

from pathlib import Path

_FOLDER = Path(__file__).parent
_COMMON = (_FOLDER / "common.lua").read_text(encoding="utf-8")


def source(name: str) -> str:
    return f"{_COMMON}\n{(_FOLDER / f'{name}.lua').read_text(encoding='utf-8')}"
