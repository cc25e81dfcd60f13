"""What an answer in A1111's dialect says of its pictures: the JSON that stands in it as a string, under `info`.

https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/processing.py, `Processed.js`
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from serve import __version__
from serve.domain.jobs import Job
from serve.results.infotext import as_text, prompts, settings
from serve.results.png import parameters

More = Callable[[Job], Mapping[str, Any]]
"""What a job does not say of its pictures, as `infotext.settings` has it: the first pass of a hires fix, its prompt."""

_TOLD_APART = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Denoising strength", "Clip skip")
"""Settings that have fields of their own, so that they are not among the further ones."""


def info_json(
    jobs: Sequence[Job],
    *,
    batch_size: int,
    styles: Sequence[str] = (),
    subseed: int = -1,
    more: More = lambda _: {},
) -> str:
    """Of the pictures of `jobs`, at least one job, in this order. A job that was ended before it drew stands in what
    was wanted (`all_seeds`), not in what there is (`infotexts`).

    `subseed` is the order's, -1 where it names none.
    """
    pictures = [(job, index) for job in jobs for index in range(job.request.num_images)]
    wanted = [parameters(job.request, index) for job, index in pictures]
    texts = [prompts(known, more(job)) for known, (job, _) in zip(wanted, pictures, strict=True)]
    told = settings(wanted[0], more(jobs[0]))
    width, _, height = str(told["Size"]).partition("x")
    seeds = [known["seed"] for known in wanted]
    subseeds = [known.get("variation_seed", subseed if subseed < 0 else subseed + n) for n, known in enumerate(wanted)]
    return json.dumps(
        {
            "prompt": texts[0][0],
            "all_prompts": [prompt for prompt, _ in texts],
            "negative_prompt": texts[0][1],
            "all_negative_prompts": [negative for _, negative in texts],
            "seed": seeds[0],
            "all_seeds": seeds,
            "subseed": subseeds[0],
            "all_subseeds": subseeds,
            "subseed_strength": jobs[0].request.variation_strength,
            "width": int(width),
            "height": int(height),
            "sampler_name": told.get("Sampler", ""),
            "cfg_scale": told["CFG scale"],
            "steps": told["Steps"],
            "batch_size": batch_size,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": told["Model"],
            "sd_model_hash": None,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": told.get("Denoising strength"),
            "extra_generation_params": {label: value for label, value in told.items() if label not in _TOLD_APART},
            "index_of_first_image": 0,
            "infotexts": list(infotexts(jobs, more)),
            "styles": list(styles),
            "job_timestamp": _stamp(jobs[0].created_at),
            "clip_skip": told.get("Clip skip", 1),
            "is_using_inpainting_conditioning": False,
            "version": f"tandem {__version__}",
        }
    )


def infotexts(jobs: Sequence[Job], more: More) -> Iterator[str]:
    """Of each picture that there is, what it says of itself, with `more`."""
    for job in jobs:
        for image in job.images:
            yield as_text(parameters(job.request, image.index, job.approximate), more(job))


def _stamp(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y%m%d%H%M%S")
