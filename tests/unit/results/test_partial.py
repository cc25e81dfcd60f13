import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from serve.domain.orders import ImageRequest
from serve.results.partial import partial_image

REQUEST = ImageRequest(model="m", prompt="p", width=96, height=64, num_inference_steps=4, guidance_scale=1.0, seed=0)


@pytest.mark.parametrize(("kind", "quality"), [("png", None), ("jpeg", 40), ("webp", 40)])
def test_a_preview_becomes_a_file_of_the_pictures_kind(kind: str, quality: int | None) -> None:
    small = io.BytesIO()
    Image.new("RGB", (12, 8), (200, 40, 40)).save(small, "JPEG", quality=95)
    request = replace(REQUEST, output_format=kind, output_compression=quality)
    with Image.open(io.BytesIO(partial_image(small.getvalue(), request))) as image:
        assert (image.format, image.size) == (kind.upper(), (96, 64))
        assert np.abs(np.asarray(image.convert("RGB"), int) - (200, 40, 40)).max() < 12
