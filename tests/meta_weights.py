"""Weights of a real geometry on the meta device, quantised as files are: shapes without bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from reelpool.models.keys import transformer_tensors
from reelpool.models.quant import KINDS, Quantised
from reelpool.models.spec import TEXT_LENGTH, LatentShape, TransformerSpec
from reelpool.models.weights import TensorInfo
from reelpool.runtime.block_runner import ForwardInput

META = torch.device("meta")
# What city96's files hold: the type of the blocks' matrices, of `.v`, of `.ffn.2`
FILES = {
    "": ("", "", ""),
    "fp8": ("F8_E4M3", "F8_E4M3", "F8_E4M3"),
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "q5_k_m": ("Q5_K", "Q6_K", "Q6_K"),
    "q4_k_m": ("Q4_K", "Q6_K", "Q6_K"),
    "q4_0": ("Q4_0", "Q4_0", "Q4_1"),
}


@dataclass(frozen=True)
class QuantisedMeta:
    """A WeightSource: matrices of the blocks quantised, everything else bfloat16."""

    spec: TransformerSpec
    quant: str
    where: str = "no file"

    def names(self) -> Iterator[str]:
        return iter(transformer_tensors(self.spec))

    def info(self, name: str) -> TensorInfo:
        tensor = self.get(name)
        return TensorInfo(name, self.where, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)

    def get(self, name: str) -> torch.Tensor:
        shape = transformer_tensors(self.spec)[name]
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    def matrix(self, name: str) -> torch.Tensor | Quantised:
        shape = transformer_tensors(self.spec)[name]
        matrices, values, down = FILES[self.quant]
        kind = down if ".ffn.2." in name else values if ".v." in name else matrices
        if not (kind and name.startswith("blocks.") and len(shape) == 2):
            return self.get(name)
        rows, width = shape[0], shape[1] // KINDS[kind].size * KINDS[kind].num_bytes
        data = torch.empty((rows, width), dtype=torch.uint8, device=META)
        scale = torch.empty(rows, device=META) if kind == "F8_E4M3" else None
        return Quantised(data, kind, shape, scale)


def forward_inputs(spec: TransformerSpec, shape: LatentShape, count: int) -> list[ForwardInput]:
    """Forwards with prompts of their own that fill all rows, as a call brings them."""
    channels = spec.in_channels - spec.out_channels
    rows = torch.arange(1.0, TEXT_LENGTH + 1)[:, None].expand(-1, spec.text_dim)
    return [
        ForwardInput(
            f"prompt {index}",
            rows.contiguous(),
            shape,
            torch.zeros(1, spec.out_channels, *shape.dims[2:]),
            torch.full((shape.frames,), 500.0),
            image_key="image",
            image_embeds=torch.zeros(spec.image_rows, spec.image_dim) if spec.image_dim else None,
            condition=torch.zeros(1, channels, *shape.dims[2:]) if channels else None,
        )
        for index in range(count)
    ]
