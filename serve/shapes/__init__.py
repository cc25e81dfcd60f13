"""The shipped model: a small latent diffusion model of coloured shapes, trained here from scratch.

``draw`` draws its world, ``captions`` describes it, ``train`` reproduces the weights from a seed, ``judge`` reads a
picture from pixels alone, ``evaluate`` measures the model through the stock ``StableDiffusionPipeline``.
"""

from pathlib import Path

WEIGHTS: Path = Path(__file__).parent / "weights"
"""The shipped model's folder, in the ordinary diffusers layout."""
