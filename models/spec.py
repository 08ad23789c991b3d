"""Geometry of a video diffusion model: sizes, parameter counts, bytes, FLOPs.

Everything a planner must know about a model without opening its weights. Free of torch.
Source of the shapes: Wan2.1 and Wan2.2 configurations; the counts agree with meta-device models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

IMAGE_TOKENS = 257  # rows of features of one image, as ViT-H/14 gives them at 224 pixels
# Few rows take other matrix kernels, and which ones depends on the number of threads: a row's bits
# were the same for every row count from 12 up with 1 and 2 threads, and not below (MKL, float32;
# 1 row also in bfloat16). Products over frames, text or image rows are therefore padded to this
# multiple.
ROW_MULTIPLE = 32
TEXT_LENGTH = 512  # rows the transformer cross-attends, padding included (Wan pads always)


def rounded_up(rows: int) -> int:
    """The next multiple of ROW_MULTIPLE."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class NumericsProfile:
    """All that decides the bits of a result, fixed for a job and stored with it.

    dtype: compute type of the transformer, "float32", "bfloat16" or "float16".
    token_chunk: tokens that norm, modulation, QKV and FFN take at a time.
    head_groups: groups that self-attention is computed in; 1 means all heads at once.
    attention: the attention back end.
    vae_dtype: compute type of the VAE.
    """

    dtype: str = "float32"
    token_chunk: int = 2048
    head_groups: int = 1
    attention: str = "sdpa"
    vae_dtype: str = "float32"


@dataclass(frozen=True)
class LatentShape:
    """Size of a latent video, in latent units.

    Latents travel as (1, channels, frames, height, width) float32.
    """

    channels: int
    frames: int
    height: int
    width: int

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """The tensor's shape."""
        return (1, self.channels, self.frames, self.height, self.width)

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return self.channels * self.frames * self.height * self.width

    @property
    def num_bytes(self) -> int:
        """Bytes of the float32 tensor."""
        return 4 * self.num_elements


@dataclass(frozen=True)
class TransformerSpec:
    """Shape of a Wan diffusion transformer.

    `dim = num_heads * head_dim`; all linear layers of a block have biases.

    image_dim: width of the image encoder's features that every block attends to beside the text
        (Wan 2.1 image to video: 1280); 0 without.
    image_positions: rows of the learned table added to those features (first and last frame: 514);
        0 without.
    fps_embedding: whether the frame rate is embedded (SkyReels-V2 with `inject_sample_info`).
    """

    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_norm: bool = True
    image_dim: int = 0
    image_positions: int = 0
    fps_embedding: bool = False

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return self.num_heads * self.head_dim

    @property
    def block_params(self) -> int:
        """Parameters of one block: attention and FFN matrices, norms, modulation.

        8 attention matrices, 10 with keys and values of an image; 2 of the FFN.
        """
        d, f = self.dim, self.ffn_dim
        matrices = (10 if self.image_dim else 8) * (d * d + d) + 2 * d * f + d + f
        norms = (5 if self.image_dim else 4) * d + (2 * d if self.cross_norm else 0)
        return matrices + norms + 6 * d

    @property
    def other_params(self) -> int:
        """Parameters outside of the blocks: embeddings, time projection, head."""
        d = self.dim
        patch = math.prod(self.patch_size)
        return (
            self.in_channels * patch * d
            + d
            + (self.text_dim * d + d)
            + (d * d + d)
            + (self.freq_dim * d + d)
            + (d * d + d)
            + (d * 6 * d + 6 * d)
            + (d * self.out_channels * patch + self.out_channels * patch)
            + 2 * d
            + self._image_params
            + (2 * d + (d * d + d) + (d * 6 * d + 6 * d) if self.fps_embedding else 0)
        )

    @property
    def _image_params(self) -> int:
        """Parameters that bring image features to the model's width: two norms, two layers."""
        if not self.image_dim:
            return 0
        i, d = self.image_dim, self.dim
        return self.image_positions * i + 2 * i + (i * i + i) + (i * d + d) + 2 * d

    @property
    def num_params(self) -> int:
        """All parameters."""
        return self.num_layers * self.block_params + self.other_params

    @property
    def image_rows(self) -> int:
        """Rows of image features that every block attends to: of one image, or of two."""
        return self.image_positions or (IMAGE_TOKENS if self.image_dim else 0)

    def num_tokens(self, shape: LatentShape) -> int:
        """Tokens of a latent video: one for each patch."""
        pf, ph, pw = self.patch_size
        return (shape.frames // pf) * (shape.height // ph) * (shape.width // pw)

    def block_flops(self, num_tokens: int, text_rows: int = TEXT_LENGTH) -> int:
        """Floating-point operations of one block forward over `num_tokens` tokens.

        Linear layers over the tokens (self q, k, v, o; cross q, o; the FFN), attention over all
        token pairs, cross-attention over the text and image rows, and their keys and values.
        """
        n, d, rows = num_tokens, self.dim, text_rows + self.image_rows
        linear = 2 * n * (6 * d * d + 2 * d * self.ffn_dim)
        attention = 4 * n * n * d + 4 * n * rows * d
        return linear + attention + self.text_kv_flops(rows)

    def text_kv_flops(self, text_rows: int = TEXT_LENGTH) -> int:
        """Operations that make one block's cross-attention keys and values from so many rows."""
        return 4 * text_rows * self.dim * self.dim

    def text_kv_share(self, num_tokens: int, text_rows: int = TEXT_LENGTH) -> float:
        """Share of a forward that keeping the keys and values of so many rows saves, 0 to 1."""
        return self.text_kv_flops(text_rows) / self.block_flops(num_tokens, text_rows)


@dataclass(frozen=True)
class VaeSpec:
    """Shape of a Wan video VAE, either layout.

    `is_residual` with `patch_size=2` is the layout of Wan 2.2 (patchified input, averaged and
    duplicated shortcuts); without, that of Wan 2.1. `temporal_down[i]` tells whether encoder stage
    i halves the frames; the decoder mirrors it.
    """

    base_dim: int = 96
    decoder_base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int = 1
    temporal_factor: int = 4
    spatial_factor: int = 8
    latents_mean: tuple[float, ...] = field(default=(), repr=False)
    latents_std: tuple[float, ...] = field(default=(), repr=False)

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` pixel frames (4n+1)."""
        return (num_frames - 1) // self.temporal_factor + 1

    def num_frames(self, num_latent_frames: int) -> int:
        """Pixel frames that `num_latent_frames` latent frames decode to."""
        return (num_latent_frames - 1) * self.temporal_factor + 1


@dataclass(frozen=True)
class TextSpec:
    """Shape of the UMT5 text encoder."""

    vocab_size: int = 256384
    dim: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    num_buckets: int = 32  # relative-position buckets, a table in every layer
    max_length: int = TEXT_LENGTH
    max_distance: int = 128  # tokens apart that share the last bucket
    eps: float = 1e-6

    @property
    def num_params(self) -> int:
        """All parameters, the embedding included."""
        inner = self.num_heads * self.head_dim
        layer = 4 * self.dim * inner + 3 * self.dim * self.ffn_dim + 2 * self.dim
        layers = self.num_layers * (layer + self.num_buckets * self.num_heads)
        return self.vocab_size * self.dim + layers + self.dim


@dataclass(frozen=True)
class ImageEncoderSpec:
    """Shape of the CLIP vision tower (ViT-H/14 of Wan 2.1's image-to-video models).

    The features are the hidden states after all blocks but the last, without a final norm.
    """

    dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    ffn_dim: int = 5120
    image_size: int = 224
    patch_size: int = 14
    activation: str = "gelu"
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """Rows of features of one image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


# How a model takes images: not at all; beside the noise as channels (4 of mask, the image's latent
# channels); as a finished first latent frame.
ImageInput = Literal["", "concat", "first-frame"]


@dataclass(frozen=True)
class ModelDefaults:
    """What a job gets when it does not say: the model's own recommended settings."""

    width: int = 832
    height: int = 480
    frames: int = 81
    fps: int = 16
    steps: int = 50
    guidance: float = 5.0
    guidance_low: float | None = None  # of the low-noise expert; None: the same
    shift: float = 5.0
    solver: str = "unipc"
    negative: str = ""
    prompt: str = ""  # what `reelpool demo` draws
    zoom: int = 1  # viewing enlargement of `reelpool demo` (the demo draws 64x64)


@dataclass(frozen=True)
class ModelSpec:
    """A whole video model: its parts and its defaults.

    variant: "t2v", "i2v", "flf2v", "ti2v" or "df" (diffusion forcing: timesteps per frame).
    image: how it takes images. num_experts, boundary: 2 when one transformer serves timesteps of at
        least `boundary` * 1000 and another those below.
    quant: type of the weights in a preset's byte counts, such as "q4_k_m"; "" for 16 bits.
    """

    name: str
    transformer: TransformerSpec
    vae: VaeSpec
    text: TextSpec
    defaults: ModelDefaults
    variant: str = "t2v"
    image: ImageInput = ""
    num_experts: int = 1
    boundary: float = 0.0
    image_encoder: ImageEncoderSpec | None = None
    quant: str = ""

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this many pixels."""
        return self.vae.spatial_factor * self.transformer.patch_size[1]

    def latent_shape(self, width: int, height: int, num_frames: int) -> LatentShape:
        """Latent size of a video of the given pixel size."""
        factor = self.vae.spatial_factor
        return LatentShape(
            self.transformer.out_channels,
            self.vae.num_latent_frames(num_frames),
            height // factor,
            width // factor,
        )
