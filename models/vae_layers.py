"""Layers of the Wan video VAE, written for a stream: one latent frame in, its frames out.

A temporal convolution looks two frames back. What it saw last lies in a dict from module path to
tensor that the caller passes in and gets back changed; no layer keeps anything between calls. The
dict belongs to one call of `WanVae`, so outside of it the VAE is a pure function. Tensors are
(B, C, T, H, W). In-place arithmetic happens only on tensors made here and only outside of a graph.

Parameter names are those of diffusers' AutoencoderKLWan. Source of the arithmetic: Wan2.1
wan/modules/vae.py and Wan2.2 wan/modules/vae2_2.py (resampling, shortcuts, order of operations).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelpool.errors import ConfigError, StateError

Caches = dict[str, Tensor]

# torch's CPU conv3d leaves oneDNN for a slow im2col when batch is 1 and C*T*H is at most this
SLOW_CONV3D_SIZE = 20480


def needs_graph(*tensors: Tensor) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def split(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """Split one axis into several, as a view; a size of -1 is what remains."""
    return torch.unflatten(x, axis, sizes)


def add(owned: Tensor, other: Tensor) -> Tensor:
    """Sum that reuses the memory of `owned` when no graph needs it."""
    return owned + other if needs_graph(owned, other) else owned.add_(other)


class RmsNorm(nn.Module):
    """Scale every position to root mean square 1 over its channels, times gamma.

    `dims` is the number of axes behind the channels: 3 for videos, 2 for images.
    """

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor, owned: bool = False) -> Tensor:
        """Normalise in float32; `owned` allows to write into x outside of a graph."""
        factor = _inverse_norm(x) * math.sqrt(x.shape[1])
        if needs_graph(x, self.gamma):
            return (x * factor * self.gamma).to(x.dtype)
        y: Tensor = x.mul_(factor) if owned and x.dtype == factor.dtype else x * factor
        return y.mul_(self.gamma).to(x.dtype)

    def silu(self, x: Tensor, owned: bool = False) -> Tensor:
        """Normalise and activate, as in front of every 3x3x3 convolution."""
        y: Tensor = self(x, owned)
        return F.silu(y, inplace=not needs_graph(y))


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / max(|x|, 1e-12) over the channels, float32 for half inputs."""
    if x.dtype == torch.float32:
        # 20 times faster than vector_norm over a strided axis: CPU, 32x4x128x128, 10.7 -> 0.55 ms
        return x.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return norm.clamp_min(1e-12).reciprocal()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution as a matrix product, (N, in, ...) to (N, out, ...).

    The bits of oneDNN's 1x1 convolution depend on the number of threads, those of a product not.
    """
    y = torch.matmul(weight.flatten(1), x.flatten(2))
    bias = bias.unsqueeze(-1)
    y = y + bias if needs_graph(y) else y.add_(bias)
    return split(y, 2, *x.shape[2:])


class PointConv3d(nn.Conv3d):
    """1x1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, T, H, W) to (B, out, T, H, W)."""
        assert self.bias is not None
        return pointwise(x, self.weight, self.bias)


class CausalConv3d(nn.Conv3d):
    """Convolution over time that looks back only: `window` puts the past in front, then call.

    Args:
        kernel: (time, height, width); height and width keep their size by zero padding.
        stride: step in time. With 1 the two frames before the window are part of it; with 2 one.
        sits_out_first: it is not used for the first latent frame (temporal upsamplers).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: int = 1,
        sits_out_first: bool = False,
    ) -> None:
        space = (kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, (stride, 1, 1), (0, *space))
        self.num_kept = kernel[0] - stride
        self.sits_out_first = sits_out_first
        self.path = ""  # the module's name in its VAE, set by `WanVae`

    def window(self, x: Tensor, caches: Caches) -> Tensor:
        """Put the kept frames (zeros before the start) in front of x and keep the last ones.

        Raises:
            StateError: if the kept frames do not have the size or dtype of x.
        """
        kept = caches.pop(self.path, None)
        parts = [x]
        if kept is not None:
            self._check(kept, x)
            parts.insert(0, kept.to(x.device))
        missing = self.num_kept - (0 if kept is None else kept.shape[2])
        if missing:
            parts.insert(0, x.new_zeros(*x.shape[:2], missing, *x.shape[3:]))
        window = torch.cat(parts, 2)
        self.remember(window[:, :, missing:], caches)
        return window

    def remember(self, x: Tensor, caches: Caches) -> None:
        """Keep the last frames of x for the next call."""
        last = x[:, :, -self.num_kept :]
        caches[self.path] = last.clone(memory_format=torch.contiguous_format)

    def forward(self, window: Tensor) -> Tensor:
        """Convolve a window; (B, in, T + kept, H, W) to (B, out, T, H, W) of the weight's type."""
        window = window.to(self.weight.dtype)
        batch, channels, frames, height, width = window.shape
        num_out = (frames - self.kernel_size[0]) // self.stride[0] + 1
        is_slow = batch == 1 and channels * frames * height <= SLOW_CONV3D_SIZE
        if num_out > 1 and not is_slow and self.kernel_size[1:] != (1, 1):
            return super().forward(window)
        # frames of a kernel's reach side by side in the channels: a 2-d convolution, and for one
        # output frame without any copy
        span = self.kernel_size[0]
        columns = window.unfold(2, span, self.stride[0]).permute(0, 2, 1, 5, 3, 4)
        images = columns.reshape(batch * num_out, channels * span, height, width)
        weight = self.weight.flatten(1, 2)
        if weight.shape[2:] == (1, 1):
            assert self.bias is not None
            return to_video(pointwise(images, weight, self.bias), batch)
        return to_video(F.conv2d(images, weight, self.bias, padding=self.padding[1:]), batch)

    def _check(self, kept: Tensor, x: Tensor) -> None:
        found = (kept.shape[:2], kept.shape[3:], kept.dtype)
        if found != (x.shape[:2], x.shape[3:], x.dtype) or kept.shape[2] > self.num_kept:
            size = list(x.shape[:2]), list(x.shape[3:])
            raise StateError(
                f"kept frames of {self.path}",
                f"shape {list(kept.shape)} {kept.dtype}",
                f"{size[0]} x (at most {self.num_kept}) x {size[1]} {x.dtype}",
            )


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(in_channels, 3)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = RmsNorm(out_channels, 3)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else PointConv3d(in_channels, out_channels)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        """Keep the size but for the channels."""
        # one name for all intermediates: each is freed as soon as the next exists
        y = self.conv1.window(self.norm1.silu(x), caches)
        y = self.conv1(y)
        y = self.conv2.window(self.norm2.silu(y, owned=True), caches)
        y = self.conv2(y)
        return add(y, self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention of one head over the positions of each frame, with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RmsNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the size."""
        images = to_images(x)
        # channels innermost, as attention kernels want them; 1x1 convolutions are products then,
        # whose bits, unlike oneDNN's convolutions, do not depend on the number of threads
        tokens = self.norm(images).flatten(2).transpose(1, 2).unsqueeze(1)
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias)
        y = y.squeeze(1).transpose(1, 2).reshape(images.shape)
        return add(to_video(y, x.shape[0]), x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        """Keep the size."""
        x = self.resnets[0](x, caches)
        x = self.attentions[0](x)
        y: Tensor = self.resnets[1](x, caches)
        return y


class Downsample(nn.Module):
    """Halve height and width and, with `in_time`, the frames but for the very first one."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if in_time else None

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        """Keep the channels; the first frame of a stream passes time alone."""
        y = self.resample["1"](F.pad(to_images(x), (0, 1, 0, 1)))
        y = to_video(y, x.shape[0])
        if self.time_conv is None:
            return y
        if self.time_conv.path not in caches:
            self.time_conv.remember(y, caches)
            return y
        window = self.time_conv.window(y, caches)
        del y
        result: Tensor = self.time_conv(window)
        return result


class Upsample(nn.Module):
    """Double height and width and, with `in_time`, the frames but for the very first one."""

    def __init__(self, in_channels: int, out_channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = (
            CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1), sits_out_first=True)
            if in_time
            else None
        )

    def forward(self, x: Tensor, caches: Caches, is_first: bool) -> Tensor:
        """Change the channels; the first latent frame of a stream stays one frame.

        The time convolution starts with the second latent frame, over zeros, as if the first had
        not been.
        """
        batch = x.shape[0]
        if self.time_conv is None or is_first:
            x = to_images(x)
        else:
            x = self.time_conv.window(x, caches)
            x = self.time_conv(x)
            # the two halves of the channels are the even and the odd frames
            x = split(x, 1, 2, -1).permute(0, 3, 1, 2, 4, 5).flatten(0, 2)
        # copies values only, so half types need no float32 here; 3-d is the fastest CPU kernel
        x = F.interpolate(x.unsqueeze(2), scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
        x = self.resample["1"](x.squeeze(2))
        return to_video(x, batch)


def to_images(x: Tensor) -> Tensor:
    """Lay the frames into the batch: (B, C, T, H, W) to (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def to_video(images: Tensor, batch: int) -> Tensor:
    """Inverse of `to_images`, a view."""
    return split(images, 0, batch, -1).transpose(1, 2)


def average_down(x: Tensor, out_channels: int, in_time: bool, in_space: bool) -> Tensor:
    """Shortcut of an encoder stage (2.2): fold space and time into channels, average groups.

    A single first frame of a stream gets a zero frame in front.
    """
    t, s = 1 + in_time, 1 + in_space
    if x.shape[2] % t:
        x = F.pad(x, (0, 0, 0, 0, 1, 0))
    x = split(split(split(x, 4, -1, s), 3, -1, s), 2, -1, t)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return split(x, 1, out_channels, -1).mean(2)


def add_duplicated(y: Tensor, x: Tensor, in_time: bool, is_first: bool) -> Tensor:
    """Add the shortcut of a decoder stage (2.2): x repeated over the finer grid of y.

    Each value of x serves the grid points it covers through broadcasting, so nothing is repeated
    in memory. Of the first latent frame only the last sub-frame is used.

    Args:
        y: (B, out, T * t, 2H, 2W) with t = 2 `in_time`, else 1; overwritten outside of a graph.
        x: (B, out * k, T, H, W) where k channels of x share an output channel (`split_factors`).
        in_time: whether the stage doubles the frames.
        is_first: whether this is the first latent frame, for which the frames do not double.
    """
    factors = split_factors(x.shape[1], y.shape[1], in_time)
    x = split(x, 1, y.shape[1], *factors).permute(0, 1, 5, 2, 6, 3, 7, 4)
    if is_first:
        x = x[:, :, :, -1:]
    grid = split(split(split(y, 4, -1, 2), 3, -1, 2), 2, x.shape[2], -1)
    return add(grid, x).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def split_factors(in_channels: int, out_channels: int, in_time: bool) -> tuple[int, int, int]:
    """How many sub-frames, sub-rows and sub-columns the channels of one output channel cover.

    >>> split_factors(64, 32, True), split_factors(64, 32, False), split_factors(32, 32, True)
    ((2, 1, 1), (1, 2, 1), (1, 1, 1))

    Raises:
        ConfigError: if the channels do not divide that way.
    """
    rest, factors = in_channels // out_channels, []
    for size in (1 + in_time, 2, 2):
        factors.append(size if rest % size == 0 else 1)
        rest //= factors[-1]
    if in_channels % out_channels or rest != 1:
        problem = f"a residual stage from {in_channels} to {out_channels} channels"
        raise ConfigError(
            "vae", problem, "neighbours in dim_mult must be equal, double or fourfold"
        )
    return factors[0], factors[1], factors[2]
