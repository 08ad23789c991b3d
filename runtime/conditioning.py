"""What an image gives the network: fitted pixels, and the channels or the frame made of them.

Does not know where images come from, nor jobs or devices: everything happens where the VAE is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.wan_vae import WanVae
from .vae_stream import VaeStream


def fit_image(pixels: Tensor, width: int, height: int) -> Tensor:
    """Bring an image to a video's size: cover it, cut what sticks out evenly off both sides.

    An image of that size already stays as it is. Wan's own code squashes instead where it takes the
    image's aspect (the sides differ by less than a patch), and covers where it does not.

    Args:
        pixels: (H, W, 3) uint8.
        width: of the video.
        height: of the video.

    Returns:
        (1, 3, height, width) float32 in [-1, 1], on the CPU, so that it is the same for every card.

    Source: Wan2.2 wan/textimage2video.py (cover and crop); diffusers' VideoProcessor (the range).
    """
    image = unit_image(pixels)
    rows, columns = image.shape[2:]
    if (rows, columns) != (height, width):
        scale = max(height / rows, width / columns)
        size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
        image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        image = image[:, :, top : top + height, left : left + width]
    return 2.0 * image - 1.0


def unit_image(pixels: Tensor) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in [0, 1]."""
    return (pixels.to(torch.float32) / 255.0).permute(2, 0, 1).unsqueeze(0).contiguous()


def first_latent(vae: WanVae, first: Tensor, tile: int = 0) -> Tensor:
    """The latent frame of an image: (1, 3, H, W) in [-1, 1] to (1, z, 1, h, w) float32."""
    return _encoder(vae, first, tile).encode(first.unsqueeze(2))


def image_condition(
    vae: WanVae, first: Tensor, last: Tensor | None, num_frames: int, tile: int = 0
) -> Tensor:
    """The channels beside the noise: which pixel frames are given, and the latents of the video.

    The video is the image and then mid-grey (0), with the last image, if any, as its last frame. It
    is encoded one latent frame at a time and never held as a whole.

    Args:
        vae: the model's.
        first: (1, 3, H, W) in [-1, 1].
        last: likewise, or None.
        num_frames: pixel frames of the video, 4n+1; at least 5 with a last image.
        tile: the most pixels that a tile of the VAE may be wide or high; 0 encodes frames whole.

    Returns:
        (1, 4 + z, n + 1, h, w) float32: 4 channels of mask, one for each pixel frame that a latent
        frame stands for (the first stands for 4 times the first image), 1 where it is given; then
        the normalised latents (mean of the posterior).

    Source: Wan2.1 wan/image2video.py, wan/first_last_frame2video.py; diffusers 0.42.1,
    `WanImageToVideoPipeline.prepare_latents`.
    """
    spec = vae.spec
    num_latents = spec.num_latent_frames(num_frames)
    assert last is None or num_latents > 1, "no frame is left for the last image"
    encoder = _encoder(vae, first, tile)
    pieces = [encoder.encode(first.unsqueeze(2))]
    group = first.new_zeros(1, 3, spec.temporal_factor, *first.shape[2:])
    for index in range(1, num_latents):
        if last is not None and index == num_latents - 1:
            group[:, :, -1] = last
        pieces.append(encoder.encode(group))
    condition = torch.cat(pieces, dim=2)
    mask = condition.new_zeros(1, spec.temporal_factor, *condition.shape[2:])
    mask[:, :, 0] = 1
    if last is not None:
        mask[:, -1, -1] = 1
    return torch.cat([mask, condition], dim=1)


def _encoder(vae: WanVae, image: Tensor, tile: int) -> VaeStream:
    """A stream for a video of the size of an image."""
    rows, columns = (side // vae.spec.spatial_factor for side in image.shape[2:])
    return VaeStream(vae, rows, columns, tile)
