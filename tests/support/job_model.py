"""What the contract says of one job, for the state machine to compare with the store."""

from dataclasses import dataclass, field

from serve.domain import ImageRequest, Job, JobState

MAX_ATTEMPTS = 2


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
    lapsed: bool = False
    overdue: bool = False
    settled: tuple[int, str] | None = None
    history: list[tuple[JobState, int]] = field(default_factory=lambda: [(JobState.QUEUED, 0)])
    frozen: Job | None = None

    @property
    def due(self) -> bool:
        """The next sweep ends it."""
        return self.overdue and not self.state.terminal

    def become(self, state: JobState) -> None:
        self.state = state
        self.lapsed = False
        if state is JobState.QUEUED:
            self.step = 0
        self.history.append((state, self.step))

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
