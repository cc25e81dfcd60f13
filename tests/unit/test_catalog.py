"""Which models are drawn, which have their text encoded alone, and that no two share a name."""

from pathlib import Path
from typing import Any

import pytest

from serve.catalog import Catalog, open_catalog
from serve.errors import OperatorError
from serve.settings.tree import Settings

TWIN = {"source": "shapes", "name": "twin"}


def opened(data_dir: Path, **tree: Any) -> Catalog:
    return open_catalog(Settings(data_dir=data_dir, **tree))


def test_drawn_models_come_first_and_share_their_encoders(tmp_path: Path) -> None:
    other = {"source": "shapes", "name": "other"}
    catalog = opened(tmp_path, models=[TWIN], text_models=[other])
    assert list(catalog.models) == ["shapes", "twin", "other"]
    assert list(catalog.drawn) == ["shapes", "twin"]
    assert len(catalog.registry.encoders) == 1
    assert set(catalog.planners()) == {"shapes", "twin", "other"}


@pytest.mark.parametrize("tree", [{"diffusion": {"replicas": 0}}, {"placements": {"a": {"replicas": 0}}}])
def test_without_replicas_only_text_is_encoded(tmp_path: Path, tree: dict[str, Any]) -> None:
    catalog = opened(tmp_path, models=[TWIN], **tree)
    assert list(catalog.models) == ["shapes", "twin"]
    assert not catalog.drawn


@pytest.mark.parametrize("group", ["models", "text_models"])
def test_two_models_of_one_name_are_refused(tmp_path: Path, group: str) -> None:
    with pytest.raises(OperatorError, match="another model is called shapes") as raised:
        opened(tmp_path, **{group: [{"source": "shapes"}]})
    assert raised.value.param == f"{group}.0.name"
