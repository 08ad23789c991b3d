"""Trains the demo model's transformer and text encoder on encoded clips (flow matching).

Timesteps are drawn per latent frame, in a mix: all frames alike (a video from its prompt), the
first few clean or nearly so (a video continued from boundary latents), every frame on its own. So
windows start anywhere in a clip: latent frame 0 codes one frame, later ones four each.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..spec import TransformerSpec
from . import clips
from .latent_set import LatentSet
from .network import Weights, build_text_encoder, encode_captions, rope_parts, velocity
from .optimiser import Training, load, mean_of_last, rate_at, save

log = logging.getLogger(__name__)

TEXT = "text."  # prefix of the text encoder's parameters
PLAIN_SHARE, CONTINUED_SHARE = 0.55, 0.3  # the rest: every frame on its own
NOISY_START_SHARE, NOISY_START = 0.4, 0.2  # boundary latents that are not quite clean
SIGMA_WIDTH = 1.25  # of the normal distribution behind a noise level
SIGMA_SHIFT = 2.5
NO_CAPTION_SHARE, UNKNOWN_WORD_SHARE, REWORDED_SHARE = 0.1, 0.05, 0.6
TEXT_ROWS = (64, 226, 226, 512, 512, 512)  # padded lengths met in use, mostly Wan's 512


@dataclass(frozen=True)
class TransformerSettings:
    """How to train.

    batch: clips of 5 latent frames a process and step; steps over whole clips take fewer.
    long_share: share of steps over whole clips. autocast: multiply matrices in bfloat16.
    """

    num_steps: int
    batch: int = 40
    frames: int = 5
    long_share: float = 0.12
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    warm_up: int = 40
    decay_from: float = 0.35
    autocast: bool = True
    compile: bool = False
    log_every: int = 50
    save_every: int = 200


class Batch(NamedTuple):
    """One step's samples: clean latents, noise, and where and how much of it.

    latents, noise: (B, C, F, h, w). sigmas: (B, F). weights: (B, F), 0 where frames are given.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    weights: Tensor
    captions: list[str]
    num_rows: Tensor


class DemoNetwork:
    """Transformer, tokenizer and text encoder as one set of parameters to train.

    Owned by one trainer; not thread-safe.
    """

    def __init__(
        self, spec: TransformerSpec, weights: Weights, text: Weights | None, tokenizer: Tokenizer
    ) -> None:
        """Take over weights (canonical names; the text encoder's under transformers names)."""
        self.spec, self.tokenizer = spec, tokenizer
        self.weights = {name: nn.Parameter(w.float().clone()) for name, w in weights.items()}
        self.text_encoder = build_text_encoder(text, tokenizer.get_vocab_size())

    def parameters(self) -> dict[str, Tensor]:
        """All parameters, the text encoder's behind `text.`."""
        text = {TEXT + name: p for name, p in self.text_encoder.named_parameters()}
        return {**self.weights, **text}

    def loss(self, batch: Batch, predict: Callable[..., Tensor], autocast: bool) -> Tensor:
        """Squared error of the velocity, averaged over the frames that count."""
        sigma = batch.sigmas[:, None, :, None, None]
        noisy = (1 - sigma) * batch.latents + sigma * batch.noise
        frames, height, width = noisy.shape[2:]
        rope = rope_parts(self.spec, (frames, height // 2, width // 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            text = encode_captions(
                self.tokenizer, self.text_encoder, batch.captions, batch.num_rows
            )
            predicted = predict(self.spec, dict(self.weights), noisy, batch.sigmas, text, rope)
        error = (predicted.float() - (batch.noise - batch.latents)).square().mean((1, 3, 4))
        return (error * batch.weights).sum() / batch.weights.sum()


def train_transformer(
    network: DemoNetwork,
    data: LatentSet,
    settings: TransformerSettings,
    checkpoint: Path,
    rank: int = 0,
    world_size: int = 1,
) -> Training:
    """Train in place, going on from the checkpoint if there is one.

    Args:
        network: what to train.
        data: encoded clips.
        settings: how.
        checkpoint: the file written every `save_every` steps and at the end.
        rank: of this process among those that `optimiser.join` brought together.
        world_size: how many they are.
    Returns:
        The finished training; its averaged weights are the ones to ship.
    """
    training = Training(network.parameters(), _is_matrix, settings.muon_lr, settings.adam_lr)
    if checkpoint.exists():
        training.load_state_dict(load(checkpoint))
    short: Callable[..., Tensor] = velocity
    if settings.compile:
        short = torch.compile(velocity, dynamic=False)
    losses: list[float] = []
    started = time.monotonic()
    while training.num_steps < settings.num_steps:
        step = training.num_steps
        # everything random follows from the step and the rank: a resumed run goes on with the same
        is_long = random.Random(f"length:{step}").random() < settings.long_share
        batch = draw_batch(data, settings, is_long, step * world_size + rank)
        loss = network.loss(batch, velocity if is_long else short, settings.autocast)
        rate = rate_at(step, settings.num_steps, settings.warm_up, settings.decay_from)
        training.step(loss, rate)
        if not is_long:
            losses.append(float(loss.detach()))
        done = training.num_steps
        if rank == 0 and (done % settings.save_every == 0 or done == settings.num_steps):
            save(training.state_dict(), checkpoint)
        if rank == 0 and done % settings.log_every == 0:
            log.info(
                "transformer step %d loss %.4f wall %.0f s cpu %.0f s",
                done,
                mean_of_last(losses),
                time.monotonic() - started,
                time.process_time(),
            )
    if dist.is_initialized():
        dist.barrier()
    return training


def _is_matrix(name: str, param: Tensor) -> bool:
    """The matrices inside of blocks, of the transformer and of the text encoder."""
    is_inside = "blocks." in name or "encoder.block" in name
    return is_inside and param.ndim == 2 and min(param.shape) >= 64


def draw_batch(data: LatentSet, settings: TransformerSettings, is_long: bool, seed: int) -> Batch:
    """Draw the samples of one step.

    Args:
        data: encoded clips.
        settings: sizes.
        is_long: whole clips instead of windows of `settings.frames`.
        seed: decides everything.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    whole = data.latents.shape[2]
    frames = whole if is_long else settings.frames
    size = max(1, settings.batch * settings.frames // whole) if is_long else settings.batch
    sigmas, weights = torch.zeros(size, frames), torch.ones(size, frames)
    latents, captions = [], []
    for row in range(size):
        index = rng.randrange(len(data.params))
        num_given = _draw_sigmas(rng, sigmas[row])
        weights[row, :num_given] = 0.0
        is_plain = num_given == 0 and bool((sigmas[row] == sigmas[row, 0]).all())
        start = 0 if is_plain else rng.randrange(whole - frames + 1)
        latents.append(data.latents[index, :, start : start + frames])
        captions.append(_draw_caption(rng, data.params[index]))
    clean = torch.stack(latents).float()
    noise = torch.randn(clean.shape, generator=generator)
    num_rows = torch.tensor([rng.choice(TEXT_ROWS) for _ in range(size)])
    return Batch(clean, noise, sigmas, weights, captions, num_rows)


def _draw_sigmas(rng: random.Random, row: Tensor) -> int:
    """Fill in one sample's noise levels; how many frames are given."""

    def level() -> float:
        u = 1 / (1 + math.exp(-rng.gauss(0, SIGMA_WIDTH)))
        return SIGMA_SHIFT * u / (1 + (SIGMA_SHIFT - 1) * u)

    kind = rng.random()
    if kind >= PLAIN_SHARE + CONTINUED_SHARE:
        row[:] = torch.tensor([level() for _ in range(len(row))])
        return 0
    row[:] = level()
    if kind < PLAIN_SHARE:
        return 0
    num_given = rng.choice((1, 1, 2, 2, 3)) if len(row) > 3 else 1
    is_noisy = rng.random() < NOISY_START_SHARE
    row[:num_given] = rng.uniform(0, NOISY_START) if is_noisy else 0.0
    return num_given


def _draw_caption(rng: random.Random, params: clips.ClipParams) -> str:
    """A caption, now and then reworded, without one word, or none at all."""
    if rng.random() < NO_CAPTION_SHARE:
        return ""
    text = clips.caption(params, rng if rng.random() < REWORDED_SHARE else None)
    if rng.random() < UNKNOWN_WORD_SHARE:
        words = text.split()
        words[rng.randrange(len(words))] = "unknown"
        text = " ".join(words)
    return text


def split_average(average: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Averaged weights of a `Training` as (transformer, text encoder)."""
    text = {k.removeprefix(TEXT): v for k, v in average.items() if k.startswith(TEXT)}
    return {k: v for k, v in average.items() if not k.startswith(TEXT)}, text
