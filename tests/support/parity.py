"""One image drawn twice: by the runner alone, and by diffusers' stock pipeline on the same folder and seed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from serve.diffusion.engine import Work
from serve.diffusion.paste import pasted
from serve.diffusion.runner import Runner, open_runner
from serve.diffusion.samplers import FlowMatchHeun
from serve.domain.conditioning import Conditioning, Schedule
from serve.domain.orders import ImageRequest, Task
from serve.models import check_folder
from serve.models.samplers import SAMPLERS
from serve.settings.pools import DiffusionSettings

SETTINGS = DiffusionSettings(device="cpu", torch_threads=1, channels_last=False)
NEGATIVE = "green"


def difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of a channel, in 1/255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def drawn(runner: Runner, work: Work) -> list[Image.Image]:
    """The job's images, each with nothing beside it."""
    source = runner.encode(work)
    images = []
    for row in runner.rows(work):
        runner.begin(row, work, source)
        for _ in range(row.steps):
            assert not runner.step([row])
        image = pasted(runner.decode(runner.release(row)), work)
        assert isinstance(image, Image.Image), "16 bits are compared as numbers"
        images.append(image)
    return images


def picture(width: int, height: int) -> Image.Image:
    """An image to start from: two gradients and a disc."""
    y, x = np.mgrid[0:height, 0:width]
    disc = (x - width / 3) ** 2 + (y - height / 2) ** 2 < (width / 4) ** 2
    channels = (x * 255 // width, y * 255 // height, np.where(disc, 230, 40))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def hole(width: int, height: int) -> Image.Image:
    """A mask: a rectangle in white, with a soft edge that is binarised."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 8, width // 3 :] = 255
    mask[height // 4 - 3 : height // 4, width // 3 :] = 100
    return Image.fromarray(mask, "L")


class Pair:
    """A folder as our runner and as the stock pipelines of its family. `pipelines` are the classes by task."""

    def __init__(self, folder: Path, pipelines: dict[Task, Any], side: int) -> None:
        self.model = check_folder(folder, folder.name)
        self.runner = open_runner(self.model, SETTINGS)
        self.side = side
        first = next(iter(pipelines.values()))
        self._stock = first.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        self._own = self._stock.scheduler
        self._pipelines = pipelines

    @property
    def stock_vae(self) -> Any:
        """The VAE of the stock pipelines."""
        return self._stock.vae

    def check(self, task: Task = Task.TXT2IMG, sampler: str | None = None, **values: Any) -> None:
        """Draw both ways and compare, every image of the request."""
        request = self.request(task, scheduler=sampler, **values)
        images = drawn(self.runner, self.work(request))
        assert len(images) == request.num_images
        for index, image in enumerate(images):
            stock = self.stock(replace(request, seed=request.seed + index, num_images=1))
            assert image.size == stock.size
            assert (found := difference(image, stock)) <= 1, f"image {index} differs by {found}"
            assert np.asarray(image).std() > 4, "nothing to compare"

    def request(self, task: Task, **values: Any) -> ImageRequest:
        base: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "seed": 3}
        if task is not Task.TXT2IMG:
            base |= {"image": "image", "strength": 0.7}
        if task is Task.INPAINT:
            base |= {"mask": "mask"}
        base |= {"model": self.model.name, "prompt": "a red circle", "negative_prompt": NEGATIVE}
        return ImageRequest(**base | {"width": self.side, "height": self.side} | values)

    def work(self, request: ImageRequest) -> Work:
        image = None if request.image is None else picture(request.width, request.height)
        mask = None if request.mask is None else hole(request.width, request.height)
        return Work("parity", request, Schedule.constant(self.conditioning(request)), image, mask)

    def stock(self, request: ImageRequest) -> Image.Image:
        pipeline = self._pipelines[request.task](**self._parts(self._pipelines[request.task]))
        pipeline.set_progress_bar_config(disable=True)
        if request.scheduler is None:
            pipeline.scheduler = type(self._own).from_config(
                {key: value for key, value in pipeline.scheduler.config.items() if key != "_use_default_values"}
            )
        else:
            pipeline.scheduler = self._sampler(request.scheduler, pipeline.scheduler.config)
        options: dict[str, Any] = {"num_inference_steps": request.num_inference_steps} | self.options(request)
        if "height" in inspect.signature(pipeline.__call__).parameters:
            options |= {"height": request.height, "width": request.width}
        if request.image is not None:
            options |= {"image": picture(request.width, request.height), "strength": request.strength}
        if request.mask is not None:
            options |= {"mask_image": hole(request.width, request.height)}
        options |= {"generator": torch.Generator().manual_seed(request.seed)}
        return self.finished(pipeline, request, options)

    def finished(self, pipeline: Any, request: ImageRequest, options: dict[str, Any]) -> Image.Image:
        image: Image.Image = pipeline(request.prompt, **options).images[0]
        return image

    def _parts(self, cls: Any) -> dict[str, Any]:
        wanted, optional = cls._get_signature_keys(cls)
        parts = {**self._stock.components, "scheduler": self._own}
        return {name: part for name, part in parts.items() if name in wanted} | self.flags(optional)

    def _sampler(self, name: str, config: Any) -> Any:
        import diffusers

        sampler = SAMPLERS[name]
        cls = FlowMatchHeun if name == "flow_heun" else getattr(diffusers, sampler.cls)
        return cls.from_config(config, **sampler.options)

    def flags(self, optional: set[str]) -> dict[str, Any]:
        return {"requires_safety_checker": False} if "requires_safety_checker" in optional else {}

    def options(self, request: ImageRequest) -> dict[str, Any]:
        return {"guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}

    def conditioning(self, request: ImageRequest) -> Conditioning:
        """By the stock pipeline's own encoders."""
        raise NotImplementedError
