"""Noise as a function of what it is for, drawn on the CPU: the same on every card.

Two draws: one for the whole latent video, in the order diffusers uses (a job of one chunk starts
from the same noise), and one per absolute latent frame, so that overlapping windows and successive
chunks agree on the noise of a frame however the video is cut.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..models.spec import LatentShape


def initial_noise(seed: int, shape: LatentShape) -> Tensor:
    """Noise that a job of one chunk starts from.

    Args:
        seed: the job's seed; the CPU generator uses its low 32 bits.
        shape: size of the latent video.
    Returns:
        (1, C, F, h, w) float32. A longer video does not contain the noise of a shorter one.
    Source: diffusers 0.42.1, `WanPipeline.prepare_latents` with a CPU generator.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape.dims, generator=generator, dtype=torch.float32)


def frame_noise(seed: int, purpose: str, step: int, first_frame: int, shape: LatentShape) -> Tensor:
    """Noise of some latent frames, the same whichever range they are drawn in.

    Args:
        seed: the job's seed.
        purpose: what the noise is for, e.g. "initial" or "renoise".
        step: denoising step it is for.
        first_frame: absolute latent frame, within the whole video, of the first frame drawn.
        shape: size of the range; `shape.frames` frames are drawn.
    Returns:
        (1, C, F, h, w) float32.
    """
    noise = torch.empty(shape.dims, dtype=torch.float32)
    size = (1, shape.channels, shape.height, shape.width)
    for i in range(shape.frames):
        generator = torch.Generator("cpu")
        generator.manual_seed(frame_seed(seed, purpose, step, first_frame + i))
        noise[:, :, i] = torch.randn(size, generator=generator, dtype=torch.float32)
    return noise


def frame_seed(seed: int, purpose: str, step: int, frame: int) -> int:
    """Seed of one latent frame's generator: 32 bits, all that the CPU generator uses."""
    text = f"{seed}/{purpose}/{step}/{frame}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")
