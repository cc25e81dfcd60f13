"""`tandem cache stats` and `tandem cache clear`, on states of the cache that a real one seldom has."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.responses import JSONResponse

from serve.cli.cache_screen import count, size

Tandem = Callable[..., int]


def memory(memory_hits: int = 987_654_321, rate: float | None = 0.8123, **more: Any) -> dict[str, Any]:
    hits = {"memory": memory_hits, "redis": 81_230, "encoded": 40_123}
    kept = {"entries": 12_345_678, "bytes": 268_435_456, "capacity": 268_435_456, "in_flight": 3}
    return kept | {"hits": hits, "hit_rate": rate} | more


def process(place: str, name: str, redis: str = "up", **more: Any) -> dict[str, Any]:
    return memory(place=place, name=name, redis=redis, **more)


def state() -> dict[str, Any]:
    counted = {"keys": 12_345, "bytes": 268e6, "max_bytes": 268_435_456, "hits": 5, "misses": 6, "evicted": 1_234}
    names = ["node-17.example.com:9923:ab12cd34", "node-17.example.com:9923:ab12cd35"]
    members = [process("diffusion", name, redis) for name, redis in zip(names, ("up", "away"), strict=True)]
    return {
        "redis": counted,
        "redis_detail": "up",
        "places": {"diffusion": memory(processes=2), "ingress": memory(0, None, processes=1)},
        "processes": [*members, process("ingress", "node-17.example.com:1", memory_hits=0, rate=None)],
    }


def test_the_table_fits_into_80_columns_whatever_it_holds(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    script.cache = state()
    assert tandem("cache", "stats", "--url", script.url) == 0
    told = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in told.splitlines()) <= 80
    assert "Redis: 12,345 keys, 268.0 MB of 268.4 MB, 1,234 evicted" in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.strip()}
    assert rows["diffusion"] == ["12.3M", "268.4", "MB", "987.7M", "81.2k", "40.1k", "81.2", "%"]
    assert rows["ingress"][-1] == "40.1k", "nothing was asked for, and there is no rate"
    assert [name[-8:] for name in rows if name.startswith("…")] == ["ab12cd34", "ab12cd35"]
    assert "node-17.example.com:9923:ab12cd35 leaves Redis alone" in " ".join(told.split())


def test_a_cache_without_redis_says_why(script: Any, capsys: pytest.CaptureFixture[str], tandem: Tandem) -> None:
    script.cache = state() | {"redis": None, "redis_detail": "cache.redis_url is not set"}
    assert tandem("cache", "stats", "--url", script.url) == 0
    assert "Redis: cache.redis_url is not set." in capsys.readouterr().out
    assert tandem("cache", "stats", "--url", script.url, "--json") == 0
    assert json.loads(capsys.readouterr().out) == script.cache


def test_a_server_that_is_not_there_is_one_line(
    nowhere: str, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    for command in (["stats"], ["clear", "--yes"]):
        assert tandem("cache", *command, "--url", nowhere) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("tandem: no server answers")


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (9999, "9,999"), (10_000, "10.0k"), (999_949, "999.9k"), (999_950, "1.0M"), (10**9, "1.0G")],
)
def test_numbers_stay_short(number: int, said: str) -> None:
    assert count(number) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (2e15, "2000.0 TB")],
)
def test_sizes_stay_short(number: float, said: str) -> None:
    assert size(number) == said


def test_clearing_asks_first(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y\n")))
    assert tandem("cache", "clear", "--url", script.url) == 2
    assert "--yes" in capsys.readouterr().err
    assert script.cleared == 0
    assert tandem("cache", "clear", "--url", script.url, "--yes") == 0
    assert script.cleared == 1
    assert "1,234" in capsys.readouterr().out
    away = {"message": "the cache Redis does not answer", "type": "x", "param": "cache.redis_url", "code": "x"}
    script.refusal = JSONResponse({"error": away}, 503, {"Retry-After": "1"})
    assert tandem("cache", "clear", "--url", script.url, "--yes") == 2
    assert "the cache Redis does not answer; try again in 1 s" in capsys.readouterr().err
