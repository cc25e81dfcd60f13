"""What fields of the native API are made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Control characters, and halves of surrogate pairs, which JSON can spell (\ud800) and no encoding can write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def _printable(text: str) -> str:
    if met := _UNPRINTABLE.search(text):
        raise PydanticCustomError(
            "control_character",
            "must not hold control characters or lone surrogates (character {at})",
            {"at": met.start() + 1},
        )
    return text


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[Text, Field(max_length=256)]
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]


class Schema(BaseModel):
    """Descriptions are the docstrings, so that the API's page says what the code says."""

    model_config = ConfigDict(use_attribute_docstrings=True)
