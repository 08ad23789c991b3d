"""Every layout of one text encoder gives the same geometry and the same bits."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from reelpool.errors import MissingTensor, ShapeMismatch, WeightError
from reelpool.models.keys import text_tensors
from reelpool.models.open_weights import open_weights
from reelpool.models.quant import Quantised, plain
from reelpool.models.spec import TextSpec
from reelpool.models.text import TextEncoder
from reelpool.models.text_layouts import open_text_encoder
from reelpool.models.tokenizer import find_tokenizer
from reelpool.models.weights import TensorInfo
from tests import gguf_files
from tests.sentencepiece_models import gguf_fields, train

SPEC = TextSpec(
    vocab_size=448, dim=64, num_layers=3, num_heads=4, head_dim=8, ffn_dim=96, num_buckets=32
)
DOWN = "encoder.block.2.layer.1.DenseReluDense.wo.weight"

# transformers -> original `.pth`, llama.cpp; facts/wan.md section 4
OUTER = {
    "shared": ("token_embedding", "token_embd"),
    "encoder.final_layer_norm": ("norm", "enc.output_norm"),
}
INNER = {
    "layer.0.layer_norm": ("norm1", "attn_norm"),
    "layer.0.SelfAttention.q": ("attn.q", "attn_q"),
    "layer.0.SelfAttention.k": ("attn.k", "attn_k"),
    "layer.0.SelfAttention.v": ("attn.v", "attn_v"),
    "layer.0.SelfAttention.o": ("attn.o", "attn_o"),
    "layer.0.SelfAttention.relative_attention_bias": ("pos_embedding.embedding", "attn_rel_b"),
    "layer.1.layer_norm": ("norm2", "ffn_norm"),
    "layer.1.DenseReluDense.wi_0": ("ffn.gate.0", "ffn_gate"),
    "layer.1.DenseReluDense.wi_1": ("ffn.fc1", "ffn_up"),
    "layer.1.DenseReluDense.wo": ("ffn.fc2", "ffn_down"),
}


def renamed(weights, column):
    """The weights in the original layout (0) or llama.cpp's (1)."""
    names = {ours: theirs[column] for ours, theirs in OUTER.items()}
    block = ("blocks", "enc.blk")[column]
    for index in range(SPEC.num_layers):
        for ours, theirs in INNER.items():
            names[f"encoder.block.{index}.{ours}"] = f"{block}.{index}.{theirs[column]}"
    return {
        f"{names[name.removesuffix('.weight')]}.weight": tensor for name, tensor in weights.items()
    }


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def arrays(weights):
    return {name: tensor.float().numpy() for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def weights(request):
    """A random encoder under transformers' names."""
    draw = torch.Generator().manual_seed(4)
    return {
        name: (0.2 * torch.randn(shape, generator=draw)).to(request.param)
        for name, shape in text_tensors(SPEC).items()
    }


@pytest.fixture(scope="module")
def random_weights():
    draw = torch.Generator().manual_seed(5)
    return {n: torch.randn(s, generator=draw) for n, s in text_tensors(SPEC).items()}


def transformers_folder(path, weights):
    """As transformers writes it."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=SPEC.vocab_size, d_model=SPEC.dim, d_kv=SPEC.head_dim, d_ff=SPEC.ffn_dim,
        num_layers=SPEC.num_layers, num_heads=SPEC.num_heads, feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )  # fmt: skip
    model = UMT5EncoderModel(config)
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})
    model.to(weights["shared.weight"].dtype).save_pretrained(path)
    return path


def saved(path, weights):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def saved_pth(path, weights):
    torch.save(weights, path)
    return path


def embed_tokens_only(weights):
    rest = dict(weights)
    return {"encoder.embed_tokens.weight": rest.pop("shared.weight")} | rest


def whole_model(weights):
    """With a decoder and a head, as google/umt5-xxl has them."""
    decoder = {
        name.replace("encoder.", "decoder.", 1): torch.zeros(1)
        for name in weights
        if name.startswith("encoder.")
    }
    return weights | decoder | {"lm_head.weight": torch.zeros(1)}


def comfyui(weights):
    content = torch.tensor(list(train()), dtype=torch.uint8)
    return weights | {"spiece_model": content}


FORMS = {
    "folder": transformers_folder,
    "comfyui": lambda path, w: saved(path / "a.safetensors", comfyui(w)),
    "embed_tokens": lambda path, w: saved(path / "a.safetensors", embed_tokens_only(w)),
    "checkpoint": lambda path, w: saved(
        path / "a.safetensors", prefixed(w, "text_encoders.umt5xxl.transformer.")
    ),
    "text_model": lambda path, w: saved(path / "a.safetensors", prefixed(w, "text_model.")),
    "whole model": lambda path, w: saved(path / "a.safetensors", whole_model(w)),
    "original pth": lambda path, w: saved_pth(path / "a.pth", renamed(w, 0)),
    "original": lambda path, w: saved(path / "a.safetensors", renamed(w, 0)),
    "gguf": lambda path, w: gguf_files.write(path / "a.gguf", arrays(renamed(w, 1))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same_bits(weights, tmp_path, form):
    source = open_weights(FORMS[form](tmp_path, weights))
    spec, seen = open_text_encoder(source)
    assert spec == SPEC
    assert set(seen.names()) == set(weights)
    for name, tensor in weights.items():
        stored = seen.get(name)
        assert torch.equal(stored.to(tensor.dtype), tensor)
        assert form == "gguf" or stored.dtype == tensor.dtype


class ShapesOnly:
    """A source whose tensors nobody may read."""

    where = "shapes.safetensors"

    def __init__(self, shapes):
        self._shapes = shapes

    def names(self):
        return iter(self._shapes)

    def info(self, name):
        return TensorInfo(name, self.where, torch.bfloat16, self._shapes[name], 0, 2)


def test_the_published_geometry_is_found():
    assert open_text_encoder(ShapesOnly(text_tensors(TextSpec())))[0] == TextSpec()


def encoded(path, dtype=torch.float32):
    source = open_weights(path)
    spec, seen = open_text_encoder(source)
    words = find_tokenizer(source)
    return TextEncoder(spec, seen, words, dtype, torch.device("cpu")).encode("a red ring spins")


def test_scaled_fp8_and_gguf_are_decoded_on_loading(tmp_path, random_weights):
    """Both give what the decoded weights give."""
    matrices = {n: w for n, w in random_weights.items() if "SelfAttention.q" in n or n == DOWN}
    scaled, decoded, words = {}, comfyui(random_weights), comfyui({})
    for name, matrix in matrices.items():
        scale = torch.tensor(0.37)
        scaled[name] = (matrix / scale).to(torch.float8_e4m3fn)
        scaled[name.removesuffix("weight") + "scale_weight"] = scale
        decoded[name] = scaled[name].float() * scale
    scaled["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    fp8 = saved(tmp_path / "fp8.safetensors", random_weights | scaled | words)
    plain_file = saved(tmp_path / "plain.safetensors", decoded)
    assert isinstance(open_text_encoder(open_weights(fp8))[1].matrix(DOWN), Quantised)
    expected = encoded(plain_file)
    assert torch.equal(encoded(fp8), expected)
    assert expected[:4].std() > 0.1

    kind = GGMLQuantizationType.Q8_0
    blocks = {n: quantize(w.numpy(), kind) for n, w in renamed(random_weights, 1).items()
              if "attn_q" in n or ("ffn" in n and w.ndim == 2) or "embd" in n}  # fmt: skip
    rest = {n: w for n, w in arrays(renamed(random_weights, 1)).items() if n not in blocks}
    gguf = gguf_files.write(
        tmp_path / "q8.gguf",
        rest,
        fields=gguf_fields(train()),
        blocks=[(name, "Q8_0", data) for name, data in blocks.items()],
    )
    back = {name: torch.from_numpy(dequantize(data, kind)) for name, data in blocks.items()}
    plain_file = saved(
        tmp_path / "plain.safetensors", renamed(random_weights, 1) | back | comfyui({})
    )
    _, seen = open_text_encoder(open_weights(gguf))
    assert isinstance(seen.matrix("shared.weight"), Quantised)
    assert torch.equal(
        plain(seen.matrix("shared.weight"), torch.float32), back["token_embd.weight"]
    )
    assert torch.equal(encoded(gguf), encoded(plain_file))


def test_the_config_gives_what_shapes_cannot_tell(tmp_path, random_weights):
    source = open_weights(saved(tmp_path / "a.safetensors", random_weights))
    config = {"layer_norm_epsilon": 1e-5, "relative_attention_max_distance": 64, "d_model": 1}
    spec, _ = open_text_encoder(source, config)
    assert (spec.eps, spec.max_distance, spec.dim) == (1e-5, 64, 64)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "t5"}, "model_type 't5' in its config.json"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu' in its config.json"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon 'small' in its config.json"),
        ({"relative_attention_max_distance": -1}, "relative_attention_max_distance -1"),
        ({"relative_attention_max_distance": 0.5}, "relative_attention_max_distance 0.5"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, random_weights, config, found):
    source = open_weights(saved(tmp_path / "a.safetensors", random_weights))
    with pytest.raises(WeightError) as caught:
        open_text_encoder(source, config)
    assert f"a.safetensors: found {found}" in str(caught.value)


OTHERS = {
    "a CLIP encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "a CLIP image encoder": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "a language model": "blk.0.attn_q.weight",
    "a language model ": "model.layers.0.self_attn.q_proj.weight",
    "a diffusion transformer": "model.diffusion_model.blocks.0.self_attn.q.weight",
    "a VAE": "decoder.conv1.weight",
    "no names of a text encoder": "something.else",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path, kind):
    path = saved(tmp_path / "a.safetensors", {OTHERS[kind]: torch.zeros(4, 4)})
    with pytest.raises(WeightError) as caught:
        open_text_encoder(open_weights(path))
    sentence = str(caught.value)
    assert f"a.safetensors: found {kind.strip()}, expected Wan's text encoder" in sentence
    assert "umt5_xxl_fp16.safetensors" in sentence


def test_a_t5_encoder_with_one_table_is_refused(tmp_path, random_weights):
    weights = {
        name: tensor
        for name, tensor in random_weights.items()
        if "relative" not in name or ".0.layer.0." in name
    }
    with pytest.raises(MissingTensor, match="T5 encoders such as t5xxl have only one") as caught:
        open_text_encoder(open_weights(saved(tmp_path / "a.safetensors", weights)))
    assert "encoder.block.1." in caught.value.tensor


DAMAGE = [
    ("shared.weight", None, MissingTensor),
    (DOWN, None, MissingTensor),
    ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", None, MissingTensor),
    ("encoder.final_layer_norm.weight", None, MissingTensor),
    ("encoder.block.1.layer.0.layer_norm.weight", (3,), ShapeMismatch),
    ("shared.weight", (448, 3), ShapeMismatch),
    ("shared.weight", (448,), WeightError),
    ("shared.weight", (0, 64), WeightError),
    (DOWN, (64, 96, 1), ShapeMismatch),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 5), WeightError),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", (4,), WeightError),
]


@pytest.mark.parametrize("layout", ["transformers", "original"])
@pytest.mark.parametrize(("name", "shape", "error"), DAMAGE)
def test_tensors_that_do_not_fit_are_named(tmp_path, random_weights, layout, name, shape, error):
    weights = dict(random_weights)
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    if layout == "original":
        weights = renamed(weights, 0)
        name = next(iter(renamed({name: None}, 0)))
    with pytest.raises(WeightError) as caught:
        open_text_encoder(open_weights(saved(tmp_path / "a.safetensors", weights)))
    assert isinstance(caught.value, error)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert "a.safetensors" in str(caught.value)
