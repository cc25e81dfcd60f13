"""Reuse of predictions between steps that hardly differ: an image's own choice, for time against exactness."""

from __future__ import annotations

import torch

WARM_UP = 2
"""Forward passes that are always made, at the start, where the composition is decided, and from a new text on: a line
needs two of them."""
FURTHEST = 1.0
"""How far a prediction is extrapolated, in distances between the last two that were made."""


class StepCache:
    """TeaCache's rule (Liu et al. 2024, https://arxiv.org/abs/2411.19108) on the sampler's side of the denoiser.

    The relative L1 change of the denoiser's input is added up since the last forward pass that was made. While the sum
    stays below `threshold`, no other is made: the last two predictions are extended in a straight line, by the sum over
    the change between those two. The first two and the last forward pass are always made, and two wherever the text
    changes: the rule sees the input alone.

    Owns: the image's last input and its last two predictions.
    """

    def __init__(self, threshold: float, forwards: int) -> None:
        self.reuses = 0
        self._threshold = threshold
        self._left = forwards
        self._made = 0
        self._sum = 0.0
        self._input: torch.Tensor | None = None
        self._prediction: torch.Tensor | None = None
        self._line: tuple[torch.Tensor, torch.Tensor] | None = None
        """From the prediction before the last to the last, and the change of the input between them."""

    def restart(self) -> None:
        """The predictions so far serve no more."""
        self._made = 0
        self._prediction = self._line = None

    def drift(self, model_input: torch.Tensor) -> torch.Tensor | None:
        """The change since the step before, 0-dim on the device; None where this forward pass must be made."""
        if self._made < WARM_UP or self._left <= 1 or self._input is None:
            return None
        return _change(self._input, model_input)

    def reusable(self, drift: float) -> bool:
        """Whether the last predictions still serve; never where the drift is not a number. Changes nothing."""
        return self._sum + drift < self._threshold

    def reuse(self, model_input: torch.Tensor, drift: float) -> torch.Tensor:
        """Count a forward pass that is not made. The prediction that stands for it."""
        assert self._prediction is not None, "the first is made"
        assert self._line is not None, "the second is made"
        self._input = model_input
        self._sum += drift
        self._left -= 1
        self.reuses += 1
        along, change = self._line
        return self._prediction + (self._sum / change).clamp(max=FURTHEST) * along

    def made(self, model_input: torch.Tensor, prediction: torch.Tensor) -> None:
        """Count a forward pass that was made."""
        if self._input is not None and self._prediction is not None:
            self._line = prediction - self._prediction, self._sum + _change(self._input, model_input)
        self._input, self._prediction = model_input, prediction
        self._sum = 0.0
        self._left -= 1
        self._made += 1


def _change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (after - before).abs().mean() / before.abs().mean()
