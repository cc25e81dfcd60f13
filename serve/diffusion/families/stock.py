"""What is taken of diffusers to load parts with, imported without bitsandbytes.

diffusers would import that, and with it torch's compiler, for weights that come quantized: a second of each cold start
(docs/scaling.md). Ours are quantized after they are loaded, where the rung says so (`serve.quantize`).
"""

from __future__ import annotations

from serve.quantize import unseen

with unseen("bitsandbytes"):
    from diffusers import schedulers as diffusers_schedulers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

__all__ = ["DiffusionPipeline", "diffusers_schedulers"]
