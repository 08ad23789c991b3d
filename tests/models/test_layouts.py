"""Transformers in every form: recognised, the same bits, and what cannot be opened says why."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file

from reelpool.errors import MissingTensor, ShapeMismatch, WeightError
from reelpool.models.keys import to_diffusers, transformer_tensors
from reelpool.models.layouts import open_transformer
from reelpool.models.quant import Quantised, plain
from tests.gguf_files import compose
from tests.gguf_files import write as write_gguf
from tests.model_forms import (
    LOSSLESS,
    SPECS,
    T2V,
    TWO_SHARDS,
    config_of,
    diffusers,
    flat_gguf,
    gguf,
    original,
    quantised_gguf,
    shards_alone,
    tensors_of,
)

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NORMAL = "blocks.1.self_attn.k.weight"


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.dtype])


def assert_same(source, tensors):
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        for found in (source.get(name), source.matrix(name)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(bits(found), bits(tensor)), name
        info = source.info(name)
        assert (info.dtype, info.shape, info.quant) == (tensor.dtype, tuple(tensor.shape), "")


@pytest.mark.parametrize("dtype", BITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", SPECS)
def test_every_lossless_form_gives_the_same_bits(tmp_path, kind, dtype):
    spec, variant, image = SPECS[kind]
    tensors = tensors_of(spec, dtype)
    for name, write in LOSSLESS.items():
        (tmp_path / name).mkdir()
        found, traits, source = open_transformer(write(tmp_path / name, tensors, spec))
        assert found == spec, name
        assert (traits.variant, traits.image) == (variant, image), name
        quant = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        assert traits.quant == quant
        assert_same(source, tensors)


PREFIXES = ["model.", "diffusion_model.", "transformer.", "module.", "model.diffusion_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", [str, to_diffusers])
def test_any_prefix_is_taken_off(tmp_path, prefix, naming):
    tensors = tensors_of(T2V)
    named = {prefix + naming(name): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "wan.safetensors")
    assert_same(open_transformer(tmp_path / "wan.safetensors")[2], tensors)


MIXES = {  # as city96's converter makes them: matrices of blocks, values and ffn.2 in other types
    "q8_0": {"ffn.2.weight": "Q8_0", ".q.weight": "Q8_0", ".k.weight": "Q8_0", ".v.weight": "F16"},
    "q4_0": {"ffn.2.weight": "Q4_1", ".q.weight": "Q4_0", ".k.weight": "Q4_0", ".o.weight": "Q4_0"},
    "q5_0": {"ffn.2.weight": "Q5_1", ".q.weight": "Q5_0", ".k.weight": "Q5_0", ".o.weight": "Q5_0"},
}


@pytest.mark.parametrize("kind", MIXES)
def test_a_gguf_of_mixed_types_keeps_each_as_it_is_stored(tmp_path, kind):
    spec, tensors = T2V, tensors_of(T2V)
    path = quantised_gguf(tmp_path / "wan.gguf", tensors, MIXES[kind])
    found, traits, source = open_transformer(path)
    assert (found, traits.quant) == (spec, kind)
    for name, tensor in tensors.items():
        stored = next((k for end, k in MIXES[kind].items() if name.endswith(end)), "")
        matrix = source.matrix(name)
        if stored in ("", "F16"):
            assert torch.equal(matrix, tensor.half() if stored else tensor)
            continue
        assert isinstance(matrix, Quantised)
        assert (matrix.kind, source.info(name).quant, matrix.shape) == (
            stored, stored, tuple(tensor.shape),
        )  # fmt: skip
        error = (matrix.dequantise() - tensor).abs().max() / tensor.abs().max()
        assert error < 0.1  # 4 bits: half of one of 15 steps
        with pytest.raises(WeightError, match="expected a plain"):
            source.get(name)


def test_k_types_stay_as_they_are_stored(tmp_path):
    spec = replace(T2V, num_heads=2, ffn_dim=256)
    tensors = tensors_of(spec)
    kinds = {".q.weight": "Q4_K", ".v.weight": "Q6_K", "ffn.0.weight": "IQ4_XS"}
    blocks, rest = [], {}
    for name, tensor in tensors.items():
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "")
        if kind and name.startswith("blocks."):
            blocks.append((name, kind, compose(kind, *tensor.shape, extremes=False)))
        else:
            rest[name] = tensor.numpy()
    found, _, source = open_transformer(write_gguf(tmp_path / "w.gguf", rest, blocks=blocks))
    assert found == spec
    for name, kind, data in blocks:
        assert source.matrix(name).kind == kind
        assert torch.equal(source.matrix(name).data, torch.from_numpy(data))


def test_small_tensors_in_a_type_of_blocks_come_plain(tmp_path):
    """Some converters quantise whatever has rows of 32."""
    tensors = tensors_of(T2V)
    kinds = {"modulation": "Q8_0", ".bias": "Q8_0", "norm_q.weight": "Q8_0"}
    source = open_transformer(quantised_gguf(tmp_path / "wan.gguf", tensors, kinds))[2]
    for name in ("blocks.0.modulation", "blocks.0.ffn.2.bias", "blocks.1.self_attn.norm_q.weight"):
        info, found = source.info(name), source.get(name)
        assert (info.dtype, info.quant, info.shape) == (torch.float32, "", found.shape)
        assert torch.equal(source.matrix(name), found)
        assert (found - tensors[name]).abs().max() < 0.02 * tensors[name].abs().max()


def test_a_config_beside_tells_the_heads(tmp_path):
    spec = replace(T2V, num_heads=4, head_dim=32, eps=1e-5)
    for write, name in ((gguf, "wan.gguf"), (diffusers, "")):
        folder = tmp_path / write.__name__
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(spec)))
        write(folder, tensors_of(spec), spec)
        assert open_transformer(folder / name)[0] == spec


def test_an_original_config_tells_the_heads(tmp_path):
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 8, "eps": 1e-5, "in_dim": 16}
    original(tmp_path, tensors_of(T2V), T2V)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "wan.safetensors"):
        assert open_transformer(path)[0] == replace(T2V, num_heads=8, head_dim=16, eps=1e-5)


@pytest.mark.parametrize(
    "config", ["{", '{"_class_name": "UMT5"}', '{"_class_name": "WanModel", "dim": 5120}']
)
def test_the_config_of_another_file_is_not_believed(tmp_path, config):
    """A folder of many files has one config.json at most."""
    (tmp_path / "config.json").write_text(config)
    assert open_transformer(gguf(tmp_path, tensors_of(T2V), T2V))[0] == T2V


def test_heads_that_cannot_be_told_are_refused(tmp_path):
    spec = replace(T2V, head_dim=24)
    with pytest.raises(WeightError, match="a width of 24, of which the heads cannot be told"):
        open_transformer(original(tmp_path, tensors_of(spec), spec))


def test_diffusers_names_in_a_folder_need_their_config(tmp_path):
    folder = diffusers(tmp_path, tensors_of(T2V), T2V)
    (folder / "config.json").unlink()
    with pytest.raises(WeightError, match=r"config\.json: found no such file"):
        open_transformer(folder)


def test_an_unused_tensor_of_old_diffusers_files_is_passed_over(tmp_path):
    spec = SPECS["i2v"][0]
    named = {to_diffusers(name): tensor for name, tensor in tensors_of(spec).items()}
    named["blocks.0.attn2.norm_added_q.weight"] = torch.ones(128)
    save_file(named, tmp_path / "wan.safetensors")
    assert open_transformer(tmp_path / "wan.safetensors")[0] == spec


@pytest.mark.parametrize("form", LOSSLESS)
def test_a_missing_tensor_is_named_as_the_file_would(tmp_path, form):
    tensors = tensors_of(T2V)
    del tensors[NORMAL]
    with pytest.raises(MissingTensor) as caught:
        open_transformer(LOSSLESS[form](tmp_path, tensors, T2V))
    own = {"comfyui": "model.diffusion_model." + NORMAL, "nested_pth": "module." + NORMAL}
    own |= {"whole_checkpoint": own["comfyui"], "diffusers": to_diffusers(NORMAL)}
    assert caught.value.tensor == own.get(form, NORMAL)


@pytest.mark.parametrize("form", LOSSLESS)
def test_a_tensor_of_another_shape_is_named(tmp_path, form):
    tensors = {**tensors_of(T2V), NORMAL: torch.zeros(128, 64)}
    with pytest.raises(ShapeMismatch, match=r"\[128, 64\], expected \[128, 128\]"):
        open_transformer(LOSSLESS[form](tmp_path, tensors, T2V))


@pytest.mark.parametrize(
    "name", ["blocks.0.extra.weight", "patch_embedding_2.bias", "spiece_model"]
)
def test_a_tensor_too_many_is_named(tmp_path, name):
    tensors = {**tensors_of(T2V), name: torch.zeros(128)}
    with pytest.raises(WeightError, match=f"found tensor {name}, expected none but"):
        open_transformer(original(tmp_path, tensors, T2V))


@pytest.mark.parametrize("name", transformer_tensors(replace(T2V, num_layers=1)))
def test_a_tensor_without_axes_or_values_is_named(tmp_path, name):
    for number, tensor in enumerate([torch.tensor(1.0), torch.zeros(0, 128), torch.zeros(1)]):
        (tmp_path / str(number)).mkdir()
        path = original(tmp_path / str(number), {**tensors_of(T2V), name: tensor}, T2V)
        with pytest.raises(WeightError, match=f"tensor {name}|values in {name}"):
            open_transformer(path)


def test_modulation_in_another_order_is_refused(tmp_path):
    tensors = tensors_of(T2V)
    tensors["blocks.0.modulation"] = tensors["blocks.0.modulation"][0].T.contiguous()
    with pytest.raises(ShapeMismatch, match=r"modulation has shape \[128, 6\], expected \[1, 6"):
        open_transformer(original(tmp_path, tensors, T2V))


def test_whole_numbers_are_no_weights(tmp_path):
    tensors = tensors_of(T2V)
    tensors[NORMAL] = tensors[NORMAL].to(torch.int8)
    with pytest.raises(WeightError, match=f"tensor {NORMAL} of int8"):
        open_transformer(original(tmp_path, tensors, T2V))


def test_two_transformers_in_one_file_are_refused(tmp_path):
    tensors = tensors_of(T2V)
    both = {f"{part}.{name}": t.clone() for part in "ab" for name, t in tensors.items()}
    save_file(both, tmp_path / "wan.safetensors")
    with pytest.raises(WeightError, match="found two transformers, expected one"):
        open_transformer(tmp_path / "wan.safetensors")


def test_a_missing_shard_is_named(tmp_path):
    first = shards_alone(tmp_path, tensors_of(T2V), T2V)
    (tmp_path / TWO_SHARDS.format(2)).unlink()
    for path in (first, tmp_path):
        with pytest.raises(WeightError, match=r"00002-of-00002\.safetensors: found no such file"):
            open_transformer(path)


def test_flat_shapes_are_the_same_values_in_the_same_order(tmp_path):
    tensors = tensors_of(SPECS["flf2v"][0])
    source = open_transformer(flat_gguf(tmp_path, tensors, T2V))[2]
    assert source.get("img_emb.emb_pos").shape == (1, 10, 16)
    assert source.get("patch_embedding.weight").shape == (128, 36, 1, 2, 2)
    assert_same(source, tensors)


LARGE = """
import resource, sys, time
from pathlib import Path
from reelpool.models.layouts import open_transformer
limit = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = limit(), time.perf_counter()
spec, traits, source = open_transformer(Path(sys.argv[1]))
print(time.perf_counter() - start, (limit() - before) / 1024, spec.num_layers, traits.variant)
"""


def test_opening_a_sparse_file_of_9_gb_reads_kilobytes(tmp_path):
    """Of the 14B model's size and names: header only, the rest a hole."""
    spec = replace(T2V, num_heads=40, ffn_dim=13824, num_layers=40, text_dim=4096, freq_dim=256)
    path = tmp_path / "wan2.1-t2v-14b-Q4_K_M.gguf"
    size = write_sparse(path, spec)
    assert size > 8.5e9
    assert os.stat(path).st_blocks * 512 < 2**24
    command = [sys.executable, "-c", LARGE, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    seconds, megabytes, layers, variant = printed
    assert float(seconds) < 1  # measured 0.01
    assert float(megabytes) < 100  # measured 0: below the peak of the imports
    assert (layers, variant) == ("40", "t2v")


def write_sparse(path, spec):
    """A GGUF whose tensors are holes; Q4_K matrices, Q6_K values."""
    entries, offset = [], 0
    for name, shape in transformer_tensors(spec).items():
        kind, block, width = 0, 1, 4
        if name.startswith("blocks.") and len(shape) == 2:
            kind, block, width = (14, 256, 210) if ".v." in name else (12, 256, 144)
        raw = name.encode()
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries.append(struct.pack("<Q", len(raw)) + raw + dims + struct.pack("<IQ", kind, offset))
        offset += -(-(math.prod(shape) // block * width) // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + offset)
    return path.stat().st_size


def test_quantised_weights_decode_to_what_was_stored(tmp_path):
    tensors = tensors_of(T2V)
    path = quantised_gguf(tmp_path / "wan.gguf", tensors, {".q.weight": "Q8_0"})
    matrix = open_transformer(path)[2].matrix("blocks.0.self_attn.q.weight")
    expected = dequantize(matrix.data.numpy(), GGMLQuantizationType.Q8_0)
    assert torch.equal(plain(matrix, torch.float32), torch.from_numpy(expected))
