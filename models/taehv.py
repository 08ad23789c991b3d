"""Tiny decoders for previews (`taew2_1`, `taew2_2`): 10 M parameters instead of 73 M.

The state of a stream is a value: the last frame that each memory block saw, the same bytes however
long the video. Every call goes one latent frame at a time, so the bits do not depend on how a video
is split into calls. Only decoders of the standard width of stages are known, not the "super" ones.

Source: madebyollin/taehv, taehv.py (layout, order of operations). The structure gives the published
9.84 M (Wan 2.1) and 9.92 M (Wan 2.2) parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reelpool.errors import ConfigError, StateError, WeightError

from .plain_weights import load_plain
from .vae_state import VaeState
from .weights import WeightSource, check_tensors

STAGES = ((3, 1), (9, 2), (15, 2))  # index of a stage's first layer, frames it makes of one
FIRST, LAST = "decoder.1", "decoder.22"
NUM_MEMORY_BLOCKS = 3  # of a stage; behind them come upsampling, growth in time, a convolution
NUM_TRIMMED = 3  # frames of the first latent frame that are thrown away


@dataclass(frozen=True)
class TinySpec:
    """Shape of a tiny decoder: channels of the latents, pixels of a patch's side, widths."""

    z_dim: int
    patch_size: int
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)

    @property
    def spatial_factor(self) -> int:
        """Pixels that a latent makes along a side."""
        return 8 * self.patch_size


def tiny_tensors(spec: TinySpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder's parameters."""
    width, out = spec.widths[0], 3 * spec.patch_size**2
    shapes: dict[str, tuple[int, ...]] = {
        f"{FIRST}.weight": (width, spec.z_dim, 3, 3),
        f"{FIRST}.bias": (width,),
        f"{LAST}.weight": (out, spec.widths[3], 3, 3),
        f"{LAST}.bias": (out,),
    }
    for (start, growth), before, after in zip(
        STAGES, spec.widths[:-1], spec.widths[1:], strict=True
    ):
        for index in range(start, start + NUM_MEMORY_BLOCKS):
            for layer, inputs in ((0, 2 * before), (2, before), (4, before)):
                shapes[f"decoder.{index}.conv.{layer}.weight"] = (before, inputs, 3, 3)
                shapes[f"decoder.{index}.conv.{layer}.bias"] = (before,)
        shapes[f"decoder.{start + 4}.conv.weight"] = (growth * before, before, 1, 1)
        shapes[f"decoder.{start + 5}.weight"] = (after, before, 3, 3)
    return shapes


def open_tiny(source: WeightSource) -> TinySpec:
    """Read the shape of a tiny decoder off its tensors and check them all.

    Raises:
        MissingTensor, ShapeMismatch: if it is none of this layout.
        WeightError: if the last layer does not make pixels.
    """
    names = [FIRST, *(f"decoder.{start + 5}" for start, _ in STAGES)]
    infos = [source.info(f"{name}.weight") for name in names]
    last = source.info(f"{LAST}.weight")
    patch = {3: 1, 12: 2}.get(last.shape[0] if last.shape else 0)
    if patch is None or len(infos[0].shape) != 4:
        raise WeightError(
            f"{last.file}, tensor {last.name}",
            f"shape {list(last.shape)}",
            "3 or 12 channels, as in taew2_1 and taew2_2",
            "give the file of a tiny decoder for Wan",
        )
    a, b, c, d = (info.shape[0] if info.shape else 0 for info in infos)
    spec = TinySpec(infos[0].shape[1], patch, (a, b, c, d))
    check_tensors(source, tiny_tensors(spec))
    return spec


class TinyDecoder:
    """Weights of a tiny decoder on a device. Calls are pure functions."""

    def __init__(
        self,
        spec: TinySpec,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Load the weights.

        Raises:
            WeightError: if the source does not fit the spec, or a tensor is not finite.
        """
        self.spec = spec
        shapes = tiny_tensors(spec)
        check_tensors(source, shapes)
        self._weights = {name: load_plain(source, name, dtype, device) for name in shapes}
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self._weights.values())

    @torch.inference_mode()
    def decode(self, latents: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Decode the next latent frames of a stream.

        Args:
            latents: (1, z, n, h, w), the model's normalised latents (they stay as they are).
            state: what the previous call gave; None starts a stream.

        Returns:
            frames (1, 3, m, H, W) float32 in [-1, 1], m = 4n less 3 at the start of a stream, and
            the state to go on with.

        Raises:
            ConfigError: if the latents have another shape.
            StateError: if the state is not one of this decoder at this size.
        """
        if latents.ndim != 5 or latents.shape[:2] != (1, self.spec.z_dim):
            expected = f"expected (1, {self.spec.z_dim}, n, height, width)"
            raise ConfigError("latents", f"shape {list(latents.shape)}", expected)
        state = state or VaeState()
        caches = dict(state.caches)
        sides = [side * self.spec.spatial_factor for side in latents.shape[3:]]
        pieces = [latents.new_zeros(0, 3, *sides, dtype=torch.float32)]
        for index in range(latents.shape[2]):
            frames = self._decode_frame(latents[0, :, index : index + 1].transpose(0, 1), caches)
            is_first = state.num_done + index == 0
            pieces.append(frames[NUM_TRIMMED if is_first else 0 :])
        video = torch.cat(pieces).transpose(0, 1).unsqueeze(0)
        return video, VaeState(state.num_done + latents.shape[2], caches)

    def _decode_frame(self, x: Tensor, caches: dict[str, Tensor]) -> Tensor:
        """(1, z, h, w) to (4, 3, H, W) float32 in [-1, 1]; `caches` is changed."""
        x = torch.tanh(x.to(self._dtype) / 3) * 3
        x = F.relu(self._conv(FIRST, x))
        for start, growth in STAGES:
            for index in range(start, start + NUM_MEMORY_BLOCKS):
                x = self._remember(f"decoder.{index}", x, caches)
            # before upsampling: a 1x1 convolution makes the same of copies
            x = self._conv(f"decoder.{start + 4}.conv", x)
            x = x.reshape(x.shape[0] * growth, -1, *x.shape[2:])
            x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
            x = self._conv(f"decoder.{start + 5}", x)
        x = self._conv(LAST, F.relu(x))
        return F.pixel_shuffle(x, self.spec.patch_size).float().clamp(0, 1) * 2 - 1

    def _remember(self, name: str, x: Tensor, caches: dict[str, Tensor]) -> Tensor:
        """A memory block: each frame sees itself and the one before it."""
        kept = caches.get(name)
        if kept is None:
            kept = torch.zeros_like(x[:1])
        if kept.shape[1:] != x.shape[1:] or kept.dtype != x.dtype:
            found = f"shape {list(kept.shape)} {kept.dtype}"
            raise StateError(f"kept frame of {name}", found, f"{list(x.shape[1:])} {x.dtype}")
        caches[name] = x[-1:].clone()
        y = torch.cat([x, torch.cat([kept.to(x.device), x[:-1]])], dim=1)
        for layer in (0, 2):
            y = F.relu(self._conv(f"{name}.conv.{layer}", y))
        return F.relu(self._conv(f"{name}.conv.4", y) + x)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        bias = self._weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
