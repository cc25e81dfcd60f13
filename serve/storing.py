"""A claimed job's pictures and the result store: what it starts from, what an earlier run left, and what was drawn."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from serve.diffusion.engine import Rendered
from serve.domain.jobs import ImageRef
from serve.domain.orders import ImageRequest
from serve.errors import GenerationFailed, InvalidRequest, JobNotFound, Unavailable
from serve.jobs.store import Claim
from serve.patience import Patience
from serve.results.encode import encode_image, read_parameters
from serve.results.keys import content_type, manifest_key
from serve.results.manifest import Entry, Manifest, Order, read
from serve.results.png import parameters
from serve.results.store import ResultStore, Stored
from serve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_PUTS = 3
"""Times that an image is put which is deleted each time before it can be looked at."""
_ANOTHER = "the result store holds the images of another order under this job's id"
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(ImageRequest)}


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """`width` and `height` are a picture's."""

    key: str
    data: bytes
    content_type: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A job's images as files, by index, and what kept them from being exact."""

    files: tuple[EncodedFile, ...]
    approximate: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(file.data) for file in self.files)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the store holds of a job that is complete."""

    images: tuple[ImageRef, ...]
    approximate: tuple[str, ...]


async def fetch_input(results: ResultStore, field: str, key: str | None, patience: Patience) -> Image.Image | None:
    """A picture that the job starts from, as the service stored it; None where the job has none.

    GenerationFailed where it is not in this replica's store: the client sent it, so another attempt may find it.
    """
    if key is None:
        return None
    try:
        data = await patience.repeat(lambda: results.get(key))
    except JobNotFound:
        raise GenerationFailed(
            f"the server no longer has the {field} that the job starts from: it was deleted, or the replica that drew "
            "keeps its files elsewhere"
        ) from None
    return await asyncio.to_thread(_decoded, data)


async def encode_images(claim: Claim, rendered: Rendered, patience: Patience) -> Encoded:
    """In a thread; equal images give equal files. Raises Withdrawn between two images."""
    files = []
    for index, image in enumerate(rendered.images):
        patience.wanted()
        known = parameters(claim.request, index, rendered.approximate)
        data, kind, extension = await asyncio.to_thread(encode_image, image, claim.request, known)
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        files.append(EncodedFile(f"{claim.job_id}/{index}.{extension}", data, kind, width, height))
    return Encoded(tuple(files), rendered.approximate)


async def put_images(
    results: ResultStore, claim: Claim, encoded: Encoded, patience: Patience, metrics: Metrics
) -> Outcome:
    """Put every image once, then the manifest. What an earlier run of the job has put stays, and is told as it is.

    Raises what Patience does while the store is away, GenerationFailed where the store has another order's manifest
    or images under the job's id.
    """
    entries, approximate = [], set[str]()
    for index, file in enumerate(encoded.files):
        patience.wanted()
        data = await _put_image(results, file, patience, metrics)
        ours = data is file.data
        approximate.update(encoded.approximate if ours else await asyncio.to_thread(_adopted, file.data, data))
        entries.append(await asyncio.to_thread(_entry, claim, index, file, data))
    manifest = Manifest(
        attempt=claim.attempt,
        fence=claim.fence,
        order=Order.of(claim.request),
        approximate=tuple(sorted(approximate)),
        images=tuple(entries),
    )
    key = manifest_key(claim.job_id)
    stored = await _put(results, EncodedFile(key, manifest.written(), content_type(key)), patience, metrics)
    if not stored.created:
        first = await _manifest(results, claim, patience)
        if first is not None and first.images == manifest.images:  # else its images were deleted since
            manifest = first
    return _outcome(manifest)


async def stored_before(results: ResultStore, claim: Claim, patience: Patience) -> Outcome | None:
    """What an earlier run of the job stored, if that is complete: its worker died before it could say so. None where
    the job has to be drawn. Asks nothing for a job's first claim.

    Raises as `put_images` does.
    """
    if claim.fence <= 1:
        return None
    manifest = await _manifest(results, claim, patience)
    if manifest is None:
        return None
    for entry in manifest.images:
        patience.wanted()
        if await patience.repeat(partial(results.size, entry.key)) != entry.bytes:
            log.warning("job %s has a manifest, but not the image %d that it names", claim.job_id, entry.index)
            return None
    log.info("job %s was stored by an earlier run", claim.job_id)
    return _outcome(manifest)


async def _put_image(results: ResultStore, file: EncodedFile, patience: Patience, metrics: Metrics) -> bytes:
    """What the store holds under the file's key from now on: these bytes, or an earlier run's."""
    for _ in range(_PUTS):
        if (await _put(results, file, patience, metrics)).created:
            return file.data
        with contextlib.suppress(JobNotFound):
            return await patience.repeat(partial(results.get, file.key))
    raise GenerationFailed("the images of the job were deleted while they were stored")


async def _put(results: ResultStore, file: EncodedFile, patience: Patience, metrics: Metrics) -> Stored:
    async def put() -> Stored:
        started = time.monotonic()
        try:
            stored = await results.put(file.key, file.data, file.content_type)
        except Unavailable:
            metrics.inc("tandem_result_put_retries_total")
            raise
        metrics.observe("tandem_result_put_seconds", time.monotonic() - started, store=results.kind)
        return stored

    return await patience.repeat(put)


async def _manifest(results: ResultStore, claim: Claim, patience: Patience) -> Manifest | None:
    """None where there is none, or none that can be read: it says nothing then, and the images are the truth."""
    key = manifest_key(claim.job_id)
    try:
        data = await patience.repeat(partial(results.get, key))
    except JobNotFound:
        return None
    manifest = read(data, claim.job_id, claim.request.num_images)
    if manifest is None:
        log.warning("the manifest %s can't be read", key)
    elif manifest.order != Order.of(claim.request):
        raise GenerationFailed(_ANOTHER)
    return manifest


def _entry(claim: Claim, index: int, file: EncodedFile, data: bytes) -> Entry:
    return Entry(
        index=index,
        key=file.key,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        content_type=file.content_type,
        seed=claim.request.seed_of(index),
        width=file.width,
        height=file.height,
    )


def _outcome(manifest: Manifest) -> Outcome:
    return Outcome(tuple(entry.ref for entry in manifest.images), manifest.approximate)


def _adopted(ours: bytes, found: bytes) -> set[str]:
    """What made a found image approximate. GenerationFailed unless it says that it is of the order of our own."""
    mine, its = _told(ours), _told(found)
    if _order(mine) != _order(its):
        raise GenerationFailed(_ANOTHER)
    return set(its.get("approximate", ()))


def _told(data: bytes) -> Mapping[str, Any]:
    """What an image says of itself; a JPEG has no room for what is very long."""
    try:
        return read_parameters(data)
    except InvalidRequest:
        return {}


def _order(told: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """None of a file that says nothing. A field that it does not name has its default: another version may have
    written it, whose orders had more of them or fewer."""
    return {name: told.get(name, default) for name, default in _DEFAULTS.items()} if told else None


def _decoded(data: bytes) -> Image.Image:
    """A PNG that this server wrote itself."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        return image
