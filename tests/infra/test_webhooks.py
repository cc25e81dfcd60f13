"""Calls of webhooks as a receiver sees them, over real sockets and with the real store."""

import asyncio
import contextlib
import dataclasses
import json
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from standardwebhooks import Webhook, WebhookVerificationError
from support.jobs import Bench, a_request, on, until
from support.receiver import Receiver
from support.slow_proxy import SlowProxy

from serve.domain.jobs import Job, WebhookState
from serve.jobs.terms import Terms
from serve.settings.front import WebhookSettings
from serve.webhooks import Deliverer, Pace
from serve.webhooks.turns import IN_HAND, IN_HAND_A_HOST

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
QUICK = Pace(first_retry_s=0.02, longest_retry_s=0.05, look_again_s=0.02)


def told(job: Job) -> bytes:
    return json.dumps({"type": f"job.{job.state}", "data": {"id": job.id, "prompt": job.request.prompt}}).encode()


def a_settings(*hosts: str, **other: Any) -> WebhookSettings:
    given = {"allowed_hosts": hosts or ("127.0.0.1", "*.test"), "allow_private": True, "max_attempts": 4} | other
    return WebhookSettings(secret=SecretStr(SECRET), **given)


def names(*addresses: Sequence[str]) -> tuple[Callable[..., Any], list[str]]:
    """A resolver that answers its n-th question with the n-th of these, the last ever after; and what it was asked."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return addresses[min(len(asked), len(addresses)) - 1]

    return resolve, asked


@contextlib.asynccontextmanager
async def delivering(
    bench: Bench, *receivers: Receiver, settings: WebhookSettings | None = None, **other: Any
) -> AsyncIterator[None]:
    """A deliverer runs meanwhile, and leaves nothing. It may call the receivers' ports at every host."""
    before = asyncio.all_tasks()
    options = {"body": told, "pace": QUICK} | other
    settings = settings or a_settings()
    places = [f"{host}:{receiver.port}" for host in settings.allowed_hosts for receiver in receivers]
    settings = settings.model_copy(update={"allowed_hosts": (*settings.allowed_hosts, *places)})
    deliverer = Deliverer(bench.store, settings, metrics=bench.metrics, **options)
    running = asyncio.create_task(deliverer.run())
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert not {task for task in asyncio.all_tasks() - before if "Deliverer" in repr(task.get_coro())}


async def ended(bench: Bench, webhook: str, *job_ids: str) -> None:
    for job_id in job_ids or ("a",):
        await bench.store.submit(job_id, a_request(), terms=Terms(webhook=webhook))
        await bench.store.cancel(job_id)


async def settled(bench: Bench, job_id: str = "a") -> WebhookState | None:
    async def done() -> bool:
        return (await bench.store.get(job_id)).webhook_state is not WebhookState.PENDING

    await until(done)
    return (await bench.store.get(job_id)).webhook_state


async def true(fact: bool) -> bool:
    await asyncio.sleep(0)
    return fact


def counts(bench: Bench) -> tuple[float, float, float]:
    delivered, retried, failed = (
        bench.metrics.value("tandem_webhooks_total", outcome=outcome) for outcome in ("delivered", "retried", "failed")
    )
    return delivered, retried, failed


def test_a_receiver_verifies_a_call_with_the_standard_s_library(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver() as receiver, delivering(bench, receiver):
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.DELIVERED
        (call,) = receiver.calls
        assert call.line == "POST /done?by=tandem HTTP/1.1"
        assert call.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert call.headers["content-type"] == "application/json"
        assert call.headers["webhook-id"] == "a"
        message = Webhook(SECRET).verify(call.body, call.headers)
        assert message == {"type": "job.cancelled", "data": {"id": "a", "prompt": a_request().prompt}}
        for forged in (
            (SECRET, call.body + b" ", {}),
            (SECRET, call.body, {"webhook-id": "b"}),
            (SECRET, call.body, {"webhook-timestamp": str(int(call.headers["webhook-timestamp"]) + 1)}),
            ("whsec_" + "A" * 32, call.body, {}),
        ):
            secret, body, headers = forged
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(body, call.headers | headers)
        assert counts(bench) == (1, 0, 0)
        assert not await bench.store.due_webhooks(1.0)

    on(redis_url, story)


def test_jobs_without_a_webhook_and_jobs_that_run_call_nobody(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver() as receiver, delivering(bench, receiver):
            await bench.store.submit("plain", a_request())
            await bench.store.cancel("plain")
            await bench.store.submit("waiting", a_request(), terms=Terms(webhook=receiver.url()))
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.DELIVERED
            assert [call.headers["webhook-id"] for call in receiver.calls] == ["a"]
            await bench.store.cancel("waiting")
            assert await settled(bench, "waiting") is WebhookState.DELIVERED

    on(redis_url, story)


def test_a_call_is_made_again_until_it_is_heard(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver() as elsewhere:
            redirect = f"HTTP/1.1 307 Go\r\nlocation: {elsewhere.url()}\r\ncontent-length: 0\r\n\r\n".encode()
            async with Receiver(500, redirect, b"no HTTP at all\r\n\r\n", 200) as receiver, delivering(bench, receiver):
                await ended(bench, receiver.url())
                assert await settled(bench) is WebhookState.DELIVERED
            assert len(receiver.calls) == 4
            assert {call.headers["webhook-id"] for call in receiver.calls} == {"a"}
            for call in receiver.calls:
                Webhook(SECRET).verify(call.body, call.headers)
            assert counts(bench) == (1, 3, 0)
            assert not elsewhere.connections

    on(redis_url, story)


@pytest.mark.parametrize(
    ("status", "calls", "expected"), [(503, 4, (0, 3, 1)), (404, 4, (0, 3, 1)), (410, 1, (0, 0, 1))]
)
def test_a_call_that_nobody_hears_is_given_up(
    redis_url: str, status: int, calls: int, expected: tuple[int, int, int]
) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver(status) as receiver, delivering(bench, receiver):
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.FAILED
            assert len(receiver.calls) == calls
        assert counts(bench) == expected
        assert not await bench.store.due_webhooks(1.0)

    on(redis_url, story)


def test_the_distances_grow(redis_url: str) -> None:
    """Each is at least half of twice the one before: the other half is left to chance."""

    async def story(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        pace = Pace(first_retry_s=0.1, look_again_s=0.01)
        times: list[float] = []

        def body(job: Job) -> bytes:
            times.append(loop.time())
            return told(job)

        async with Receiver(500) as receiver, delivering(bench, receiver, pace=pace, body=body):
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.FAILED
        for number, (earlier, later) in enumerate(pairwise(times)):
            assert later - earlier >= 0.05 * 2**number

    on(redis_url, story)


def test_a_slow_receiver_holds_nobody_else(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        resolve, _ = names(["127.0.0.1"])
        async with Receiver() as slow, Receiver() as fast, delivering(bench, slow, fast, resolve=resolve):
            slow.open_.clear()
            await ended(bench, slow.url("slow.test"), *(f"slow-{n}" for n in range(40)))
            await ended(bench, fast.url("fast.test"), "fast")
            assert await settled(bench, "fast") is WebhookState.DELIVERED
            await slow.heard(2)
            assert (slow.held, slow.most_held) == (2, 2)
            slow.open_.set()
            await slow.heard(40)
            assert slow.most_held == 2
            assert {call.headers["webhook-id"] for call in slow.calls} == {f"slow-{n}" for n in range(40)}
            for n in range(40):
                assert await settled(bench, f"slow-{n}") is WebhookState.DELIVERED
        assert counts(bench) == (41, 0, 0)

    on(redis_url, story)


def test_hundreds_of_calls_that_hang_hold_nobody_else(redis_url: str) -> None:
    """More than a process has places for, and all of them due before the one that is heard at once."""

    async def story(bench: Bench) -> None:
        resolve, _ = names(["127.0.0.1"])
        async with Receiver() as slow, Receiver() as fast:
            slow.open_.clear()
            await ended(bench, slow.url("slow.test"), *(f"slow-{n}" for n in range(IN_HAND + 10)))
            await ended(bench, fast.url("fast.test"), "fast")
            patient = dataclasses.replace(QUICK, later_s=60.0, turn_s=60.0)
            settings = a_settings(timeout_s=60.0)
            async with delivering(bench, slow, fast, settings=settings, resolve=resolve, pace=patient):
                assert await settled(bench, "fast") is WebhookState.DELIVERED
                assert slow.held == slow.most_held == 2, "not one of them was answered"

    on(redis_url, story)


def test_a_missed_turn_is_no_call(redis_url: str) -> None:
    """However often a call finds no place: the first that is made is the first that counts."""

    async def story(bench: Bench) -> None:
        pace = dataclasses.replace(QUICK, turn_s=0.05)
        put_off: dict[str, int] = {}
        again = bench.store.webhook_again

        async def watched(job_id: str, delay_s: float) -> int:
            put_off[job_id] = calls = await again(job_id, delay_s)
            return calls

        bench.store.webhook_again = watched  # type: ignore[method-assign]
        jobs = [f"job-{n}" for n in range(IN_HAND_A_HOST + 8)]
        async with Receiver() as receiver, delivering(bench, receiver, settings=a_settings(max_attempts=1), pace=pace):
            receiver.open_.clear()
            await ended(bench, receiver.url(), *jobs)
            await until(lambda: true(len(put_off) == len(jobs) - 2))
            assert set(put_off.values()) == {0}, "none was made of what is put off"
            assert counts(bench) == (0, 0, 0)
            receiver.open_.set()
            for job_id in jobs:
                assert await settled(bench, job_id) is WebhookState.DELIVERED
        assert len(receiver.calls) == len(jobs)
        assert counts(bench) == (len(jobs), 0, 0)

    on(redis_url, story)


def test_a_process_that_dies_before_its_calls_uses_none_up(redis_url: str) -> None:
    """It was given the job again and again, and never came to call."""

    async def story(bench: Bench) -> None:
        async with Receiver() as receiver:
            await ended(bench, receiver.url())
            for _ in range(5):
                await until(lambda: _due(bench))
            async with delivering(bench, receiver, settings=a_settings(max_attempts=1)):
                assert await settled(bench) is WebhookState.DELIVERED
        assert counts(bench) == (1, 0, 0)

    async def _due(bench: Bench) -> bool:
        return await bench.store.due_webhooks(0.01) == ["a"]

    on(redis_url, story)


def test_a_port_that_is_no_longer_allowed_is_given_up(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver() as receiver, delivering(bench):
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.FAILED
            assert not receiver.connections

    on(redis_url, story)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_the_whole_call_is_bounded_in_time(redis_url: str, answer: bytes) -> None:
    """Whether the receiver says nothing, or a header a moment without end."""

    async def story(bench: Bench) -> None:
        async with (
            Receiver(answer) as receiver,
            delivering(bench, receiver, settings=a_settings(timeout_s=0.2, max_attempts=2)),
        ):
            if answer:
                receiver.drip = b"x: y\r\n"
            else:
                receiver.open_.clear()
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.FAILED
            await receiver.gone()
        assert len(receiver.calls) == 2

    on(redis_url, story)


def test_an_answer_without_end_is_not_read(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with (
            Receiver(b"HTTP/1.1 200 OK\r\n\r\n") as receiver,
            delivering(bench, receiver, settings=a_settings(timeout_s=60.0)),
        ):
            receiver.drip = b"x" * 65536
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.DELIVERED
            await receiver.gone()
        assert counts(bench) == (1, 0, 0)

    on(redis_url, story)


def test_the_address_that_was_checked_is_called_whatever_the_name_says_next(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        resolve, asked = names(["127.0.0.1"], ["127.0.0.2"])
        async with Receiver() as first, Receiver(host="127.0.0.2", port=first.port) as second:
            async with delivering(bench, first, resolve=resolve):
                await ended(bench, first.url("hooks.test"))
                assert await settled(bench) is WebhookState.DELIVERED
            assert asked == ["hooks.test"]
            assert (first.connections, second.connections) == (1, 0)
            assert first.calls[0].headers["host"] == f"hooks.test:{first.port}"

    on(redis_url, story)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"]],
)
def test_a_name_with_a_private_address_is_not_called(redis_url: str, addresses: list[str]) -> None:
    """Its order was accepted: nothing is resolved at the door."""

    async def story(bench: Bench) -> None:
        resolve, asked = names(addresses)
        settings = a_settings(allow_private=False, max_attempts=2)
        async with Receiver() as receiver, delivering(bench, receiver, settings=settings, resolve=resolve):
            await ended(bench, receiver.url("hooks.test", "https"))
            assert await settled(bench) is WebhookState.FAILED
            assert not receiver.connections
        assert asked == ["hooks.test"] * 2
        assert counts(bench) == (0, 1, 1)

    on(redis_url, story)


def test_the_next_address_is_tried_where_one_does_not_answer(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        resolve, _ = names(["127.0.0.9", "127.0.0.1"])
        async with Receiver() as receiver, delivering(bench, receiver, resolve=resolve):
            await ended(bench, receiver.url("hooks.test"))
            assert await settled(bench) is WebhookState.DELIVERED
        assert len(receiver.calls) == 1

    on(redis_url, story)


def test_names_are_resolved_by_the_system_by_default(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        settings = a_settings("localhost", "*.invalid", max_attempts=1)
        async with Receiver() as receiver, delivering(bench, receiver, settings=settings):
            await ended(bench, receiver.url("localhost"), "a")
            await ended(bench, receiver.url("no.invalid"), "b")
            assert await settled(bench, "a") is WebhookState.DELIVERED
            assert await settled(bench, "b") is WebhookState.FAILED

    on(redis_url, story)


@pytest.mark.parametrize(("name", "state"), [("hooks.test", "delivered"), ("other.test", "failed")])
def test_tls_is_spoken_with_the_name_not_the_address(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: str
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate(tmp_path, "hooks.test"))
    asked: list[str | None] = []
    tls.sni_callback = lambda _socket, server_name, _context: asked.append(server_name)
    # What the operator trusts; no proxy of theirs is asked.
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")

    async def story(bench: Bench) -> None:
        resolve, _ = names(["127.0.0.1"])
        async with (
            Receiver(tls=tls) as receiver,
            delivering(bench, receiver, settings=a_settings(max_attempts=1), resolve=resolve),
        ):
            await ended(bench, receiver.url(name, "https"))
            assert await settled(bench) == state
        assert asked == [name]
        assert len(receiver.calls) == (state == "delivered")

    on(redis_url, story)


def test_what_is_no_longer_allowed_or_too_large_is_given_up(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver() as receiver:
            for job_id, settings, body in (
                ("other", a_settings("hooks.example.com"), told),
                ("none", WebhookSettings(), told),
                ("large", a_settings(), lambda _: b"x" * 2**21),
            ):
                async with delivering(bench, receiver, settings=settings, body=body):
                    await ended(bench, receiver.url(), job_id)
                    assert await settled(bench, job_id) is WebhookState.FAILED
            assert not receiver.connections
        assert counts(bench) == (0, 0, 3)

    on(redis_url, story)


def test_a_body_that_can_not_be_written_is_tried_as_often_as_a_call(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        def broken(_: Job) -> bytes:
            raise KeyError("a slip of the pen")

        async with Receiver() as receiver, delivering(bench, receiver, body=broken):
            await ended(bench, receiver.url())
            assert await settled(bench) is WebhookState.FAILED
            assert not receiver.connections
        assert counts(bench) == (0, 3, 1)

    on(redis_url, story)


def test_several_processes_make_one_call(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        other = Bench(redis_url)
        ids = [f"job-{n}" for n in range(30)]
        async with Receiver() as receiver, delivering(bench, receiver), delivering(other, receiver):
            await ended(bench, receiver.url(), *ids)
            for job_id in ids:
                assert await settled(bench, job_id) is WebhookState.DELIVERED
        assert sorted(call.headers["webhook-id"] for call in receiver.calls) == sorted(ids)
        assert counts(bench)[0] + counts(other)[0] == 30
        await other.store.close()

    on(redis_url, story)


def test_what_a_process_leaves_behind_is_told_by_the_next(redis_url: str) -> None:
    """The first is gone before it could note what it was answered."""

    async def story(bench: Bench) -> None:
        lapsing = Pace(turn_s=0.1, store_s=0.1)
        async with Receiver() as receiver:
            receiver.open_.clear()
            async with delivering(bench, receiver, settings=a_settings(timeout_s=0.3), pace=lapsing):
                await ended(bench, receiver.url())
                await receiver.heard(1)
            assert (await bench.store.get("a")).webhook_state is WebhookState.PENDING
            receiver.open_.set()
            async with delivering(bench, receiver):
                assert await settled(bench) is WebhookState.DELIVERED
        assert [call.headers["webhook-id"] for call in receiver.calls] == ["a", "a"]

    on(redis_url, story)


def test_deliveries_go_on_when_the_store_is_back(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with SlowProxy(redis_url) as proxy:
            behind = Bench(proxy.url)
            async with Receiver() as receiver, delivering(behind, receiver):
                await ended(bench, receiver.url(), "before")
                assert await settled(bench, "before") is WebhookState.DELIVERED
                await proxy.cut()
                await ended(bench, receiver.url(), "after")
                await proxy.mend()
                assert await settled(bench, "after") is WebhookState.DELIVERED
            await behind.store.close()

    on(redis_url, story)


def test_a_job_whose_record_is_deleted_meanwhile_is_let_go(redis_url: str) -> None:
    async def story(bench: Bench) -> None:
        async with Receiver(500) as receiver, delivering(bench, receiver):
            receiver.open_.clear()
            await ended(bench, receiver.url())
            await receiver.heard(1)

            async def deleted() -> bool:
                return await bench.store.forget(["a"]) == 1

            await until(deleted)
            receiver.open_.set()
            await ended(bench, receiver.url(), "b")
            assert await settled(bench, "b") is WebhookState.FAILED
        assert [call.headers["webhook-id"] for call in receiver.calls].count("a") == 1

    on(redis_url, story, result_ttl_s=0.05)


def certificate(folder: Path, name: str) -> Path:
    """A certificate that vouches for itself, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path
