"""What is said of a job's text is kept with it, and its end is counted by template and arm."""

import dataclasses

from support.jobs import ANY, CUT, Bench, a_request, on

from serve.domain.jobs import JobState
from serve.domain.text import Note, TokenCount
from serve.jobs.store import Claim

TOKENS = TokenCount(field="prompt", role="text_encoder", encoder="clip-l", used=80, cut=3, unknown=1, chunks=2)
NOTE = Note(field="prompt", code="normalized", message="é")


def test_what_is_said_of_the_text_stays_with_the_record(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        await bench.store.submit("a", a_request(), [CUT], tokens=[TOKENS], notes=[NOTE])
        await bench.store.submit("b", a_request())
        told = await bench.store.get("a")
        assert (told.tokens, told.truncated, told.notes) == ((TOKENS,), (CUT,), (NOTE,))
        plain = await bench.store.get("b")
        assert (plain.tokens, plain.notes) == ((), ())

    on(redis_url, story)


def test_ends_are_counted_by_template_and_arm(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        of_arm = dataclasses.replace(a_request(), template="portrait", arm="rich")
        without = dataclasses.replace(a_request(), template="style", arm=None)
        for job_id, request in (("a", of_arm), ("b", of_arm), ("c", without), ("d", a_request())):
            await bench.store.submit(job_id, request)
        for _ in "abcd":
            claim = await bench.store.claim("worker", ANY)
            assert isinstance(claim, Claim)
            if claim.job_id == "b":
                await bench.store.cancel("b")
                await bench.store.cancelled(claim)
            else:
                await bench.succeed(claim)
        metrics, name = bench.metrics, "tandem_template_jobs_total"
        assert metrics.value(name, template="portrait", arm="rich", state="succeeded") == 1
        assert metrics.value(name, template="portrait", arm="rich", state="cancelled") == 1
        assert metrics.value(name, template="style", arm="", state="succeeded") == 1
        assert metrics.value(name) == 3
        assert metrics.value("tandem_jobs_total") == 4
        assert metrics.value("tandem_template_job_seconds", template="portrait") == 2
        assert (await bench.store.get("b")).state is JobState.CANCELLED

    on(redis_url, story)
