"""The Wan video VAE as a stream: any number of frames in, their latents out, and back.

One class for both layouts (Wan 2.1; Wan 2.2 with residual stages and patchified pixels). The state
of a stream is a value: what a call did not give back, it did not keep. Every call goes through the
network one latent frame at a time, so the bits do not depend on how a video is split into calls.
Knows nothing of files, devices or jobs.

Source of the arithmetic: Wan2.1 wan/modules/vae.py, Wan2.2 wan/modules/vae2_2.py; names of the
parameters: diffusers' AutoencoderKLWan.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from reelpool.errors import ConfigError, StateError

from .plain_weights import load_plain
from .spec import VaeSpec
from .vae_config import check_spec, vae_spec_from_config
from .vae_layers import (
    Caches,
    CausalConv3d,
    Downsample,
    MidBlock,
    PointConv3d,
    ResidualBlock,
    RmsNorm,
    Upsample,
    add_duplicated,
    average_down,
    split,
    split_factors,
)
from .vae_state import VaeState
from .weights import WeightSource, check_tensors

__all__ = [
    "VaeState",
    "WanVae",
    "expected_tensors",
    "load_vae",
    "stays_float32",
    "vae_spec_from_config",
]


class DownStage(nn.Module):
    """Parameters of one residual encoder stage (2.2); `Encoder` runs it."""

    def __init__(self, channels: tuple[int, int], num_blocks: int, down: Downsample | None) -> None:
        super().__init__()
        widths = [channels[0], *[channels[1]] * num_blocks]
        self.resnets = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        self.downsampler = down
        self.in_time = down is not None and down.time_conv is not None


class UpStage(nn.Module):
    """Parameters of one decoder stage; `Decoder` runs it. The layouts differ in a name."""

    def __init__(
        self, channels: tuple[int, int], num_blocks: int, up: Upsample | None, is_residual: bool
    ) -> None:
        super().__init__()
        widths = [channels[0], *[channels[1]] * num_blocks]
        self.resnets = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        if is_residual:
            self.upsampler = up
        elif up is not None:
            self.upsamplers = nn.ModuleList([up])
        self.has_shortcut = is_residual and up is not None
        self.in_time = up is not None and up.time_conv is not None

    def up(self) -> nn.Module | None:
        """The upsampling layer, if the stage has one."""
        return (
            self.upsamplers[0] if hasattr(self, "upsamplers") else getattr(self, "upsampler", None)
        )


class Encoder(nn.Module):
    """Pixels (patchified in 2.2) of one latent frame to its moments."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [spec.base_dim * mult for mult in (1, *spec.dim_mult)]
        self.conv_in = CausalConv3d(spec.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (before, after) in enumerate(pairwise(widths)):
            is_last = i == len(spec.dim_mult) - 1
            down = None if is_last else Downsample(after, spec.temporal_down[i])
            if spec.is_residual:
                stage = DownStage((before, after), spec.num_res_blocks, down)
                self.down_blocks.append(stage)
                continue
            inner = [before, *[after] * spec.num_res_blocks]
            self.down_blocks.extend(map(ResidualBlock, inner[:-1], inner[1:]))
            if down is not None:
                self.down_blocks.append(down)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RmsNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 2 * spec.z_dim)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        """Map (B, in, 1 or 4, H, W) to (B, 2z, 1, h, w); `caches` is changed."""
        x = self.conv_in(self.conv_in.window(x, caches))
        for block in self.down_blocks:
            x = _run_down(block, x, caches) if isinstance(block, DownStage) else block(x, caches)
        x = self.mid_block(x, caches)
        x = self.conv_out.window(self.norm_out.silu(x, owned=True), caches)
        x = self.conv_out(x)
        return x


def _run_down(stage: DownStage, x: Tensor, caches: Caches) -> Tensor:
    """One residual encoder stage: blocks and downsampling, plus the averaged shortcut."""
    y = x
    for block in stage.resnets:
        y = block(y, caches)
    width = y.shape[1]
    if stage.downsampler is not None:
        y = stage.downsampler(y, caches)
    return y + average_down(x, width, stage.in_time, stage.downsampler is not None)


class Decoder(nn.Module):
    """One latent frame to its pixels (patchified in 2.2)."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        widths = [
            spec.decoder_base_dim * mult for mult in (spec.dim_mult[-1:] + spec.dim_mult[::-1])
        ]
        self.conv_in = CausalConv3d(spec.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (before, after) in enumerate(pairwise(widths)):
            up, in_time = None, spec.temporal_down[::-1]
            if i < len(spec.dim_mult) - 1:
                up = Upsample(after, after if spec.is_residual else after // 2, in_time[i])
            if spec.is_residual and up is not None:
                split_factors(before, after, in_time[i])  # raises if there is no such shortcut
            if i and not spec.is_residual:
                before //= 2  # the upsampler of the stage before has halved it
            stage = UpStage((before, after), spec.num_res_blocks + 1, up, spec.is_residual)
            self.up_blocks.append(stage)
        self.norm_out = RmsNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], spec.out_channels)

    def forward(self, x: Tensor, caches: Caches, is_first: bool) -> Tensor:
        """Map (B, z, 1, h, w) to (B, out, 1 or 4, H, W); `caches` is changed."""
        x = self.conv_in(self.conv_in.window(x, caches))
        x = self.mid_block(x, caches)
        for stage in self.up_blocks:
            assert isinstance(stage, UpStage)
            # here and not in a stage's forward: a caller would hold the stage's input until its end
            entry = x if stage.has_shortcut else None
            for block in stage.resnets:
                x = block(x, caches)
            up = stage.up()
            if up is not None:
                x = up(x, caches, is_first)
            if entry is not None:
                x = add_duplicated(x, entry, stage.in_time, is_first)
            del entry
        x = self.conv_out.window(self.norm_out.silu(x, owned=True), caches)
        x = self.conv_out(x)
        return x


class WanVae(nn.Module):
    """Encoder and decoder with latent statistics. Holds parameters only; calls are functional.

    Its type is that of its parameters, `stays_float32` apart; frames, latents and the statistics
    are float32.
    """

    def __init__(self, spec: VaeSpec) -> None:
        """Build with random parameters.

        Raises:
            ConfigError: if the spec's parts do not fit together.
        """
        super().__init__()
        check_spec(spec)
        self.spec = spec
        self.encoder = Encoder(spec)
        self.quant_conv = PointConv3d(2 * spec.z_dim, 2 * spec.z_dim)
        self.post_quant_conv = PointConv3d(spec.z_dim, spec.z_dim)
        self.decoder = Decoder(spec)
        for path, module in self.named_modules():
            if isinstance(module, CausalConv3d):
                module.path = path

    def decode(self, latents: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Decode the next latent frames of a stream.

        Args:
            latents: (B, z, n, h, w), the model's normalised latents, n >= 0.
            state: what the previous call gave; None starts a stream.

        Returns:
            frames (B, 3, m, H, W) float32 in [-1, 1], m = 4n less 3 at the start of a stream, and
            the state to go on with.

        Raises:
            ConfigError: if the latents have another shape.
            StateError: if the state is not one of this decoder at this size.
        """
        _check_shape("latents", latents, self.spec.z_dim, 1)
        state = state or VaeState()
        caches = self._open(state, self.decoder, "decoder")
        pieces = [
            self.decode_frame(latents[:, :, i : i + 1], caches).clamp(-1.0, 1.0)
            for i in range(latents.shape[2])
        ]
        batch, _, _, height, width = latents.shape
        size = (batch, 3, 0, height * self.spec.spatial_factor, width * self.spec.spatial_factor)
        frames = torch.cat(pieces, 2) if pieces else latents.new_zeros(size, dtype=torch.float32)
        return frames, VaeState(state.num_done + latents.shape[2], caches)

    def decode_frame(self, latents: Tensor, caches: Caches) -> Tensor:
        """Decode the next latent frame of a stream whose caches the caller owns.

        Nobody else has to hold the caches: each is freed as soon as the next one stands.

        Args:
            latents: (B, z, 1, h, w), normalised.
            caches: of the decoder, changed; empty starts a stream. Unchecked but for their sizes.

        Returns:
            frames (B, 3, 1 or 4, H, W) float32, not clamped yet to [-1, 1], so that tiles can be
            blended before.

        Raises:
            StateError: if a cache has another size.
        """
        is_first = not caches
        mean, std = self._statistics(latents.device)
        z = (latents.float() * std + mean).to(self.post_quant_conv.weight.dtype)
        x = self.decoder(self.post_quant_conv(z), caches, is_first)
        return unpatchify(x, self.spec.patch_size).float()

    def encode(self, frames: Tensor, state: VaeState | None = None) -> tuple[Tensor, VaeState]:
        """Encode the next frames of a stream: the first alone, then groups of 4.

        Args:
            frames: (B, 3, n, H, W) in [-1, 1], n >= 0.
            state: what the previous call gave; None starts a stream.

        Returns:
            normalised latents (B, z, m, h, w) float32, the mean of the posterior, and the state to
            go on with; frames that do not fill a group wait in its `pending`.

        Raises:
            ConfigError: if the frames have another shape or a size the VAE cannot halve.
            StateError: if the state is not one of this encoder at this size.
        """
        _check_shape("frames", frames, 3, self.spec.spatial_factor)
        state = state or VaeState()
        caches = self._open(state, self.encoder, "encoder")
        groups, pending = self._group(frames, state)
        pieces = [self.encode_group(group, caches) for group in groups]
        rows, columns = (side // self.spec.spatial_factor for side in frames.shape[3:])
        size = (frames.shape[0], self.spec.z_dim, 0, rows, columns)
        latents = torch.cat(pieces, 2) if pieces else frames.new_zeros(size, dtype=torch.float32)
        return latents, VaeState(state.num_done + len(pieces), caches, pending)

    def encode_group(self, frames: Tensor, caches: Caches) -> Tensor:
        """Encode the next frames of a stream whose caches the caller owns, see `decode_frame`.

        Args:
            frames: (B, 3, 1, H, W) at the start of a stream, then (B, 3, 4, H, W), in [-1, 1].
            caches: of the encoder, changed; empty starts a stream. Unchecked but for their sizes.

        Returns:
            normalised latents (B, z, 1, h, w) float32, the mean of the posterior.

        Raises:
            StateError: if a cache has another size.
        """
        mean, std = self._statistics(frames.device)
        x = patchify(frames.to(self.quant_conv.weight.dtype), self.spec.patch_size)
        x = self.quant_conv(self.encoder(x, caches))
        latents: Tensor = (x[:, : self.spec.z_dim].float() - mean) / std
        return latents

    def _group(self, frames: Tensor, state: VaeState) -> tuple[list[Tensor], Tensor | None]:
        """Cut frames, after those that wait in the state, into groups and a rest to wait."""
        waiting = frames[:, :, :0].float() if state.pending is None else state.pending
        if waiting.shape[:2] + waiting.shape[3:] != frames.shape[:2] + frames.shape[3:]:
            found, expected = list(waiting.shape), list(frames.shape)
            raise StateError("waiting frames", f"shape {found}", f"the size of frames {expected}")
        groups, start, num_done = [], 0, state.num_done
        while True:
            size = self.spec.temporal_factor if num_done else 1
            stop = start + size - waiting.shape[2]
            if stop > frames.shape[2]:
                break
            group = frames[:, :, start:stop]
            groups.append(torch.cat([waiting.to(group), group], 2) if waiting.shape[2] else group)
            waiting, start, num_done = waiting[:, :, :0], stop, num_done + 1
        rest = torch.cat([waiting.to(frames.device), frames[:, :, start:].float()], 2)
        return groups, rest if rest.shape[2] else None

    def _open(self, state: VaeState, part: nn.Module, name: str) -> Caches:
        """Check that the state's caches are those of this part; give a dict of them to change."""
        convs = [module for module in part.modules() if isinstance(module, CausalConv3d)]
        expected = {conv.path for conv in convs if state.num_done > conv.sits_out_first}
        if state.caches.keys() != expected:
            found = f"{len(state.caches)} caches after {state.num_done} latent frames"
            raise StateError(f"{name} state", found, f"the {len(expected)} of this {name}")
        return dict(state.caches)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, (1, z, 1, 1, 1) float32."""
        values = (self.spec.latents_mean, self.spec.latents_std)
        table = torch.tensor(values, dtype=torch.float32, device=device).view(2, 1, -1, 1, 1, 1)
        return table[0], table[1]


def patchify(x: Tensor, size: int) -> Tensor:
    """Fold size x size pixels into channels: (B, C, T, H, W) to (B, C*size^2, T, H/size, W/size).

    Column offsets come before row offsets.

    >>> patchify(torch.arange(4).view(1, 1, 1, 2, 2), 2).flatten().tolist()
    [0, 2, 1, 3]
    """
    x = split(split(x, 4, -1, size), 3, -1, size)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """Inverse of `patchify`."""
    x = split(x, 1, -1, size, size).permute(0, 1, 4, 5, 3, 6, 2)
    return x.flatten(5, 6).flatten(3, 4)


def expected_tensors(spec: VaeSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, without allocating any.

    Raises:
        ConfigError: if the spec's parts do not fit together.
    """
    with torch.device("meta"):
        vae = WanVae(spec)
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def stays_float32(name: str) -> bool:
    """Whether a parameter is float32 in a VAE of half weights, for the sake of colour.

    Of the demo VAE in bfloat16, the scales of the norms and the last convolution shift the mean of
    red and green by 0.07 of 255; without them 0.01 is left, and 0.16 instead of 0.22 of noise
    (benchmarks/decode.py). The norms compute in float32 anyway.
    """
    return name.endswith(".gamma") or name.startswith("decoder.conv_out.")


def load_vae(
    spec: VaeSpec, source: WeightSource, dtype: torch.dtype, device: torch.device | str
) -> WanVae:
    """Build a VAE around stored weights, ready for inference (no gradients).

    A weight that needs neither conversion nor transfer stays a read-only view of its file: clone
    the parameters before training them. Those of `stays_float32` are float32 for every `dtype`.

    Raises:
        WeightError: if the source does not fit the spec, or a tensor is not finite.
        ConfigError: if the spec's parts do not fit together.
    """
    with torch.device("meta"):
        vae = WanVae(spec)
    vae.requires_grad_(False)
    names = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    check_tensors(source, names)
    weights = {
        name: load_plain(source, name, torch.float32 if stays_float32(name) else dtype, device)
        for name in names
    }
    vae.load_state_dict(weights, assign=True)
    return vae


def _check_shape(name: str, x: Tensor, channels: int, multiple: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or x.shape[3] % multiple or x.shape[4] % multiple:
        expected = f"(1, {channels}, n, height, width)"
        sizes = f", height and width multiples of {multiple}" if multiple > 1 else ""
        raise ConfigError(name, f"shape {list(x.shape)}", f"expected {expected}{sizes}")
