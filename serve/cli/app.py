"""`tandem`: serve, fetch the models, order a picture, look at a prompt, watch the demo, plan for cards, look after
jobs, keys and the cache, look at the settings and for what is wrong.

Every command ends in one of three ways: 0; 1 when a picture or a prompt failed, or something is at fault; 2 with one
line that says what to change.
torch and Ray are imported by the commands that need them, so that the others answer at once.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve.cli.bench import bench
from serve.cli.bench_cache import cache as bench_cache
from serve.cli.bench_cold_start import cold_start
from serve.cli.bench_compare import compare
from serve.cli.bench_engine import engine
from serve.cli.bench_gpu import gpu
from serve.cli.bench_prompts import prompts as bench_prompts
from serve.cli.bench_service import service
from serve.cli.bench_simulate import simulate as bench_simulate
from serve.cli.bench_soak import soak
from serve.cli.cache import cache
from serve.cli.client import Client, hint, local_url
from serve.cli.doctor import doctor
from serve.cli.jobs import jobs
from serve.cli.keys import keys
from serve.cli.learn import learn
from serve.cli.loadtest import loadtest
from serve.cli.options import (
    Arm,
    AsJson,
    Assignments,
    ConfigFile,
    DataDir,
    Key,
    LongPrompts,
    Port,
    Syntaxes,
    Template,
    Url,
    Variables,
    Weightings,
    client,
    load_settings,
    wording,
)
from serve.cli.plan import plan
from serve.cli.running import run
from serve.cli.simulate import simulate
from serve.domain.orders import Priority
from serve.errors import OperatorError, TandemError
from serve.origins import flatten, shown

app = typer.Typer(
    help="Text-to-image server: text encoders and diffusion models in two pools that scale apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(help="Look at the settings.", no_args_is_help=True)
app.add_typer(config, name="config")
app.add_typer(cache, name="cache")
app.add_typer(jobs, name="jobs")
app.add_typer(keys, name="keys")
bench.command()(engine)
bench.command()(gpu)
bench.command("cache")(bench_cache)
bench.command("prompts")(bench_prompts)
bench.command()(soak)
bench.command("cold-start")(cold_start)
bench.command()(service)
bench.command()(compare)
bench.command("simulate")(bench_simulate)
app.add_typer(bench, name="bench")
app.command()(doctor)
app.command()(learn)
app.command()(loadtest)
app.command()(plan)
app.command()(simulate)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"tandem {version('tandem-serve')}")
        raise typer.Exit


@app.command()
def up(
    port: Port = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    data_dir: DataDir = None,
    model: Annotated[
        str | None, typer.Option(help="`shapes`, a diffusers folder, a .safetensors checkpoint, or a hub id.")
    ] = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Start the server on this machine and keep it up until Ctrl-C."""
    named = {"http.port": port, "http.host": host, "data_dir": data_dir, "model.source": model}
    loaded = load_settings(config_file, assignments, named)
    from serve.local import run as serve_here

    serve_here(loaded)


@app.command()
def fetch(
    data_dir: DataDir = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Fetch, convert and check every model of the settings, so that no server waits for one later."""
    loaded = load_settings(config_file, assignments, {"data_dir": data_dir})
    from serve.cli.fetch import fetch as story

    story(loaded.settings)


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What the picture shows. A1111's syntax works: (red:1.3); a --template may need none.",
            show_default=False,
        ),
    ] = None,
    number: Annotated[int, typer.Option("-n", "--number", help="How many pictures.")] = 1,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A folder, or a file: .png, .jpg or .webp.", show_default="here")
    ] = Path(),
    negative: Annotated[str | None, typer.Option(help="What the picture must not show.", show_default=False)] = None,
    template: Template = None,
    arm: Arm = None,
    var: Variables = None,
    syntax: Syntaxes = None,
    weighting: Weightings = None,
    long_prompt: LongPrompts = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the picture; picture i uses seed + i.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Weight of the prompt.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    aspect: Annotated[str | None, typer.Option(help="In place of width and height: 16:9, ..., or Auto.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Sampler, by the name that GET /v1/models lists.")] = None,
    image: Annotated[str | None, typer.Option(help="What to start from: a file, or a picture's JOB/INDEX.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="What to repaint of the image, in white: a file, or JOB/mask.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the steps that the image goes through.")] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg or webp; by default what --out is.", show_default=False)
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of a jpeg or webp, 0 to 100.")] = None,
    bit_depth: Annotated[int | None, typer.Option(help="Bits a channel of a png: 8 or 16.")] = None,
    true_cfg: Annotated[float | None, typer.Option(help="Classifier-free guidance of FLUX; by default none.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of a served model.")] = None,
    priority: Annotated[
        Priority | None, typer.Option(help="Among your own jobs; by default interactive.", show_default=False)
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job and the files as JSON.")] = False,
) -> None:
    """Order pictures from a running server and save them."""
    if prompt is None and template is None:
        raise OperatorError("generate: name a prompt, or a --template", "prompt")
    order = wording(negative, template, arm, var, syntax, weighting, long_prompt) | {
        "prompt": prompt,
        "num_images": number,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": width,
        "height": height,
        "aspect_ratio": aspect,
        "scheduler": scheduler,
        "image": image,
        "mask": mask,
        "strength": strength,
        "true_cfg_scale": true_cfg,
        "output_format": file_format,
        "output_compression": quality,
        "bit_depth": bit_depth,
        "model": model,
        "priority": priority and priority.value,
    }
    from serve.cli.generate import generate as story

    raise typer.Exit(run(story(client(url, key), order, out, as_json=as_json)))


@app.command()
def prompt(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="A prompt to look at, or several to compare.", show_default=False),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What the picture must not show.", show_default=False)] = None,
    template: Template = None,
    arm: Arm = None,
    var: Variables = None,
    syntax: Syntaxes = None,
    weighting: Weightings = None,
    long_prompt: LongPrompts = None,
    seed: Annotated[int | None, typer.Option(help="Makes the random choices; by default 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Weight of the prompt.")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="Layers of CLIP to leave out at its end.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of a served model.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What a prompt comes to: its tokens for each encoder, what is cut, the text of every step, what is cached, advice.
    Several prompts are compared."""
    if not prompts and template is None:
        raise OperatorError("prompt: name a prompt, or a --template", "prompt")
    order = wording(negative, template, arm, var, syntax, weighting, long_prompt) | {
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "clip_skip": clip_skip,
        "model": model,
    }
    from serve.cli.prompt import prompt as story

    raise typer.Exit(run(story(client(url, key), prompts or [], order, as_json=as_json)))


@app.command()
def trace(
    job: Annotated[list[str] | None, typer.Argument(metavar="JOB", help="Ids of jobs.", show_default=False)] = None,
    last: Annotated[
        int | None, typer.Option(min=1, max=10_000, metavar="N", help="The newest N that succeeded.")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Where a job's time went, stage by stage; of several jobs, the mean of each stage."""
    from serve.cli.trace import trace as story

    raise typer.Exit(run(story(client(url, key), job or [], last, as_json=as_json)))


@app.command()
def demo(
    data_dir: DataDir = None,
    port: Port = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the contact sheet.")] = Path("demo"),
    keep: Annotated[
        bool | None,
        typer.Option(
            "--keep/--no-keep", help="Keep a server that this started up until Ctrl-C.", show_default="on a terminal"
        ),
    ] = None,
    key: Key = None,
) -> None:
    """Start a server if none is up, make six pictures, show where their text came from."""
    loaded = load_settings(None, None, {"data_dir": data_dir, "http.port": port})
    from serve.cli.demo import demo as story

    server = Client(local_url(loaded.settings.http), key)
    raise typer.Exit(run(story(server, loaded.settings, out, keep=sys.stdin.isatty() if keep is None else keep)))


@config.command("show")
def config_show(
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Every setting, its value, and where the value came from; secrets are hidden."""
    loaded = load_settings(config_file, assignments, {})
    rows = [(name, shown(value), loaded.origins[name]) for name, value in flatten(loaded.settings)]
    if as_json:
        print(json.dumps({name: {"value": value, "origin": origin} for name, value, origin in rows}, indent=2))
        return
    table = Table("setting", "value", "origin", box=None, header_style="bold")
    for name, value, origin in rows:
        table.add_row(*map(Text, (name, value, origin)), style="dim" if origin == "default" else None)
    Console().print(table)


def main() -> None:
    """The entry point. What the operator can mend is one line and exit code 2, never a trace."""
    try:
        app(prog_name="tandem")
    except TandemError as error:
        wait = f"; try again in {error.retry_after_s:g} s" if error.retry_after_s else ""
        print(f"tandem: {' '.join(error.message.split())}{hint(error)}{wait}", file=sys.stderr)
        sys.exit(2)
