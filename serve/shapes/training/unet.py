"""The diffusion model: UNet2DConditionModel on 4x16x16 latents, predicting v (Salimans & Ho 2022).

Muon for the matrices, AdamW for the rest. The rate rises, stays, then falls linearly to nothing over the last
``decay_share``. During the last ``text_tuned_share`` the text encoder learns too, at a fifth of the rate, and rows that
mix colours come more often. Before that, nothing depends on the total number of steps: a run may be lengthened from a
checkpoint.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from serve.shapes.captions import Phrase, caption
from serve.shapes.draw import IMAGE_SIZE
from serve.shapes.training import latents, parallel
from serve.shapes.training.config import Recipe
from serve.shapes.training.export import export_pipeline
from serve.shapes.training.muon import Muon, wants_muon
from serve.shapes.training.text import PhraseEmbedder
from serve.shapes.training.tokenizer import load_tokenizer
from serve.shapes.training.vae import LATENT_CHANNELS

STAGE = 5
WARMUP_STEPS = 200
CHECKPOINT_EVERY = 500
SNAPSHOT_EVERY = 2000
LONG_PROMPT_SHARE = 0.06
"""Share of batches whose prompts span two rows of 77, as prompts too long for one row do in the server."""


def make_unet(recipe: Recipe) -> UNet2DConditionModel:
    """A fresh U-Net: three levels, cross-attention on the lower two, four heads."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(recipe.vae_channels) - 1),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=recipe.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """The noise schedule, and the sampler that ships with it (DPM++ 2M, Lu et al. 2022)."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        algorithm_type="dpmsolver++",
        solver_order=2,
    )


class TimestepSampler:
    """Draws timesteps so that the log of the signal-to-noise ratio is normal (Karras et al. 2022; Esser et al. 2024).

    A small uniform part keeps every step trained. Draws within a batch are stratified.
    """

    def __init__(self, alphas_cumprod: Tensor, mean: float, std: float) -> None:
        log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
        density = torch.exp(-0.5 * ((log_snr - mean) / std) ** 2) * torch.gradient(-log_snr)[0].clamp(min=0)
        self._cumulative = (0.92 * density / density.sum() + 0.08 / len(density)).cumsum(0)

    def __call__(self, count: int) -> Tensor:
        """``count`` timesteps in random order."""
        strata = (torch.arange(count) + torch.rand(count)) / count
        steps = torch.searchsorted(self._cumulative, strata).clamp(max=len(self._cumulative) - 1)
        return steps[torch.randperm(count)]


class UNetTrainer:
    """Owns: the U-Net, the text encoder, both optimizers and the running average of the weights."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        torch.manual_seed(recipe.seed + STAGE)
        self.recipe = recipe
        self.run = run
        self.unet = make_unet(recipe)
        self.text: CLIPTextModel = CLIPTextModel.from_pretrained(run / "text_encoder").train()
        self.embed = PhraseEmbedder(load_tokenizer(run / "tokenizer"), self.text)
        self.unet_params = list(self.unet.parameters())
        self.text_params = list(self.text.parameters())
        matrices = [p for name, p in self.unet.named_parameters() if wants_muon(name, p)]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices)
        others = [p for p in self.unet_params if id(p) not in chosen]
        self.adam = _adam(others, recipe.unet_lr)
        self.text_adam = _adam(self.text_params, recipe.unet_lr * recipe.text_lr_factor)
        self.average = [p.detach().clone() for p in self._all_params()]
        self.alphas = make_scheduler().alphas_cumprod.clone()
        self.timesteps = TimestepSampler(self.alphas, recipe.log_snr_mean, recipe.log_snr_std)
        self.latents = latents.load_latents(run / "latents")
        self.rows = [latents.row(recipe.seed, i) for i in range(len(self.latents))]
        self.mixed_rows = np.array([i for i, (_, phrase) in enumerate(self.rows) if phrase is not None])
        self.step = 0

    def train(self) -> None:
        """Run to the last step, from the checkpoint if there is one."""
        self._resume()
        running = 0.0
        while self.step < self.recipe.unet_steps:
            loss = self._train_step()
            running = loss if running == 0 else 0.98 * running + 0.02 * loss
            if self.step % 100 == 0:
                parallel.say(f"unet {self.step}/{self.recipe.unet_steps} loss {running:.4f} rate {self._rate():.3f}")
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.recipe.unet_steps:
                self._checkpoint()
            if self.step % SNAPSHOT_EVERY == 0:
                self.export(self.run / "snapshots" / f"{self.step:06d}")

    def export(self, out: Path) -> None:
        """Write the averaged weights as a diffusers folder."""
        if parallel.rank() == 0:
            live = [p.detach().clone() for p in self._all_params()]
            _copy(self.average, self._all_params())
            export_pipeline(self.run, self.text, self.unet, make_scheduler(), out)
            _copy(live, self._all_params())
        parallel.barrier()

    def _train_step(self) -> float:
        rng = np.random.default_rng([self.recipe.seed, STAGE, self.step, parallel.rank()])
        torch.manual_seed(int(rng.integers(2**62)))
        tuned = self._progress() >= 1 - self.recipe.text_tuned_share
        index = rng.integers(0, len(self.rows), self.recipe.unet_batch)
        if tuned:
            extra = int(self.recipe.late_mixed_share * self.recipe.unet_batch)
            index[:extra] = rng.choice(self.mixed_rows, extra)
        with torch.set_grad_enabled(tuned):
            context = self._context([int(i) for i in index], random.Random(int(rng.integers(2**62))))
        loss = self._loss(self.latents[index].float(), context)
        loss.backward()
        self._update([*self.unet_params, *self.text_params] if tuned else self.unet_params, tuned)
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self._all_params()], 1 - decay)
        return loss.item()

    def _loss(self, clean: Tensor, context: Tensor) -> Tensor:
        """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) clean, at random timesteps."""
        steps = self.timesteps(len(clean))
        signal, spread = (share[steps].sqrt().view(-1, 1, 1, 1) for share in (self.alphas, 1 - self.alphas))
        noise = torch.randn_like(clean)
        predicted = self.unet(signal * clean + spread * noise, steps, context).sample
        return nn.functional.mse_loss(predicted, signal * noise - spread * clean)

    def _update(self, params: list[nn.Parameter], tuned: bool) -> None:
        parallel.average_gradients(params)
        nn.utils.clip_grad_norm_(params, 1.0)
        rate = self._rate()
        _set_rate(self.adam, self.recipe.unet_lr * rate)
        self.adam.step()
        self.muon.step(self.recipe.unet_muon_lr * rate)
        if tuned:
            _set_rate(self.text_adam, self.recipe.unet_lr * self.recipe.text_lr_factor * rate)
            self.text_adam.step()
        for param in params:
            param.grad = None

    def _context(self, index: list[int], words: random.Random) -> Tensor:
        """(n, 77, width), or (n, 154, width) in the batches that practise long prompts."""
        phrases = [self._phrase(i, words) for i in index]
        if words.random() >= LONG_PROMPT_SHARE:
            return self.embed(phrases)
        halves = [_split(phrase, words) for phrase in phrases]
        return torch.cat([self.embed([first for first, _ in halves]), self.embed([rest for _, rest in halves])], 1)

    def _phrase(self, index: int, words: random.Random) -> Phrase:
        if words.random() < self.recipe.prompt_dropout:
            return Phrase("")
        scene, phrase = self.rows[index]
        return phrase or Phrase(caption(scene, words))

    def _progress(self) -> float:
        return self.step / self.recipe.unet_steps

    def _rate(self) -> float:
        """Factor on every learning rate: warm up, stay, decay."""
        left = (1 - self._progress()) / self.recipe.decay_share
        return max(0.01, min(1.0, (self.step + 1) / WARMUP_STEPS, left))

    def _all_params(self) -> list[nn.Parameter]:
        return [*self.unet_params, *self.text_params]

    def _checkpoint(self) -> None:
        if parallel.rank() == 0:
            state = {
                "step": self.step,
                "params": [p.detach() for p in self._all_params()],
                "average": self.average,
                "muon": self.muon.state(),
                "adam": self.adam.state_dict(),
                "text_adam": self.text_adam.state_dict(),
            }
            torch.save(state, self.run / "unet_state.tmp")
            (self.run / "unet_state.tmp").replace(self.run / "unet_state.pt")
        parallel.barrier()

    def _resume(self) -> None:
        path = self.run / "unet_state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = int(state["step"])
        _copy(state["params"], self._all_params())
        _copy(state["average"], self.average)
        self.muon.load_state(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.text_adam.load_state_dict(state["text_adam"])
        parallel.say(f"unet: resumed at step {self.step}")


def train_unet(recipe: Recipe, run: Path, out: Path) -> None:
    """Train on the latents, tokenizer and text encoder in ``run``; export to ``out``. Runs in every worker."""
    trainer = UNetTrainer(recipe, run)
    trainer.train()
    trainer.export(out)


def _split(phrase: Phrase, words: random.Random) -> tuple[Phrase, Phrase]:
    """A plain phrase cut at a random word, mostly; mixed ones stay whole before an empty second row."""
    tokens = phrase.text.split()
    if phrase.mix or phrase.word or not tokens or words.random() < 0.3:
        return phrase, Phrase("")
    cut = words.randint(1, len(tokens))
    return Phrase(" ".join(tokens[:cut])), Phrase(" ".join(tokens[cut:]))


def _adam(params: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)


def _set_rate(adam: torch.optim.AdamW, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate


def _copy(sources: list[Tensor], targets: list[nn.Parameter] | list[Tensor]) -> None:
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(sources, targets, strict=True)
    for source, target in pairs:
        target.data.copy_(source)
