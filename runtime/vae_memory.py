"""How much memory decoding and encoding take besides the weights, found without weights.

The real code runs at the real size on the meta device, which computes shapes only, and a meter
counts what it makes: figures of this code, not of a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..models.spec import VaeSpec
from ..models.vae_layers import Caches
from ..models.vae_tiles import cut_frame
from ..models.wan_vae import WanVae, stays_float32
from .meter import Made, meter

META = torch.device("meta")
NUM_STEPS = 4  # the caches have their full size after the second latent frame


@dataclass(frozen=True)
class VaeMemory:
    """What a stream takes besides weights, however long it is.

    card_bytes: at its most on the card, the caches of one tile (or of the frame) counted.
    host_bytes: caches of all tiles that wait on the host; 0 for whole frames.
    num_tiles: how many tiles a frame has.
    pieces: what lived on the card at the peak, the largest first.
    """

    card_bytes: int
    host_bytes: int
    num_tiles: int
    pieces: tuple[Made, ...]


def measure_vae(
    spec: VaeSpec,
    height: int,
    width: int,
    tile: int,
    dtype: torch.dtype,
    *,
    encodes: bool = False,
) -> VaeMemory:
    """Count the bytes of one tile's stream; tiles are alike and take turns, so it stands for all.

    Args:
        spec: the VAE's shape.
        height: of the video, in latents.
        width: likewise.
        tile: the most pixels that a tile may be wide or high; 0 for whole frames.
        dtype: compute type.
        encodes: measure the encoder instead of the decoder.

    Raises:
        ConfigError: if the tile is less than 4 latents.
    """
    tiling = cut_frame(spec, height, width, tile)
    with META:
        vae = WanVae(spec).requires_grad_(False)
    for name, parameter in vae.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if stays_float32(name) else dtype)
    size = (tiling.rows.length, tiling.columns.length)
    caches: Caches = {}
    with torch.inference_mode(), meter(META) as live, PlainUpsampling():
        for step in range(NUM_STEPS):
            _run(vae, size, caches, step if encodes else -1)
        host = sum(cache.nbytes for cache in caches.values()) * tiling.num_tiles
        return VaeMemory(
            live.peak_bytes,
            host if tiling.num_tiles > 1 else 0,
            tiling.num_tiles,
            tuple(getattr(live, "at_peak", ())),
        )


def _run(vae: WanVae, size: tuple[int, int], caches: Caches, step: int) -> None:
    """One step of a stream: the first, a later one of the encoder, or (-1) one of the decoder."""
    spec, scale = vae.spec, vae.spec.spatial_factor
    if step < 0:
        latents = torch.empty(1, spec.z_dim, 1, *size, device=META)
        vae.decode_frame(latents, caches).clamp_(-1.0, 1.0)
        return
    num_frames = spec.temporal_factor if step else 1
    frames = torch.empty(1, 3, num_frames, size[0] * scale, size[1] * scale, device=META)
    vae.encode_group(frames, caches)


class PlainUpsampling(TorchFunctionMode):
    """On the meta device, nearest upsampling makes what a kernel makes: its output.

    There torch indexes a float32 copy instead: at a tile of 256 pixels, 0.62 GiB for 0.43.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `interpolate`; everything else runs as it is."""
        kwargs = kwargs or {}
        if func is not F.interpolate:
            return func(*args, **kwargs)
        x, factors = args[0], kwargs["scale_factor"]
        sides = [int(side * factor) for side, factor in zip(x.shape[2:], factors, strict=True)]
        return x.new_empty(*x.shape[:2], *sides)
