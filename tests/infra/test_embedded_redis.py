import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from serve.embedded import EmbeddedRedis, check_redis, running_url
from serve.errors import OperatorError


def _gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        os.sched_yield()
    return False


def test_it_answers_with_the_password_only(redis_server: EmbeddedRedis) -> None:
    check_redis(redis_server.url, "jobs.redis_url")
    port = redis_server.url.rpartition(":")[2]
    with redis.Redis.from_url(f"redis://127.0.0.1:{port}") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert redis_server.pid is not None
    assert redis_server.url.split("@")[0][9:] not in Path(f"/proc/{redis_server.pid}/cmdline").read_text()


def test_jobs_survive_a_kill_and_keep_their_url(jobs_redis: EmbeddedRedis) -> None:
    url = jobs_redis.url
    with redis.Redis.from_url(url) as client:
        client.set("accepted", "yes")
        jobs_redis.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        jobs_redis.start()
        assert jobs_redis.url == url
        assert client.get("accepted") == b"yes"
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_the_cache_is_bounded_and_leaves_no_file(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, "cache", max_bytes=4 << 20) as server, redis.Redis.from_url(server.url) as client:
        for number in range(64):
            client.set(f"key{number}", bytes(256 << 10))
        assert 0 < client.dbsize() < 64
    assert {file.name for file in server.folder.iterdir()} == {"lock", "redis.log"}


def test_stop_ends_the_server_and_twice_is_fine(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path, "cache")
    server.start()
    pid = server.pid
    server.stop()
    server.stop()
    assert pid is not None
    assert _gone(pid)


def test_two_servers_never_share_a_folder(jobs_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.embedded._STOP_S", 0.05)
    data_dir = jobs_redis.folder.parent.parent
    with pytest.raises(OperatorError, match="another server uses"):
        EmbeddedRedis(data_dir, "jobs").start()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "redis").write_text("a file")
    with pytest.raises(OperatorError) as caught:
        EmbeddedRedis(tmp_path, "jobs").start()
    assert caught.value.param == "data_dir"
    assert "\n" not in str(caught.value)


def test_a_broken_append_only_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "redis" / "jobs").mkdir(parents=True)
    (tmp_path / "redis" / "jobs" / "jobs.aof").write_text("*1\r\nnonsense that is no command at all\r\n")
    with pytest.raises(OperatorError, match=r"does not start: .*Bad file format"):
        EmbeddedRedis(tmp_path, "jobs").start()


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(tmp_path: Path, with_signal: signal.Signals) -> None:
    # Started by a thread that ends at once: the server must live as long as the process, and no longer.
    code = f"""
import pathlib, threading, time
from serve.embedded import EmbeddedRedis, check_redis, running_url
server = EmbeddedRedis(pathlib.Path({str(tmp_path)!r}), "jobs")
thread = threading.Thread(target=server.start); thread.start(); thread.join()
check_redis(server.url, "jobs.redis_url")
print(server.pid, flush=True)
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(with_signal)
    assert _gone(pid)
    with EmbeddedRedis(tmp_path, "jobs") as successor:
        check_redis(successor.url, "jobs.redis_url")


def test_an_absent_server_is_one_line_that_names_the_setting(redis_server: EmbeddedRedis) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"redis://:secret@127.0.0.1:{taken.getsockname()[1]}/0"
        with pytest.raises(
            OperatorError, match=r"^jobs\.redis_url: Redis at 127\.0\.0\.1:\d+/?.* does not answer$"
        ) as one:
            check_redis(url, "jobs.redis_url")
    assert "secret" not in str(one.value)
    wrong = redis_server.url.replace(redis_server.url.split("@")[0][9:], "wrong")
    with pytest.raises(OperatorError, match="refuses the password"):
        check_redis(wrong, "jobs.redis_url")
    with pytest.raises(OperatorError, match="not a Redis URL"):
        check_redis("localhost:6379", "jobs.redis_url")


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"redis://:{password}@127.0.0.1:1/0"
            for password in ("sec/ret", "sec#ret", "sec?ret", "sec@ret", "1/sec@ret")
        ),
        "redis://:secret/0",
        "redis://[secret",
        "unix://:sec/ret@/nowhere.sock",
    ],
)
def test_a_password_that_is_not_escaped_is_never_shown_in_part(url: str) -> None:
    with pytest.raises(OperatorError) as one:
        check_redis(url, "jobs.redis_url")
    assert "sec" not in one.value.message
    assert "ret" not in one.value.message
    assert "in a password are %2F" in one.value.message


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=rf"^jobs\.redis_url: Redis at {tmp_path}/redis\.sock does not answer$"):
        check_redis(f"unix://{tmp_path}/redis.sock?password=secret", "jobs.redis_url")


def test_what_it_keeps_is_for_its_own_user_alone(tmp_path: Path) -> None:
    """Prompts and the hashes of keys are in it; the umask of the operator may be any."""
    before = os.umask(0)
    try:
        with EmbeddedRedis(tmp_path / "data", "jobs") as server, redis.Redis.from_url(server.url) as client:
            client.set("prompt", "x")
            client.bgrewriteaof()
            while client.info("persistence")["aof_rewrite_in_progress"]:
                os.sched_yield()
            modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    finally:
        os.umask(before)
    assert modes.pop(Path("data")) == 0o777, "it may hold what others read"
    assert modes.pop(Path("data/redis")) == modes.pop(Path("data/redis/jobs")) == 0o700
    assert Path("data/redis/jobs/jobs.aof") in modes
    assert set(modes.values()) == {0o600}


def test_it_tells_its_url_to_its_own_user_alone_while_it_runs(tmp_path: Path) -> None:
    assert running_url(tmp_path) is None
    with EmbeddedRedis(tmp_path, "jobs") as server:
        file = server.folder / "url"
        assert file.read_text() == f"{server.url}\n"
        assert file.stat().st_mode & 0o777 == 0o600
        assert not list(server.folder.glob("url.*"))
        assert running_url(tmp_path) == server.url
        server.kill()
        assert running_url(tmp_path) is None
        server.start()
        assert running_url(tmp_path) == server.url
    assert not file.exists()
    assert running_url(tmp_path) is None


def test_what_a_killed_server_told_does_no_harm(tmp_path: Path, redis_server: EmbeddedRedis) -> None:
    dead = EmbeddedRedis(tmp_path, "jobs")
    dead.start()
    dead.kill()
    file = dead.folder / "url"
    # Another server has the port by now, and even the password fits: it isn't this folder's.
    file.write_text(f"{redis_server.url}\n")
    assert running_url(tmp_path) is None
    with EmbeddedRedis(tmp_path, "jobs", told=False) as quiet:
        assert not file.exists()
        assert running_url(tmp_path) is None
        file.write_text(f"{dead.url}\n")  # as if nobody had removed it
        assert running_url(tmp_path) is None
        file.write_bytes(b"\xff nonsense")
        assert running_url(tmp_path) is None
        assert quiet.alive
    file.write_text(f"{dead.url}\n")
    file.chmod(0o644)
    with EmbeddedRedis(tmp_path, "jobs") as successor:
        assert running_url(tmp_path) == successor.url
        assert file.stat().st_mode & 0o777 == 0o600
        dead.stop()
        assert running_url(tmp_path) == successor.url, "who is dead takes nothing along"


def test_a_server_that_cannot_tell_its_url_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "redis" / "jobs" / "url" / "full").mkdir(parents=True)
    with EmbeddedRedis(tmp_path, "jobs") as server:
        check_redis(server.url, "jobs.redis_url")
        with pytest.raises(OperatorError, match=r"^data_dir: .*Is a directory$"):
            running_url(tmp_path)
        assert not list(server.folder.glob("url.*"))
    assert "won't find this server" in caplog.text


def test_a_folder_in_use_is_told_at_once_to_who_does_not_wait(jobs_redis: EmbeddedRedis) -> None:
    other = EmbeddedRedis(jobs_redis.folder.parent.parent, "jobs", told=False)
    assert not other.try_start()
    other.stop()
    assert running_url(jobs_redis.folder.parent.parent) == jobs_redis.url
