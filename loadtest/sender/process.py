"""`python -m loadtest.sender.process FILE`: send the trace of a file, as `loadtest.driver` wrote it.

Standard output has a JSON line for each sample and each look at the progress; standard input is open as long as whoever
started this lives.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent.os
from locust import User, task
from locust.env import Environment

from loadtest.samples import Arrival, Sample
from loadtest.sender.open_loop import Run
from loadtest.sender.wire import Wire

EVERY_S = 0.5
"""Between two looks at the progress."""


def main(file: Path) -> None:
    with file.open(encoding="utf-8") as lines:
        plan = json.loads(next(lines))
        arrivals = [Arrival(**json.loads(line)) for line in lines]
    gevent.spawn(end_with_parent)

    class Clients(User):  # type: ignore[misc]
        """All of them: who is under way is the trace's affair, not Locust's count of users."""

        fixed_count = 1

        @task  # type: ignore[untyped-decorator]
        def send(self) -> None:
            try:
                _send(self.environment, plan, arrivals)
            except Exception:  # noqa: BLE001 -- Locust would send the whole trace again
                traceback.print_exc()
                os._exit(1)
            self.environment.runner.quit()

    environment = Environment(user_classes=[Clients], host=plan["target"])
    runner = environment.create_local_runner()
    runner.start(1, spawn_rate=1)
    runner.greenlet.join()


def _send(environment: Environment, plan: dict[str, Any], arrivals: list[Arrival]) -> None:
    give_up_s = float(plan["give_up_s"])
    run = Run(Wire(plan["target"], plan["key"], timeout_s=give_up_s), give_up_s, environment, _write_sample)

    def look() -> None:
        while True:
            _write("progress", asdict(run.progress()))
            gevent.sleep(EVERY_S)

    looking = gevent.spawn(look)
    try:
        if plan["users"] is None:
            run.open_loop(arrivals)
        else:
            run.closed_loop(arrivals, plan["users"], plan["until_s"])
    finally:
        looking.kill()
    _write("progress", asdict(run.progress()))
    _write("ended", True)


def _write_sample(sample: Sample) -> None:
    # Not asdict, which would copy the whole job.
    _write("sample", {name: getattr(sample, name) for name in Sample.__dataclass_fields__})


def _write(kind: str, what: Any) -> None:
    sys.stdout.write(json.dumps({kind: what}) + "\n")
    sys.stdout.flush()


def end_with_parent() -> None:
    """Ends this process when its standard input does."""
    while gevent.os.tp_read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
