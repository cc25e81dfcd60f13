"""Workloads for Locust itself: `locust -f loadtest/locustfile.py --workload mixed --rate 2 --host http://127.0.0.1:8000`.

Locust counts one user, who sends everybody's requests on the workload's clock, whatever is under way. Its table and its
charts show latency from when each request was due. A trace has an end, and with it the run.
"""

from __future__ import annotations

import os
from typing import Any

import gevent
from locust import User, events, task
from locust.exception import StopUser

from loadtest.samples import Arrival
from loadtest.sender.open_loop import Run
from loadtest.sender.process import end_with_parent
from loadtest.sender.wire import Broken, Wire
from loadtest.trace import read_catalog, trace
from loadtest.workload import Workload, load
from serve.cli.client import KEY_VARIABLE, bearer
from serve.errors import OperatorError


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: Any) -> None:
    parser.add_argument("--workload", default="mixed", help="A workload that comes with Tandem, or a .yaml file.")
    parser.add_argument("--seed", type=int, default=0, help="Fixes every request and when it is due.")
    parser.add_argument("--rate", type=float, default=0.0, help="Requests a second; 0: as the workload says.")
    parser.add_argument("--capacity", type=float, default=0.0, help="Requests a second that are a load of 1.")
    parser.add_argument("--duration", type=float, default=0.0, help="Seconds; 0: as the workload says.")
    parser.add_argument(
        "--end-with-stdin",
        action="store_true",
        include_in_web_ui=False,
        help="End when standard input does: whoever started this is gone.",
    )


@events.init.add_listener  # type: ignore[untyped-decorator]
def _end_with_whoever_started_it(environment: Any, **_: Any) -> None:
    if environment.parsed_options and environment.parsed_options.end_with_stdin:
        gevent.spawn(end_with_parent)


class Clients(User):  # type: ignore[misc]
    """All clients of the workload."""

    fixed_count = 1

    @task  # type: ignore[untyped-decorator]
    def send(self) -> None:
        environment = self.environment
        options, key = environment.parsed_options, os.environ.get(KEY_VARIABLE, "").strip()
        try:
            bearer(key)
            workload = _workload(options)
            wire = Wire(environment.host or "", key, timeout_s=workload.give_up_s)
            arrivals = _trace(workload, options.seed, environment.host, wire)
        except OperatorError as error:
            # On the page too, where whoever started the run looks.
            environment.runner.log_exception("local", error.message, error.message)
            environment.process_exit_code = 2
            print(f"tandem: {error.message}", flush=True)
        else:
            _send(Run(wire, workload.give_up_s, environment, lambda _: None), workload, arrivals)
        finally:
            # From a greenlet of its own: it ends this one, which Locust would begin anew.
            gevent.spawn(environment.runner.quit if options.headless else environment.runner.stop)
        raise StopUser


def _send(run: Run, workload: Workload, arrivals: tuple[Arrival, ...]) -> None:
    if workload.users is None:
        run.open_loop(arrivals)
    else:
        run.closed_loop(arrivals, workload.users, workload.duration_s)


def _workload(options: Any) -> Workload:
    """Raises OperatorError."""
    workload = load(options.workload)
    if options.duration:
        workload = workload.lasting(options.duration)
    if options.rate:
        workload = workload.at(options.rate)
    return workload.for_capacity(options.capacity) if options.capacity else workload


def _trace(workload: Workload, seed: int, host: str, wire: Wire) -> tuple[Arrival, ...]:
    """Raises OperatorError."""
    try:
        answer = wire.call("GET", wire.path("/v1/models"))
    except Broken as error:
        raise OperatorError(f"--host: no server answers at {host} ({error})", "host") from None
    return trace(workload, seed, read_catalog(host, answer.status, answer.content))
