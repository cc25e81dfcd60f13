"""What the contract says of one job, for the state machine to compare with the store."""

from dataclasses import dataclass, field

from serve.domain import ImageRequest, Job, JobState
from serve.jobs.store import Want

MAX_ATTEMPTS = 2

Told = tuple[JobState, int, int | None, bytes | None]
"""An event: state, step, and of a preview the image's index and the file."""


@dataclass
class Expected:
    """What the contract says of one job."""

    request: ImageRequest
    place: int
    state: JobState = JobState.QUEUED
    attempt: int = 0
    fence: int = 0
    step: int = 0
    cancel: bool = False
    waited: bool = False
    lapsed: bool = False
    overdue: bool = False
    settled: tuple[int, str] | None = None
    history: list[Told] = field(default_factory=lambda: [(JobState.QUEUED, 0, None, None)])
    frozen: Job | None = None

    @property
    def due(self) -> bool:
        """The next sweep ends it."""
        return self.overdue and not self.state.terminal

    def satisfies(self, want: Want) -> bool:
        fits = self.request.model == want.model and want.above < self.request.pixels <= want.upto
        return fits and not self.overdue and (self.waited or not want.waited_s)

    def become(self, state: JobState) -> None:
        self.state = state
        self.lapsed = self.waited = False
        if state is JobState.QUEUED:
            self.step = 0
        if state is not JobState.RUNNING:
            self.history = [told for told in self.history if told[2] is None]
        self.tell(self.step)

    def tell(self, step: int, index: int | None = None, preview: bytes | None = None) -> None:
        """The newest event; of the previews of an image the stream keeps the last."""
        if index is not None:
            self.history = [told for told in self.history if told[2] != index]
        self.history.append((self.state, step, index, preview))

    def retry(self) -> None:
        if self.cancel:
            self.become(JobState.CANCELLED)
        else:
            self.become(JobState.QUEUED if self.attempt < MAX_ATTEMPTS else JobState.FAILED)

    def settle(self, fence: int, outcome: str) -> None:
        """The worker that holds the job ends its claim."""
        self.settled = (fence, outcome)
        match outcome:
            case "succeed":
                self.step = self.request.num_inference_steps
                self.become(JobState.SUCCEEDED)
            case "fail":
                self.become(JobState.FAILED)
            case "cancelled":
                self.become(JobState.CANCELLED)
            case _:
                self.attempt -= outcome == "release"
                self.retry()
