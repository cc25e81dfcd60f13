"""`tandem fetch`: all that the models need, brought here before a server starts. It asks for no Redis, Ray or GPU.

Any number of these may run at once on a folder that they share: downloads and conversions are put in place by a rename,
and whoever comes second waits for the first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from serve.catalog import open_catalog
from serve.errors import OperatorError
from serve.settings.tree import Settings


def fetch(settings: Settings) -> None:
    """Print a line for each model. Raises OperatorError naming the setting."""
    data_dir = settings.data_dir.absolute()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):  # what is kept there can't be left to every replica to find again
            pass
    except OSError as error:
        raise OperatorError(f"data_dir: {data_dir}: {error.strerror}", "data_dir") from None
    catalog = open_catalog(settings.model_copy(update={"data_dir": data_dir}))
    for model in catalog.models.values():
        print(f"{model.name}: {model.family}, {model.path}, {_bytes(model.path):,} bytes")


def _bytes(folder: Path) -> int:
    """Of what lies in the folder; a hub's snapshot has links to its files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
