"""Quantised files: every value as gguf-py makes it, the same from any form, all or nothing."""

from __future__ import annotations

import hashlib
import math
import shutil
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from reelpool.errors import ConfigError, WeightError
from reelpool.models import quantise, quantise_plan
from reelpool.models.files import open_model
from reelpool.models.layouts import open_transformer
from reelpool.models.quant import Quantised, plain
from reelpool.models.quantise import write_quantised
from reelpool.models.quantise_files import Stored, write_safetensors
from reelpool.models.quantise_plan import plan_quantised
from reelpool.models.quantise_rules import TARGETS
from reelpool.models.registry import DEMO_FOLDER
from reelpool.models.spec import LatentShape
from reelpool.models.weights import SafetensorsSource
from reelpool.runtime.block_runner import BlockRunner
from tests.model_forms import LOSSLESS, SPECS, T2V, quantised_gguf, tensors_of
from tests.quantised_files import out_of, run, wan
from tests.tiny_models import FLOAT32, latents_of, prompt_rows, velocity

GGUF = [name for name, target in TARGETS.items() if target.is_gguf]
FORMS = [name for name in LOSSLESS if name not in ("gguf", "flat_gguf")]
CPU = torch.device("cpu")
Q_WEIGHT, DOWN, OUTER = "blocks.1.self_attn.q.weight", "blocks.0.ffn.2.weight", "head.head.weight"
# as the issue has it: (matrices, the second of a feed-forward layer)
MIX = {
    "q8_0": ("Q8_0", "Q8_0"), "q5_1": ("Q5_1", "Q5_1"), "q5_0": ("Q5_0", "Q5_1"),
    "q4_1": ("Q4_1", "Q4_1"), "q4_0": ("Q4_0", "Q4_1"),
}  # fmt: skip


def expected_type(kind, name, tensor, dtype):
    matrices, down = MIX[kind]
    if tensor.ndim != 2:
        return "F32"
    if not name.startswith("blocks."):
        return "BF16" if dtype == torch.bfloat16 else "F16"
    return down if name.endswith("ffn.2.weight") else matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", GGUF)
def test_every_tensor_is_what_gguf_py_makes_of_it(tmp_path, kind, dtype):
    path, tensors = wan(tmp_path, dtype)
    out = out_of(tmp_path, kind)
    report = run(path, out, kind)
    written = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    spec, traits, source = open_transformer(out)
    assert (spec, traits.quant) == (T2V, kind)
    assert list(written) == list(tensors) == list(source.names())
    for name, tensor in tensors.items():
        number = GGMLQuantizationType[expected_type(kind, name, tensor, dtype)]
        stored = quantize(tensor.float().numpy(), number)
        assert written[name].tensor_type == number, name
        assert written[name].data.tobytes() == stored.tobytes(), name
        found = plain(source.matrix(name), torch.float32).float().numpy()
        assert np.array_equal(found, dequantize(stored, number).reshape(tensor.shape)), name
    assert report.bytes_before == sum(tensor.nbytes for tensor in tensors.values())
    assert report.bytes_after == sum(tensor.n_bytes for tensor in written.values())
    assert sum(report.bytes_by_type.values()) == report.bytes_after
    assert sum(report.tensors_by_type.values()) == len(tensors)


@pytest.mark.parametrize(
    ("kind", "number"), [("q8_0", 7), ("q5_1", 9), ("q5_0", 8), ("q4_1", 3), ("q4_0", 2)]
)
def test_metadata_says_wan_and_the_type(tmp_path, kind, number):
    out = out_of(tmp_path, kind)
    run(wan(tmp_path)[0], out, kind)
    fields = GGUFReader(out).fields
    assert fields["general.architecture"].contents() == "wan"
    assert fields["general.file_type"].contents() == number
    assert fields["general.quantization_version"].contents() == 2


def test_fp8_is_comfyui_s_scaled_form(tmp_path):
    path, tensors = wan(tmp_path)
    out = out_of(tmp_path, "fp8")
    run(path, out, "fp8")
    file = load_file(out)  # safetensors' own reader: no gaps, every byte named
    assert (file["scaled_fp8"].dtype, file["scaled_fp8"].numel()) == (torch.float8_e4m3fn, 2)
    spec, traits, source = open_transformer(out)
    assert (spec, traits.quant) == (T2V, "fp8_e4m3 scaled")
    matrices = [name for name, tensor in tensors.items() if "blocks." in name and tensor.ndim == 2]
    scales = {f"{name.removesuffix('.weight')}.scale_weight" for name in matrices}
    assert set(file) == {*tensors, *scales, "scaled_fp8"}
    for name, tensor in tensors.items():
        if name not in matrices:
            wanted = torch.bfloat16 if tensor.ndim == 2 else torch.float32
            assert file[name].dtype == wanted, name
            assert torch.equal(file[name].float(), tensor.float()), name
            continue
        scale = file[f"{name.removesuffix('.weight')}.scale_weight"]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert scale == np.float32(tensor.abs().max().item() / 448)
        codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(file[name].view(torch.uint8), codes.view(torch.uint8))
        assert file[name].float().abs().max() == 448
        found = source.matrix(name)
        assert isinstance(found, Quantised)
        assert torch.equal(found.dequantise(), codes.float() * scale)


@pytest.mark.parametrize("value", [0.0, 1e-44, 9.1e-43, 1e-31])
def test_fp8_of_next_to_nothing_is_zero(tmp_path, value):
    """Where largest / 448 is not a normal number it is rounded by half, and codes became NaN."""
    path, _ = wan(
        tmp_path, torch.float32, blocks__1__self_attn__q__weight=torch.full((128, 128), value)
    )
    run(path, out_of(tmp_path, "fp8"), "fp8")
    found = open_transformer(out_of(tmp_path, "fp8"))[2].matrix(Q_WEIGHT)
    assert not found.dequantise().any()


def test_tensors_of_a_safetensors_file_are_aligned_and_without_gaps(tmp_path):
    stored = [Stored("a", "F8_E4M3", (3, 5)), Stored("b", "F32", ()), Stored("c", "BF16", (1, 3))]
    values = [np.arange(tensor.num_bytes, dtype=np.uint8) for tensor in stored]
    parts = [(tensor.name, value) for tensor, value in zip(stored, values, strict=True)]
    write_safetensors(tmp_path / "a.safetensors", stored, parts)
    file = SafetensorsSource(tmp_path / "a.safetensors")
    assert all(file.info(tensor.name).start % file.info(tensor.name).dtype.itemsize == 0
               for tensor in stored)  # fmt: skip
    read = load_file(tmp_path / "a.safetensors")
    for tensor, value in zip(stored, values, strict=True):
        assert read[tensor.name].shape == tensor.shape
        assert read[tensor.name].reshape(-1).view(torch.uint8).tolist() == value.tolist()


@pytest.mark.parametrize("kind", ["q4_0", "fp8"])
def test_every_form_of_the_source_gives_the_same_file(tmp_path, kind):
    tensors, digests = tensors_of(T2V, torch.bfloat16), set()
    for form in FORMS:
        folder = tmp_path / form
        folder.mkdir()
        run(LOSSLESS[form](folder, tensors, T2V), out_of(tmp_path, kind), kind)
        digests.add(hashlib.sha256(out_of(tmp_path, kind).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["q5_0", "fp8"])
@pytest.mark.parametrize("variant", SPECS)
def test_every_variant_opens_again_as_what_it_was(tmp_path, variant, kind):
    spec, name, image = SPECS[variant]
    run(wan(tmp_path, spec=spec)[0], out_of(tmp_path, kind), kind)
    found, traits, _ = open_transformer(out_of(tmp_path, kind))
    assert (found, traits.variant, traits.image) == (spec, name, image)


# largest relative error of a velocity, and the demo's measured one
VELOCITY = {"q8_0": (0.02, 0.006), "q5_1": (0.1, 0.043), "q5_0": (0.1, 0.049),
            "q4_1": (0.2, 0.086), "q4_0": (0.2, 0.099), "fp8": (0.07, 0.032)}  # fmt: skip


def test_velocities_stay_near_and_in_order(tmp_path):
    folder = DEMO_FOLDER / "transformer"
    shape = LatentShape(16, 5, 8, 8)
    inputs = latents_of(shape), torch.full((5,), 500.0), prompt_rows(7, 128)

    def answer(path):
        spec, _, source = open_transformer(path)
        with torch.inference_mode():
            return velocity(BlockRunner(spec, source, FLOAT32, CPU), *inputs)

    wanted, errors = answer(folder), {}
    for kind, (limit, _) in VELOCITY.items():
        run(folder, out_of(tmp_path, kind), kind)
        errors[kind] = ((answer(out_of(tmp_path, kind)) - wanted).norm() / wanted.norm()).item()
        assert 1e-4 < errors[kind] < limit, kind
    assert errors["q8_0"] < errors["fp8"] < errors["q5_0"] < errors["q4_0"]


def test_stripes_and_pieces_change_no_byte(tmp_path, monkeypatch):
    path, _ = wan(tmp_path)
    for kind in ("q5_1", "fp8"):
        run(path, out_of(tmp_path, kind), kind)
        whole = out_of(tmp_path, kind).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(quantise, "STRIPE", 1000)  # 7 rows of 128
            patch.setattr(quantise, "PIECE", 300)
            patch.setattr(torch, "get_num_threads", lambda: 3)
            run(path, out_of(tmp_path, kind), kind)
        assert out_of(tmp_path, kind).read_bytes() == whole


@pytest.mark.parametrize("kind", ["q4_0", "fp8"])
def test_memory_holds_few_tensors_of_many(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(quantise, "STRIPE", 2**13)
    spec = replace(T2V, num_layers=24)
    path, _ = wan(tmp_path, spec=spec)
    work = plan_quantised(path, out_of(tmp_path, kind), TARGETS[kind])
    tracemalloc.start()
    report = write_quantised(work)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.num_bytes for tensor in work.tensors)  # time_projection: 6 times a matrix
    assert peak < 3 * largest + 2**19 < report.bytes_after / 2


def test_blocks_of_the_smallest_numbers_decode_to_zero(tmp_path):
    """gguf-py divides by almost 0 there, and numpy would warn: warnings are errors here."""
    tiny = torch.full((128, 128), 3e-42)
    path, _ = wan(tmp_path, torch.float32, blocks__1__self_attn__q__weight=tiny)
    for kind in GGUF:
        run(path, out_of(tmp_path, kind), kind)
        assert not open_transformer(out_of(tmp_path, kind))[2].matrix(Q_WEIGHT).dequantise().any()


def test_progress_counts_the_blocks(tmp_path):
    seen = []
    run(wan(tmp_path)[0], out_of(tmp_path, "q8_0"), "q8_0", lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


def test_a_quantised_source_is_decoded_and_the_user_is_told(tmp_path):
    _, tensors = wan(tmp_path)
    ends = [f".{layer}.weight" for layer in ("q", "k", "v", "o", "ffn.0", "ffn.2")]
    path = quantised_gguf(tmp_path / "wan-q8.gguf", tensors, dict.fromkeys(ends, "Q8_0"))
    work = plan_quantised(path, out_of(tmp_path, "q4_1"), TARGETS["q4_1"])
    assert any("q8_0" in notice and "16-bit file" in notice for notice in work.notices)
    write_quantised(work)
    number, eight = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
    once = dequantize(quantize(tensors[Q_WEIGHT].float().numpy(), eight), eight)
    found = open_transformer(work.out)[2].matrix(Q_WEIGHT)
    assert found.data.numpy().tobytes() == quantize(once, number).tobytes()


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_an_fp8_source_is_decoded_with_its_scales(tmp_path, kind):
    run(wan(tmp_path)[0], out_of(tmp_path, "fp8"), "fp8")
    source = open_transformer(out_of(tmp_path, "fp8"))[2]
    number = GGMLQuantizationType[MIX[kind][0]]
    wanted = quantize(source.matrix(Q_WEIGHT).dequantise().numpy(), number)
    work = plan_quantised(out_of(tmp_path, "fp8"), out_of(tmp_path, kind), TARGETS[kind])
    assert any("fp8_e4m3 scaled" in notice for notice in work.notices)
    write_quantised(work)
    found = open_transformer(work.out)[2]
    assert found.matrix(Q_WEIGHT).data.numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("value", "dtype", "kind", "words"),
    [
        (math.nan, torch.float32, "q8_0", "NaN"),
        (-math.inf, torch.bfloat16, "fp8", "infinity"),
        (1e6, torch.bfloat16, "q5_1", "values up to 999424, expected at most 65504"),
    ],
)
def test_numbers_that_cannot_be_stored_leave_everything_as_it_was(
    tmp_path, value, dtype, kind, words
):
    bad = torch.zeros(128, 128, dtype=dtype)
    bad[77, 5] = value
    path, _ = wan(tmp_path, dtype, blocks__1__self_attn__q__weight=bad)
    out = out_of(tmp_path, kind)
    out.write_bytes(b"old")
    before = set(tmp_path.iterdir())
    with pytest.raises(WeightError, match=f"{Q_WEIGHT} with.*{words}"):
        run(path, out, kind)
    assert out.read_bytes() == b"old"
    assert set(tmp_path.iterdir()) == before


def test_large_numbers_are_no_matter_to_a_scale_in_float32(tmp_path):
    large = torch.full((128, 128), 1e6)
    path, _ = wan(tmp_path, torch.float32, blocks__1__self_attn__q__weight=large)
    run(path, out_of(tmp_path, "fp8"), "fp8")
    found = open_transformer(out_of(tmp_path, "fp8"))[2].matrix(Q_WEIGHT).dequantise()
    assert torch.allclose(found, large)


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path, _ = wan(tmp_path)
    out = out_of(tmp_path, "q8_0")
    out.write_bytes(b"old")
    contents = []
    run(path, out, "q8_0", lambda *_: contents.append(out.read_bytes()))
    assert contents == [b"old", b"old"]
    assert out.read_bytes()[:4] == b"GGUF"
    assert {file.name for file in tmp_path.iterdir()} == {path.name, out.name}


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def press_ctrl_c(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(wan(tmp_path)[0], out_of(tmp_path, "fp8"), "fp8", press_ctrl_c)
    assert [file.name for file in tmp_path.iterdir()] == ["wan.safetensors"]


def test_a_full_disk_is_found_before_and_during_the_work(tmp_path, monkeypatch):
    path, _ = wan(tmp_path)
    out = out_of(tmp_path, "q8_0")
    work = plan_quantised(path, out, TARGETS["q8_0"])
    free = SimpleNamespace(free=work.num_bytes - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(ConfigError, match=r"MiB are needed, .* are free; make room"):
            plan_quantised(path, out, TARGETS["q8_0"])

    def fill(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="the disk is full"):
        write_quantised(work, fill)
    assert [file.name for file in tmp_path.iterdir()] == ["wan.safetensors"]


def test_a_model_folder_takes_the_file_in_place_of_its_transformer(tmp_path):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "demo", ignore=lambda *_: {"__pycache__"})
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    run(weights, weights.with_suffix(".gguf"), "q8_0")
    weights.unlink()
    assert open_model(str(folder)).spec.quant == "q8_0"
    assert quantise_plan.CONFIG in {file.name for file in (folder / "transformer").iterdir()}
