"""The clients that a load test is made of, one function for each dialect, on gevent's sockets."""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gevent
from geventhttpclient.response import HTTPSocketPoolResponse

from loadtest.samples import Outcome
from loadtest.sender.wire import Broken, Reply, Wire, whole

POLL_S = 0.5
"""Between two looks at a job by a client that polls; and before asking again where a refusal does not say when."""
_IMAGEN_POLL_S = 0.1
"""The same, of a baseline that is compared with servers that answer at once."""
_CUTS = 5
"""Streams in a row that bring no event, after which the server counts as gone."""
_RETRY_S = 2.0
"""Before a stream is resumed, where the server does not say."""
_TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})
_PNG = b"\x89PNG"
_A1111 = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images": "batch_size",
    "scheduler": "sampler_name",
}
"""By our name of a field of an order, A1111's where it is another."""
_ORDERED = ("prompt", "negative_prompt", "model")
"""Fields of an order that `POST /v1/embeddings` knows."""


class Told(Exception):
    """The server's answer is not what the client came for. `again_s`: after a refusal, when the client may come
    again."""

    def __init__(self, outcome: Outcome, detail: str, again_s: float = 0.0) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail
        self.again_s = again_s


class Visit:
    """One client with one order. Owns: what it has heard so far.

    `status` is the last HTTP status; `accepted`: the order is the server's now, so that a refusal from here on only
    means to ask again; `job` is the job as told last, `job_id` its id where it was followed without being told.
    """

    def __init__(self, wire: Wire, body: Mapping[str, Any]) -> None:
        self.wire = wire
        self.body = body
        self.status = 0
        self.bytes = 0
        self.accepted = False
        self.job: dict[str, Any] | None = None
        self.job_id: str | None = None

    def call(self, method: str, path: str, order: Mapping[str, Any] | None = None) -> Reply:
        """A 2xx, where need be after asking again. Raises Told, `Broken`."""
        body = None if order is None else json.dumps(order).encode()
        wire = self.wire
        while True:
            reply = wire.call(method, path, body)
            self.status = reply.status
            if 200 <= reply.status < 300:
                return reply
            if reply.status in (302, 303, 307, 308) and method == "GET" and reply.location:
                wire, path = wire.elsewhere(reply.location)
            elif self.accepted and reply.status in (429, 503):
                gevent.sleep(POLL_S)
            else:
                raise told(reply)

    def json(self, method: str, path: str, order: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Raises Told for an answer that is none."""
        reply = self.call(method, path, order)
        try:
            found = json.loads(reply.content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Told(Outcome.FAILED, f"{method} {path.partition('?')[0]}: no JSON object")
        return found

    def picture(self, reply: Reply) -> None:
        """Raises Told where it is none."""
        if not reply.kind.startswith("image/") or not reply.content:
            raise Told(Outcome.FAILED, f"not a picture but {reply.kind or 'nothing'}")
        self.bytes += len(reply.content)

    def pictures(self, job: dict[str, Any]) -> None:
        """Of an ended job. Raises Told for one that did not succeed."""
        self.job = job
        if job["state"] != "succeeded":
            raise Told(Outcome.FAILED, f"{job['state']}: {(job.get('error') or {}).get('code', '')}")
        for image in job["images"]:
            self.picture(self.call("GET", image["url"]))

    def look_back(self) -> None:
        """Have the job told, for its timings, after the client has what it came for. No failure of this is the
        order's."""
        if self.job is None and self.job_id is not None:
            try:
                reply = self.wire.call("GET", self.wire.path(f"/v1/jobs/{self.job_id}"))
                self.job = json.loads(reply.content) if reply.status == 200 else None
            except (*Broken, ValueError):
                self.job = None


def told(reply: Reply) -> Told:
    """What an answer that is no success means. A refusal must say when to come again: that it does not is noted."""
    try:
        error = json.loads(reply.content)["error"]
        detail = error if isinstance(error, str) else str(error.get("code") or error.get("message") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        detail = reply.content[:100].decode(errors="replace")
    if reply.status in (429, 503):
        again_s = float(reply.retry_after) if reply.retry_after.isdecimal() else POLL_S
        detail = detail if reply.retry_after else f"{detail}, no Retry-After".lstrip(", ")
        return Told(Outcome.REFUSED, detail, again_s)
    return Told(Outcome.INVALID if 400 <= reply.status < 500 else Outcome.FAILED, detail)


def wait(visit: Visit) -> None:
    """The synchronous form: the answer is the ended job."""
    job = visit.json("POST", visit.wire.path("/v1/jobs?wait=true"), visit.body)
    visit.accepted = True
    visit.pictures(job)


def events(visit: Visit) -> None:
    """Follow the job's events, over as many connections as it takes; then fetch the picture."""
    visit.job_id = _accepted(visit, "/v1/jobs", "id")
    state = _followed(visit, visit.wire.path(f"/v1/jobs/{visit.job_id}/events?previews=false"))
    if state != "succeeded":
        visit.pictures(visit.json("GET", visit.wire.path(f"/v1/jobs/{visit.job_id}")))
        return
    visit.picture(visit.call("GET", visit.wire.path(f"/v1/images/{visit.job_id}/0")))


def poll(visit: Visit) -> None:
    """Look again and again."""
    path = visit.wire.path(f"/v1/jobs/{_accepted(visit, '/v1/jobs', 'id')}")
    while (job := visit.json("GET", path))["state"] not in _TERMINAL:
        gevent.sleep(POLL_S)
    visit.pictures(job)


def embeddings(visit: Visit) -> None:
    """Have the order's text encoded. Its report stands for the job: it tells where the embeddings came from."""
    order = {field: visit.body[field] for field in _ORDERED if field in visit.body}
    report = visit.json("POST", visit.wire.path("/v1/embeddings"), order | {"output": "report"})
    visit.job = {name: report[name] for name in ("cache", "truncated") if name in report}


def openai(visit: Visit) -> None:
    """OpenAI's clients: the pictures come with the answer. What that dialect has no word for has its native name."""
    order = dict(visit.body)
    if "width" in order:
        order["size"] = f"{order.pop('width')}x{order.pop('height')}"
    order["n"] = order.pop("num_images", 1)
    answer = _answered(visit, "/v1/images/generations", order)
    for each in answer["data"]:
        visit.picture(_file(each.get("b64_json")))


def a1111(visit: Visit) -> None:
    """A1111's clients, likewise."""
    order = {_A1111.get(field, field): value for field, value in visit.body.items() if field != "model"}
    if "model" in visit.body:
        order["override_settings"] = {"sd_model_checkpoint": visit.body["model"]}
    for file in _answered(visit, "/sdapi/v1/txt2img", order)["images"]:
        visit.picture(_file(file))


def generate(visit: Visit) -> None:
    """Servers that answer an order with its picture."""
    visit.picture(visit.call("POST", visit.wire.path("/generate"), visit.body))


def imagen(visit: Visit) -> None:
    """The Celery design: ask for the state until there is a picture."""
    path = visit.wire.path(f"/status/{_accepted(visit, '/generate', 'job_id')}")
    while (task := visit.json("GET", path))["status"] not in ("SUCCESS", "FAILURE"):
        gevent.sleep(_IMAGEN_POLL_S)
    if task["status"] == "FAILURE":
        raise Told(Outcome.FAILED, str(task.get("error", ""))[:100])
    visit.picture(visit.call("GET", visit.wire.path(task["result"]["url"])))


DIALECTS: Mapping[str, Callable[[Visit], None]] = {
    "wait": wait,
    "events": events,
    "poll": poll,
    "embeddings": embeddings,
    "openai": openai,
    "a1111": a1111,
    "generate": generate,
    "imagen": imagen,
}
"""What a client of each dialect does until it has what it came for. They raise Told and `Broken`."""


def _answered(visit: Visit, path: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a synchronous call, whose header says which job it was."""
    reply = visit.call("POST", visit.wire.path(path), order)
    visit.accepted = True
    visit.job_id = reply.location.rpartition("/")[2] or None
    answer: dict[str, Any] = json.loads(reply.content)
    return answer


def _file(text: str | None) -> Reply:
    """A picture that stands in an answer, as if it had come by itself."""
    try:
        content = binascii.a2b_base64(text or "", strict_mode=True)
    except ValueError:
        content = b""
    return Reply(
        status=200, content=content, kind="image/png" if content.startswith(_PNG) else "", location="", retry_after=""
    )


def _accepted(visit: Visit, path: str, field: str) -> str:
    job = visit.json("POST", visit.wire.path(path), visit.body)
    visit.accepted = True
    return str(job[field])


def _followed(visit: Visit, path: str) -> str:
    """The state in which the job ended. A stream that was cut is resumed behind the last event that came, after the
    time that the server asks for, and one that was refused is asked for again. Raises `Broken` where nothing comes any
    more, and Told where the server will not or can not stream."""
    last, pause_s, cuts = "", _RETRY_S, 0
    while True:
        try:
            headers = "Accept: text/event-stream\r\n" + (f"Last-Event-ID: {last}\r\n" if last else "")
            answer = visit.wire.open("GET", path, headers=headers)
            visit.status = answer.status_code
            if answer.status_code == 200:
                for event in _events(answer):
                    cuts = 0
                    pause_s = int(event["retry"]) / 1000 if "retry" in event else pause_s
                    last = event.get("id", last)
                    state = json.loads(event["data"]).get("state") if "data" in event else None
                    if state in _TERMINAL:
                        answer.release()  # else the server's end of the stream would have to be waited for
                        return str(state)
            elif answer.status_code in (429, 503):
                answer.read()
            else:
                cuts += 1
                reply = whole(answer)
                if 400 <= reply.status < 500 or cuts >= _CUTS:
                    raise told(reply)
        except Broken:
            if (cuts := cuts + 1) >= _CUTS:
                raise
        gevent.sleep(pause_s)


def _events(answer: HTTPSocketPoolResponse) -> Iterator[dict[str, str]]:
    """The fields of each event that came whole. Each of Tandem's has its data in one line."""
    event: dict[str, str] = {}
    while line := answer.readline(b"\n"):
        name, _, value = line.decode().strip("\r\n").partition(":")
        if name:
            event[name] = value.removeprefix(" ")
        elif not value and event:
            yield event
            event = {}
