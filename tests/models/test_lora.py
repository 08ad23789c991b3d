"""LoRA files: what is applied, what is not and why, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import WeightError
from reelpool.models.lora import Lora, open_lora
from reelpool.models.lora_weights import load_change, with_changes
from reelpool.models.spec import TransformerSpec
from reelpool.models.wan_weights import load_block
from tests.lora_files import (
    EVERY,
    RANK,
    TEXT,
    Source,
    entries_of,
    random_weights,
    write,
)

DIM = TEXT.dim
ROOT = "diffusion_model.blocks.0."
DRAW = torch.Generator().manual_seed(3)


def noise(*shape):
    return torch.randn(shape, generator=DRAW)


def pair(layer="self_attn.q", rows=DIM, columns=DIM, rank=RANK, root=ROOT):
    return {
        f"{root}{layer}.lora_A.weight": noise(rank, columns),
        f"{root}{layer}.lora_B.weight": noise(rows, rank),
    }


GOOD = pair("cross_attn.o")  # an entry that fits, beside those that do not


@pytest.fixture
def opened(tmp_path):
    def open_tensors(tensors, metadata=None):
        save_file(tensors, tmp_path / "lora.safetensors", metadata)
        return open_lora(tmp_path / "lora.safetensors")

    return open_tensors


# Entries beside a good one: the reason in the report, and how many entries it is given for.
MISFITS = {
    "other width of one layer": (
        pair(rows=64, columns=64),
        "factors for a layer of [64, 64], and this one is [32, 32]",
        2,
    ),
    "other rows": (pair("ffn.0", rows=48), "a layer of [48, 32], and this one is [64, 32]", 2),
    "block out of range": (
        pair(root="diffusion_model.blocks.2."),
        "a block that this model of 2 blocks does not have",
        2,
    ),
    "image layer": (pair("cross_attn.k_img"), "an image layer, and this model takes no image", 2),
    "image embedding": (
        pair("img_emb.proj.1", root="diffusion_model."),
        "an image layer, and this model takes no image",
        2,
    ),
    "frame rate": (
        pair("fps_projection.0", root="diffusion_model."),
        "a layer that this model does not have, fps_projection.0",
        2,
    ),
    "transposed factors": (
        {
            ROOT + "ffn.0.lora_A.weight": noise(32, RANK),
            ROOT + "ffn.0.lora_B.weight": noise(RANK, 64),
        },
        "factors the wrong way round: down [32, 4] and up [4, 64] for a layer of [64, 32]",
        2,
    ),
    "ranks differ": (
        pair() | {ROOT + "self_attn.q.lora_B.weight": noise(DIM, 8)},
        "factors of different rank: down [4, 32] and up [32, 8]",
        2,
    ),
    "whole numbers": (
        {name: tensor.to(torch.int8) for name, tensor in pair().items()},
        "of type int8, not floating point",
        2,
    ),
    "whole differences": (
        {ROOT + "ffn.0.diff": noise(64, 32).to(torch.int8)},
        "of type int8, not floating point",
        1,
    ),
    "rank 0": (pair(rank=0), "factors for a layer of [32, 32], and", 2),
    "factors are vectors": (
        {ROOT + "ffn.0.lora_A.weight": noise(32), ROOT + "ffn.0.lora_B.weight": noise(64)},
        "factors that are no matrices: down [32] and up [64]",
        2,
    ),
    "no up": (
        {ROOT + "ffn.2.lora_A.weight": noise(RANK, 64)},
        "a down factor without its up factor",
        1,
    ),
    "no down": (
        {ROOT + "ffn.2.lora_B.weight": noise(32, RANK)},
        "an up factor without its down",
        1,
    ),
    "alpha only": (
        {ROOT + "ffn.2.alpha": torch.tensor(4.0)},
        "an alpha or a bias without factors",
        1,
    ),
    "alpha is NaN": (
        pair() | {ROOT + "self_attn.q.alpha": torch.tensor(float("nan"))},
        "an alpha that is no finite number",
        3,
    ),
    "alpha is a vector": (
        pair() | {ROOT + "self_attn.q.alpha": noise(3)},
        "an alpha that is no finite number",
        3,
    ),
    "factors of a norm": (
        pair("self_attn.norm_q"),
        "low-rank factors of something that is no matrix",
        2,
    ),
    "factors of a modulation": (
        pair("modulation"),
        "low-rank factors of something that is no matrix",
        2,
    ),
    "bias of the up factor": (
        pair() | {ROOT + "self_attn.q.lora_B.bias": noise(31)},
        "a bias of [31], this layer has 32",
        3,
    ),
    "difference of another shape": (
        {ROOT + "ffn.0.diff": noise(32, 64)},
        "a difference of shape [32, 64], this layer has [64, 32]",
        1,
    ),
    "bias of another shape": (
        {ROOT + "ffn.0.diff_b": noise(32)},
        "a difference of shape [32], this layer has [64]",
        1,
    ),
    "bias of what has none": (
        {ROOT + "self_attn.norm_q.diff_b": noise(32)},
        "a difference of a bias, of which this layer has none",
        1,
    ),
    "patches of an image model": (
        {"diffusion_model.patch_embedding.diff": noise(32, 8, 1, 2, 2)},
        "a difference of shape [32, 8, 1, 2, 2], this layer has [32, 4, 1, 2, 2]",
        1,
    ),
    "modulation of another model": (
        {ROOT + "diff_m": noise(1, 6, 48)},
        "a difference of shape [1, 6, 48], this layer has [1, 6, 32]",
        1,
    ),
    "the same layer twice": (
        pair("cross_attn.o", root="blocks.0."),
        "a second entry for the same layer",
        2,
    ),
    "text encoder": (
        pair("self_attn.q_proj", root="lora_te_text_model.encoder.layers.0."),
        "a layer of a text encoder",
        2,
    ),
    "VACE": (pair(root="vace_blocks.0."), "a layer of VACE's control branch", 2),
    "whole weights": ({"blocks.0.self_attn.k.weight": noise(DIM, DIM)}, "no entry of a LoRA", 1),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_reported_with_its_reason(opened, name):
    tensors, reason, count = MISFITS[name]
    report = opened(GOOD | tensors).match(TEXT)
    assert set(report.layers) == {"blocks.0.cross_attn.o"}
    assert {entry.key for entry in report.unmatched} <= set(GOOD | tensors)
    assert len(report.unmatched) == count
    assert all(reason in entry.reason for entry in report.unmatched)
    assert report.share == pytest.approx(2 / (2 + count))
    applied, *rest = report.describe()
    assert applied.endswith(f": 2 of {2 + count} entries applied, to 1 layers")
    assert any(f"not applied: {n} x " in line for line in rest for n in (1, count))


def scaled(factor):
    """For the same model, `factor` times as wide."""
    return replace(TEXT, head_dim=TEXT.head_dim * factor, ffn_dim=TEXT.ffn_dim * factor)


# Files of which nothing fits, and what the one sentence says of them.
STRANGERS = {
    "other width": (
        write("musubi", entries_of(scaled(2), differences=False)),
        "found entries for a model of width 64, expected a LoRA for a Wan model of width 32",
    ),
    "other width, diffusers": (
        write("diffusers", entries_of(scaled(3), differences=False)),
        "found entries for a model of width 96",
    ),
    "other width but for the head's bias": (
        pair(rows=64, columns=64) | {"diffusion_model.head.head.diff_b": noise(16)},
        "found entries for a model of width 64",
    ),
    "14B": (
        {
            "lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.zeros(1, 5120),
            "lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.zeros(5120, 1),
        },
        "found entries for a model of width 5120 (14B), expected",
    ),
    "whole differences of another width": (
        {ROOT + "self_attn.q.diff": noise(48, 48)},
        "found entries for a model of width 48",
    ),
    "Stable Diffusion": (
        {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": noise(4, 4)},
        "no entry that fits, 1 of 1 being a layer of Stable Diffusion (lora_unet_down_blocks_0",
    ),
    "Flux": (
        pair("attn.to_q", root="transformer.single_transformer_blocks.0."),
        "2 of 2 being a layer of Flux or HunyuanVideo",
    ),
    "Hunyuan": (
        pair("img_attn.qkv", root="diffusion_model.double_blocks.0."),
        "2 of 2 being a layer of Flux or HunyuanVideo",
    ),
    "text encoder only": (
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": noise(4, 4)},
        "1 of 1 being a layer of a text encoder",
    ),
    "image layers only": (pair("cross_attn.v_img"), "2 of 2 being an image layer, and this model"),
    "alphas only": (
        {ROOT + "ffn.0.alpha": torch.tensor(1.0)},
        "1 of 1 being an alpha or a bias without factors",
    ),
    "whole model": (
        {"blocks.0.self_attn.q.weight": noise(DIM, DIM)},
        "1 of 1 being no entry of a LoRA (blocks.0.self_attn.q.weight)",
    ),
    "nothing": ({}, "found no tensors, expected a LoRA for a Wan model of width 32"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_lora_of_which_nothing_fits_is_refused(opened, tmp_path, name):
    tensors, found = STRANGERS[name]
    file = opened(tensors)
    with pytest.raises(WeightError) as caught:
        file.match(TEXT)
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path / 'lora.safetensors'}: found ")
    assert found in sentence
    assert "; " in sentence


# Kinds that a side branch cannot stand for, refused on opening though other entries fit.
REFUSED = {
    "dora_scale": "DoRA entries, which rescale the merged weight",
    "lora_magnitude_vector.default.weight": "DoRA entries",
    "set_weight": "entries that replace or reshape a weight",
    "reshape_weight": "entries that replace or reshape a weight",
    "hada_w1_a": "LoHa entries (hada_*)",
    "lokr_w1": "LoKr entries (lokr_*)",
    "lora_mid.weight": "entries with a middle factor (lora_mid)",
    "oft_blocks": "OFT entries",
    "lora_A.scale_weight": "fp8 factors that have scales of their own",
    "lora_up.weight_scale": "fp8 factors that have scales of their own",
}


@pytest.mark.parametrize("ending", REFUSED)
def test_kinds_that_are_no_lora_are_refused(opened, ending):
    with pytest.raises(WeightError, match="expected low-rank factors; ") as caught:
        opened(GOOD | {ROOT + f"self_attn.q.{ending}": noise(4, 4)})
    assert REFUSED[ending] in str(caught.value)
    assert f"such as {ROOT}self_attn.q.{ending}" in str(caught.value)


@pytest.mark.parametrize("entry", ["lora_A.weight", "lora_B.weight", "diff", "diff_b"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused(opened, entry, value):
    shapes = {"diff": (DIM, DIM), "diff_b": (DIM,)}
    tensors = pair() | {ROOT + f"self_attn.q.{end}": noise(*shape) for end, shape in shapes.items()}
    bad = tensors[ROOT + f"self_attn.q.{entry}"].view(-1)
    bad[len(bad) // 2] = value
    file = opened(tensors)
    block = load_block(TEXT, Source(random_weights(TEXT)), 0, torch.float32)
    with pytest.raises(WeightError, match=f"tensor {ROOT}self_attn.q.{entry} with NaN or infinity"):
        load_change(file, file.match(TEXT), "blocks.0", block)


def test_a_lora_for_both_experts_is_refused(opened):
    """On each expert, half of the entries would be the other's."""
    with pytest.raises(WeightError, match=r"for both experts, such as .*; split it"):
        opened(pair(root="transformer.blocks.0.") | pair(root="transformer_2.blocks.0."))


def test_a_lora_for_the_low_noise_expert_says_so(opened):
    words = "for the low-noise expert: FILE:0,1"
    low = opened(pair(root="transformer_2.blocks.0.")).match(TEXT)
    assert words in "\n".join(low.describe())
    assert words not in "\n".join(opened(pair()).match(TEXT).describe())


def test_second_entries_are_one_line_of_the_report(opened):
    twice = pair("self_attn.q") | pair("self_attn.k")
    again = {name.removeprefix("diffusion_model."): t.clone() for name, t in twice.items()}
    _, *lines = opened(twice | again).match(TEXT).describe()
    (line,) = lines
    assert line.startswith("not applied: 4 x a second entry for the same layer (")


def test_a_path_without_a_file_is_refused_in_the_words_of_loras(tmp_path):
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path, tmp_path / "gone.safetensors"):
        with pytest.raises(WeightError, match="LoRA") as caught:
            open_lora(path)
        assert "model's weights" not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(WeightError, match="no such file"):
        open_lora(tmp_path / "gone.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(WeightError, match="found "):
        open_lora(tmp_path / "cut.safetensors")


def test_matching_reads_no_factors(opened, monkeypatch):
    file = opened(write("musubi", entries_of(EVERY, differences=False)))
    read, get = [], file.source.get
    monkeypatch.setattr(file.source, "get", lambda name: read.append(name) or get(name))
    assert file.match(EVERY).share == 1
    assert read
    assert all(name.endswith(".alpha") for name in read)


def test_a_lora_of_an_image_model_applies_to_a_text_model_but_for_its_image_layers(opened):
    image = replace(EVERY, fps_embedding=False, in_channels=4)
    report = opened(write("comfyui", entries_of(image))).match(TEXT)
    assert set(report.layers) == set(entries_of(TEXT))
    assert {entry.reason for entry in report.unmatched} == {
        "an image layer, and this model takes no image features"
    }
    assert 0.5 < report.share < 1


def said(part="transformer", **settings):
    """Metadata as diffusers writes them."""
    own = {f"{part}.{name}": value for name, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(own)}


@pytest.mark.parametrize(
    ("alpha", "metadata", "scale"),
    [
        (None, {}, 1.0),
        (8.0, {}, 8 / RANK),
        (8.0, said(use_rslora=True), 8 / RANK**0.5),
        (8.0, said(use_rslora="true"), 8 / RANK**0.5),
        (8.0, said(use_rslora="False"), 8 / RANK),
        (None, said(use_rslora=True), 1.0),
        (8.0, said(lora_alpha=2), 8 / RANK),  # a layer's own alpha comes first
        (None, said(lora_alpha=2), 2 / RANK),
        (None, said("transformer_2", lora_alpha=2), 2 / RANK),
        (None, {"lora_alpha": "64", "rank": "64"}, 1.0),  # a note for people
        (None, {"lora_alpha": "64", "use_rslora": "true"}, 1.0),
        (8.0, {"lora_adapter_metadata": "{broken"}, 8 / RANK),
        (8.0, {"ss_network_alpha": "1", "format": "pt"}, 8 / RANK),
    ],
)
def test_scale_of_the_factors(opened, alpha, metadata, scale):
    tensors = pair() | ({} if alpha is None else {ROOT + "self_attn.q.alpha": torch.tensor(alpha)})
    layer = opened(tensors, metadata or None).match(TEXT).layers["blocks.0.self_attn.q"]
    assert layer.scale == scale


def test_an_alpha_that_is_no_number_is_refused(opened):
    with pytest.raises(WeightError, match="an alpha of 'much' in its settings, expected a number"):
        opened(pair(), said(lora_alpha="much"))


def test_shards_are_one_lora(tmp_path):
    for number, tensors in enumerate((pair(), GOOD), 1):
        save_file(tensors, tmp_path / f"lora-{number:05}-of-00002.safetensors")
    file = open_lora(tmp_path / "lora-00001-of-00002.safetensors")
    assert set(file.match(TEXT).layers) == {"blocks.0.self_attn.q", "blocks.0.cross_attn.o"}
    assert len(file.digest) == 32


def test_settings_beside_other_files_are_not_read(opened, tmp_path):
    """A folder of LoRAs may hold somebody's adapter_config.json."""
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    assert opened(pair()).match(TEXT).layers["blocks.0.self_attn.q"].scale == 1


def test_a_copy_is_the_same_lora_and_other_bytes_are_another(opened, tmp_path):
    first = opened(pair())
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes())
    assert open_lora(tmp_path / "copy.safetensors").digest == first.digest
    assert opened(pair()).digest != first.digest  # other noise


def test_a_wide_lora_opens_and_matches_without_memory(tmp_path):
    """All layers of a 14B model at rank 64, as a sparse file of 640 MB."""
    spec = TransformerSpec(40, 128, 13824, 40, 16, 16)
    path, header, offset = tmp_path / "wide.safetensors", {}, 0
    for block in range(spec.num_layers):
        for layer, rows, columns in (
            *((f"{kind}_attn_{part}", 5120, 5120) for kind in ("self", "cross") for part in "qkvo"),
            ("ffn_0", 13824, 5120),
            ("ffn_2", 5120, 13824),
        ):
            for end, shape in (("down", [64, columns]), ("up", [rows, 64])):
                size = 2 * shape[0] * shape[1]
                header[f"lora_unet_blocks_{block}_{layer}.lora_{end}.weight"] = {
                    "dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]
                }  # fmt: skip
                offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    report = open_lora(path).match(spec)
    assert (len(report.layers), report.share) == (400, 1)


def test_changes_share_the_matrices_and_leave_the_record_alone(opened):
    file = opened(write("comfyui", entries_of(TEXT)))
    block = load_block(TEXT, Source(random_weights(TEXT)), 0, torch.float32)
    before = block.modulation.clone()
    change = load_change(file, file.match(TEXT), "blocks.0", block)
    changed = with_changes(block, [(change, 0.5)])
    assert changed.qkv.weight is block.qkv.weight
    assert [side.start for side in changed.qkv.sides] == [0, DIM, 2 * DIM]
    assert block.qkv.sides == ()
    assert torch.equal(block.modulation, before)
    assert not torch.equal(changed.modulation, before)
    assert with_changes(block, []) is block
    assert with_changes(block, [((), 1.0)]) is block


def test_a_lora_of_no_block_applies_to_the_rest(opened):
    report = opened({"diffusion_model.head.head.diff_b": noise(16)}).match(TEXT)
    assert (set(report.layers), report.share) == ({"head.head"}, 1)


def test_a_lora_has_strength_one_unless_told(opened):
    assert Lora(opened(pair())).strength == 1
