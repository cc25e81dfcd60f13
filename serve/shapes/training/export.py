"""Writing the ordinary diffusers folder, in half precision."""

import copy
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from serve.shapes.training.tokenizer import load_tokenizer


def export_pipeline(
    run: Path, text: CLIPTextModel, unet: UNet2DConditionModel, scheduler: DPMSolverMultistepScheduler, out: Path
) -> None:
    """Save copies of the parts, with the run's autoencoder and tokenizer, as ``out``; never seen half-written."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(run / "vae").half(),
        text_encoder=copy.deepcopy(text).half().eval(),
        tokenizer=load_tokenizer(run / "tokenizer"),
        unet=copy.deepcopy(unet).half().eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    shutil.copytree(run / "tokenizer", part / "tokenizer", dirs_exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
