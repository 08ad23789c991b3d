"""fp8 files of every form: the arithmetic, what stays plain, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import WeightError
from reelpool.models.fp8 import with_scales
from reelpool.models.layouts import open_transformer
from reelpool.models.linear import Linear, stack
from reelpool.models.open_weights import open_weights
from reelpool.models.quant import CHUNK, Quantised
from tests.model_forms import T2V, tensors_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS, COLUMNS = 5, 8
LAYER = "blocks.0.ffn.0"
SCALE = torch.tensor(0.37)


def values(dtype=E4M3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=draw).to(dtype)


def text(content) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def stored(form, dtype=E4M3, scale=SCALE):
    """Tensors of a file with one matrix, and its metadata."""
    kind = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2"}[dtype]
    tensors, metadata = {f"{LAYER}.weight": values(dtype), f"{LAYER}.bias": torch.ones(ROWS)}, {}
    if form == "scaled_fp8":
        tensors |= {"scaled_fp8": torch.empty(2, dtype=dtype), f"{LAYER}.scale_weight": scale}
        tensors[f"{LAYER}.scale_input"] = torch.tensor(3.0)
    elif form == "kijai":
        tensors[f"{LAYER}.weight_scale"] = scale
    elif form == "comfy_quant":
        tensors |= {f"{LAYER}.comfy_quant": text({"format": kind}), f"{LAYER}.weight_scale": scale}
        tensors[f"{LAYER}.input_scale"] = torch.tensor(3.0)
    elif form == "header":
        tensors[f"{LAYER}.weight_scale"] = scale
        layers = {LAYER: {"format": kind}, "of.another.part": {"format": "nvfp4"}}
        content = {"format_version": "1.0", "layers": layers}
        metadata = {"_quantization_metadata": json.dumps(content)}
    return tensors, metadata


def open_file(path, tensors, metadata=None):
    save_file(tensors, path / "x.safetensors", metadata or None)
    return with_scales(open_weights(path / "x.safetensors"))


SCALED = ["scaled_fp8", "kijai", "comfy_quant", "header"]


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("form", ["plain", *SCALED])
def test_every_form_decodes_to_value_times_scale(tmp_path, form, dtype):
    source = open_file(tmp_path, *stored(form, dtype))
    assert set(source.names()) == {f"{LAYER}.weight", f"{LAYER}.bias"}
    matrix, info = source.matrix(f"{LAYER}.weight"), source.info(f"{LAYER}.weight")
    kind = "F8_E4M3" if dtype is E4M3 else "F8_E5M2"
    assert isinstance(matrix, Quantised)
    assert (matrix.kind, info.quant, info.dtype) == (kind, kind, torch.uint8)
    assert matrix.shape == info.shape == (ROWS, COLUMNS)
    expected = values(dtype).float() * (1.0 if form == "plain" else SCALE)
    for to in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matrix.dequantise(to), expected.to(to))
    assert torch.equal(source.matrix(f"{LAYER}.bias"), torch.ones(ROWS))
    with pytest.raises(WeightError, match=f"as {kind}, expected a plain"):
        source.get(f"{LAYER}.weight")


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (ROWS,), (ROWS, 1)])
def test_a_scale_is_one_number_or_one_for_each_row(tmp_path, shape, scale_type):
    count = max(1, torch.Size(shape).numel())
    scale = torch.linspace(0.1, 2, count).reshape(shape).to(scale_type)
    matrix = open_file(tmp_path, *stored("kijai", scale=scale)).matrix(f"{LAYER}.weight")
    expected = values().float() * scale.float().reshape(-1, 1)
    assert torch.equal(matrix.dequantise(), expected)
    assert torch.equal(matrix.rows(1, 4).dequantise(), expected[1:4])
    assert torch.equal(matrix.to("cpu").dequantise(), expected)
    assert matrix.num_bytes == ROWS * COLUMNS + 4 * ROWS


def test_every_code_decodes_as_torch_casts_it():
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    for kind, dtype in (("F8_E4M3", E4M3), ("F8_E5M2", E5M2)):
        found, expected = Quantised(codes, kind, (16, 16)).dequantise(), codes.view(dtype).float()
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
        scaled = Quantised(codes, kind, (16, 16), torch.full((16,), 0.3)).dequantise()
        assert torch.equal(scaled.nan_to_num(7), (expected * 0.3).nan_to_num(7))


def test_large_matrices_are_decoded_in_chunks_of_whole_rows():
    rows, columns = 7, CHUNK // 3
    draw = torch.Generator().manual_seed(0)
    data = torch.randint(0, 120, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, generator=draw)
    expected = data.view(E4M3).float() * scale[:, None]
    matrix = Quantised(data, "F8_E4M3", (rows, columns), scale)
    assert torch.equal(matrix.dequantise(), expected)
    assert torch.equal(matrix.dequantise(torch.bfloat16), expected.bfloat16())


def test_stacked_layers_keep_the_scale_of_each():
    parts = [
        Linear(Quantised(values(seed=n).view(torch.uint8), "F8_E4M3", (ROWS, COLUMNS), scale), None)
        for n, scale in enumerate([torch.full((ROWS,), 0.5), torch.full((ROWS,), 2.0), None])
    ]
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    joined = stack(parts)
    assert len(joined.matrices) == 2  # the one without a scale apart
    expected = torch.cat([part(x) for part in parts], -1)
    assert torch.equal(joined(x), expected)
    assert torch.equal(joined.rows(3, 12)(x), expected[:, 3:12])


def test_fp8_tensors_that_are_no_matrices_read_as_plain_values(tmp_path):
    """Careless converters cast all of a file."""
    tensors = {name: tensor.to(E4M3) for name, tensor in tensors_of(T2V).items()}
    save_file(tensors, tmp_path / "wan.safetensors")
    spec, traits, source = open_transformer(tmp_path / "wan.safetensors")
    assert (spec, traits.quant) == (T2V, "fp8_e4m3")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            assert torch.equal(source.matrix(name).dequantise(), tensor.float())
        else:
            assert torch.equal(source.get(name).float(), tensor.float())


@pytest.mark.parametrize("form", SCALED)
def test_a_scaled_transformer_opens_under_a_prefix(tmp_path, form):
    prefix, tensors, expected, layers = "model.diffusion_model.", {}, {}, {}
    for name, tensor in tensors_of(T2V).items():
        if name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            layer = prefix + name.removesuffix(".weight")
            tensors[prefix + name] = tensor.to(E4M3)
            end = "scale_weight" if form == "scaled_fp8" else "weight_scale"
            tensors[f"{layer}.{end}"] = SCALE.clone()
            if form == "comfy_quant":
                tensors[f"{layer}.comfy_quant"] = text({"format": "float8_e4m3fn"})
            layers[layer] = {"format": "float8_e4m3fn"}
            expected[name] = tensor.to(E4M3).float() * SCALE
        else:
            tensors[prefix + name] = expected[name] = tensor
    if form == "scaled_fp8":
        tensors[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=E4M3)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(tensors, tmp_path / "wan.safetensors", metadata if form == "header" else None)
    spec, traits, source = open_transformer(tmp_path / "wan.safetensors")
    assert (spec, traits.quant) == (T2V, "fp8_e4m3 scaled")
    assert set(source.names()) == set(expected)
    for name, values_ in expected.items():
        matrix = source.matrix(name)
        found = matrix.dequantise() if isinstance(matrix, Quantised) else matrix
        assert torch.equal(found, values_)


def test_a_scaled_convolution_reads_as_plain_values(tmp_path):
    tensors = tensors_of(T2V)
    patch = tensors["patch_embedding.weight"].to(E4M3)
    scale = torch.rand(128, generator=torch.Generator().manual_seed(1))
    tensors |= {"patch_embedding.weight": patch, "patch_embedding.weight_scale": scale}
    save_file(tensors, tmp_path / "wan.safetensors")
    found = open_transformer(tmp_path / "wan.safetensors")[2].get("patch_embedding.weight")
    assert torch.equal(found, patch.float() * scale.view(-1, 1, 1, 1, 1))


def test_what_no_layer_of_its_kind_scales_is_plain_fp8(tmp_path):
    tensors = stored("scaled_fp8")[0] | {"shared.weight": values(seed=1)}
    source = open_file(tmp_path, tensors | {"text.blocks.0.ffn.0.weight": values(seed=2)})
    assert source.matrix("shared.weight").scale is None
    assert source.matrix("text.blocks.0.ffn.0.weight").scale is None
    assert source.matrix(f"{LAYER}.weight").scale is not None


def test_a_source_without_fp8_comes_back_itself(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    source = open_weights(tmp_path / "x.safetensors")
    assert with_scales(source) is source


REFUSED = {  # id: (tensors beside the matrix, metadata, part of the message)
    "nvfp4": ({f"{LAYER}.comfy_quant": text({"format": "nvfp4"})}, {}, "quantised as nvfp4"),
    "mxfp8": ({f"{LAYER}.comfy_quant": text({"format": "mxfp8"})}, {}, "quantised as mxfp8"),
    "int8": ({f"{LAYER}.comfy_quant": text({"format": "int8_tensorwise"})}, {}, "as int8_tensor"),
    "header": (
        {},
        {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "nvfp4"}}})},
        f"tensor {LAYER}.weight quantised as nvfp4, expected float8_e4m3fn or",
    ),
    "header no JSON": ({}, {"_quantization_metadata": "{"}, "expected a JSON object"),
    "header a list": ({}, {"_quantization_metadata": '{"layers": []}'}, "without layers"),
    "no format": ({f"{LAYER}.comfy_quant": text({})}, {}, "quantised without a format"),
    "no object": ({f"{LAYER}.comfy_quant": text([1])}, {}, "expected a JSON object"),
    "no JSON": ({f"{LAYER}.comfy_quant": torch.ones(9, dtype=torch.uint8)}, {}, "a JSON object"),
    "long": ({f"{LAYER}.comfy_quant": torch.ones(5000, dtype=torch.uint8)}, {}, "5000 bytes"),
    "another type": (
        {f"{LAYER}.comfy_quant": text({"format": "float8_e5m2"})},
        {},
        "of float8_e4m3fn, said to be float8_e5m2",
    ),
    "second scale": ({f"{LAYER}.weight_scale_2": SCALE}, {}, "a second scale as nvfp4 has"),
    "two scales": (
        {f"{LAYER}.weight_scale": SCALE, f"{LAYER}.scale_weight": SCALE + 1},
        {},
        f"tensors {LAYER}.scale_weight and {LAYER}.weight_scale, two scales of one matrix",
    ),
    "scale lost": (
        {"blocks.1.ffn.0.weight": values(), "blocks.1.ffn.0.scale_weight": SCALE},
        {},
        f"tensor {LAYER}.weight in fp8 without a scale, which others of its kind have",
    ),
    "scale of blocks": ({f"{LAYER}.weight_scale": torch.ones(ROWS, 2)}, {}, "one for each of 5"),
    "whole scale": ({f"{LAYER}.weight_scale": torch.tensor(2)}, {}, "of int64 and shape"),
    "scale of no layer": ({"other.scale_weight": SCALE}, {}, "tensor other.weight is missing"),
    "scale of floats": ({f"{LAYER}.bias": torch.ones(2), f"{LAYER}.weight_scale": SCALE,
                         "b.weight": torch.ones(2, 2), "b.scale_weight": SCALE.clone()}, {},
                        "a scale for float32 values"),
    "mark of no layer": ({"b.comfy_quant": text({"format": "float8_e5m2"})}, {}, "b.weight is mis"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_fp8_with_one_scale_is_refused(tmp_path, case):
    more, metadata, words = REFUSED[case]
    tensors = {f"{LAYER}.weight": values(), **more}
    with pytest.raises(WeightError) as caught:
        open_file(tmp_path, tensors, metadata)
    assert words in str(caught.value)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "code"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0xFE)]
)
def test_nan_in_a_matrix_is_refused_when_it_is_read(tmp_path, dtype, code):
    damaged = values(dtype).view(torch.uint8)
    damaged[3, 2] = code
    source = open_file(tmp_path, {f"{LAYER}.weight": damaged.view(dtype)})
    with pytest.raises(WeightError, match=f"tensor {LAYER}.weight with NaN or infinity"):
        source.matrix(f"{LAYER}.weight")
    assert source.info(f"{LAYER}.weight").quant
