"""A transformer whose matrices stay quantised gives what it gives with the same values plain."""

from __future__ import annotations

import math

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from reelpool.models import keys
from reelpool.models.gguf_source import GgufSource
from reelpool.models.quant import plain
from reelpool.models.spec import LatentShape, NumericsProfile, TransformerSpec
from reelpool.runtime.block_runner import BlockRunner
from tests.gguf_files import compose, write
from tests.tiny_models import latents_of, prompt_rows, velocity

SPEC = TransformerSpec(2, 128, 512, 2, 4, 4, text_dim=32)
# as city96's converter mixes them: one or two steps up for v and the second half of the FFN
KINDS = {
    "legacy": ("Q4_0", "Q4_0", "Q4_1"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q5_K", "Q4_K"),
    "IQ4_XS": ("IQ4_XS", "IQ4_XS", "Q5_K"),
}

# of the scales of types that gguf-py cannot quantise to: weights come out at about 1/16
SPREAD = {"Q3_K": 5e-4, "Q4_K": 1e-4, "Q5_K": 5e-5, "Q6_K": 3e-5, "IQ4_XS": 3e-5}


class Plain:
    """The same tensors, decoded at once."""

    def __init__(self, source):
        self.where, self._source = source.where, source
        self.names, self.info = source.names, source.info

    def get(self, name):
        return plain(self._source.matrix(name), torch.float32)

    matrix = get


def kind_of(name, mix):
    common, value, down = mix
    if ".v.weight" in name:
        return value
    return down if "ffn.2" in name else common


def model_file(path, mix):
    draw = torch.Generator().manual_seed(0)
    tensors, blocks = {}, []
    for seed, (name, shape) in enumerate(keys.transformer_tensors(SPEC).items()):
        values = torch.randn(shape, generator=draw) / math.sqrt(math.prod(shape[1:]) or 1)
        if len(shape) == 2 and name.startswith("blocks.") and "norm" not in name:
            kind = kind_of(name, mix)
            if kind in SPREAD:
                data = compose(kind, *shape, seed, extremes=False, spread=SPREAD[kind])
            else:
                data = quantize(values.numpy(), GGMLQuantizationType[kind])
            blocks.append((name, kind, data))
        else:
            tensors[name] = values.numpy()
    return write(path, tensors, blocks=blocks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mix", KINDS)
def test_a_gguf_transformer_equals_its_decoded_twin(tmp_path, mix, dtype):
    source = GgufSource(model_file(tmp_path / "wan.gguf", KINDS[mix]))
    assert set(source.names()) == set(keys.transformer_tensors(SPEC))
    shape = LatentShape(4, 3, 8, 8)
    inputs = latents_of(shape), torch.full((3,), 500.0), prompt_rows(7)
    numerics, cpu = NumericsProfile(dtype=dtype), torch.device("cpu")
    runners = [BlockRunner(SPEC, each, numerics, cpu) for each in (source, Plain(source))]
    ours, twin = (velocity(runner, *inputs).float() for runner in runners)
    assert ours.isfinite().all()
    error = (ours - twin).abs().max() / twin.abs().max()
    assert error <= (1e-6 if dtype == "float32" else 0.01)  # measured 0 for all
    assert runners[0].weight_bytes < 0.75 * runners[1].weight_bytes
