"""Every layout of one VAE gives the same geometry and the same bits; other kinds are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import MissingTensor, ShapeMismatch, WeightError
from reelpool.models.open_weights import open_weights
from reelpool.models.presets import WAN21_VAE, WAN22_VAE
from reelpool.models.vae_layouts import open_vae
from reelpool.models.wan_vae import expected_tensors, load_vae
from reelpool.models.weights import TensorInfo
from tests import gguf_files
from tests.vae_files import original_name, to_original

SPECS = {
    "2.1": replace(WAN21_VAE, base_dim=4, decoder_base_dim=4),
    "2.2": replace(WAN22_VAE, base_dim=4, decoder_base_dim=8),
    "2.1 odd": replace(
        WAN21_VAE,
        base_dim=6,
        decoder_base_dim=4,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temporal_down=(True, False),
        temporal_factor=2,
        spatial_factor=4,
    ),
    "2.2 odd": replace(
        WAN22_VAE,
        base_dim=4,
        decoder_base_dim=4,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temporal_down=(True, True),
        spatial_factor=8,
    ),
}
CPU = torch.device("cpu")


def random_weights(spec, dtype=torch.float32):
    draw = torch.Generator().manual_seed(6)
    return {
        name: (0.2 * torch.randn(shape, generator=draw)).to(dtype)
        for name, shape in expected_tensors(spec).items()
    }


def saved(path, weights):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def saved_pth(path, weights):
    torch.save(weights, path)
    return path


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def arrays(weights):
    return {name: tensor.float().numpy() for name, tensor in weights.items()}


FORMS = {
    "diffusers": lambda path, w, s: saved(path / "a.safetensors", w),
    "vae.": lambda path, w, s: saved(path / "a.safetensors", prefixed(w, "vae.")),
    "original pth": lambda path, w, s: saved_pth(path / "a.pth", to_original(w, s)),
    "original": lambda path, w, s: saved(path / "a.safetensors", to_original(w, s)),
    "first_stage_model.": lambda path, w, s: saved(
        path / "a.safetensors", prefixed(to_original(w, s), "first_stage_model.")
    ),
    "gguf": lambda path, w, s: gguf_files.write(path / "a.gguf", arrays(to_original(w, s))),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same_bits(tmp_path, form, kind):
    spec = SPECS[kind]
    weights = random_weights(spec)
    found, seen = open_vae(open_weights(FORMS[form](tmp_path, weights, spec)))
    assert found == spec
    assert set(seen.names()) == set(weights)
    assert all(torch.equal(seen.get(name), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_stored_types_are_cast_on_loading(tmp_path, dtype):
    spec = SPECS["2.1 odd"]
    weights = random_weights(spec, dtype)
    path = FORMS["original pth"](tmp_path, weights, spec)
    found, seen = open_vae(open_weights(path))
    vae = load_vae(found, seen, torch.float32, CPU)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, weights[name].float())
    if dtype != torch.float8_e4m3fn:
        values = {n: t.float().numpy() for n, t in to_original(weights, spec).items()}
        halves = {n: t.astype("float16") for n, t in values.items()}
        source = open_weights(gguf_files.write(tmp_path / "a.gguf", halves))
        loaded = load_vae(*open_vae(source), torch.float32, CPU).state_dict()
        assert torch.equal(loaded["quant_conv.bias"], weights["quant_conv.bias"].half().float())


class ShapesOnly:
    """A source whose tensors nobody may read."""

    where = "shapes.safetensors"

    def __init__(self, shapes):
        self._shapes = shapes

    def names(self):
        return iter(self._shapes)

    def info(self, name):
        if name not in self._shapes:
            raise MissingTensor(self.where, name, "it")
        return TensorInfo(name, self.where, torch.float32, self._shapes[name], 0, 4)


@pytest.mark.parametrize("spec", [WAN21_VAE, WAN22_VAE], ids=["2.1", "2.2"])
def test_the_published_geometries_are_found(spec):
    shapes = expected_tensors(spec)
    assert open_vae(ShapesOnly(shapes))[0] == spec
    assert open_vae(ShapesOnly(to_original(shapes, spec)))[0] == spec


def test_a_config_gives_what_shapes_cannot_tell(tmp_path):
    spec = replace(SPECS["2.1 odd"], z_dim=4, latents_mean=(0.1,) * 4, latents_std=(2.0,) * 4)
    source = open_weights(saved(tmp_path / "a.safetensors", random_weights(spec)))
    with pytest.raises(WeightError, match="4 latent channels and no config"):
        open_vae(source)
    config = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4, "patch_size": None}
    assert open_vae(source, config)[0] == spec


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"z_dim": 5}, "found latents_mean"),
        ({"z_dim": [4]}, "z_dim = [4]"),
        ({"base_dim": 8}, "has shape"),
        ({"base_dim": 2**40}, "at most"),
        ({"num_res_blocks": 10**6}, "1000000 blocks"),
        ({"dim_mult": [1] * 99, "temperal_downsample": [False] * 98}, "99 stages"),
        ({"is_residual": True}, "is missing"),
        ({"_class_name": "AutoencoderKL"}, "a VAE of class AutoencoderKL"),
        ({"scale_factor_temporal": 8}, "temporal_factor 8"),
    ],
)
def test_a_config_of_another_vae_is_refused(tmp_path, config, sentence):
    spec = SPECS["2.1 odd"]
    source = open_weights(saved(tmp_path / "a.safetensors", random_weights(spec)))
    own = {"latents_mean": list(spec.latents_mean), "latents_std": list(spec.latents_std)}
    with pytest.raises(WeightError) as caught:
        open_vae(source, own | config)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


OTHERS = {
    "an image VAE (Stable Diffusion)": ("first_stage_model.decoder.conv_in.weight", 4),
    "an image VAE (Stable Diffusion) ": ("decoder.conv_in.weight", 4),
    "the VAE of another video model": ("decoder.conv_in.conv.weight", 5),
    "a tiny preview VAE (TAEHV or TAESD)": ("decoder.1.weight", 4),
    "a transformer": ("blocks.0.self_attn.q.weight", 2),
    "a transformer ": ("encoder.block.0.layer.0.SelfAttention.q.weight", 2),
    "no names of a VAE": ("something.else", 1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path, kind):
    name, rank = OTHERS[kind]
    path = saved(tmp_path / "a.safetensors", {name: torch.zeros((3,) * rank)})
    with pytest.raises(WeightError) as caught:
        open_vae(open_weights(path))
    sentence = str(caught.value)
    assert f"a.safetensors: found {kind.strip()}, expected a Wan video VAE" in sentence
    assert "wan_2.1_vae.safetensors" in sentence


DAMAGE = [
    ("decoder.conv_in.bias", None, MissingTensor),
    ("decoder.conv_out.weight", None, MissingTensor),
    ("encoder.conv_in.weight", None, MissingTensor),
    ("encoder.mid_block.attentions.0.to_qkv.weight", None, MissingTensor),
    ("post_quant_conv.weight", None, MissingTensor),
    ("decoder.norm_out.gamma", (5, 1, 1, 1), ShapeMismatch),
    ("decoder.up_blocks.0.resnets.1.conv2.weight", (3, 5), ShapeMismatch),
    ("encoder.conv_in.weight", (0, 3, 3, 3, 3), WeightError),
    ("encoder.conv_in.weight", (7,), WeightError),
    ("encoder.conv_in.weight", (5, 3, 3, 3, 3), WeightError),
    ("decoder.conv_out.weight", (9, 4, 3, 3, 3), WeightError),
]


@pytest.mark.parametrize(("layout", "kind"), [("original", "2.1"), ("diffusers", "2.2")])
@pytest.mark.parametrize(("name", "shape", "error"), DAMAGE)
def test_tensors_that_do_not_fit_are_named(tmp_path, layout, kind, name, shape, error):
    spec = SPECS[kind]
    weights = random_weights(spec)
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    if layout == "original":
        weights = to_original(weights, spec)
        if error is not MissingTensor:
            name = original_name(name, spec)
    with pytest.raises(WeightError) as caught:
        open_vae(open_weights(saved(tmp_path / "a.safetensors", weights)))
    sentence = str(caught.value)
    assert isinstance(caught.value, error)
    assert "\n" not in sentence
    assert "a.safetensors" in sentence
    assert error is WeightError or name in sentence


def test_a_vae_with_nan_is_refused_on_loading(tmp_path):
    spec = SPECS["2.1 odd"]
    weights = random_weights(spec)
    weights["decoder.conv_in.weight"][0, 0, 0, 0, 0] = float("nan")
    source = open_weights(saved(tmp_path / "a.safetensors", to_original(weights, spec)))
    with pytest.raises(WeightError, match=r"tensor decoder\.conv1\.weight with NaN or infinity"):
        load_vae(*open_vae(source), torch.float32, CPU)
