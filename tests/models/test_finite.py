"""Weights that are not numbers are refused when they are loaded: which file, tensor, what to do."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import WeightError
from reelpool.models.finite import WHOLE, check_finite
from reelpool.models.quant import Quantised
from reelpool.models.wan_weights import load_block, load_enter, load_image, load_leave, load_text
from reelpool.models.weights import SafetensorsSource
from tests.tiny_variants import VARIANTS, make_transformer, open_module

NAME = "df-i2v-fps"  # has every tensor but the positions
SPEC = VARIANTS[NAME]


def saved(path, **tensors):
    save_file(tensors, path)
    return SafetensorsSource(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 499, 998])
def test_one_bad_value_anywhere_is_found(tmp_path, dtype, bad, index):
    tensor = torch.linspace(-1, 1, 999).to(dtype)
    tensor[index] = bad
    source = saved(tmp_path / "a.safetensors", w=tensor)
    with pytest.raises(WeightError) as caught:
        check_finite(source, "w", source.get("w"))
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: found tensor w with NaN or infinity in it, expected finite "
        "numbers; the file is damaged or was badly made: download it again, or take another one"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_pass_and_come_back_as_they_are(tmp_path, dtype):
    for tensor in (torch.full((9, 7), torch.finfo(dtype).max, dtype=dtype), torch.empty(0, 4)):
        source = saved(tmp_path / "a.safetensors", w=tensor)
        value = source.get("w")
        assert check_finite(source, "w", value) is value


def test_a_cast_that_overflows_is_told_apart(tmp_path):
    source = saved(tmp_path / "a.safetensors", w=torch.tensor([1.0, 1e6]))
    with pytest.raises(WeightError, match="w with values too large for float16, expected at"):
        check_finite(source, "w", source.get("w").to(torch.float16))


def test_of_a_large_matrix_a_sample_is_looked_at(tmp_path):
    rows = 2 * WHOLE // 1024
    tensor = torch.ones(rows, 1024, dtype=torch.bfloat16)
    source = saved(tmp_path / "a.safetensors", w=tensor)
    assert check_finite(source, "w", tensor) is tensor
    for place in ((0, 3), (rows // 3, 0), (-1, -1), (slice(None), 512), slice(None)):
        bad = tensor.clone()
        bad[place] = math.nan
        with pytest.raises(WeightError, match="tensor w with NaN"):
            check_finite(source, "w", bad)
    tensor[rows // 8, 5] = math.nan  # between the runs; the first velocity will show it
    assert check_finite(source, "w", tensor) is tensor


@pytest.mark.parametrize("shape", [(1, 2 * WHOLE), (3, WHOLE), (WHOLE, 2), (70, WHOLE // 64)])
def test_a_matrix_of_any_shape_is_looked_at(tmp_path, shape):
    source = saved(tmp_path / "a.safetensors", w=torch.ones(1))
    bad = torch.full(shape, math.nan, dtype=torch.bfloat16)
    with pytest.raises(WeightError, match="tensor w with NaN"):
        check_finite(source, "w", bad)


@pytest.fixture(scope="module")
def module():
    return make_transformer(NAME)


def load(source, dtype):
    load_enter(SPEC, source, dtype)
    load_text(source, dtype)
    load_image(SPEC, source, dtype)
    load_leave(source, dtype)
    for index in range(SPEC.num_layers):
        load_block(SPEC, source, index, dtype)


def test_every_tensor_of_a_transformer_is_checked(tmp_path, module):
    load(open_module(NAME, module, tmp_path), torch.float32)
    for number, (name, parameter) in enumerate(module.named_parameters()):
        value = parameter.data.flatten()[-1].clone()
        parameter.data.view(-1)[-1] = (math.nan, math.inf, -math.inf)[number % 3]
        source = open_module(NAME, module, tmp_path)
        with pytest.raises(WeightError, match=f"tensor {name} with NaN or infinity"):
            load(source, (torch.float32, torch.bfloat16)[number % 2])
        parameter.data.view(-1)[-1] = value
    load(open_module(NAME, module, tmp_path), torch.float32)


class Scaled:
    """A source whose matrices are fp8 with a scale."""

    def __init__(self, source, scale):
        self.source, self.scale, self.info, self.get = source, scale, source.info, source.get

    def matrix(self, name):
        weight = self.source.get(name)
        data = weight.to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.ones(len(weight))
        if name == "blocks.1.cross_attn.v_img.weight":
            scale[-1] = self.scale
        return Quantised(data, "F8_E4M3", tuple(weight.shape), scale)


def test_scales_of_quantised_matrices_are_checked(tmp_path, module):
    source = open_module(NAME, module, tmp_path)
    load_block(SPEC, Scaled(source, 1.0), 1, torch.float32)
    with pytest.raises(WeightError, match=r"tensor blocks\.1\.attn2\.add_v_proj\.weight with NaN"):
        load_block(SPEC, Scaled(source, math.nan), 1, torch.float32)
