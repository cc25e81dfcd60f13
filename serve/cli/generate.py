"""What `tandem generate` does: one job, its bar, its files, its report."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from serve.cli.client import Client
from serve.cli.screen import cache_line, cut_lines, job_bars, run_job
from serve.client import Job
from serve.domain.jobs import JobState
from serve.errors import OperatorError
from serve.telemetry.logs import escape

_SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_REFERENCE = re.compile(r"[0-9a-f]{32}/([0-9]{1,4}|image|mask)")


async def generate(client: Client, order: Mapping[str, Any], out: Path, *, as_json: bool) -> int:
    """Exit code 0, or 1 when the job did not succeed. Bars go to stderr, the report to stdout.

    `image` and `mask` of the order are files here, or pictures that the server keeps (`<job id>/0`). Where it names no
    format, `out` does if it is a file.
    """
    order = {**order, "output_format": _format(out, order.get("output_format"))}
    pictures = {field: _picture(field, order.get(field)) for field in ("image", "mask")}
    order = {**order, **pictures}
    _make_folder(out.parent if _is_file(out) else out)
    async with client:
        with job_bars(Console(stderr=True)) as bars:
            job = await run_job(client, order, _short(order["prompt"] or order["template"] or ""), bars)
        files = []
        for index, path in enumerate(_paths(out, job)):
            _save(path, await client.image(job.id, index))
            files.append(path)
    if as_json:
        print(json.dumps({"job": job.raw, "files": [str(path) for path in files]}, indent=2))
    else:
        _report(job, files)
    return 0 if job.state is JobState.SUCCEEDED else 1


def _report(job: Job, files: list[Path]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for index, path in enumerate(files):
        console.print(f"{path}  (seed {job.seed + index})")
    if job.state is not JobState.SUCCEEDED:
        console.print(f"{job.state}: {job.error.message if job.error else 'no picture'}", style="red")
    if job.approximate:
        console.print(f"approximate: {', '.join(job.approximate)}", style="yellow")
    for note in job.notes:
        console.print(f"{note.field}: {escape(note.message)}")
    for line in (*cut_lines(job), cache_line(job)):
        if line:
            console.print(line)


def _picture(field: str, name: str | None) -> str | None:
    """As the API takes it. The server decides what it reads."""
    if name is None or _REFERENCE.fullmatch(name):
        return name
    try:
        return base64.b64encode(Path(name).read_bytes()).decode()
    except OSError as error:
        raise OperatorError(f"--{field} {name}: {error.strerror}", field) from None


def _paths(out: Path, job: Job) -> list[Path]:
    if not _is_file(out):
        ends = [{"image/jpeg": "jpg", "image/webp": "webp"}.get(each.content_type, "png") for each in job.images]
        return [out / f"tandem-{job.id[:8]}-{index}.{end}" for index, end in enumerate(ends)]
    if len(job.images) == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{index}") for index in range(len(job.images))]


def _is_file(out: Path) -> bool:
    return out.suffix.lower() in _SUFFIXES


def _format(out: Path, asked: str | None) -> str | None:
    """None for a PNG that nobody asked for: the server's default."""
    written = _SUFFIXES.get(out.suffix.lower())
    if asked is None:
        return None if written == "png" else written
    if written not in (None, asked):
        raise OperatorError(f"--out {out}: with --format {asked} the pictures are no such files", "out")
    return asked


def _make_folder(folder: Path) -> None:
    """Before the order, so that no picture is made that can't be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"--out {folder}: {error.strerror}", "out") from None


def _save(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OperatorError(f"--out {path}: {error.strerror}", "out") from None


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 48 else f"{line[:47]}…"
