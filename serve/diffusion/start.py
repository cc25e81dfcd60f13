"""What a run starts from, and what its pictures are put back into."""

from __future__ import annotations

from PIL import Image

from serve.diffusion.area import Area, area_of, share_of
from serve.diffusion.fill import filled
from serve.diffusion.run import Work
from serve.domain.conditioning import Schedule
from serve.domain.orders import ImageRequest, MaskedContent


def work_of(
    run_id: str,
    request: ImageRequest,
    schedule: Schedule,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Work:
    """`image` (RGB) and `mask` (L) are the request's, of the size that it draws, or of their own where only a part of
    the picture is drawn (`padding_mask_crop`). Some tenths of a second for large ones: not for an event loop."""
    if image is None or mask is None:
        return Work(run_id, request, schedule, image, mask)
    area = _area(request, image, mask)
    if request.padding_mask_crop is not None and area is not None:
        image, mask = (area.drawn_from(each, request.width, request.height) for each in (area.picture, mask))
    if request.masked_content is MaskedContent.FILL:
        image = filled(image.convert("RGB"), mask)
    return Work(run_id, request, schedule, image, mask, area)


def _area(request: ImageRequest, image: Image.Image, mask: Image.Image) -> Area | None:
    """None where all of the answer is to be the decoder's."""
    padding, blur = request.padding_mask_crop, request.mask_blur
    if padding is not None:
        return area_of(image, mask, request.width, request.height, padding=padding, blur=blur or 0.0)
    return None if blur is None else Area(image.convert("RGB"), share_of(mask, blur), (0, 0, *image.size))
