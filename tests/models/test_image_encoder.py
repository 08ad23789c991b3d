"""Layouts and refusals of the image encoder; its numbers are tests/oracle's business."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import ConfigError, MissingTensor, NumericError, ShapeMismatch, WeightError
from reelpool.models.image_encoder import (
    ImageEncoder,
    image_tensors,
    normalise,
    open_image_encoder,
)
from reelpool.models.open_weights import open_weights
from reelpool.models.quant import Quantised
from reelpool.models.spec import ImageEncoderSpec
from tests.clip_files import to_original

SPEC = ImageEncoderSpec(dim=160, num_layers=3, num_heads=2, ffn_dim=48, image_size=8, patch_size=4)
CPU = torch.device("cpu")
FULL = {**SPEC.__dict__, "num_layers": 4}  # its tensors are those of 3 blocks


def all_tensors():
    """The tower as files have it, with the last block and what follows."""
    draw = torch.Generator().manual_seed(8)
    shapes = image_tensors(ImageEncoderSpec(**FULL))
    shapes |= {f"vision_model.post_layernorm.{kind}": (160,) for kind in ("weight", "bias")}
    return {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def saved(path, weights):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def saved_pth(path, weights):
    torch.save(weights, path)
    return path


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def bare(weights):
    return {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}


def whole_clip(weights):
    """A CLIP model of both towers, whose layers have the same names."""
    text = {
        name.replace("vision_model.", "text_model."): torch.zeros(1)
        for name in weights
        if ".encoder.layers." in name
    }
    return text | weights | {"visual_projection.weight": torch.zeros(1)}


def without_text(weights):
    return {
        name.removeprefix("visual."): tensor
        for name, tensor in to_original(weights, 3).items()
        if name.startswith("visual.")
    }


FORMS = {
    "clip_vision_h": lambda path, w: saved(path / "a.safetensors", w),
    "bare": lambda path, w: saved(path / "a.safetensors", bare(w)),
    "whole clip": lambda path, w: saved(path / "a.safetensors", whole_clip(w)),
    "prefixed": lambda path, w: saved(path / "a.safetensors", prefixed(w, "clip.")),
    "original": lambda path, w: saved_pth(path / "a.pth", to_original(w, 3)),
    "original tower": lambda path, w: saved(path / "a.safetensors", without_text(w)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same_bits(tmp_path, form, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in all_tensors().items()}
    spec, seen = open_image_encoder(open_weights(FORMS[form](tmp_path, weights)))
    assert spec == SPEC
    assert all(
        torch.equal(seen.get(name), weights[name]) and seen.info(name).shape == shape
        for name, shape in image_tensors(spec).items()
    )


def test_the_published_tower_is_the_default():
    assert ImageEncoderSpec().num_tokens == 257
    spec = ImageEncoderSpec()
    last_block = sum(
        torch.Size(shape).numel() for name, shape in image_tensors(spec).items() if ".0." in name
    )
    used = sum(torch.Size(shape).numel() for shape in image_tensors(spec).values())
    # 630.8 M with the last block, the last norm (2 x 1280) and the head (1280 x 1024)
    assert round((used + last_block + 2 * 1280) / 1e6, 1) == 630.8


def test_only_the_blocks_needed_are_loaded(tmp_path):
    weights = all_tensors()
    spec, source = open_image_encoder(open_weights(FORMS["clip_vision_h"](tmp_path, weights)))
    encoder = ImageEncoder(spec, source, torch.float32, CPU)
    used = [t for name, t in weights.items() if ".layers.2." not in name and "post_" not in name]
    assert encoder.num_bytes == sum(tensor.nbytes for tensor in used)
    half = ImageEncoder(spec, source, torch.bfloat16, CPU)
    assert half.num_bytes * 2 == encoder.num_bytes
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    exact, near = encoder.encode(image), half.encode(image)
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.04 * exact.abs().max()  # measured 0.008


def test_scaled_fp8_is_split_with_its_scale(tmp_path):
    weights = to_original(all_tensors(), 3)
    name = "visual.transformer.1.attn.to_qkv"
    scale = torch.tensor(0.5)
    fp8 = (weights[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    decoded = saved(tmp_path / "b.safetensors", weights | {f"{name}.weight": fp8.float() * scale})
    weights |= {f"{name}.weight": fp8, f"{name}.scale_weight": scale}
    path = saved(tmp_path / "a.safetensors", weights)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    rows = []
    for file in (path, decoded):
        spec, source = open_image_encoder(open_weights(file))
        rows.append(ImageEncoder(spec, source, torch.float32, CPU).encode(image))
    assert torch.equal(*rows)
    _, source = open_image_encoder(open_weights(path))
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    assert isinstance(source.matrix(key), Quantised)
    with pytest.raises(WeightError, match="as F8_E4M3, expected a plain tensor"):
        source.get(key)
    with pytest.raises(MissingTensor):
        source.get("vision_model.encoder.layers.2.mlp.fc1.weight")


def test_the_whole_image_is_squashed():
    """The corners count, however long the image is."""
    image = torch.zeros(1, 3, 8, 64)
    image[..., -8:] = 1.0
    pixels = normalise(image, 8)
    assert pixels.shape == (1, 3, 8, 8)
    assert (pixels[0, :, 4, -1] > 1.5).all()
    assert (pixels[0, :, 4, 0] < -1.4).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8)])
def test_images_of_another_shape_are_refused(tmp_path, shape):
    path = FORMS["clip_vision_h"](tmp_path, all_tensors())
    encoder = ImageEncoder(*open_image_encoder(open_weights(path)), torch.float32, CPU)
    with pytest.raises(ConfigError, match=r"images: shape .*; expected \(n, 3, H, W\)"):
        encoder.encode(torch.zeros(shape))


def test_features_that_are_not_finite_are_refused(tmp_path):
    path = FORMS["clip_vision_h"](tmp_path, all_tensors())
    encoder = ImageEncoder(*open_image_encoder(open_weights(path)), torch.float32, CPU)
    with pytest.raises(NumericError, match="the features"):
        encoder.encode(torch.full((1, 3, 8, 8), float("nan")))


OTHERS = {
    "a CLIP text encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "a CLIP encoder under open_clip's own names": "visual.transformer.resblocks.0.ln_1.weight",
    "a T5 text encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "a diffusion transformer": "blocks.0.self_attn.q.weight",
    "no names of an image encoder": "something.else",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path, kind):
    path = saved(tmp_path / "a.safetensors", {OTHERS[kind]: torch.zeros(4, 4)})
    with pytest.raises(WeightError) as caught:
        open_image_encoder(open_weights(path))
    sentence = str(caught.value)
    assert f"a.safetensors: found {kind}, expected a CLIP vision encoder" in sentence
    assert "clip_vision_h.safetensors" in sentence


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_attention_heads": 3}, "3 heads"),
        ({"num_attention_heads": "many"}, "'many' heads"),
        ({"num_attention_heads": True}, "True heads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"layer_norm_eps": -1}, "layer_norm_eps -1"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, config, found):
    source = open_weights(FORMS["clip_vision_h"](tmp_path, all_tensors()))
    with pytest.raises(WeightError) as caught:
        open_image_encoder(source, config)
    assert f"a.safetensors: found {found}" in str(caught.value)


def test_a_tower_of_another_width_is_refused_unless_its_config_tells_the_heads(tmp_path):
    narrow = {**FULL, "dim": 24, "num_layers": 3}
    weights = {n: torch.zeros(s) for n, s in image_tensors(ImageEncoderSpec(**narrow)).items()}
    source = open_weights(saved(tmp_path / "a.safetensors", weights))
    with pytest.raises(WeightError, match="a vision encoder of width 24, expected a CLIP"):
        open_image_encoder(source)
    assert open_image_encoder(source, {"num_attention_heads": 3})[0].num_heads == 3


BLOCK = "vision_model.encoder.layers.1"
DAMAGE = [
    (f"{BLOCK}.self_attn.out_proj.bias", None, MissingTensor),
    ("vision_model.embeddings.position_embedding.weight", None, MissingTensor),
    (f"{BLOCK}.mlp.fc1.weight", (48, 3), ShapeMismatch),
    ("vision_model.embeddings.class_embedding", (7,), ShapeMismatch),
    ("vision_model.embeddings.position_embedding.weight", (7, 160), WeightError),
    ("vision_model.embeddings.position_embedding.weight", (0, 160), WeightError),
    ("vision_model.embeddings.patch_embedding.weight", (160, 4, 4, 4), WeightError),
    ("vision_model.embeddings.patch_embedding.weight", (160,), WeightError),
]


@pytest.mark.parametrize(("name", "shape", "error"), DAMAGE)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, shape, error):
    weights = all_tensors()
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    with pytest.raises(WeightError) as caught:
        open_image_encoder(open_weights(saved(tmp_path / "a.safetensors", weights)))
    assert isinstance(caught.value, error)
    assert error is WeightError or name in str(caught.value)
    assert "a.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(481, 160), (160, 160), (480,), ()])
def test_a_stacked_matrix_that_does_not_split_is_named(tmp_path, shape):
    weights = to_original(all_tensors(), 3)
    name = "visual.transformer.1.attn.to_qkv.weight"
    weights[name] = torch.zeros(shape)
    with pytest.raises(WeightError, match=rf"tensor {name} (of|has) shape"):
        open_image_encoder(open_weights(saved_pth(tmp_path / "a.pth", weights)))
