"""The training set: clips drawn, encoded by the VAE and kept with what describes them."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..wan_vae import WanVae
from . import clips
from .clips import ClipParams, ObjectParams
from .optimiser import load, save

log = logging.getLogger(__name__)

NUM_FRAMES = 33  # 9 latent frames: longer than a clip, for windows that continue a video
TWO_OBJECT_SHARE = 0.07  # more did not make two objects work and cost the clips with one
BATCH = 8


@dataclass(frozen=True)
class LatentSet:
    """Encoded clips.

    latents: (N, C, 9, h, w) float16, normalised. params: what each clip shows.
    """

    latents: Tensor
    params: list[ClipParams]


@torch.no_grad()
def encode_clips(vae: WanVae, num_clips: int, seed: int) -> LatentSet:
    """Draw and encode clips of the trained combinations; a multiple of 8 of them."""
    rng = random.Random(f"latent set {seed}")
    latents: list[Tensor] = []
    params: list[ClipParams] = []
    for start in range(0, num_clips, BATCH):
        batch = [
            clips.sample_clip(rng, num_objects=2 if rng.random() < TWO_OBJECT_SHARE else 1)
            for _ in range(BATCH)
        ]
        frames = torch.stack([clips.render(clip, NUM_FRAMES) for clip in batch])
        latents.append(vae.encode(frames)[0].half())
        params += batch
        if start % 800 == 0:
            log.info("encoded %d of %d clips", start, num_clips)
    return LatentSet(torch.cat(latents), params)


def save_set(data: LatentSet, path: Path) -> None:
    """Write a set, its params as plain tuples."""
    save({"latents": data.latents, "params": [astuple(clip) for clip in data.params]}, path)


def load_sets(paths: Sequence[Path]) -> LatentSet:
    """Read one or several sets as one."""
    parts = [load(path) for path in paths]
    params = [
        ClipParams(tuple(ObjectParams(*item) for item in objects), *rest)
        for part in parts
        for objects, *rest in part["params"]
    ]
    return LatentSet(torch.cat([part["latents"] for part in parts]), params)
