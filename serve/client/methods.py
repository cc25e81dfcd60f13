"""What can be asked of a server, as coroutines over whatever carries them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Unpack

import httpx

from serve.client.answers import Job, Picture, Pool, Progress, job_of, told
from serve.client.calls import CAPTION_S, ENCODE_S, Calls, options_of
from serve.client.errors import JobFailed, Lost
from serve.client.orders import (
    AnalysisOptions,
    CaptionOptions,
    EmbeddingOptions,
    Options,
    PictureSource,
    Prompt,
    body,
    sent,
)
from serve.client.server import Limits, Model, Placement, Quote
from serve.client.texts import Analysis, Caption, Compared, Encoded
from serve.client.wire import Wire
from serve.domain.jobs import JobState
from serve.errors import TandemError

_PAGE = 100


class Methods:
    """What can be asked of a server, as coroutines. `job` is one or its id, everywhere.

    Every method raises NoServer when nothing answers at the address, Unavailable (QueueFull, RateLimited) when the
    server asks to come back later, and later than this client is patient for, and ClientError (InvalidRequest with
    `param`, ModelNotFound, JobNotFound, Unauthorized, Forbidden) when it refuses.

    Owns: the HTTP connections.
    """

    _wires: Callable[..., Wire]

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        patience_s: float = 30.0,
        busy_s: float = 60.0,
        poll_s: float = 0.5,
    ) -> None:
        """`key` is an API key, for a server that wants one. A server that goes away is borne for `patience_s`, asked
        again after `poll_s`; one that has no room, for `busy_s`, asked again when it said. Raises OperatorError for
        what is no address or no key."""
        self.url = url.rstrip("/")
        wire = self._wires(**options_of(url, key))
        self._calls = Calls(wire, self.url, patience_s=patience_s, busy_s=busy_s, poll_s=poll_s)

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Picture]:
        """Order pictures and wait for them. `on_progress` is called at every step; with `preview_every` at previews
        too. Whoever stops waiting cancels the job. Raises JobFailed."""
        job = await self.submit(prompt, **options)
        return await self.pictures(await self.wait(job, on_progress=on_progress, cancel=True))

    async def submit(
        self, prompt: Prompt | None = None, *, idempotency_key: str | None = None, **options: Unpack[Options]
    ) -> Job:
        """Queue a job. The server keeps it from now on.

        An order whose answer is lost is sent again: its Idempotency-Key, a random one by default, sees to it that there
        is one job. Raises OSError for a picture that can't be read.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        try:
            answer = await self._calls.json(
                "POST", "/v1/jobs", body=body(sent({"prompt": prompt, **options})), headers=headers
            )
        except Lost as error:
            message = f"the server at {self.url} went away while it took the order, which may be queued all the same"
            raise Lost(message, "url") from error
        return job_of(answer)

    async def quote(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Quote:
        """What the order would come to now. Nothing is queued."""
        path = "/v1/jobs?dry_run=true"
        return told(Quote, await self._calls.json("POST", path, body=body(sent({"prompt": prompt, **options}))))

    async def get(self, job: Job | str) -> Job:
        """The job as it is now."""
        return job_of(await self._calls.json("GET", f"/v1/jobs/{_id(job)}"))

    async def jobs(self, states: Sequence[JobState | str] = (), most: int | None = None) -> AsyncGenerator[Job, None]:
        """The caller's jobs, newest first; those in `states` alone, at most so many."""
        query: dict[str, Any] = {"state": [str(state) for state in states]}
        left = most
        while left is None or left > 0:
            query["limit"] = _PAGE if left is None else min(_PAGE, left)
            page = await self._calls.json("GET", "/v1/jobs", params=query)
            for each in (found := page.get("data") or ()):
                yield job_of(each)
            left = None if left is None else left - len(found)
            query["cursor"] = page.get("next")
            if query["cursor"] is None:
                return

    async def follow(self, job: Job | str, *, previews: bool = False) -> AsyncGenerator[Progress, None]:
        """Every step as it happens, from the first, until the job has ended; with `previews` a Preview too, where the
        order has `preview_every`. A connection that breaks is resumed where it was."""
        async with aclosing(self._calls.follow(_id(job), previews=previews)) as events:
            async for event in events:
                yield event

    async def wait(
        self, job: Job | str, *, on_progress: Callable[[Progress], None] | None = None, cancel: bool = False
    ) -> Job:
        """The job when it has ended, however it did. With `cancel`, whoever stops waiting cancels it."""
        try:
            async with aclosing(self.follow(job, previews=on_progress is not None)) as events:
                async for event in events:
                    if on_progress is not None:
                        on_progress(event)
            return job_of(await self._calls.json("GET", f"/v1/jobs/{_id(job)}", met=True))
        except BaseException:
            if cancel:
                with suppress(TandemError):
                    await self.cancel(job)
            raise

    async def pictures(self, job: Job | str) -> list[Picture]:
        """The pictures of a job that has ended. Raises JobFailed where it has none."""
        ended = job if isinstance(job, Job) else await self.get(job)
        if ended.state is not JobState.SUCCEEDED:
            raise JobFailed(ended)
        return [Picture(ended, info, await self.image(ended, info.index)) for info in ended.images]

    async def image(self, job: Job | str, index: int | str = 0) -> bytes:
        """The file of one picture, from the server or from the store that it points to. `image` and `mask` are what the
        job started from."""
        path = f"/v1/images/{_id(job)}/{index}"
        return (await self._calls.ask("GET", path, met=isinstance(job, Job), follow_redirects=True)).content

    async def cancel(self, job: Job | str) -> Job:
        """A queued job ends at once, a running one at its next step; one that has ended stays as it is."""
        return job_of(await self._calls.json("DELETE", f"/v1/jobs/{_id(job)}"))

    async def models(self) -> tuple[Model, ...]:
        return told(tuple[Model, ...], (await self._calls.json("GET", "/v1/models")).get("data"))

    async def fleet(self) -> tuple[Placement, ...]:
        """Where each model is drawn."""
        return told(tuple[Placement, ...], (await self._calls.json("GET", "/v1/fleet")).get("data"))

    async def limits(self) -> Limits:
        """What is left of the caller's allowance."""
        return told(Limits, await self._calls.json("GET", "/v1/limits"))

    async def analyze(self, prompt: Prompt | None = None, **options: Unpack[AnalysisOptions]) -> Analysis:
        """What a prompt comes to: tokens, rows, the texts of every step, what is cached, advice."""
        return told(Analysis, await self.post("/v1/prompts/analyze", {"prompt": prompt, **options}))

    async def compare(
        self, prompts: Sequence[str], *, model: str | None = None, encoder: str | None = None
    ) -> tuple[Compared, ...]:
        """How near texts are to one another, for each encoder."""
        order = {"prompts": list(prompts), "model": model, "encoder": encoder}
        return told(tuple[Compared, ...], (await self.post("/v1/prompts/similarity", order)).get("compared"))

    async def embed(self, prompt: Prompt | None = None, **options: Unpack[EmbeddingOptions]) -> bytes:
        """The embeddings of a text: a safetensors file, with the names of the diffusers pipelines' arguments."""
        headers = {"Content-Type": "application/json"}
        content = body({"prompt": prompt, **options})
        path = "/v1/embeddings"
        return (await self._calls.ask("POST", path, content=content, headers=headers, timeout=ENCODE_S)).content

    async def encode(self, prompt: Prompt | None = None, **options: Unpack[EmbeddingOptions]) -> Encoded:
        """Have a text encoded, for the cache alone."""
        return told(Encoded, await self.post("/v1/embeddings", {"prompt": prompt, **options, "output": "report"}))

    async def caption(self, image: PictureSource, **options: Unpack[CaptionOptions]) -> Caption:
        """What a picture shows, in words. Raises OSError for a picture that can't be read."""
        order = body(sent({"image": image, **options}))
        return told(Caption, await self._calls.json("POST", "/v1/captions", body=order, timeout=CAPTION_S))

    async def cache(self) -> Mapping[str, Any]:
        """The embedding cache: the JSON of `GET /v1/cache`."""
        return await self._calls.json("GET", "/v1/cache")

    async def clear_cache(self) -> int:
        """How many embeddings were removed."""
        return told(int, (await self._calls.json("DELETE", "/v1/cache")).get("removed"))

    async def pools(self) -> tuple[Pool, ...] | None:
        """The server's parts, ready or not; None when no Tandem server answers."""
        try:
            parts = (await self._calls.readiness())["pools"]
            return tuple(Pool(name=name, ready=part["ready"], detail=part["detail"]) for name, part in parts.items())
        except (httpx.TransportError, ValueError, KeyError, TypeError, AttributeError):
            return None

    async def close(self) -> None:
        await self._calls.close()

    async def post(self, path: str, order: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON of an answer, for what has no method of its own. It may be sent twice."""
        return await self._calls.json("POST", path, body=body(order), timeout=ENCODE_S)


def _id(job: Job | str) -> str:
    return job.id if isinstance(job, Job) else job
