"""What a load of 1 is: by the work of the answers, and only of a server that answers."""

import asyncio
import json

import pytest
from support.obedient_server import MODEL, obedient

from loadtest import capacity as measured
from loadtest.capacity import capacity, work_of
from loadtest.samples import Arrival
from loadtest.trace import read_catalog
from loadtest.workload import Fixed, Poisson, Prompts, Workload
from serve.errors import OperatorError

BODY = {"num_inference_steps": 10, "guidance_scale": 5.0, "width": 128, "height": 128, "scheduler": "euler"}


def test_an_order_counts_by_its_steps_and_a_text_as_any_other() -> None:
    steps = [Arrival(index=n, due_s=0, dialect="wait", body=BODY | {"num_inference_steps": 8 + 20 * n}) for n in (0, 1)]
    assert work_of(steps) == pytest.approx([20 / 40, 60 / 40])  # two rows a step, and 4 for what surrounds the steps
    text = Arrival(index=2, due_s=0, dialect="embeddings", body=BODY)
    assert work_of([*steps, text]) == [1.0, 1.0, 1.0]


def test_a_server_that_refuses_shows_no_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CAPACITY_S", 0.5)
    workload = Workload(
        name="mine", description="", arrivals=Poisson(load=1.0), prompts=Prompts(positive=Fixed(text="refuse"))
    )
    with obedient() as server:
        catalog = read_catalog(server.url, 200, json.dumps({"data": [MODEL]}).encode())
        with pytest.raises(OperatorError, match=r"--capacity: 16 of 16 requests were refused with 16 under way"):
            asyncio.run(capacity(server.url, workload, catalog, 0, None))
