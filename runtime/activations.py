"""How much memory one forward of a transformer takes besides its weights, found without weights.

The real code runs at the real size on the meta device, which computes shapes only, and a meter
counts what it makes. So the figures are of this code, not of a formula, and 14B takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from reelpool.errors import MissingTensor

from ..models.keys import transformer_tensors
from ..models.spec import TEXT_LENGTH, LatentShape, NumericsProfile, TransformerSpec
from ..models.weights import TensorInfo
from .block_runner import BlockRunner, ForwardInput
from .meter import LiveTensors, Made, meter
from .types import BlockRange

META = torch.device("meta")


@dataclass(frozen=True)
class Activations:
    """What a forward takes besides its weights.

    peak_bytes: at its most, everything kept for the next forward counted.
    kept_bytes: what is kept: rows of text and image, their keys and values, the rope table.
    pieces: what lived at the peak, the largest first.
    """

    peak_bytes: int
    kept_bytes: int
    pieces: tuple[Made, ...]


def measure_forward(
    spec: TransformerSpec,
    shape: LatentShape,
    numerics: NumericsProfile,
    *,
    per_frame: bool = False,
    num_words: int = TEXT_LENGTH,
) -> Activations:
    """Count the bytes of the first forward of a whole transformer; it also fills the caches.

    Args:
        spec: the transformer.
        shape: the latent video's size.
        numerics: compute type, token chunk and head groups; attention is counted as fused.
        per_frame: whether every latent frame has a timestep of its own (diffusion forcing).
        num_words: rows of the prompt that are no padding; all of them take the most.
    """
    runner = BlockRunner(spec, MetaWeights(spec, getattr(torch, numerics.dtype)), numerics, META)
    blocks = BlockRange(0, spec.num_layers, spec.num_layers)
    runner.load(blocks)
    forward = _forward_input(spec, shape, per_frame, num_words)
    with meter(META) as count:
        runner.run(blocks, [forward])
    assert isinstance(count, LiveTensors)
    return Activations(count.peak_bytes, runner.cache_bytes, tuple(count.at_peak))


def _forward_input(
    spec: TransformerSpec, shape: LatentShape, per_frame: bool, num_words: int
) -> ForwardInput:
    """Inputs of the right sizes, on the host as a worker gets them."""
    prompt = torch.zeros(TEXT_LENGTH, spec.text_dim)
    prompt[:num_words] = torch.arange(1.0, num_words + 1)[:, None]  # no two rows alike
    latents = torch.zeros(1, spec.out_channels, *shape.dims[2:])
    channels = spec.in_channels - spec.out_channels
    count = shape.frames
    return ForwardInput(
        "prompt",
        prompt,
        shape,
        latents,
        torch.linspace(0, 999, count) if per_frame else torch.full((count,), 500.0),
        image_key="image",
        image_embeds=torch.zeros(spec.image_rows, spec.image_dim) if spec.image_dim else None,
        condition=torch.zeros(1, channels, *shape.dims[2:]) if channels else None,
    )


class MetaWeights:
    """A WeightSource of a transformer's tensors on the meta device: shapes without bytes."""

    where = "no file"

    def __init__(self, spec: TransformerSpec, dtype: torch.dtype) -> None:
        self._shapes, self._dtype = transformer_tensors(spec), dtype

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape."""
        tensor = self.get(name)
        return TensorInfo(name, self.where, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the right shape."""
        if name not in self._shapes:
            raise MissingTensor(self.where, name, "a tensor of the transformer")
        return torch.empty(self._shapes[name], dtype=self._dtype, device=META)

    matrix = get
