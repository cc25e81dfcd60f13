"""`tandem cache warm`: what a file may hold, what is counted, what is told and where."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.cli.warm import read_lines
from serve.errors import OperatorError

Tandem = Callable[..., int]


def written(folder: Path, data: bytes) -> str:
    file = folder / "prompts"
    file.write_bytes(data)
    return str(file)


def test_a_text_file_is_a_prompt_a_line_as_an_editor_counts_them(tmp_path: Path) -> None:
    file = written(
        tmp_path, "\ufeff# mine\r\n\r\na red circle\r\n  a (blue:1.2) star \n#no\nein großer Kreis ☃".encode()
    )
    lines = read_lines(file, "m")
    assert [(line.number, line.order["prompt"]) for line in lines] == [
        (3, "a red circle"),
        (4, "a (blue:1.2) star"),
        (6, "ein großer Kreis ☃"),
    ]
    assert {line.order["model"] for line in lines} == {"m"}


def test_json_lines_carry_the_fields_of_an_order(tmp_path: Path) -> None:
    orders = [{"prompt": "a", "negative_prompt": "b", "clip_skip": 1}, {"prompt": "c", "model": "other"}]
    file = written(tmp_path, b"# a list\n" + b"\n\n".join(json.dumps(order).encode() for order in orders))
    assert [line.order for line in read_lines(file, "m")] == [orders[0] | {"model": "m"}, orders[1]]
    assert [line.number for line in read_lines(file, None)] == [2, 4]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no prompt"),
        (b"\n# nothing\n", "holds no prompt"),
        (b"a\nb\xff\n", "line 2: not UTF-8"),
        (b'{"prompt": "a"}\n\nb\n', "line 3: not JSON: Expecting value at column 1"),
        (b'{"prompt": "a"}\n{"prompt": "b"', "line 2: not JSON"),
        (b'{"prompt": "a"}\n["b"]\n', 'line 2: not an object with a "prompt"'),
        (b'{"prompt": 1}\n', 'line 1: not an object with a "prompt"'),
        (b'{"negative_prompt": "a"}\n', 'line 1: not an object with a "prompt"'),
        (b'{"prompt": "a", "width": ' + b"1" * 5000 + b"}", "line 1: not JSON that can be read"),
        (b'{"prompt": ' + b"[" * 200_000, "line 1: not JSON"),
    ],
    ids=range(10),
)
def test_a_bad_file_is_refused_by_its_line(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(OperatorError) as refused:
        read_lines(written(tmp_path, data), None)
    assert said in refused.value.message


def test_a_bad_file_is_one_line_and_nothing_is_sent(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    bad = written(tmp_path, b'{"prompt": "a"}\nb\n')
    for file, said in (
        (bad, f"{bad}: line 2: not JSON"),
        (tmp_path / "no", "no: No such file"),
        (tmp_path, "directory"),
    ):
        assert tandem("cache", "warm", file, "--url", script.url) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("tandem: ")
        assert captured.err.count("\n") == 1
        assert said in captured.err
    assert not script.texts


def test_every_prompt_is_encoded_and_counted(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    script.busy = 2
    file = written(tmp_path, b"\n".join(b"prompt %d" % n for n in range(20)) + b"\nprompt 1\na cut one\n")
    assert tandem("cache", "warm", file, "--url", script.url, "--model", "m", "--concurrency", 4) == 0
    assert {text["prompt"] for text in script.texts} == {*(f"prompt {n}" for n in range(20)), "a cut one"}
    assert len(script.texts) == 22
    assert {(text["model"], text["output"]) for text in script.texts} == {("m", "report")}
    assert script.most_at_once <= 4
    report = rows(capsys.readouterr().out)
    assert [report[row][0] for row in ("prompts", "units encoded", "units from cache", "failed")] == [
        "22",
        "21",
        "1",
        "0",
    ]
    assert report["prompts cut"][0] == "1"
    assert "seconds" in report


def rows(report: str) -> dict[str, list[str]]:
    """The words after each row's name, which ends where two blanks begin."""
    cells = [[cell for cell in line.split("  ") if cell.strip()] for line in report.splitlines()]
    return {cell[0].strip(): cell[1].split() for cell in cells if len(cell) > 1}


def test_what_the_server_refuses_is_told_by_line_and_the_rest_is_encoded(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    file = written(tmp_path, b"a\n\nbad\nb\nbad\n" + b"bad\n" * 20)
    assert tandem("cache", "warm", file, "--url", script.url) == 1
    told = capsys.readouterr().out
    assert rows(told)["failed"] == ["22"]
    assert sorted(text["prompt"] for text in script.texts) == ["a", "b"]
    assert "line 3: clip_skip must be between 0 and 1" in told
    assert "and 2 more" in told


def test_standard_input(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tandem: Tandem
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert tandem("cache", "warm", "-", "--url", script.url) == 0
    assert sorted(text["prompt"] for text in script.texts) == ["a", "b"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert tandem("cache", "warm", "-", "--url", script.url) == 2
    assert "standard input: line 1: not UTF-8" in capsys.readouterr().err


def test_a_server_that_is_not_there_or_stays_busy_ends_it(
    script: Any,
    nowhere: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tandem: Tandem,
) -> None:
    file = written(tmp_path, b"a\nb\nc\n")
    assert tandem("cache", "warm", file, "--url", nowhere) == 2
    assert "no server answers" in capsys.readouterr().err
    monkeypatch.setattr("serve.cli.warm.PATIENCE_S", 0.05)
    script.busy = 10**9
    assert tandem("cache", "warm", file, "--url", script.url) == 2
    assert "the text-encoder pool does not answer" in capsys.readouterr().err
