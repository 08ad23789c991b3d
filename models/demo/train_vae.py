"""Trains the demo model's VAE: our own `WanVae` under autograd, one latent frame at a time.

From nothing, encoder and decoder are trained together and the latents' statistics measured at the
end. With a frozen encoder only the decoder is: latents, and so everything trained on them, stay
valid, and noise on the latents teaches it to forgive what the transformer gets wrong.

Clips are long on purpose: trained on 9 frames only, colours drift after the ninth, because the
temporal receptive field is longer than that.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..spec import VaeSpec
from ..wan_vae import WanVae, patchify, unpatchify
from . import clips
from .clips import ClipParams, Window
from .optimiser import Training, decibels, load, mean_of_last, rate_at, save

log = logging.getLogger(__name__)

# Residual and patchified as in Wan 2.2, 8x8x4 with 16 channels as in Wan 2.1. Widths are multiples
# of 16 (12 was half as fast on CPU), and no convolution runs at full resolution.
SPEC = VaeSpec(
    base_dim=16,
    decoder_base_dim=16,
    z_dim=16,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_down=(True, True),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
)
OBJECT_WEIGHT = 3.0  # of an error on or next to an object, over one elsewhere
KL_WEIGHT = 3e-4
HELD_OUT_SEED = 10**6
STATISTICS_CLIPS = 128


@dataclass(frozen=True)
class VaeSettings:
    """How to train.

    freeze_encoder: train the decoder only. latent_noise: its largest strength, in standard
    deviations. hard_share: share of stars, rings and triangles drawn on top of the even mix.
    """

    num_steps: int
    freeze_encoder: bool = False
    latent_noise: float = 0.1
    hard_share: float = 0.3
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    decay_from: float = 0.4
    log_every: int = 50
    save_every: int = 200


def train_vae(
    vae: WanVae, settings: VaeSettings, checkpoint: Path, rank: int = 0, world_size: int = 1
) -> Training:
    """Train a VAE in place, going on from the checkpoint if there is one.

    Args:
        vae: float32, with parameters of its own.
        settings: how.
        checkpoint: the file written every `save_every` steps and at the end.
        rank: of this process among those that `optimiser.join` brought together.
        world_size: how many they are.
    Returns:
        The finished training; its averaged weights are the ones to ship.
    """
    vae.requires_grad_(not settings.freeze_encoder)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    params = {name: p for name, p in vae.named_parameters() if p.requires_grad}
    training = Training(params, _is_matrix, settings.muon_lr, settings.adam_lr)
    if checkpoint.exists():
        training.load_state_dict(load(checkpoint))
    losses: list[float] = []
    started = time.monotonic()
    while training.num_steps < settings.num_steps:
        step = training.num_steps
        # a rank's clips follow from the step alone, so a resumed run sees what it would have seen
        rng = random.Random(f"vae:{step}:{rank}")
        torch.manual_seed(step * world_size + rank)
        batch = _draw_batch(random.Random(f"vae:{step}"), rng, settings.hard_share)
        loss = reconstruction_loss(vae, *batch, settings)
        training.step(loss, rate_at(step, settings.num_steps, 30, settings.decay_from))
        losses.append(float(loss.detach()))
        done = training.num_steps
        if rank == 0 and (done % settings.save_every == 0 or done == settings.num_steps):
            save(training.state_dict(), checkpoint)
        if rank == 0 and done % settings.log_every == 0:
            log.info(
                "vae step %d loss %.4f wall %.0f s cpu %.0f s",
                done,
                mean_of_last(losses),
                time.monotonic() - started,
                time.process_time(),
            )
    if dist.is_initialized():
        dist.barrier()
    return training


def _is_matrix(name: str, param: Tensor) -> bool:
    """Convolution kernels but for the input's and the tiny ones."""
    is_kernel = param.ndim >= 4 and param.shape[0] >= 16 and param[0].numel() >= 32
    return is_kernel and "conv_in" not in name


def _draw_batch(
    shared: random.Random, rng: random.Random, hard_share: float
) -> tuple[Tensor, Tensor]:
    """(B, 3, T, H, W) clips and (B, 1, T, H, W) whether an object is near.

    Whole frames of 17 and 33, and 32x32 windows of 33; the kind is the same on every rank.
    """
    kind = shared.random()
    size, num_frames = (2, 17) if kind < 0.45 else (1, 33) if kind < 0.6 else (4, 33)
    videos, masks = [], []
    for _ in range(size):
        window = Window(rng.randrange(33), rng.randrange(33), 32, 32) if size == 4 else None
        params = _draw_clip(rng, hard_share)
        first = rng.randrange(48)
        video = clips.render(params, num_frames, first_frame=first, window=window)
        empty = replace(params, objects=())
        behind = clips.render(empty, num_frames, first_frame=first, window=window)
        is_object = ((video - behind).abs().amax(0, keepdim=True) > 0.02).float()
        videos.append(video)
        masks.append(F.max_pool3d(is_object, (1, 5, 5), 1, (0, 2, 2)))
    return torch.stack(videos), torch.stack(masks)


def _draw_clip(rng: random.Random, hard_share: float) -> ClipParams:
    params = clips.sample_clip(rng, num_objects=2 if rng.random() < 0.15 else 1)
    if rng.random() < hard_share:
        while params.objects[0].shape not in ("star", "ring", "triangle"):
            params = clips.sample_clip(rng)
    return params


def reconstruction_loss(vae: WanVae, frames: Tensor, mask: Tensor, settings: VaeSettings) -> Tensor:
    """L1, its spatial and temporal differences, a little MSE, and KL unless the encoder is frozen.

    Args:
        vae: the network.
        frames: (B, 3, T, H, W) in [-1, 1].
        mask: (B, 1, T, H, W), 1 where errors weigh more.
        settings: noise and what is frozen.
    """
    weight = 1 + (OBJECT_WEIGHT - 1) * mask
    weight = weight / weight.mean()
    kl = torch.zeros(())
    if settings.freeze_encoder:
        with torch.no_grad():
            latents, _ = moments(vae, frames)
            noise = torch.rand(len(frames), 1, 1, 1, 1) * torch.randn_like(latents)
            std = torch.tensor(vae.spec.latents_std).view(1, -1, 1, 1, 1)
            latents = latents + settings.latent_noise * std * noise
    else:
        mean, log_variance = moments(vae, frames)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    error = decode_raw(vae, latents) - frames
    across = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    edges = (across.sum() + down.sum()) / (across.numel() + down.numel())
    flicker = ((error[:, :, 1:] - error[:, :, :-1]).abs() * weight[:, :, 1:]).mean()
    plain = (error.abs() * weight).mean() + 0.5 * (error.square() * weight).mean()
    return plain + 0.5 * edges + 0.25 * flicker + KL_WEIGHT * kl


def moments(vae: WanVae, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the posterior, not normalised, (B, z, F, h, w) each."""
    caches: dict[str, Tensor] = {}
    starts = [0, *range(1, frames.shape[2], vae.spec.temporal_factor)]
    pieces = []
    for start, stop in zip(starts, [*starts[1:], frames.shape[2]], strict=True):
        x = patchify(frames[:, :, start:stop], vae.spec.patch_size)
        pieces.append(vae.quant_conv(vae.encoder(x, caches)))
    mean, log_variance = torch.cat(pieces, 2).chunk(2, 1)
    return mean, log_variance


def decode_raw(vae: WanVae, latents: Tensor) -> Tensor:
    """Decode latents that are not normalised, without the clamp that would stop gradients."""
    caches: dict[str, Tensor] = {}
    pieces = []
    for index in range(latents.shape[2]):
        x = vae.post_quant_conv(latents[:, :, index : index + 1])
        pieces.append(unpatchify(vae.decoder(x, caches, index == 0), vae.spec.patch_size))
    return torch.cat(pieces, 2)


@torch.no_grad()
def measure_statistics(vae: WanVae) -> VaeSpec:
    """The spec with mean and standard deviation of each latent channel over random clips."""
    rng = random.Random("vae statistics")
    total = []
    for _ in range(STATISTICS_CLIPS // 8):
        batch = torch.stack([clips.render(clips.sample_clip(rng), 17) for _ in range(8)])
        total.append(moments(vae, batch)[0].transpose(0, 1).flatten(1))
    values = torch.cat(total, 1)
    mean, std = ([round(float(v), 5) for v in row] for row in (values.mean(1), values.std(1)))
    return replace(vae.spec, latents_mean=tuple(mean), latents_std=tuple(std))


@torch.no_grad()
def reconstruct(
    vae: WanVae, num_clips: int, num_frames: int = 17
) -> tuple[list[ClipParams], Tensor, Tensor]:
    """Held-out clips, as drawn and as the VAE gives them back, (N, 3, T, H, W) each."""
    params = [
        clips.sample_clip(random.Random(HELD_OUT_SEED + i), held_out=True) for i in range(num_clips)
    ]
    videos = torch.stack([clips.render(clip, num_frames) for clip in params])
    decoded = [vae.decode(vae.encode(batch)[0])[0] for batch in videos.split(8)]
    return params, videos, torch.cat(decoded)


def mean_psnr(videos: Tensor, decoded: Tensor) -> float:
    """Mean over clips of each clip's PSNR in dB."""
    return float(decibels((videos - decoded).square().mean((1, 2, 3, 4))).mean())
