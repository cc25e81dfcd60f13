"""Latents and their steps: the tensors behind the rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image

from serve.devices import claim_device, device_errors, use_threads
from serve.diffusion.families import open_family
from serve.diffusion.families.base import Family, Lane
from serve.diffusion.families.speed import choose_dtype
from serve.diffusion.preview import PreviewMap
from serve.diffusion.run import Picture, Work
from serve.diffusion.samplers import Track
from serve.diffusion.scheduler import Group, Row
from serve.diffusion.state import ImageState, Source, Start, start_from_image, start_from_noise
from serve.diffusion.synthetic import synthetic_lanes
from serve.diffusion.texts import Texts, check
from serve.domain.orders import Task
from serve.errors import DeviceLost, GenerationFailed, NotFinite
from serve.models import ModelFolder
from serve.rungs import MEANS, Rung
from serve.settings.pools import DiffusionSettings

__all__ = ["Latents", "Runner", "Source", "open_runner"]


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents on their way to another thread: nobody writes to `tensor` any more. `ready` is when the device has
    computed them, None on a CPU. `tiny` asks for the small VAE, `bit_depth` is the picture's."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None
    tiny: bool
    bit_depth: int = 8


class Runner:
    """Begin, step and release images; encode and decode them.

    Two threads call in, and share nothing that changes. The loop thread calls `rows`, `begin`, `step`, `peek`,
    `release`, `approximate`, `drop` and `measure`: the images' states are its alone. The VAE thread calls `encode`,
    `decode` and `preview`, which touch the VAE and the map of previews, and on a GPU run in a stream of their own,
    beside the steps. What goes from one to the other (`Source`, `Latents`) is handed over for good.

    Owns: the denoiser, the VAE, and every image's latents, sampler and random generator.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.reused_predictions = 0
        """Predictions of earlier steps that stood for a forward pass (`step_cache`), so far. The loop thread's."""
        self._states: dict[Row, ImageState] = {}
        self._texts: WeakValueDictionary[str, Texts] = WeakValueDictionary()
        self._previews = PreviewMap(family.vae)
        self._beside = torch.cuda.Stream(family.device) if family.device.type == "cuda" else None

    def rows(self, work: Work) -> list[Row]:
        """The request's images as rows of the step batch. Raises InvalidRequest for a sampler that can't serve it, and
        what `check` finds wrong with the text."""
        request = work.request
        check(request, work.schedule)
        factor = self.family.vae.scale_factor
        shape = (request.height // factor, request.width // factor)
        context = 0 if self.family.pads_context else len(work.schedule.texts[0].context)
        steps, group = Track(self.family, request, shape).forwards, Group(shape, context)
        return [Row(work.run_id, index, steps, group, request.lanes) for index in range(request.num_images)]

    def encode(self, work: Work, side: int | None = None) -> Source | None:
        """What the images start from, None where that is the text alone. `side` is as in `decode`. Raises OutOfMemory,
        DeviceLost, GenerationFailed."""
        if work.request.task is Task.TXT2IMG:
            return None
        if work.image is None or (work.mask is None) is (work.request.task is Task.INPAINT):
            raise GenerationFailed("the image to start from is missing")
        with device_errors("the VAE"), torch.inference_mode(), self._own_stream():
            return start_from_image(self.family, work.request, work.image, work.mask, side)

    @torch.inference_mode()
    def begin(self, row: Row, work: Work, source: Source | None) -> None:
        """Set up the image's sampler, texts and starting latents. `source` is what `encode` gave."""
        with device_errors("the denoiser"):
            shape = row.group.shape
            if source is None and work.request.task is not Task.TXT2IMG:
                raise GenerationFailed("the image to start from is missing")
            if source is None:
                start = start_from_noise(self.family, work.request, row.index, shape)
            else:
                start = source.starts[row.index]
                self._adopt(start)
            track = Track(self.family, work.request, shape)
            self._states[row] = ImageState.open(work.request, track, start, self._texts_of(work))

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], most: int | None = None) -> dict[Row, Exception]:
        """One forward pass for every row; rows may be at different timesteps, samplers, texts and guidance. Of more
        than `most` lanes, the denoiser takes so many at a time.

        Returns the rows that failed by themselves: their sampler's trouble, or latents that are not numbers any more;
        all of them where the device failed at that look. Raises OutOfMemory or GenerationFailed when the forward
        failed; no row has moved then, and fewer of them may be tried. DeviceLost: no more of anything. Ends when the
        device has done it all, so that what is told of the step is true and its time is its own.
        """
        states = [self._states[row] for row in rows]
        failed: dict[Row, Exception] = {}
        with device_errors("the denoiser"):
            reusable = self._reusable(states)
            made = iter(self._predict([state for i, state in enumerate(states) if i not in reusable], most))
            self.reused_predictions += len(reusable)
            for i, (row, state) in enumerate(zip(rows, states, strict=True)):
                try:
                    with device_errors("the sampler"):
                        state.reuse(reusable[i]) if i in reusable else state.advance(next(made))
                except DeviceLost:
                    raise
                except Exception as error:  # noqa: BLE001  a sampler's trouble is its own image's alone
                    failed[row] = error
        return self._unsound(rows, states) | failed

    def peek(self, row: Row) -> Latents:
        """What the image is going to look like, for a preview: the denoiser's last estimate of it where one is kept,
        else the latents as they are."""
        state = self._states[row]
        return self._handed_over(state.latents if state.original is None else state.original)

    def release(self, row: Row) -> Latents:
        """The image's latents, for `decode`; everything else of it is let go of."""
        state = self._states.pop(row)
        return self._handed_over(state.latents, state.request.tiny_vae, state.request.bit_depth)

    def approximate(self, row: Row) -> tuple[str, ...]:
        """What keeps the image from being exact. To be asked before `release`."""
        state = self._states[row]
        return ("step_cache",) * state.reused + ("tiny_vae",) * state.request.tiny_vae

    def drop(self, rows: Sequence[Row]) -> None:
        """Forget the rows; those that are not here are passed over."""
        for row in rows:
            self._states.pop(row, None)

    def decode(self, latents: Latents, side: int | None = None) -> Picture:
        """The finished image: RGB, or uint16 (H, W, 3) where 16 bits are asked for. `side` asks for tiles of so many
        pixels a side, which take less memory and more time. Raises NotFinite rather than give a black picture,
        OutOfMemory, DeviceLost."""
        with device_errors("the VAE"), torch.inference_mode(), self._own_stream(latents):
            pixels = self.family.vae.decode(latents.tensor, tiny=latents.tiny, side=side)
        pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
        if latents.bit_depth == 16:
            return (pixels * 65535).round().numpy().astype(np.uint16)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())

    def preview(self, latents: Latents) -> bytes:
        """A JPEG file of the latents, one pixel each; enlarged where that would be tiny."""
        with device_errors("the VAE"), torch.inference_mode(), self._own_stream(latents):
            return self._previews.jpeg(latents.tensor)

    @torch.inference_mode()
    def measure(self, shape: tuple[int, int], lanes: int) -> float:
        """Seconds of one forward pass over made-up input, the device done. Raises as `step` does."""
        with device_errors("the denoiser"):
            batch = synthetic_lanes(self.family, shape, lanes)
            self._synchronize()
            started = time.monotonic()
            self.family.predict(batch)
            self._synchronize()
            return time.monotonic() - started

    def _texts_of(self, work: Work) -> Texts:
        """Those that the run's images share; the last of these to end takes them along."""
        texts = self._texts.get(work.run_id)
        if texts is None or texts.schedule is not work.schedule:
            texts = self._texts[work.run_id] = Texts(self.family, work.schedule)
        return texts

    def _reusable(self, states: Sequence[ImageState]) -> dict[int, float]:
        """Which of the states need no forward pass, because their step cache serves: place in `states` -> drift."""
        drifts = {i: drift for i, state in enumerate(states) if (drift := state.drift()) is not None}
        if not drifts:
            return {}
        known = zip(drifts, torch.stack(list(drifts.values())).tolist(), strict=True)
        return {i: drift for i, drift in known if states[i].reusable(drift)}

    def _predict(self, states: Sequence[ImageState], most: int | None) -> list[torch.Tensor]:
        """The guided prediction for each state, (1, C, h, w). Images stand in the batch once for each of their
        texts."""
        lanes = [state.lanes() for state in states]
        outputs = iter(self._outputs([lane for each in lanes for lane in each], most))
        return [state.guide([next(outputs) for _ in each]) for state, each in zip(states, lanes, strict=True)]

    def _outputs(self, lanes: Sequence[Lane], most: int | None) -> list[torch.Tensor]:
        """The denoiser's, (1, C, h, w) each: of one forward pass, or one for each number of text tokens where the
        family can't pad them, and as many more as `most` asks for."""
        batches: dict[int, list[int]] = {}
        for i, lane in enumerate(lanes):
            batches.setdefault(0 if self.family.pads_context else len(lane.text.context), []).append(i)
        outputs: dict[int, torch.Tensor] = {}
        size = len(lanes) if most is None else most
        for batch in batches.values():
            for places in (batch[first : first + size] for first in range(0, len(batch), size)):
                predicted = self.family.predict([lanes[i] for i in places])
                outputs.update(zip(places, predicted.unsqueeze(1).unbind(), strict=True))
        return [outputs[i] for i in range(len(lanes))]

    def _unsound(self, rows: Sequence[Row], states: Sequence[ImageState]) -> dict[Row, Exception]:
        """The rows whose latents are not numbers. They have moved: where that can't be told, none may be tried again,
        and all of them have failed. Raises DeviceLost alone."""
        try:
            with device_errors("the sampler"):
                sound = torch.stack([state.latents.isfinite().all() for state in states]).tolist()
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the rows can't go on
            return dict.fromkeys(rows, error)
        trouble = NotFinite("the image came out as not-a-number; try other parameters")
        return {row: trouble for row, fine in zip(rows, sound, strict=True) if not fine}

    def _handed_over(self, tensor: torch.Tensor, tiny: bool = False, bit_depth: int = 8) -> Latents:
        if self._beside is None:
            return Latents(tensor, None, tiny, bit_depth)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.family.device))
        return Latents(tensor, ready, tiny, bit_depth)

    @contextmanager
    def _own_stream(self, latents: Latents | None = None) -> Iterator[None]:
        """On the VAE thread: compute beside the loop's stream, once `latents` are there, and end when all is done."""
        if self._beside is None:
            yield
            return
        with torch.cuda.stream(self._beside):
            if latents is not None and latents.ready is not None:
                self._beside.wait_event(latents.ready)
                # Its memory isn't given to another before this stream is done.
                latents.tensor.record_stream(self._beside)
            yield
            self._beside.synchronize()

    def _adopt(self, start: Start) -> None:
        """On the loop thread: the memory of what the other stream made is not reused before this stream is done."""
        if self._beside is not None:
            for tensor in (start.noise, start.image, start.mask, start.extra):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(self.family.device))

    def _synchronize(self) -> None:
        if self.family.device.type == "cuda":
            torch.cuda.synchronize(self.family.device)
        elif self.family.device.type == "mps":
            torch.mps.synchronize()


def open_runner(
    model: ModelFolder,
    settings: DiffusionSettings,
    dtypes: Sequence[str] = (),
    *,
    rung: Rung = Rung.RESIDENT,
    budget: int | None = None,
) -> Runner:
    """Load the model as the settings place it, on a rung of the memory ladder. `dtypes` are what the GPU's class
    computes in, the best first; () where no class is declared. `budget` are the bytes of a GPU that this process is
    held to, None where nothing is planned. Raises OperatorError naming the setting."""
    wanted = settings.device if MEANS[rung].on_card else "cpu"
    device = claim_device(wanted, settings.num_gpus, "diffusion.device", budget)
    if device.type == "cpu":
        use_threads(settings.torch_threads)
    dtype = choose_dtype(device, settings.dtype, dtypes, model.family)
    return Runner(open_family(model, device, dtype, settings, rung))
