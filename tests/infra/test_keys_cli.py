"""`tandem keys` on a Redis that is up, on files that none serves, and on one that does not answer."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from serve.cli import backstage as backstage_module
from serve.cli.app import main
from serve.cli.backstage import backstage
from serve.embedded import EmbeddedRedis, running_url
from serve.errors import OperatorError, Unauthorized
from serve.keys import ApiKey, KeyStore
from serve.results.local import LocalStore
from serve.settings.stores import JobSettings
from serve.settings.tree import Settings
from serve.telemetry.metrics import InProcessMetrics

Tandem = Callable[..., int]


@pytest.fixture
def tandem(monkeypatch: pytest.MonkeyPatch) -> Tandem:
    """Runs `tandem keys` with these arguments, here, and returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tandem", "keys", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return run


def found(url: str, token: str) -> ApiKey:
    async def look() -> ApiKey:
        store = KeyStore(JobSettings(redis_url=SecretStr(url)), InProcessMetrics())
        try:
            return await store.find(token)
        finally:
            await store.close()

    return asyncio.run(look())


def data_dir_of(server: EmbeddedRedis) -> Path:
    return server.folder.parent.parent


def test_the_first_key_is_made_before_any_server_runs(
    tandem: Tandem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem("create", "laptop", "--data-dir", tmp_path) == 0
    told = capsys.readouterr()
    token = told.out.strip()
    assert told.out == f"{token}\n", "a script takes it from there"
    assert told.err.count("\n") == 1
    assert f"made in {tmp_path}; shown this once" in told.err
    assert token not in told.err
    with EmbeddedRedis(tmp_path, "jobs") as server:
        assert found(server.url, token).name == "laptop"
    assert not (tmp_path / "redis" / "jobs" / "url").exists()


def test_create_list_and_revoke_beside_a_running_server(
    tandem: Tandem, jobs_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ("--data-dir", data_dir_of(jobs_redis))
    bounds = ("--requests-per-minute", 60, "--engine-seconds-per-day", 1800, "--max-unfinished", 4)
    options = ("--scope", "admin", "--scope", "generate", "--weight", 2.5, "--expires", "30d", "--json")
    assert tandem("create", "ops", *bounds, *options, *here) == 0
    made = json.loads(capsys.readouterr().out)
    secret = made.pop("secret")
    key = found(jobs_redis.url, secret)
    assert made == {
        "id": key.id,
        "name": "ops",
        "scopes": ["admin", "generate"],
        "weight": 2.5,
        "requests_per_minute": 60,
        "engine_seconds_per_day": 1800.0,
        "max_unfinished": 4,
        "created_at": key.created_at,
        "expires_at": key.created_at + 30 * 86400,
        "revoked_at": None,
    }
    assert tandem("list", "--json", *here) == 0
    listed = capsys.readouterr().out
    assert json.loads(listed) == [made]
    assert secret.split("_", 2)[2] not in listed
    assert tandem("revoke", key.id, *here) == 0
    assert f"{key.id} (ops) is revoked" in capsys.readouterr().out
    with pytest.raises(Unauthorized, match="revoked"):
        found(jobs_redis.url, secret)
    assert running_url(data_dir_of(jobs_redis)) == jobs_redis.url, "the server was left as it was"


def test_the_first_key_of_the_settings_is_a_key_like_any_other(
    tandem: Tandem, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = f"tdm_{'b' * 12}_{'B' * 43}"
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", redis_url)
    monkeypatch.setenv("TANDEM_KEYS__FIRST", first)
    assert tandem("list") == 0
    assert "no API keys" in capsys.readouterr().out, "a server makes it, not a command"

    async def make() -> None:
        store = KeyStore(JobSettings(redis_url=SecretStr(redis_url)), InProcessMetrics())
        await store.make_first(first)
        await store.close()

    asyncio.run(make())
    assert tandem("list", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["id"], told["name"], told["scopes"]) == ("b" * 12, "first", ["admin", "embed", "generate"])
    assert tandem("revoke", "b" * 12) == 0
    with pytest.raises(Unauthorized, match="revoked"):
        found(redis_url, first)


def test_the_table_fits_into_80_columns_and_takes_a_name_by_the_letter(
    tandem: Tandem, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", redis_url)
    scopes = ("--scope", "generate", "--scope", "embed", "--scope", "admin")
    bounds = ("--requests-per-minute", 10**9, "--engine-seconds-per-day", 10**9, "--max-unfinished", 10**9)
    assert tandem("create", "[bold]" + "x" * 58, *scopes, *bounds, "--weight", 0.01, "--expires", "1w") == 0
    assert tandem("create", "plain") == 0
    capsys.readouterr()
    assert tandem("list") == 0
    told = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in told.splitlines()) <= 80
    assert "[bold]" in told
    assert "until 20" in told
    plain = next(line.split() for line in told.splitlines() if "plain" in line)
    assert plain[1:] == ["plain", "embed", "1", "valid"] or plain[1:] == ["plain", "embed", "generate", "1", "valid"]


def test_no_keys_is_said_with_the_place(
    tandem: Tandem, tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    EmbeddedRedis(tmp_path, "jobs").__enter__().stop()
    assert tandem("list", "--data-dir", tmp_path) == 0
    assert capsys.readouterr().out == f"no API keys in {tmp_path}; `tandem keys create NAME` makes one\n"
    assert tandem("list", "--set", f"jobs.redis_url={redis_url}") == 0
    told = capsys.readouterr().out
    assert redis_url.rpartition("@")[2].partition("/")[0] in told
    assert redis_url.split("@")[0][9:] not in told, "the password"


@pytest.mark.parametrize("command", [("list",), ("list", "--json"), ("revoke", "a" * 12)])
def test_who_only_looks_begins_nothing(
    tandem: Tandem, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    place = tmp_path / "elsewhere"
    assert tandem(*command, "--data-dir", place) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"tandem: data_dir: nothing there: no server has kept jobs or keys in {place}\n"
    assert not list(tmp_path.iterdir())


def test_where_a_key_was_made_is_told_as_json_is_too(
    tandem: Tandem, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tandem("create", "a", "--json", "--set", f"jobs.redis_url={redis_url}") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["name"] == "a"
    assert told.err.startswith("made in redis://**********@127.0.0.1:")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("create", "a", "--scope", "everything"), "--scope everything: there are generate, embed, admin"),
        (("create", "a", "--weight", "0"), "--weight 0: from 0.01 to 100"),
        (("create", "a", "--weight", "nan"), "--weight nan: "),
        (("create", "a", "--requests-per-minute", "0"), "--requests-per-minute 0: "),
        (("create", "a", "--engine-seconds-per-day", "inf"), "--engine-seconds-per-day inf: "),
        (("create", "a", "--max-unfinished", "-1"), "--max-unfinished -1: "),
        (("create", "a", "--expires", "soon"), "--expires soon: "),
        (("create", "a", "--expires", "0d"), "--expires 0d: "),
        (("create", "a", "--expires", "999999999w"), "--expires 999999999w: "),
        (("create", " "), "NAME: "),
        (("create", "a\nb"), "NAME: "),
        (("create", "a\x1b[31m"), "NAME: "),
        (("create", "x" * 65), "NAME: "),
        (("revoke", "a" * 12), "ID: no API key has this id"),
        (("list", "--set", "jobs.redis_url"), "--set jobs.redis_url: write"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    tandem: Tandem,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.setenv("TANDEM_JOBS__REDIS_URL", redis_url)
    assert tandem(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"tandem: {named}")
    assert told.err.count("\n") == 1


def test_a_redis_that_does_not_answer_is_one_line(tandem: Tandem, capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem("list", "--set", "jobs.redis_url=redis://:hunter2@127.0.0.1:1/0") == 2
    assert capsys.readouterr().err == "tandem: jobs.redis_url: Redis at 127.0.0.1:1 does not answer\n"


def on_stage(settings: Settings, story: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        async with backstage(settings, begin=True) as stage:
            return await story(stage)

    return asyncio.run(run())


def test_a_command_waits_for_another_and_for_a_server_that_starts(tmp_path: Path) -> None:
    """Whoever has the folder does not tell its URL yet; then it makes room, or tells."""
    settings = Settings(data_dir=tmp_path)
    other = EmbeddedRedis(tmp_path, "jobs", told=False)
    other.start()
    ending = threading.Timer(0.2, other.stop)
    ending.start()

    async def create(stage: Any) -> Any:
        return await stage.keys.create("a")

    key = on_stage(settings, create).key
    ending.join()
    assert other.pid is None

    late = EmbeddedRedis(tmp_path, "jobs", told=False)
    late.start()
    telling = threading.Timer(0.2, late._tell)
    telling.start()

    async def listed(stage: Any) -> Any:
        assert stage.settings.jobs.redis_url.get_secret_value() == late.url
        return await stage.keys.list()

    assert on_stage(settings, listed) == (key,)
    telling.join()
    late.stop()


def test_who_never_tells_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backstage_module, "_WAIT_S", 0.1)
    began = time.monotonic()

    async def nothing(stage: Any) -> None:
        raise AssertionError("there is no stage")

    with EmbeddedRedis(tmp_path, "jobs", told=False), pytest.raises(OperatorError, match=r"does not answer$") as one:
        on_stage(Settings(data_dir=tmp_path), nothing)
    assert one.value.param == "data_dir"
    assert time.monotonic() - began < 5


def test_the_stage_has_jobs_and_results_and_ends_what_it_started(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)

    async def look(stage: Any) -> None:
        assert isinstance(stage.results, LocalStore)
        assert stage.results is stage.results
        assert stage.place == str(tmp_path)
        await stage.jobs.ping()

    on_stage(settings, look)
    server = EmbeddedRedis(tmp_path, "jobs")
    assert server.try_start(), "the folder is free again"
    server.stop()
