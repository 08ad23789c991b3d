"""A LoRA beside the weights equals the same LoRA merged into them, in every form and on any base.

Beside each tolerance stands the largest difference measured (CPU, torch 2.13); velocities are of
the order of 1.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversion
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file

from reelpool.models.lora import Lora, open_lora
from reelpool.models.quant import Quantised
from reelpool.models.spec import TransformerSpec
from tests.gguf_files import compose
from tests.lora_files import (
    ALPHA,
    EVERY,
    FORMS,
    RANK,
    TEXT,
    entries_of,
    merged,
    random_weights,
    runner_of,
    velocity,
    write,
)

WIDE = TransformerSpec(2, 128, 512, 1, 4, 4, text_dim=32, freq_dim=32)  # K types: rows of 256
# of the scales of K types, which gguf-py cannot quantise to: weights come out at about 1/16
SPREAD = {"Q4_K": 1e-4, "Q6_K": 3e-5}


def opened(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return open_lora(path)


def near(ours, expected):
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # measured 4.8e-6


@pytest.fixture(scope="module")
def factors():
    return entries_of(EVERY, differences=False)


@pytest.fixture(scope="module")
def weights():
    return random_weights(EVERY)


@pytest.fixture(scope="module")
def base(weights):
    return runner_of(EVERY, weights)


@pytest.fixture(scope="module")
def expected(weights, factors):
    return velocity(runner_of(EVERY, merged(weights, factors)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_merged_weights(tmp_path, base, expected, factors, form):
    file = opened(tmp_path / "lora.safetensors", write(form, factors))
    report = file.match(EVERY)
    assert set(report.layers) == set(factors)
    assert (report.unmatched, report.share) == ((), 1)
    near(velocity(base, [Lora(file)]), expected)
    assert (expected - velocity(base)).abs().max() > 0.1  # the LoRA does something


def test_every_form_gives_the_same_bits(tmp_path, base, factors):
    results = [
        velocity(base, [Lora(opened(tmp_path / f"{form}.safetensors", write(form, factors)))])
        for form in FORMS
    ]
    assert all(torch.equal(each, results[0]) for each in results[1:])


def test_a_bias_of_the_up_factor_is_scaled_with_it(tmp_path, base, weights):
    """Peft's lora_bias: W x + s · alpha / rank · (up (down x) + b)."""
    target = "blocks.0.cross_attn.v"
    entry = entries_of(EVERY)[target]
    tensors = write("finetrainers", {target: replace(entry, diff_b=None)})
    up = next(name for name in tensors if "lora_B" in name)
    tensors[up.replace(".weight", ".bias")] = 8 * entry.diff_b
    file = opened(tmp_path / "lora.safetensors", tensors)
    both = {target: replace(entry, diff_b=8 * ALPHA / RANK * entry.diff_b)}
    expected = velocity(runner_of(EVERY, merged(weights, both, -0.5)))
    ours = velocity(base, [Lora(file, -0.5)])
    near(ours, expected)
    assert not torch.equal(ours, velocity(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_factors_of_any_stored_type_equal_merged_weights(tmp_path, base, weights, dtype):
    stored = {
        target: replace(entry, down=entry.down.to(dtype), up=entry.up.to(dtype))
        for target, entry in entries_of(EVERY, differences=False).items()
    }
    file = opened(tmp_path / "lora.safetensors", write("comfyui", stored))
    near(velocity(base, [Lora(file)]), velocity(runner_of(EVERY, merged(weights, stored))))


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_torch_file_gives_the_same_bits(tmp_path, base, factors, suffix):
    tensors = write("comfyui", factors)
    torch.save(tensors, tmp_path / f"lora{suffix}")
    files = [open_lora(tmp_path / f"lora{suffix}"), opened(tmp_path / "l.safetensors", tensors)]
    assert torch.equal(*(velocity(base, [Lora(file)]) for file in files))


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("form", ["comfyui", "diffusers", "lycoris"])
def test_differences_of_every_layer_equal_merged_weights(tmp_path, base, weights, form, strength):
    """Norms, biases, modulations, embeddings and whole matrices; diffusers drops some of them."""
    entries = entries_of(EVERY)
    assert {"blocks.0.modulation", "head.modulation", "img_emb.emb_pos"} < set(entries)
    file = opened(tmp_path / "lora.safetensors", write(form, entries))
    assert file.match(EVERY).share == 1
    expected = velocity(runner_of(EVERY, merged(weights, entries, strength)))
    near(velocity(base, [Lora(file, strength)]), expected)


def test_every_single_tensor_is_changed_by_its_entry(tmp_path, base, weights):
    """One entry at a time: none is matched and then forgotten."""
    plain = velocity(base)
    for target, entry in entries_of(EVERY).items():
        if not target.startswith("blocks.0"):
            continue
        for field in ("down", "diff", "diff_b"):
            if getattr(entry, field) is None:
                continue
            fields = {"down", "up", "diff", "diff_b"} - {field, *(["up"] * (field == "down"))}
            alone = {target: replace(entry, **dict.fromkeys(fields))}
            file = opened(tmp_path / "lora.safetensors", write("comfyui", alone))
            result = velocity(base, [Lora(file)])
            assert not torch.equal(result, plain) or target.endswith(("k.bias",)), (target, field)
            near(result, velocity(runner_of(EVERY, merged(weights, alone))))


def bases():
    """The same geometry with its block matrices in several kinds."""
    weights = random_weights(WIDE)
    names = [n for n, w in weights.items() if n.startswith("blocks.") and w.ndim == 2]

    def gguf(kind, name, seed):
        shape = tuple(weights[name].shape)
        if kind in SPREAD:
            data = compose(kind, *shape, seed, extremes=False, spread=SPREAD[kind])
        else:
            data = quantize(weights[name].numpy(), GGMLQuantizationType[kind])
        return Quantised(torch.from_numpy(data).clone(), kind, shape)

    def fp8(kind, dtype, name, scaled):
        scale = weights[name].abs().amax(1) / 300 if scaled else None
        values = weights[name] / (1 if scale is None else scale[:, None])
        data = values.to(dtype).view(torch.uint8)
        return Quantised(data, kind, tuple(weights[name].shape), scale)

    def mixed(name, seed):  # as a Q4_K_M file has them
        return gguf("Q6_K" if ".v." in name or "ffn.2" in name else "Q4_K", name, seed)

    kinds = {
        "Q8_0": lambda name, seed: gguf("Q8_0", name, seed),
        "Q4_0": lambda name, seed: gguf("Q4_0", name, seed),
        "Q4_K_M": mixed,
        "e4m3": lambda name, seed: fp8("F8_E4M3", torch.float8_e4m3fn, name, False),
        "e4m3-scaled": lambda name, seed: fp8("F8_E4M3", torch.float8_e4m3fn, name, True),
        "e5m2-scaled": lambda name, seed: fp8("F8_E5M2", torch.float8_e5m2, name, True),
    }
    return weights, names, kinds


@pytest.mark.parametrize("kind", bases()[2])
def test_quantised_bases_equal_their_decoded_weights_merged(tmp_path, kind):
    weights, names, kinds = bases()
    stored = weights | {name: kinds[kind](name, seed) for seed, name in enumerate(names)}
    entries = entries_of(WIDE)
    file = opened(tmp_path / "lora.safetensors", write("comfyui", entries))
    runner = runner_of(WIDE, stored)
    expected = velocity(runner_of(WIDE, merged(stored, entries)))
    near(velocity(runner, [Lora(file)]), expected)
    assert (velocity(runner) - expected).abs().max() > 0.1
    assert all(
        isinstance(matrix, Quantised)
        for name in ("qkv", "cross_kv", "out", "ffn_out")
        for matrix in getattr(runner._blocks[0], name).matrices
    )


def test_several_at_once_equal_all_merged_one_after_the_other(tmp_path, base, weights):
    total, loras = weights, []
    for seed, strength in enumerate((0.8, -0.4, 0.5)):
        entries = entries_of(EVERY, seed=seed + 20)
        tensors = write("comfyui", entries)
        loras.append(Lora(opened(tmp_path / f"{seed}.safetensors", tensors), strength))
        total = merged(total, entries, strength)
    near(velocity(base, loras), velocity(runner_of(EVERY, total)))
    assert torch.equal(velocity(base, loras), velocity(base, loras))
    near(velocity(base, loras[::-1]), velocity(base, loras))


def test_bfloat16_is_as_near_to_the_truth_as_merged_weights(tmp_path, base, weights):
    entries = entries_of(EVERY)
    file = opened(tmp_path / "lora.safetensors", write("comfyui", entries))
    both = merged(weights, entries)
    truth = velocity(runner_of(EVERY, both))
    ours = velocity(runner_of(EVERY, weights, "bfloat16"), [Lora(file)])
    theirs = velocity(runner_of(EVERY, both, "bfloat16"))
    assert ours.dtype == torch.bfloat16
    errors = [(x.float() - truth).square().mean().sqrt() / truth.std() for x in (ours, theirs)]
    assert errors[0] < 0.02  # measured 0.0064
    assert errors[0] < 1.5 * errors[1]  # measured 1.13


def test_a_text_lora_on_an_image_model_leaves_its_image_layers(tmp_path, base, weights):
    entries = {
        target: entry
        for target, entry in entries_of(EVERY, differences=False).items()
        if "img" not in target and not target.startswith(("fps", "patch"))
    }
    file = opened(tmp_path / "lora.safetensors", write("musubi", entries))
    assert file.match(EVERY).share == 1
    near(velocity(base, [Lora(file)]), velocity(runner_of(EVERY, merged(weights, entries))))


@pytest.mark.parametrize(
    ("form", "convert"),
    [
        ("comfyui", conversion._convert_non_diffusers_wan_lora_to_diffusers),
        ("musubi", conversion._convert_musubi_wan_lora_to_diffusers),
    ],
)
def test_what_diffusers_converts_means_the_same(tmp_path, form, convert):
    entries = {
        target: entry
        for target, entry in entries_of(TEXT, differences=False).items()
        if target.startswith("blocks.")
    }
    files = [opened(tmp_path / "ours.safetensors", write(form, entries))]
    # it scales in place, so this comes second
    files.append(opened(tmp_path / "theirs.safetensors", convert(write(form, entries))))
    runner = runner_of(TEXT, random_weights(TEXT))
    ours, theirs = (velocity(runner, [Lora(file)]) for file in files)
    near(ours, theirs)
    assert not torch.equal(ours, velocity(runner))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 3, "r": RANK}, 3 / RANK),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / RANK**0.5),
        ({"lora_alpha": 3, "alpha_pattern": {"ffn.net.2": 1}}, 3 / RANK),
        ({}, 1),
    ],
)
@pytest.mark.parametrize("place", ["adapter_config.json", "header"])
def test_scales_are_taken_from_where_peft_and_diffusers_write_them(
    tmp_path, base, weights, settings, scale, place
):
    entries = entries_of(EVERY, differences=False)
    tensors = {
        name.replace("transformer.", "base_model.model."): tensor
        for name, tensor in write("diffusers", entries).items()
    }
    if place == "header":
        said = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
        file = open_lora(tmp_path / "x.safetensors")
    else:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        file = open_lora(tmp_path)
    exact = {
        target: replace(entry, up=entry.up * (1 / 3 if patterned(target, settings) else 1))
        for target, entry in entries.items()
    }
    # `merged` multiplies by ALPHA / RANK, which this form has in its up factors already
    expected = velocity(runner_of(EVERY, merged(weights, exact, scale)))
    near(velocity(base, [Lora(file)]), expected)


def patterned(target, settings):
    return "alpha_pattern" in settings and target.endswith("ffn.2")
