"""The nouns that cross process borders: frozen, small, free of torch.

A *forward* is one evaluation of the transformer; a *route* is who evaluates it, in order; a *call*
sends a tuple of forwards over one block range to one worker (ARCHITECTURE.md, "One idea").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..models.spec import LatentShape, NumericsProfile
from .residency import Residency

Branch = Literal["cond", "uncond"]


@dataclass(frozen=True, order=True)
class BlockRange:
    """Consecutive transformer blocks [start, stop) of a model with `total` blocks.

    The range that starts at 0 also enters (patch and time embedding); the one that ends at `total`
    also leaves (head, un-patchify).
    """

    start: int
    stop: int
    total: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop <= self.total, self

    @property
    def is_first(self) -> bool:
        """Whether this range takes latents."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this range gives velocities."""
        return self.stop == self.total

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


@dataclass(frozen=True)
class ForwardKey:
    """Which forward of a job: the address of its velocity."""

    job: str
    step: int
    branch: Branch


@dataclass(frozen=True)
class ModelRef:
    """A model and how it is computed. Workers open it by name and compare the digest.

    parts: files the user named for parts of it, such as ("vae", "/models/vae.safetensors").
    """

    name: str
    digest: str
    numerics: NumericsProfile
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LoraRef:
    """A LoRA file and its strength on the high-noise (or only) and the low-noise expert."""

    path: str
    strength: float
    strength_low: float

    def of_expert(self, expert: int) -> float:
        """Strength on an expert: 0 the high-noise (or only) one, 1 the low-noise one."""
        return self.strength_low if expert else self.strength


@dataclass(frozen=True)
class BlockCall:
    """Run one block range for the forwards of a step.

    With it travel the input packet and, for each branch, the packet of its prompt (the same
    reference in every step), then, if `has_image`, that of the image: `condition` (1, C, F, h, w)
    float32, channels that follow those of the latents, and where the model has an image encoder
    `image_embeds` (rows, image_dim) float32. The input holds `latents` and `timesteps` for the
    first range, else `e`, `e0` and `x.<branch>`; the result holds `velocity.<branch>` after the
    last range, else the same as the input of the next.

    expert: 0 the high-noise (or only) transformer, 1 the low-noise one.
    fps: frames per second of the video, for models that are told.
    residency: the blocks that stay on the card; None: all of the range.
    """

    model: ModelRef
    job: str
    step: int
    branches: tuple[Branch, ...]
    blocks: BlockRange
    shape: LatentShape
    expert: int = 0
    loras: tuple[LoraRef, ...] = ()
    has_image: bool = False
    fps: float | None = None
    residency: Residency | None = None


@dataclass(frozen=True)
class ImageCall:
    """Encode the images that a job starts from.

    With it travels a packet of `first` and, where there is one, `last`: (H, W, 3) uint8 of any
    size, and a `digest` that tells images apart. The result holds `condition` (see BlockCall) where
    the model takes images as channels, or `latent` (1, C, 1, h, w) float32, the finished first
    latent frame; and `image_embeds` where it has an image encoder.

    width, height, frames: of the video, in pixels and pixel frames.
    tile: the most pixels that a tile of the VAE may be wide or high; 0 encodes frames whole.
    """

    model: ModelRef
    width: int
    height: int
    frames: int
    tile: int = 0


@dataclass(frozen=True)
class DecodeCall:
    """Decode latent frames [start, stop) of a job's latents to pixels.

    With it travels the packet of the whole latents. `stream` names the decode: a worker keeps the
    stream's feature cache for the next call, and makes it anew if it has none.

    tile: the most pixels that a tile may be wide or high; 0 decodes frames whole.
    """

    model: ModelRef
    stream: str
    start: int
    stop: int
    tile: int = 0
