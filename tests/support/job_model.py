"""What the contract says of jobs, for the state machine to compare with the store."""

from dataclasses import dataclass, field

from serve.domain.jobs import Job, JobState
from serve.domain.orders import ImageRequest, Priority
from serve.jobs.store import Terms, Want

MAX_ATTEMPTS = 2
HELD = (JobState.ENCODING, JobState.RUNNING, JobState.STORING)

Told = tuple[JobState, int, int | None, bytes | None]
"""An event: state, step, and of a preview the image's index and the file."""


@dataclass
class Expected:
    """What the contract says of one job."""

    request: ImageRequest
    place: int
    terms: Terms = field(default=Terms())
    state: JobState = JobState.QUEUED
    attempt: int = 0
    fence: int = 0
    lost: int = 0
    step: int = 0
    cancel: bool = False
    waited: bool = False
    lapsed: bool = False
    overdue: bool = False
    put_off: bool = False
    dead: bool = False
    told: bool = False
    settled: tuple[int, str] | None = None
    history: list[Told] = field(default_factory=lambda: [(JobState.QUEUED, 0, None, None)])
    frozen: Job | None = None

    @property
    def due(self) -> bool:
        """The next sweep ends it."""
        return self.overdue and not self.state.terminal

    @property
    def alone(self) -> bool:
        """The next attempt must have the worker for itself."""
        return self.lost > 0 and self.attempt == MAX_ATTEMPTS - 1

    @property
    def rank(self) -> tuple[bool, int]:
        """Where it stands among its owner's."""
        return (self.terms.priority is Priority.BATCH, self.place)

    @property
    def price(self) -> float:
        """Rounds that pay for its next claim: the first is the one that counts."""
        return self.terms.cost_ms / self.terms.weight if self.fence == 0 else 0.0

    def satisfies(self, want: Want) -> bool:
        fits = self.request.model == want.model and want.above < self.request.pixels <= want.upto
        return fits and not self.overdue and not self.put_off and (self.waited or not want.waited_s)

    def become(self, state: JobState) -> None:
        self.state = state
        self.lapsed = self.waited = self.put_off = False
        if state is JobState.QUEUED:
            self.step = 0
        if state not in HELD:
            self.history = [told for told in self.history if told[2] is None]
        self.tell(self.step)

    def tell(self, step: int, index: int | None = None, preview: bytes | None = None) -> None:
        """The newest event; of the previews of an image the stream keeps the last."""
        if index is not None:
            self.history = [told for told in self.history if told[2] != index]
        self.history.append((self.state, step, index, preview))

    def progress(self, step: int, state: JobState) -> None:
        """A sign of life: neither step nor state goes back."""
        self.lapsed = False
        further = HELD.index(state) > HELD.index(self.state)
        if further:
            self.state = state
        if step > self.step:
            self.step = step
            further = True
        if further:
            self.tell(self.step)

    def retry(self) -> None:
        if self.cancel:
            self.become(JobState.CANCELLED)
        elif self.attempt < MAX_ATTEMPTS:
            self.become(JobState.QUEUED)
        else:
            self.become(JobState.FAILED)
            self.dead = True

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
                self.put_off = outcome == "retry" and self.state is JobState.QUEUED


class FairShare:
    """Deficit round robin with an infinitely small quantum, told in the plainest words: every owner's account fills at
    the same speed, and a job is claimed when its owner's account has paid for it.

    Owns: how far the rounds have come, and up to which round each owner with queued jobs has spent its share.
    """

    def __init__(self) -> None:
        self.round = 0.0
        self.spent: dict[str, float] = {}

    def joined(self, owner: str) -> None:
        self.spent.setdefault(owner, self.round)

    def choose(self, queue: list[Expected], wants: tuple[Want, ...] | list[Want]) -> Expected | None:
        """The job that a worker with these wants is given."""
        for want in wants:
            firsts: dict[str, Expected] = {}
            for job in sorted(queue, key=lambda job: job.rank):
                # A job is offered under the first want that it satisfies.
                if next((each for each in wants if job.satisfies(each)), None) is want:
                    firsts.setdefault(job.terms.owner, job)
            if firsts:
                return min(firsts.values(), key=lambda job: (self.paid(job), job.rank))
        return None

    def paid(self, job: Expected) -> float:
        """The round that pays for it: none that is over, however long its owner could not be served."""
        return max(self.spent[job.terms.owner] + job.price, self.round)

    def claimed(self, job: Expected) -> None:
        """Before the job leaves the queue."""
        self.spent[job.terms.owner] = self.paid(job)
        self.round = max(self.round, self.spent[job.terms.owner])

    def left(self, owners: set[str]) -> None:
        """These still have queued jobs."""
        self.spent = {owner: spent for owner, spent in self.spent.items() if owner in owners}
        if not owners:
            self.round = 0.0
